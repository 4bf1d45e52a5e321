"""The config of a sweep: a training config with a [space] table and a [search] table. No Ray.

    [space]
    optim.lr = { log = [1e-4, 1e-2] }
    method.margin = { linear = [0.1, 1.0] }
    method.rounds = { integer = [1, 3] }
    method.priority = { choice = ["project", "sum"], when = "lcgh" }

A point of the space is a table {"optim.lr": 3e-3, …} with a value for each dimension of its method. The config of the
file is the first point of every sweep. A point may also hold the number of its trial, and for a member of a population
its origin: the point of another member, and the number of epochs after which it continued from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import optuna
import tyro
from pydantic import Field, field_validator, model_validator

from hashray.config import Config, parse_toml, validate
from hashray.errors import ConfigError, perhaps
from hashray.methods import known_methods
from hashray.storage import read_url
from hashray.train.config import TrainConfig, can_change

KIND, NUMBER, ORIGIN = "method.kind", "trial", "origin"
MOST_DRAWS, MOST_CHECKED, SHOWN = 100, 1_000, 4
KINDS = ("log", "linear", "integer", "choice")
# Equal for all trials, so that scores are comparable and all trials read the same corpus.
FIXED = {
    "corpus", "out", "features", "init", "pseudo_labels", "self_training", "changes", "seed", "epochs", "input",
    "workers", "cpus_per_worker", "gpu", "ray", "max_failures", "max_bad", "validation_rows", "validation_every",
    "select_by",
    "checkpoint_every", "checkpoint_steps", "memory_limit_mib", "tensorboard", "unlabelled",
    "backbone.frozen",
}  # fmt: skip
Point = dict[str, Any]


class Dimension(Config):
    """One range or list of values: exactly one of log, linear, integer and choice."""

    log: tuple[float, float] | None = Field(None, description="Range that is drawn on a logarithmic scale")
    linear: tuple[float, float] | None = Field(None, description="Range that is drawn uniformly")
    integer: tuple[int, int] | None = Field(None, description="Range of whole numbers, both ends included")
    choice: tuple[Any, ...] | None = Field(None, description="List of values")
    when: str | None = Field(None, description="Method that has this dimension; unset: every method")

    @model_validator(mode="after")
    def _one_range(self) -> Dimension:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; found {', '.join(given) or 'none'}")
        if self.choice is not None:
            if len(self.choice) < 2:
                raise ValueError("a choice needs two values or more")
            return self
        low, high = self.ends
        if not low < high or not all(math.isfinite(end) for end in (low, high)):
            raise ValueError(f"the range [{low:g}, {high:g}] is empty or not finite")
        if self.log is not None and low <= 0:
            raise ValueError(f"a log range begins above 0, but this one begins at {low:g}")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """Both ends of a range, or every value of a choice."""
        return next(ends for name in KINDS if (ends := getattr(self, name)) is not None)

    def checked(self) -> Sequence[Any]:
        """Values to validate before any trial: all of a choice or of few integers, else both ends and one between."""
        if self.integer is not None:
            every = range(self.integer[0], self.integer[1] + 1)
            return every if len(every) <= MOST_CHECKED else (self.ends[0], self.ends[0] + 1, self.ends[1])
        if self.choice is not None:
            return self.choice
        low, high = self.ends
        return low, high, low + (high - low) / math.pi  # a fraction, which an integer field refuses

    def holds(self, value: Any) -> bool:
        """Whether this dimension could draw the value."""
        if self.choice is not None:
            return value in self.choice
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.ends[0] <= value <= self.ends[1] and (self.integer is None or value == int(value))

    def within(self, value: Any) -> Any:
        """The nearest value that this dimension could draw."""
        if self.choice is not None:
            return value
        nearest = min(max(value, self.ends[0]), self.ends[1])
        return int(nearest) if self.integer is not None else float(nearest)

    def draw(self, name: str, trial: Any) -> Any:
        """Draw a value through an Optuna trial."""
        if self.choice is not None:
            return trial.suggest_categorical(name, list(self.choice))
        if self.integer is not None:
            return trial.suggest_int(name, *self.integer)
        low, high = self.ends
        return trial.suggest_float(name, low, high, log=self.log is not None)

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The Optuna distribution of `draw`."""
        if self.choice is not None:
            return optuna.distributions.CategoricalDistribution(list(self.choice))
        if self.integer is not None:
            return optuna.distributions.IntDistribution(*self.integer)
        low, high = self.ends
        return optuna.distributions.FloatDistribution(low, high, log=self.log is not None)


class SearchConfig(Config):
    """How to search the space."""

    trials: int = Field(32, ge=2, description="Number of configs to try")
    algorithm: Literal["tpe", "random"] = Field("tpe", description="Source of the points: Optuna's TPE, or random")
    scheduler: Literal["asha", "median", "pbt", "none"] = Field(
        "asha",
        description="Rule that stops trials early; pbt: the worst continue from the best at changed values instead",
    )
    grace_epochs: int | None = Field(
        None, ge=1, description="Epochs before a trial may stop, or between two exchanges; unset: a ninth of all epochs"
    )
    reduction_factor: int = Field(3, ge=2, description="With asha, one of this many trials continues past each rung")
    at_once: int | None = Field(None, ge=1, description="Trials in flight; unset: as many as the cluster can train")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the search; trials train with the seed of the config")
    max_failures: int = Field(
        1, ge=0, description="Retries of a failed segment, and restarts of a trial after its process died"
    )
    report_seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (1, 2, 3), description="Seeds for the final training of winner and default, which are scored on the queries"
    )

    @field_validator("report_seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("report_seeds holds a seed twice; name each once")
        return value

    @model_validator(mode="after")
    def _one_searches(self) -> SearchConfig:
        if self.scheduler == "pbt" and self.algorithm != "random":
            raise ValueError('scheduler = "pbt" starts from random points: set algorithm = "random"')
        return self


class SweepConfig(TrainConfig):
    """Search a space of values around a training config."""

    search: SearchConfig = SearchConfig()
    space: Annotated[dict[str, Dimension], tyro.conf.Suppress] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _report_seeds_are_fresh(self) -> SweepConfig:
        if self.seed in self.search.report_seeds:
            raise ValueError(
                f"search.report_seeds holds seed {self.seed} of the config, which chooses the winner: a fair "
                "comparison needs other seeds"
            )
        return self

    @property
    def base(self) -> TrainConfig:
        """The training config of the file, which is trial 0 of the sweep."""
        return self.at({})

    def kinds(self) -> tuple[str, ...]:
        """The methods that the sweep trains."""
        dimension = self.space.get(KIND)
        return (self.method.kind,) if dimension is None else tuple(str(kind) for kind in dimension.ends)

    def active(self, kind: str) -> dict[str, Dimension]:
        """The dimensions of a method, without method.kind itself."""
        return {name: d for name, d in self.space.items() if name != KIND and d.when in (None, kind)}

    def default(self) -> Point:
        """The point of the config in the file."""
        table = self.base.model_dump(mode="json")
        point = {name: look_up(table, name) for name in self.active(self.method.kind)}
        return ({KIND: self.method.kind} if KIND in self.space else {}) | point

    def draw(self, trial: Any) -> dict[str, int]:
        """Draw a value for every dimension of a method through an Optuna trial; return its number as a point."""
        kind = self.space[KIND].draw(KIND, trial) if KIND in self.space else self.method.kind
        for name, dimension in self.active(kind).items():
            dimension.draw(name, trial)
        return {NUMBER: trial.number}

    def first_points(self) -> list[Point]:
        """As many points as trials: the default, then random ones. An invalid combination is drawn again."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=self.search.seed))
        points = [self.default()]
        for _ in range(MOST_DRAWS * self.search.trials):
            if len(points) == self.search.trials:
                return points
            drawn = study.ask()
            self.draw(drawn)
            try:
                self.at(drawn.params)
            except ConfigError:
                continue
            points.append(drawn.params)
        raise ConfigError(f"hardly any point of the space is a valid config ({len(points)} drawn); narrow the ranges")

    def at(self, point: Mapping[str, Any]) -> TrainConfig:
        """The training config of a point, validated after every epoch. A member of a population has changes.

        Raises:
            ConfigError: the values of this point are not a valid training config.
        """
        table = self.model_dump(mode="json", exclude_unset=True, exclude={"search", "space"})
        kind = point.get(KIND, self.method.kind)
        if kind != self.method.kind and kind in known_methods():
            fields = known_methods()[kind][0].model_fields
            kept = {name: value for name, value in table["method"].items() if name in fields and name != "preset"}
            table["method"] = {**kept, "kind": kind}
        (_, values), *later = _lineage(point)
        for name, value in values.items():
            _put(table, name, value)
        changes, before = [], values
        for after, now in later:
            change: dict[str, Any] = {}
            for name in now:
                if now[name] != before[name]:
                    _put(change, name, now[name])
            changes += [{"after": after, **change}] if change else []
            before = now
        if changes:
            table["changes"] = changes
        table |= {"validation_every": 1, "checkpoint_every": 1, "tensorboard": False}
        return validate(TrainConfig, table, ", ".join(f"{n} = {v!r}" for n, v in values.items()) or "the config")

    def corners(self) -> list[Point]:
        """The default, and for each dimension a point at each of its ends."""
        return [self.default(), *[point for name, d in self.space.items() for point in self.points_of(name, d.ends)]]

    def points_of(self, name: str, values: Iterable[Any]) -> list[Point]:
        """Points with each of these values in one dimension, for every method that has it."""
        dimension = self.space[name]
        kinds = (dimension.when,) if dimension.when else self.kinds()
        methods: list[Point] = [{KIND: kind} for kind in kinds] if KIND in self.space and name != KIND else [{}]
        return [{**point, name: value} for value in values for point in methods]


def read_sweep(url: str) -> SweepConfig:
    """Read a sweep from a local TOML file or from S3. The caller applies flags and then calls `check_sweep`.

    Raises:
        InputError: the file does not exist.
        ConfigError: the file has faults; the text lists all of them.
    """
    table = parse_toml(read_url(url), url)
    space = table.pop("space", None)
    if not isinstance(space, dict) or not space:
        raise ConfigError(
            f"{url} has no [space] table: add one with the values to try, such as optim.lr = {{ log = [1e-4, 1e-2] }}; "
            "a config without one is for `hashray train`"
        )
    return validate(SweepConfig, {**table, "space": _flat(space)}, url)


def check_sweep(config: SweepConfig, title: str) -> None:
    """Refuse a sweep with an invalid value in one of its ranges, or without rows to compare trials by.

    Raises:
        ConfigError: the sweep has faults; the text lists all of them.
    """
    faults = [fault for name, dimension in config.space.items() for fault in _faults(config, name, dimension)]
    if not config.validation_rows:
        faults.append("validation_rows: 0 leaves no rows to compare trials by; the query split is never used for this")
    if config.changes:
        faults.append('changes: a sweep does not take any; scheduler = "pbt" finds changes')
    if config.self_training is not None:
        faults.append("self_training: a sweep does not take it; train the winner with [self_training] afterwards")
    if not faults:
        outside = [name for name, value in config.default().items() if not config.space[name].holds(value)]
        faults += [
            f"space.{name}: the value {config.default()[name]!r} of the config is not in the range, but it is "
            "the first trial of every sweep; widen the range, or change the value in the config"
            for name in outside
        ]
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError(f"{title}: {count}\n" + "\n".join(f"  {fault}" for fault in faults))


def _faults(config: SweepConfig, name: str, dimension: Dimension) -> list[str]:
    top = name.partition(".")[0]
    known = sorted(TrainConfig.model_fields)
    if top not in known:
        return [f"space.{name}: unknown key{perhaps(top, known) or '.'} Known here: {', '.join(known)}"]
    if name in FIXED or top in FIXED or name in ("method", "optim", "augment"):
        return [f"space.{name}: this is the same for all trials of a sweep; set it in the config"]
    if name == KIND and dimension.when is not None:
        return [f"space.{name}: when = {dimension.when!r} would make the method depend on the method; leave it out"]
    if config.backbone.frozen and (top in ("backbone", "augment") or name in ("optim.trunk_lr_factor", "precision")):
        return [f"space.{name}: with backbone.frozen all trials share their features, so this changes nothing"]
    if config.search.scheduler == "pbt" and not can_change(name):
        return [f'space.{name}: scheduler = "pbt" changes values during a training, but this one is fixed at its start']
    if dimension.when is not None and dimension.when not in config.kinds():
        trained = ", ".join(config.kinds())
        hint = perhaps(dimension.when, config.kinds())
        return [f"space.{name}: when = {dimension.when!r}, but the sweep trains only {trained}{hint}"]
    faults: dict[str, None] = {}
    for point in config.points_of(name, dimension.checked()):
        try:
            config.at(point)
        except ConfigError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            faults |= dict.fromkeys(f"space.{name}: {line}" for line in lines)
    unique = list(faults)
    more = f"space.{name}: and {len(unique) - SHOWN} more such values; list the valid ones as a choice"
    return unique if len(unique) <= SHOWN else [*unique[:SHOWN], more]


def _flat(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted names. A table that names a kind of range, or holds no table, is a dimension."""
    flat: dict[str, Any] = {}
    for name, value in space.items():
        inner = (
            isinstance(value, dict)
            and not set(value) & {*KINDS, "when"}
            and any(isinstance(entry, dict) for entry in value.values())
        )
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"the space\n  {name}: {parent} is a value and has no {last}")
    table[last] = value


def values_of(point: Mapping[str, Any]) -> Point:
    """The values of a point, without the number and the origin of its trial."""
    return {name: value for name, value in point.items() if name not in (NUMBER, ORIGIN)}


def look_up(table: Mapping[str, Any], name: str) -> Any:
    """Look up a dotted name in nested tables."""
    value: Any = table
    for part in name.split("."):
        value = value[part]
    return value


def _lineage(point: Mapping[str, Any]) -> list[tuple[int, Point]]:
    """The values that trained a member's weights, each set with the number of epochs after which it began."""
    origin = donor_of(point)
    return [(0, values_of(point))] if origin is None else [*_lineage(origin[1]), (origin[0], values_of(point))]


def donor_of(point: Mapping[str, Any]) -> tuple[int, Point] | None:
    """The epochs after which a member continued from a donor's weights, and the donor's point; None without a donor."""
    epochs, donor = point.get(ORIGIN) or (0, None)
    return None if donor is None else (int(epochs), donor)


def milestones(search: SearchConfig, most: int, epochs: int) -> list[int]:
    """Numbers of epochs after which a trial reports and may stop: asha's rungs, or every grace_epochs, and the end.

    Args:
        most: epochs of the longest trial, which place the rungs for all trials.
        epochs: epochs of this trial.

    >>> milestones(SearchConfig(grace_epochs=2, reduction_factor=3), 20, 20)
    [2, 6, 18, 20]
    >>> milestones(SearchConfig(grace_epochs=2, reduction_factor=3), 20, 10)
    [2, 6, 10]
    >>> milestones(SearchConfig(scheduler="median", grace_epochs=3), 8, 8)
    [3, 6, 8]
    """
    grace = grace_epochs(search, most)
    if search.scheduler == "none":
        return [epochs]
    if search.scheduler == "asha":
        rungs = [
            grace * search.reduction_factor**k for k in range(epochs) if grace * search.reduction_factor**k < epochs
        ]
    else:
        rungs = list(range(grace, epochs, grace))
    return [*rungs, epochs]


def grace_epochs(search: SearchConfig, epochs: int) -> int:
    """Epochs before a trial may stop."""
    return search.grace_epochs or max(1, epochs // 9)

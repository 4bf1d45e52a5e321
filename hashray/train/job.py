"""What a training is, worked out on the driver from labels and splits alone, before anything starts. No Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hashray import artifact
from hashray.artifact import canonical, sha256_hex
from hashray.data.columns import in_split
from hashray.data.corpus import Corpus
from hashray.errors import ConfigError, InputError, MismatchError
from hashray.methods import build_method, known_methods
from hashray.methods.backbone import build_trunk, settings_by_content
from hashray.methods.base import LabelTable, Method
from hashray.model import Model
from hashray.train.batches import EpochPlan, held_out
from hashray.train.config import LEAST_STEPS, USUAL_EPOCHS, TrainConfig
from hashray.train.precision import AnyTrainConfig
from hashray.train.selection import Selection

PSEUDO_SPLITS = ("query-pseudo", "database-pseudo")
OF_STEPS = ("epochs", "batch_size", "optim", "augment", "init", "ema_decay", "checkpoint_steps", "shuffle_window")
SHORT_PIXELS = 400_000_000  # two minutes of a small trunk on one core


@dataclass(frozen=True)
class TrainJob:
    """What every worker of a training needs to know. Sent to workers as it is.

    Attributes:
        config: with absolute paths and a decided precision.
        source: url of the corpus, or of its cached features.
        validation: ids of the train rows held out for validation.
        validation_given: whether the corpus's own validation rows choose the model instead.
        table: the distinct label rows, [u, c].
        in_memory: whether each worker holds all training rows; else they are streamed.
        checkpoints: folder or url of the checkpoints of all runs of this job.
        run: name of this run below it.
        start: url of a checkpoint to begin from; None begins with fresh weights.
        until: epochs after which to stop, counted over all phases; None trains to the end.
    """

    config: TrainConfig
    source: str
    num_classes: int
    validation: tuple[str, ...]
    validation_given: bool
    table: LabelTable
    plan: EpochPlan
    in_memory: bool
    checkpoints: str = ""
    run: str = ""
    start: str | None = None
    until: int | None = None

    @property
    def selection(self) -> Selection:
        """The training rows."""
        return Selection(frozenset(self.validation), self.config.pseudo_labels, self.config.with_unlabelled)


def require_validation(config: TrainConfig, corpus: Corpus, what: str) -> None:
    """Refuse a corpus and a config that give no validation rows.

    Raises:
        InputError: `what` is done by validation rows.
    """
    if validation_of(config, corpus) == (False, 0):
        raise InputError(f"{what} by validation rows: set validation_rows above 0, and have 5 train rows with labels")


def validation_of(config: TrainConfig, corpus: Corpus) -> tuple[bool, int]:
    """Whether the corpus's own validation rows choose the model, else how many train rows do; none without labels."""
    given, wanted = config.validation(corpus.count("validation"), corpus.count("train"))
    tables = corpus.row_tables("validation" if given else "train") if given or wanted else iter(())
    labelled = any(pc.sum(pc.list_value_length(table.column("labels"))).as_py() for table in tables)
    return (given, wanted) if labelled else (False, 0)


def with_epochs(config: AnyTrainConfig, train: int, validation: int, unlabelled: int) -> AnyTrainConfig:
    """The config with `epochs` decided from the rows of three splits: as set, else 20, or more where steps are few.

    Twenty epochs of 500 rows are 80 steps, in which no method learns much (docs/TRAINING.md has the scores).
    """
    if config.epochs is not None:
        return config
    rows = train - config.validation(validation, train)[1] + (unlabelled if config.with_unlabelled else 0)
    steps = max(1, -(-rows // config.batch_size))
    return config.model_copy(update={"epochs": max(USUAL_EPOCHS, -(-LEAST_STEPS // steps))})


def with_epochs_for(config: AnyTrainConfig, corpus: Corpus) -> AnyTrainConfig:
    """As `with_epochs`, for the rows of a corpus."""
    return with_epochs(config, *(corpus.count(split) for split in ("train", "validation", "unlabelled")))


def require_rows(config: TrainConfig, corpus: Corpus, why: str) -> None:
    """Refuse a corpus without rows to train on.

    Raises:
        InputError: neither train rows nor, for a method without need of labels, unlabelled ones.
    """
    if _method_of(config).needs_labels:
        corpus.require("train", why)
    elif not corpus.count("train") + corpus.count("unlabelled"):
        raise InputError(
            f"{corpus.store.url} has neither train nor unlabelled rows for {why}; ingest it with --split-protocol "
            "random, which makes all rows but the queries train"
        )


def _method_of(config: TrainConfig) -> type[Method]:
    return known_methods()[config.method.kind][1]


def require_labels(config: TrainConfig, corpus: Corpus) -> None:
    """Refuse a corpus whose labels cannot teach the method, from labels and splits alone.

    Raises:
        InputError: a train row without a label, fewer than two classes, no unlabelled rows where the config wants
            them, or no pseudo-unseen classes.
    """
    rows, without, seen = 0, 0, np.zeros((0, corpus.num_classes), dtype=np.uint8)
    for table in corpus.row_tables("train"):
        labels = corpus.label_matrix(table)
        rows, without = rows + len(labels), without + int((labels.sum(1) == 0).sum())
        if len(seen) < 2:
            seen = np.unique(np.concatenate([seen, labels]), axis=0)[:2]
    method = _method_of(config)
    if without and method.needs_labels:
        others = " or ".join(sorted(kind for kind, (_, other) in known_methods().items() if not other.needs_labels))
        raise InputError(
            f"{without:,} of {rows:,} train rows have no label, {config.method.kind} needs one for each; "
            f"ingest them again as split unlabelled, or with labels, or train a method without labels: {others}"
        )
    if method.learns_from_labels(config.method) and len(seen) < 2:
        names = [corpus.classes[i] for i in np.flatnonzero(seen.any(0))]
        raise InputError(
            f"all {rows:,} train rows of {corpus.store.url} have the same label ({', '.join(names)}). "
            "One class cannot teach a code what differs: ingest images of two classes or more"
        )
    if config.unlabelled and not corpus.count("unlabelled"):
        raise InputError(f"unlabelled = true, and {corpus.store.url} has no unlabelled rows")
    if config.select_by == "harmonic":
        for name in PSEUDO_SPLITS:
            corpus.require(name, 'select_by = "harmonic" (hashray ingest --pseudo-unseen-classes N)')


def plan_job(config: TrainConfig, data: Corpus) -> TrainJob:
    """Plan the training on a corpus or on its cached features, which `require_labels` has seen.

    Raises:
        ConfigError: a change gives another network or other phases.
        InputError: no validation row has a relevant item among the others.
    """
    require_one_network(config, data.num_classes)
    given, wanted = validation_of(config, data)
    validation = held_out(_ids(data, "train"), wanted, config.seed) if wanted else set[str]()
    selection = Selection(frozenset(validation), config.pseudo_labels, config.with_unlabelled)
    counts, sizes, tables = [], [], list[LabelTable]()
    held = others = np.zeros(data.num_classes, dtype=bool)
    for record, whole in zip(data.parts, data.row_tables("all"), strict=True):
        table = selection.take(whole)
        counts.append(len(table))
        sizes.append(data.input_bytes(record) * len(table) // max(1, record.rows or 0))
        known = selection.labels(data, table) == 1
        if known.any():
            piece = LabelTable.of(torch.as_tensor(known[known.any(1)].astype(np.uint8)))
            tables = [LabelTable.sum([*tables, piece])]
        train = whole.filter(pa.array(in_split(whole.column("split"), "train")))
        out = np.array([row_id in validation for row_id in train.column("id").to_pylist()], dtype=bool)
        labels = data.label_matrix(train)
        held, others = held | labels[out].any(0), others | labels[~out].any(0)
    if validation and not (held & others).any():
        raise InputError(
            f"the {len(validation):,} validation rows share no class with the other train rows, so they cannot be "
            "scored. Train without them (--validation-rows 0), or have more train rows in each class"
        )
    if not tables:
        if _method_of(config).needs_labels:
            raise InputError(f"{data.store.url} has no labelled row to train on")
        tables = [LabelTable.empty(data.num_classes)]
    plan = EpochPlan(tuple(counts), config.batch_size, config.shuffle_window, config.seed, tuple(sizes))
    return TrainJob(
        config=config, source=data.store.url, num_classes=data.num_classes,
        validation=tuple(sorted(validation)), validation_given=given, table=tables[0], plan=plan,
        in_memory=fits_memory(config, plan.rows * int(np.prod(input_shape(config, data))) * input_type(data).itemsize),
    )  # fmt: skip


def _ids(data: Corpus, split: str) -> Iterator[str]:
    return (row_id for table in data.row_tables(split) for row_id in table.column("id").to_pylist())


def run_of(config: TrainConfig, corpus: Corpus, init: Model | None) -> tuple[str, dict[str, str]]:
    """The hash of everything a trained model depends on, and the manifest ids of what it is made from.

    Raises:
        InputError: the model to start from does not fit. MismatchError: pseudo-labels of another corpus.
    """
    parents = {"corpus": corpus.manifest.id}
    if init is not None:
        if init.classes != corpus.classes:
            raise InputError(f"init = {config.init!r} has other classes than the corpus, or in another order")
        fresh = untrained(config, corpus.num_classes)
        try:
            fresh.load_state_dict(init.method.state_dict())
        except RuntimeError as error:
            fault = str(error).splitlines()[1].strip()
            raise InputError(f"init = {config.init!r} is of another method, size or trunk: {fault}") from error
        parents["init"] = init.manifest.id
    if config.pseudo_labels is not None:
        pseudo = artifact.load_manifest(config.pseudo_labels, "pseudo-labels")
        if pseudo.parents["corpus"] != corpus.manifest.id:
            raise MismatchError(f"pseudo_labels = {config.pseudo_labels!r} are of another corpus")
        parents["pseudo-labels"] = pseudo.id
    settings = config.result_of()
    settings["backbone"] = settings_by_content(config.backbone, settings["backbone"])  # not by where files are
    return sha256_hex(canonical({"config": settings, "parents": parents}))[:16], parents


def is_short(config: TrainConfig, epochs: int, rows: int) -> bool:
    """Whether a training in memory is over before a Ray cluster has paid for its start: there is little to compute.

    A step forward and back costs about three times the trunk's forward pass.
    """
    side = 1 if config.backbone.frozen else config.backbone.image_size
    return 3 * epochs * rows * side**2 <= SHORT_PIXELS


def fits_memory(config: TrainConfig, size_bytes: int) -> bool:
    """Whether each worker holds all training rows, which are this large as the loop gets them; else they stream."""
    return config.input == "memory" or (config.input == "auto" and size_bytes <= config.memory_limit_mib << 20)


def input_shape(config: TrainConfig, data: Corpus) -> tuple[int, ...]:
    """The shape of one row as the loop gets it: pixels (3, s, s), or cached features (d,)."""
    if data.manifest.kind == "features":
        return (int(data.manifest.info["feature_dim"]),)
    return (3, config.backbone.image_size, config.backbone.image_size)


def input_type(data: Corpus) -> np.dtype[Any]:
    """The number type of `input_shape`."""
    return np.dtype(np.float32 if data.manifest.kind == "features" else np.uint8)


def total_epochs(config: TrainConfig, num_classes: int) -> int:
    """Epochs of a whole training, over all phases."""
    return _epochs(untrained(config, num_classes), config)


def has_steps(config: TrainConfig, num_classes: int) -> bool:
    """Whether the method learns by steps, not in closed form."""
    return any(phase.steps for phase in untrained(config, num_classes).phases(config.epochs or USUAL_EPOCHS))


def ignored(config: TrainConfig, num_classes: int) -> list[str]:
    """The settings of steps that are not their defaults, for a method without steps."""
    if has_steps(config, num_classes):
        return []
    defaults = {name: TrainConfig.model_fields[name].get_default(call_default_factory=True) for name in OF_STEPS}
    return [name for name, default in defaults.items() if getattr(config, name) != default]


def _epochs(method: Method, config: TrainConfig) -> int:
    return sum(phase.epochs for phase in method.phases(config.num_epochs))


def untrained(config: TrainConfig, num_classes: int) -> Method:
    """The config's method with fresh weights; those of the trunk are not read."""
    return build_method(config.method, build_trunk(config.backbone, load_weights=False), num_classes)


def require_phases(config: TrainConfig, num_classes: int) -> None:
    """Refuse what the method cannot train with these epochs, trunk and changes, before anything is computed.

    Raises:
        ConfigError: as the method's phases raise it, or `require_one_network`.
    """
    total_epochs(config, num_classes)
    require_one_network(config, num_classes)


def require_one_network(config: TrainConfig, num_classes: int) -> None:
    """Refuse changes after which the weights so far would not fit.

    Raises:
        ConfigError: another network, other phases, or a change after the end.
    """
    if not config.changes:
        return
    first, *later = [untrained(config_of_segment, num_classes) for _, config_of_segment in config.segments()]
    total = _epochs(first, config)
    for change, method in zip(config.changes, later, strict=True):
        if change.after >= total:
            raise ConfigError(f"changes: after = {change.after}, and the training ends after {total} epochs")
        if not _same_network(first, method, config.num_epochs):
            raise ConfigError(
                f"changes, after {change.after} epochs: {', '.join(change.method)} would give another network or other "
                "phases; weights and rates can change while a model trains"
            )


def _same_network(first: Method, other: Method, epochs: int) -> bool:
    """Whether both have the same phases and, from the same weights, the same codes of rows and of classes."""
    phases = [[(phase.name, phase.round, phase.epochs) for phase in method.phases(epochs)] for method in (first, other)]
    state, shapes = first.state_dict(), {name: tensor.shape for name, tensor in other.state_dict().items()}
    if phases[0] != phases[1] or {name: tensor.shape for name, tensor in state.items()} != shapes:
        return False
    other.load_state_dict(state)
    features = torch.randn(8, first.trunk.feature_dim, generator=torch.Generator().manual_seed(0))
    classes = [method.class_codes() for method in (first, other)]
    return torch.equal(first.encode(features), other.encode(features)) and np.array_equal(*classes)  # type: ignore[arg-type]

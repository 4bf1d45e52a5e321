"""What a sweep found: the leaderboard, every pass of every trial, and what mattered. No Ray."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import pyarrow as pa
import tomli_w

from hashray.config import parse_toml, validate
from hashray.errors import ConfigError, RunError
from hashray.train.config import TrainConfig
from hashray.tune.space import KIND, SweepConfig


@dataclass(frozen=True)
class Trial:
    """A trial as it ended: `state` is finished, stopped (by the scheduler) or failed (with a `reason`).

    `score` is the best validation of weights that may be chosen, None where a warm-up was still on. `config` is None,
    and `folder` empty, where the point is no training config.
    """

    number: int
    point: dict[str, Any]
    folder: str
    state: str
    score: float | None
    epochs: int
    total: int
    reason: str
    lines: list[dict[str, Any]]
    config: TrainConfig | None


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Best score first, of equal ones the earlier; failed ones last, whatever they had reached."""
    return sorted(trials, key=lambda t: (t.state == "failed", t.score is None, -(t.score or 0.0), t.number))


def leaderboard(trials: Sequence[Trial]) -> pa.Table:
    """One row a trial, best first, with its point and its whole config; no clock, so equal sweeps have equal tables."""
    rows = ranked(trials)
    return pa.table(
        {
            "rank": pa.array(range(1, len(rows) + 1), pa.int32()),
            "trial": pa.array([t.number for t in rows], pa.int32()),
            "state": [t.state for t in rows],
            "score": pa.array([t.score for t in rows], pa.float64()),
            "epochs": pa.array([t.epochs for t in rows], pa.int32()),
            "of_epochs": pa.array([t.total for t in rows], pa.int32()),
            "seed": pa.array([t.config and t.config.seed for t in rows], pa.int64()),
            "folder": [t.folder for t in rows],
            "point": [json.dumps(t.point, sort_keys=True) for t in rows],
            "config": [json.dumps(t.config and t.config.result_of(), sort_keys=True) for t in rows],
            "reason": [t.reason for t in rows],
        }
    )


def epochs_table(trials: Sequence[Trial]) -> pa.Table:
    """One row for each pass of each trial, in order: losses and validation as the training loop reported them.

    Of a member of a population the epochs of its weights, those before an exchange being another member's.
    """
    lines = [(trial.number, line) for trial in trials for line in trial.lines]
    names = sorted({name for _, line in lines for name, value in line.items() if isinstance(value, float)})
    columns: dict[str, Any] = {
        "trial": pa.array([number for number, _ in lines], pa.int32()),
        "epoch": pa.array([line["epoch"] for _, line in lines], pa.int32()),
        "phase": pa.array([line["phase"] for _, line in lines], pa.string()),
    }
    return pa.table(columns | {name: pa.array([line.get(name) for _, line in lines], pa.float64()) for name in names})


def importance(trials: Sequence[Trial], config: SweepConfig, seed: int) -> dict[str, Any]:
    """Share of the variance of the score that each dimension explains alone (fANOVA, Hutter et al. 2014), by method.

    What is left up to 1 is of several dimensions together.
    Trials are compared at the first report that all of them made: a trial that was stopped early is no worse for it.
    """
    found: dict[str, Any] = {}
    if config.search.scheduler == "pbt":  # whose values change while a trial trains: no score is of one point
        return found
    for kind in config.kinds():
        own = [t for t in trials if t.point.get(KIND, config.method.kind) == kind and t.lines]
        names = list(config.active(kind))
        if len(own) < 4 or not names:
            continue
        shared = min(t.epochs for t in own)
        study = optuna.create_study(direction="maximize")
        for trial in own:
            value = max(line["validation_map"] for line in trial.lines[:shared])
            params = {name: trial.point[name] for name in names}
            distributions = {name: config.space[name].distribution() for name in names}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
            try:
                shares = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
            except RuntimeError:  # every score is the same: nothing to explain
                shares = dict.fromkeys(names, 0.0)
        found[kind] = {"after_epochs": shared, "trials": len(own), "shares": {n: float(shares[n]) for n in shares}}
    return found


def best_toml(best: Trial) -> bytes:
    """The winner as a config that `hashray train` takes as it is.

    Raises:
        RunError: it would not come back as it is.
    """
    assert best.config is not None
    table = best.config.model_dump(mode="json", exclude_none=True, exclude={"corpus", "out", "features"})
    changes = [{name: value for name, value in change.items() if value} for change in table.pop("changes")]
    table |= {"changes": changes} if changes else {}
    head = f"# trial {best.number}: validation {best.score:.6f} after {best.epochs} of {best.total} epochs\n"
    text = (head + tomli_w.dumps(table)).encode()
    try:
        again = validate(TrainConfig, parse_toml(text, "best.toml"), "best.toml")
    except ConfigError as error:
        raise RunError(f"the winner's config cannot be written as TOML: {error}") from error
    if again.result_of() != best.config.result_of():
        raise RunError("the winner's config holds an unset value that TOML cannot say; set it in the sweep's file")
    return text

"""The results of a sweep: leaderboard, epochs of every trial, importance of each dimension, best.toml. No Ray."""

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
    """A trial after its end. `state` is finished, stopped (by the scheduler) or failed (with a `reason`).

    `score` is the best validation among selectable weights, None if the trial ended inside a warm-up. `config` is None
    and `folder` empty if the point is not a valid training config.
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
    """Trials by score, the best first. Equal scores rank by number, and failed trials come last."""
    return sorted(trials, key=lambda t: (t.state == "failed", t.score is None, -(t.score or 0.0), t.number))


def leaderboard(trials: Sequence[Trial]) -> pa.Table:
    """One row for each trial, best first, with point and full config. Without times, equal sweeps have equal tables."""
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
    """One row for each epoch of each trial, in order, with the losses and the validation of the training loop.

    For a member of a population, these are the epochs of its weights. Before an exchange, another member trained them.
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

    The shares add up to less than 1; dimensions explain the rest together.
    Trials are compared after as many epochs as all of them reached, so early stopping costs a trial nothing here.
    """
    by_method: dict[str, Any] = {}
    if config.search.scheduler == "pbt":  # values change while a trial trains, so no score belongs to one point
        return by_method
    for kind in config.kinds():
        reported = [t for t in trials if t.point.get(KIND, config.method.kind) == kind and t.lines]
        names = list(config.active(kind))
        if len(reported) < 4 or not names:
            continue
        shared = min(t.epochs for t in reported)
        study = optuna.create_study(direction="maximize")
        for trial in reported:
            value = max(line["validation_map"] for line in trial.lines[:shared])
            params = {name: trial.point[name] for name in names}
            distributions = {name: config.space[name].distribution() for name in names}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
            try:
                shares = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
            except RuntimeError:  # all scores are equal, so there is no variance to explain
                shares = dict.fromkeys(names, 0.0)
        by_method[kind] = {
            "after_epochs": shared, "trials": len(reported), "shares": {n: float(shares[n]) for n in shares},
        }  # fmt: skip
    return by_method


def best_toml(best: Trial) -> bytes:
    """The winner as a config file for `hashray train`.

    Raises:
        RunError: reading the file would not give the same config.
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
        raise RunError("TOML cannot express an unset value of the winner's config; set every value in the sweep's file")
    return text

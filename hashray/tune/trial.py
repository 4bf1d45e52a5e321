"""[Ray] One trial as Ray Tune runs it: segment after segment, each followed by a report.

The process of a trial is light. It starts a task (or a Ray Train run) that takes the CPUs and GPUs and trains the next
segment, waits for its turn and reports.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError

from hashray.artifact import canonical
from hashray.data.corpus import Corpus, open_corpus
from hashray.engine.reports import send_requests, sending_requests
from hashray.engine.session import unwrap
from hashray.errors import HashrayError, RunError, WorkersLost
from hashray.storage import join, open_store, requests
from hashray.train.checkpoint import read_position
from hashray.train.config import TrainConfig
from hashray.train.job import TrainJob, plan_job, run_of, total_epochs
from hashray.train.run import open_init
from hashray.train.worker import environment_of, is_of_lost_worker
from hashray.tune.population import WORST
from hashray.tune.segments import (
    Segment,
    forget_before,
    last_validation,
    score_of,
    train_by_ray_train,
    train_segment,
)
from hashray.tune.space import NUMBER, SweepConfig, donor_of, milestones
from hashray.tune.turns import Turns

SCORE, EPOCHS, TOTAL, TRAINED = "score", "epochs", "of_epochs", "trained"
FAILED = "failed.json"


@ray.remote(num_cpus=0)
class TurnsActor:
    """`Turns` as an actor at which trials wait."""

    def __init__(self, at_once: int, trials: int) -> None:
        self.turns = Turns(at_once, trials)
        self.gates: dict[str, asyncio.Event] = {}

    async def enter(self, trial: str, number: int, until: int) -> None:
        """Register that a trial trains towards its report after `until` epochs in all."""
        self.turns.enter(trial, number, until)
        self._release()

    async def turn(self, trial: str) -> None:
        """Wait until this trial may report."""
        gate = self.gates[trial] = asyncio.Event()
        self.turns.arrive(trial)
        self._release()
        await gate.wait()

    async def end(self, trial: str) -> None:
        """Register that this trial has ended."""
        self.turns.end(trial)
        self._release()

    def _release(self) -> None:
        while (trial := self.turns.next()) is not None:
            self.gates[trial].set()


@dataclass(frozen=True)
class _Prepared:
    """A trial that is ready to train.

    Attributes:
        config: the training config after the last change.
        job: the plan of the training, as train/run.py makes it.
        folder: the folder of the trial's segments.
        epochs: epochs of the trial in all.
        done: epochs after which the next segment starts.
        start: folder of the checkpoint after these epochs; None for fresh weights.
    """

    config: TrainConfig
    job: TrainJob
    folder: str
    epochs: int
    done: int
    start: str | None


def run_trial(point: dict[str, Any], sweep: dict[str, Any], turns: Any, reports: Any) -> None:
    """Run one trial of the sweep under Ray Tune: segment after segment, each followed by a report.

    A segment that loses its workers is retried here, up to `max_failures` times; any other error is final at once.
    Only a final failure is reported. It is reported in turn and stored only then, because the points that are drawn
    later depend on when it is known. `reports` passes retries, steps and counts of requests on to the driver.
    """
    with sending_requests(reports):
        _run_segments(point, sweep, turns, reports)


def _run_segments(point: dict[str, Any], sweep: dict[str, Any], turns: Any, reports: Any) -> None:
    # Tune reuses this process. It gives the previous trial two seconds to leave, else it drops the new one silently.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
    config = SweepConfig.model_validate(sweep["config"])
    population = config.search.scheduler == "pbt"
    trial = tune.get_context().get_trial_id()
    try:
        prepared = _prepare(config, sweep, point, _reported_epochs())
    except HashrayError:  # an invalid point fails in its turn, too
        ray.get(turns.enter.remote(trial, point[NUMBER], 1))
        ray.get(turns.turn.remote(trial))
        raise
    start = prepared.start
    for until in milestones(config.search, sweep["most"], prepared.epochs):
        if until <= prepared.done:
            continue
        segment = Segment(prepared.folder, start, until)
        ray.get(turns.enter.remote(trial, point[NUMBER], until))
        trained = read_position(segment.end) is None
        tell = partial(_put, reports, point[NUMBER])
        reason = _train(config, prepared, segment, tell) if trained else None
        if reason is None:
            forget_before(segment, start_too=not population)
        ray.get(turns.turn.remote(trial))
        if reason is not None:
            keep_failure(prepared.folder, reason)
            if not population:
                raise RunError(reason)
        _report(segment, population, prepared.epochs, trained, reports)
        start = segment.end


def _reported_epochs() -> int:
    """Epochs at the last report of this trial, by the checkpoint that Tune kept for it."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        return int((Path(folder) / EPOCHS).read_text())


def _prepare(config: SweepConfig, sweep: dict[str, Any], point: dict[str, Any], done: int) -> _Prepared:
    """Plan the training of a trial that has reported after `done` epochs, or that starts from a donor's weights."""
    chosen = config.at(point)
    corpus, data = open_corpus(sweep["corpus"]), open_corpus(sweep["source"], None)
    epochs = total_epochs(chosen, corpus.num_classes)
    folder, current = folder_of(sweep["trials"], point, chosen, corpus), chosen.segments()[-1][1]
    job = plan_job(current, data)
    origin = donor_of(point)
    start = join(folder, str(done)) if done else None
    if origin is not None and origin[0] >= done:
        done, donor = origin
        start = join(folder_of(sweep["trials"], donor, config.at(donor), corpus), str(done))
    return _Prepared(current, job, folder, epochs, done, start)


def _report(segment: Segment, population: bool, epochs: int, trained: bool, reports: Any) -> None:
    """Report the end of a segment to Tune."""
    position = read_position(segment.end)
    # A member of a population hands on its current weights, so these are scored and not the best ones so far.
    score_at = last_validation if population else score_of
    score = WORST if position is None else score_at(position)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / EPOCHS).write_text(str(segment.until))
        report = {SCORE: score, EPOCHS: segment.until, TOTAL: epochs, TRAINED: trained}
        send_requests(reports)  # Tune may end this process at its report
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def folder_of(trials_at: str, point: dict[str, Any], chosen: TrainConfig, corpus: Corpus) -> str:
    """Folder of a trial's segments. Its name holds the number, so two trials at one point do not share it."""
    return join(trials_at, f"{point[NUMBER]:04d}-{run_of(chosen, corpus, open_init(chosen))[0]}")


def number_of(key: str) -> int:
    """The number of a trial, from the key of a file in its folder."""
    return int(key.partition("-")[0])


def failure_of(trial: str) -> str | None:
    """The reason why the trial in this folder failed; None if it did not."""
    store = open_store(trial)
    return str(json.loads(store.read(FAILED))["reason"]) if store.exists(FAILED) else None


def keep_failure(trial: str, reason: str) -> None:
    """Store the failure of a trial, so that a rerun of the sweep draws the same points after it."""
    open_store(trial).write(FAILED, canonical({"reason": reason}))


def _put(reports: Any, number: int, line: dict[str, Any]) -> None:
    reports.put.remote({"trial": number, **line})


def _train(
    config: SweepConfig, prepared: _Prepared, segment: Segment, tell: Callable[[dict[str, Any]], None]
) -> str | None:
    """Train a segment, again where its workers were lost; return the reason of a final failure."""
    before = failure_of(segment.trial)
    if before is not None:
        return before
    chosen, reason = prepared.config, ""
    for _ in range(config.search.max_failures + 1):
        try:
            if chosen.fewest_workers > 1 or not prepared.job.in_memory:
                train_by_ray_train(prepared.job, segment)
            else:
                # Outside the trial's placement group, which reserves almost nothing.
                options: dict[str, Any] = {"num_cpus": chosen.cpus_per_worker, "num_gpus": int(chosen.gpu)}
                options |= {"runtime_env": environment_of(chosen), "scheduling_strategy": "DEFAULT", "max_retries": 0}
                requests.add(ray.get(train_segment.options(**options).remote(prepared.job, segment, tell)))
        except Exception as error:  # any error becomes the trial's reason, and the sweep goes on
            reason = reason_of(error)
            if not (isinstance(error, WorkersLost) or is_of_lost_worker(error, world=1)):
                return reason
            tell({"lost": reason})
        else:
            return None
    return reason


def reason_of(error: BaseException) -> str:
    """The reason of a failed segment in one line: the error of the first worker of a run of several."""
    cause = unwrap(error)
    cause = unwrap(next(iter(getattr(cause, "worker_failures", {}).values()), cause))
    text = str(cause.cause if isinstance(cause, RayTaskError) else cause).strip().partition("\n")[0]
    return f"{type(cause).__name__}: {text}"

"""[Ray] One trial as Tune runs it: segment after segment, each trained by Ray, and a report after each.

A trial is light: it waits for its turn, has its next segment trained by a task (or a Ray Train run) that takes the
CPUs and GPUs, and reports.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayTaskError

from hashray.artifact import canonical
from hashray.data.corpus import Corpus, open_corpus
from hashray.engine.session import unwrap
from hashray.errors import HashrayError, RunError
from hashray.storage import join, open_store
from hashray.train.config import TrainConfig
from hashray.train.job import TrainJob, plan_job, run_of, total_epochs
from hashray.train.run import open_init
from hashray.train.worker import environment_of
from hashray.tune.population import WORST
from hashray.tune.segments import (
    Segment,
    ended_at,
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
    """`Turns`, for trials to wait at."""

    def __init__(self, at_once: int, trials: int) -> None:
        self.turns = Turns(at_once, trials)
        self.gates: dict[str, asyncio.Event] = {}

    async def enter(self, trial: str, number: int, until: int) -> None:
        """Set out for the report after `until` epochs in all."""
        self.turns.enter(trial, number, until)
        self._release()

    async def turn(self, trial: str) -> None:
        """Wait until this trial may report."""
        gate = self.gates[trial] = asyncio.Event()
        self.turns.arrive(trial)
        self._release()
        await gate.wait()

    async def end(self, trial: str) -> None:
        """This trial reports no more."""
        self.turns.end(trial)
        self._release()

    def _release(self) -> None:
        while (trial := self.turns.next()) is not None:
            self.gates[trial].set()


def run_trial(point: dict[str, Any], sweep: dict[str, Any], turns: Any) -> None:
    """One trial of the sweep, as Tune runs it: segment after segment, each followed by a report.

    A segment that fails is tried again here, as often as the sweep says. Only what is final is told, in its turn, and
    kept beside the segments once it is: what follows depends on when it is known.
    """
    # Tune reuses this process and gives the trial before it two seconds to leave, else it drops the new one unsaid.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
    config = SweepConfig.model_validate(sweep["config"])
    me, done, start = tune.get_context().get_trial_id(), 0, None
    population = config.search.scheduler == "pbt"
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            done = int((Path(folder) / EPOCHS).read_text())
    try:
        chosen = config.at(point)
        corpus, data = open_corpus(sweep["corpus"]), open_corpus(sweep["source"], None)
        own = total_epochs(chosen, corpus.num_classes)
        trial, current = folder_of(sweep["trials"], point, chosen, corpus), chosen.segments()[-1][1]
        job = plan_job(current, data)
        origin = donor_of(point)
        if origin is not None and origin[0] >= done:
            done, donor = origin
            start = join(folder_of(sweep["trials"], donor, config.at(donor), corpus), str(done))
        elif done:
            start = join(trial, str(done))
    except HashrayError:
        ray.get(turns.enter.remote(me, point[NUMBER], 1))
        ray.get(turns.turn.remote(me))
        raise
    for until in milestones(config.search, sweep["most"], own):
        if until <= done:
            continue
        segment, reason = Segment(trial, start, until), None
        ray.get(turns.enter.remote(me, point[NUMBER], until))
        trained = ended_at(segment.end) is None
        if trained:
            reason = _train(config, current, job, segment)
        if reason is None:
            forget_before(segment, start_too=not population)
        ray.get(turns.turn.remote(me))
        if reason is not None:
            keep_failure(trial, reason)  # now that it counts: what is drawn from here on is drawn with it
            if not population:
                raise RunError(reason)
        position = ended_at(segment.end)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / EPOCHS).write_text(str(until))
            # Of a population the weights of now are handed on, not the best there were.
            reached = last_validation if population else score_of
            score = WORST if position is None else reached(position)
            told = {SCORE: score, EPOCHS: until, TOTAL: own, TRAINED: trained}
            tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))
        done, start = until, segment.end


def folder_of(trials_at: str, point: dict[str, Any], chosen: TrainConfig, corpus: Corpus) -> str:
    """Where a trial's segments are: two trials at one point do not share them."""
    return join(trials_at, f"{point[NUMBER]:04d}-{run_of(chosen, corpus, open_init(chosen))[0]}")


def number_of(key: str) -> int:
    """The number of the trial in whose folder a file lies, from its key."""
    return int(key.partition("-")[0])


def failure_of(trial: str) -> str | None:
    """Why the trial whose files lie there failed, if it did."""
    store = open_store(trial)
    return str(json.loads(store.read(FAILED))["reason"]) if store.exists(FAILED) else None


def keep_failure(trial: str, reason: str) -> None:
    """Remember that a trial failed, so that a sweep that is run again does not draw as if it had not."""
    open_store(trial).write(FAILED, canonical({"reason": reason}))


def _train(config: SweepConfig, chosen: TrainConfig, job: TrainJob, segment: Segment) -> str | None:
    """Train a segment; the reason why it could not be, where it has failed once too often."""
    before = failure_of(segment.trial)
    if before is not None:
        return before
    reason = ""
    for _ in range(config.search.max_failures + 1):
        try:
            if chosen.workers > 1 or not job.in_memory:
                train_by_ray_train(job, segment)
            else:
                # Not inside the trial's own placement group, which holds next to nothing.
                takes: dict[str, Any] = {"num_cpus": chosen.cpus_per_worker, "num_gpus": int(chosen.gpu)}
                takes |= {"runtime_env": environment_of(chosen)}
                task = train_segment.options(**takes, scheduling_strategy="DEFAULT", max_retries=0)
                ray.get(task.remote(job, segment))
        except Exception as error:  # whatever it was is the trial's reason, kept and reported; the sweep goes on
            reason = reason_of(error)
        else:
            return None
    return reason


def reason_of(error: BaseException) -> str:
    """Why a segment failed, in a line: the first worker's error, of a run of several."""
    found = unwrap(error)
    found = unwrap(next(iter(getattr(found, "worker_failures", {}).values()), found))
    text = str(found.cause if isinstance(found, RayTaskError) else found).strip().partition("\n")[0]
    return f"{type(found).__name__}: {text}"

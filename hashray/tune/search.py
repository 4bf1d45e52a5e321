"""[Ray] The search itself: Ray Tune with Optuna, over trials whose segments are kept.

Tune's trials are light: they wait for their turn, have their next segment trained by a Ray task (or a Ray Train run)
that takes the CPUs and GPUs, and report. How many are in flight is fixed when a sweep begins, so a cluster that
shrinks or grows makes it slower or faster and changes no decision.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from hashray.artifact import canonical
from hashray.data.corpus import Corpus, open_corpus
from hashray.errors import HashrayError, RunError
from hashray.runtime import WorkersConfig, unwrap
from hashray.storage import Store, join, open_store
from hashray.train.config import TrainConfig
from hashray.train.trainer import placed, plan_job, run_of, total_passes, training_data
from hashray.tune.leaderboard import Trial
from hashray.tune.progress import Watch
from hashray.tune.segments import (
    Segment,
    ended_at,
    forget_before,
    score_of,
    train_by_ray_train,
    train_segment,
)
from hashray.tune.space import NUMBER, SweepConfig, grace_epochs, milestones
from hashray.tune.turns import Turns

SCORE, PASSES = "score", "passes"
FAILED, SECONDS = "failed.json", "seconds.json"


@ray.remote(num_cpus=0)
class TurnsActor:
    """`Turns`, for trials to wait at."""

    def __init__(self, at_once: int, trials: int) -> None:
        self.turns = Turns(at_once, trials)
        self.gates: dict[str, asyncio.Event] = {}

    async def enter(self, trial: str, number: int, passes: int) -> None:
        """Set out for the next report."""
        self.turns.enter(trial, number, passes)
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
        trial = self.turns.next()
        if trial is not None:
            self.gates[trial].set()


def run_trial(point: dict[str, Any], sweep: dict[str, Any], turns: Any) -> None:
    """One trial of the sweep, as Tune runs it: segment after segment, each followed by a report.

    A segment that fails is tried again here, as often as the sweep says, and the last failure is kept beside the
    segments: only what is final is told, and in its turn, for what follows depends on when it is known.
    """
    # Tune reuses this process and gives the trial before it two seconds to leave, else it drops the new one unsaid.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = "600"
    config = SweepConfig.model_validate(sweep["config"])
    me, done = tune.get_context().get_trial_id(), 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            done = int((Path(folder) / PASSES).read_text())
    try:
        chosen = config.at(point)
        corpus, data = open_corpus(sweep["corpus"]), open_corpus(sweep["source"], None)
        own = total_passes(chosen, corpus.num_classes)
        trial, job = _folder(sweep["out"], point, chosen, corpus), plan_job(chosen, corpus, data)
    except HashrayError:
        ray.get(turns.enter.remote(me, point[NUMBER], 1))
        ray.get(turns.turn.remote(me))
        raise
    for until in milestones(config.search, sweep["most"], own):
        if until <= done:
            continue
        ray.get(turns.enter.remote(me, point[NUMBER], until - done))
        position = ended_at(Segment(trial, done, until))
        if position is None:
            reason = _train(config, chosen, job, Segment(trial, done, until))
            if reason is not None:
                ray.get(turns.turn.remote(me))
                raise RunError(reason)
            position = ended_at(Segment(trial, done, until))
            assert position is not None
        forget_before(Segment(trial, done, until))
        ray.get(turns.turn.remote(me))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / PASSES).write_text(str(until))
            tune.report({SCORE: score_of(position), PASSES: until}, checkpoint=tune.Checkpoint.from_directory(folder))
        done = until


def _folder(out: str, point: dict[str, Any], chosen: TrainConfig, corpus: Corpus) -> str:
    """Where a trial's segments are: two trials at one point do not share them."""
    return join(out, "trials", f"{point[NUMBER]:04d}-{run_of(chosen, corpus)[0]}")


def _train(config: SweepConfig, chosen: TrainConfig, job: dict[str, Any], segment: Segment) -> str | None:
    """Train a segment; the reason why it could not be, where it has failed once too often."""
    store = open_store(segment.trial)
    if store.exists(FAILED):
        return str(json.loads(store.read(FAILED)))
    start, reason = time.monotonic(), ""
    for _ in range(config.search.max_failures + 1):
        try:
            if chosen.workers > 1 or not job["memory"]:
                train_by_ray_train(job, segment)
            else:
                # Not inside the trial's own placement group, which holds next to nothing.
                takes = {"num_cpus": chosen.cpus_per_worker, "num_gpus": int(chosen.gpu)}
                placed_anywhere = train_segment.options(**takes, scheduling_strategy="DEFAULT", max_retries=0)
                ray.get(placed_anywhere.remote(job, segment))
        except Exception as error:
            found = unwrap(error)
            reason = str(found.cause if isinstance(found, RayTaskError) else found).strip().partition("\n")[0]
            reason = f"{type(found).__name__}: {reason}"
        else:
            before = json.loads(store.read(SECONDS)) if store.exists(SECONDS) else 0.0
            store.write(SECONDS, canonical(before + time.monotonic() - start))
            return None
    store.write(FAILED, canonical(reason))
    return reason


class _Callbacks(tune.Callback):
    """Tells the turns and the person who waits what became of each trial, and remembers it."""

    def __init__(self, turns: Any, watch: Watch) -> None:
        self.turns, self.watch = turns, watch
        self.ended: dict[int, tuple[dict[str, Any], int, bool]] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        self.watch.reported(trial.config, result[PASSES], result[SCORE])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, failed=True)

    def _end(self, trial: Any, failed: bool) -> None:
        passes = int((trial.last_result or {}).get(PASSES, 0))
        self.ended[trial.config[NUMBER]] = trial.config, passes, failed
        self.watch.ended(trial.config, "failed" if failed else "")
        ray.get(self.turns.end.remote(trial.trial_id))


def search(config: SweepConfig, corpus: Corpus, out: str, plan: str) -> list[Trial]:
    """Run every trial; return them in the order in which they were drawn. Rerun = resume.

    Raises:
        RunError: the search was interrupted, or every trial failed; the text says why the first did.
    """
    there = placed(config)
    source = training_data(placed(config.base), corpus)
    most = max(total_passes(config.at(point), corpus.num_classes) for point in config.corners())
    at_once = _at_once(there, corpus, source, open_store(out), plan)
    # Beside the driver, with whose machine the sweep would end anyway: a lost node costs no more than its segments.
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
    turns = TurnsActor.options(resources=here).remote(at_once, config.search.trials)  # type: ignore[attr-defined]
    sweep = {"config": there.model_dump(mode="json", exclude_unset=True), "corpus": corpus.store.url,
             "source": source.store.url, "out": out, "most": most}  # fmt: skip
    _quiet()
    with tempfile.TemporaryDirectory() as folder, Watch(config.search.trials, most) as watch:
        trainable = tune.with_parameters(run_trial, sweep=sweep, turns=turns)
        callbacks = _Callbacks(turns, watch)
        tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([here])),
            tune_config=tune.TuneConfig(
                metric=SCORE, mode="max", num_samples=config.search.trials, max_concurrent_trials=at_once,
                search_alg=_searcher(config), scheduler=_scheduler(config, most), reuse_actors=True,
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=folder, callbacks=[callbacks], verbose=0),
        ).fit()  # fmt: skip
    ray.kill(turns)
    if len(callbacks.ended) < config.search.trials:
        raise RunError(
            f"the search was interrupted after {len(callbacks.ended)} of {config.search.trials} trials; "
            "run the same command again to go on"
        )
    trials = [_trial(config, corpus, out, *callbacks.ended[number]) for number in sorted(callbacks.ended)]
    _write_costs(trials, out)
    if all(trial.state == "failed" for trial in trials):
        for trial in trials:  # so that they are tried again once the cause is mended
            open_store(join(out, "trials", trial.folder)).delete(FAILED)
        raise RunError(f"all {len(trials)} trials failed; trial 0: {trials[0].reason}")
    return trials


def _trial(config: SweepConfig, corpus: Corpus, out: str, point: dict[str, Any], done: int, failed: bool) -> Trial:
    number = point[NUMBER]
    values = {name: value for name, value in point.items() if name != NUMBER}
    try:
        chosen = config.at(point)
        total, folder = total_passes(chosen, corpus.num_classes), _folder(out, point, chosen, corpus)
    except HashrayError as error:
        return Trial(number, values, "", "failed", None, 0, 0, " ".join(str(error).split()), [], None)
    lines: list[dict[str, Any]] = []
    score = None
    if done:
        position = ended_at(Segment(folder, 0, done))
        assert position is not None
        lines, score = position.notes["history"], score_of(position)
    store, reason = open_store(folder), ""
    if failed:
        reason = json.loads(store.read(FAILED)) if store.exists(FAILED) else "the process that waited for it was lost"
    state = "failed" if failed else "finished" if done == total else "stopped"
    return Trial(number, values, folder.rpartition("/")[2], state, score, done, total, reason, lines, chosen)


def _write_costs(trials: list[Trial], out: str) -> None:
    """Seconds that each trial's segments took where they were trained: measured, so no part of what is compared."""
    costs = {}
    for trial in trials:
        store = open_store(join(out, "trials", trial.folder)) if trial.folder else None
        seconds = json.loads(store.read(SECONDS)) if store is not None and store.exists(SECONDS) else 0.0
        costs[str(trial.number)] = {"passes": trial.passes, "seconds": seconds}
    open_store(out).write("costs.json", canonical(costs))


def _at_once(config: SweepConfig, corpus: Corpus, source: Corpus, store: Store, plan: str) -> int:
    """Trials in flight: fixed by the first run of a sweep, for the decisions of a later one depend on it."""
    key = f"progress/at-once-{plan}.json"
    if not store.exists(key):
        # A stream needs a CPU of its own beside the workers that it feeds, or both wait for ever.
        streams = not plan_job(config.base, corpus, source)["memory"]
        pool = WorkersConfig(
            cpus_per_worker=config.cpus_per_worker * config.workers + streams,
            gpus_per_worker=float(config.gpu) * config.workers,
        )
        store.write(key, canonical(min(config.search.at_once or pool.most(), config.search.trials)))
    return int(json.loads(store.read(key)))


def _searcher(config: SweepConfig) -> OptunaSearch:
    kind = optuna.samplers.TPESampler if config.search.algorithm == "tpe" else optuna.samplers.RandomSampler
    return OptunaSearch(
        config.draw, metric=SCORE, mode="max", points_to_evaluate=[config.default()],
        sampler=kind(seed=config.search.seed),
    )  # fmt: skip


def _scheduler(config: SweepConfig, most: int) -> TrialScheduler:
    grace = grace_epochs(config.search, most)
    if config.search.scheduler == "asha":
        return ASHAScheduler(
            time_attr=PASSES, max_t=most, grace_period=grace, reduction_factor=config.search.reduction_factor
        )
    if config.search.scheduler == "median":
        return MedianStoppingRule(time_attr=PASSES, grace_period=grace, min_samples_required=3)
    return FIFOScheduler()


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told by their reasons
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else an interrupted search looks like a finished one

"""[Ray] The search of a sweep: Ray Tune with Optuna or a population, over trials that store their segments.

The number of trials in flight is fixed at the start of a sweep. A cluster that shrinks or grows changes the speed of
the sweep, but no decision.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hashray.artifact import canonical
from hashray.data.corpus import Corpus
from hashray.engine.reports import listening, start_reports
from hashray.engine.session import WorkersConfig, connect, require_room
from hashray.errors import ConfigError, HashrayError, RunError
from hashray.storage import Store, join, open_store
from hashray.train.checkpoint import FILE, read_position
from hashray.train.job import plan_job, require_labels, require_one_network, total_epochs
from hashray.train.run import open_init, training_data
from hashray.tune.leaderboard import Trial
from hashray.tune.live import Watch
from hashray.tune.population import Population, first_members
from hashray.tune.segments import SECONDS
from hashray.tune.space import NUMBER, ORIGIN, SweepConfig, donor_of, grace_epochs, milestones, values_of
from hashray.tune.trial import (
    EPOCHS,
    FAILED,
    SCORE,
    TOTAL,
    TRAINED,
    TurnsActor,
    failure_of,
    folder_of,
    keep_failure,
    number_of,
    run_trial,
)


class _Callbacks(tune.Callback):
    """Records the end of each trial, and passes reports on to the turns and to the progress display."""

    def __init__(self, turns: Any, watch: Watch, in_step: bool, keep: Callable[[dict[str, Any], str], None]) -> None:
        self.turns, self.watch, self.in_step, self.keep = turns, watch, in_step, keep
        self.ended: dict[int, tuple[dict[str, Any], int]] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        point = result["config"]  # the point of this report; an exchange may have changed the trial's point since
        self.watch.reported(point, result[EPOCHS], result[TOTAL], result[SCORE], result[TRAINED])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # The last line of the error. After a failed segment, the file beside the segments says more.
        reason = Path(trial.error_file).read_text().strip().rpartition("\n")[2].strip()
        if self.in_step:  # all other members would wait for this one at the next exchange
            raise RunError(f"trial {trial.config[NUMBER]}: {reason}; run the same command again to resume")
        self.keep(trial.config, reason)
        self._end(trial, True)

    def _end(self, trial: Any, failed: bool) -> None:
        self.ended[trial.config[NUMBER]] = trial.config, int((trial.last_result or {}).get(EPOCHS, 0))
        self.watch.ended(trial.config, failed)
        ray.get(self.turns.end.remote(trial.trial_id))


def search(config: SweepConfig, corpus: Corpus, out: str, plan: str) -> tuple[list[Trial], int]:
    """Run every trial. Return the trials by number, and how many were in flight at once. A rerun resumes.

    Args:
        config: the sweep, with absolute paths, so that workers in any folder can read them.

    Raises:
        ConfigError: the first rung or exchange would come after the last epoch.
        RunError: the search was interrupted, every trial failed (with the reason of the first one), or this cluster
            is too small to resume.
    """
    most = max(total_epochs(config.at(point), corpus.num_classes) for point in config.corners())
    population = config.search.scheduler == "pbt"
    if population:
        _require_exchanges(config, most, corpus.num_classes)
    if grace_epochs(config.search, most) > most:
        raise ConfigError(
            f"search.grace_epochs = {config.search.grace_epochs}, but a trial has at most {most} epochs; "
            "lower it, or raise epochs"
        )
    require_labels(config.base, corpus)
    connect()
    source = training_data(config.base, corpus, open_init(config.base))
    store, trials_at = open_store(out), join(out, "trials", plan)
    trials_store = open_store(trials_at)
    sweep = {"config": config.model_dump(mode="json", exclude_unset=True), "corpus": corpus.store.url,
             "source": source.store.url, "trials": trials_at, "most": most}  # fmt: skip
    at_once = _at_once(config, corpus, source, store, plan)

    callbacks = _fit(config, sweep, at_once, partial(_keep_failure, config, corpus, trials_at))
    if len(callbacks.ended) < config.search.trials:
        raise RunError(
            f"the search was interrupted after {len(callbacks.ended)} of {config.search.trials} trials; "
            "run the same command again to resume"
        )
    trials = [_trial(config, corpus, trials_at, most, *callbacks.ended[number]) for number in sorted(callbacks.ended)]
    _write_costs(trials, trials_store, store)
    if all(trial.state == "failed" for trial in trials):
        for key in _files(trials_store, FAILED):  # so that a rerun tries them again, once the cause is gone
            trials_store.delete(key)
        raise RunError(
            f"all {len(trials)} trials failed; trial 0: {trials[0].reason}; "
            "remove the cause and run the same command again"
        )
    if population:
        ends = {f"{trial.folder.rpartition('/')[2]}/{trial.epochs}/{FILE}" for trial in trials}
        for key in set(_files(trials_store, FILE)) - ends:
            trials_store.delete(key)
    return trials, at_once


def _keep_failure(config: SweepConfig, corpus: Corpus, trials_at: str, point: dict[str, Any], reason: str) -> None:
    """Store the failure of a trial after its process died too often. The trial itself stores a failed segment."""
    try:
        folder = folder_of(trials_at, point, config.at(point), corpus)
    except HashrayError:
        return  # the point is not a valid training config, so the trial has no folder
    if failure_of(folder) is None:
        keep_failure(folder, reason)


def _fit(
    config: SweepConfig, sweep: dict[str, Any], at_once: int, keep: Callable[[dict[str, Any], str], None]
) -> _Callbacks:
    """Run Ray Tune over the sweep; return the callbacks, which hold the end of each trial."""
    population = config.search.scheduler == "pbt"
    # Trials run on the driver's node, which the sweep needs anyway. Another lost node then costs only its segments.
    node_id = ray.get_runtime_context().get_node_id()
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    # A population exchanges in step, so the order of its reports does not matter. This share limits it to `at_once`.
    share = {f"node:{address}": 0.9 / at_once if population else 0.001}
    on_this_node = tune.PlacementGroupFactory([share], bundle_label_selector=[{"ray.io/node-id": node_id}])
    turns = TurnsActor.options(  # type: ignore[attr-defined]
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
    ).remote(0 if population else at_once, config.search.trials)
    _quiet()
    sampling: dict[str, Any] = {}
    if not population:
        sampling = {
            "num_samples": config.search.trials, "max_concurrent_trials": at_once, "search_alg": _searcher(config),
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, Watch(config.search.trials, sweep["most"], population) as watch:
        reports = start_reports()
        trainable = tune.with_parameters(run_trial, sweep=sweep, turns=turns, reports=reports)
        callbacks = _Callbacks(turns, watch, population, keep)
        tuner = tune.Tuner(
            tune.with_resources(trainable, on_this_node),
            param_space=first_members(config) if population else None,
            tune_config=tune.TuneConfig(
                metric=SCORE, mode="max", scheduler=_scheduler(config, sweep["most"]), reuse_actors=True, **sampling
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=folder, callbacks=[callbacks], verbose=0,
                # Only a trial with a dead process is restarted. A failed trial would only report its failure again.
                failure_config=tune.FailureConfig(max_failures=0 if population else config.search.max_failures),
            ),
        )  # fmt: skip
        try:
            with listening(reports, watch.hear, watch.tick):
                tuner.fit()
        except TuneError as error:
            if isinstance(error.__context__, HashrayError):  # raised by a callback
                raise error.__context__ from None
            if isinstance(error.__context__, RayActorError):
                raise RunError(
                    "the actor that orders trial reports died; run the same command again to resume"
                ) from error
            raise
    ray.kill(turns)
    return callbacks


def _require_exchanges(config: SweepConfig, epochs: int, num_classes: int) -> None:
    if grace_epochs(config.search, epochs) >= epochs:
        raise ConfigError(
            f"search.grace_epochs: the first exchange would come after the last of {epochs} epochs; "
            "lower it, or raise epochs"
        )
    for point in config.corners():
        require_one_network(config.at({**point, ORIGIN: [1, config.default()]}), num_classes)


def _files(store: Store, name: str) -> list[str]:
    return [key for key, _ in store.list("") if key.endswith(f"/{name}")]


def _trial(
    config: SweepConfig, corpus: Corpus, trials_at: str, most: int,
    point: dict[str, Any], done: int,
) -> Trial:  # fmt: skip
    number, values = point[NUMBER], values_of(point)
    try:
        chosen = config.at(point)
        total, folder = total_epochs(chosen, corpus.num_classes), folder_of(trials_at, point, chosen, corpus)
    except HashrayError as error:
        return Trial(number, values, "", "failed", None, 0, 0, " ".join(str(error).split()), [], None)
    lines: list[dict[str, Any]] = []
    score, origin, reason = None, donor_of(point), failure_of(folder)
    if reason is not None:  # the last segment that a failed trial reported may not be trained
        reported = [until for until in milestones(config.search, most, total) if until <= done]
        done = max((until for until in reported if read_position(join(folder, str(until)))), default=0)
    before = folder
    if not done and origin is not None:
        done, donor = origin
        before = folder_of(trials_at, donor, config.at(donor), corpus)
    if done:
        position = read_position(join(before, str(done)))
        assert position is not None
        lines, score = position.notes["history"], position.best_score
    state = "failed" if reason is not None else "finished" if done == total else "stopped"
    name = "/".join(folder.split("/")[-2:])
    return Trial(number, values, name, state, score, done, total, reason or "", lines, chosen)


def _write_costs(trials: list[Trial], trials_store: Store, out: Store) -> None:
    """Write the training time of each trial, failed attempts included. Times differ, so nothing compares this file."""
    seconds: Counter[int] = Counter()
    for key in _files(trials_store, SECONDS):
        seconds[number_of(key)] += json.loads(trials_store.read(key))
    costs = {str(trial.number): {"epochs": trial.epochs, "seconds": seconds[trial.number]} for trial in trials}
    out.write("costs.json", canonical(costs))


def _at_once(config: SweepConfig, corpus: Corpus, source: Corpus, store: Store, plan: str) -> int:
    """Trials in flight. The first run of a sweep fixes the number, because the decisions of a rerun depend on it."""
    key = f"progress/at-once-{plan}.json"
    require_room(config.cpus_per_worker, float(config.gpu), config.fewest_workers)
    # A stream needs one CPU more than the workers that it feeds, or both wait without end.
    streams = any(not plan_job(config.at(point), source).in_memory for point in config.corners())
    pool = WorkersConfig(
        cpus_per_worker=config.cpus_per_worker * config.fewest_workers + streams,
        gpus_per_worker=float(config.gpu) * config.fewest_workers,
    )
    most = pool.most()
    if not store.exists(key):
        wanted = config.search.at_once or most
        store.write(key, canonical(min(wanted, config.search.trials, most if streams else wanted)))
    at_once = int(json.loads(store.read(key)))
    if streams and at_once > most:
        raise RunError(
            f"this sweep began with {at_once} trials in flight, but with their streams this cluster has CPUs for "
            f"{most}: resume on a larger cluster, or start a new sweep with --search.at-once {most}"
        )
    return at_once


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
            time_attr=EPOCHS, max_t=most, grace_period=grace, reduction_factor=config.search.reduction_factor
        )
    if config.search.scheduler == "pbt":
        return Population(config, most, EPOCHS)
    if config.search.scheduler == "median":
        return MedianStoppingRule(time_attr=EPOCHS, grace_period=grace, min_samples_required=3)
    return FIFOScheduler()


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the leaderboard shows the reasons of failed trials
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its banner names a temporary folder, even at verbose=0
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else an interrupted search looks like a finished one

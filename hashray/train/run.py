"""[Ray] `hashray train`: what is checked first, the training, and the model at the end.

The driver reads labels, holds out validation rows, deduplicates label rows and plans the batches. Workers run
train/loop.py: on Ray Train (train/worker.py), or where the training is short and has one worker, in this process
(train/local.py). Checkpoints go to <out>/checkpoints; the same command run again goes on from the last one.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from hashray import storage
from hashray.artifact import Manifest
from hashray.config import require_path
from hashray.data.corpus import Corpus, open_corpus
from hashray.encode.features import TrunkRecipe, compute_features, trunk_fingerprint
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig, keep_memory, runs_here
from hashray.engine.stage import require_free, run_stage
from hashray.engine.tasks import run_tasks
from hashray.errors import InputError
from hashray.methods.backbone import with_absolute_weights
from hashray.model import Model, load_model, write_model
from hashray.progress import Bar, say
from hashray.storage import join, open_store
from hashray.train.assembly import has_learned
from hashray.train.checkpoint import Checkpoint, Position, has_checkpoint, keep_checkpoint, read_checkpoint
from hashray.train.config import USUAL_EPOCHS, TrainConfig
from hashray.train.job import (
    TrainJob,
    has_steps,
    ignored,
    is_short,
    plan_job,
    require_labels,
    require_phases,
    require_rows,
    run_of,
    total_epochs,
    untrained,
    with_epochs_for,
)
from hashray.train.local import fit_here, local_checkpoint
from hashray.train.precision import AnyTrainConfig, multiplies_bf16, with_precision
from hashray.train.watch import Watch


def train(config: TrainConfig) -> Manifest:
    """Run the stage; return the model's manifest. Rerun = resume.

    Raises:
        InputError: no corpus, no train rows, labels that cannot teach, weights that do not fit, or too few CPUs.
        Diverged: the loss is not finite.
        AlreadyExists: `out` holds a model of another config or corpus.
    """
    config = with_absolute_paths(config)
    require_path(config.out, "--out")
    return train_on(config, open_corpus(require_path(config.corpus, "--corpus")))


def train_on(config: TrainConfig, corpus: Corpus) -> Manifest:
    """Train on an open corpus with a config whose paths are absolute; as `train`."""
    require_rows(config, corpus, "training")
    given, config = config, with_epochs_for(config, corpus)
    store, init = open_store(str(config.out)), open_init(config)
    run, parents = run_of(config, corpus, init)

    def work() -> Manifest:
        require_labels(config, corpus)
        require_phases(config, corpus.num_classes)
        if names := ignored(given, corpus.num_classes):
            say(f"note: {config.method.kind} is fitted in closed form and ignores {', '.join(names)}")
        data = training_data(config, corpus, init)
        if config.bounds[1] > 1 and not (config.gpu or config.backbone.frozen or config.backbone.frozen_norms):
            say("note: on CPU each worker's batch norms see its own rows only (torch synchronises them on GPUs alone)")
        decided = with_precision(config, store, run, partial(workers_multiply_bf16, config))
        job = replace(plan_job(decided, data), checkpoints=join(store.url, "checkpoints"), run=run)
        if given.epochs is None and config.num_epochs > USUAL_EPOCHS and has_steps(config, corpus.num_classes):
            steps, rows = job.plan.steps * config.num_epochs, job.plan.rows
            say(f"note: {rows:,} rows train for {config.num_epochs} epochs, {steps:,} steps; set epochs for others")
        final = _fit_segments(job)
        require_free(store, run, "run")
        features = {} if data is corpus else {"features": data.manifest.id}
        return _write(decided, corpus, job, final, parents | features)

    return run_stage(store, "model", run, work, "run")


def _write(config: TrainConfig, corpus: Corpus, job: TrainJob, final: Checkpoint, parents: dict[str, str]) -> Manifest:
    store, position = open_store(str(config.out)), final.position
    weights, history = final.best() or final.under("average") or final.under("method"), position.notes["history"]
    chosen = {"best_at": position.best_at, "validation_map": position.best_score} if position.best_at else {}
    of_random = position.notes.get("random_map", [])
    if chosen and of_random:
        chosen["random_map"] = statistics.mean(of_random)
    info = {
        "run": job.run,
        "train_rows": job.plan.rows,
        "labelled_rows": int(job.table.counts.sum()),
        "phases": position.notes.get("phases", []),
        **chosen,
    }
    method = untrained(config, corpus.num_classes)
    manifest = write_model(store, method, weights, corpus.classes, config.result_of(), parents, history, info)
    store.clear("checkpoints/")
    store.clear("progress/")
    score = _scored(position)
    for name in ("variance_kept", "quantization_error"):  # which need no labels
        score += "".join(f", {name.replace('_', ' ')} {note[name]:.3f}" for note in info["phases"] if name in note)
    say(f"{store.url}: model {manifest.id[:12]}{score}")
    steps = job.plan.steps * sum(phase.epochs for phase in method.phases(config.num_epochs) if phase.steps)
    if position.best_score is not None and of_random and steps and not has_learned(position.best_score, of_random):
        say(
            f"warning: that is hardly more than random codes score: the model has learned next to nothing in {steps:,} "
            f"steps. Try more epochs (now {config.num_epochs}), another optim.lr (now {config.optim.lr:g}) or a "
            "pretrained trunk (backbone.weights; with few images, backbone.frozen = true too)"
        )
    return manifest


def _scored(position: Position) -> str:
    """What the last line of a training says of its validation."""
    if not position.best_at:
        return ""
    of_random = position.notes.get("random_map")
    beside = f" (random codes {statistics.mean(of_random):.4f})" if of_random else ""
    return f", validation mAP {position.best_score:.4f}{beside}"


def workers_multiply_bf16(config: TrainConfig) -> bool:
    """Whether the processors of the workers multiply bfloat16 natively; on a cluster, one worker's answer."""
    if not os.environ.get("RAY_ADDRESS") or config.ray == "never":
        return multiplies_bf16(config.gpu)
    pool = WorkersConfig(cpus_per_worker=config.cpus_per_worker, gpus_per_worker=float(config.gpu), ray="always")
    with Bar("ask a worker what its processor multiplies", 1, "workers") as bar:
        ((_, answer),) = run_tasks(_multiplies_bf16, {0: (config.gpu,)}, pool, False, Meter(bar, "worker"))
    return bool(answer)


def _multiplies_bf16(gpu: bool, advance: Callable[[int], None]) -> bool:
    return multiplies_bf16(gpu)


def open_init(config: TrainConfig) -> Model | None:
    """The model that the config goes on from, if it names one."""
    return None if config.init is None else load_model(config.init, device="cpu")


def with_absolute_paths(config: AnyTrainConfig) -> AnyTrainConfig:
    """The config with absolute paths: workers run in folders of their own."""
    paths = {name: getattr(config, name) for name in ("corpus", "out", "init", "pseudo_labels")}
    update = {name: path and storage.absolute(path) for name, path in paths.items()}
    return config.model_copy(update={**update, "backbone": with_absolute_weights(config.backbone)})


def pool_of(config: TrainConfig) -> WorkersConfig:
    """The workers of a training's scans of the corpus: one a GPU, or one a core, whose torch has one thread."""
    return WorkersConfig(gpus_per_worker=float(config.gpu), ray=config.ray)


def training_data(config: TrainConfig, corpus: Corpus, init: Model | None) -> Corpus:
    """What is trained on: the corpus, or where the trunk is frozen its features, computed or opened.

    Raises:
        InputError: `init` has another trunk than the features were made with.
    """
    if not config.backbone.frozen:
        return corpus
    if config.backbone.weights is None:
        say("note: backbone.weights is unset, so the trunk has random weights: pretrained ones give far better codes")
    features = compute_features(corpus, TrunkRecipe(config.backbone), config.features, pool_of(config), config.max_bad)
    if init is not None and features.manifest.fingerprint != trunk_fingerprint(init.method.trunk):
        raise InputError(f"init = {config.init!r} has another frozen trunk than backbone.* describes")
    return features


def _fit_segments(job: TrainJob) -> Checkpoint:
    """Fit one segment after another, each from where the one before ended; return the end. Rerun = resume."""
    segments = job.config.segments()
    for (_, config), (until, _) in pairwise(segments):
        end = join(job.checkpoints, f"{job.run}-{until}")
        if not has_checkpoint(end):
            fit_until(replace(job, config=config, until=until), end)
        job = replace(job, start=end)
    return fit(replace(job, config=segments[-1][1]))


def fit_until(job: TrainJob, end: str) -> None:
    """Fit from the checkpoint at `job.start`, or from the beginning, for `job.until` epochs; keep the last at `end`."""
    final = fit(replace(job, checkpoints=f"{end}-fit", run="run"))
    with tempfile.TemporaryDirectory() as folder:
        final.save(Path(folder))
        keep_checkpoint(end, Path(folder))


def trains_here(config: TrainConfig, epochs: int, rows: int, in_memory: bool) -> bool:
    """Whether a training of `epochs` epochs over `rows` rows runs in this process, without Ray."""
    return config.workers == 1 and in_memory and runs_here(config.ray, is_short(config, epochs, rows))


def fit(job: TrainJob) -> Checkpoint:
    """Run a job, here or on Ray Train; return its last checkpoint."""
    if not trains_here(job.config, total_epochs(job.config, job.num_classes), job.plan.rows, job.in_memory):
        if job.config.ray == "never":
            raise InputError(
                'ray = "never" trains in this process: one worker, with all rows in memory. Set workers = 1 and raise '
                "memory_limit_mib, or leave `ray` out"
            )
        from hashray.train.worker import fit_on_ray  # seconds of imports that a short training does without

        return fit_on_ray(job)
    if not job.config.gpu:
        keep_memory()
    with Watch(job) as watch:
        fit_here(job, local_checkpoint(job), watch.hear)
    return read_checkpoint(local_checkpoint(job))

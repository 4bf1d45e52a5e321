"""[Ray] `hashray train`: workers, failures, reports, and the model at the end.

The driver reads labels, holds out validation rows, deduplicates label rows and plans the batches; workers
run train/loop.py. Checkpoints go to <out>/checkpoints through Ray Train; a lost worker restarts the group
from the last one, and the same command run again goes on from it. The model is published by the driver.
"""

from __future__ import annotations

import tempfile
import threading
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.train as rt
import torch
from ray.train.torch import TorchTrainer

from hashray import artifact, storage
from hashray.artifact import Manifest, canonical, sha256_hex
from hashray.config import require_path
from hashray.data.corpus import Corpus, open_corpus
from hashray.encode.features import compute_features, trunk_fingerprint
from hashray.engine.parts import already_made, require_free
from hashray.engine.session import (
    WorkersConfig,
    connect,
    memory_environment,
    quicken_on_one_machine,
    require_room,
    unwrap,
)
from hashray.errors import ConfigError, InputError, MismatchError, RunError
from hashray.methods import build_method
from hashray.methods.backbone import build_trunk, weights_identity, with_absolute_weights
from hashray.methods.base import LabelTable, Method
from hashray.model import load_model, write_model
from hashray.progress import Bar, say
from hashray.storage import join, open_store
from hashray.storage.s3 import arrow_filesystem
from hashray.train.batches import EpochPlan, held_out
from hashray.train.checkpoint import STATE, Checkpoint, keep_checkpoint, load_checkpoint
from hashray.train.config import TrainConfig
from hashray.train.selection import Selection
from hashray.train.stream import scan_dataset, training_dataset
from hashray.train.worker import PSEUDO_SPLITS, MetricsQueue, run_worker, stream_spec

AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)


def train(config: TrainConfig) -> Manifest:
    """Run the stage; return the model's manifest. Rerun = resume.

    Raises:
        InputError: no corpus, no train rows, weights that do not fit, no room for the workers.
        Diverged: the loss is not finite.
        AlreadyExists: `out` holds a model of another config or corpus.
    """
    config = with_absolute_paths(config)
    out = require_path(config.out, "--out")
    corpus = open_corpus(require_path(config.corpus, "--corpus"))
    corpus.require("train", "training")
    store = open_store(out)
    result_of = config.result_of()
    run, parents = run_of(config, corpus)
    made = already_made(store, "model", run, "run")
    if made is not None:
        return made
    connect()
    require_room(config.cpus_per_worker, float(config.gpu), config.workers)
    data = training_data(config, corpus)
    if config.workers > 1 and not (config.gpu or config.backbone.frozen or config.backbone.frozen_norms):
        say("note: on CPU each worker's batch norms see its own rows only (torch synchronises them on GPUs alone)")
    job = plan_job(config, corpus, data) | {"checkpoints": join(out, "checkpoints"), "run": run}
    final = _fit_segments(config, job)
    position = final.position
    tensors, history = final.best() or final.under("average") or final.under("method"), position.notes["history"]
    chosen = {"best_at": position.best_at, "validation_map": position.best_score} if position.best_at else {}
    method = _untrained(config, corpus.num_classes)
    info = {
        "run": run,
        "train_rows": EpochPlan.from_json(job["plan"]).rows,
        "labelled_rows": sum(job["counts"]),
        "phases": position.notes.get("phases", []),
        **chosen,
    }
    parents |= {"features": data.manifest.id} if data is not corpus else {}
    require_free(store, run, "run")
    manifest = write_model(store, method, tensors, corpus.classes, result_of, parents, history, info)
    store.clear("checkpoints/")
    say(f"{out}: model {manifest.id[:12]}" + (f", validation mAP {position.best_score:.4f}" if chosen else ""))
    return manifest


def with_absolute_paths(config: AnyTrainConfig) -> AnyTrainConfig:
    """The config with every path such that a worker in another folder finds it."""
    paths = {name: getattr(config, name) for name in ("corpus", "out", "init", "pseudo_labels")}
    update = {name: path and storage.absolute(path) for name, path in paths.items()}
    return config.model_copy(update={**update, "backbone": with_absolute_weights(config.backbone)})


def require_validation(config: TrainConfig, corpus: Corpus, what: str) -> None:
    """Refuse a corpus and a config that give no validation rows.

    Raises:
        InputError: `what` is done by validation rows.
    """
    if config.validation(corpus.count("validation"), corpus.count("train")) == (False, 0):
        raise InputError(f"{what} by validation rows: set validation_rows above 0, and have 5 train rows")


def pool_of(config: TrainConfig) -> WorkersConfig:
    """The workers of a training's epochs over the corpus: one a GPU, or one a core, whose torch has one thread."""
    return WorkersConfig(gpus_per_worker=float(config.gpu))


def training_data(config: TrainConfig, corpus: Corpus) -> Corpus:
    """What is trained on: the corpus, or where the trunk is frozen its features, computed or found.

    Raises:
        InputError: `init` has another trunk than the features were made with.
    """
    if not config.backbone.frozen:
        return corpus
    url = compute_features(corpus.store.url, config.backbone, config.features, pool_of(config), config.max_bad)
    data = open_corpus(url, "features")
    if config.init is not None and data.manifest.fingerprint != trunk_fingerprint(
        load_model(config.init, device="cpu").method.trunk
    ):
        raise InputError(f"init = {config.init!r} has another frozen trunk than backbone.* describes")
    return data


def plan_job(config: TrainConfig, corpus: Corpus, data: Corpus) -> dict[str, Any]:
    """What every worker of a training needs to know, JSON-able, from labels and splits alone.

    Raises:
        InputError: a train row without a label, no unlabelled rows where the config wants them, or no pseudo-unseen
            classes. ConfigError: a change gives another network or other phases.
    """
    require_one_network(config, corpus.num_classes)
    train = data.rows("train")
    without = int((train.labels.sum(1) == 0).sum())
    if without:
        raise InputError(
            f"{without:,} of {len(train.ids):,} train rows have no label, {config.method.kind} needs one for each; "
            "ingest them again as split unlabelled, or with labels"
        )
    if config.unlabelled and not data.count("unlabelled"):
        raise InputError(f"unlabelled = true, and {corpus.store.url} has no unlabelled rows")
    if config.select_by == "harmonic":
        for name in PSEUDO_SPLITS:
            data.require(name, 'select_by = "harmonic" (hashray ingest --pseudo-unseen-classes N)')
    given, wanted = config.validation(data.count("validation"), len(train.ids))
    validation = held_out(train.ids, wanted, config.seed)
    selection = Selection(frozenset(validation), config.pseudo_labels, config.unlabelled)
    counts, labels = [], [np.zeros((0, data.num_classes), dtype=np.int8)]
    for record in data.parts:
        table = selection.take(data.part_rows(record, "all"))
        counts.append(len(table))
        labels.append(selection.labels(data, table))
    known = np.concatenate(labels) == 1
    table = LabelTable.of(torch.as_tensor(known[known.any(1)].astype(np.uint8)))
    plan = EpochPlan(tuple(counts), config.batch_size, config.shuffle_window, config.seed)
    return {
        "config": config.model_dump(mode="json"), "source": data.store.url, "num_classes": corpus.num_classes,
        "validation": sorted(validation), "validation_given": given,
        "rows": table.rows.tolist(), "counts": table.counts.tolist(), "plan": asdict(plan),
        "memory": _fits_memory(config, plan.rows),
    }  # fmt: skip


def run_of(config: TrainConfig, corpus: Corpus) -> tuple[str, dict[str, str]]:
    """The hash of everything a trained model depends on, and the manifest ids of what it is made from.

    Raises:
        InputError: the model to start from does not fit. MismatchError: pseudo-labels of another corpus.
    """
    parents = {"corpus": corpus.manifest.id}
    if config.init is not None:
        start = load_model(config.init, device="cpu")
        if start.classes != corpus.classes:
            raise InputError(f"init = {config.init!r} has other classes than the corpus, or in another order")
        own = _untrained(config, corpus.num_classes)
        try:
            own.load_state_dict(start.method.state_dict())
        except RuntimeError as error:
            fault = str(error).splitlines()[1].strip()
            raise InputError(f"init = {config.init!r} is of another method, size or trunk: {fault}") from error
        assert start.manifest is not None
        parents["init"] = start.manifest.id
    if config.pseudo_labels is not None:
        pseudo = artifact.load_manifest(config.pseudo_labels, "pseudo-labels")
        if pseudo.parents["corpus"] != corpus.manifest.id:
            raise MismatchError(f"pseudo_labels = {config.pseudo_labels!r} are of another corpus")
        parents["pseudo-labels"] = pseudo.id
    told = config.result_of()
    told["backbone"]["weights"] = weights_identity(config.backbone)  # by what they hold, not by where they are
    return sha256_hex(canonical({"config": told, "parents": parents}))[:16], parents


def _fits_memory(config: TrainConfig, rows: int) -> bool:
    size_bytes = rows * 3 * config.backbone.image_size**2
    auto = config.backbone.frozen or size_bytes <= config.memory_limit_mib << 20
    return config.input == "memory" or (config.input == "auto" and auto)


def total_epochs(config: TrainConfig, num_classes: int) -> int:
    """Passes over the images of a whole training."""
    return _epochs(_untrained(config, num_classes), config)


def _epochs(method: Method, config: TrainConfig) -> int:
    return sum(phase.epochs for phase in method.phases(config.epochs))


def _untrained(config: TrainConfig, num_classes: int) -> Method:
    return build_method(config.method, build_trunk(config.backbone, load_weights=False), num_classes)


def require_one_network(config: TrainConfig, num_classes: int) -> None:
    """Refuse changes after which the weights so far would not fit.

    Raises:
        ConfigError: another network, other phases, or a change after the end.
    """
    if not config.changes:
        return
    first, *later = [_untrained(own, num_classes) for _, own in config.segments()]
    total = _epochs(first, config)
    for change, method in zip(config.changes, later, strict=True):
        if change.after >= total:
            raise ConfigError(f"changes: after = {change.after}, and the training ends after {total} epochs")
        if not _same_network(first, method, config.epochs):
            raise ConfigError(
                f"changes, after {change.after} epochs: {', '.join(change.method)} would give another network or other "
                "phases; weights and rates can change while a model trains"
            )


def _same_network(first: Method, other: Method, epochs: int) -> bool:
    """Whether both have the same phases and, from the same weights, the same codes of rows and of classes."""
    phases = [[(phase.name, phase.round, phase.epochs) for phase in own.phases(epochs)] for own in (first, other)]
    state, shapes = first.state_dict(), {name: tensor.shape for name, tensor in other.state_dict().items()}
    if phases[0] != phases[1] or {name: tensor.shape for name, tensor in state.items()} != shapes:
        return False
    other.load_state_dict(state)
    features = torch.randn(8, first.trunk.feature_dim, generator=torch.Generator().manual_seed(0))
    classes = [own.class_codes() for own in (first, other)]
    return torch.equal(first.encode(features), other.encode(features)) and np.array_equal(*classes)  # type: ignore[arg-type]


def _fit_segments(config: TrainConfig, job: dict[str, Any]) -> Checkpoint:
    """Fit one segment after another, each from where the one before ended; return the end. Rerun = resume."""
    segments, start = config.segments(), None
    for (_, own), (until, _) in pairwise(segments):
        end = join(job["checkpoints"], f"{job['run']}-{until}")
        if not open_store(end).exists(STATE):
            fit_until(own, job, start, until, end)
        start = end
    own = segments[-1][1]
    return fit(own, job | {"config": own.model_dump(mode="json"), "start": start})


def fit_until(config: TrainConfig, job: dict[str, Any], start: str | None, until: int, end: str) -> None:
    """Fit from the checkpoint at `start`, or from the beginning, for `until` epochs in all; keep the last at `end`."""
    more = {"config": config.model_dump(mode="json"), "start": start, "until": until}
    final = fit(config, job | more | {"checkpoints": f"{end}-fit", "run": "run"})
    with tempfile.TemporaryDirectory() as folder:
        final.save(Path(folder))
        keep_checkpoint(end, Path(folder))


def fit(config: TrainConfig, job: dict[str, Any]) -> Checkpoint:
    """Run a job on Ray Train, with its checkpoints in job["checkpoints"]; return the last one."""
    plan = EpochPlan.from_json(job["plan"])
    datasets: dict[str, Any] = {}
    epochs = total_epochs(config, job["num_classes"])
    if not job["memory"]:
        spec = stream_spec(job, config, plan)
        datasets = {"train": training_dataset(spec, epochs), "scan": scan_dataset(spec)}
    quicken_on_one_machine()
    filesystem, path = arrow_filesystem(open_store(job["checkpoints"]))
    options = ray.data.ExecutionOptions(preserve_order=True)
    board = MetricsQueue.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={**job, "board": board},
        scaling_config=rt.ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpu, resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": 1} if config.gpu else {}),
        ),
        run_config=rt.RunConfig(
            name=job["run"], storage_path=path, storage_filesystem=filesystem,
            failure_config=rt.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=rt.CheckpointConfig(num_to_keep=2),
            worker_runtime_env=environment_of(config),  # type: ignore[call-arg]  # Ray Train has had it since its version 2
        ),
        datasets=datasets,
        dataset_config=rt.DataConfig(execution_options=options),
    )  # fmt: skip
    with _Watch(board, epochs, config):
        try:
            result = trainer.fit()
        except Exception as error:
            raise unwrap(error) from error
    if result.error is not None:
        raise unwrap(result.error) from result.error
    if result.checkpoint is None:
        raise RunError(f"the training run {job['run']} ended without a checkpoint; delete {job['checkpoints']}")
    with result.checkpoint.as_directory() as folder:
        return load_checkpoint(Path(folder))


def environment_of(config: TrainConfig) -> dict[str, Any]:
    """The Ray runtime environment of a training's workers."""
    return {} if config.gpu or config.backbone.frozen else {"env_vars": memory_environment()}


class _Watch:
    """The driver's bar and TensorBoard files while `fit` blocks."""

    def __init__(self, board: Any, epochs: int, config: TrainConfig) -> None:
        self.board, self.epochs, self.config = board, epochs, config
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _run(self) -> None:
        writer = None
        folder = open_store(str(self.config.out)).local_path("tensorboard")
        if self.config.tensorboard and folder is not None:
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(str(folder))
        with Bar("train", self.epochs, "epochs") as bar:
            over = False
            while not over:
                over = self.stop.wait(0.5)
                for line in ray.get(self.board.take.remote()):
                    if line["event"] == "epoch":
                        notes = {"loss": f"{line['loss']:.4f}"}
                        if "validation_map" in line:
                            notes["mAP"] = f"{line['validation_map']:.4f}"
                        if not bar.done:
                            bar.resume_at(line["epoch"] - 1)
                        bar.add(line["epoch"] - bar.done, **notes)
                        for name, value in line.items():
                            if writer is not None and isinstance(value, float):
                                writer.add_scalar(name, value, line["epoch"])
        if writer is not None:
            writer.close()

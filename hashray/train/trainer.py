"""[Ray] `hashray train`: workers, failures, reports, and the model at the end.

The driver reads labels, holds out validation rows, deduplicates label rows and plans the batches; workers
run train/loop.py. Checkpoints go to <out>/checkpoints through Ray Train; a lost worker restarts the group
from the last one, and the same command run again goes on from it. The model is published by the driver.
"""

from __future__ import annotations

import json
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train as rt
import torch
from numpy.typing import NDArray
from ray.train.torch import TorchTrainer, get_device

from hashray import artifact, storage
from hashray.artifact import Manifest, canonical, sha256_hex
from hashray.codes import binarize
from hashray.config import require_path
from hashray.data.batches import EpochPlan, MemorySlices, SliceSource, held_out
from hashray.data.corpus import Corpus, open_corpus
from hashray.data.stream import POSITION_FILE, StreamSlices, StreamSpec, sweep_dataset, training_dataset
from hashray.data.units import refuse_taken
from hashray.errors import InputError, RunError
from hashray.evaluate.metrics import mean_average_precision
from hashray.methods import build_method
from hashray.methods.backbone import build_trunk, weights_identity, with_absolute_weights
from hashray.methods.base import LabelTable, Method
from hashray.model import write_model
from hashray.progress import Bar, say
from hashray.runtime import WorkersConfig, connect, quicken_on_one_machine, unwrap
from hashray.storage import join, open_store
from hashray.storage_s3 import arrow_filesystem
from hashray.train.checkpoint import Position, load_checkpoint
from hashray.train.config import TrainConfig
from hashray.train.features import compute_features
from hashray.train.loop import Loop

VALIDATION_DATABASE = 5000
ENCODE_ROWS = 256


def train(config: TrainConfig) -> Manifest:
    """Run the stage; return the model's manifest. Rerun = resume.

    Raises:
        InputError: no corpus, no train rows, weights that do not fit. RunError: the loss is not finite.
        AlreadyExists: `out` holds a model of another config or corpus.
    """
    url, out = (storage.absolute(require_path(p, f)) for p, f in ((config.corpus, "--corpus"), (config.out, "--out")))
    corpus = open_corpus(url)
    corpus.require("train", "training")
    store = open_store(out)
    result_of = config.result_of()
    weights = weights_identity(config.backbone)
    run = sha256_hex(canonical({"config": result_of, "corpus": corpus.manifest.id, "weights": weights}))[:16]
    if artifact.is_finished(store):
        manifest = artifact.load_manifest(store, "model")
        if manifest.info.get("run") == run:
            say(f"{out} is finished already")
            return manifest
        refuse_taken(store, run, "run")
    places = {"corpus": url, "out": out, "backbone": with_absolute_weights(config.backbone)}
    config = config.model_copy(update=places)
    connect()
    source_url, data = url, corpus
    if config.backbone.frozen:
        pool = WorkersConfig(cpus_per_worker=config.cpus_per_worker, gpus_per_worker=float(config.gpu))
        source_url = compute_features(url, config.backbone, config.features, pool, config.max_bad)
        data = open_corpus(source_url, "features")
    rows = data.rows("train")
    unlabelled = int((rows.labels.sum(1) == 0).sum())
    if unlabelled:
        raise InputError(
            f"{unlabelled:,} of {len(rows.ids):,} train rows have no label, {config.method.kind} needs one for each; "
            "ingest them again as split unlabelled, or with labels"
        )
    if config.workers > 1 and not config.gpu and not config.backbone.frozen:
        say("note: on CPU each worker's batch norms see its own rows only (torch synchronises them on GPUs alone)")
    given = data.count("validation")
    wanted = 0 if given else min(config.validation_rows, len(rows.ids) // 5)
    validation = held_out(rows.ids, wanted, config.seed)
    keep = np.array([row_id not in validation for row_id in rows.ids], dtype=bool)
    table = LabelTable.of(torch.as_tensor(rows.labels[keep]))
    job = {
        "config": config.model_dump(mode="json"), "source": source_url, "num_classes": corpus.num_classes,
        "validation": sorted(validation), "validation_given": bool(given and config.validation_rows),
        "rows": table.rows.tolist(), "counts": table.counts.tolist(),
        "plan": asdict(_plan(config, data, validation)), "checkpoints": join(out, "checkpoints"), "run": run,
    }  # fmt: skip
    tensors, history, position = _fit(config, job)
    chosen = {"best_at": position.best_at, "validation_map": position.best_score} if position.best_at else {}
    method = build_method(config.method, build_trunk(config.backbone, load_weights=False), corpus.num_classes)
    info = {"run": run, "train_rows": int(keep.sum()), "phases": position.notes.get("phases", []), **chosen}
    parents = {"corpus": corpus.manifest.id} | ({"features": data.manifest.id} if data is not corpus else {})
    refuse_taken(store, run, "run")
    manifest = write_model(store, method, tensors, corpus.classes, result_of, parents, history, info)
    for key, _ in list(store.list("checkpoints/")):
        store.delete(key)
    say(f"{out}: model {manifest.id[:12]}" + (f", validation mAP {position.best_score:.4f}" if chosen else ""))
    return manifest


def _plan(config: TrainConfig, data: Corpus, validation: set[str]) -> EpochPlan:
    counts = []
    for record in data.parts:
        ids = data.part_rows(record, "train").column("id").to_pylist() if data.count_part(record, "train") else []
        counts.append(sum(row_id not in validation for row_id in ids))
    return EpochPlan(tuple(counts), config.batch_size, config.shuffle_window, config.seed)


def _fits_memory(config: TrainConfig, rows: int) -> bool:
    size_bytes = rows * 3 * config.backbone.image_size**2
    auto = config.backbone.frozen or size_bytes <= config.memory_limit_mib << 20
    return config.input == "memory" or (config.input == "auto" and auto)


def _fit(config: TrainConfig, job: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    plan = EpochPlan(**{**job["plan"], "part_rows": tuple(job["plan"]["part_rows"])})
    job["memory"] = _fits_memory(config, plan.rows)
    datasets: dict[str, Any] = {}
    method = build_method(config.method, build_trunk(config.backbone, load_weights=False), job["num_classes"])
    epochs = sum(phase.epochs for phase in method.phases(config.epochs))
    if not job["memory"]:
        spec = _stream_spec(job, config, plan)
        datasets = {"train": training_dataset(spec, epochs), "sweep": sweep_dataset(spec)}
    quicken_on_one_machine()
    filesystem, path = arrow_filesystem(job["checkpoints"])
    options = ray.data.ExecutionOptions(preserve_order=True)
    board = _Board.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _worker,
        train_loop_config={**job, "board": board},
        scaling_config=rt.ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpu, resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": 1} if config.gpu else {}),
        ),
        run_config=rt.RunConfig(
            name=job["run"], storage_path=path, storage_filesystem=filesystem,
            failure_config=rt.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=rt.CheckpointConfig(num_to_keep=2),
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
        final = load_checkpoint(Path(folder))
    tensors = final.best() or final.under("average") or final.under("method")
    return tensors, final.position.notes["history"], final.position


def _stream_spec(job: dict[str, Any], config: TrainConfig, plan: EpochPlan) -> StreamSpec:
    parts = [record.name for record in open_corpus(job["source"], None).parts]
    return StreamSpec(
        job["source"], plan, parts, set(job["validation"]), config.backbone.image_size, config.backbone.resize,
        config.augment, config.workers, join(job["checkpoints"], job["run"]),
    )  # fmt: skip


@ray.remote
class _Board:
    """Where the first worker leaves lines for the driver's bar."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def put(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def take(self) -> list[dict[str, Any]]:
        taken, self.lines = self.lines, []
        return taken


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
                        bar.add(line["pass"] - bar.done, **notes)
                        for name, value in line.items():
                            if writer is not None and isinstance(value, float):
                                writer.add_scalar(name, value, line["pass"])
        if writer is not None:
            writer.close()


def _worker(job: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(job["config"])
    context = rt.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    assert isinstance(device, torch.device)
    torch.manual_seed(config.seed)  # the same initial weights on every worker
    trunk = build_trunk(config.backbone)
    method = build_method(config.method, trunk, job["num_classes"]).to(device)
    if device.type == "cuda" and world > 1:
        # The trunk alone: LabNet is trained by the first worker, whose norms would wait for the others for ever.
        method.trunk = torch.nn.SyncBatchNorm.convert_sync_batchnorm(method.trunk)
    table = LabelTable(torch.tensor(job["rows"], dtype=torch.uint8), torch.tensor(job["counts"]))
    plan = EpochPlan(**{**job["plan"], "part_rows": tuple(job["plan"]["part_rows"])})
    data = open_corpus(job["source"], None)
    source: SliceSource
    if job["memory"]:
        inputs, labels, ids = load_rows(data, set(job["validation"]), False, config)
        source = MemorySlices(plan, inputs, labels, ids, config.augment, rank, world)
    else:
        spec = _stream_spec(job, config, plan)
        shards = rt.get_dataset_shard("train"), rt.get_dataset_shard("sweep")
        source = StreamSlices(spec, *shards, job["num_classes"])
    validate = None
    if job["validation"] or job["validation_given"]:
        held, base = None, None
        if rank == 0:
            if job["validation_given"]:
                held = load_rows(data, set(), False, config, "validation")
            else:
                held = load_rows(data, set(job["validation"]), True, config)
            # Drawn, not the first: rows of a Parquet or tar source may stand class by class.
            others = sorted({*data.rows("train").ids} - {*job["validation"]})
            base = load_rows(data, held_out(others, VALIDATION_DATABASE, config.seed), True, config)

        def validate(method: Method) -> float:
            assert held is not None and base is not None
            return mean_average_precision(_codes(method, held[0]), held[1], _codes(method, base[0]), base[1])

    def report(metrics: dict[str, Any], write: Any) -> None:
        if rank == 0:
            job["board"].put.remote(metrics)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0 and write is not None:
                write(Path(folder))
                checkpoint = rt.Checkpoint.from_directory(folder)
            rt.report(metrics, checkpoint=checkpoint)

    loop = Loop(method, config, table, source, report, validate, device)
    checkpoint, found = None, rt.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            checkpoint = load_checkpoint(Path(folder))
    if rank == 0 and not job["memory"]:
        # Where this group begins, before it asks for data: a checkpoint that was written but that Ray had not
        # registered when the run was killed is not the one a rerun starts from.
        at = Position() if checkpoint is None else checkpoint.position
        number = sum(phase.epochs for phase in loop.phases[: at.phase]) + at.epoch
        position = json.dumps({"pass": number, "step": at.step}).encode()
        open_store(join(job["checkpoints"], job["run"])).write(POSITION_FILE, position)
    loop.run(checkpoint)


def load_rows(
    data: Corpus, chosen: set[str], wanted: bool, config: TrainConfig, split: str = "train"
) -> tuple[NDArray[Any], NDArray[np.uint8], list[str]]:
    """(inputs, labels, ids) of a split's rows that are (`wanted`) or are not among the `chosen`, in corpus order."""
    inputs: list[NDArray[Any]] = []
    labels: list[NDArray[np.uint8]] = []
    ids: list[str] = []
    for record in data.parts:
        if not data.count_part(record, split):
            continue
        table = data.read_part(record, split)
        kept = [(row_id in chosen) == wanted for row_id in table.column("id").to_pylist()]
        table = table.filter(np.array(kept, dtype=bool))
        inputs.append(data.inputs(table, config.backbone.image_size, config.backbone.resize))
        labels.append(data.label_matrix(table))
        ids += table.column("id").to_pylist()
    return np.concatenate(inputs), np.concatenate(labels), ids


def _codes(method: Method, inputs: NDArray[Any]) -> NDArray[np.uint8]:
    device = method.trunk.mean.device
    chunks = [
        binarize(method.encode(torch.as_tensor(inputs[i : i + ENCODE_ROWS], device=device)))
        for i in range(0, len(inputs), ENCODE_ROWS)
    ]
    return np.concatenate(chunks)

"""[Ray] What each training worker does: builds the method and its data, runs train/loop.py, reports."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train as rt
import torch
from numpy.typing import NDArray
from ray.train.torch import get_device

from hashray.codes import binarize
from hashray.data.corpus import Corpus, open_corpus
from hashray.methods import build_method
from hashray.methods.backbone import build_trunk
from hashray.methods.base import LabelTable, Method
from hashray.metrics import mean_average_precision
from hashray.model import load_model
from hashray.storage import join, open_store
from hashray.train.batches import EpochPlan, MemorySlices, SliceSource, held_out
from hashray.train.checkpoint import Position, load_checkpoint, read_checkpoint
from hashray.train.config import TrainConfig
from hashray.train.loop import Loop, Report
from hashray.train.selection import Selection
from hashray.train.stream import POSITION_FILE, StreamSlices, StreamSpec

VALIDATION_DATABASE = 5000
PSEUDO_SPLITS = ("query-pseudo", "database-pseudo")
ENCODE_ROWS = 256


@ray.remote
class MetricsQueue:
    """Where the first worker leaves lines for the driver's bar."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def put(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def take(self) -> list[dict[str, Any]]:
        taken, self.lines = self.lines, []
        return taken


def run_worker(job: dict[str, Any]) -> None:
    """The train function of every worker. `job` is JSON-able but for the board."""
    context = rt.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    assert isinstance(device, torch.device)
    shards = None if job["memory"] else (rt.get_dataset_shard("train"), rt.get_dataset_shard("scan"))

    def report(metrics: dict[str, Any], write: Any) -> None:
        if rank == 0:
            job["board"].put.remote(metrics)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0 and write is not None:
                write(Path(folder))
                checkpoint = rt.Checkpoint.from_directory(folder)
            rt.report(metrics, checkpoint=checkpoint)

    loop = build_loop(job, rank, world, device, report, shards)
    checkpoint, found = None, rt.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            checkpoint = load_checkpoint(Path(folder))
    elif job.get("start"):
        checkpoint = read_checkpoint(job["start"])
    if rank == 0 and not job["memory"]:
        # Where this group begins, before it asks for data: a checkpoint that was written but that Ray had not
        # registered when the run was killed is not the one a rerun starts from.
        at = Position() if checkpoint is None else checkpoint.position
        position = json.dumps({"epoch": at.epochs_done(loop.phases), "step": at.step}).encode()
        open_store(join(job["checkpoints"], job["run"])).write(POSITION_FILE, position)
    loop.run(checkpoint, job.get("until"))


def build_loop(
    job: dict[str, Any], rank: int, world: int, device: torch.device, report: Report, shards: tuple[Any, Any] | None
) -> Loop:
    """One worker's side of a job: the method, its rows from memory or from `shards`, its validation."""
    config = TrainConfig.model_validate(job["config"])
    torch.manual_seed(config.seed)  # the same initial weights on every worker
    trunk = build_trunk(config.backbone)
    method = build_method(config.method, trunk, job["num_classes"])
    if config.init is not None:
        method.load_state_dict(load_model(config.init, device="cpu").method.state_dict())
    method = method.to(device)
    if device.type == "cuda" and world > 1:
        # The trunk alone: LabNet is trained by the first worker, whose norms would wait for the others for ever.
        method.trunk = torch.nn.SyncBatchNorm.convert_sync_batchnorm(method.trunk)
    table = LabelTable(torch.tensor(job["rows"], dtype=torch.uint8), torch.tensor(job["counts"]))
    plan = EpochPlan.from_json(job["plan"])
    data, selection = open_corpus(job["source"], None), selection_of(config, job)
    source: SliceSource
    if shards is None:
        source = MemorySlices(plan, *training_rows(data, selection, config), config.augment, rank, world)
    else:
        source = StreamSlices(stream_spec(job, config, plan), *shards, job["num_classes"])
    validation = _Validation(data, job, config) if job["validation"] or job["validation_given"] else None
    if validation is not None and rank == 0:
        validation.load()
    return Loop(method, config, table, source, report, validation, device)


class _Validation:
    """mAP of the held-out (or given) validation rows against a draw of the other train rows.

    With `select_by` harmonic: the harmonic mean of that and of the mAP within the pseudo-unseen classes.
    """

    def __init__(self, data: Corpus, job: dict[str, Any], config: TrainConfig) -> None:
        self.data, self.config = data, config
        self.given, self.held = bool(job["validation_given"]), set(job["validation"])

    def load(self) -> None:
        """Read both sides; on the worker that validates."""
        split = "validation" if self.given else "train"
        query = load_rows(self.data, None if self.given else self.held, self.config, split)
        # Drawn, not the first: rows of a Parquet or tar source may stand class by class.
        others = sorted({*self.data.rows("train").ids} - self.held)
        drawn = held_out(others, VALIDATION_DATABASE, self.config.seed)
        self.sides = [(query, load_rows(self.data, drawn, self.config, "train"))]
        if self.config.select_by == "harmonic":
            queries, database = (load_rows(self.data, None, self.config, name) for name in PSEUDO_SPLITS)
            self.sides.append((queries, database))

    def __call__(self, method: Method) -> float:
        found = [
            mean_average_precision(_codes(method, query), query_labels, _codes(method, database), database_labels)
            for (query, query_labels), (database, database_labels) in self.sides
        ]
        return statistics.harmonic_mean(found)


def selection_of(config: TrainConfig, job: dict[str, Any]) -> Selection:
    """The training rows of a job."""
    return Selection(frozenset(job["validation"]), config.pseudo_labels, config.unlabelled)


def stream_spec(job: dict[str, Any], config: TrainConfig, plan: EpochPlan) -> StreamSpec:
    """What the tasks of a job's stream need to know."""
    parts = [record.name for record in open_corpus(job["source"], None).parts]
    return StreamSpec(
        job["source"], plan, parts, selection_of(config, job), config.backbone.image_size, config.backbone.resize,
        config.augment, config.workers, join(job["checkpoints"], job["run"]),
    )  # fmt: skip


def training_rows(
    data: Corpus, selection: Selection, config: TrainConfig
) -> tuple[NDArray[Any], NDArray[np.int8], list[str]]:
    """(inputs, labels, ids) of the training rows, in corpus order."""
    pieces = []
    for record in data.parts:
        table = selection.take(data.read_part(record))
        if len(table):
            inputs = data.inputs(table, config.backbone.image_size, config.backbone.resize)
            pieces.append((inputs, selection.labels(data, table), table.column("id").to_pylist()))
    ids = [row_id for _, _, own in pieces for row_id in own]
    return np.concatenate([inputs for inputs, _, _ in pieces]), np.concatenate([labels for _, labels, _ in pieces]), ids


def load_rows(
    data: Corpus, chosen: set[str] | None, config: TrainConfig, split: str
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """(inputs, labels) of the rows of a split that are `chosen`, all if None, in corpus order."""
    inputs: list[NDArray[Any]] = []
    labels: list[NDArray[np.uint8]] = []
    for record in data.parts:
        if not data.count_part(record, split):
            continue
        table = data.read_part(record, split)
        if chosen is not None:
            table = table.filter(np.array([i in chosen for i in table.column("id").to_pylist()], dtype=bool))
        inputs.append(data.inputs(table, config.backbone.image_size, config.backbone.resize))
        labels.append(data.label_matrix(table))
    return np.concatenate(inputs), np.concatenate(labels)


def _codes(method: Method, inputs: NDArray[Any]) -> NDArray[np.uint8]:
    device = method.trunk.mean.device
    chunks = [
        binarize(method.encode(torch.as_tensor(inputs[i : i + ENCODE_ROWS], device=device)))
        for i in range(0, len(inputs), ENCODE_ROWS)
    ]
    return np.concatenate(chunks)

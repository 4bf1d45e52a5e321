"""A tiny training set in memory, and a runner of the loop on one process or on several over gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hashray.data.images import AugmentConfig
from hashray.methods import build_method, known_methods
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.methods.base import LabelTable, Method
from hashray.train.batches import EpochPlan, MemorySlices
from hashray.train.checkpoint import Checkpoint, load_checkpoint
from hashray.train.config import TrainConfig
from hashray.train.loop import Loop

DIM, CLASSES = 24, 4
# Fields that keep the networks of a method small.
SMALL: dict[str, dict[str, Any]] = {
    "dseh": {"label_hidden": 32, "semantic_dim": 16, "label_epochs": 30},
    "lcgh": {"hidden": 32, "decoder_hidden": 32},
    "neighbours": {"hidden": 32},
}


class Stop(Exception):
    """Raised by a test to stop a run at a given step, as a kill would."""


def make_rows(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Clustered features float64 [n, 24], labels [n, 4] with one or two classes in each row, and ids."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((count, CLASSES), dtype=np.uint8)
    labels[np.arange(count), rng.integers(0, CLASSES, count)] = 1
    labels[np.arange(0, count, 5), 0] = 1
    centres = rng.standard_normal((CLASSES, DIM))
    features = labels @ centres + 0.3 * rng.standard_normal((count, DIM))
    return features, labels, [f"row{i}" for i in range(count)]


def config_of(**changes: Any) -> TrainConfig:
    """The config of a small run. `method` is a dict of fields."""
    method = {"kind": "dseh", "num_bits": 16, **changes.pop("method", {})}
    method = SMALL.get(method["kind"], {}) | method
    base: dict[str, Any] = {"epochs": 3, "batch_size": 32, "validation_rows": 0, "optim": {"lr": 1e-3}}
    if not known_methods()[method["kind"]][1].trains_trunk:
        base["backbone"] = {"frozen": True}
    return TrainConfig.model_validate(base | changes | {"method": method})


def build(config: TrainConfig, dtype: torch.dtype) -> Method:
    """A method on cached features, so its trunk never runs."""
    torch.manual_seed(config.seed)
    trunk = build_trunk(BackboneConfig(name="resnet9", width=4, frozen=True))
    trunk.feature_dim = DIM
    return build_method(config.method, trunk, CLASSES).to(dtype)


def run_loop(
    config: TrainConfig, count: int, rank: int = 0, world: int = 1, dtype: torch.dtype = torch.float64,
    checkpoint: Checkpoint | None = None, stop_at: tuple[int, int, int] | None = None,
    folder: Path | None = None, validate: Callable[[Method], float] | None = None, method: Method | None = None,
) -> tuple[dict[str, Tensor], Loop]:  # fmt: skip
    """Train `method`, else that of the config.

    With `stop_at` (phase, epoch, step), raise Stop after the checkpoint of that step is in `folder`.
    With `unlabelled`, only the first eighth of the rows has labels.
    """
    features, labels, ids = make_rows(count)
    table = LabelTable.of(torch.as_tensor(labels))
    if config.unlabelled:
        table, labels = LabelTable.of(torch.as_tensor(labels[: count // 8])), labels.astype(np.int8)
        labels[count // 8 :] = -1
    plan = EpochPlan((count // 2, count - count // 2), config.batch_size, config.shuffle_window, config.seed)
    source = MemorySlices(plan, features, labels, ids, AugmentConfig(), rank, world)

    def report(metrics: dict[str, Any], write: Callable[[Path], None] | None) -> None:
        at = (loop.position.phase, loop.position.epoch, loop.position.step)
        if stop_at == at and write is not None and folder is not None:
            write(folder)
            raise Stop

    loop = Loop(method or build(config, dtype), config, table, source, report, validate, torch.device("cpu"))
    return loop.run(checkpoint), loop


def _worker(rank: int, world: int, port_file: str, runs: dict[str, tuple[TrainConfig, int]], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world)
    try:
        torch.save({name: run_loop(*run, rank, world)[0] for name, run in runs.items()}, f"{out}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_processes(runs: dict[str, tuple[TrainConfig, int]], world: int) -> list[dict[str, dict[str, Tensor]]]:
    """Train each (config, rows) on `world` processes and return the weights. FAISS and torch do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/store", runs, folder)
        processes = [context.Process(target=_worker, args=(rank, *arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def read(folder: Path) -> Checkpoint:
    """Read the checkpoint of a stopped run."""
    return load_checkpoint(folder)

"""A training in this process: for one worker whose rows fit in memory. No Ray.

The same loop as on Ray Train, the same checkpoints after the same epochs, so the same weights. A run that is killed
resumes from its last checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hashray.storage import join
from hashray.train.assembly import build_loop
from hashray.train.checkpoint import Checkpoint, Position, has_checkpoint, keep_checkpoint, read_checkpoint
from hashray.train.job import TrainJob


def fit_here(job: TrainJob, place: str, hear: Callable[[dict[str, Any]], None], end: str | None = None) -> None:
    """Run a job, keeping its latest checkpoint at `place`; resume from what is there, else from `job.start`.

    Args:
        hear: gets the lines of the training.
        end: url of the checkpoint that `job.until` ends with; unset: `place` too.

    Raises:
        Diverged: the loss is not finite.
    """
    config = job.config

    def report(metrics: dict[str, Any], write: Any) -> None:
        hear(metrics)
        if write is not None:
            last = metrics["event"] == "epoch" and metrics["epoch"] == job.until
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder))
                keep_checkpoint(end if end is not None and last else place, Path(folder))

    with torch_threads(max(1, int(config.cpus_per_worker)) if not config.gpu else None):
        loop = build_loop(job, 0, 1, torch.device("cuda" if config.gpu else "cpu"), report)
        checkpoint = _before(job, place)
        at = Position() if checkpoint is None else checkpoint.position
        hear({"event": "start", "epoch": at.epochs_done(loop.phases), "step": at.step, "world": 1})
        loop.run(checkpoint, job.until)


def local_checkpoint(job: TrainJob) -> str:
    """Where `fit_here` keeps the checkpoint of a job of `hashray train`."""
    return join(job.checkpoints, job.run)


def _before(job: TrainJob, place: str) -> Checkpoint | None:
    """The state in which this job was interrupted, or the one that it begins with; None at the very beginning."""
    if has_checkpoint(place):
        return read_checkpoint(place)
    return None if job.start is None else read_checkpoint(job.start)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads in here: what a training computes depends on it in the last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Checkpoints: everything that a run needs to resume as if it had never stopped.

A checkpoint is one file, checkpoint.safetensors, so that it is there whole or not at all: tensors (network, best
weights, moving average, optimiser moments), and in its header the optimiser's scalars and the position (phase, epoch,
step, best score, history). Beside it position.json holds the position alone, for those who need no tensors. Random
numbers and the data position are functions of (seed, phase, epoch, step), and a phase's banks of weights and labels, so
those need no place of their own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hashray.methods.base import Phase
from hashray.storage import open_store

FILE, POSITION = "checkpoint.safetensors", "position.json"


@dataclass
class Position:
    """The next step of a run. `phase_begun` says that `begin_phase` is done."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    phase_begun: bool = False
    best_score: float | None = None
    best_at: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def epochs_done(self, phases: Sequence[Phase]) -> int:
        """Epochs that are done, over all phases."""
        return sum(phase.epochs for phase in phases[: self.phase]) + self.epoch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, as it was saved."""

    position: Position
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any] | None

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix/`, without it."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}

    def best(self) -> dict[str, Tensor] | None:
        """The best weights so far, if a validation has chosen any."""
        return self.under("best") or None

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        position = json.dumps(asdict(self.position))
        save_file(self.tensors, folder / FILE, {"position": position, "optimizer": json.dumps(self.optimizer)})
        (folder / POSITION).write_text(position)

    def moments(self) -> dict[int, dict[str, Any]] | None:
        """The optimiser's state of each parameter, or None where there was no optimiser yet."""
        if self.optimizer is None:
            return None
        entries: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in self.optimizer.items()}
        for key, value in self.under("optimizer").items():
            index, _, name = key.partition("/")
            entries.setdefault(int(index), {})[name] = value
        return entries


def save_checkpoint(
    folder: Path,
    position: Position,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None,
    best: Mapping[str, Tensor] | None,
    extra: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a checkpoint into `folder`; `extra` holds further named sets of weights."""
    sets = {"method": weights, "best": best or {}, **extra}
    tensors = {f"{name}/{key}": value for name, group in sets.items() for key, value in group.items()}
    scalars: dict[str, Any] | None = None
    if optimizer is not None:
        scalars = {}
        for index, entries in optimizer.state_dict()["state"].items():
            scalars[str(index)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
            tensors.update({f"optimizer/{index}/{k}": v for k, v in entries.items() if isinstance(v, Tensor)})
    kept = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    Checkpoint(position, kept, scalars).save(folder)


def keep_checkpoint(url: str, folder: Path) -> None:
    """Upload a checkpoint folder over an older one; position.json goes last."""
    store = open_store(url)
    for name in (FILE, POSITION):
        store.upload(name, folder / name)


def has_checkpoint(url: str) -> bool:
    """Whether a checkpoint is kept there."""
    return open_store(url).exists(FILE)


def read_checkpoint(url: str) -> Checkpoint:
    """Read a checkpoint that `keep_checkpoint` uploaded.

    Raises:
        InputError: there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        open_store(url).download(FILE, Path(folder) / FILE)
        return load_checkpoint(Path(folder))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder."""
    with safe_open(folder / FILE, "pt") as file:
        state = {name: json.loads(text) for name, text in file.metadata().items()}
    return Checkpoint(Position(**state["position"]), load_file(folder / FILE), state["optimizer"])


def read_position(url: str) -> Position | None:
    """The position of a checkpoint that `keep_checkpoint` uploaded, without its tensors; None if there is none."""
    store = open_store(url)
    return Position(**json.loads(store.read(POSITION))) if store.exists(POSITION) else None

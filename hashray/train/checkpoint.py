"""Checkpoints: everything that a run needs to resume as if it had never stopped.

A checkpoint is a folder: tensors.safetensors (network, best weights, moving average, optimiser moments) and
state.json (phase, epoch, step, best score, optimiser scalars, history, the other file's hash). Random numbers and
the data position are functions of (seed, phase, epoch, step), and a phase's banks of weights and labels, so those
need no file of their own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hashray.errors import CorruptArtifact
from hashray.methods.base import Phase
from hashray.storage import open_store
from hashray.storage.cache import sha256_file

TENSORS, STATE = "tensors.safetensors", "state.json"


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
        save_file(self.tensors, folder / TENSORS)
        state = {
            "position": asdict(self.position), "optimizer": self.optimizer, "sha256": sha256_file(folder / TENSORS),
        }  # fmt: skip
        (folder / STATE).write_text(json.dumps(state))

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
    """Upload a checkpoint folder over an older one; state.json goes last and says that it is whole."""
    store = open_store(url)
    store.delete(STATE)
    for name in (TENSORS, STATE):
        store.upload(name, folder / name)


def read_checkpoint(url: str) -> Checkpoint:
    """Read a checkpoint that `keep_checkpoint` uploaded.

    Raises:
        InputError: there is none. CorruptArtifact: its files do not belong together.
    """
    store = open_store(url)
    with tempfile.TemporaryDirectory() as folder:
        for name in (TENSORS, STATE):
            store.download(name, Path(folder) / name)
        return load_checkpoint(Path(folder))


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        CorruptArtifact: its files come from different checkpoints; a worker that seemed dead may still have written.
    """
    state = json.loads((folder / STATE).read_text())
    if sha256_file(folder / TENSORS) != state["sha256"]:
        raise CorruptArtifact(f"{STATE} of a checkpoint belongs to another {TENSORS}; run the same command again")
    return Checkpoint(Position(**state["position"]), load_file(folder / TENSORS), state["optimizer"])

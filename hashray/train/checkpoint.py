"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder: tensors.safetensors (networks, moving average, optimiser moments, banks that
cannot be derived) and state.json (phase, epoch, step, best score, optimiser scalars, notes). Random numbers
and the data position are functions of (seed, phase, epoch, step), so those four are their whole state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass
class Position:
    """Where a run is: the next step to take. `phase_begun` says that `begin_phase` is behind it."""

    phase: int = 0
    epoch: int = 0
    step: int = 0
    phase_begun: bool = False
    best_score: float | None = None
    best_at: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, position: Position, networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None,
    best: Mapping[str, Tensor] | None,
) -> None:
    """Write a checkpoint into `folder`."""
    tensors = {
        f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()
    }
    tensors.update({f"best/{key}": value for key, value in (best or {}).items()})
    state: dict[str, Any] = {"position": asdict(position), "optimizer": None, "best": best is not None}
    if optimizer is not None:
        data = optimizer.state_dict()
        scalars: dict[str, Any] = {"param_groups": data["param_groups"], "state": {}}
        for index, entries in data["state"].items():
            scalars["state"][str(index)] = {k: v for k, v in entries.items() if not isinstance(v, Tensor)}
            tensors.update({f"optimizer/{index}/{k}": v for k, v in entries.items() if isinstance(v, Tensor)})
        state["optimizer"] = scalars
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, folder / "tensors.safetensors")
    (folder / "state.json").write_text(json.dumps(state))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    position: Position
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any] | None

    def load_into(self, networks: Mapping[str, nn.Module]) -> None:
        """Give the networks their weights; a missing or an extra tensor is an error."""
        for name, net in networks.items():
            net.load_state_dict(self._under(name))

    def best(self) -> dict[str, Tensor] | None:
        """The best weights so far, if a validation has chosen any."""
        return self._under("best") or None

    def optimizer_state(self) -> dict[str, Any] | None:
        """A state dict for the optimiser, or None where the checkpoint lies between two phases."""
        if self.optimizer is None:
            return None
        entries: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in self.optimizer["state"].items()}
        for key, value in self._under("optimizer").items():
            index, _, name = key.partition("/")
            entries.setdefault(int(index), {})[name] = value
        return {"param_groups": self.optimizer["param_groups"], "state": entries}

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder."""
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    return Checkpoint(Position(**state["position"]), tensors, state["optimizer"])

"""What a method is: a config with a `kind`, and a torch module that names its phases and its losses.

The training loop (train/loop.py) knows methods through this file only. A method is one file in this
folder that holds a frozen `XConfig(MethodConfig)` with `kind: Literal["x"]`, and a final class `X(Method)`.

    for phase in method.phases():
        method.begin_phase(phase, table, seed, crew)        # what needs no image batches
        for epoch in range(phase.epochs):
            for inputs, labels, weight in batches:          # weight 0 marks a padding row
                loss = sum(method.loss_terms(phase, inputs, labels, weight).values())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from hashray.codes import check_num_bits
from hashray.config import Config
from hashray.errors import ConfigError, InputError
from hashray.methods.backbone import Trunk


class MethodConfig(Config):
    """Base of every method's config. A subclass adds `kind: Literal["its name"]`."""

    kind: str
    num_bits: int = Field(32, description="bits of a code; a positive multiple of 8")

    @field_validator("num_bits")
    @classmethod
    def _whole_bytes(cls, value: int) -> int:
        try:
            return check_num_bits(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Phase:
    """A stretch of training over image batches with one learning-rate schedule.

    `lr_factor` multiplies the configured rate; `round` counts alternations from 0.
    """

    name: str
    round: int
    epochs: int
    lr_factor: float = 1.0


@dataclass(frozen=True)
class LabelTable:
    """The distinct label rows of the training split, with how often each occurs.

    Attributes:
        rows: uint8 [u, c], distinct, in lexicographic order.
        counts: int64 [u], summing to the number of training rows.
    """

    rows: Tensor
    counts: Tensor

    @staticmethod
    def of(labels: Tensor) -> LabelTable:
        """Deduplicate a label matrix uint8 [n, c]; the order of its rows does not matter.

        Raises:
            InputError: no rows, no classes, or an entry that is neither 0 nor 1.
        """
        if labels.ndim != 2 or 0 in labels.shape:
            raise InputError(f"labels have shape {tuple(labels.shape)}; expected [rows, classes], neither empty")
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise InputError("labels hold entries other than 0 and 1; expected a multi-hot matrix")
        rows, counts = torch.unique(labels.to(torch.uint8), dim=0, return_counts=True)
        return LabelTable(rows, counts)

    def index(self, labels: Tensor) -> Tensor:
        """Position int64 [n] of each label row [n, c] in `rows`; -1 where it does not occur."""
        found = {row.tobytes(): i for i, row in enumerate(self.rows.cpu().numpy())}
        keys = labels.to(torch.uint8).cpu().numpy()
        return torch.tensor([found.get(row.tobytes(), -1) for row in keys], dtype=torch.int64)


class Crew(ABC):
    """The workers of a run, as far as a method needs to know of them. A run of one is a crew of one."""

    @abstractmethod
    def sum_by_label_row(self, outputs: Callable[[Tensor], Tensor]) -> Tensor:
        """Sums float64 [u, width], per distinct label row, of `outputs(inputs) [n, width]` over all training images."""

    @abstractmethod
    def lead(self, module: nn.Module, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run `action` on the first worker, then give every worker its result and the state of `module`."""


class Method(nn.Module, ABC):
    """A trunk and a hash head, trained by the losses of a paper."""

    kind: ClassVar[str]
    config: Any

    def __init__(self, config: MethodConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.num_classes = num_classes

    @abstractmethod
    def phases(self, epochs: int) -> tuple[Phase, ...]:
        """The phases of a training run whose config asks for `epochs` passes over the images per phase."""

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, crew: Crew) -> dict[str, float]:
        """Do what this phase needs before its first image batch; return named numbers for the metrics."""
        return {}

    def bind(self, table: LabelTable) -> None:
        """Rebuild what a phase derives from weights and labels; called after a resume instead of `begin_phase`."""
        return

    @abstractmethod
    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Named, already weighted terms; their sum is the loss.

        Args:
            inputs: what the trunk takes: images [n, 3, h, w] or cached features [n, d].
            labels: [n, c] in {0, 1, -1}, -1 for unknown.
            weight: [n], 0 for a padding row. Every term is a mean under these weights.
        """

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Hash logits [n, num_bits], float32; bit j of the code is logit j >= 0."""

    def trained(self, phase: Phase) -> dict[str, list[nn.Parameter]]:
        """Parameters that this phase trains, by learning-rate group: `trunk` and `head`, or a group of its own."""
        head = [p for name, p in self.named_parameters() if not name.startswith("trunk.") and p.requires_grad]
        return {"trunk": [p for p in self.trunk.parameters() if p.requires_grad], "head": head}

    def forward(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """`loss_terms`, under the name that DistributedDataParallel wraps."""
        return self.loss_terms(phase, inputs, labels, weight)

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """Logits in evaluation mode, restoring the mode afterwards."""
        was_training = self.training
        self.eval()
        try:
            return self.logits(inputs)
        finally:
            self.train(was_training)

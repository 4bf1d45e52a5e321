"""What a method is: a config with a `kind`, and a torch module that names its phases and its losses.

The training loop (train/loop.py) knows methods through this file only. A method is one file in this
folder that holds a frozen `XConfig(MethodConfig)` with `kind: Literal["x"]`, and a final class `X(Method)`.

    for phase in method.phases():
        method.begin_phase(phase, table, seed, workers)        # what needs no image batches
        for epoch in range(phase.epochs):
            for inputs, labels, weight in batches:          # weight 0 marks a padding row
                terms = method.loss_terms(phase, inputs, labels, weight)    # each a sum and its mass
                method.after_step(phase, means over all workers)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator
from torch import Tensor, nn

from hashray.codes import Codes, check_num_bits
from hashray.config import Config
from hashray.errors import ConfigError, InputError
from hashray.methods.backbone import Trunk


class MethodConfig(Config):
    """Base of every method's config. A subclass adds `kind: Literal["its name"]`."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings: a config with a field `preset` takes every field left unset from the one it names."""

    kind: str
    num_bits: int = Field(32, description="bits of a code; a positive multiple of 8")

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in cls.presets:
            return build(data)
        made = build(cls.presets[name] | data)
        made.model_fields_set.intersection_update(data)  # another preset replaces what this one filled in
        return made

    @field_validator("num_bits")
    @classmethod
    def _whole_bytes(cls, value: int) -> int:
        try:
            return check_num_bits(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Phase:
    """A segment of training over image batches with one learning-rate schedule.

    `lr_factor` multiplies the configured rate; `round` counts alternations from 0; the weights of a phase that is not
    `selectable` are never the ones that validation chooses.
    """

    name: str
    round: int
    epochs: int
    lr_factor: float = 1.0
    selectable: bool = True


class Term(NamedTuple):
    """A term of the loss over one worker's rows, as a sum and the mass that it is a mean over.

    The loop divides by the mass of all workers, so that the mean is over the global batch whatever is counted:
    rows, labelled rows, positive entries. With `in_loss` false it is only reported.
    """

    total: Tensor
    mass: Tensor
    in_loss: bool = True

    @staticmethod
    def of_mean(mean: Tensor, mass: Tensor, in_loss: bool = True) -> Term:
        """The term whose mean over this worker's rows is `mean`; `mass` a scalar, or weights to be summed."""
        counted = mass.sum().to(mean.dtype)
        return Term(mean * counted, counted, in_loss)


class ParameterGroup(NamedTuple):
    """Parameters that learn at one rate: `optim.lr` times `lr_factor` (for `trunk`, times optim.trunk_lr_factor)."""

    name: str
    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    decay: bool = True


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

    def repeated(self) -> LabelTable:
        """Every training row by itself."""
        rows = self.rows.repeat_interleave(self.counts.cpu(), 0)
        return LabelTable(rows, torch.ones(len(rows), dtype=torch.int64))

    def index(self, labels: Tensor) -> Tensor:
        """Position int64 [n] in `rows` of the positive classes of each label row [n, c]; -1 where there is none."""
        keys = (labels == 1).to(torch.uint8).cpu().numpy()
        return torch.tensor([self._places.get(row.tobytes(), -1) for row in keys], dtype=torch.int64)

    @cached_property
    def _places(self) -> dict[bytes, int]:
        return {row.tobytes(): i for i, row in enumerate(self.rows.cpu().numpy())}


class WorkerGroup(ABC):
    """The workers of a run, as far as a method needs to know of them. A run of one is a workers of one."""

    @abstractmethod
    def sum_by_group(
        self, outputs: Callable[[Tensor], Tensor], group: Callable[[Tensor], Tensor], groups: int
    ) -> Tensor:
        """Sums float64 [groups, width] of `outputs(inputs) [n, width]` over all training images, none augmented.

        `group(labels [n, c])` gives each row's group int64 [n]; a row of group -1 is left out.
        """

    @abstractmethod
    def gather_rows(self, outputs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(`outputs(inputs)` [n, width], labels [n, c]) of all training images, none augmented; on the first worker.

        In an order that does not depend on the number of workers; the others get nothing, [0, 0] and [0, c].
        """

    @abstractmethod
    def lead(self, module: nn.Module, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run `action` on the first worker, then give every worker its result and the state of `module`."""


class Method(nn.Module, ABC):
    """A trunk and a hash head, trained by the losses of a paper."""

    kind: ClassVar[str]
    uses_unlabelled: ClassVar[bool] = False
    """Whether rows without any known label (all -1) teach this method something."""
    config: Any

    def __init__(self, config: MethodConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.num_classes = num_classes

    @abstractmethod
    def phases(self, epochs: int) -> tuple[Phase, ...]:
        """The phases of a training run whose config asks for `epochs` epochs per phase."""

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        """Do what this phase needs before its first image batch; return named numbers for the metrics."""
        return {}

    def bind(self, table: LabelTable) -> None:
        """Rebuild what a phase derives from weights and labels; called after a resume instead of `begin_phase`."""
        return

    @abstractmethod
    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """Named, already weighted terms; the sum of their means is the loss.

        Args:
            inputs: what the trunk takes: images [n, 3, h, w] or cached features [n, d].
            labels: [n, c] in {0, 1, -1}, -1 for unknown.
            weight: [n], 0 for a padding row, which counts for nothing.
        """

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Hash logits [n, num_bits], float32; bit j of the code is logit j >= 0."""

    def after_step(self, phase: Phase, means: Mapping[str, float]) -> None:
        """Told the means of a step's terms over all workers, after the step, without those that were of no row."""
        return

    def class_scores(self, inputs: Tensor) -> Tensor:
        """How well each class fits, float32 [n, c], the higher the better; -inf for a class never trained on.

        Raises:
            InputError: this method has no scores of classes.
        """
        raise InputError(f"{self.kind} gives no class scores, which self-training needs")

    @classmethod
    def scores_classes(cls, config: Any) -> bool:
        """Whether this method, with these settings, learns class scores."""
        return cls.class_scores is not Method.class_scores

    @classmethod
    def learns_from_labels(cls, config: Any) -> bool:
        """Whether labels teach this method anything, with these settings."""
        return True

    def class_codes(self) -> Codes | None:
        """The codeword of each class, packed uint8 [c, num_bits // 8]; None for a method without codewords."""
        return None

    def trained(self, phase: Phase) -> list[ParameterGroup]:
        """Parameters that this phase trains, by learning-rate group; the trunk's group is called `trunk`."""
        head = [p for name, p in self.named_parameters() if not name.startswith("trunk.") and p.requires_grad]
        return [ParameterGroup("trunk", self._trunk_parameters()), ParameterGroup("head", head)]

    def _trunk_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.trunk.parameters() if p.requires_grad]

    def forward(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
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

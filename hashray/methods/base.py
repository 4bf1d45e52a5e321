"""The interface of a method: a config with a `kind`, and a torch module that defines phases and losses.

The training loop (train/loop.py) knows methods only through this file. A method is one file in this folder with a
frozen `XConfig(MethodConfig)` that has `kind: Literal["x"]`, and a final class `X(Method)`.

    for phase in method.phases():
        method.begin_phase(phase, table, seed, workers)     # work without image batches
        for epoch in range(phase.epochs):                   # without batches where `phase.steps` is false
            for inputs, labels, weight in batches:          # weight 0 marks a padding row
                terms = method.loss_terms(phase, inputs, labels, weight)    # each a sum and its mass
                method.after_step(phase, means over all workers)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
from hashray.methods.losses import full_precision


class MethodConfig(Config):
    """Base of every method's config. A subclass adds `kind: Literal["its name"]`."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings by name. A config with a field `preset` takes its unset fields from the preset of that name."""

    kind: str
    num_bits: int = Field(32, description="Bits of a code, a positive multiple of 8")

    @model_validator(mode="wrap")
    @classmethod
    def _apply_preset(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in cls.presets:
            return build(data)
        config = build(cls.presets[name] | data)
        config.model_fields_set.intersection_update(data)  # another preset can replace the values of this one
        return config

    @field_validator("num_bits")
    @classmethod
    def _whole_bytes(cls, value: int) -> int:
        try:
            return check_num_bits(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class Phase:
    """A part of the training over image batches, with one learning-rate schedule.

    `lr_factor` multiplies the configured rate. `round` counts alternations from 0. Validation never chooses weights of
    a phase that is not `selectable`. Without `steps`, `begin_phase` does all the work in closed form; such a phase has
    one epoch, which only validates.
    """

    name: str
    round: int
    epochs: int
    lr_factor: float = 1.0
    selectable: bool = True
    steps: bool = True


class Term(NamedTuple):
    """A term of the loss on one worker: a sum over its rows, and the mass to divide by.

    The loop divides by the mass of all workers, so the mean is over the global batch. The mass counts rows, labelled
    rows or positive entries. A term with `in_loss` false is only reported.
    """

    total: Tensor
    mass: Tensor
    in_loss: bool = True

    @staticmethod
    def of_mean(mean: Tensor, mass: Tensor, in_loss: bool = True) -> Term:
        """A term from its mean over this worker's rows. `mass` is a scalar, or weights to sum."""
        counted = mass.sum().to(mean.dtype)
        return Term(mean * counted, counted, in_loss)


class ParameterGroup(NamedTuple):
    """Parameters with the rate `optim.lr` times `lr_factor` (for `trunk`, also times optim.trunk_lr_factor)."""

    name: str
    parameters: list[nn.Parameter]
    lr_factor: float = 1.0
    decay: bool = True


@dataclass(frozen=True)
class LabelTable:
    """The distinct label rows of the training split with their counts.

    Attributes:
        rows: uint8 [u, c], distinct, in lexicographic order.
        counts: int64 [u]; the sum is the number of training rows.
        first: int64 [u], the place of the first training row with these labels among all labelled ones.
    """

    rows: Tensor
    counts: Tensor
    first: Tensor

    @staticmethod
    def empty(num_classes: int) -> LabelTable:
        """The table of training rows without any label."""
        return LabelTable.of_each(torch.zeros(0, num_classes, dtype=torch.uint8))

    @staticmethod
    def of_each(rows: Tensor) -> LabelTable:
        """The table in which every training row, uint8 [n, c], is separate and has count 1."""
        return LabelTable(rows, torch.ones(len(rows), dtype=torch.int64), torch.arange(len(rows)))

    @staticmethod
    def of(labels: Tensor) -> LabelTable:
        """Deduplicate a label matrix uint8 [n, c].

        Raises:
            InputError: there are no rows or no classes, or an entry is neither 0 nor 1.
        """
        if labels.ndim != 2 or 0 in labels.shape:
            raise InputError(f"labels have shape {tuple(labels.shape)}; expected [rows, classes], neither of them 0")
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise InputError("labels have entries other than 0 and 1; expected a multi-hot matrix")
        return LabelTable.sum([LabelTable.of_each(labels.to(torch.uint8))])

    @staticmethod
    def sum(tables: Sequence[LabelTable]) -> LabelTable:
        """The table of all training rows, from tables of some of them each, in their order."""
        rows, where = torch.unique(torch.cat([table.rows for table in tables]), dim=0, return_inverse=True)
        counts = torch.cat([table.counts for table in tables])
        starts = torch.tensor([0, *(int(table.counts.sum()) for table in tables)]).cumsum(0)[:-1]
        places = torch.cat([table.first + start for table, start in zip(tables, starts, strict=True)])
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        first = zeros.scatter_reduce(0, where, places, "amin", include_self=False)
        return LabelTable(rows, zeros.index_add(0, where, counts), first)

    def repeated(self) -> LabelTable:
        """The table with every training row separate, each with count 1."""
        return LabelTable.of_each(self.rows.repeat_interleave(self.counts.cpu(), 0))

    def drawn(self, most: int) -> Tensor:
        """Index int64 of at most `most` rows, drawn by their places among the images, not by the order of classes."""
        order = self.first.argsort()
        return order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))[:most]]

    def index(self, labels: Tensor) -> Tensor:
        """Index int64 [n] in `rows` of the positive classes of each label row [n, c]; -1 if `rows` lacks them."""
        keys = (labels == 1).to(torch.uint8).cpu().numpy()
        return torch.tensor([self._index_of_row.get(row.tobytes(), -1) for row in keys], dtype=torch.int64)

    @cached_property
    def _index_of_row(self) -> dict[bytes, int]:
        return {row.tobytes(): i for i, row in enumerate(self.rows.cpu().numpy())}


class WorkerGroup(ABC):
    """The part of a worker group that methods use. A run with one worker is a group of one."""

    @abstractmethod
    def sum_by_group(
        self, outputs: Callable[[Tensor], Tensor], group: Callable[[Tensor], Tensor], groups: int
    ) -> Tensor:
        """Sums float64 [groups, width] of `outputs(inputs) [n, width]` over all training images, without augmentation.

        `group(labels [n, c])` returns the group int64 [n] of each row. Rows of group -1 do not count.
        """

    @abstractmethod
    def sum_products(self, factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Sum float64 [a, b] of left_i^T right_i over all training images i, without augmentation.

        `factors(inputs, labels [n, c])` returns left [n, a] and right [n, b]. With a column of ones on both sides that
        is counts, means and covariances; with labels on the left, the sums of every class.
        """

    @abstractmethod
    def gather_rows(self, outputs: Callable[[Tensor], Tensor], most: int | None = None) -> tuple[Tensor, Tensor]:
        """(`outputs(inputs)` [n, width], labels [n, c]) of all training images, without augmentation.

        Only the first worker gets them; the others get [0, 0] and [0, c]. The order of the rows does not depend on the
        number of workers, and neither does the draw of about `most` of more rows.
        """

    @abstractmethod
    def run_on_first(self, module: nn.Module, action: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Run `action` on the first worker, then give every worker its result and the state of `module`."""

    @abstractmethod
    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far the work before the steps of a phase is, such as 3 of 30 epochs of a label network."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Tell the user something, once."""


class Method(nn.Module, ABC):
    """A trunk and a hash head that train with the losses of a paper."""

    kind: ClassVar[str]
    uses_unlabelled: ClassVar[bool] = False
    """Whether this method learns from rows without any known label (all -1)."""
    needs_labels: ClassVar[bool] = True
    """Whether each row of the train split must have a label. Without this need, the unlabelled split is trained on."""
    trains_trunk: ClassVar[bool] = True
    """Whether this method can train a trunk. If not, the trunk must be frozen, and may have random weights."""
    config: Any

    def __init__(self, config: MethodConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.trunk = trunk
        self.num_classes = num_classes

    @abstractmethod
    def phases(self, epochs: int) -> tuple[Phase, ...]:
        """The phases of a training with `epochs` epochs per phase."""

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        """Prepare a phase before its first image batch; return named numbers for the metrics."""
        return {}

    def bind(self, table: LabelTable) -> None:
        """Recompute buffers that derive from weights and labels. A resume calls this and not `begin_phase`."""
        return

    @abstractmethod
    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """The weighted terms of the loss by name. The sum of their means is the loss.

        Args:
            inputs: input of the trunk: images [n, 3, h, w] or cached features [n, d].
            labels: [n, c] in {0, 1, -1}; -1 is unknown.
            weight: [n]; 0 marks a padding row, which does not count.
        """

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Hash logits float32 [n, num_bits]. Bit j of the code is logit j >= 0."""

    def after_step(self, phase: Phase, means: Mapping[str, float]) -> None:
        """Receive the mean of each term over all workers, after a step. Terms without any row are missing."""
        return

    def class_scores(self, inputs: Tensor) -> Tensor:
        """Scores of the classes, float32 [n, c], higher is better; -inf for a class without training rows.

        Raises:
            InputError: this method has no class scores.
        """
        raise InputError(f"{self.kind} has no class scores, but self-training needs them; choose another method")

    @classmethod
    def scores_classes(cls, config: Any) -> bool:
        """Whether this method learns class scores with these settings."""
        return cls.class_scores is not Method.class_scores

    @classmethod
    def learns_from_labels(cls, config: Any) -> bool:
        """Whether labels teach this method anything, with these settings."""
        return True

    def class_codes(self) -> Codes | None:
        """The codeword of each class, packed uint8 [c, num_bits // 8]; None for a method without codewords."""
        return None

    def trained(self, phase: Phase) -> list[ParameterGroup]:
        """The parameters that this phase trains, by learning-rate group. The group of the trunk is called `trunk`."""
        head = [p for name, p in self.named_parameters() if not name.startswith("trunk.") and p.requires_grad]
        return [ParameterGroup("trunk", self._trunk_parameters()), ParameterGroup("head", head)]

    def _trunk_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.trunk.parameters() if p.requires_grad]

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """The trunk's features [n, d] in evaluation mode, in full precision."""
        was_training = self.trunk.training
        self.trunk.eval()
        try:
            return full_precision(self.trunk(inputs))
        finally:
            self.trunk.train(was_training)

    def forward(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """`loss_terms` under the name that DistributedDataParallel wraps."""
        return self.loss_terms(phase, inputs, labels, weight)

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """Compute logits in evaluation mode, then restore the mode."""
        was_training = self.training
        self.eval()
        try:
            return self.logits(inputs)
        finally:
            self.train(was_training)

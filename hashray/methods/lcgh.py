"""LCGH (reimplementation from the abstract): label-consistent codes from which a decoder can rebuild the features.

Zhuang and Moulin, "Label-Consistent Generalizable Hash Codes", IEEE TIFS 2023. Only the abstract is public, so the
formulas are those of METHODS 3.2, which agree with it. Codes first agree with the labels by a margin: a hinge that is
exactly zero once they do. A decoder then keeps other content of the features in the codes, for classes that training
never sees. Labels come first in every step: the part of the decoder's gradient on a code that opposes the label's
gradient is removed (`priority`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from hashray.codes import Codes
from hashray.errors import ConfigError, InputError
from hashray.methods.backbone import Trunk
from hashray.methods.base import LabelTable, Method, ParameterGroup, Phase, Term, WorkerGroup
from hashray.methods.codewords import CodewordConfig, Codewords
from hashray.methods.losses import (
    Quantization,
    full_precision,
    label_margins,
    label_surprise,
    quantization,
    reconstruction_rows,
    signs,
    weighted_mean,
)

PIXEL_SIDE = 8  # side of the image that a decoder rebuilds if there is no pretrained feature
FLAT = 1e-3  # least spread of a dimension, as a share of the widest one; a dead dimension must not divide by 0
AVERAGE = 0.95  # decay of the running mean of the label loss that `dual` watches


class LCGHConfig(CodewordConfig):
    """Settings of LCGH. Autoencoder-only is label_weight = 0, supervised-only is reconstruction_weight = 0."""

    kind: Literal["lcgh"] = "lcgh"
    margin: float = Field(0.5, gt=0, le=1, description="Margin m of the label loss, as a share of num_bits")
    priority: Literal["project", "sum", "split", "gate", "dual"] = Field(
        "project", description="Rule that puts labels before reconstruction (METHODS 3.2)"
    )
    label_weight: float = Field(1.0, ge=0, description="Weight of the label margin")
    reconstruction_weight: float = Field(1.0, ge=0, description="Weight beta of the decoder's gradient on the codes")
    quantization: Quantization = Field("l1", description="Distance between a code and its signs (METHODS 6.4)")
    quantization_weight: float = Field(0.01, ge=0, description="Weight mu of the quantisation term")
    warmup_share: float = Field(0.0, ge=0, lt=1, description="Share of the epochs in which codes see only labels")
    split_share: float = Field(0.5, gt=0, lt=1, description="With split, share of the bits that see the labels")
    dual_rate: float = Field(0.05, gt=0, description="With dual, step of the multiplier of the label loss")
    dual_slack: float = Field(0.1, gt=0, description="With dual, share by which the label loss may exceed its plateau")
    dual_most: float = Field(
        100.0, gt=1, description="With dual, upper bound of the multiplier; the lower bound is the inverse"
    )
    head: Literal["mlp", "linear"] = Field("mlp", description="Layers between the feature and the code")
    hidden: int = Field(512, gt=0, description="Width of the mlp head")
    decoder_hidden: int = Field(512, gt=0, description="Width of the decoder's hidden layer")
    target: Literal["auto", "feature", "pixels"] = Field(
        "auto", description="Target of the decoder: the pretrained trunk's feature, or the image at 8 pixels; auto: the"
        " feature if the trunk is frozen or has weights"
    )  # fmt: skip
    target_scale: Literal["dimension", "common"] = Field(
        "dimension", description="Unit of the reconstruction error: the spread of each dimension, or one for all"
        " dimensions, so that those with the most spread count most"
    )  # fmt: skip

    @model_validator(mode="after")
    def _learns_something(self) -> LCGHConfig:
        if not self.label_weight and not self.reconstruction_weight:
            raise ValueError("label_weight = 0 and reconstruction_weight = 0 leave nothing to learn; raise one of them")
        return self

    @model_validator(mode="after")
    def _dual_needs_a_plateau(self) -> LCGHConfig:
        if self.priority == "dual" and not self.warmup_share:
            raise ValueError('priority = "dual" measures the label loss at the end of a warm-up: set warmup_share > 0')
        return self


class _Fork(torch.autograd.Function):
    """Forward: give the codes to the label loss and to the decoder. Backward: combine the two gradients.

    The decoder's gradient is scaled by `beta`. With `project`, each row loses its part that opposes the label's.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, beta: float, project: bool) -> tuple[Tensor, Tensor]:
        ctx.beta, ctx.project = beta, project
        return codes.clone(), codes.clone()

    @staticmethod
    def backward(ctx: Any, label: Tensor, decoder: Tensor) -> tuple[Tensor, None, None]:
        if ctx.project:
            # No epsilon: gradients have a factor 1 / rows, so with an epsilon large batches would conflict.
            square = label.square().sum(1, keepdim=True)
            against = (decoder * label).sum(1, keepdim=True).clamp_max(0)
            decoder = decoder - torch.where(square > 0, against / torch.where(square > 0, square, 1), 0) * label
        return label + ctx.beta * decoder, None, None


def straight_through(codes: Tensor) -> Tensor:
    """Binary codes in {-1, +1}, where 0 becomes +1. The gradient passes unchanged."""
    return codes + (signs(codes) - codes).detach()


@final
class LCGH(Method):
    """Trunk -> head -> hash logits, with codewords and a decoder beside them."""

    kind = "lcgh"
    uses_unlabelled = True
    config: LCGHConfig
    target_mean: Tensor
    target_std: Tensor
    dual: Tensor

    def __init__(self, config: LCGHConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__(config, trunk, num_classes)
        width, bits = trunk.feature_dim, config.num_bits
        if config.target == "pixels" and trunk.config.frozen:
            raise InputError(
                'method.target = "pixels" needs images, but a frozen trunk trains on cached features; '
                'set method.target = "feature"'
            )
        if config.target == "feature" and not trunk.is_pretrained:
            raise InputError('method.target = "feature" would rebuild random features; set backbone.weights')
        self.rebuilds_feature = config.target == "feature" or (config.target == "auto" and trunk.is_pretrained)
        self.hash = nn.Linear(width, bits) if config.head == "linear" else _mlp(width, config.hidden, bits)
        self.codewords = Codewords(num_classes, bits, config.codeword_init, trunk)
        rebuilt = width if self.rebuilds_feature else 3 * PIXEL_SIDE**2
        self.decoder = _mlp(bits, config.decoder_hidden, rebuilt)
        self.register_buffer("target_mean", torch.zeros(rebuilt))
        self.register_buffer("target_std", torch.ones(rebuilt))
        self.register_buffer("dual", torch.tensor([1.0, 0.0, 0.0]))  # multiplier, running label loss, its bound
        # phi_0 of METHODS 3.2: the trunk before the first step. A tuple keeps it out of the state dict.
        trained = self.rebuilds_feature and not trunk.config.frozen
        self._pretrained = (copy.deepcopy(trunk).requires_grad_(False).eval(),) if trained else ()

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        share = self.config.warmup_share
        warm = min(epochs - 1, max(1, round(epochs * share))) if share else 0
        if not warm:
            if self.config.priority == "dual":
                raise ConfigError('method.priority = "dual" needs a warm-up and an epoch after it: set epochs >= 2')
            return (Phase("codes", 0, epochs),)
        # Validation on seen classes would always prefer the weights that only labels trained.
        return Phase("labels", 0, warm, selectable=False), Phase("codes", 1, epochs - warm)

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        if phase.round:  # after the warm-up
            if self.config.priority != "dual":
                return {}
            self.dual[2] = (1 + self.config.dual_slack) * self.dual[1]
            return {"label_plateau": float(self.dual[1])}
        self.codewords.begin(table, seed, workers, self.features)
        self.dual.copy_(torch.tensor([1.0, 0.0, 0.0]))  # forget the warm-up of a model that --init loaded

        def moments(inputs: Tensor) -> Tensor:
            target = self._raw_target(inputs)
            return torch.cat([target, target.square(), torch.ones_like(target[:, :1])], dim=1)

        sums = workers.sum_by_group(moments, lambda labels: torch.zeros(len(labels), dtype=torch.int64), 1)[0]
        mean, square = sums[:-1].div(sums[-1]).chunk(2)
        variance = (square - mean.square()).clamp_min(0)
        if self.config.target_scale == "common":
            variance = variance.mean().expand_as(variance)
        std = variance.sqrt()
        self.target_mean.copy_(mean)
        self.target_std.copy_(std.clamp_min(max(FLAT * float(std.max()), 1e-12)))
        return {}

    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """Equation: METHODS 3.2. The decoder learns from its full loss; `beta` scales only the gradient on the codes.

        Differs: `dual` keeps beta where METHODS has 1, so that its multiplier starts at the balance of the other rules.
        """
        config = self.config
        warm = phase.name == "labels"
        beta = 0.0 if warm else config.reconstruction_weight
        code = torch.tanh(self.logits(inputs))
        first = config.priority == "project" and config.label_weight > 0
        for_labels, for_decoder = _Fork.apply(code, beta, first)
        if config.priority == "split":  # no conflict: the decoder reads the label bits and moves only the others
            bits = self._label_bits
            for_decoder = torch.cat([for_decoder[:, :bits].detach(), for_decoder[:, bits:]], dim=1)
        known = self.codewords.known(labels, weight)
        per_row, consistent = self._label_losses(for_labels, known)
        labelled = (known == 1).any(1).to(weight.dtype)
        mean_loss = weighted_mean(per_row, labelled)
        multiplier = float(self.dual[0]) if config.priority == "dual" else 1.0
        # Quantisation shares the labels' priority only in rows with labels, as in the pseudo-code of METHODS 3.2.
        regular = torch.where(labelled[:, None] > 0, for_labels, code)
        gap = weighted_mean(quantization(regular, config.quantization), weight)
        rebuilt = self.decoder(straight_through(for_decoder))
        error = reconstruction_rows(rebuilt, self._target(inputs), 1.0)
        kept = weight * consistent if config.priority == "gate" and not warm else weight
        return {
            "label": Term.of_mean(config.label_weight * multiplier * mean_loss, labelled),
            "quantization": Term.of_mean(config.quantization_weight * gap, weight),
            "reconstruction": Term((error * kept).sum(), weight.sum().to(error.dtype)),
            "label_loss": Term.of_mean(mean_loss.detach(), labelled, in_loss=False),
            "consistency": Term.of_mean(weighted_mean(consistent, labelled), labelled, in_loss=False),
        }

    def after_step(self, phase: Phase, means: Mapping[str, float]) -> None:
        if self.config.priority != "dual" or "label_loss" not in means:  # a step without labelled rows
            return
        multiplier, average, bound = self.dual.tolist()
        average = means["label_loss"] if average == 0 else AVERAGE * average + (1 - AVERAGE) * means["label_loss"]
        if phase.name == "codes":
            most = self.config.dual_most
            multiplier = min(most, max(1 / most, multiplier + self.config.dual_rate * (average - bound)))
        self.dual.copy_(torch.tensor([multiplier, average, bound]))

    def logits(self, inputs: Tensor) -> Tensor:
        return full_precision(self.hash(self.trunk(inputs)))

    @classmethod
    def scores_classes(cls, config: LCGHConfig) -> bool:
        """True if labels are in the loss, because only labels train the codewords."""
        return config.label_weight > 0

    @classmethod
    def learns_from_labels(cls, config: LCGHConfig) -> bool:
        return config.label_weight > 0

    def class_scores(self, inputs: Tensor) -> Tensor:
        """Inner products of the codewords with the bits that see the labels.

        Raises:
            InputError: label_weight is 0, so no codeword is trained.
        """
        if not self.config.label_weight:
            raise InputError(
                "method.label_weight = 0 trains no codewords, so there are no class scores; train with labels"
            )
        code = torch.tanh(self.logits(inputs))
        return self.codewords.scores(F.pad(code[:, : self._label_bits], (0, code.shape[1] - self._label_bits)))

    def class_codes(self) -> Codes | None:
        """The bits of the codewords; None if some are not trained, as with `split` or without labels."""
        return self.codewords.bits() if self.config.label_weight and self.config.priority != "split" else None

    def trained(self, phase: Phase) -> list[ParameterGroup]:
        return [
            ParameterGroup("trunk", self._trunk_parameters()),
            ParameterGroup("head", [*self.hash.parameters(), *self.decoder.parameters()]),
            self.codewords.group(self.config.codeword_lr_factor),
        ]

    @property
    def _label_bits(self) -> int:
        bits = self.config.num_bits
        if self.config.priority != "split":
            return bits
        return min(bits - 1, max(1, round(bits * self.config.split_share)))  # at least one bit for the decoder

    def _label_losses(self, codes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The label loss [n] of the relaxed codes, and kappa_i [n]: 1 if Delta_i of the bits is positive, else 0."""
        config, bits = self.config, self._label_bits
        codes, words = codes[:, :bits], self.codewords()[:, :bits]
        if config.label_loss == "softmax":
            losses = label_surprise(codes, words, known, config.temperature)
        else:
            losses = torch.relu(config.margin - label_margins(codes, words, known))
        with torch.no_grad():
            of_bits = label_margins(straight_through(codes), straight_through(words), known)
        return losses, (of_bits > 0).to(codes.dtype)

    def _target(self, inputs: Tensor) -> Tensor:
        """The target r of METHODS 3.2, standardised per dimension, [n, D]."""
        return (self._raw_target(inputs) - self.target_mean) / self.target_std

    @torch.no_grad()
    def _raw_target(self, inputs: Tensor) -> Tensor:
        if not self.rebuilds_feature:
            small = F.adaptive_avg_pool2d(inputs.to(self.target_mean.dtype) / 255, PIXEL_SIDE)
            return small.flatten(1)
        trunk = self._pretrained[0].to(inputs.device) if self._pretrained else self.trunk
        trunk.amp = self.trunk.amp
        return full_precision(trunk(inputs))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

"""AdaLabelHash trains hash codes and class codewords together (Yang, Tu, Chen, CVPR Workshops 2019).

Each class has a codeword v_j = tanh(z_j) that is trained with the network. The inner product of an image's relaxed code
u with the codewords of its classes must exceed the product with any other codeword by a margin.
"""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from hashray.codes import Codes
from hashray.methods.backbone import Trunk
from hashray.methods.base import LabelTable, Method, ParameterGroup, Phase, Term, WorkerGroup
from hashray.methods.codewords import CodewordConfig, Codewords
from hashray.methods.losses import (
    Quantization,
    adaptive_margin,
    full_precision,
    label_surprise,
    quantization,
    weighted_mean,
)

AS_WRITTEN = {
    "label_loss": "hinge", "margin_ratio": None, "codeword_lr_factor": 1.0, "codeword_init": "uniform",
    "quantization": "none",
}  # fmt: skip
# Paper and released Keras code (METHODS 2.4 [C]) have the same loss. They differ in optim.*: the paper uses SGD with
# Nesterov momentum and searched rates, the code uses Adam at 1e-5.
PRESETS: dict[str, dict[str, Any]] = {"hashray": {}, "paper": AS_WRITTEN, "released": AS_WRITTEN}


class AdaLabelHashConfig(CodewordConfig):
    """Settings of AdaLabelHash. Its presets do not cover optim.*, which a config sets beside them."""

    presets = PRESETS
    kind: Literal["adalabelhash"] = "adalabelhash"
    preset: Literal["hashray", "paper", "released"] = Field("hashray", description="Values for every unset field")
    margin_ratio: float | None = Field(
        0.5,
        gt=0,
        le=1,
        description="Margin of the hinge as a share of num_bits; None: 1 / num_bits, which is the paper's margin of 1",
    )
    negative_floor: Literal["zero", "strict"] = Field(
        "zero",
        description="zero: a masked class counts as inner product 0, as in Eq. 1 and the released code; "
        "strict: it does not count",
    )
    quantization: Quantization = Field("l1", description="Term that pulls |u| to 1; none in the paper")
    quantization_weight: float = Field(0.01, ge=0, description="Weight of the quantisation term")

    @property
    def margin(self) -> float:
        """The margin m of Eq. 1."""
        return 1.0 if self.margin_ratio is None else self.margin_ratio * self.num_bits


@final
class AdaLabelHash(Method):
    """Trunk -> linear layer -> hash logits, with codewords beside it. Training has one phase."""

    kind = "adalabelhash"
    config: AdaLabelHashConfig

    def __init__(self, config: AdaLabelHashConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__(config, trunk, num_classes)
        self.hash = nn.Linear(trunk.feature_dim, config.num_bits)
        nn.init.xavier_uniform_(self.hash.weight)  # Table 2
        nn.init.zeros_(self.hash.bias)
        self.codewords = Codewords(num_classes, config.num_bits, config.codeword_init, trunk)

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return (Phase("image", 0, epochs),)

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        self.codewords.begin(table, seed, workers, self.features)
        return {}

    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        """Equation: AdaLabelHash Eq. 1, divided by the positive entries of the batch as released, or METHODS 6.11."""
        code = torch.tanh(self.logits(inputs))
        known = self.codewords.known(labels, weight)
        gap = weighted_mean(quantization(code, self.config.quantization), weight)
        return self._label_term(code, known) | {
            "quantization": Term.of_mean(self.config.quantization_weight * gap, weight)
        }

    def _label_term(self, code: Tensor, known: Tensor) -> dict[str, Term]:
        config, words = self.config, self.codewords()
        if config.label_loss == "softmax":
            labelled = (known == 1).any(1)
            return {"softmax": Term(label_surprise(code, words, known, config.temperature).sum(), labelled.sum())}
        margin = adaptive_margin(code, words, known, config.margin, config.negative_floor)
        return {"margin": Term.of_mean(margin, known == 1)}

    def logits(self, inputs: Tensor) -> Tensor:
        return full_precision(self.hash(self.trunk(inputs)))

    def class_scores(self, inputs: Tensor) -> Tensor:
        """s_i = U_i V^T of section 4."""
        return self.codewords.scores(torch.tanh(self.logits(inputs)))

    def class_codes(self) -> Codes:
        return self.codewords.bits()

    def trained(self, phase: Phase) -> list[ParameterGroup]:
        return [
            ParameterGroup("trunk", self._trunk_parameters()),
            ParameterGroup("head", list(self.hash.parameters())),
            self.codewords.group(self.config.codeword_lr_factor),
        ]

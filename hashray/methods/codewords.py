"""Class codewords that are learned: what AdaLabelHash trains codes towards and LCGH keeps them consistent with."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from hashray.codes import Codes, binarize
from hashray.methods.base import LabelTable, ParameterGroup
from hashray.methods.losses import full_precision, outside_autocast


@outside_autocast
def _inner_products(codes: Tensor, codewords: Tensor) -> Tensor:
    return full_precision(codes) @ codewords.T


@final
class Codewords(nn.Module):
    """Free variables z [c, K]; the relaxed codewords are v = tanh(z), their bits z >= 0.

    Attributes:
        z: float32 [c, K], uniform in (-0.05, 0.05) at first as in AdaLabelHash's code (METHODS 2.1).
        present: bool [c], classes that some training row has. The others are no one's negative either: a class
            that was never seen must not push codes about.
    """

    present: Tensor

    def __init__(self, num_classes: int, num_bits: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.empty(num_classes, num_bits).uniform_(-0.05, 0.05))
        self.register_buffer("present", torch.ones(num_classes, dtype=torch.bool))

    def forward(self) -> Tensor:
        """Relaxed codewords [c, K] in (-1, 1), float32."""
        return torch.tanh(full_precision(self.z))

    def learn_classes(self, table: LabelTable) -> None:
        """Keep which classes occur."""
        self.present.copy_(table.rows.any(0))

    def known(self, labels: Tensor, weight: Tensor) -> Tensor:
        """Labels [n, c], -1 (unknown) in padding rows and for classes that never occur."""
        return labels.to(torch.int8).masked_fill(~self.present | (weight == 0)[:, None], -1)

    def scores(self, codes: Tensor) -> Tensor:
        """Inner products [n, c] of relaxed codes with the codewords; -inf for classes that never occur."""
        return _inner_products(codes, self()).masked_fill(~self.present, -torch.inf)

    def bits(self) -> Codes:
        """Packed codewords uint8 [c, K // 8]."""
        return binarize(np.asarray(self.z.detach().float().cpu()))

    def group(self, lr_factor: float) -> ParameterGroup:
        """The codewords' own learning-rate group, without weight decay (METHODS 2.4)."""
        return ParameterGroup("codewords", [self.z], lr_factor, decay=False)

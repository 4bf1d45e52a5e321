"""Learned class codewords. AdaLabelHash trains codes towards them, and LCGH keeps codes consistent with them."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hashray.codes import Codes, binarize, check_num_bits, hamming, unpack
from hashray.errors import ConfigError
from hashray.methods.base import LabelTable, ParameterGroup
from hashray.methods.losses import full_precision, outside_autocast

CodewordInit = Literal["spread", "uniform"]
SPREAD = 0.5  # |z| of `spread` codewords at first
_COMPARED = 1024  # most classes for which the matrix of all distances is computed


@outside_autocast
def _inner_products(codes: Tensor, codewords: Tensor) -> Tensor:
    return full_precision(codes) @ codewords.T


@final
class Codewords(nn.Module):
    """Free variables z [c, K]. The relaxed codewords are v = tanh(z), and their bits are z >= 0.

    Attributes:
        z: float32 [c, K]. First values: `uniform` in (-0.05, 0.05) as in AdaLabelHash's code (METHODS 2.1), or
            `spread`, 0.5 times codes far apart (METHODS 6.5). Measured on 60 classes of CIFAR-100: from `uniform`, the
            margin to the hardest negative merged all codes into one, after 30 epochs and after 100.
        present: bool [c], classes with training rows. Other classes are not negatives either, because an unseen class
            must not push codes away.
    """

    present: Tensor

    def __init__(self, num_classes: int, num_bits: int, init: CodewordInit) -> None:
        super().__init__()
        if init == "spread":
            far = spread_codewords(num_classes, num_bits, int(torch.randint(1 << 31, ())))
            self.z = nn.Parameter(SPREAD * torch.as_tensor(far, dtype=torch.float32))
        else:
            self.z = nn.Parameter(torch.empty(num_classes, num_bits).uniform_(-0.05, 0.05))
        self.register_buffer("present", torch.ones(num_classes, dtype=torch.bool))

    def forward(self) -> Tensor:
        """Relaxed codewords [c, K] in (-1, 1), float32."""
        return torch.tanh(full_precision(self.z))

    def learn_classes(self, table: LabelTable) -> None:
        """Store which classes occur."""
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
        """The learning-rate group of the codewords, without weight decay (METHODS 2.4)."""
        return ParameterGroup("codewords", [self.z], lr_factor, decay=False)


def spread_codewords(num_classes: int, num_bits: int, seed: int = 0) -> NDArray[np.int8]:
    """Return distinct codewords int8 [num_classes, num_bits] in {-1, +1}, far apart.

    If `num_bits` is a power of two and at least half of `num_classes`, they are rows of a Hadamard matrix and their
    complements, at least num_bits / 2 apart. Else they are random, the best of 32 draws (of one draw above 1,024
    classes).

    Raises:
        ConfigError: `num_bits` is not a multiple of 8, or there are more classes than codes of `num_bits` bits.

    >>> spread_codewords(3, 8) @ spread_codewords(3, 8).T
    array([[8, 0, 0],
           [0, 8, 0],
           [0, 0, 8]], dtype=int8)
    """
    if num_classes > 2 ** check_num_bits(num_bits):
        raise ConfigError(f"{num_bits} bits cannot tell {num_classes} classes apart; use more bits")
    rng = np.random.default_rng(seed)
    if num_bits & (num_bits - 1) == 0 and num_classes <= 2 * num_bits:
        from scipy.linalg import hadamard  # not at the top: it adds 0.1 s to the start of every worker

        rows = hadamard(num_bits, dtype=np.int8)[rng.permutation(num_bits)]
        return np.concatenate([rows, -rows])[:num_classes]
    best, widest = np.empty((0, num_bits), dtype=np.int8), -1
    for _ in range(32):
        packed = _distinct_codes(rng, num_classes, num_bits)
        if num_classes > _COMPARED:
            return unpack(packed)
        nearest = int((hamming(packed, packed) + np.eye(num_classes, dtype=np.int32) * num_bits).min())
        if nearest > widest:
            best, widest = unpack(packed), nearest
    return best


def _distinct_codes(rng: np.random.Generator, num: int, num_bits: int) -> Codes:
    """Draw `num` distinct codes uint8 [num, num_bits // 8]."""
    if num_bits <= 16:  # draw without replacement; with so few codes, redrawing duplicates might not end
        drawn = rng.choice(1 << num_bits, size=num, replace=False).astype(">u2")
        return drawn.view(np.uint8).reshape(num, 2)[:, 2 - num_bits // 8 :]
    codes = rng.integers(0, 256, size=(num, num_bits // 8), dtype=np.uint8)
    while len(first := np.unique(codes, axis=0, return_index=True)[1]) < num:
        again = np.setdiff1d(np.arange(num), first)
        codes[again] = rng.integers(0, 256, size=(len(again), num_bits // 8), dtype=np.uint8)
    return codes

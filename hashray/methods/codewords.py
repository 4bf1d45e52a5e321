"""Class codewords that are learned: what AdaLabelHash trains codes towards and LCGH keeps them consistent with."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import hadamard
from torch import Tensor, nn

from hashray.codes import Codes, binarize, check_num_bits, hamming, unpack
from hashray.errors import ConfigError
from hashray.methods.base import LabelTable, ParameterGroup
from hashray.methods.losses import full_precision, outside_autocast

CodewordInit = Literal["spread", "uniform"]
SPREAD = 0.5  # |z| of codewords that begin far apart
_COMPARED = 1024  # classes whose pairwise distances are worth a matrix


@outside_autocast
def _inner_products(codes: Tensor, codewords: Tensor) -> Tensor:
    return full_precision(codes) @ codewords.T


@final
class Codewords(nn.Module):
    """Free variables z [c, K]; the relaxed codewords are v = tanh(z), their bits z >= 0.

    Attributes:
        z: float32 [c, K]. At first `uniform` in (-0.05, 0.05) as in AdaLabelHash's code (METHODS 2.1), or `spread`: 0.5
            times codes far apart (METHODS 6.5). Measured on 60 classes of CIFAR-100: from `uniform` the margin to
            the hardest negative alone pulled all codes into one, within 30 epochs or 100.
        present: bool [c], classes that some training row has. The others are no one's negative either: a class
            that was never seen must not push codes about.
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


def spread_codewords(num_classes: int, num_bits: int, seed: int = 0) -> NDArray[np.int8]:
    """Return distinct codewords int8 [num_classes, num_bits] in {-1, +1}, far apart.

    Rows of a Hadamard matrix and their complements (at least num_bits / 2 apart) where `num_bits` is a power of two
    and twice as many suffice, else random ones, the farthest apart of 32 draws (beyond 1,024 classes: of one).

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
    """Draw `num` different codes uint8 [num, num_bits // 8]."""
    if num_bits <= 16:  # few enough to draw without replacement; redrawing the equal ones would not end
        drawn = rng.choice(1 << num_bits, size=num, replace=False).astype(">u2")
        return drawn.view(np.uint8).reshape(num, 2)[:, 2 - num_bits // 8 :]
    codes = rng.integers(0, 256, size=(num, num_bits // 8), dtype=np.uint8)
    while len(first := np.unique(codes, axis=0, return_index=True)[1]) < num:
        again = np.setdiff1d(np.arange(num), first)
        codes[again] = rng.integers(0, 256, size=(len(again), num_bits // 8), dtype=np.uint8)
    return codes

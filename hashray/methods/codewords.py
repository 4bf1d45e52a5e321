"""Learned class codewords. AdaLabelHash trains codes towards them, and LCGH keeps codes consistent with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from hashray.codes import Codes, binarize, check_num_bits, hamming, unpack
from hashray.errors import ConfigError
from hashray.methods.backbone import Trunk
from hashray.methods.base import LabelTable, MethodConfig, ParameterGroup, WorkerGroup
from hashray.methods.linear import Floats, Moments, principal_directions, rotate_to_signs
from hashray.methods.losses import full_precision, outside_autocast

Features = Callable[[Tensor], Tensor]
CodewordInit = Literal["semantic", "spread", "uniform"]
SPREAD = 0.5  # |z| of `spread` and `semantic` codewords at first
_COMPARED = 1024  # most classes for which the matrix of all distances is computed
_PLACED = 10_000  # most classes that semantic codewords compare with each other, one after the other


class CodewordConfig(MethodConfig):
    """Base of the configs of methods with learned codewords."""

    label_loss: Literal["softmax", "hinge"] = Field(
        "softmax",
        description="Loss of the labels: softmax over the codewords, or a margin to the hardest negative class",
    )
    temperature: float = Field(
        0.2, gt=0, description="Temperature of the softmax, whose inner products are divided by num_bits"
    )
    codeword_init: CodewordInit = Field(
        "semantic",
        description="First codewords: semantic, by the mean feature of each class of a pretrained trunk; spread far"
        " apart; or uniform near 0",
    )
    codeword_lr_factor: float = Field(
        10.0, gt=0, description="Learning rate of the codewords divided by that of the head"
    )


@outside_autocast
def _inner_products(codes: Tensor, codewords: Tensor) -> Tensor:
    return full_precision(codes) @ codewords.T


@final
class Codewords(nn.Module):
    """Free variables z [c, K]. The relaxed codewords are v = tanh(z), and their bits are z >= 0.

    Attributes:
        z: float32 [c, K]. First values: `uniform` in (-0.05, 0.05) as in AdaLabelHash's code (METHODS 2.1), or
            `spread`, 0.5 times codes far apart (METHODS 6.5). Measured on 60 classes of CIFAR-100: from `uniform`, the
            margin to the hardest negative merged all codes into one, after 30 epochs and after 100. `semantic`: 0 until
            `begin` has seen the features, then 0.5 times codes near which the classes lie (METHODS 6.5).
        present: bool [c], classes with training rows. Other classes are not negatives either, because an unseen class
            must not push codes away.
    """

    present: Tensor

    def __init__(self, num_classes: int, num_bits: int, init: CodewordInit, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.untrained_trunk = init == "semantic" and not (trunk is not None and trunk.is_pretrained)
        if init == "semantic" and not self.untrained_trunk:
            self.z = nn.Parameter(torch.zeros(num_classes, num_bits))
        elif init != "uniform":
            far = spread_codewords(num_classes, num_bits, int(torch.randint(1 << 31, ())))
            self.z = nn.Parameter(SPREAD * torch.as_tensor(far, dtype=torch.float32))
        else:
            self.z = nn.Parameter(torch.empty(num_classes, num_bits).uniform_(-0.05, 0.05))
        self.register_buffer("present", torch.ones(num_classes, dtype=torch.bool))

    def forward(self) -> Tensor:
        """Relaxed codewords [c, K] in (-1, 1), float32."""
        return torch.tanh(full_precision(self.z))

    def begin(self, table: LabelTable, seed: int, workers: WorkerGroup, features: Features) -> None:
        """Store which classes occur; give `semantic` codewords their first values, by a scan of all training rows.

        Codewords that have values already, such as those of a trained model, keep them. `features(inputs)` [n, d] are
        those of the pretrained trunk.
        """
        self.learn_classes(table)
        if self.untrained_trunk:
            workers.say("codewords begin spread: semantic ones need a pretrained trunk (backbone.weights)")
        if bool((self.z == 0).all()):
            self._place(self.present.cpu().numpy(), seed, workers, features)

    def _place(self, present: NDArray[np.bool_], seed: int, workers: WorkerGroup, features: Features) -> None:
        def factors(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            values = features(inputs)
            rows = torch.cat([values, torch.ones_like(values[:, :1])], dim=1)
            return torch.cat([(labels == 1).to(rows.dtype), rows], dim=1), rows

        num_classes, num_bits = self.z.shape
        sums = workers.sum_products(factors).numpy()
        of_classes, moments = sums[:num_classes][present], Moments.of_products(sums[num_classes:])
        means = of_classes[:, :-1] / of_classes[:, -1:]
        words = spread_codewords(num_classes, num_bits, seed)
        near = semantic_codewords(means - moments.mean, moments.covariance, num_bits, seed)
        if near is None:
            workers.say(
                f"{len(means):,} classes are too many for semantic codewords of {num_bits} bits: they begin spread"
            )
        else:
            words[present] = near
        self.z.data.copy_(SPREAD * torch.as_tensor(words))

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


def semantic_codewords(means: Floats, covariance: Floats, num_bits: int, seed: int = 0) -> NDArray[np.int8] | None:
    """Return distinct codewords int8 [c, num_bits] in {-1, +1}, similar where the mean features of classes are.

    Args:
        means: [c, d], the mean feature of each class minus that of all rows.
        covariance: [d, d] of the features of all rows.

    Equation: METHODS 6.5: the class means in the first principal components of the features, rotated by ITQ towards
    their own signs. A class whose signs another one has already flips its bits nearest to 0 until they are its alone.

    Returns: None where that finds no room, or for more than 10,000 classes.
    """
    if len(means) > _PLACED:
        return None
    projections = means @ principal_directions(covariance, num_bits)
    projections = projections @ rotate_to_signs(projections, seed)
    words = np.where(projections >= 0, 1, -1).astype(np.int8)
    for i in range(1, len(words)):
        order = iter(np.argsort(np.abs(projections[i]), kind="stable"))
        while (words[:i] == words[i]).all(1).any():
            if (bit := next(order, None)) is None:
                return None
            words[i, bit] *= -1
    return words


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

"""Linear codes in closed form, from sums over rows that any number of workers can add up: PCA and ITQ's rotation.

The sums are exact, so that no order of additions changes a digit: features are rounded to whole multiples of a power of
two, which is so large that no sum of products needs more than the 53 bits of a float64. N workers therefore give the
same bytes as one. Of 50,000 rows a feature keeps 18 bits below the largest one, of 10^7 rows 14 bits.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from hashray.errors import InputError
from hashray.methods.backbone import Trunk
from hashray.methods.base import LabelTable, Method, MethodConfig, Phase, Term, WorkerGroup
from hashray.methods.losses import full_precision

Floats = NDArray[np.float64]

EXACT_BITS = 53  # of a float64
LOWEST, HIGHEST = -127, 129  # exponents of float32, and one above for what is not finite
ROTATION_ROWS = 1 << 16  # that a rotation is fitted on; CIFAR's 50,000 are all taken
ITQ_ITERATIONS = 50  # Gong and Lazebnik, section 3.2
FLAT = 1e-6  # a principal direction this much narrower than the widest is rounding noise: its signs mean nothing


@final
class Moments(NamedTuple):
    """Number of rows, mean float64 [d] and covariance float64 [d, d] of features."""

    rows: int
    mean: Floats
    covariance: Floats

    @staticmethod
    def of_products(sums: Floats) -> Moments:
        """From the sum [d + 1, d + 1] of x_i^T x_i over rows [x_i, 1] that are not all missing."""
        count = sums[-1, -1]
        mean = sums[-1, :-1] / count
        return Moments(round(count), mean, sums[:-1, :-1] / count - np.outer(mean, mean))


def principal_directions(covariance: Floats, num_bits: int, least: float = 0.0) -> Floats:
    """The first `num_bits` principal directions float64 [d, num_bits] of a covariance [d, d], the widest first.

    Zero where the standard deviation of the features is not above `least`, and beyond d. The largest entry of a
    direction is positive, so that its sign does not depend on the solver.
    """
    variance, vectors = np.linalg.eigh(covariance)
    spread = np.sqrt(np.clip(variance[::-1], 0, None))[:num_bits]
    vectors = vectors[:, ::-1][:, :num_bits] * (spread > max(least, FLAT * spread.max(initial=0.0)))
    largest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    directions = np.zeros((len(covariance), num_bits))
    directions[:, : vectors.shape[1]] = vectors * np.where(largest < 0, -1.0, 1.0)
    return directions


def no_direction(rows: int) -> InputError:
    """The error of training rows that differ in nothing."""
    return InputError(f"the {rows:,} training rows all have the same features, so no bit can tell them apart")


def random_rotation(num_bits: int, seed: int) -> Floats:
    """A random orthogonal matrix float64 [num_bits, num_bits]."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((num_bits, num_bits)))
    return rotation


def itq_rotation(products: Callable[[Floats], Floats], num_bits: int, seed: int) -> Floats:
    """The rotation float64 [num_bits, num_bits] that brings projections V [n, num_bits] nearest to their signs.

    Args:
        products: the sum [num_bits, num_bits] of B^T V over all rows for a rotation R, where B = sign(V R).

    Equation: min over B in {-1, +1}, R orthogonal of ||B - V R||^2; alternately B = sign(V R) and, with the SVD
    B^T V = S O S'^T, R = S' S^T (Gong and Lazebnik, CVPR 2011, Eq. 2), 50 times from a random rotation. R may reflect:
    that complements a bit everywhere and changes no distance.
    Differs: with more bits than principal directions V is padded with zero columns before the random first rotation,
    so that every bit is a mixture of all directions; the paper has num_bits <= d.
    """
    rotation = random_rotation(num_bits, seed)
    for _ in range(ITQ_ITERATIONS):
        left, _, right = np.linalg.svd(products(rotation))
        rotation = right.T @ left.T
    return rotation


def rotate_to_signs(projections: Floats, seed: int) -> Floats:
    """`itq_rotation` of projections float64 [n, num_bits] that are all in memory."""
    return itq_rotation(
        lambda rotation: np.where(projections @ rotation >= 0, 1.0, -1.0).T @ projections, projections.shape[1], seed
    )


class LinearCodes(Method):
    """Frozen trunk -> linear projections, whose signs are the bits. Fitted without labels and without steps.

    The projections are the principal directions of the training rows' features, rotated. They are scaled to a root mean
    square of 1, which changes no bit.
    """

    uses_unlabelled = True
    needs_labels = False
    trains_trunk = False
    mean: Tensor
    directions: Tensor

    def __init__(self, config: MethodConfig, trunk: Trunk, num_classes: int) -> None:
        super().__init__(config, trunk, num_classes)
        self.register_buffer("mean", torch.zeros(trunk.feature_dim))
        self.register_buffer("directions", torch.zeros(trunk.feature_dim, config.num_bits))

    @abstractmethod
    def rotation(self, projections: Floats, seed: int) -> Floats:
        """The rotation float64 [num_bits, num_bits] for projections [n, num_bits] of about ROTATION_ROWS rows."""

    @classmethod
    def learns_from_labels(cls, config: MethodConfig) -> bool:
        return False

    def phases(self, epochs: int) -> tuple[Phase, ...]:
        return (Phase("fit", 0, 1, steps=False),)

    def begin_phase(self, phase: Phase, table: LabelTable, seed: int, workers: WorkerGroup) -> dict[str, float]:
        """Fit on the first worker what the sums of all workers give.

        Returns:
            `directions`, the number of principal directions that the features have, at most num_bits; `variance_kept`,
            the share of the variance along them; `quantization_error`, the mean square between the projections and
            their signs.

        Raises:
            InputError: a feature is not finite, or all rows have the same features.
        """
        rows, exponent = self._range(workers)
        bits = (EXACT_BITS - math.ceil(math.log2(rows))) // 2
        moments = self._moments(workers, bits - exponent)
        notes = workers.run_on_first(self, lambda: self._project(moments, 2.0 ** (exponent - bits)))
        width = math.ceil(math.log2(self.trunk.feature_dim))
        fine = (EXACT_BITS - 1 - width) // 2  # bits of a centred feature and of a direction

        def project(inputs: Tensor) -> Tensor:
            """Projections float64 [n, num_bits] that do not depend on which rows stand beside a row."""
            shift = fine - exponent
            centred = _on_grid(self.trunk(inputs), shift) - _on_grid(self.mean, shift)
            return centred @ _on_grid(self.directions, fine) * 2.0 ** -(shift + fine)

        projections = workers.gather_rows(project, ROTATION_ROWS)[0].numpy()
        return notes | workers.run_on_first(self, lambda: self._rotate(projections, seed))

    def loss_terms(self, phase: Phase, inputs: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Term]:
        raise NotImplementedError(f"{self.kind} is fitted in closed form, its phase has no steps")

    def logits(self, inputs: Tensor) -> Tensor:
        return full_precision((self.trunk(inputs) - self.mean) @ self.directions)

    def _range(self, workers: WorkerGroup) -> tuple[int, int]:
        """The number of rows, and the exponent e where every feature is smaller than 2^e."""

        def exponents(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            largest = self.trunk(inputs).abs().amax(1)
            exponent = torch.frexp(largest).exponent.clamp(LOWEST, HIGHEST - 1)
            place = torch.where(largest.isfinite(), exponent, HIGHEST) - LOWEST
            return torch.ones(len(inputs), 1, device=place.device), F.one_hot(place.long(), HIGHEST - LOWEST + 1)

        counts = workers.sum_products(exponents)[0]
        if counts[-1]:
            raise InputError(
                f"{counts[-1]:,.0f} of {counts.sum():,.0f} training rows have features that are not finite numbers; "
                "the weights of the trunk are broken"
            )
        return round(counts.sum().item()), int(counts.nonzero().max()) + LOWEST

    def _moments(self, workers: WorkerGroup, shift: int) -> Moments:
        """Of all rows, their features rounded to multiples of 2^-shift."""

        def factors(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            rows = F.pad(_on_grid(self.trunk(inputs), shift), (0, 1), value=1.0)
            return rows, rows

        moments = Moments.of_products(workers.sum_products(factors).numpy())
        return Moments(moments.rows, np.ldexp(moments.mean, -shift), np.ldexp(moments.covariance, -2 * shift))

    def _project(self, moments: Moments, least: float) -> dict[str, float]:
        with threadpool_limits(1):  # the last digits of LAPACK's vectors depend on the number of threads
            directions = principal_directions(moments.covariance, self.config.num_bits, least)
        count = int(directions.any(0).sum())
        if not count:
            raise no_direction(moments.rows)
        self.mean.copy_(torch.as_tensor(moments.mean))
        self.directions.copy_(torch.as_tensor(directions))
        kept = np.einsum("ij,ik,kj->", directions, moments.covariance, directions, optimize=True)
        return {"directions": count, "variance_kept": float(kept / np.trace(moments.covariance))}

    def _rotate(self, projections: Floats, seed: int) -> dict[str, float]:
        with threadpool_limits(1):
            rotation = self.rotation(projections, seed)
            turned = projections @ rotation
        size = math.sqrt(np.square(turned).mean())
        self.directions.copy_(torch.as_tensor(self.directions.double().cpu().numpy() @ rotation / size))
        return {"quantization_error": float(np.square(np.abs(turned / size) - 1).mean())}


def _on_grid(values: Tensor, shift: int) -> Tensor:
    """The values in multiples of 2^-shift, rounded to whole numbers, float64."""
    return (values.double() * 2.0**shift).round()

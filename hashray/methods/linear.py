"""Linear codes in closed form, from sums over rows that any number of workers can add up: PCA and ITQ's rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

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


def principal_directions(covariance: Floats, num_bits: int) -> Floats:
    """The first `num_bits` principal directions float64 [d, num_bits] of a covariance [d, d], the widest first.

    Zero where the features do not vary, and beyond d. The largest entry of a direction is positive, so that its sign
    does not depend on the solver.
    """
    variance, vectors = np.linalg.eigh(covariance)
    spread = np.sqrt(np.clip(variance[::-1], 0, None))[:num_bits]
    vectors = vectors[:, ::-1][:, :num_bits] * (spread > FLAT * spread.max(initial=0.0))
    largest = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    directions = np.zeros((len(covariance), num_bits))
    directions[:, : vectors.shape[1]] = vectors * np.where(largest < 0, -1.0, 1.0)
    return directions


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

"""PCA and ITQ from sums, against scikit-learn's PCA and against ITQ on all rows at once."""

from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA

from hashray.evaluate.baselines import ITQ
from hashray.methods.linear import Moments, itq_rotation, principal_directions, random_rotation

ROWS, WIDTH, BITS = 500, 12, 8
FEATURES = (
    np.random.default_rng(0).standard_normal((ROWS, WIDTH)) @ np.random.default_rng(1).random((WIDTH, WIDTH))
) + 3


def moments() -> Moments:
    """Of FEATURES, added up in three pieces."""
    with_one = np.concatenate([FEATURES, np.ones((ROWS, 1))], axis=1)
    return Moments.of_products(sum(piece.T @ piece for piece in np.array_split(with_one, 3)))  # type: ignore[arg-type]


def test_principal_directions_of_sums_are_those_of_the_rows() -> None:
    expected = PCA(BITS).fit(FEATURES)
    got = moments()
    assert got.rows == ROWS
    np.testing.assert_allclose(got.mean, expected.mean_)
    directions = principal_directions(got.covariance, BITS)
    np.testing.assert_allclose(np.abs((directions * expected.components_.T).sum(0)), 1, atol=1e-9)
    assert (directions[np.abs(directions).argmax(0), np.arange(BITS)] > 0).all()


def test_directions_without_variance_and_beyond_the_width_are_zero() -> None:
    directions = principal_directions(np.diag([4.0, 0.0, 9.0]), BITS)
    np.testing.assert_array_equal(directions, np.pad([[0, 1], [0, 0], [1, 0]], ((0, 0), (0, BITS - 2))))


def test_a_rotation_from_sums_is_that_from_the_rows() -> None:
    got = moments()
    projections = (FEATURES - got.mean) @ principal_directions(got.covariance, BITS)

    def products(rotation: np.ndarray) -> np.ndarray:
        pieces = np.array_split(projections, 4)
        return np.sum([np.where(piece @ rotation >= 0, 1.0, -1.0).T @ piece for piece in pieces], axis=0)

    rotation = itq_rotation(products, BITS, seed=3)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(BITS), atol=1e-9)

    def loss(values: np.ndarray) -> float:
        return float(np.square(np.abs(values) - 1).mean())

    scaled = projections / projections.std()
    assert loss(scaled @ rotation) < loss(scaled @ random_rotation(BITS, 3))
    whole = ITQ.fit(FEATURES, BITS, seed=3).project(FEATURES.astype(np.float32)) / projections.std()
    assert abs(loss(scaled @ rotation) - loss(whole)) < 0.05 * loss(whole)

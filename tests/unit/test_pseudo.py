"""Pseudo-labels: proposals and acceptance against loops, and the temperature."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashray.errors import InputError
from hashray.train.pseudo import Shape, accept, fit_temperature, most_per_class, precision, propose

ONE = Shape(1, 3)


def test_single_label_proposals_are_the_softmax_and_its_argmax() -> None:
    scores = np.array([[2.0, 0.0, -1.0, 0.5], [0.0, 0.0, 3.0, -np.inf]])
    proposals = propose(scores, 2.0, ONE)
    assert proposals.labels.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    expected = np.exp([1.0, 1.5]) / [np.exp([1, 0, -0.5, 0.25]).sum(), np.exp([0, 0, 1.5]).sum()]
    np.testing.assert_allclose(proposals.confidence, expected)


def test_several_labels_set_the_top_and_the_bottom_and_leave_the_middle_unknown() -> None:
    scores = np.array([[0.1, 5.0, -2.0, 3.0, 1.0, -np.inf, 0.2]])
    proposals = propose(scores, 1.0, Shape(2, 2))
    assert proposals.labels.tolist() == [[0, 1, 0, 1, -1, 0, -1]]
    p = np.exp(scores[0]) / np.exp(scores[0]).sum()
    assert proposals.confidence[0] == pytest.approx(p[1] + p[3])


def test_the_shape_is_the_mean_number_of_labels_and_c_minus_three_times_it() -> None:
    one = np.eye(5, dtype=np.uint8)[[0, 1, 2, 2]]
    assert Shape.of(one) == Shape(1, 2)  # three classes occur
    several = np.zeros((4, 12), dtype=np.uint8)
    for i in range(4):
        several[i, [i, i + 4, i + 8]] = 1
    assert Shape.of(several) == Shape(3, 12 - 9)
    several[0, 9] = several[1, 10] = 1  # 3.5 labels a row
    assert Shape.of(several) == Shape(4, 0)
    assert Shape.of(several, top=2, bottom=50) == Shape(2, 10)


@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(0, 6))
def test_acceptance_against_a_loop(seed: int, threshold: float, cap: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [f"r{i}" for i in rng.permutation(30)]
    best, confidence = rng.integers(0, 3, 30), np.round(rng.random(30), 1)
    most = np.array([cap, 2, 30])
    chosen = accept(ids, np.eye(3, dtype=np.int8)[best], confidence, threshold, most)
    for label in range(3):
        able = [i for i in range(30) if best[i] == label and confidence[i] >= threshold]
        able.sort(key=lambda i: (-confidence[i], ids[i]))
        assert sorted(np.flatnonzero(chosen & (best == label))) == sorted(able[: most[label]])


def test_a_row_of_several_classes_takes_a_place_in_each() -> None:
    proposed = np.array([[1, 1, 0], [1, 0, 1], [-1, 1, 1], [1, 0, 0]], dtype=np.int8)
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    chosen = accept(["a", "b", "c", "d"], proposed, confidence, 0.5, np.array([2, 1, 5]))
    assert chosen.tolist() == [True, True, False, False]  # c finds its second class full, d its first
    labels = np.array([[1, 1, 0], [1, 0, 0]], dtype=np.uint8)
    assert most_per_class(labels, 10, 1.0).tolist() == [10, 5, 0]
    with pytest.raises(InputError, match="top_classes = 4, and the labelled rows have 2 classes"):
        Shape.of(labels, top=4)


def test_the_cap_follows_the_labelled_share() -> None:
    labels = np.eye(3, dtype=np.uint8)[[0, 0, 1, 1]]
    assert most_per_class(labels, 100, 1.0).tolist() == [50, 50, 0]
    assert most_per_class(labels, 99, 0.5).tolist() == [25, 25, 0]


def test_the_temperature_undoes_a_scale() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.eye(5, dtype=np.uint8)[[rng.choice(5, p=row) for row in p]]
    for scale in (0.1, 1.0, 20.0):
        assert fit_temperature(logits * scale, labels) == pytest.approx(scale, rel=0.1)
    assert fit_temperature(np.full((3, 2), -np.inf), np.zeros((3, 2), np.uint8)) == 1.0


def test_where_every_row_is_right_the_temperature_still_leaves_a_doubt() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((100, 10))
    labels = np.eye(10, dtype=np.uint8)[scores.argmax(1)]
    tau = fit_temperature(scores, labels)

    def cost(temperature: float) -> float:
        """The likelihood of the labels and of one more that may be of any class, by a loop."""
        p = np.exp(scores / temperature) / np.exp(scores / temperature).sum(1, keepdims=True)
        return float(-np.log(p[labels == 1]).sum() - np.log(p).mean())

    grid = tau * np.array([0.5, 0.8, 1.0, 1.25, 2.0])
    assert int(np.argmin([cost(value) for value in grid])) == 2
    near = propose(np.array([[0.1, 0.0] + [-2.0] * 8]), tau, Shape(1, 9)).confidence[0]
    assert near < 0.95  # two classes nearly alike are no certainty


def test_precision_counts_rows_with_hidden_labels_only() -> None:
    proposed = np.array([[1, 0], [1, -1], [0, 1]], dtype=np.int8)
    hidden = np.array([[1, 0], [0, 0], [1, 0]], dtype=np.uint8)
    assert precision(proposed, hidden) == 0.5
    assert precision(proposed, np.zeros((3, 2), np.uint8)) is None

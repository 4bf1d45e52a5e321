"""Which classes stand among each other's nearest rows, and which queries a gallery shows; both against plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hashray.codes import hamming
from hashray.evaluate import confusion
from hashray.evaluate.confusion import confusions
from hashray.evaluate.scoring import gallery_queries
from hashray.evaluate.sides import Side
from hashray.metrics import label_rows

CLASSES = ("cat", "dog", "owl")


def side(codes: np.ndarray, labels: np.ndarray) -> Side:
    count = len(codes)
    names = [f"{number:03d}" for number in range(count)]
    return Side(names, label_rows(labels, count, "m"), ["query"] * count, np.zeros(count, np.int32), {"m": codes})


def random_side(seed: int, count: int, several: bool) -> tuple[Side, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.eye(3, dtype=np.uint8)[rng.integers(0, 3, count)]
    if several:
        labels |= rng.integers(0, 2, (count, 3), np.uint8)
    return side(rng.integers(0, 4, (count, 1), np.uint8), labels), labels


@pytest.mark.parametrize(("several", "rows"), [(False, 7), (True, 7), (False, 2)])
def test_shares_against_every_order_of_tied_rows(several: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusion, "NEIGHBOURS", 3)
    (query, query_labels), (database, labels) = random_side(1, 9, several), random_side(2, rows, several)
    places = min(3, rows)
    sums, counts = np.zeros((3, 3)), np.zeros(3)
    for row, distances in enumerate(hamming(query.values["m"], database.values["m"])):
        orders = [o for o in itertools.permutations(range(rows)) if (np.diff(distances[list(o)]) >= 0).all()]
        mean = np.mean([labels[list(order[:places])].sum(0) / places for order in orders], axis=0)
        for index in np.flatnonzero(query_labels[row]):
            sums[index] += mean
            counts[index] += 1
    counted = confusions(query, database, "m", CLASSES, 0)
    present = np.flatnonzero(counts)
    assert counted["classes"] == [CLASSES[i] for i in present]
    assert np.allclose(counted["shares"], (sums[present] / counts[present, None])[:, present], atol=1e-6)
    assert (counted["queries"], counted["rows"], counted["neighbours"], counted["left_out"]) == (9, rows, places, 0)


def test_the_matrix_keeps_the_classes_that_are_mixed_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confusion, "CLASSES", 2)
    monkeypatch.setattr(confusion, "NEIGHBOURS", 1)
    codes, eye = np.array([[0], [15], [255]], np.uint8), np.eye(3, dtype=np.uint8)
    counted = confusions(side(codes, eye), side(codes, eye[[0, 2, 1]]), "m", CLASSES, 0)
    assert counted["classes"] == ["dog", "owl"] and counted["shares"] == [[0, 1], [1, 0]] and counted["left_out"] == 1
    assert counted["pairs"] == [["dog", "owl", 1.0], ["owl", "dog", 1.0]]
    assert confusions(side(codes[:0], eye[:0]), side(codes, eye), "m", CLASSES, 0) == {}


def test_a_gallery_shows_the_best_and_the_worst_queries() -> None:
    query, _ = random_side(3, 40, False)
    scores = np.linspace(0, 1, 40)[np.random.default_rng(0).permutation(40)]
    scores[[3, 7]] = np.nan
    kinds = gallery_queries(query, scores, 12, 0)
    order = [row for row in np.argsort(scores) if row not in (3, 7)]
    assert {row for row, kind in kinds.items() if kind == "worst"} == set(order[:3])
    assert [row for row, kind in kinds.items() if kind == "best" and row in order[-3:]]
    assert {row for row, kind in kinds.items() if kind == "best"} == set(order[-3:]) and len(kinds) <= 12
    assert gallery_queries(query, scores, 0, 0) == {}
    assert set(gallery_queries(query, np.full(40, np.nan), 8, 0).values()) == {"spread"}
    assert len(gallery_queries(side(np.zeros((1, 1), np.uint8), np.eye(3, dtype=np.uint8)[:1]), scores[:1], 12, 0)) == 1

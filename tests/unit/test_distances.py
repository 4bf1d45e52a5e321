"""Distances, counts and labels as the metrics use them: the same integers whatever the kernel and the parts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hashray.codes import hamming
from hashray.errors import MismatchError
from hashray.metrics import LabelRows, average_precisions, code_health, count, distances, label_rows, merge_side, rank
from hashray.metrics.distances import _faiss

Array = NDArray[Any]


def random_sides(seed: int, multi: bool) -> tuple[Array, Array, Array, Array]:
    """Five queries and 40 rows of few distinct codes, with 11 classes; multi-label rows may be empty."""
    rng = np.random.default_rng(seed)

    def labels(rows: int) -> Array:
        return (rng.random((rows, 11)) < 0.2) if multi else np.eye(11, dtype=np.int64)[rng.integers(0, 11, rows)]

    codes = [rng.choice(np.array([0, 1, 3, 7, 129], np.uint8), size=(rows, 3)) for rows in (5, 40)]
    return codes[0], labels(5), codes[1], labels(40)


@pytest.fixture(params=["faiss", "numpy"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Distances by FAISS, then as on a machine without it."""
    if request.param == "numpy":
        monkeypatch.setitem(sys.modules, "faiss", None)
    _faiss.cache_clear()
    assert (_faiss() is None) == (request.param == "numpy")
    yield request.param
    _faiss.cache_clear()


@pytest.mark.parametrize("width", range(1, 33))
def test_distances_are_naive_popcounts_at_every_width(width: int, kernel: str) -> None:
    rng = np.random.default_rng(width)
    left, right = (rng.integers(0, 256, (rows, width), dtype=np.uint8) for rows in (5, 23))
    right[0], right[1] = left[0], ~left[0]  # distance 0, and every bit
    naive = [[sum(int(x).bit_count() for x in a ^ b) for b in right] for a in left]
    result = distances(left, right)
    assert result.dtype == np.int32 and result.tolist() == naive
    assert distances(left[::2], right[::-1]).tolist() == [row[::-1] for row in naive[::2]]  # not contiguous


def test_distances_of_nothing_and_of_two_widths(kernel: str) -> None:
    empty, one = np.zeros((0, 3), np.uint8), np.zeros((1, 3), np.uint8)
    assert distances(empty, one).shape == (0, 1) and distances(one, empty).shape == (1, 0)
    with pytest.raises(MismatchError, match="24 bits cannot be compared with codes of 16"):
        distances(one, np.zeros((1, 2), np.uint8))


def test_metrics_import_without_faiss() -> None:
    script = "import sys, hashray.metrics; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("num_bytes", [1, 3, 4, 8, 16])
def test_many_rows_are_counted_as_numpy_counts_them(num_bytes: int, kernel: str) -> None:
    """Enough distinct rows that two queries share a table of bins, and an odd number of queries."""
    rng = np.random.default_rng(num_bytes)
    query, database = (rng.integers(0, 256, (rows, num_bytes), dtype=np.uint8) for rows in (31, 40_000))
    query_labels, database_labels = rng.random((31, 5)) < 0.3, rng.random((40_000, 5)) < 0.3
    histograms = rank(query, query_labels, database, database_labels)
    relevant = query_labels.astype(int) @ database_labels.T.astype(int) > 0
    for i, row in enumerate(hamming(query, database)):
        assert histograms.total[i].tolist() == np.bincount(row, minlength=8 * num_bytes + 1).tolist()
        assert histograms.relevant[i].tolist() == np.bincount(row[relevant[i]], minlength=8 * num_bytes + 1).tolist()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(1, 39), max_size=5), multi=st.booleans())
def test_counts_of_parts_add_up_to_those_of_the_whole(seed: int, cuts: list[int], multi: bool) -> None:
    query, query_labels, database, database_labels = random_sides(seed, multi)
    queries = merge_side(query, query_labels, "query")
    whole = count(queries, merge_side(database, database_labels, "database"))
    parts = zip(*(np.split(rows, sorted(set(cuts))) for rows in (database, database_labels)), strict=True)
    assert (whole == sum(count(queries, merge_side(*part, "database")) for part in parts)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), multi=st.booleans())
def test_label_rows_stand_for_the_matrix_of_all_rows(seed: int, multi: bool) -> None:
    query, query_labels, database, database_labels = random_sides(seed, multi)
    rows = label_rows(database_labels, len(database), "database")
    assert (rows.multi_hot() == (database_labels > 0)).all()
    same = (query, query_labels, database, rows)
    if (query_labels.astype(int) @ database_labels.T.astype(int)).any():
        expected = average_precisions(query, query_labels, database, database_labels).values
        np.testing.assert_array_equal(average_precisions(*same).values, expected)
    assert code_health(database, labels=rows) == code_health(database, labels=database_labels)
    order = np.random.default_rng(seed).permutation(len(database))[:17]
    taken, again = rows.take(order), label_rows(database_labels[order], 17, "database")
    joined = LabelRows.concatenate([taken, rows])
    both = label_rows(np.concatenate([database_labels[order], database_labels]), 57, "database")
    for one, other in ((taken, again), (joined, both)):
        assert (one.ids == other.ids).all() and (one.rows == other.rows).all()

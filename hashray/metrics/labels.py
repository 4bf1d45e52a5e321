"""Labels as numbered distinct rows, and the grouping of equal rows: of few labels and many rows, little remains.

Labels enter as multi-hot rows (entries > 0 are positive; 0 and -1 are not) or as `LabelRows`, which need no matrix with
a column per class for every row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes, as_words, pad_width
from hashray.errors import MismatchError

Ints = NDArray[np.int64]


class LabelRows(NamedTuple):
    """Labels as ids int64 [n] into the distinct label rows uint8 [l, c], whose entries are 0 or 1."""

    ids: Ints
    rows: NDArray[np.uint8]

    def multi_hot(self) -> NDArray[np.uint8]:
        """The labels as a matrix uint8 [n, c]."""
        return self.rows[self.ids]

    def take(self, positions: NDArray[Any]) -> LabelRows:
        """The labels at some positions (integers, or a mask of all), without the label rows that none of them has.

        >>> label_rows(np.eye(3), 3, "item").take(np.array([2, 1])).ids
        array([0, 1])
        """
        kept, ids = np.unique(self.ids[positions], return_inverse=True)
        return LabelRows(ids.reshape(-1).astype(np.int64), self.rows[kept])

    @staticmethod
    def concatenate(sides: Sequence[LabelRows]) -> LabelRows:
        """The labels of several sides over the same classes, one after the other; `sides` is not empty."""
        packed = np.concatenate([np.packbits(side.rows, axis=1) for side in sides])
        shifts = np.cumsum([0, *(len(side.rows) for side in sides[:-1])])
        ids = np.concatenate([side.ids + shift for side, shift in zip(sides, shifts, strict=True)])
        first, inverse, _ = distinct(words64(packed))
        rows = np.unpackbits(packed[first], axis=1, count=sides[0].rows.shape[1])
        return LabelRows(inverse[ids], rows)


def label_rows(labels: Any, num_rows: int, side: str) -> LabelRows:
    """Number the distinct rows of multi-hot `labels` [num_rows, c]; `LabelRows` are only checked.

    Raises:
        ValueError: the labels are not two-dimensional.
        MismatchError: they are not `num_rows` rows.
    """
    if isinstance(labels, LabelRows):
        _check_length(len(labels.ids), num_rows, side)
        return labels
    positive = np.asarray(labels) > 0
    if positive.ndim != 2 or not positive.shape[1]:
        raise ValueError(
            f"{side} labels have shape {positive.shape}; expected multi-hot rows [n, c] "
            "(class ids become such rows by np.eye(c)[ids])"
        )
    _check_length(len(positive), num_rows, side)
    first, inverse, _ = distinct(words64(np.packbits(positive, axis=1)))
    return LabelRows(inverse, positive[first].astype(np.uint8))


def check_classes(queries: LabelRows, database: LabelRows) -> None:
    """Raise MismatchError where the two sides are not labelled over the same number of classes."""
    if queries.rows.shape[1] != database.rows.shape[1]:
        raise MismatchError(
            f"query labels have {queries.rows.shape[1]} classes, database labels {database.rows.shape[1]}; "
            "both need one column per class, in the same order"
        )


def distinct(columns: NDArray[np.uint64]) -> tuple[Ints, Ints, Ints]:
    """Group the equal rows of uint64 [n, w], ascending with the last column the most significant.

    Returns:
        first int64 [m], a row of every group; inverse int64 [n], every row's group; counts int64 [m].

    >>> distinct(np.uint64([[5], [3], [5]]))
    (array([1, 0]), array([1, 0, 1]), array([1, 2]))
    """
    # NumPy sorts one word with SIMD, several not: 59,000 rows in 1 ms and 13 ms (Xeon, AVX-512).
    order = np.argsort(columns[:, 0]) if columns.shape[1] == 1 else np.lexsort(columns.T)
    ascending = columns[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (ascending[1:] != ascending[:-1]).any(1)
    inverse = np.empty(len(order), dtype=np.int64)
    inverse[order] = np.cumsum(starts) - 1
    return order[starts], inverse, np.diff(np.append(np.flatnonzero(starts), len(order)))


def pair_columns(codes: Codes, labels: LabelRows) -> NDArray[np.uint64]:
    """(code, label id) of every row as uint64 [n, w], for `distinct`: one word where both fit into it."""
    bits, words, ids = 8 * codes.shape[1], words64(codes), labels.ids.astype(np.uint64)
    if sys.byteorder == "little" and bits < 64 and len(labels.rows) <= 1 << (64 - bits):
        return words | (ids << np.uint64(bits))[:, None]  # the high bits of a padded word are free
    return np.column_stack([words, ids])


def words64(data: Codes) -> NDArray[np.uint64]:
    """View bytes uint8 [n, b] as uint64 [n, ceil(b / 8)], zero-padded: equal rows stay equal."""
    return np.asarray(as_words(pad_width(data, -(-data.shape[1] // 8) * 8)), dtype=np.uint64)


def _check_length(num_labels: int, num_rows: int, side: str) -> None:
    if num_labels != num_rows:
        raise MismatchError(f"{num_rows} {side} rows, but {num_labels} rows of {side} labels")

"""Rows with equal codes as one code with its rows: of a shard, then of all shards, bucket by bucket. No Ray.

A code that stands in 100,000 rows would be five billion pairs. So pairs are looked for between different codes, and
each code carries its rows. Codes are shared out by a hash, so that equal ones meet in one bucket and buckets are equal.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.index.pairs import MIX, Words, to_words

CODES_PER_BUCKET = 4_000_000
PLACE_BITS = 44  # of a row: its shard above, its position below; of a code: its bucket above, its place below
PLACE_MASK = (1 << PLACE_BITS) - 1


@dataclass(frozen=True)
class DistinctCodes:
    """Different codes uint8 [m, b] with their rows: those of code i are rows[starts[i] : starts[i + 1]], int64."""

    codes: Codes
    starts: NDArray[np.int64]
    rows: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows of each code, int64 [m]."""
        return np.diff(self.starts)

    def to_bytes(self) -> bytes:
        """The bytes of a NumPy file: the same every time."""
        sink = io.BytesIO()
        for array in (self.codes, self.starts, self.rows):
            np.save(sink, array, allow_pickle=False)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> DistinctCodes:
        """Read what `to_bytes` gave."""
        source = io.BytesIO(data)
        return cls(*(np.load(source, allow_pickle=False) for _ in range(3)))


def num_buckets(rows: int) -> int:
    """Return the number of buckets for this number of rows."""
    return max(1, -(-rows // CODES_PER_BUCKET))


def distinct(codes: Codes, rows: NDArray[np.int64], buckets: int) -> list[DistinctCodes]:
    """Bring equal codes together, and share them out among `buckets`.

    Args:
        codes: packed codes uint8 [n, b].
        rows: the row of each, int64 [n]; the rows of a code keep this order.

    >>> (only,) = distinct(np.array([[7], [3], [7]], np.uint8), np.array([10, 11, 12]), 1)
    >>> only.codes.tolist(), only.counts.tolist(), only.rows.tolist()
    ([[3], [7]], [1, 2], [11, 10, 12])
    """
    return [_together(codes[some], rows[some], np.ones(len(some), np.int64)) for some in _shared_out(codes, buckets)]


def merge_distinct(parts: Sequence[DistinctCodes]) -> DistinctCodes:
    """Bring the equal codes of several parts together; the rows of a code stand in the order of the parts."""
    return _together(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )


def _shared_out(codes: Codes, buckets: int) -> list[NDArray[np.int64]]:
    if buckets == 1:
        return [np.arange(len(codes))]
    words = to_words(codes)
    hashes = np.zeros(len(words), np.uint64)
    for word in range(words.shape[1]):
        hashes = (hashes ^ words[:, word]) * MIX
        hashes ^= hashes >> np.uint64(29)
    numbers = (hashes * MIX >> np.uint64(32)).astype(np.int64) * buckets >> 32
    return [np.flatnonzero(numbers == number) for number in range(buckets)]


def _together(codes: Codes, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> DistinctCodes:
    """One code for equal ones; `rows` of `counts` [n] rows a code, in the order of the codes."""
    if not len(codes):
        return DistinctCodes(codes, np.zeros(1, np.int64), rows)
    words = _in_order_of_bytes(codes)
    order = np.lexsort(words.T[::-1])  # stable
    ordered = words[order]
    first = np.ones(len(order), bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(1)
    starts = np.cumsum(counts) - counts
    sizes = counts[order]
    moved = np.repeat(starts[order] - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(rows))
    edges = np.append((np.cumsum(sizes) - sizes)[first], len(rows))
    return DistinctCodes(np.ascontiguousarray(codes[order[first]]), edges, rows[moved])


def _in_order_of_bytes(codes: Codes) -> Words:
    """Words whose order is that of the codes' bytes, on any machine."""
    return to_words(codes).view(">u8").astype(np.uint64)

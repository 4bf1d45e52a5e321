"""Every id once in a corpus or an index, without all ids in one process: by their hashes. No Ray.

The 64-bit hashes of some rows' ids are written sorted, so that a task can read one range of hashes from all files and
look for equal ones. Only ids with these hashes are then compared, so the answer is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

HASHES_PER_BUCKET = 32_000_000  # 256 MB in the task of a bucket
SUSPECTS = 10_000  # equal hashes that are looked at in one round
BLOCK = 1 << 16
LAST = (1 << 64) - 1
FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def hash_ids(ids: pa.Array) -> Hashes:
    """64-bit hashes uint64 [n] of text: equal for equal ids, on any machine and in any process.

    >>> hash_ids(pa.array(["a", "b", "a"])).tolist().index(hash_ids(pa.array(["b"]))[0])
    1
    """
    wide = pa.types.is_large_string(ids.type)
    offsets = np.frombuffer(ids.buffers()[1], np.int64 if wide else np.int32)[ids.offset : ids.offset + len(ids) + 1]
    text = np.frombuffer(ids.buffers()[2] or b"", np.uint8)
    hashes = np.empty(len(ids), np.uint64)
    for start in range(0, len(ids), BLOCK):
        ends = offsets[start : start + BLOCK + 1].astype(np.int64)
        hashes[start : start + BLOCK] = _hash_block(text[ends[0] : ends[-1]], ends - ends[0])
    return hashes


def _hash_block(text: NDArray[np.uint8], ends: NDArray[np.int64]) -> Hashes:
    # Words of eight bytes, two more at the end: an id's word is put together from the two it reaches into.
    words = np.zeros(len(text) // 8 + 3, "<u8")
    words.view(np.uint8)[: len(text)] = text
    starts, lengths = ends[:-1], np.diff(ends)
    hashes = (lengths.astype(np.uint64) + np.uint64(1)) * FIRST
    for word in range(-(-int(lengths.max(initial=0)) // 8)):
        left = lengths - 8 * word
        # A slice, not a list of rows, where every id is long enough: three times as fast.
        rows: Any = slice(None) if left.min() > 0 else np.flatnonzero(left > 0)
        place = starts[rows] + 8 * word
        shift, aligned = ((place & 7) << 3).astype(np.uint64), place >> 3
        value = words.take(aligned) >> shift
        value |= (words.take(aligned + 1) << np.uint64(1)) << (np.uint64(63) - shift)
        if left[rows].min() < 8:
            value <<= (8 * np.maximum(8 - left[rows], 0)).astype(np.uint64)
        mixed = (hashes[rows] ^ value) * FIRST
        hashes[rows] = mixed ^ (mixed >> np.uint64(29))
    hashes *= SECOND
    return hashes ^ (hashes >> np.uint64(32))


def num_buckets(rows: int) -> int:
    """Return the number of buckets of an index with this number of rows."""
    return max(1, -(-rows // HASHES_PER_BUCKET))


def into_buckets(hashes: Hashes, count: int) -> list[Hashes]:
    """Sort hashes uint64 [n] and cut them into `count` equal ranges of values."""
    hashes = np.sort(hashes)
    edges = np.array([(number << 64) // count for number in range(1, count)], np.uint64)
    return np.split(hashes, np.searchsorted(hashes, edges))


def equal_hashes(hashes: Hashes, after: int = -1) -> Hashes:
    """Return the values above `after` that stand more than once in uint64 [n]: ascending, at most SUSPECTS of them.

    Sorts in place.
    """
    hashes.sort()
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    return np.unique(twice[twice >= np.uint64(after + 1)])[:SUSPECTS] if after < LAST else twice[:0]


def ids_with(ids: pa.Array, hashes: Hashes) -> list[str]:
    """Return the ids with one of these hashes, ascending uint64 [m]."""
    places = np.flatnonzero(np.isin(hash_ids(ids), hashes))
    return ids.take(pa.array(places)).to_pylist()


def duplicates(ids: Iterable[Sequence[str]]) -> list[str]:
    """Return the ids that stand more than once in all lists together, ascending."""
    counts = Counter(text for some in ids for text in some)
    return sorted(text for text, count in counts.items() if count > 1)

"""The k nearest of several shards' answers: ascending distance, ties by ascending id. No Ray.

Every shard's list ascends by (distance, id), since its rows ascend by id. So ids are looked up only for rows of the
answer, and for rows at its last distance where shards hold more of them than fit.
"""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
# The ids of rows: the shard int64 [m] and the position int64 [m] of each -> object [m] of str.
Lookup = Callable[[Positions, Positions], NDArray[np.object_]]

POSITION_BITS = 44  # 1.7e13 rows a shard, half a million shards
POSITION_MASK = (1 << POSITION_BITS) - 1


def merge(
    distances: NDArray[np.int32], positions: Positions, lookup: Lookup, ascending: bool = False
) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
    """Merge the lists of s shards, each in ascending (distance, position), into one list a query.

    Args:
        distances: int32 [s, n, k], bits. What stands where the position is -1 does not matter.
        positions: int64 [s, n, k], places inside each shard; -1 after a list's last row.
        lookup: gives the ids of rows, of which no two are equal.
        ascending: whether every id of shard i is below every one of shard i + 1: the order of shards is that of ids.

    Returns:
        ids object [n, k] of str and distances int32 [n, k], None and -1 after the last row.

    >>> ids = np.array([["a", "d"], ["b", "c"]], object)
    >>> merge(np.array([[[3, 4]], [[3, 3]]], np.int32), np.array([[[0, 1]], [[0, 1]]]), lambda s, p: ids[s, p])
    (array([['a', 'b']], dtype=object), array([[3, 3]], dtype=int32))
    """
    rows = np.where(positions < 0, -1, positions | (np.arange(len(positions)) << POSITION_BITS)[:, None, None])
    if len(rows) == 1:
        best, rows = distances[0], rows[0]
    else:  # ties by shard, so that only their order and the choice at the last distance are still open
        best, rows = faiss.merge_knn_results(np.ascontiguousarray(distances), rows)
    best = np.where(rows < 0, np.int32(-1), best)
    ids = np.full(best.shape, None, dtype=object)
    if not ids.size:
        return ids, best
    known = rows >= 0
    contested = np.zeros(len(best), bool)
    if len(positions) > 1 and not ascending:
        tied = (distances == best[None, :, -1:]) & (positions >= 0)
        contested = known[:, -1] & (tied.sum((0, 2)) > (best == best[:, -1:]).sum(1))
        known &= ~(contested[:, None] & (best == best[:, -1:]))
    ids[known] = lookup(rows[known] >> POSITION_BITS, rows[known] & POSITION_MASK)
    if len(positions) > 1 and not ascending:
        _sort_ties(ids, best, np.where(known, rows >> POSITION_BITS, -1))
    if contested.any():
        _choose_last(ids, best, contested, tied, positions, lookup)
    return ids, best


def _sort_ties(ids: NDArray[np.object_], best: NDArray[np.int32], shards: Positions) -> None:
    """Sort the ids of each run of equal distances that comes from several shards."""
    change = np.ones(best.shape, bool)
    change[:, 1:] = best[:, 1:] != best[:, :-1]
    mixed = (shards >= 0) & ~change
    mixed[:, 1:] &= shards[:, 1:] != shards[:, :-1]
    starts = np.flatnonzero(change)
    several = np.add.reduceat(mixed.ravel(), starts, dtype=np.int64) > 0
    flat, ends = ids.reshape(-1), np.append(starts[1:], best.size)
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        flat[start:end] = np.array(sorted(flat[start:end]), object)


def _choose_last(
    ids: NDArray[np.object_],
    best: NDArray[np.int32],
    contested: NDArray[np.bool_],
    tied: NDArray[np.bool_],
    positions: Positions,
    lookup: Lookup,
) -> None:
    """Fill the places at the last distance with the first ids among all rows at that distance."""
    queries = np.flatnonzero(contested)
    places = (best[queries] == best[queries, -1:]).sum(1)
    tied = tied[:, queries]
    # Of one shard, at most as many as there are places.
    tied &= np.cumsum(tied, axis=2) <= places[None, :, None]
    query, shard, column = np.nonzero(tied.transpose(1, 0, 2))
    texts = lookup(shard, positions[shard, queries[query], column])
    ends = np.searchsorted(query, np.arange(len(queries)), side="right").tolist()
    start = 0
    for row, count, end in zip(queries.tolist(), places.tolist(), ends, strict=True):
        # One ascending run a shard: Python's sort merges them.
        ids[row, -count:] = np.array(sorted(texts[start:end])[:count], object)
        start = end

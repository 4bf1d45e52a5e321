"""The lists of an IVF shard: which of them a query probes, and the nearest rows in those, ties too. No Ray.

FAISS's own search keeps any of the rows at the k-th distance. Its range search gives all rows up to a distance: the
k-th in the nearest of the lists is never below the k-th in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hashray.artifact.bitmap import Bitmap
from hashray.codes import Codes

BOUND_LISTS = 8  # one in eight of the probed lists says how far the k-th row is at most
TOGETHER_QUERIES = 64  # of one distance: a range search of FAISS takes a single one
TOGETHER_ROWS = 1 << 22  # in the lists that they probe, and so in the answer: 48 MiB
POSITION_BITS = 44  # of the integer by which rows are sorted; above it the distance, then the number of the query
INT_MAX = np.iinfo(np.int32).max
Ranges = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]


class Lists:
    """The lists of an open IVF index; each call uses FAISS's threads as they are set."""

    def __init__(self, index: Any, nprobe: int | None) -> None:
        """Probe `nprobe` lists a query; None: as many as the index says."""
        self._index, self._quantizer = index, faiss.downcast_IndexBinary(index.quantizer)
        index.nprobe = min(nprobe or index.nprobe, index.nlist)  # FAISS takes it from here, and from nowhere else
        self._rows = np.array([*map(index.invlists.list_size, range(index.nlist)), 0], np.int64)  # last: of list -1
        self._query_bit = POSITION_BITS + int(index.d).bit_length()
        self._together = min(TOGETHER_QUERIES, 1 << max(0, 63 - self._query_bit))

    def probed(self, queries: Codes) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The distances int32 [n, nprobe] of the lists that each query probes, and their numbers int64, or -1."""
        away, lists = self._quantizer.search(queries, self._index.nprobe)
        return away, lists

    def within(self, queries: Codes, distance: int) -> Ranges:
        """All rows of the probed lists up to a distance: limits int64 [n + 1], distances and positions."""
        return self._within(queries, distance, *self.probed(queries))

    def _within(self, queries: Codes, distance: int, away: Any, lists: Any) -> Ranges:
        limits, near, places = self._index.range_search_preassigned(queries, distance + 1, lists, away)
        return limits.astype(np.int64), near.astype(np.int32), places

    def search(self, queries: Codes, k: int, allowed: Bitmap | None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The k nearest rows in the probed lists, as `Shard.search`.

        Where only some rows are allowed, the distance grows until k of them are within it.
        """
        distances = np.full((len(queries), k), INT_MAX, np.int32)
        positions = np.full((len(queries), k), -1, np.int64)
        if not len(queries):
            return distances, positions
        away, lists = self.probed(queries)
        nearest = lists.copy()
        nearest[:, max(1, lists.shape[1] // BOUND_LISTS) :] = -1
        bounds = self._index.search_preassigned(queries, k, nearest, away)[0][:, -1]
        bounds, left, rows = np.minimum(bounds, self._index.d), np.arange(len(queries)), self._rows[lists].sum(1)
        while len(left):
            short = [np.empty(0, np.int64)]
            for some in _together(left, bounds, rows, self._together):
                bound = int(bounds[some[0]])
                limits, near, places = self._within(queries[some], bound, away[some], lists[some])
                query = np.repeat(np.arange(len(some)), np.diff(limits))
                keys = query << self._query_bit | near.astype(np.int64) << POSITION_BITS | places
                keys = keys if allowed is None else keys[allowed.contains(places)]
                keys.sort()
                query = keys >> self._query_bit
                starts = np.searchsorted(query, np.arange(len(some) + 1))
                rank = np.arange(len(keys)) - starts[query]
                first = rank < k
                place, keys = (some[query[first]], rank[first]), keys[first]
                distances[place] = (keys & ((1 << self._query_bit) - 1)) >> POSITION_BITS
                positions[place] = keys & ((1 << POSITION_BITS) - 1)
                if allowed is not None and bound < self._index.d:
                    short.append(some[np.diff(starts) < k])
            left = np.concatenate(short)
            bounds[left] = np.minimum(self._index.d, bounds[left] + np.maximum(1, bounds[left] // 2))
        return distances, positions


def _together(
    queries: NDArray[np.int64], bounds: NDArray[np.int32], rows: NDArray[np.int64], most: int
) -> Iterator[NDArray[np.int64]]:
    """The queries in groups of one bound, each small enough for one range search.

    Args:
        queries: their numbers; bounds int32 and rows int64, of the lists that each probes, are by number.
        most: queries of a group.
    """
    some: list[int] = []
    held = 0
    for query in queries[np.argsort(bounds[queries], kind="stable")].tolist():
        if some and (bounds[query] != bounds[some[0]] or len(some) == most or held + rows[query] > TOGETHER_ROWS):
            yield np.array(some)
            some, held = [], 0
        some.append(query)
        held += int(rows[query])
    if some:
        yield np.array(some)

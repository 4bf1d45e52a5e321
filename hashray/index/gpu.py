"""The codes of a flat shard on a GPU, with the answers of the shard itself. No Ray.

FAISS's GPU search keeps any of the rows at the last distance. So more rows are asked for than the answer has: where one
of them is further away than the answer's last, all rows at that distance are known. Other queries go to the shard.
"""

from __future__ import annotations

import threading
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from hashray.codes import Codes
from hashray.errors import InputError

MORE = 64
MOST = 2048  # rows that FAISS's GPU search gives for a query


class GpuCodes:
    """A copy of a flat FAISS index on the first GPU. FAISS's GPU indexes take one caller at a time."""

    def __init__(self, index: Any) -> None:
        """Copy the index there.

        Raises:
            InputError: this FAISS sees no GPU.
        """
        require_gpu()
        gpus: Any = faiss
        self._resources, self._lock = gpus.StandardGpuResources(), threading.Lock()
        self._index = gpus.GpuIndexBinaryFlat(self._resources, index)
        self.rows = int(index.ntotal)

    def search(self, queries: Codes, k: int) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
        """Return distances int32 [n, k], positions int64 [n, k] and, for each query, whether they are the shard's."""
        asked = min(2 * k + MORE, MOST, self.rows)
        if asked < k and asked < self.rows:
            none = np.zeros(len(queries), bool)
            return np.empty((len(queries), k), np.int32), np.empty((len(queries), k), np.int64), none
        with self._lock:
            distances, positions = self._index.search(queries, asked)
        return in_order(distances, positions, k, whole=asked == self.rows)


def require_gpu() -> None:
    """Raise InputError where FAISS sees no GPU."""
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        raise InputError(
            "FAISS sees no GPU on this machine; search without --gpu, or install 'hashray[gpu]' on a node with one"
        )


def in_order(
    distances: NDArray[np.int32], positions: NDArray[np.int64], k: int, whole: bool
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
    """Put rows in ascending (distance, position), cut them at k, and say for which queries this is exact.

    Args:
        distances: int32 [n, m], ascending, ties in any order and any of them at the end.
        positions: int64 [n, m]; -1 after the last row.
        whole: whether these are all rows.

    Returns:
        distances int32 [n, k] and positions int64 [n, k], 2**31 - 1 and -1 where there are fewer rows; exact bool [n].

    >>> in_order(np.array([[1, 3, 3]], np.int32), np.array([[8, 7, 2]]), 2, whole=False)[2]
    array([False])
    """
    far = np.where(positions < 0, np.iinfo(np.int32).max, distances)
    order = np.lexsort((positions, far))
    far, positions = np.take_along_axis(far, order, 1), np.take_along_axis(positions, order, 1)
    padding = max(0, k - far.shape[1])
    exact = np.full(len(far), whole) if whole or far.shape[1] <= k else far[:, k - 1] < far[:, -1]
    return (
        np.pad(far[:, :k], ((0, 0), (0, padding)), constant_values=np.iinfo(np.int32).max),
        np.pad(positions[:, :k], ((0, 0), (0, padding)), constant_values=-1),
        exact,
    )

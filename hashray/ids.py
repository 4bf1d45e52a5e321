"""Duplicate ids in a table that does not fit in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


def find_duplicates(read: Callable[[], Iterable[tuple[str, Sequence[Any]]]]) -> dict[Any, list[str]]:
    """Return each id that stands in more than one row, with where each of its rows is.

    The first pass keeps 8 bytes a row: the process's own hash of each id, sorted. Only when two hashes
    are equal there is a second pass, which keeps the ids of those hashes alone.

    Args:
        read: Starts one pass: yields (where, ids) blocks. Called once or twice, and must yield the same.

    >>> find_duplicates(lambda: [("part-0", ["a", "b"]), ("part-1", ["c", "a"])])
    {'a': ['part-0', 'part-1']}
    """
    blocks = [np.fromiter(map(hash, ids), np.int64, len(ids)) for _, ids in read()]
    hashes = np.concatenate([np.empty(0, np.int64), *blocks])
    del blocks
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return {}
    rows: defaultdict[Any, list[str]] = defaultdict(list)
    for where, ids in read():
        for value in ids:
            if hash(value) in suspects:
                rows[value].append(where)
    return {value: places for value, places in rows.items() if len(places) > 1}

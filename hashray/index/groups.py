"""Which code parts make which shards, and which rows train a quantizer: numbers of rows only. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

READ_FOR_SAMPLE = 4  # parts with four times the rows of the sample are read for it


@dataclass(frozen=True)
class Group:
    """Neighbouring code parts that one task reads, once, and makes into one shard, or more if a part is large."""

    parts: tuple[int, ...]
    rows: int
    shards: int


def group_parts(rows: Sequence[int], num_shards: int) -> list[Group]:
    """Share out the parts among `num_shards` shards, in order and as evenly by rows as whole parts allow.

    With fewer parts than shards, each part is a group, and the parts with the most rows make several shards.

    Args:
        rows: of each part; parts without rows are left out.
        num_shards: from 1 to the number of all rows.

    >>> [group.parts for group in group_parts([10, 10, 10, 10, 40], 2)]
    [(0, 1, 2, 3), (4,)]
    >>> [group.shards for group in group_parts([10, 30], 4)]
    [1, 3]
    """
    parts = [part for part, count in enumerate(rows) if count]
    counts = np.array([rows[part] for part in parts])
    num_groups = min(num_shards, len(parts))
    before, cuts = np.concatenate([[0], np.cumsum(counts)]), [0]
    for number in range(1, num_groups):
        nearest = int(np.abs(before - before[-1] * number / num_groups).argmin())
        cuts.append(min(max(nearest, cuts[-1] + 1), len(parts) - num_groups + number))
    cuts.append(len(parts))
    sizes = np.diff(before[cuts])
    shards = np.ones(num_groups, np.int64)
    for _ in range(num_shards - num_groups):
        shards[(sizes / shards).argmax()] += 1
    return [
        Group(tuple(parts[low:high]), int(size), int(count))
        for low, high, size, count in zip(cuts[:-1], cuts[1:], sizes, shards, strict=True)
    ]


def sample_rows(rows: Sequence[int], size: int, seed: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Draw `size` rows, or all there are, from a few parts: (part, ascending rows int64 [m] of it), parts ascending.

    Parts are drawn until they hold four times the rows of the sample: what is read does not grow with the index.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows))
    enough = int(np.searchsorted(np.cumsum(np.array(rows)[order]), READ_FOR_SAMPLE * size)) + 1
    chosen = np.sort(order[:enough])
    starts = np.cumsum([0, *(rows[part] for part in chosen)])
    picks = np.sort(rng.choice(starts[-1], min(size, int(starts[-1])), replace=False, shuffle=False))
    split = np.split(picks, np.searchsorted(picks, starts[1:-1]))
    return [
        (int(part), picked - start) for part, picked, start in zip(chosen, split, starts, strict=False) if len(picked)
    ]

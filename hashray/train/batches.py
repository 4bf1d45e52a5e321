"""Which rows make a global batch: a function of seed and epoch, never of the number of workers. No Ray.

An epoch puts the parts of the corpus in a seeded order, takes windows of that sequence and shuffles the
rows inside each: a window is what one task reads at a time, so nothing but a window is ever in memory.
A corpus smaller than a window is shuffled whole. Batches never straddle windows, because a window is a
multiple of the batch; only the last batch of an epoch is uneven. Worker r of N takes the r-th of N equal slices
of every batch, the last ones padded with rows of weight 0.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from hashray.data.images import AugmentConfig, augment
from hashray.data.splits import order_key


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together: pieces (part, start, stop) in rows of the training split of each part."""

    index: int
    first_step: int
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def rows(self) -> int:
        return sum(stop - start for _, start, stop in self.pieces)


@dataclass(frozen=True)
class EpochPlan:
    """The order of training rows.

    Attributes:
        part_rows: training rows in each part of the corpus.
        batch_size: rows of a global batch.
        window_rows: rows shuffled together, rounded up to whole batches.
        seed: of all shuffles.
    """

    part_rows: tuple[int, ...]
    batch_size: int
    window_rows: int
    seed: int

    @property
    def rows(self) -> int:
        return sum(self.part_rows)

    @property
    def steps(self) -> int:
        """Global batches in an epoch; the last may be uneven."""
        return -(-self.rows // self.batch_size)

    def batch_rows(self, step: int) -> int:
        """Rows in the global batch of a step."""
        return min(self.batch_size, self.rows - step * self.batch_size)

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch, in order."""
        size = -(-self.window_rows // self.batch_size) * self.batch_size
        windows: list[Window] = []
        pieces: list[tuple[int, int, int]] = []
        room = size
        for part in _rng(self.seed, epoch, -1).permutation(len(self.part_rows)):
            start = 0
            while start < self.part_rows[part]:
                stop = min(self.part_rows[part], start + room)
                pieces.append((int(part), start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    windows.append(self._window(windows, pieces, size))
                    pieces, room = [], size
        if pieces:
            windows.append(self._window(windows, pieces, size))
        return windows

    def _window(self, before: Sequence[Window], pieces: list[tuple[int, int, int]], size: int) -> Window:
        return Window(len(before), len(before) * size // self.batch_size, tuple(pieces))

    def shuffle(self, epoch: int, window: Window) -> NDArray[np.int64]:
        """Order of the rows of a window: positions int64 [rows] in its pieces laid end to end."""
        return _rng(self.seed, epoch, window.index).permutation(window.rows)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The whole epoch: positions int64 [rows] among all training rows in corpus order."""
        starts = np.concatenate([[0], np.cumsum(self.part_rows)])
        out = []
        for window in self.windows(epoch):
            rows = np.concatenate([np.arange(starts[p] + a, starts[p] + b) for p, a, b in window.pieces])
            out.append(rows[self.shuffle(epoch, window)])
        return np.concatenate([np.zeros(0, dtype=np.int64), *out])

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[NDArray[np.int64]]:
        """Positions of each global batch of an epoch, from a step on."""
        order = self.order(epoch)
        for step in range(first_step, self.steps):
            yield order[step * self.batch_size : (step + 1) * self.batch_size]


def slice_rows(batch_size: int, world: int) -> int:
    """Rows of one worker's slice of a global batch: equal for all workers, so that a split by rows stays in step."""
    return -(-batch_size // world)


def row_seeds(seed: int, epoch: int, ids: Sequence[str]) -> NDArray[np.int64]:
    """A seed int64 [n] for each row's augmentation, a function of seed, epoch and id."""
    keys = [hashlib.blake2b(f"{seed}\0{epoch}\0{name}".encode(), digest_size=8).digest() for name in ids]
    return np.frombuffer(b"".join(keys), dtype="<i8") & np.int64(0x7FFF_FFFF_FFFF_FFFF)


def held_out(ids: Sequence[str], count: int, seed: int) -> set[str]:
    """The `count` ids that come first in the seeded order: the validation rows."""
    return set(heapq.nsmallest(count, ids, key=lambda name: order_key(seed, f"validation\0{name}")))


def _rng(seed: int, epoch: int, window: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, window + 1])


@dataclass(frozen=True)
class Slice:
    """One worker's part of a global batch.

    Attributes:
        step: of the epoch.
        inputs: images uint8 [n, 3, s, s] or features float32 [n, d].
        labels: int8 [n, c] in {0, 1, -1}, -1 for unknown.
        rows: rows of the whole global batch; n may be less than its share, or 0 in an uneven last batch.
    """

    step: int
    inputs: NDArray[Any]
    labels: NDArray[np.int8]
    rows: int


class SliceSource(ABC):
    """Where a worker's batches come from: memory, or a stream of Ray Data."""

    plan: EpochPlan

    @abstractmethod
    def epoch(self, number: int, first_step: int) -> Iterator[Slice]:
        """This worker's slice of every global batch of an epoch, from a step on."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[NDArray[Any], NDArray[np.int8]]]:
        """(inputs, labels) of this worker's share of all training rows, each exactly once, not augmented."""


@final
class MemorySlices(SliceSource):
    """All training rows in memory: cached features, or a small set of decoded images."""

    def __init__(
        self, plan: EpochPlan, inputs: NDArray[Any], labels: NDArray[np.int8], ids: Sequence[str],
        augmentation: AugmentConfig, rank: int, world: int,
    ) -> None:  # fmt: skip
        if not len(inputs) == len(labels) == len(ids) == plan.rows:
            raise ValueError(f"{len(inputs)} inputs, {len(labels)} labels, {len(ids)} ids, {plan.rows} planned")
        self.plan, self.inputs, self.labels, self.ids = plan, inputs, labels, ids
        self.augmentation, self.rank, self.world = augmentation, rank, world

    def epoch(self, number: int, first_step: int) -> Iterator[Slice]:
        size = slice_rows(self.plan.batch_size, self.world)
        for step, batch in enumerate(self.plan.batches(number, first_step), first_step):
            mine = batch[self.rank * size : (self.rank + 1) * size]
            inputs = self.inputs[mine]
            if inputs.ndim == 4:
                seeds = row_seeds(self.plan.seed, number, [self.ids[i] for i in mine])
                inputs = augment(inputs, self.augmentation, seeds)
            yield Slice(step, inputs, self.labels[mine], len(batch))

    def scan(self) -> Iterator[tuple[NDArray[Any], NDArray[np.int8]]]:
        mine = np.arange(self.rank, self.plan.rows, self.world)
        for chunk in np.array_split(mine, max(1, -(-len(mine) // self.plan.batch_size))):
            yield self.inputs[chunk], self.labels[chunk]

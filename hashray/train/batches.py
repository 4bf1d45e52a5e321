"""Which rows make a global batch: a function of seed and epoch, never of the number of workers. No Ray.

An epoch puts the parts of the corpus in a seeded order, takes windows of that sequence and shuffles the
rows inside each: a window is what one task reads at a time, so nothing but a window is ever in memory.
A window is bounded in rows and in bytes of encoded images. A corpus smaller than a window is shuffled whole.
Batches never straddle windows, because a window is a multiple of the batch; only the last batch of an epoch is
uneven. Worker r of N takes the r-th of N equal slices
of every batch, the last ones padded with rows of weight 0.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from hashray.data.images import AugmentConfig, augment
from hashray.data.splits import order_key

WINDOW_BYTES = 512 << 20  # of encoded images; a window is one batch at least


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
        part_bytes: bytes of the images of these rows, for each part; unset: too few to matter.
    """

    part_rows: tuple[int, ...]
    batch_size: int
    window_rows: int
    seed: int
    part_bytes: tuple[int, ...] = ()

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
        most = -(-self.window_rows // self.batch_size) * self.batch_size
        windows: list[Window] = []
        pieces: list[tuple[int, int, int]] = []
        rows, held, step = 0, 0.0, 0  # rows and bytes of the window that is being filled, and its first step
        for part in _rng(self.seed, epoch, -1).permutation(len(self.part_rows)).tolist():
            start, count = 0, self.part_rows[part]
            each = self.part_bytes[part] / count if self.part_bytes and count else 0.0
            while start < count:
                stop = min(count, start + self._room(most, rows, held, each))
                pieces.append((part, start, stop))
                rows, held, start = rows + stop - start, held + (stop - start) * each, stop
                if rows == most or (rows % self.batch_size == 0 and held + self.batch_size * each > WINDOW_BYTES):
                    windows.append(Window(len(windows), step, tuple(pieces)))
                    step += rows // self.batch_size
                    pieces, rows, held = [], 0, 0.0
        if pieces:
            windows.append(Window(len(windows), step, tuple(pieces)))
        return windows

    def _room(self, most: int, rows: int, held: float, each: float) -> int:
        """Rows of `each` bytes that the window takes next: until it is full, or to the end of a batch."""
        to_batch_end = self.batch_size - rows % self.batch_size
        if held + (most - rows) * each <= WINDOW_BYTES:
            return most - rows
        whole = max(0, int((WINDOW_BYTES - held) / max(each, 1e-9)) - to_batch_end) // self.batch_size * self.batch_size
        return to_batch_end + whole

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


def drawn_rows(inputs: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Which rows [n] belong to a draw of about this share of all rows: a function of each row's own bytes."""
    if share >= 1:
        return np.ones(len(inputs), dtype=bool)
    keys = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in inputs]
    return np.frombuffer(b"".join(keys), dtype="<u8") < share * 2.0**64


def held_out(ids: Iterable[str], count: int, seed: int) -> set[str]:
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

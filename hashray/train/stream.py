"""[Ray] Corpus -> batches on every worker, streamed by Ray Data, the same global batches for any worker count.

A dataset holds every window of every epoch, in order. One task reads a window's rows, shuffles them, decodes and
augments them (cached features it leaves as they are) and lays them out as batch 0 slice 0, batch 0 slice 1, …, each
slice padded to the same number of rows. Encoded images never leave the task: pixels are what travels. Blocks are then
cut to exactly one slice and dealt out by Ray's stream split. That split promises no order. With equal blocks, their
number a multiple of the workers, and `preserve_order` it deals them round in turn (read in its source, 2.60), so the
k-th block of a worker is its slice of batch k; every row carries its epoch and step, and the training
loop refuses a slice that is not the one due, so a Ray that deals otherwise is an error, not a wrong
gradient. Nothing is dropped: padding makes the rows divide evenly. An elastic group begins the dataset again at each
new size, which the tasks read where they read its position; the blocks stay as large as the smallest group needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from hashray.data.columns import bytes_column, bytes_matrix
from hashray.data.corpus import Corpus, open_corpus
from hashray.data.images import AugmentConfig, Resize, augment
from hashray.engine.reports import sending_requests
from hashray.engine.session import keep_memory
from hashray.errors import CorruptArtifact, RunError
from hashray.storage import open_store
from hashray.train.batches import EpochPlan, Slice, SliceSource, Window, row_seeds, slice_rows
from hashray.train.selection import Selection

START_FILE = "start.json"


@dataclass(frozen=True)
class StreamSpec:
    """Plain data that every task of a stream gets: the corpus and its part files, the plan, and how to decode.

    Attributes:
        shape, dtype: of one row as the loop gets it: pixels, or cached features.
        world: the number of workers; of an elastic group, the fewest there may be.
    """

    corpus: str
    plan: EpochPlan
    parts: tuple[str, ...]
    selection: Selection
    shape: tuple[int, ...]
    dtype: str
    resize: Resize
    augmentation: AugmentConfig
    world: int
    position_url: str


def training_dataset(spec: StreamSpec, epochs: int, reports: Any) -> ray.data.Dataset:
    """Every window of `epochs` epochs. Windows before the place where the worker group starts give no rows.

    Args:
        reports: the queue that the tasks send their counts of requests to.
    """
    items = [
        {"item": json.dumps({"epoch": number, "window": window.index})}
        for number in range(epochs)
        for window in spec.plan.windows(number)
    ]
    return _dataset(items, spec, reports, scan=False)


def scan_dataset(spec: StreamSpec, reports: Any) -> ray.data.Dataset:
    """All training rows once, in the order of epoch 0, not augmented; `reports` as above."""
    items = [{"item": json.dumps({"epoch": 0, "window": window.index})} for window in spec.plan.windows(0)]
    return _dataset(items, spec, reports, scan=True)


def _dataset(items: list[dict[str, str]], spec: StreamSpec, reports: Any, scan: bool) -> ray.data.Dataset:
    read = partial(_read_window, spec=spec, reports=reports, scan=scan)
    rows = slice_rows(spec.plan.batch_size, spec.world)
    return (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(read, batch_size=1, batch_format="numpy", num_cpus=0.5)
        .repartition(target_num_rows_per_block=rows, strict=True)
    )


def _read_window(batch: Mapping[str, NDArray[Any]], spec: StreamSpec, reports: Any, scan: bool) -> Iterator[pa.Table]:
    keep_memory()
    for text in batch["item"]:
        item = json.loads(text)
        number, window = item["epoch"], spec.plan.windows(item["epoch"])[item["window"]]
        with sending_requests(reports):
            at = _position(spec)
            if scan or not _is_past(spec, at, number, window):
                yield from _window_tables(spec, at["world"], number, window, scan)


def _position(spec: StreamSpec) -> dict[str, int]:
    """Where the worker group starts, and its size. Read when a task runs: a group that restarts begins the dataset
    again, and does not read the batches up to its checkpoint."""
    store = open_store(spec.position_url)
    if not store.exists(START_FILE):
        return {"epoch": 0, "step": 0, "world": spec.world}
    return json.loads(store.read(START_FILE))


def _is_past(spec: StreamSpec, at: Mapping[str, int], number: int, window: Window) -> bool:
    """Whether this window lies before the place where the worker group starts."""
    steps = -(-window.rows // spec.plan.batch_size)
    return (number, window.first_step + steps) <= (at["epoch"], at["step"])


def _window_tables(spec: StreamSpec, world: int, number: int, window: Window, scan: bool) -> Iterator[pa.Table]:
    """The slices of a window, batch by batch; only the rows of one are decoded at a time."""
    corpus = _corpus(spec.corpus)
    pieces = []
    for part, start, stop in window.pieces:
        table = training_rows(corpus, spec.parts[part], spec.selection)
        pieces.append(table.slice(start, stop - start))
    table, order = pa.concat_tables(pieces), spec.plan.shuffle(number, window)
    size, rows = spec.plan.batch_size, slice_rows(spec.plan.batch_size, spec.world)
    share = slice_rows(size, world)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        tags = {"epoch": number, "step": window.first_step + start // size, "batch_rows": len(batch)}
        for rank in range(world):
            mine = table.take(pa.array(batch[rank * share : (rank + 1) * share]))
            columns = {
                "labels": bytes_matrix(mine.column("labels")), "inputs": _inputs(corpus, mine, spec, number, scan)
            }  # fmt: skip
            laid = {name: bytes_column(_padded(values, rows)) for name, values in columns.items()}
            laid |= {name: pa.array(np.full(rows, value, dtype=np.int64)) for name, value in tags.items()}
            yield pa.table({"real": np.arange(rows) < len(mine), **laid})


def _inputs(corpus: Corpus, rows: pa.Table, spec: StreamSpec, number: int, scan: bool) -> NDArray[np.uint8]:
    """What the loop gets of some rows, as bytes [n, of a row]."""
    inputs = corpus.inputs(rows, spec.shape[-1], spec.resize)
    if not scan and len(rows) and inputs.ndim == 4:
        seeds = row_seeds(spec.plan.seed, number, rows.column("id").to_pylist())
        inputs = augment(inputs, spec.augmentation, seeds)
    row_bytes = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
    return np.ascontiguousarray(inputs).view(np.uint8).reshape(len(rows), row_bytes)


def _padded(values: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """`rows` rows, zeros after those that there are."""
    return np.concatenate([values, np.zeros((rows - len(values), values.shape[1]), np.uint8)])


@lru_cache(maxsize=4)
def _corpus(url: str) -> Corpus:
    return open_corpus(url, None)  # or its features


def training_rows(corpus: Corpus, part: str, selection: Selection) -> pa.Table:
    """The training rows of a part; `labels` becomes one fixed-size binary of int8 [c] in {0, 1, -1}."""
    table = selection.take(corpus.read_part(corpus.manifest.record(part)))
    column = bytes_column(selection.labels(corpus, table))
    return table.set_column(table.column_names.index("labels"), "labels", column)


class StreamSlices(SliceSource):
    """A worker's end of the stream: Ray Train's shards of the two datasets."""

    def __init__(self, spec: StreamSpec, train: Any, scan: Any, num_classes: int) -> None:
        self.plan, self.spec, self.num_classes = spec.plan, spec, num_classes
        self._train, self._scan = train, scan
        self._running: Iterator[tuple[int, Slice]] | None = None

    def epoch(self, number: int, first_step: int) -> Iterator[Slice]:
        if self._running is None:
            self._running = self._read(self._train)
        for _ in range(first_step, self.plan.steps):
            piece = next(self._running, None)
            while piece is not None and (piece[0], piece[1].step) < (number, first_step):
                piece = next(self._running, None)
            if piece is None:
                return
            if piece[0] != number:
                raise RunError(f"the data stream gave epoch {piece[0]} where epoch {number} was due")
            yield piece[1]

    def scan(self) -> Iterator[tuple[NDArray[Any], NDArray[np.int8]]]:
        for _, piece in self._read(self._scan):
            yield piece.inputs, piece.labels

    def _read(self, shard: Any) -> Iterator[tuple[int, Slice]]:
        rows = slice_rows(self.plan.batch_size, self.spec.world)
        for table in shard.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2):
            steps = set(table.column("step").to_pylist())
            if len(table) != rows or len(steps) != 1:
                raise CorruptArtifact(f"a slice of {len(table)} rows of steps {sorted(steps)}; expected {rows} of one")
            number, step = table.column("epoch")[0].as_py(), table.column("step")[0].as_py()
            total = table.column("batch_rows")[0].as_py()
            real = table.filter(table.column("real"))
            inputs = bytes_matrix(real.column("inputs")).view(self.spec.dtype).reshape(len(real), *self.spec.shape)
            labels = bytes_matrix(real.column("labels")).view(np.int8)
            yield number, Slice(step, inputs, labels, total)

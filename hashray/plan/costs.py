"""What the stages ahead will cost: arithmetic on what a sample measured. No Ray.

Every bound (rows of a part, bytes of a window, rows of a shard) comes from the file that applies it. Requests are
counted from what a stage asks of the store for each of its parts, shards and windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise

from pydantic import Field

from hashray.config import Config
from hashray.data.listed import cut_parts
from hashray.train.batches import WINDOW_BYTES, EpochPlan

MOST_TILED = 100_000  # rows and parts that are laid out one by one; more are in proportion
HOUR_S, DAY_S, MONTH_S = 3600, 86_400, 30 * 86_400
GB = 1_000_000_000
REQUESTS = 1000  # that a price is for
PART_COPIES = 4  # of a part's images in a worker of ingest: fetched, as a column, in the file's buffer, sent
READ_COPIES = 2  # of a part in a worker that reads it: the file and its table
SHARD_COPIES = 3  # of a shard in its task: as read, sorted, serialised
DECODED_COPIES = 2  # of an image: as decoded, and after a conversion
FILES_A_PART = 3
ROW_SCANS = 3  # of all row tables before a training
RAY_START_S, RAY_PART_S = 12.0, 0.026  # CPU seconds of Ray 2.60 and its driver, on an Intel Xeon of 2025
RECORD_COPIES = 2  # of a part's records in the driver: as parts, and in the manifest


class Prices(Config):
    """What things cost, in one currency."""

    currency: str = Field("USD", description="Name of the currency")
    cpu_hour: float = Field(0.0, ge=0, description="Price of a core for an hour")
    gpu_hour: float = Field(0.0, ge=0, description="Price of a GPU for an hour")
    gb_month: float = Field(0.0, ge=0, description="Price of 10^9 bytes in the store for a month")
    reads_1000: float = Field(0.0, ge=0, description="Price of 1,000 requests that read")
    writes_1000: float = Field(0.0, ge=0, description="Price of 1,000 requests that write or list")


@dataclass(frozen=True)
class Sample:
    """What was measured on a few rows.

    Attributes:
        rows: how many.
        sizes: bytes of their encoded images.
        decoded_bytes: of the largest image, decoded.
        row_bytes, image_bytes, feature_bytes, code_bytes: a row, in the files of these.
        shard_bytes, ids_bytes: a row, in a searcher.
        list_s, ingest_s, decode_s, forward_s, step_s, index_s: seconds of one core a row: to list it; to fetch, check
            and keep it; to decode it to the trunk's pixels; of the trunk and head, forward; the same, a step of
            training, or of the head alone where the trunk is frozen; to build it into a shard.
        search_s: for one query and one code. pair_s: to score one query and one row.
        read_part_s: to read the row table of a part. start_s: of one process, to import what it needs.
        record_bytes: of one file of an artifact, in the driver.
        base_bytes: resident, of a process without a network. trunk_bytes: of one that has run the trunk.
        on_gpu: whether forward_s and step_s are seconds of a GPU.
    """

    rows: int
    sizes: tuple[int, ...]
    decoded_bytes: int
    row_bytes: float
    image_bytes: float
    feature_bytes: float
    code_bytes: float
    shard_bytes: float
    ids_bytes: float
    list_s: float
    ingest_s: float
    decode_s: float
    forward_s: float
    step_s: float
    index_s: float
    search_s: float
    pair_s: float
    read_part_s: float
    start_s: float
    record_bytes: float
    base_bytes: int
    trunk_bytes: int
    on_gpu: bool = False

    @property
    def mean_bytes(self) -> float:
        """Of an encoded image."""
        return sum(self.sizes) / max(1, len(self.sizes))


@dataclass(frozen=True)
class Work:
    """What will be done.

    Attributes:
        stages: their names, in order.
        rows, train, database, queries: rows of the whole corpus and of its splits.
        parts: of the corpus. part_bytes: of the images of its largest part.
        one_object_a_row: whether ingest fetches each image by a request of its own.
        blocks: files of listed rows.
        epochs: over all phases. in_memory: whether each training worker holds all training rows.
        frozen: whether features are computed once and then trained on and encoded from.
        row_inputs: bytes of a training row in memory.
        shards: of the index.
        codes: number of bits. scenarios: rankings that are scored. sample_rows: most rows of an evaluation's sample.
        on_ray: names of the stages that start worker processes.
        workers: of every stage but training. train_workers, batch_size, window_rows: of the training.
    """

    stages: tuple[str, ...]
    rows: int
    train: int
    database: int
    queries: int
    parts: int
    part_bytes: int
    one_object_a_row: bool
    blocks: int
    epochs: int
    in_memory: bool
    frozen: bool
    row_inputs: int
    shards: int
    num_bits: int
    scenarios: int
    sample_rows: int
    on_ray: tuple[str, ...]
    workers: int
    train_workers: int
    batch_size: int
    window_rows: int


@dataclass(frozen=True)
class Stage:
    """The cost of one stage: what it is made of, seconds of cores, bytes that stay in the store, requests.

    `start_s` is for the start of its processes, on top of what grows with rows.
    """

    name: str
    rows: int
    units: int
    unit: str
    workers: int
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    disk_bytes: int = 0
    reads: int = 0
    writes: int = 0
    start_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """Seconds with all workers busy: cores and GPUs take turns at worst."""
        return (self.cores_s + self.gpu_s) / self.workers

    @property
    def cores_s(self) -> float:
        """Seconds of one core, the start of processes among them."""
        return self.cpu_s + self.start_s

    def price(self, prices: Prices) -> float:
        """Money for cores, GPUs and requests."""
        time = self.cores_s / HOUR_S * prices.cpu_hour + self.gpu_s / HOUR_S * prices.gpu_hour
        return time + self.reads / REQUESTS * prices.reads_1000 + self.writes / REQUESTS * prices.writes_1000


@dataclass(frozen=True)
class Role:
    """The memory of one process of a kind, and how many of them run at once."""

    name: str
    bytes: int
    at_once: int = 1


@dataclass(frozen=True)
class Costs:
    """Everything that was worked out.

    Attributes:
        window_bytes: of the encoded images that a task of a stream holds at once.
        query_s: of one query on one core, over all shards.
    """

    stages: list[Stage]
    roles: list[Role]
    window_bytes: int
    query_s: float
    notes: list[str] = field(default_factory=list)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def wall_s(self) -> float:
        return sum(stage.wall_s for stage in self.stages)


def lay_out_parts(
    sizes: Sequence[int], rows: int, block_rows: int, rows_per_part: int, part_bytes: int
) -> tuple[int, int]:
    """How many parts ingest makes of `rows` rows with images of these sizes, and the bytes of the largest.

    Ingest cuts each file of listed rows by itself.

    >>> lay_out_parts([10], rows=25, block_rows=10, rows_per_part=4, part_bytes=1000)
    (8, 40)
    """
    parts = largest = 0
    full, rest = divmod(rows, block_rows)
    for count, times in ((block_rows, full), (rest, 1)):
        if not (count and times):
            continue
        tiled = list(islice(cycle(sizes), min(count, max(MOST_TILED, 4 * rows_per_part))))
        starts = cut_parts(tiled, rows_per_part, part_bytes)
        largest = max(largest, *(sum(tiled[start:stop]) for start, stop in pairwise([*starts, len(tiled)])))
        each = len(starts) if len(tiled) == count else math.ceil(count * (len(starts) - 1) / starts[-1])
        parts += each * times
    return parts, largest


def lay_out_windows(work: Work, mean_bytes: float) -> tuple[int, int, int]:
    """Windows of one epoch, the pieces of parts they are made of, and the bytes of the largest, by `EpochPlan`."""
    parts = min(work.parts, work.train) or 1
    tiled = min(parts, MOST_TILED // 10)
    rows = work.train * tiled // parts
    counts = tuple(rows * (i + 1) // tiled - rows * i // tiled for i in range(tiled))
    sizes = tuple(int(count * mean_bytes) for count in counts)
    windows = EpochPlan(counts, work.batch_size, work.window_rows, 0, sizes).windows(0)
    scale = parts / tiled
    pieces = sum(len(window.pieces) for window in windows)
    largest = max((window.rows for window in windows), default=0) * mean_bytes
    return math.ceil(len(windows) * scale), math.ceil(pieces * scale), int(largest)


def work_out(sample: Sample, work: Work) -> Costs:
    """The cost of every stage in `work.stages`, and the memory of every role in them."""
    windows, pieces, window_bytes = lay_out_windows(work, sample.mean_bytes)
    makers = {"ingest": _ingest, "features": _features, "encode": _encode, "index": _index, "evaluate": _evaluate}
    stages = [
        _with_processes(
            _train(sample, work, windows, pieces) if name == "train" else makers[name](sample, work), sample, work
        )
        for name in work.stages
    ]
    streams = "train" in work.stages and not work.in_memory
    window = min(window_bytes, WINDOW_BYTES * 2) if streams else 0
    return Costs(stages, _roles(sample, work, window), window, sample.search_s * work.database)


def _with_processes(stage: Stage, sample: Sample, work: Work) -> Stage:
    """The stage with the start of its processes, and with what Ray does for each of its parts."""
    if stage.name not in work.on_ray:
        return replace(stage, start_s=sample.start_s)
    units = stage.units if stage.name == "train" else work.parts
    start_s = (1 + stage.workers) * sample.start_s + RAY_START_S
    return replace(stage, cpu_s=stage.cpu_s + units * RAY_PART_S, start_s=start_s)


def _ingest(sample: Sample, work: Work) -> Stage:
    # A part: its block, its images (of Parquet: a footer and a column, perhaps in two pieces), its hashes twice.
    images = work.rows if work.one_object_a_row else 3 * work.parts
    return Stage(
        "ingest", work.rows, work.parts, "parts", work.workers,
        cpu_s=work.rows * (sample.list_s + sample.ingest_s),
        disk_bytes=int(work.rows * (sample.row_bytes + sample.image_bytes)),
        reads=images + 3 * work.parts, writes=4 * work.parts + 2 * work.blocks + 3,
    )  # fmt: skip


def _features(sample: Sample, work: Work) -> Stage:
    return Stage(
        "features", work.rows, work.parts, "parts", work.workers, work.rows * sample.decode_s + _cpu(sample, work.rows),
        _gpu(sample, work.rows), int(work.rows * (sample.row_bytes + sample.feature_bytes)),
        reads=2 * work.parts, writes=3 * work.parts + 3,
    )  # fmt: skip


def _train(sample: Sample, work: Work, windows: int, pieces: int) -> Stage:
    steps, decodes = work.train * work.epochs, 1 if work.in_memory else work.epochs
    seconds = 0.0 if sample.on_gpu else steps * sample.step_s
    seconds += ROW_SCANS * work.parts * sample.read_part_s
    if not work.frozen:
        seconds += work.train * decodes * sample.decode_s * (work.train_workers if work.in_memory else 1)
    reads = 2 * work.parts * work.train_workers if work.in_memory else 2 * pieces * work.epochs
    units, unit = (1, "set in memory") if work.in_memory else (windows, "windows")
    return Stage(
        "train", work.train, units, unit, work.train_workers, seconds,
        steps * sample.step_s if sample.on_gpu else 0.0, reads=reads + work.parts, writes=2 * work.epochs + 4,
    )  # fmt: skip


def _encode(sample: Sample, work: Work) -> Stage:
    return _coded("encode", sample, work, work.database, work.parts)


def _coded(name: str, sample: Sample, work: Work, rows: int, parts: int) -> Stage:
    """Rows to codes: through the trunk, or from cached features by the head alone."""
    cpu_s, gpu_s = rows * sample.decode_s + _cpu(sample, rows), _gpu(sample, rows)
    if work.frozen and "features" in work.stages:
        cpu_s, gpu_s = rows * sample.step_s, 0.0
    size = int(rows * sample.code_bytes)
    return Stage(name, rows, parts, "parts", work.workers, cpu_s, gpu_s, size, 2 * parts, 2 * parts + 3)


def _index(sample: Sample, work: Work) -> Stage:
    return Stage(
        "index", work.database, work.shards, "shards", min(work.workers, work.shards), work.database * sample.index_s,
        disk_bytes=int(work.database * (sample.shard_bytes + sample.ids_bytes)),
        reads=work.parts + work.shards, writes=3 * work.shards + 3,
    )  # fmt: skip


def _evaluate(sample: Sample, work: Work) -> Stage:
    queries = _coded("evaluate", sample, work, work.queries, min(work.parts, work.queries))
    pairs = work.queries * work.database * work.scenarios
    return Stage(
        "evaluate", work.database, work.parts, "parts", work.workers, queries.cpu_s + pairs * sample.pair_s,
        queries.gpu_s, queries.disk_bytes, queries.reads + 2 * work.parts * work.scenarios, queries.writes + 10,
    )  # fmt: skip


def _cpu(sample: Sample, rows: int) -> float:
    return 0.0 if sample.on_gpu else rows * sample.forward_s


def _gpu(sample: Sample, rows: int) -> float:
    return rows * sample.forward_s if sample.on_gpu else 0.0


def _roles(sample: Sample, work: Work, window_bytes: int) -> list[Role]:
    """Memory of the processes of the stages ahead."""
    shard_rows = -(-work.database // work.shards)
    each = sample.shard_bytes + sample.ids_bytes
    codes_of_part = -(-work.rows // work.parts) * sample.code_bytes
    inputs = work.train * work.row_inputs * 2 if work.in_memory else 0
    tables = work.scenarios * work.queries * 2 * (work.num_bits + 1) * 8
    kept = min(work.sample_rows, work.database) * (
        sample.code_bytes + sample.row_bytes + 2 * sample.feature_bytes
    )  # fmt: skip
    records = int(work.parts * FILES_A_PART * RECORD_COPIES * sample.record_bytes)
    decoded = DECODED_COPIES * sample.decoded_bytes
    roles = {
        "ingest": [Role("ingest worker", sample.base_bytes + PART_COPIES * work.part_bytes + decoded, work.workers)],
        "train": [
            Role("training worker", sample.trunk_bytes + inputs, work.train_workers),
            *([Role("stream task", sample.base_bytes + READ_COPIES * window_bytes + decoded, work.workers)]
              if window_bytes else []),
        ],
        "encode": [Role("encode worker", sample.trunk_bytes + READ_COPIES * work.part_bytes + decoded, work.workers)],
        "index": [
            Role("index task", int(sample.base_bytes + SHARD_COPIES * shard_rows * each + codes_of_part),
                 min(work.workers, work.shards)),
            Role("searcher", int(sample.base_bytes + work.database * each)),
        ],
        "evaluate": [Role("evaluation driver", int(sample.trunk_bytes + tables + kept))],
    }  # fmt: skip
    return [
        Role("driver", sample.base_bytes + records),
        *(role for name in work.stages for role in roles.get(name, [])),
    ]

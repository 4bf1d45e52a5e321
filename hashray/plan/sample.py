"""[Ray] The sample that a plan measures: a few rows of a source or a corpus, taken here through what each stage does.

Seconds are those of one core (`time.process_time`), so that other work on the machine does not change them much; of a
GPU they are wall seconds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hashray import artifact
from hashray.artifact import FileRecord, Manifest, read_table, sha256_hex, table_bytes
from hashray.codes import binarize
from hashray.data import listed
from hashray.data.columns import bytes_column, list_column
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA, Corpus, iterate_bytes
from hashray.data.images import decode
from hashray.data.ingest import IngestWorker, Reading
from hashray.data.listing import Format, SourceConfig, SourceRow, Unit, look, read_class_names
from hashray.data.sources import Meaning, fetch, guess_format, read_values, scan, units_of
from hashray.data.splits import SplitRule
from hashray.encode.features import map_part
from hashray.engine.parts import PartRunner
from hashray.errors import InputError
from hashray.index import shard
from hashray.methods.base import Method
from hashray.metrics import mean_average_precision
from hashray.plan.costs import Sample
from hashray.storage import join, open_store
from hashray.train.local import torch_threads

SCANNED_FILES = 3  # of a source of tars or Parquet files
SCANNED_IMAGES = 20_000  # files of a folder
KEPT_ROWS = 10_000  # whose labels are looked at
SHARE, FEWEST, MOST = 100, 64, 512  # one row in a hundred is measured, within these bounds
STEP_ROWS, CODES, QUERIES, SCORED = 64, 50_000, 32, 10_000
RECORDS = 500
TRIALS = 3


@dataclass(frozen=True)
class Listing:
    """What a look at a source gives.

    Attributes:
        rows: of the whole source, in proportion to what was scanned.
        exact: whether all of it was scanned.
        picks: some of its rows, evenly spaced.
        tally: how often each value and given split occur among `table_rows` rows. meaning: of the values.
        size_bytes: of its files; 0 where that does not matter.
        list_s: seconds a row.
    """

    format: Format
    rows: int
    exact: bool
    picks: list[SourceRow]
    tally: listed.Tally
    table_rows: int
    meaning: Meaning
    size_bytes: int
    list_s: float


class Image(NamedTuple):
    """One row of a sample."""

    id: str
    data: bytes
    uri: str | None


def sample_size(rows: int) -> int:
    """Rows that are measured: one in a hundred, at least 64 and at most 512, or all there are.

    >>> [sample_size(rows) for rows in (10, 1000, 20_000, 1_000_000)]
    [10, 64, 200, 512]
    """
    return min(rows, max(FEWEST, min(MOST, rows // SHARE)))


def look_at_source(url: str, reader: SourceConfig, most_files: int) -> Listing:
    """List a share of a source, and say in proportion how many rows there are.

    Raises:
        InputError: nothing there, or no image in it.
    """
    survey = look(url, most_files)
    kind, complete = reader.format or guess_format(survey), survey.complete
    names = read_class_names(reader.class_names)
    if complete or kind != "folder":
        survey, units = units_of(survey, kind)
        complete = True
    else:
        units = [Unit(0, tuple(survey.sizes.items()))]
    sized = [pair for unit in units for pair in unit.keys]
    most = {"folder": SCANNED_IMAGES, "list": len(sized)}.get(kind, SCANNED_FILES)
    unit = units[0]._replace(keys=tuple(_spaced(sized, most)))
    whole, share = (len(keys) if kind == "folder" else sum(size for _, size in keys) for keys in (sized, unit.keys))
    start_s = time.process_time()
    seen, rows = scan(url, survey.is_file, kind, unit, reader, len(names) if names else None)
    count, kept = _thinned(rows)
    if not count:
        raise InputError(f"{url} ({kind}): no images in the {len(unit.keys)} files that were looked at")
    scan_s, start_s = time.process_time() - start_s, time.process_time()
    (table,) = listed.to_tables(kept, 0, kind == "folder", len(kept), lambda chunk: None)
    list_s = scan_s / count + (time.process_time() - start_s) / len(kept)
    tally = listed.tally(table)
    first: dict[str, str] = {}
    for (value, _), group in tally.items():
        first.setdefault(value, group.place)
    survey.add(seen)
    meaning = read_values(survey, kind, first, len(names) if names else None, reader.labels)
    if names:
        meaning = meaning._replace(class_names=names)
    all_rows, size_bytes = count if share == whole else round(count * whole / share), sum(size for _, size in sized)
    exact = complete and share == whole
    return Listing(kind, all_rows, exact, kept, tally, len(table), meaning, size_bytes, list_s)


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[len(items) * i // count] for i in range(count)]


def _thinned(rows: Iterator[SourceRow]) -> tuple[int, list[SourceRow]]:
    """How many rows there are, and every k-th of them: at most twice KEPT_ROWS."""
    count, step, kept = 0, 1, list[SourceRow]()
    for row in rows:
        if count % step == 0:
            kept.append(row)
            if len(kept) == 2 * KEPT_ROWS:
                kept, step = kept[::2], 2 * step
        count += 1
    return count, kept


def fetch_rows(picks: Sequence[SourceRow], count: int) -> list[Image]:
    """Fetch the images of some rows; one that cannot be fetched is left out, as ingest leaves it out."""
    images = []
    for row in _spaced(picks, count):
        try:
            images.append(Image(row.id, fetch(row.locator), row.locator))
        except (InputError, ValueError):
            continue
    return images


def read_rows(corpus: Corpus, count: int) -> list[Image]:
    """Images of some rows of a corpus, from a few of its parts."""
    parts = _spaced(corpus.parts, 4)
    images: list[Image] = []
    for record in parts:
        table = corpus.read_part(record)
        table = table.take(pa.array(_spaced(range(len(table)), -(-count // len(parts))), pa.int64()))
        uris = table.column("uri").to_pylist()
        for (row_id, data), uri in zip(iterate_bytes(table), uris, strict=True):
            if isinstance(data, bytes):
                images.append(Image(row_id, data, uri))
    return images[:count]


@torch_threads(1)
def measure(
    images: Sequence[Image],
    method: Method,
    batch_rows: int,
    keep_bytes: bool,
    list_s: float,
    base: Base,
    gpu: bool,
) -> Sample:
    """Take the images through what the stages do with them.

    Args:
        method: the network to train or to encode with.
        batch_rows: rows that encoding takes at a time.
        keep_bytes: whether the corpus keeps images, or only their places.
        list_s: seconds to list a row.
        base: a process before it works.

    Raises:
        InputError: no image of the sample can be decoded.
    """
    config, num_bits = method.trunk.config, int(method.config.num_bits)
    ingested = _ingested(images, keep_bytes)
    pixels: list[Any] = []

    def mapped(compute: Callable[[Any], Any]) -> float:
        table, size = ingested.table, config.image_size
        work = partial(map_part, table, size, config.framing, compute, batch_rows, lambda count: None)
        return _timed(work)[1] / len(table)

    def keep(batch: Any) -> Any:
        pixels.append(batch)
        return np.zeros((len(batch), 1), np.float32)

    count, decode_s = len(ingested.table), mapped(keep)
    forward_s, step_s = _network(method, np.concatenate(pixels)[:count], batch_rows, gpu)
    if not gpu:  # with the next batch decoded meanwhile, as a worker does
        with torch.inference_mode():
            coded = mapped(lambda batch: binarize(method.logits(torch.as_tensor(batch))))
        forward_s = max(forward_s, coded - decode_s)
    features = np.random.default_rng(0).standard_normal((count, method.trunk.feature_dim)).astype(np.float32)
    coded = pa.table({"id": ingested.table.column("id"), "code": bytes_column(_codes(count, num_bits))})
    files = [table_bytes(table) for table in (pa.table({"feature": list_column(features)}), coded)]
    feature_bytes, code_bytes = (len(file) / count for file in files)
    length = pc.mean(pc.binary_length(ingested.table.column("id"))).as_py()
    shard_bytes, ids_bytes, index_s, search_s = _indexed(round(length), num_bits)
    return Sample(
        rows=len(images), sizes=tuple(len(image.data) for image in images), decoded_bytes=ingested.decoded_bytes,
        row_bytes=ingested.row_bytes, image_bytes=ingested.image_bytes, feature_bytes=feature_bytes,
        code_bytes=code_bytes, shard_bytes=shard_bytes, ids_bytes=ids_bytes, list_s=list_s,
        ingest_s=ingested.row_s, decode_s=decode_s, forward_s=forward_s, step_s=step_s, index_s=index_s,
        search_s=search_s, pair_s=_scored(num_bits, method.num_classes), read_part_s=ingested.read_part_s,
        start_s=base.start_s, record_bytes=_record_bytes(), base_bytes=base.bytes,
        trunk_bytes=psutil.Process().memory_info().rss, on_gpu=gpu,
    )  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its least seconds in some trials."""
    seconds, result = list[float](), None
    for _ in range(TRIALS):
        start_s = time.process_time()
        result = work()
        seconds.append(time.process_time() - start_s)
    return result, min(seconds)


class _Ingested(NamedTuple):
    """A part as ingest makes it of the sample: its rows with their images; bytes and seconds a row."""

    table: pa.Table
    decoded_bytes: int
    row_bytes: float
    image_bytes: float
    row_s: float
    read_part_s: float


def _ingested(images: Sequence[Image], keep_bytes: bool) -> _Ingested:
    """Take the sample through the worker of ingest.

    Raises:
        InputError: no image can be decoded.
    """
    with tempfile.TemporaryDirectory(prefix="hashray-plan-") as folder:
        store, rows = open_store(folder), []
        for number, image in enumerate(images):
            if image.uri is None:
                store.write(f"images/{number}", image.data)
            locator = image.uri or join(store.url, f"images/{number}")
            rows.append(SourceRow(image.id, locator, None, None, len(image.data)))
        (table,) = listed.to_tables(rows, 0, False, len(rows), lambda chunk: None)
        store.write("listed.parquet", listed.to_bytes(table, [0]))
        reading = Reading(store.url, {"null": (0,)}, {}, SplitRule("database+train"), keep_bytes, store, "hashes/")
        runner = PartRunner(IngestWorker, {"reading": reading}, store, "plan")
        unit = {"index": 0, "rows": len(rows), "block": "listed.parquet", "group": 0}
        part, seconds = _timed(lambda: runner.run(unit, lambda count: None))
        if not part.file.rows:
            raise InputError(f"none of the {len(rows)} images of the sample can be decoded; `hashray ingest` says why")
        read, read_part_s = _timed(lambda: read_table(store, part.file))
        both = pa.Table.from_arrays(
            [*read.columns, *read_table(store, part.beside[0]).columns], [*ROW_SCHEMA.names, *IMAGE_SCHEMA.names]
        )
        shapes = [decode(data).size for _, data in iterate_bytes(both) if isinstance(data, bytes)]
        largest = max(3 * width * height for width, height in shapes)
        sizes = (part.file.bytes / part.file.rows, part.beside[0].bytes / part.file.rows)
        return _Ingested(both, largest, *sizes, seconds / len(rows), read_part_s)


def _network(method: Method, pixels: Any, batch_rows: int, gpu: bool) -> tuple[float, float]:
    """Seconds a row: forward, and forward and backward; of the head alone where the trunk is frozen."""
    device = torch.device("cuda" if gpu else "cpu")
    method = method.to(device)
    inputs = torch.as_tensor(pixels, device=device)

    def clock() -> float:
        if gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def seconds(work: Callable[[Any], Any], rows: Any, size: int) -> float:
        work(rows[:size])  # the first one also allocates
        start = clock()
        for first in range(0, len(rows), size):
            work(rows[first : first + size])
        return (clock() - start) / len(rows)

    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]

    def step(rows: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        method.logits(rows).square().mean().backward()
        optimizer.step()

    with torch.inference_mode():
        forward_s = seconds(method.eval().logits, inputs, batch_rows)
    if not trained:
        return forward_s, 0.0
    if method.trunk.config.frozen:
        inputs = torch.randn(len(pixels), method.trunk.feature_dim, device=device)
    method.train()
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    step_s = seconds(step, inputs[:STEP_ROWS], STEP_ROWS)
    method.eval()
    return forward_s, step_s


def _codes(rows: int, num_bits: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (rows, num_bits // 8), dtype=np.uint8)


def _indexed(id_length: int, num_bits: int) -> tuple[float, float, float, float]:
    """Bytes a row of codes and of ids in a searcher; seconds to index a row, and to search one query and code."""
    width = max(id_length, len(str(CODES)))
    ids, codes = pa.array([f"{i:0{width}d}" for i in range(CODES)]), _codes(CODES, num_bits)
    with tempfile.TemporaryDirectory(prefix="hashray-plan-") as folder:
        store = open_store(folder)
        start_s = time.process_time()
        written = shard.write_shard(store, ids, codes, "flat")
        index_s = (time.process_time() - start_s) / CODES
        code_file, id_file = written.files
        path = store.local_path(code_file.name)
        assert path is not None, "a local store has paths"
        opened = shard.open_shard(path, "flat", num_bits, CODES)
        _, search_s = _timed(lambda: opened.search(codes[:QUERIES], 10))
        ids_bytes = max(id_file.bytes / CODES, width + 4)
        return code_file.bytes / CODES, ids_bytes, index_s, search_s / CODES / QUERIES


def _scored(num_bits: int, num_classes: int) -> float:
    """Seconds to score one query and one row."""
    labels = np.zeros((SCORED, max(1, num_classes)), np.uint8)
    labels[np.arange(SCORED), np.arange(SCORED) % labels.shape[1]] = 1
    codes = _codes(SCORED, num_bits)
    _, seconds = _timed(lambda: mean_average_precision(codes[:QUERIES], labels[:QUERIES], codes, labels))
    return seconds / QUERIES / SCORED


def _record_bytes() -> float:
    """Memory that the record of one file takes in the driver, with the manifest that is written of it."""
    tracemalloc.start()
    try:
        files = tuple(
            FileRecord(name=f"rows/part-{i:05d}-{i:08x}.parquet", bytes=i, sha256=sha256_hex(str(i).encode()), rows=i,
                       info={"splits": {"database": i, "query": i}, "image_bytes": i})
            for i in range(RECORDS)
        )  # fmt: skip
        artifact.canonical(
            Manifest(kind="corpus", project_version="0", config={}, parents={}, files=files).model_dump()
        )
        return tracemalloc.get_traced_memory()[1] / RECORDS
    finally:
        tracemalloc.stop()


class Base(NamedTuple):
    """A process that has imported what a stage needs: resident bytes and CPU seconds."""

    bytes: int
    start_s: float


def base_of(without: str, with_network: str) -> Base:
    """A process that imports modules ("a, b"): its memory before those with a network, its seconds after them."""
    code = f"import {without}, psutil, time; print(psutil.Process().memory_info().rss)"
    code += f"; import {with_network}; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    size, seconds = done.stdout.split()
    return Base(int(size), float(seconds))


def splits_of(rows: Mapping[tuple[Any, str], int]) -> Counter[str]:
    """Rows of each split, of counts by labels and split: a row of "database+train" is in both."""
    out = Counter[str]()
    for (_, word), count in rows.items():
        for split in word.split("+"):
            out[split] += count
    return out

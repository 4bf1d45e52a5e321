"""[Ray] The inventory of a source: every row listed by tasks, no image opened, no table of all rows in one process.

Tasks list the units of a source; each writes the rows of its unit as a file. A folder's and a list's rows are then
mixed: each of a second round of tasks gathers one share of the seeded order from all files, so that a training window
sees every class. Other sources keep their order. Either way a file's row groups are the parts of the corpus, and the
driver keeps per file the numbers of its parts and a tally of labels and splits: O(files + labels), never O(rows).
Equal ids are found by tasks too, each with one share of the hashes of all ids.
"""

from __future__ import annotations

import io
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hashray.artifact import sha256_hex
from hashray.data import listed
from hashray.data.images import image_endings
from hashray.data.listed import Tally, cut_parts
from hashray.data.listing import Format, SourceConfig, SourceRow, Survey, Unit, look, read_class_names
from hashray.data.lists import merge_rows
from hashray.data.sources import Meaning, guess_format, is_random_access, read_values, require_columns, scan, units_of
from hashray.data.splits import Candidates
from hashray.data.unique import SUSPECTS, Hashes, equal_hashes
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.tasks import run_tasks
from hashray.errors import HashrayError, InputError
from hashray.progress import Bar
from hashray.storage import Store, open_store, split_url

LISTED_AT_ONCE = 100_000  # files: above, tasks look at a folder's files
SHORT_BYTES = 64 << 20  # of containers: of small rows that is some millions
MIXED_ROWS = 250_000  # of a share of the seeded order
BLOCK_ROWS = 1 << 17  # of a file: what a listing task holds
EQUAL_ROWS = 8_000_000  # of a share of the hashes of ids: a task holds these, 64 MB
SIZE_THREADS = 16
COMPARED = {"parquet": "key", "folder": "fold"}  # formats in which ids may be equal, or look so, and by which hash
NO_HASHES = np.zeros(0, np.uint64)
SHOWN = 5


@dataclass(frozen=True)
class Block:
    """A file of listed rows, in the order of the corpus; each of its row groups is a part.

    `hashes` is a file of hashes of their ids, where equal ones must be looked for.
    """

    name: str
    part_rows: tuple[int, ...]
    hashes: str | None = None

    @property
    def digest(self) -> str:
        """A hash of what is in the file, wherever it stands."""
        return self.name.rpartition("/")[2]

    @property
    def rows(self) -> int:
        return sum(self.part_rows)


@dataclass(frozen=True)
class Inventory:
    """Every row of a source, listed, and what the rows add up to.

    Attributes:
        url: of the source.
        survey: the account of its files.
        store: holds the blocks.
        tally: how often each value (labels as the source has them) and given split occur.
        meaning: of the values.
        folder: of the store, for files of this run alone.
        twins: groups of file names that differ only in case or in how accents are encoded, some of them.
    """

    url: str
    format: Format
    survey: Survey
    store: Store
    blocks: tuple[Block, ...]
    tally: Tally
    meaning: Meaning
    pool: WorkersConfig
    short: bool
    folder: str
    twins: tuple[tuple[str, ...], ...] = ()

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)

    def smallest(self, count: int) -> list[tuple[str, Candidates]]:
        """The first `count` rows of each value in the seeded order, from each block."""
        jobs = {n: (self.store, block.name, count) for n, block in enumerate(self.blocks)}
        return [group for groups in self.each(_smallest, jobs, "draw", "blocks") for group in groups.items()]

    def copied_to(self, store: Store) -> Store:
        """The store of the blocks, where workers of other machines can read them: `store`."""
        if self.store != store:
            for block in self.blocks:
                store.write(block.name, self.store.read(block.name))
        return store

    def equal_ids(self, column: str) -> list[list[str]]:
        """Groups of equal ids ("key"), or of ids that differ only in case or accents ("fold"); not all, of many."""
        names, count = [block.hashes for block in self.blocks if block.hashes], -(-self.rows // EQUAL_ROWS)
        shares = {n: (self.store, names, (n, count)) for n in range(count)}
        suspects = np.concatenate([NO_HASHES, *self.each(_equal_hashes, shares, "compare ids", "shares")])
        if not len(suspects):
            return []
        blocks = {n: (self.store, block.name, column, suspects) for n, block in enumerate(self.blocks)}
        ids = self.each(_ids_of, blocks, "read equal ids", "blocks")
        return listed.equal_ids((row_id for some in ids for row_id in some), column)

    def each(self, function: Callable[..., Any], jobs: dict[int, tuple[Any, ...]], title: str, unit: str) -> list[Any]:
        """What tasks answer, in the order of the jobs."""
        out: dict[int, Any] = {}
        with Bar(title, len(jobs), unit) as bar:
            meter = Meter(bar, unit.removesuffix("s"))
            for number, answer in run_tasks(function, jobs, self.pool, self.short, meter):
                out[number] = answer
                meter.finish(number, 1)
        return [out[number] for number in sorted(out)]


@dataclass(frozen=True)
class _Listed:
    """A file of rows that a task wrote."""

    name: str
    part_rows: tuple[int, ...]
    tally: Tally
    hashes: str | None = None


@dataclass(frozen=True)
class _Plan:
    """What every listing task needs to know of the whole."""

    url: str
    is_file: bool
    format: Format
    reader: SourceConfig
    num_classes: int | None
    seed: int
    rows_per_part: int
    part_bytes: int
    store: Store
    folder: str

    def write(self, table: pa.Table, mixed: bool) -> _Listed:
        """Write rows in their last order, a row group a part; or, to be `mixed` later, sorted by key."""
        starts = None
        if not mixed:
            sizes = [size or 0 for size in table.column("size_bytes").to_pylist()]
            starts = cut_parts(sizes, self.rows_per_part, self.part_bytes)
        data = listed.to_bytes(listed.in_order(table) if mixed else table, starts)
        name, hashes = self._keep(data), None
        if not mixed and self.format in COMPARED:
            hashes = self._keep(listed.sorted_hashes(table, COMPARED[self.format]))
        counts = [stop - start for start, stop in pairwise([*(starts or [0]), len(table)])]
        return _Listed(name, tuple(counts), {} if mixed else listed.tally(table), hashes)

    def _keep(self, data: bytes) -> str:
        name = f"{self.folder}{sha256_hex(data)[:32]}.parquet"
        self.store.write(name, data)
        return name


@contextmanager
def take_inventory(
    source: str, reader: SourceConfig, seed: int, rows_per_part: int, part_bytes: int, pool: WorkersConfig, out: Store
) -> Iterator[Inventory]:
    """List every row of a source without opening an image. The files of rows are there while the block runs.

    Args:
        seed: of the order of rows.
        out: keeps the files of rows where tasks of other machines must read them.

    Raises:
        InputError: nothing there, no image in it, a malformed line, a label out of range, an id twice; with place
            and reason.
    """
    survey = look(source, LISTED_AT_ONCE)
    kind = reader.format or guess_format(survey)
    require_columns(reader, kind, source)
    names = read_class_names(reader.class_names)
    survey, units = units_of(survey, kind)
    size_bytes = 0 if kind == "folder" else sum(size for unit in units for _, size in unit.keys)
    short = size_bytes <= SHORT_BYTES and not any(unit.prefixes for unit in units)
    mine = f"progress/listed-{uuid.uuid4().hex}/"  # of this run alone: another may end while this one reads
    count = len(names) if names else None
    root = None if (path := out.local_path("manifest.json")) is None or path.parent.exists() else path.parent
    with tempfile.TemporaryDirectory(prefix="hashray-listed-") as folder:
        store = open_store(folder) if pool.runs_here(short) else out
        bounds = (seed, rows_per_part, part_bytes)
        plan = _Plan(source, survey.is_file, kind, reader, count, *bounds, store, mine)
        try:
            yield _take(plan, survey, units, names, pool, short)
        finally:
            store.clear(mine)
            out.clear(mine)
            if root is not None:  # what is refused leaves nothing, not even an empty folder
                with suppress(OSError):
                    root.rmdir()


def _take(
    plan: _Plan, survey: Survey, units: Sequence[Unit], names: list[str] | None, pool: WorkersConfig, short: bool
) -> Inventory:
    files = _list_units(plan, survey, units, pool, short)
    rows = sum(sum(file.part_rows) for file in files)
    if not rows:
        endings = ", ".join(image_endings()[:10])
        raise InputError(
            f"{plan.url} ({plan.format}) holds no images; image files end in {endings} or in what else Pillow decodes"
        )
    if is_random_access(plan.format):
        files = _mix(plan, files, rows, pool, short)
    labels = {sample: values[0] for sample, values in survey.elsewhere.items() if len(values) == 1}
    if labels:
        files = _join_labels(plan, files, labels)
    total: Tally = {}
    for file in files:
        listed.add_tally(total, file.tally)
    first: dict[str, str] = {}
    for (value, _), group in total.items():
        first.setdefault(value, group.place)
    meaning = read_values(survey, plan.format, first, plan.num_classes, plan.reader.labels)
    if names:
        meaning = meaning._replace(class_names=names)
    blocks = tuple(Block(file.name, file.part_rows, file.hashes) for file in files if file.part_rows)
    inventory = Inventory(plan.url, plan.format, survey, plan.store, blocks, total, meaning, pool, short, plan.folder)
    groups = inventory.equal_ids(COMPARED[plan.format]) if plan.format in COMPARED else []
    if plan.format == "parquet":
        _require_unique(groups)
    return replace(inventory, twins=tuple(tuple(sorted(group)) for group in sorted(groups)))


def _list_units(plan: _Plan, survey: Survey, units: Sequence[Unit], pool: WorkersConfig, short: bool) -> list[_Listed]:
    """List every unit by a task; add what was seen to the survey."""
    sizes = [_size_of(plan.format, unit) for unit in units]
    files: dict[int, list[_Listed]] = {}
    seen: dict[int, Survey] = {}
    with Bar("list", sum(sizes), "files" if plan.format == "folder" else "bytes") as bar:
        meter = Meter(bar, "share")
        jobs = {unit.number: (plan, unit) for unit in units}
        for number, result in run_tasks(_scan_unit, jobs, pool, short, meter):
            files[number], seen[number] = result
            meter.finish(number, sizes[number])
    for number in sorted(seen):
        survey.add(seen[number])
    return [file for number in sorted(files) for file in files[number]]


def _size_of(kind: Format, unit: Unit) -> int:
    """How much of a unit there is to list: files (unknown under prefixes: one each), or bytes."""
    return len(unit.keys) + len(unit.prefixes) if kind == "folder" else sum(size for _, size in unit.keys)


def _scan_unit(plan: _Plan, unit: Unit, advance: Callable[[int], None]) -> tuple[list[_Listed], Survey]:
    survey, rows = scan(plan.url, plan.is_file, plan.format, unit, plan.reader, plan.num_classes)

    def count(chunk: Sequence[SourceRow]) -> None:
        advance(len(chunk) if plan.format == "folder" else sum(row.size_bytes or 0 for row in chunk))

    mixed = is_random_access(plan.format)
    tables = listed.to_tables(rows, plan.seed, plan.format == "folder", BLOCK_ROWS, count)
    files = [plan.write(table, mixed) for table in tables]
    return files, replace(survey, keys=[], sizes={})


def _mix(plan: _Plan, files: Sequence[_Listed], rows: int, pool: WorkersConfig, short: bool) -> list[_Listed]:
    """Gather the rows of every share of the seeded order by a task."""
    count = -(-rows // MIXED_ROWS)
    names = [file.name for file in files]
    mixed: dict[int, _Listed] = {}
    with Bar("mix", rows, "rows") as bar:
        meter = Meter(bar, "share")
        jobs = {n: (plan, names, (n, count)) for n in range(count)}
        for number, file in run_tasks(_gather, jobs, pool, short, meter):
            mixed[number] = file
            meter.finish(number, sum(file.part_rows))
    return [mixed[n] for n in range(count)]


def _gather(plan: _Plan, names: Sequence[str], share: tuple[int, int], advance: Callable[[int], None]) -> _Listed:
    table = listed.in_order(_rows_between(plan.store, names, "key", share))
    table = listed.merge_equal(table, merge_rows) if plan.format == "list" else table
    sizes = table.column("size_bytes")
    if sizes.null_count:
        with ThreadPoolExecutor(SIZE_THREADS) as threads:
            known = zip(sizes.to_pylist(), table.column("locator").to_pylist(), strict=True)
            filled = list(threads.map(lambda pair: _size(pair[1]) if pair[0] is None else pair[0], known))
        place = table.column_names.index("size_bytes")
        table = table.set_column(place, "size_bytes", pa.array(filled, pa.int64()))
    return plan.write(table, mixed=False)


def _size(locator: str) -> int:
    folder, name = split_url(locator)
    try:
        return open_store(folder).size(name)
    except (HashrayError, ValueError):  # reading it will say what is wrong
        return 0


def _rows_between(store: Store, names: Sequence[str], column: str, share: tuple[int, int]) -> pa.Table:
    tables = []
    for name in names:
        with store.open(name, ranged=True) as handle:
            tables.append(listed.between(handle, column, share))
    return pa.concat_tables(tables)


def _join_labels(plan: _Plan, files: Sequence[_Listed], labels: Mapping[str, Any]) -> list[_Listed]:
    """Give labels to tar samples without one from other shards: where one label and one image have that name."""

    def sample(item: Mapping[str, Any]) -> str:
        key = item["locator"].rpartition("#")[0].removeprefix(f"{folder}/")
        return item["id"].removeprefix(f"{key}/")

    folder = open_store(split_url(plan.url)[0] if plan.is_file else plan.url).url
    tables = [pq.read_table(io.BytesIO(plan.store.read(file.name))) for file in files]
    bare = [
        [
            name if (name := sample(item)) in labels and item["value"] == "null" else None
            for item in listed.iterate(table)
        ]
        for table in tables
    ]
    counts = Counter(name for names in bare for name in names if name is not None)
    joined = []
    for table, names in zip(tables, bare, strict=True):
        values = [
            json.dumps(labels[name]) if name is not None and counts[name] == 1 else value
            for name, value in zip(names, table.column("value").to_pylist(), strict=True)
        ]
        place = table.column_names.index("value")
        table = table.set_column(place, "value", pa.array(values, pa.string()))
        joined.append(plan.write(table, mixed=False))
    return joined


def _require_unique(groups: Sequence[list[str]]) -> None:
    if groups:
        extra = sum(len(group) - 1 for group in groups)
        raise InputError(
            f"{'at least ' if len(groups) >= SUSPECTS else ''}{extra:,} ids occur more than once, for example "
            + ", ".join(f"{group[0]!r} ({len(group)} times)" for group in sorted(groups)[:SHOWN])
            + "; ids must be unique in a corpus"
        )


def _smallest(store: Store, name: str, count: int, advance: Callable[[int], None]) -> dict[str, Candidates]:
    return listed.smallest(pq.read_table(io.BytesIO(store.read(name)), columns=["id", "value", "key"]), count)


def _equal_hashes(store: Store, names: Sequence[str], share: tuple[int, int], advance: Callable[[int], None]) -> Hashes:
    return equal_hashes(_rows_between(store, names, "hash", share).column("hash").to_numpy().copy())


def _ids_of(store: Store, name: str, column: str, hashes: Hashes, advance: Callable[[int], None]) -> list[str]:
    table = pq.read_table(io.BytesIO(store.read(name)), columns=["id", column])
    return listed.ids_of(table, column, hashes)

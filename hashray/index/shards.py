"""[Ray] The shards of some codes: a task for each group of code parts, and every id one row of all groups.

A task reads the parts of its group, each once, sorts by id, builds and writes. For ivf, one task reads a few parts
before that, with four times the rows of the sample that trains the quantizer (64 rows a list). Memory: a task needs
three times its shard (ids and codes) and one part; the driver needs a record a shard.

A group's task leaves the hashes of its ids under progress/; then a task for each 32 million rows looks for equal hashes
among all groups, and the ids with these are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from hashray import artifact
from hashray.artifact import FileRecord, read_table
from hashray.codes import Codes
from hashray.data import unique
from hashray.data.columns import code_matrix
from hashray.data.unique import Hashes
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.tasks import run_tasks
from hashray.errors import AuditError, CorruptArtifact, InputError
from hashray.index import choose as choosing
from hashray.index import shard
from hashray.index.choose import Choice, Limits
from hashray.index.described import Described, aligned
from hashray.index.groups import Group, group_parts, sample_rows
from hashray.index.ids import check_unique, duplicate_ids, one_array, read_ids
from hashray.index.shard import SAMPLE_PER_LIST
from hashray.index.version import ShardRecord, write_content
from hashray.progress import Bar, say
from hashray.storage import Store, join

SHORT_ROWS = 1_000_000  # 8 MB of 64-bit codes: built here in less time than Ray takes to start


class BuiltGroup(BaseModel):
    """What a group's task has written: its shards, and the hashes of its ids in a file a bucket."""

    model_config = ConfigDict(frozen=True)

    shards: tuple[ShardRecord, ...]
    hashes: tuple[FileRecord, ...]

    @property
    def rows(self) -> int:
        """Rows of all its shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def files(self) -> list[FileRecord]:
        """Every file that was written."""
        return [*(file for shard in self.shards for file in shard.files), *self.hashes]


RecordT = TypeVar("RecordT", FileRecord, BuiltGroup, Choice)


@dataclass(frozen=True)
class ShardBuild:
    """The shards of some codes: the input of the tasks that build them, and the place of their records."""

    source: Store
    store: Store
    parts: Sequence[FileRecord]
    num_bits: int
    plan: str
    kind: str
    seed: int
    pool: WorkersConfig
    described: Described | None = None
    generation: int = 0

    def choose(self, num_shards: int, limits: Limits) -> Choice:
        """Return the kind and its settings; for ivf, its quantizer is written. A choice of an earlier run stands."""
        choice = self._read("choice", Choice)
        if choice is None:
            rows = [part.rows or 0 for part in self.parts]
            nlists = choosing.nlists(self._rows, num_shards)
            drawn = sample_rows(rows, choosing.sample_size(nlists), self.seed)
            sample = [(self.parts[part], picks) for part, picks in drawn]
            count = sum(len(picks) for _, picks in sample)
            with Bar("choose kind", count, "rows") as bar:
                meter = Meter(bar, "sample")
                job = (self.source, sample, self.num_bits, nlists, limits, self.seed)
                ((_, (choice, trained)),) = self._calls(_choose, {0: job}, meter)
                meter.finish(0, count)
            if trained is not None:
                self._write_quantizer(trained)
            self.store.write(self._key("choice"), choice.model_dump_json().encode())
        for line in choosing.lines(choice):
            say(line)
        return choice

    def run(self, num_shards: int, nlist: int) -> tuple[list[ShardRecord], FileRecord | None]:
        """Return the shards, and the file of the quantizer that is trained for them."""
        quantizer = (self._read("quantizer", FileRecord) or self._train(nlist)) if nlist else None
        return self.write(num_shards, quantizer), quantizer

    def write(self, num_shards: int, quantizer: FileRecord | None) -> list[ShardRecord]:
        """Return the shards, written with a quantizer that is there.

        Raises:
            InputError: an id stands in two rows.
        """
        groups = group_parts([part.rows or 0 for part in self.parts], num_shards)
        records = {n: self._read(_name(n, quantizer), BuiltGroup) for n in range(len(groups))}
        built = {n: record for n, record in records.items() if record}
        rows, done = self._rows, sum(record.rows for record in built.values())
        with Bar("build shards", rows, "rows", done=done) as bar:
            meter = Meter(bar, "group")
            for number, record in self._build(groups, built, quantizer, meter):
                built[number] = record
                meter.finish(number, record.rows)
        if len(groups) > 1:
            self._require_unique([built[n] for n in range(len(groups))])
        return [shard for n in range(len(groups)) for shard in built[n].shards]

    @property
    def _rows(self) -> int:
        return sum(part.rows or 0 for part in self.parts)

    def _train(self, nlist: int) -> FileRecord:
        seed = self.seed
        drawn = sample_rows([part.rows or 0 for part in self.parts], SAMPLE_PER_LIST * nlist, seed)
        sample = [(self.parts[part], picks) for part, picks in drawn]
        rows = sum(len(picks) for _, picks in sample)
        job = (self.source, sample, self.num_bits, nlist, seed)
        with Bar("train lists", rows, "rows") as bar:
            meter = Meter(bar, "quantizer")
            ((_, trained),) = self._calls(_train, {0: job}, meter)
            meter.finish(0, rows)
        return self._write_quantizer(trained)

    def _write_quantizer(self, trained: bytes) -> FileRecord:
        record = write_content(self.store, "quantizers", trained, None)
        self.store.write(self._key("quantizer"), record.model_dump_json().encode())
        return record

    def _build(
        self, groups: Sequence[Group], built: Mapping[int, Any], quantizer: FileRecord | None, meter: Meter
    ) -> Iterator[tuple[int, BuiltGroup]]:
        buckets = unique.num_buckets(self._rows) if len(groups) > 1 else 0
        jobs = {
            number: (
                self.source, self.store, [self.parts[part] for part in group.parts], group.shards, self.num_bits,
                self.kind, self._key(_name(number, quantizer)), buckets, self.generation,
                self.described, group.parts,
            )
            for number, group in enumerate(groups) if number not in built
        }  # fmt: skip
        if jobs:
            trained = artifact.read_file(self.store, quantizer) if quantizer else None
            for number, text in self._calls(_build_group, jobs, meter, trained):
                yield number, BuiltGroup.model_validate_json(text)

    def _require_unique(self, built: Sequence[BuiltGroup]) -> None:
        """Raise InputError where an id stands in two groups."""
        after = dict.fromkeys(range(len(built[0].hashes)), -1)
        with Bar("compare ids", self._rows, "rows") as bar:
            while after:
                meter, jobs = Meter(bar, "bucket"), {}
                for bucket, value in after.items():
                    jobs[bucket] = (self.store, [group.hashes[bucket] for group in built], value)
                suspects = dict(self._calls(_equal_hashes, jobs, meter))
                self._compare(built, np.concatenate([*suspects.values()]))
                after = {n: int(some[-1]) for n, some in suspects.items() if len(some) == unique.SUSPECTS}
            bar.at(self._rows)

    def _compare(self, built: Sequence[BuiltGroup], suspects: Hashes) -> None:
        """Raise InputError where ids with one of these hashes are equal: hardly ever are there any."""
        if not len(suspects):
            return
        files = [shard.ids for group in built for shard in group.shards]
        with Bar("compare ids", len(files), "shards") as bar:
            jobs = {n: (self.store, file) for n, file in enumerate(files)}
            answers = [ids for _, ids in self._calls(_ids_with, jobs, Meter(bar, "shard"), np.sort(suspects))]
        twice = unique.duplicates(answers)
        if twice:
            raise duplicate_ids(len(twice), twice[0])

    def _calls(
        self, function: Any, jobs: Mapping[int, tuple[Any, ...]], meter: Meter, *shared: Any
    ) -> Iterator[tuple[int, Any]]:
        return run_tasks(function, jobs, self.pool, self._rows <= SHORT_ROWS, meter, shared)

    def _read(self, name: str, model: type[RecordT]) -> RecordT | None:
        try:
            record = model.model_validate_json(self.store.read(self._key(name)))
        except (ValueError, InputError):  # half a record, or none: the work is done again
            return None
        files: Sequence[FileRecord] = (
            [] if isinstance(record, Choice) else record.files if isinstance(record, BuiltGroup) else [record]
        )
        there = (self.store.exists(file.name) and self.store.size(file.name) == file.bytes for file in files)
        return record if all(there) else None

    def _key(self, name: str) -> str:
        return f"progress/{self.plan}/{name}.json"


def _name(number: int, quantizer: FileRecord | None) -> str:
    """A group's record belongs to one quantizer: shards of two must never meet in one index."""
    return f"{number:06d}" + (f"-{quantizer.sha256[:12]}" if quantizer else "")


def _read_part(source: Store, part: FileRecord, columns: Sequence[str]) -> pa.Table:
    table = read_table(source, part, columns)
    if len(table) != part.rows:
        raise AuditError(f"{join(source.url, part.name)} holds {len(table):,} rows, its manifest says {part.rows}")
    return table


def _choose(
    source: Store,
    sample: Sequence[tuple[FileRecord, NDArray[np.int64]]],
    num_bits: int,
    nlists: Sequence[int],
    limits: Limits,
    seed: int,
    advance: Callable[[int], None],
) -> tuple[Choice, bytes | None]:
    """Read the rows of the sample from their parts, and measure the kinds on them."""
    return choosing.measure(_read_sample(source, sample, num_bits), nlists, limits, seed)


def _train(
    source: Store,
    sample: Sequence[tuple[FileRecord, NDArray[np.int64]]],
    num_bits: int,
    nlist: int,
    seed: int,
    advance: Callable[[int], None],
) -> bytes:
    """Read the rows of the sample from their parts, and train the quantizer on them."""
    return shard.train_quantizer(_read_sample(source, sample, num_bits), nlist, seed)


def _read_sample(source: Store, sample: Sequence[tuple[FileRecord, NDArray[np.int64]]], num_bits: int) -> Codes:
    codes = [code_matrix(_read_part(source, part, ["code"]).column("code"), num_bits)[picks] for part, picks in sample]
    return np.concatenate(codes)


def _build_group(
    source: Store,
    store: Store,
    parts: Sequence[FileRecord],
    num_shards: int,
    num_bits: int,
    kind: str,
    record_key: str,
    buckets: int,
    generation: int,
    described: Described | None,
    part_numbers: Sequence[int],
    quantizer: bytes | None,
    advance: Callable[[int], None],
) -> str:
    """Build and write the shards of a group of parts, then the hashes of its ids, then its record."""
    release = pa.default_memory_pool().release_unused  # Arrow keeps what it frees: as much again, after many parts
    ids, codes = _read_group(source, parts, num_bits, advance)
    release()
    order = pc.sort_indices(ids)
    ids = ids.take(order)  # here, where nothing else holds the ids as they were
    release()
    codes, order = codes[order.to_numpy()], None
    check_unique(ids)
    shards, attributes = [], aligned(described.read(part_numbers), ids) if described else None
    for number in range(num_shards):
        rows = slice(len(ids) * number // num_shards, len(ids) * (number + 1) // num_shards)
        some = None if attributes is None else attributes[rows]
        shards.append(shard.write_sorted(store, ids[rows], codes[rows], kind, quantizer, some, generation))
        release()
    hashes = [
        artifact.write_file(store, f"{record_key.removesuffix('.json')}-{bucket:04d}.u64", some.tobytes())
        for bucket, some in enumerate(unique.into_buckets(unique.hash_ids(ids), buckets) if buckets else [])
    ]
    text = BuiltGroup(shards=tuple(shards), hashes=tuple(hashes)).model_dump_json()
    store.write(record_key, text.encode())
    return text


def _read_group(
    source: Store, parts: Sequence[FileRecord], num_bits: int, advance: Callable[[int], None]
) -> tuple[pa.Array, Codes]:
    """Ids [n] and codes uint8 [n, num_bits // 8] of all rows of these parts."""
    codes, ids, start = np.empty((sum(part.rows or 0 for part in parts), num_bits // 8), np.uint8), [], 0
    for part in parts:
        table = _read_part(source, part, ["id", "code"])
        names = table.column("id")
        if names.null_count:
            raise CorruptArtifact(f"{join(source.url, part.name)}: {names.null_count} rows have no id")
        ids += names.cast(pa.string()).chunks
        codes[start : start + len(table)] = code_matrix(table.column("code"), num_bits)
        start += len(table)
        advance(len(table))
    return one_array(pa.chunked_array(ids, pa.string())), codes


def _equal_hashes(store: Store, files: Sequence[FileRecord], after: int, advance: Callable[[int], None]) -> Hashes:
    """Return the hashes above `after` that stand in more than one place of these files."""
    hashes = np.empty(sum(file.bytes for file in files) // 8, np.uint64)
    start = 0
    for file in files:
        some = np.frombuffer(artifact.read_file(store, file), np.uint64)
        hashes[start : start + len(some)] = some
        start += len(some)
        advance(len(some))
    return unique.equal_hashes(hashes, after)


def _ids_with(store: Store, file: FileRecord, hashes: Hashes, advance: Callable[[int], None]) -> list[str]:
    """Return the ids of a shard that have one of these hashes."""
    return unique.ids_with(read_ids(artifact.read_file(store, file)), hashes)

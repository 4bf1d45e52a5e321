"""[Ray] `hashray index build`: codes -> shards -> version 1 of an index.

index/  versions/00000001.json · shards/<sha256>.faiss · ids/<sha256>.arrow · quantizers/<sha256>.faiss (ivf)

A shard is a group of neighbouring code parts, sorted by id inside; the id ranges of shards may overlap. The task of a
group reads its parts, each once, sorts, builds and writes. For ivf, one task reads a few parts before that, with four
times the rows of the sample that trains the quantizer (64 rows a list). Memory: a task needs three times its shard (ids
and codes) and one part; the driver needs a record a shard.

Every id is one row of the whole index. A group's task sorts its ids, and leaves their hashes under progress/; then a
task for each 32 million rows looks for equal hashes among all groups, and the ids with these are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from hashray import artifact
from hashray.artifact import FileRecord, Manifest, canonical, read_table, sha256_hex, version_key
from hashray.codes import Codes
from hashray.config import Config
from hashray.data import unique
from hashray.data.columns import code_matrix
from hashray.data.unique import Hashes
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_free, run_stage
from hashray.engine.tasks import run_tasks
from hashray.errors import AuditError, CorruptArtifact, InputError
from hashray.index import choose as choosing
from hashray.index import shard
from hashray.index.choose import Choice, Limits, parse_bytes
from hashray.index.groups import Group, group_parts, sample_rows
from hashray.index.ids import check_unique, duplicate_ids, one_array, read_ids
from hashray.index.shard import NPROBE, SAMPLE_PER_LIST, Kind, WrittenShard
from hashray.progress import Bar, say
from hashray.storage import Store, check_conditional_put, join, open_store

ROWS_PER_SHARD = 5_000_000  # Flat answers 5M rows of 64 bits in some 4 ms; IVF pays above that
SHORT_ROWS = 1_000_000  # 8 MB of 64-bit codes: built here in less time than Ray takes to start


class BuiltGroup(BaseModel):
    """What a group's task has written: its shards, and the hashes of its ids in a file a bucket."""

    model_config = ConfigDict(frozen=True)

    shards: tuple[WrittenShard, ...]
    hashes: tuple[FileRecord, ...]

    @property
    def rows(self) -> int:
        """Rows of all its shards."""
        return sum(written.info.rows for written in self.shards)

    @property
    def files(self) -> list[FileRecord]:
        """Every file that was written."""
        return [*(file for written in self.shards for file in written.files), *self.hashes]


RecordT = TypeVar("RecordT", FileRecord, BuiltGroup, Choice)
LIMITS = ("max_ram", "min_recall", "max_ms")  # of kind auto


class IndexConfig(Config):
    """Build an index of binary codes, searchable where it stands."""

    codes: str = Field(description="Codes, local folder or s3:// url")
    out: str = Field(description="Folder or s3:// url of the index")
    kind: Literal["auto", Kind] = Field(
        "flat", description="Kind of the shards; flat: exact; ivf: for shards above 5 million rows; auto: measure both"
    )
    max_ram: str | None = Field(None, description="For kind auto: memory of a searcher of all shards, such as 8GiB")
    min_recall: float = Field(0.99, gt=0, le=1, description="For kind auto: least distance-recall at 100")
    max_ms: float | None = Field(None, gt=0, description="For kind auto: most CPU milliseconds of a query")
    shards: int | None = Field(None, ge=1, description="Number of shards; unset: one for 5 million rows")
    nlist: int | None = Field(None, ge=1, description="Lists of an ivf shard; unset: square root of its rows")
    nprobe: int | None = Field(None, ge=1, description="Lists of an ivf shard that a query looks into; unset: 16")
    seed: int = Field(0, ge=0, description="Seed of the training rows and of k-means, for ivf")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()

    @model_validator(mode="after")
    def _lists_are_of_ivf(self) -> IndexConfig:
        if self.kind != "ivf" and (self.nlist or self.nprobe):
            raise ValueError(f"nlist and nprobe are of kind ivf, not {self.kind}; leave them out, or use kind ivf")
        limits = [name for name in LIMITS if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind != "auto" and limits:
            raise ValueError(f"{' and '.join(limits)} are of kind auto, not {self.kind}")
        if self.max_ram is not None:
            parse_bytes(self.max_ram)
        return self


def build_index(config: IndexConfig) -> Manifest:
    """Run the stage; return the manifest of version 1. Rerun = resume.

    Raises:
        InputError: no codes there, no rows in them, or an id twice. StorageError: the store cannot publish safely.
        AlreadyExists: `out` holds an index of other codes or of another configuration.
        AuditError: the shards do not hold every row.
    """
    source, store = open_store(config.codes), open_store(config.out)
    codes = artifact.load_manifest(source, "codes")
    rows, parts = int(codes.rows_out or 0), [r for r in codes.files if r.name.startswith("parts/")]
    if not rows:
        raise InputError(f"{config.codes} holds no codes: there is nothing to index")
    # What is measured for kind auto is no part of the plan: a rerun meets the finished index, whatever the times.
    unused = () if config.kind == "auto" else LIMITS
    settings = config.model_dump(mode="json", exclude={"codes", "out", "pool", *unused})
    plan = sha256_hex(canonical({"codes": codes.id, "config": settings, "format": artifact.FORMAT_VERSION}))[:16]

    def work() -> Manifest:
        check_conditional_put(store)
        num_shards = min(rows, config.shards or -(-rows // ROWS_PER_SHARD))
        if config.shards is not None and config.shards > rows:
            say(f"note: {rows:,} rows make {rows:,} shards at most, not {config.shards:,}")
        build = _Build(source, store, parts, int(codes.info["num_bits"]), config, plan)
        choice = build.choose(num_shards) if config.kind == "auto" else None
        kind, nprobe = (choice.chosen.kind, choice.chosen.nprobe) if choice else (config.kind, config.nprobe)
        nlist = (choice.chosen.nlist if choice else config.nlist) or shard.default_nlist(rows // num_shards)
        nlist = 0 if kind == "flat" else nlist
        shards, quantizer = build.run(num_shards, kind, nlist)
        count = sum(part.info.rows for part in shards)
        if count != rows:
            raise AuditError(f"{config.codes} holds {rows:,} rows, the shards {count:,}; nothing was published")
        info: dict[str, Any] = {"plan": plan, "nlist": nlist or None, "nprobe": min(nprobe or NPROBE, nlist) or None}
        info |= {"choice": choice.model_dump(mode="json")} if choice else {}
        require_free(store, plan, key=version_key(1))
        manifest = shard.index_manifest(codes, shards, kind, settings, quantizer, info)
        artifact.publish(store, manifest, version_key(1))
        store.clear(f"progress/{plan}/")
        noun = "shard" if len(shards) == 1 else "shards"
        say(f"{config.out}: {rows:,} rows in {len(shards)} {kind} {noun}, version 1")
        return manifest

    return run_stage(store, "index", plan, work, key=version_key(1))


@dataclass(frozen=True)
class _Build:
    """One build: the input of its tasks and the place of its records."""

    source: Store
    store: Store
    parts: Sequence[FileRecord]
    num_bits: int
    config: IndexConfig
    plan: str

    def choose(self, num_shards: int) -> Choice:
        """Return the kind and its settings; for ivf, its quantizer is written. A choice of an earlier run stands."""
        choice = self._read("choice", Choice)
        if choice is None:
            config, rows = self.config, [part.rows or 0 for part in self.parts]
            limits = Limits(
                self._rows,
                num_shards,
                config.min_recall,
                parse_bytes(config.max_ram) if config.max_ram else None,
                config.max_ms,
            )
            nlists = choosing.nlists(self._rows, num_shards)
            drawn = sample_rows(rows, choosing.sample_size(nlists), config.seed)
            sample = [(self.parts[part], picks) for part, picks in drawn]
            count = sum(len(picks) for _, picks in sample)
            with Bar("choose kind", count, "rows") as bar:
                meter = Meter(bar, "sample")
                job = (self.source, sample, self.num_bits, nlists, limits, config.seed)
                ((_, (choice, trained)),) = self._calls(_choose, {0: job}, meter)
                meter.finish(0, count)
            if trained is not None:
                self._write_quantizer(trained)
            self.store.write(self._key("choice"), choice.model_dump_json().encode())
        for line in choosing.lines(choice):
            say(line)
        return choice

    def run(self, num_shards: int, kind: str, nlist: int) -> tuple[list[WrittenShard], FileRecord | None]:
        """Return the shards, and the file of their quantizer."""
        quantizer = (self._read("quantizer", FileRecord) or self._train(nlist)) if nlist else None
        groups = group_parts([part.rows or 0 for part in self.parts], num_shards)
        records = {n: self._read(_name(n, quantizer), BuiltGroup) for n in range(len(groups))}
        built = {n: record for n, record in records.items() if record}
        rows, done = self._rows, sum(record.rows for record in built.values())
        with Bar("build shards", rows, "rows", done=done) as bar:
            meter = Meter(bar, "group")
            for number, record in self._build(groups, built, kind, quantizer, meter):
                built[number] = record
                meter.finish(number, record.rows)
        if len(groups) > 1:
            self._require_unique([built[n] for n in range(len(groups))])
        return [written for n in range(len(groups)) for written in built[n].shards], quantizer

    @property
    def _rows(self) -> int:
        return sum(part.rows or 0 for part in self.parts)

    def _train(self, nlist: int) -> FileRecord:
        seed = self.config.seed
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
        record = artifact.write_file(self.store, f"quantizers/{sha256_hex(trained)}.faiss", trained)
        self.store.write(self._key("quantizer"), record.model_dump_json().encode())
        return record

    def _build(
        self,
        groups: Sequence[Group],
        built: Mapping[int, Any],
        kind: str,
        quantizer: FileRecord | None,
        meter: Meter,
    ) -> Iterator[tuple[int, BuiltGroup]]:
        buckets = unique.num_buckets(self._rows) if len(groups) > 1 else 0
        jobs = {
            number: (
                self.source, self.store, [self.parts[part] for part in group.parts], group.shards, self.num_bits,
                kind, self._key(_name(number, quantizer)), buckets,
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
        files = [written.files[1] for group in built for written in group.shards]
        with Bar("compare ids", len(files), "shards") as bar:
            jobs = {n: (self.store, file) for n, file in enumerate(files)}
            answers = [ids for _, ids in self._calls(_ids_with, jobs, Meter(bar, "shard"), np.sort(suspects))]
        twice = unique.duplicates(answers)
        if twice:
            raise duplicate_ids(len(twice), twice[0])

    def _calls(
        self, function: Any, jobs: Mapping[int, tuple[Any, ...]], meter: Meter, *shared: Any
    ) -> Iterator[tuple[int, Any]]:
        return run_tasks(function, jobs, self.config.pool, self._rows <= SHORT_ROWS, meter, shared)

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
    shards = []
    for number in range(num_shards):
        rows = slice(len(ids) * number // num_shards, len(ids) * (number + 1) // num_shards)
        shards.append(shard.write_sorted(store, ids[rows], codes[rows], kind, quantizer))
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

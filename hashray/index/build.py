"""[Ray] `hashray index build`: codes -> disjoint shards -> version 1 of an index.

index/  versions/00000001.json · shards/<sha256>.faiss · ids/<sha256>.parquet · quantizers/<sha256>.faiss (ivf)

Shards are ranges of ids, so that a row's place over all shards is its place in the order of ids. Tasks run in two
rounds. The first reads every part and draws a sample of its rows. From the sample, the driver takes the bounds of the
ranges (exact up to 262,144 rows) and the training rows of the quantizer. In the second round, the task of a shard
reads the parts whose ids reach into its range, keeps its rows, sorts, builds and writes. If parts do not follow the
order of ids, each part is read once for every shard. Only a shard's own task holds its rows. Memory: a task needs
three times its shard (ids and codes) and one part; the driver needs the sample and two ids a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hashray import artifact
from hashray.artifact import FileRecord, Manifest, canonical, read_table, sha256_hex, version_key
from hashray.codes import Codes
from hashray.config import Config
from hashray.data.columns import code_matrix
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_free, run_stage
from hashray.engine.tasks import run_tasks
from hashray.errors import AuditError, CorruptArtifact, InputError
from hashray.index import shard
from hashray.index.shard import NPROBE, SAMPLE_PER_LIST, Kind, WrittenShard
from hashray.progress import Bar, say
from hashray.storage import Store, check_conditional_put, join, open_store

ROWS_PER_SHARD = 5_000_000  # Flat answers 5M rows of 64 bits in some 4 ms; IVF pays above that
SAMPLE_ROWS = 1 << 18
SHORT_ROWS = 1_000_000  # 8 MB of 64-bit codes: built here in less time than Ray takes to start
SAMPLE_PER_SHARD = 256  # the rows of two shards then differ by some 10 %

RecordT = TypeVar("RecordT", FileRecord, WrittenShard)


class IndexConfig(Config):
    """Build an index of binary codes, searchable where it stands."""

    codes: str = Field(description="Codes, local folder or s3:// url")
    out: str = Field(description="Folder or s3:// url of the index")
    kind: Kind = Field("flat", description="Kind of the shards; flat: exact; ivf: for shards above 5 million rows")
    shards: int | None = Field(None, ge=1, description="Number of shards; unset: one for 5 million rows")
    nlist: int | None = Field(None, ge=1, description="Lists of an ivf shard; unset: square root of its rows")
    nprobe: int | None = Field(None, ge=1, description="Lists of an ivf shard that a query looks into; unset: 16")
    seed: int = Field(0, ge=0, description="Seed of the training rows and of k-means, for ivf")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()

    @model_validator(mode="after")
    def _lists_are_of_ivf(self) -> IndexConfig:
        if self.kind != "ivf" and (self.nlist or self.nprobe):
            raise ValueError(f"nlist and nprobe are of kind ivf, not {self.kind}; leave them out, or use kind ivf")
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
    settings = config.model_dump(mode="json", exclude={"codes", "out", "pool"})
    plan = sha256_hex(canonical({"codes": codes.id, "config": settings, "format": artifact.FORMAT_VERSION}))[:16]

    def work() -> Manifest:
        check_conditional_put(store)
        num_shards = min(rows, config.shards or -(-rows // ROWS_PER_SHARD))
        if config.shards is not None and config.shards > rows:
            say(f"note: {rows:,} rows make {rows:,} shards at most, not {config.shards:,}")
        nlist = 0 if config.kind == "flat" else config.nlist or shard.default_nlist(rows // num_shards)
        build = _Build(source, store, parts, int(codes.info["num_bits"]), config, plan)
        shards, quantizer = build.run(num_shards, nlist)
        count = sum(part.info.rows for part in shards)
        if count != rows:
            raise AuditError(f"{config.codes} holds {rows:,} rows, the shards {count:,}; nothing was published")
        info = {"plan": plan, "nlist": nlist or None, "nprobe": min(config.nprobe or NPROBE, nlist) or None}
        require_free(store, plan, key=version_key(1))
        manifest = shard.index_manifest(codes, shards, config.kind, settings, quantizer, info)
        artifact.publish(store, manifest, version_key(1))
        store.clear(f"progress/{plan}/")
        noun = "shard" if len(shards) == 1 else "shards"
        say(f"{config.out}: {rows:,} rows in {len(shards)} {config.kind} {noun}, version 1")
        return manifest

    return run_stage(store, "index", plan, work, key=version_key(1))


@dataclass(frozen=True)
class _Survey:
    """First and last id of every part, and a sample of all rows: ids ascending; codes [n, b] in stored order."""

    ranges: Sequence[tuple[str, str]]
    ids: pa.Array
    codes: Codes


@dataclass(frozen=True)
class _Build:
    """One build: the input of its tasks and the place of its records."""

    source: Store
    store: Store
    parts: Sequence[FileRecord]
    num_bits: int
    config: IndexConfig
    plan: str

    def run(self, num_shards: int, nlist: int) -> tuple[list[WrittenShard], FileRecord | None]:
        """Return the shards in ascending order of ids, and the file of their quantizer."""
        quantizer = self._read("quantizer", FileRecord) if nlist else None
        done: dict[int, WrittenShard] = {}
        if not nlist or quantizer:
            records = {n: self._read(_name(n, quantizer), WrittenShard) for n in range(num_shards)}
            done = {n: written for n, written in records.items() if written}
        if len(done) < num_shards:
            survey = self._survey(num_shards, nlist)
            if nlist and not quantizer:
                quantizer = self._train(survey.codes, nlist)
            rows = [sum(part.rows or 0 for part in self.parts), sum(written.info.rows for written in done.values())]
            with Bar("build shards", rows[0], "rows", done=rows[1]) as bar:
                meter = Meter(bar, "shard")
                for number, written in self._build(survey, num_shards, done, quantizer, meter):
                    done[number] = written
                    meter.finish(number, written.info.rows)
        return [done[n] for n in range(num_shards)], quantizer

    def _survey(self, num_shards: int, nlist: int) -> _Survey:
        starts = np.cumsum([0, *(int(part.rows or 0) for part in self.parts)])
        size = min(starts[-1], max(SAMPLE_ROWS, SAMPLE_PER_LIST * nlist, SAMPLE_PER_SHARD * num_shards))
        rng = np.random.default_rng(self.config.seed)
        picks = np.sort(rng.choice(starts[-1], size, replace=False, shuffle=False))
        mine = np.split(picks, np.searchsorted(picks, starts[1:-1]))
        width = self.num_bits if nlist else None
        jobs = [(self.source, part, width, mine[n] - starts[n]) for n, part in enumerate(self.parts)]
        parts: dict[int, Any] = {}
        with Bar("read ids", int(starts[-1]), "rows") as bar:
            meter = Meter(bar, "part")
            for number, surveyed in self._calls(_survey_part, dict(enumerate(jobs)), meter):
                parts[number] = surveyed
                meter.finish(number, self.parts[number].rows or 0)
        order = range(len(jobs))
        ids = shard.one_array(pa.chunked_array([parts[n][1] for n in order], pa.large_string()))
        ids = ids.take(pc.sort_indices(ids))
        shard.check_unique(ids)  # and so the bounds are, and no shard is empty
        return _Survey([parts[n][0] for n in order], ids, np.concatenate([parts[n][2] for n in order]))

    def _train(self, codes: Codes, nlist: int) -> FileRecord:
        rng = np.random.default_rng(self.config.seed)
        sample = codes[np.sort(rng.choice(len(codes), min(len(codes), SAMPLE_PER_LIST * nlist), replace=False))]
        with Bar("train lists", len(sample), "rows") as bar:
            meter = Meter(bar, "quantizer")
            ((_, trained),) = self._calls(_train, {0: (sample, nlist, self.config.seed)}, meter)
            meter.finish(0, len(sample))
        record = artifact.write_file(self.store, f"quantizers/{sha256_hex(trained)}.faiss", trained)
        self.store.write(self._key("quantizer"), record.model_dump_json().encode())
        return record

    def _build(
        self, survey: _Survey, num_shards: int, done: Mapping[int, Any], quantizer: FileRecord | None, meter: Meter
    ) -> Iterator[tuple[int, WrittenShard]]:
        bounds = [None, *(survey.ids[len(survey.ids) * n // num_shards].as_py() for n in range(1, num_shards)), None]
        trained = artifact.read_file(self.store, quantizer) if quantizer else None
        jobs = {}
        for number in range(num_shards):
            low, high = bounds[number], bounds[number + 1]
            parts = [part for part, (first, last) in zip(self.parts, survey.ranges, strict=True)
                     if (low is None or last >= low) and (high is None or first < high)]  # fmt: skip
            key = self._key(_name(number, quantizer))
            jobs[number] = (self.source, self.store, parts, (low, high), self.num_bits, self.config.kind, key)
        todo = {n: job for n, job in jobs.items() if n not in done}
        for number, text in self._calls(_build_shard, todo, meter, trained):
            yield number, WrittenShard.model_validate_json(text)

    def _calls(
        self, function: Any, jobs: Mapping[int, tuple[Any, ...]], meter: Meter, *shared: Any
    ) -> Iterator[tuple[int, Any]]:
        rows = sum(part.rows or 0 for part in self.parts)
        return run_tasks(function, jobs, self.config.pool, rows <= SHORT_ROWS, meter, shared)

    def _read(self, name: str, model: type[RecordT]) -> RecordT | None:
        try:
            record = model.model_validate_json(self.store.read(self._key(name)))
        except (ValueError, InputError):  # half a record, or none: the work is done again
            return None
        files = record.files if isinstance(record, WrittenShard) else [record]
        there = (self.store.exists(file.name) and self.store.size(file.name) == file.bytes for file in files)
        return record if all(there) else None

    def _key(self, name: str) -> str:
        return f"progress/{self.plan}/{name}.json"


def _name(number: int, quantizer: FileRecord | None) -> str:
    """A shard's record belongs to one quantizer: shards of two must never meet in one index."""
    return f"{number:06d}" + (f"-{quantizer.sha256[:12]}" if quantizer else "")


def _ids(table: pa.Table, where: str) -> pa.ChunkedArray:
    ids = table.column("id")
    if ids.null_count:
        raise CorruptArtifact(f"{where}: {ids.null_count} rows have no id")
    return ids.cast(pa.large_string())


def _survey_part(
    source: Store, part: FileRecord, num_bits: int | None, picks: NDArray[np.int64], advance: Callable[[int], None]
) -> tuple[tuple[str, str], pa.Array, Codes]:
    """First and last id of a part, and the ids (and, given `num_bits`, the codes) of the picked rows."""
    table = read_table(source, part, ["id", "code"] if num_bits else ["id"])
    ids = _ids(table, join(source.url, part.name))
    if len(ids) != part.rows:
        raise AuditError(f"{join(source.url, part.name)} holds {len(ids):,} rows, its manifest says {part.rows}")
    ends = pc.min_max(ids)
    codes = code_matrix(table.column("code"), num_bits)[picks] if num_bits else np.empty((0, 1), np.uint8)
    ends_text = (ends["min"].as_py() or "", ends["max"].as_py() or "")
    return ends_text, shard.one_array(ids.take(pa.array(picks))), codes


def _train(sample: Codes, nlist: int, seed: int, advance: Callable[[int], None]) -> bytes:
    return shard.train_quantizer(sample, nlist, seed)


def _build_shard(
    source: Store,
    store: Store,
    parts: Sequence[FileRecord],
    bounds: tuple[str | None, str | None],
    num_bits: int,
    kind: str,
    record_key: str,
    quantizer: bytes | None,
    advance: Callable[[int], None],
) -> str:
    """Build and write the shard of the ids from the lower bound to below the upper one, then its record."""
    low, high = bounds
    ids, codes = [], []
    for part in parts:
        table = read_table(source, part, ["id", "code"])
        names = _ids(table, join(source.url, part.name))
        mine = np.ones(len(names), dtype=bool)
        if low is not None:
            mine &= pc.greater_equal(names, low).to_numpy()
        if high is not None:
            mine &= pc.less(names, high).to_numpy()
        ids += names.filter(pa.array(mine)).chunks
        codes.append(code_matrix(table.column("code"), num_bits)[mine])
        advance(len(codes[-1]))
    texts = shard.one_array(pa.chunked_array(ids, pa.large_string()))
    written = shard.write_shard(store, texts, np.concatenate(codes), kind, quantizer)
    text = written.model_dump_json()
    store.write(record_key, text.encode())
    return text

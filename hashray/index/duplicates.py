"""[Ray] `hashray index duplicates`: index -> all pairs of near codes -> groups, leaks, a page with thumbnails.

duplicates/  groups/00000-<sha256>.parquet … · pairs/00000-<sha256>.parquet … · leaks-<sha256>.parquet (with a corpus)
             summary.json · report.html, report-0001.html … (with a corpus: thumbnails) · manifest.json

Four steps of tasks, each with a record under progress/ by which a rerun goes on:

1. distinct: a task for each shard brings its equal codes together, and shares them out among buckets by a hash.
2. merge: a task for each bucket brings the equal codes of all shards together. From one bucket a sample is drawn: it
   says how near the codes of this index lie, chooses the radius where none is given, and stops a request for too many.
3. pairs: a task for each two buckets (and each one with itself) finds all pairs of different codes within the radius.
4. groups: one task looks up the ids, and writes the tables.

Memory: a task of the first two steps needs some 60 bytes a row of its shard or bucket; of the third, 100 bytes a code
of two buckets (4 million codes each), and its pairs; the last, some 80 bytes a pair (measured on
9 million), which `max_pairs` bounds, and 100 bytes a row in a group.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa
import tyro
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hashray import __version__, artifact
from hashray.artifact import FileRecord, Manifest, canonical, sha256_hex
from hashray.config import Config
from hashray.data.corpus import Corpus, open_corpus
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_free, run_stage
from hashray.engine.tasks import run_tasks
from hashray.errors import AuditError, InputError
from hashray.index.distinct import PLACE_BITS, DistinctCodes, distinct, merge_distinct, num_buckets
from hashray.index.linking import Links, link, write_tables
from hashray.index.pairs import pairs_within
from hashray.index.radius import SAMPLE, SURE, Density, largest_radius, measure_density
from hashray.index.rows import read_rows
from hashray.index.tables import Keep
from hashray.index.version import ShardRecord, shards_of
from hashray.progress import Bar, say
from hashray.storage import Store, open_store
from hashray.storage.cache import cache_folder

SHORT_ROWS = 300_000  # less work than starting Ray
Draw = Callable[[Corpus | None, pa.Table, Mapping[str, Any]], Mapping[str, bytes]]


class DuplicatesConfig(Config):
    """Find duplicates in an index: all pairs of near codes, groups around a centre, leaks from train to query."""

    index: Annotated[str, tyro.conf.Positional] = Field(description="Index, local folder or s3:// url")
    out: str = Field(description="Folder or s3:// url of the tables and the page")
    within: int | None = Field(None, ge=0, description="Radius in bits; unset: chosen from the index's own distances")
    keep: Keep = Field("best", description="Row of a group that stays; best: its centre; first: its first id")
    corpus: str | None = Field(None, description="Corpus of the images, for thumbnails and train-query leaks")
    max_pairs: int = Field(50_000_000, ge=1, description="Most pairs; more of them end the run with an error")
    groups_per_page: int = Field(40, ge=1, description="Groups on one page")
    pages: int = Field(25, ge=1, description="Most pages, the largest groups first; the tables hold all groups")
    seed: int = Field(0, ge=0, description="Seed of the sample that the radius is chosen on")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


class Written(BaseModel):
    """What a task has written: its files, and what they hold (rows, codes or pairs)."""

    model_config = ConfigDict(frozen=True)

    files: tuple[FileRecord, ...]
    count: int


class Grouped(BaseModel):
    """The files of the tables, and what they say."""

    model_config = ConfigDict(frozen=True)

    files: tuple[FileRecord, ...]
    summary: dict[str, Any]


RecordT = TypeVar("RecordT", Written, Grouped)


def find_duplicates(config: DuplicatesConfig, draw: Draw) -> Manifest:
    """Run the stage; return its manifest. Rerun = resume.

    Args:
        draw: makes the pages (plain name -> bytes) of the corpus, the table of groups and the summary.

    Raises:
        InputError: no index or corpus there, a corpus of other images, `out` is an index, or more than `max_pairs`
            pairs.
        CorruptArtifact: a file of the index is missing or is not what was published.
        AlreadyExists: `out` holds duplicates of another index or of another configuration.
    """
    source, store = open_store(config.index), open_store(config.out)
    index = artifact.load_manifest(source, "index")
    if artifact.is_finished(store, artifact.version_key(1)):
        raise InputError(f"--out {store.url} is an index: duplicates need a folder that is no artifact")
    corpus = None if config.corpus is None else open_corpus(config.corpus)
    settings = config.model_dump(mode="json", exclude={"index", "out", "corpus", "pool"})
    parents = {"index": index.id} | ({} if corpus is None else {"corpus": corpus.manifest.id})
    plan = sha256_hex(canonical({"parents": parents, "config": settings, "format": artifact.FORMAT_VERSION}))[:16]

    def work() -> Manifest:
        search = _Search(source, store, index, corpus, config, plan)
        grouped = search.run()
        largest = artifact.read_table(store, grouped.files[0])
        pages = draw(corpus, largest, grouped.summary)
        require_free(store, plan)
        files = [artifact.write_named(store, name, data) for name, data in pages.items()]
        files.append(artifact.write_named(store, "summary.json", canonical(grouped.summary)))
        manifest = Manifest(
            kind="duplicates", project_version=__version__, config=settings, parents=parents,
            fingerprint=index.fingerprint, files=(*grouped.files, *files), info={"plan": plan, **grouped.summary},
        )  # fmt: skip
        manifest = artifact.publish(store, manifest)
        store.clear(f"progress/{plan}/")
        return manifest

    manifest = run_stage(store, "duplicates", plan, work)
    artifact.write_plain(store, manifest)
    return manifest


@dataclass(frozen=True)
class _Search:
    """One search for duplicates: the input of its tasks and the place of its records."""

    source: Store
    store: Store
    index: Manifest
    corpus: Corpus | None
    config: DuplicatesConfig
    plan: str

    def run(self) -> Grouped:
        """Return the tables."""
        shards, rows = shards_of(self.index), int(self.index.rows_out or 0)
        if not rows:
            raise InputError(f"{self.config.index} holds no rows: there are no duplicates")
        buckets = num_buckets(rows)
        kind, num_bits = str(self.index.info["kind"]), int(self.index.info["num_bits"])
        jobs = {n: (self.source, shard, kind, num_bits, n, buckets, self.store) for n, shard in enumerate(shards)}
        parts = self._step("distinct", _distinct, jobs, {n: shard.living for n, shard in enumerate(shards)})
        of_buckets = {n: (self.store, [part.files[n] for part in parts]) for n in range(buckets)}
        sizes = {n: sum(part.files[n].rows or 0 for part in parts) for n in range(buckets)}
        blocks = self._step("merge", _merge, of_buckets, sizes)
        if sum(part.count for part in parts) != rows:
            raise AuditError(f"{self.config.index} holds {rows:,} rows, its shards {sum(p.count for p in parts):,}")
        density = self._density(blocks)
        within, chosen = self._radius(density)
        pairs = self._pairs(blocks, within)
        return self._group(shards, blocks, pairs, {**chosen, "rows": rows, "codes": density.codes})

    def _density(self, blocks: Sequence[Written]) -> Density:
        """Distances in a sample of one bucket: a hash drew its codes from all."""
        largest = max(blocks, key=lambda block: block.count)
        codes = _read_array(self.store, largest.files[1])
        rng = np.random.default_rng(self.config.seed)
        sample = codes[np.sort(rng.choice(len(codes), min(SAMPLE, len(codes)), replace=False, shuffle=False))]
        most = max(largest_radius(int(self.index.info["num_bits"])), self.config.within or 0)
        return measure_density(sample, sum(block.count for block in blocks), most)

    def _radius(self, density: Density) -> tuple[int, dict[str, Any]]:
        """The radius, and what is said about it; raises InputError where it gives too many pairs for sure."""
        config, num_bits = self.config, int(self.index.info["num_bits"])
        within = density.radius() if config.within is None else config.within
        neighbours = [round(float(count), 4) for count in density.neighbours]
        if density.within[within] >= SURE and density.pairs[within] > 2 * config.max_pairs:
            raise self._too_many(f"about {density.pairs[within]:,.0f}", within, density)
        if config.within is not None:
            why = "it was asked for"
        elif within == largest_radius(num_bits):
            why = f"an eighth of {num_bits} bits, at which a code has {neighbours[within]:g} neighbours"
        else:
            why = (
                f"a code has {neighbours[within]:g} neighbours there and {neighbours[within + 1]:g} at {within + 1}, "
                "and more than one says only that images are of one kind"
            )
        say(f"duplicates: within {within} of {num_bits} bits: {why}")
        chosen = {
            "within": within, "within_because": why, "num_bits": num_bits, "sample": density.sample,
            "neighbours_by_radius": neighbours, "keep": config.keep,
        }  # fmt: skip
        return within, chosen

    def _too_many(self, count: str, within: int, density: Density | None = None) -> InputError:
        fits = None if density is None else int((density.pairs <= self.config.max_pairs).sum()) - 1
        better = "a smaller --within" if fits is None or fits < 0 else f"--within {fits}"
        return InputError(
            f"{self.config.index} has {count} pairs of codes within {within} bits, --max-pairs allows "
            f"{self.config.max_pairs:,}. Use {better}, or a larger --max-pairs (some 80 bytes of memory a pair)"
        )

    def _pairs(self, blocks: Sequence[Written], within: int) -> list[Written]:
        if not within:  # equal codes are together already
            return []
        both = [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks))]
        jobs, sizes, most = {}, {}, self.config.max_pairs
        for number, (i, j) in enumerate(both):
            files = [blocks[n].files[1] for n in sorted({i, j})]
            jobs[number] = (self.store, files, (i, j), within, most)
            sizes[number] = blocks[i].count + (blocks[j].count if j > i else 0)
        pairs = list[Written]()
        for _, record in self._finished(f"pairs-{within}", _pairs, jobs, sizes, "codes"):
            pairs.append(record)
            if sum(record.count for record in pairs) > most:
                raise self._too_many(f"more than {most:,}", within)
        return pairs

    def _group(
        self, shards: Sequence[ShardRecord], blocks: Sequence[Written], pairs: Sequence[Written], facts: dict[str, Any]
    ) -> Grouped:
        record = self._read("groups", Grouped)
        if record is None:
            count = sum(record.count for record in pairs)
            links = Links(
                tuple(shards), tuple(block.files[0] for block in blocks),
                tuple(file for record in pairs for file in record.files),
            )  # fmt: skip
            job = (self.source, self.store, links, self.corpus and self.corpus.store, self.config.keep)
            with Bar("group", max(1, count), "pairs") as bar:
                meter = Meter(bar, "table")
                ((_, (files, summary)),) = run_tasks(_group, {0: job}, self.config.pool, self._short, meter)
                meter.finish(0, max(1, count))
            record = Grouped(files=files, summary={**facts, **summary})
            self._write("groups", record)
        return record

    @property
    def _short(self) -> bool:
        return int(self.index.rows_out or 0) <= SHORT_ROWS

    def _step(
        self, name: str, function: Any, jobs: Mapping[int, tuple[Any, ...]], sizes: Mapping[int, int]
    ) -> list[Written]:
        """The records of all jobs of a step, in order."""
        return [record for _, record in sorted(self._finished(name, function, jobs, sizes, "rows"))]

    def _finished(
        self, name: str, function: Any, jobs: Mapping[int, tuple[Any, ...]], sizes: Mapping[int, int], unit: str
    ) -> Iterator[tuple[int, Written]]:
        """Yield the record of each job of a step: those of an earlier run first, then as tasks end."""
        read = {number: self._read(f"{name}-{number:06d}", Written) for number in jobs}
        there = {number: record for number, record in read.items() if record}
        yield from there.items()
        done = sum(sizes[number] for number in there)
        left = {
            number: (*job, self._key(f"{name}-{number:06d}")) for number, job in jobs.items() if number not in there
        }
        with Bar(name.partition("-")[0], sum(sizes.values()), unit, done=done) as bar:
            meter = Meter(bar, name.partition("-")[0])
            for number, record in run_tasks(function, left, self.config.pool, self._short, meter) if left else ():
                self._write(f"{name}-{number:06d}", record)
                meter.finish(number, sizes[number])
                yield number, record

    def _read(self, name: str, model: type[RecordT]) -> RecordT | None:
        try:
            record = model.model_validate_json(self.store.read(f"{self._key(name)}.json"))
        except (ValueError, InputError):  # half a record, or none: the work is done again
            return None
        there = (self.store.exists(file.name) and self.store.size(file.name) == file.bytes for file in record.files)
        return record if all(there) else None

    def _write(self, name: str, record: Written | Grouped) -> None:
        self.store.write(f"{self._key(name)}.json", record.model_dump_json().encode())

    def _key(self, name: str) -> str:
        return f"progress/{self.plan}/{name}"


def _distinct(
    source: Store, shard: ShardRecord, kind: str, num_bits: int, number: int, buckets: int, store: Store, key: str,
    advance: Callable[[int], None],
) -> Written:  # fmt: skip
    """The different codes of a shard, one file a bucket."""
    rows = read_rows(source, shard, kind, num_bits, cache_folder())
    parts = distinct(rows.codes, rows.positions | (number << PLACE_BITS), buckets)
    advance(len(rows.positions))
    written = [
        artifact.write_file(store, f"{key}-{bucket:06d}.npy", part.to_bytes(), rows=len(part.rows))
        for bucket, part in enumerate(parts)
    ]
    return Written(files=tuple(written), count=len(rows.positions))


def _merge(store: Store, files: Sequence[FileRecord], key: str, advance: Callable[[int], None]) -> Written:
    """The different codes of a bucket, of all shards."""
    parts = []
    for file in files:
        parts.append(DistinctCodes.from_bytes(artifact.read_file(store, file)))
        advance(len(parts[-1].rows))
    merged = merge_distinct(parts)
    whole = artifact.write_file(store, f"{key}.npy", merged.to_bytes(), rows=len(merged.rows))
    # The codes once more by themselves: they are all that the many tasks of pairs read.
    alone = artifact.write_file(store, f"{key}-codes.npy", _array_bytes(merged.codes), rows=len(merged.codes))
    return Written(files=(whole, alone), count=len(merged.codes))


def _pairs(
    store: Store, files: Sequence[FileRecord], numbers: tuple[int, int], within: int, most: int, key: str,
    advance: Callable[[int], None],
) -> Written:  # fmt: skip
    """The pairs between two buckets, or inside one: files of (left, right, distance), codes by bucket and place."""
    left, *others = (_read_array(store, file) for file in files)
    written, count = list[FileRecord](), 0
    for pairs in pairs_within(left, within, others[0] if others else None):
        columns = np.empty((3, len(pairs)), np.int64)
        columns[0], columns[1] = pairs.left | (numbers[0] << PLACE_BITS), pairs.right | (numbers[1] << PLACE_BITS)
        columns[2] = pairs.distance
        name = f"{key}-{len(written):06d}.npy"
        written.append(artifact.write_file(store, name, _array_bytes(columns), rows=len(pairs)))
        count += len(pairs)
        if count > most:  # the driver stops here, too
            break
    return Written(files=tuple(written), count=count)


def _group(
    source: Store, store: Store, links: Links, corpus: Store | None, keep: Keep, advance: Callable[[int], None]
) -> tuple[tuple[FileRecord, ...], dict[str, Any]]:
    """Look up the ids (and the splits of a corpus), group, write the tables."""
    opened = None if corpus is None else Corpus(corpus, artifact.load_manifest(corpus, "corpus"))
    return write_tables(store, link(source, store, links, opened, advance), keep)


def _array_bytes(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def _read_array(store: Store, file: FileRecord) -> NDArray[Any]:
    return np.load(io.BytesIO(artifact.read_file(store, file)), allow_pickle=False)

"""From pairs of code numbers to ids: which codes have a neighbour or several rows, and who these rows are. No Ray."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray import artifact
from hashray.artifact import FileRecord, table_bytes
from hashray.data.corpus import Corpus
from hashray.data.unique import hash_ids
from hashray.errors import InputError
from hashray.index.distinct import PLACE_BITS, PLACE_MASK, DistinctCodes
from hashray.index.rows import open_ids
from hashray.index.tables import Keep, Linked, Tables, make_tables, summarise
from hashray.index.version import ShardRecord
from hashray.storage import Store
from hashray.storage.cache import cache_folder

Numbers = NDArray[np.int64]

ROWS_PER_FILE = 1 << 20


@dataclass(frozen=True)
class Links:
    """The files of an index's shards, of the buckets of its different codes, and of the pairs of codes."""

    shards: tuple[ShardRecord, ...]
    blocks: tuple[FileRecord, ...]
    pairs: tuple[FileRecord, ...]


def link(source: Store, store: Store, links: Links, corpus: Corpus | None, advance: Callable[[int], None]) -> Linked:
    """Read the pairs, and look up the rows of their codes and of every code with several rows.

    Args:
        source: where the shards are. store: where the buckets and the pairs are.
        corpus: whose splits the rows get; None: no splits.
        advance: gets numbers of pairs as they are read.

    Raises:
        InputError: none of the rows is in the corpus.
    """
    columns = [np.empty((3, 0), np.int64)]
    for file in links.pairs:
        columns.append(np.load(io.BytesIO(artifact.read_file(store, file)), allow_pickle=False))
        advance(columns[-1].shape[1])
    left, right, distance = (np.concatenate([some[row] for some in columns]) for row in range(3))
    del columns
    paired = np.unique(np.concatenate([np.unique(left), np.unique(right)]))
    codes, rows, code = _rows_of_codes(store, links.blocks, paired)
    ids = _ids_of(source, links.shards, rows)
    splits = None if corpus is None else _splits_of(corpus, ids)
    # Four bytes a number, where they do: a pair is in memory several times while it is grouped.
    small = np.int32 if len(codes) < 1 << 31 else np.int64
    left = np.searchsorted(codes, left).astype(small)
    right = np.searchsorted(codes, right).astype(small)
    return Linked(left, right, distance.astype(np.int32), code, ids, splits)


def _rows_of_codes(store: Store, blocks: Sequence[FileRecord], paired: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """The codes that matter [n], ascending; their rows [r]; for each row the place of its code among the first."""
    numbers, rows, codes, total = list[Numbers](), list[Numbers](), list[Numbers](), 0
    for bucket, file in enumerate(blocks):
        block = DistinctCodes.from_bytes(artifact.read_file(store, file))
        chosen = block.counts > 1
        of_bucket = paired[np.searchsorted(paired, bucket << PLACE_BITS) :]
        of_bucket = of_bucket[: np.searchsorted(of_bucket, (bucket + 1) << PLACE_BITS)]
        chosen[of_bucket & PLACE_MASK] = True
        some = np.flatnonzero(chosen)
        counts = block.counts[some]
        starts = np.cumsum(counts) - counts
        rows.append(block.rows[np.repeat(block.starts[some] - starts, counts) + np.arange(counts.sum())])
        codes.append(np.repeat(np.arange(len(some)) + total, counts))
        numbers.append(some | (bucket << PLACE_BITS))
        total += len(some)
    return np.concatenate(numbers), np.concatenate(rows), np.concatenate(codes)


def _ids_of(source: Store, shards: Sequence[ShardRecord], rows: Numbers) -> pa.Array:
    """The ids of rows, given as shard and position in one number."""
    order, texts = np.argsort(rows, kind="stable"), list[pa.Array]()
    ordered = rows[order]
    edges = np.searchsorted(ordered, np.arange(len(shards) + 1) << PLACE_BITS)
    for files, start, end in zip(shards, edges[:-1], edges[1:], strict=True):
        if end > start:
            ids = open_ids(source, files, cache_folder())
            texts.append(ids.array.take(pa.array(ordered[start:end] & PLACE_MASK)).cast(pa.large_string()))
            ids.release()
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.concat_arrays(texts or [pa.array([], pa.large_string())]).take(pa.array(back))


def _splits_of(corpus: Corpus, ids: pa.Array) -> pa.Array:
    """The split of each row, null where the corpus does not have it."""
    wanted, tables = np.sort(hash_ids(ids)), list[pa.Table]()
    for table in corpus.row_tables("all"):
        names = pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in table.column("id").chunks])
        hashes = hash_ids(names)
        places = np.minimum(np.searchsorted(wanted, hashes), max(0, len(wanted) - 1))
        some = np.flatnonzero(wanted[places] == hashes) if len(wanted) else np.empty(0, np.int64)
        tables.append(pa.table({"id": names, "split": table.column("split")}).take(pa.array(some)))
    known = pa.concat_tables(tables).combine_chunks()
    there = pc.index_in(ids, known.column("id"))
    if len(ids) and there.null_count == len(ids):
        raise InputError(
            f"{corpus.store.url} holds none of the {len(ids):,} rows with duplicates: give the corpus that the index's "
            "codes were made of, or leave --corpus out"
        )
    return pa.concat_arrays(known.column("split").take(there).chunks or [pa.nulls(len(ids), pa.string())])


def write_tables(store: Store, linked: Linked, keep: Keep) -> tuple[tuple[FileRecord, ...], dict[str, Any]]:
    """Write the tables of a report, the groups first; return the files and the summary."""
    tables: Tables = make_tables(linked, keep)
    groups, pairs = tables.groups, tables.pairs
    files = [
        *_write_parts(store, "groups", len(groups), lambda start, stop: groups.slice(start, stop - start)),
        *_write_parts(store, "pairs", len(pairs), pairs.table),
    ]
    if tables.leaks is not None:
        files.append(artifact.write_named(store, "leaks.parquet", table_bytes(tables.leaks), rows=len(tables.leaks)))
    counts = np.bincount(linked.code)
    return tuple(files), {**summarise(tables), "rows_with_equal_codes": int(counts[counts > 1].sum())}


def _write_parts(store: Store, name: str, count: int, table: Callable[[int, int], pa.Table]) -> list[FileRecord]:
    """Write a table of `count` rows in files; `table` gives the rows from start to stop."""
    files = []
    for number, start in enumerate(range(0, max(1, count), ROWS_PER_FILE)):
        part = table(start, min(count, start + ROWS_PER_FILE))
        files.append(artifact.write_named(store, f"{name}/{number:05d}.parquet", table_bytes(part), rows=len(part)))
    return files

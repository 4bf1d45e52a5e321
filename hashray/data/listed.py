"""Listed rows as tables: what a task keeps of the rows of a source, and what can be added up over tables. No Ray.

A listed row has an id, a locator and the labels as the source has them, as JSON text. Its `key` is the first eight
bytes of `order_key`: the order of a corpus, a partition for finding equal ids, and what the splits draw by. `fold` is
a hash of the id without case and with accents in one form, where the format cares.
"""

from __future__ import annotations

import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashray.data.labels import UNREADABLE
from hashray.data.listing import SourceRow
from hashray.data.splits import Candidates, order_key
from hashray.data.unique import Hashes

SCHEMA = pa.schema(
    [("id", pa.string()), ("locator", pa.string()), ("value", pa.string()), ("split", pa.string()),
     ("size_bytes", pa.int64()), ("place", pa.string()), ("key", pa.uint64()), ("fold", pa.uint64())]
)  # fmt: skip
CHUNK_ROWS = 1 << 15
PRUNE_ROWS = 1 << 14  # of a row group of a sorted file, which a reader of a range of keys may skip
TOP = 1 << 64
PLAIN = (int, str, type(None))  # equal values of one such type have one text


class Group(NamedTuple):
    """How often a value and split occur, and the first row that has them."""

    rows: int
    id: str
    place: str


Tally = dict[tuple[str, str | None], Group]


def to_tables(
    rows: Iterable[SourceRow], seed: int, folded: bool, most: int, advance: Callable[[Sequence[SourceRow]], None]
) -> Iterator[pa.Table]:
    """Tables of at most `most` listed rows each; `advance` is called with the rows of each chunk of one."""
    iterator, tables = iter(rows), [SCHEMA.empty_table()]
    while chunk := list(islice(iterator, min(CHUNK_ROWS, most - sum(map(len, tables))))):
        tables.append(_to_table(chunk, seed, folded))
        advance(chunk)
        if sum(map(len, tables)) == most:
            yield pa.concat_tables(tables)
            tables = [SCHEMA.empty_table()]
    if len(tables) > 1:
        yield pa.concat_tables(tables)


def _to_table(rows: Sequence[SourceRow], seed: int, folded: bool) -> pa.Table:
    columns = {
        "id": [row.id for row in rows],
        "locator": [row.locator for row in rows],
        "value": [_as_text(row.value) if type(row.value) in PLAIN else _encode(row.value) for row in rows],
        "split": [row.split for row in rows],
        "size_bytes": [row.size_bytes for row in rows],
        "place": [row.place for row in rows],
        "key": [int.from_bytes(order_key(seed, row.id)[:8], "big") for row in rows],
        "fold": [_fold(row.id) if folded else None for row in rows],
    }
    return pa.table(columns, SCHEMA)


_encode = json.JSONEncoder(default=lambda value: {UNREADABLE: repr(value)}).encode
_as_text = lru_cache(maxsize=PRUNE_ROWS, typed=True)(_encode)  # few labels, many rows


def fold(row_id: str) -> str:
    """An id without case, its accents in one form."""
    return unicodedata.normalize("NFC", row_id).casefold()


def _fold(row_id: str) -> int:
    return int.from_bytes(hashlib.sha256(fold(row_id).encode("utf-8", "surrogatepass")).digest()[:8], "big")


def in_order(table: pa.Table) -> pa.Table:
    """The rows by `key`, then by id."""
    return table.sort_by([("key", "ascending"), ("id", "ascending")])


def tally(table: pa.Table) -> Tally:
    """How often each value and split occur, with the first row of each."""
    numbered = table.select(["value", "split"]).append_column("row", pa.array(np.arange(len(table))))
    groups = numbered.group_by(["value", "split"]).aggregate([("row", "count"), ("row", "min")])
    out: Tally = {}
    for group in groups.sort_by("row_min").to_pylist():
        row = table.slice(group["row_min"], 1).select(["id", "place", "locator"]).to_pylist()[0]
        out[group["value"], group["split"]] = Group(group["row_count"], row["id"], row["place"] or row["locator"])
    return out


def add_tally(total: Tally, other: Tally) -> None:
    """Add a tally of later rows to a total."""
    for name, seen in other.items():
        before = total.get(name)
        total[name] = seen if before is None else before._replace(rows=before.rows + seen.rows)


def cut_parts(sizes: Sequence[int], rows_per_part: int, part_bytes: int) -> list[int]:
    """Where each part begins, so that it holds at most these rows and, unless it is one row, these bytes of images.

    >>> cut_parts([1, 1, 9, 1, 1, 1], rows_per_part=2, part_bytes=4)
    [0, 2, 3, 5]
    """
    starts: list[int] = []
    held = 0
    for i, size_bytes in enumerate(sizes):
        if not starts or i - starts[-1] == rows_per_part or held + size_bytes > part_bytes:
            starts.append(i)
            held = 0
        held += size_bytes
    return starts


def to_bytes(table: pa.Table, starts: Sequence[int] | None = None) -> bytes:
    """A Parquet file with a row group for each part that begins at `starts`, or with small ones for `between`."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        if starts is None:
            writer.write_table(table, row_group_size=PRUNE_ROWS)
        for start, stop in pairwise([*(starts or []), len(table)]):
            writer.write_table(table.slice(start, stop - start), row_group_size=max(1, stop - start))
    return sink.getvalue()


def between(handle: BinaryIO, column: str, share: tuple[int, int]) -> pa.Table:
    """The rows of a file whose `column` (a hash) is in a share (n, of how many) of all hashes.

    In a file that is sorted by the column, only the row groups that hold such rows are read.
    """
    number, count = share
    low, high = TOP * number // count, TOP * (number + 1) // count - 1
    file = pq.ParquetFile(handle)
    place = file.schema_arrow.get_field_index(column)
    groups = []
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(place).statistics
        if statistics is None or not statistics.has_min_max or (statistics.max >= low and statistics.min <= high):
            groups.append(group)
    table = file.read_row_groups(groups)
    if count == 1:
        return table
    values = table.column(column)
    bounds = [pa.scalar(bound, pa.uint64()) for bound in (low, high)]
    return table.filter(pc.and_(pc.greater_equal(values, bounds[0]), pc.less_equal(values, bounds[1])))


def sorted_hashes(table: pa.Table, column: str) -> bytes:
    """A Parquet file of one column `hash`: the hashes in `column`, ascending, for `between`."""
    sink = io.BytesIO()
    hashes = pa.table({"hash": np.sort(table.column(column).to_numpy())})
    pq.write_table(hashes, sink, row_group_size=PRUNE_ROWS, compression="none", use_dictionary=False)
    return sink.getvalue()


def ids_of(table: pa.Table, column: str, hashes: Hashes) -> list[str]:
    """The ids of the rows that have one of these hashes in `column`."""
    places = np.flatnonzero(np.isin(table.column(column).to_numpy(), hashes))
    ids: list[str] = table.column("id").take(pa.array(places)).to_pylist()
    return ids


def equal_ids(ids: Iterable[str], column: str) -> list[list[str]]:
    """Groups of ids, two or more, that are equal ("key"), or equal once they are folded ("fold")."""
    groups: dict[str, list[str]] = {}
    for row_id in ids:
        groups.setdefault(row_id if column == "key" else fold(row_id), []).append(row_id)
    return [group for group in groups.values() if len(group) > 1]


def merge_equal(table: pa.Table, merge: Callable[[list[SourceRow]], SourceRow]) -> pa.Table:
    """A table in order with rows of one id made one by `merge`, which gets them in the order of their places."""
    ids = table.column("id").combine_chunks()
    if len(ids) < 2 or not pc.any(pc.equal(ids[1:], ids[:-1])).as_py():
        return table
    first = np.concatenate([[True], pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)])
    starts = np.flatnonzero(first)
    lengths = np.diff([*starts, len(ids)])
    splits = table.column("split").to_pylist()
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        rows = [
            SourceRow(
                item["id"], item["locator"], json.loads(item["value"]), item["split"], item["size_bytes"], item["place"]
            )
            for item in table.slice(start, length).to_pylist()
        ]
        splits[start] = merge(rows).split
    column = table.column_names.index("split")
    return table.set_column(column, "split", pa.array(splits, pa.string())).take(pa.array(starts))


def smallest(table: pa.Table, count: int) -> dict[str, Candidates]:
    """Of each value, the `count` rows that come first in the seeded order, and whether there are more."""
    values = table.column("value").combine_chunks().dictionary_encode()
    codes, keys = values.indices.to_numpy(), table.column("key").to_numpy()
    order: NDArray[np.int64] = np.lexsort((keys, codes))
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    out: dict[str, Candidates] = {}
    for start, stop in pairwise([*starts.tolist(), len(order)]):
        rows = pa.array(order[start : min(stop, start + count)])
        ids = table.column("id").take(rows).to_pylist()
        out[values.dictionary[int(codes[order[start]])].as_py()] = Candidates(tuple(ids), stop - start > count)
    return out


def iterate(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as dicts of id, locator, value and split."""
    yield from table.select(["id", "locator", "value", "split"]).to_pylist()

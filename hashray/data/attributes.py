"""Attributes that a corpus keeps with each row: their names, their types, and rows of a file by id. No Ray.

They are columns of a Parquet source, or of a Parquet or CSV file with a column id that goes with any source. Such a
file is cut into pieces that are sorted by a hash of the id. A worker maps them into memory and finds the rows of a part
by binary search, so that neither the file nor its ids need to fit anywhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from hashray.artifact import FileRecord, sha256_hex, table_bytes, write_file
from hashray.data.unique import duplicates, hash_ids, ids_with
from hashray.errors import InputError, perhaps
from hashray.storage import Store, open_store, split_url
from hashray.storage.cache import cache_folder, verified_path

PIECE_ROWS = 1 << 18
JOB_BYTES = 256 << 20  # of a Parquet file: what one task cuts into pieces
OPEN_PIECES = 1024
# What a corpus calls its own columns, and what it is called in an index.
TAKEN = {
    "id": "the id of a row is kept already",
    "labels": "the labels of a row are kept already, as class",
    "class": "an index names the classes of a row so",
    "split": "the split of a row is kept already",
    "image": "a corpus names the bytes of images so",
    "uri": "a corpus names the places of images so",
}


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse names of attributes that a corpus or an index uses itself, and a name twice.

    Raises:
        InputError: there is such a name.
    """
    for name in names:
        if name in TAKEN:
            raise InputError(
                f"{where}: {name!r} is no name for an attribute: {TAKEN[name]}. Name the columns to keep with "
                "--attributes, without it, or rename it"
            )
        if names.count(name) > 1:
            raise InputError(f"{where}: {name!r} stands twice among the attributes; name each column once")


def kept_schema(schema: pa.Schema, names: Sequence[str], where: str) -> pa.Schema:
    """The columns with these names, with the types that a corpus keeps them in.

    The values of a dictionary stand for themselves, and an extension type is the type that stores it. A time has the
    unit that Parquet gives it.

    Raises:
        InputError: there is no such column, or two; its name is taken; or Parquet cannot keep its type.
    """
    check_names(names, where)
    fields = []
    for name in names:
        count = schema.names.count(name)
        if count != 1:
            fault = f"no column {name!r}{perhaps(name, schema.names) or '.'}" if count == 0 else f"{count} of {name!r}."
            raise InputError(f"{where} has {fault} It has: {', '.join(schema.names)}")
        fields.append(pa.field(name, _kept_type(name, schema.field(name).type, where)))
    return pa.schema(fields)


def _kept_type(name: str, kind: pa.DataType, where: str) -> pa.DataType:
    plain = kind
    while pa.types.is_dictionary(plain) or isinstance(plain, pa.BaseExtensionType):
        plain = plain.value_type if pa.types.is_dictionary(plain) else plain.storage_type
    plain = pa.string() if pa.types.is_string_view(plain) else plain
    plain = pa.binary() if pa.types.is_binary_view(plain) else plain
    try:
        table = pq.read_table(io.BytesIO(table_bytes(pa.schema([(name, plain)]).empty_table())))
        table.take(pa.array([], pa.int64()))
    except pa.ArrowException as error:
        raise InputError(
            f"{where}: attribute {name!r} is {kind}, which a corpus cannot keep ({error}); leave it out of "
            "--attributes, or write it as text or numbers"
        ) from error
    return table.schema.field(0).type


def join_schemas(schemas: Sequence[pa.Schema], where: str | None = None) -> pa.Schema:
    """The columns of all schemas, of types that hold the values of all.

    Args:
        where: for errors.

    Raises:
        InputError: columns of one name have types that Arrow does not join.
    """
    try:
        return pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"{f'{where}: ' if where else ''}attributes of one name have types that do not join: {error}. Write them "
            "with one type everywhere"
        ) from error


def fit(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The columns of a schema, in its types.

    Raises:
        InputError: a value does not fit its type, such as 2**60 + 1 in a column of floats.
    """
    columns = []
    for field in schema:
        column = table.column(field.name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        try:
            columns.append(column.cast(field.type))
        except pa.ArrowException as error:
            raise InputError(
                f"{where}: attribute {field.name!r} is {column.type} here and {field.type} with the other files of the "
                f"source, which does not hold all values: {error}. Write it with one type everywhere"
            ) from error
    return pa.table(columns, schema=schema)


def read_described(file: BinaryIO, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of attributes from a Parquet or CSV file; the column id of a CSV file is text.

    Raises:
        pa.ArrowException, KeyError: it is no such file.
    """
    if not name.lower().endswith(".csv"):
        return pq.ParquetFile(file).read(columns and list(columns), use_threads=False)
    chosen = list(columns or [])
    wanted = csv.ConvertOptions(column_types={"id": pa.string()}, include_columns=chosen, strings_can_be_null=True)
    return csv.read_csv(file, convert_options=wanted)


def shares_of(url: str) -> list[tuple[int, ...]]:
    """What tasks take of a file of attributes: row groups of a Parquet file; one share, (), is a whole CSV file.

    Raises:
        InputError: no such file, or no Parquet file.
    """
    folder, name = split_url(url)
    if name.lower().endswith(".csv"):
        open_store(folder).size(name)  # says where there is none
        return [()]
    shares: list[list[int]] = [[]]
    held = 0
    with open_store(folder).open(name, ranged=True) as file:
        try:
            metadata = pq.ParquetFile(file).metadata
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{url} is no Parquet and no CSV file of attributes: {error}") from error
        for group in range(metadata.num_row_groups):
            size_bytes = metadata.row_group(group).total_byte_size
            if shares[-1] and held + size_bytes > JOB_BYTES:
                shares.append([])
                held = 0
            shares[-1].append(group)
            held += size_bytes
    return [tuple(share) for share in shares]


def write_pieces(
    store: Store, folder: str, url: str, names: Sequence[str], share: tuple[int, ...], advance: Callable[[int], None]
) -> tuple[pa.Schema, list[FileRecord]]:
    """Write a share of a file of attributes as pieces below `folder`; return their columns and their records.

    Args:
        names: the columns that are kept; none: all but id.

    Raises:
        InputError: no column id, a row without id, an id twice, or a column that is not there or cannot be kept.
    """
    schema, records = pa.schema([]), []
    try:
        for table in _tables(url, share):
            if "id" not in table.column_names:
                raise InputError(f"{url} has no column 'id'; it has: {', '.join(table.column_names)}")
            schema = kept_schema(table.schema, names or [name for name in table.column_names if name != "id"], url)
            data = _piece(table.column("id"), fit(table, schema, url), url)
            records.append(write_file(store, f"{folder}{sha256_hex(data)[:32]}.arrow", data, rows=len(table)))
            advance(len(table))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{url} cannot be read as a file of attributes: {error}") from error
    return schema, records


def _tables(url: str, share: tuple[int, ...]) -> Iterator[pa.Table]:
    folder, name = split_url(url)
    with open_store(folder).open(name, ranged=bool(share)) as file:
        if share:
            for batch in pq.ParquetFile(file).iter_batches(PIECE_ROWS, list(share)):
                yield pa.Table.from_batches([batch])
        else:
            table = read_described(file, name)
            for start in range(0, len(table), PIECE_ROWS):
                yield table.slice(start, PIECE_ROWS)


def _piece(names: pa.ChunkedArray, table: pa.Table, url: str) -> bytes:
    """An Arrow file: hashes of ids, ascending, the ids, and their attributes."""
    ids = names.cast(pa.string()).combine_chunks()
    if ids.null_count:
        raise InputError(f"{url}: {ids.null_count:,} rows have no id; each row of attributes needs one")
    hashes = hash_ids(ids)
    order = np.argsort(hashes, kind="stable")
    rows, hashes = pa.array(order), hashes[order]
    ids = ids.take(rows)
    if twice := duplicates([ids_with(ids, np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))]):
        raise _twice(twice[0], url)
    columns = [pa.array(hashes), ids, *table.take(rows).columns]
    whole = pa.Table.from_arrays(columns, names=["hash", "id", *table.column_names]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue().to_pybytes()


def _twice(row_id: str, url: str) -> InputError:
    return InputError(f"{url} has two rows with the id {row_id!r}; each id needs one row of attributes")


@lru_cache(maxsize=OPEN_PIECES)
def _open(store: Store, name: str, size_bytes: int, sha256: str) -> pa.Table:
    """A piece, mapped into memory."""
    return pa.ipc.open_file(
        pa.memory_map(str(verified_path(store, name, size_bytes, sha256, cache_folder())))
    ).read_all()


@dataclass(frozen=True)
class Attributes:
    """The columns that a corpus keeps with each row, and where a worker reads them.

    Attributes:
        schema: the columns.
        file: url of the file that is joined by id; None: columns of the Parquet source itself.
        pieces: of the file, in `store`.
    """

    schema: pa.Schema
    file: str | None = None
    store: Store | None = None
    pieces: tuple[FileRecord, ...] = ()


def rows_by_id(kept: Attributes, ids: pa.Array) -> tuple[pa.Table, int]:
    """The attributes of ids text [n], in their order, null for ids that the file does not have; how many it has.

    Raises:
        InputError: the file has two rows of one of the ids.
    """
    assert kept.store is not None
    assert kept.file is not None
    hashes, places, before = hash_ids(ids), np.full(len(ids), -1, np.int64), 0
    tables = []
    for piece in kept.pieces:
        table = _open(kept.store, piece.name, piece.bytes, piece.sha256)
        known = table.column(0).to_numpy()
        left = np.arange(len(ids))
        at = np.searchsorted(known, hashes)
        while len(left):  # more than once only where ids differ and their hashes do not
            left = left[at[left] < len(known)]
            left = left[known[at[left]] == hashes[left]]
            same = pc.equal(table.column(1).take(pa.array(at[left])), ids.take(pa.array(left))).to_numpy()
            here = left[same]
            if (places[here] >= 0).any():
                raise _twice(ids[int(here[places[here] >= 0][0])].as_py(), kept.file)
            places[here] = before + np.arange(len(here))
            tables.append(table.select([*range(2, table.num_columns)]).take(pa.array(at[here])))
            before += len(here)
            left = left[~same]
            at[left] += 1
    whole = pa.concat_tables([kept.schema.empty_table(), *tables])
    return whole.take(pa.array(places, mask=places < 0)).combine_chunks(), before

"""The attributes of one shard's rows: an Arrow file of one column each, mapped into memory. No Ray.

attributes/<sha256>.arrow    one batch, uncompressed; row i belongs to row i of the shard's ids
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from hashray.data.attributes import join_schemas
from hashray.errors import CorruptArtifact, InputError


def as_attributes(attributes: pa.Table | Mapping[str, Any] | None, rows: int) -> pa.Table | None:
    """Return attributes as a table of `rows` rows.

    Args:
        attributes: a table, or columns by name, each of `rows` values.

    Raises:
        InputError: another number of rows, a name twice, a column named "id", or values that Arrow does not take.
    """
    if attributes is None:
        return None
    try:
        table = attributes if isinstance(attributes, pa.Table) else pa.table(dict(attributes))
        table[:0].take(pa.array([], pa.int64()))  # rows of some types cannot be sorted, run-end encoded ones for one
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"the attributes are no columns for Arrow: {error}") from error
    names = table.column_names
    if len(table) != rows or len(set(names)) < len(names) or "id" in names:
        raise InputError(
            f"the attributes are {len(table):,} rows of {', '.join(names)} for {rows:,} ids; expected one value for "
            "each id in each column, names that differ, and none that is 'id'"
        )
    return table if names else None


def attributes_bytes(table: pa.Table) -> bytes:
    """Return the Arrow file of a shard's attributes; the same bytes every time."""
    columns = [_one(column) for column in table.columns]
    batch = pa.record_batch(
        columns, schema=pa.schema([pa.field(n, c.type) for n, c in zip(table.column_names, columns, strict=True)])
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _one(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # more than 2 GiB of text
        raise InputError("the attributes of one shard take more than 2 GiB of text; use smaller shards")
    # A slice would be written with what lies around it.
    return pa.concat_arrays([whole])


def open_attributes(path: str | Path, rows: int) -> pa.Table:
    """Open a file whose sha256 the caller has verified, mapped into memory.

    Raises:
        CorruptArtifact: it is no Arrow file of `rows` rows.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptArtifact(f"{path} is no Arrow file of attributes: {error}") from error
    if len(table) != rows:
        raise CorruptArtifact(f"{path} holds {len(table):,} rows of attributes, its version says {rows:,}")
    return table


def merge_attributes(tables: list[pa.Table | None], rows: list[int]) -> pa.Table | None:
    """The attributes of several shards below each other; null where one lacks a column.

    Raises:
        InputError: columns of one name have types that Arrow does not join.
    """
    if all(table is None for table in tables):
        return None
    schema = joined_schema(tables)
    return pa.concat_tables([completed(table, count, schema) for table, count in zip(tables, rows, strict=True)])


def completed(table: pa.Table | None, rows: int, schema: pa.Schema) -> pa.Table:
    """The attributes of `rows` rows with all columns of a schema; null where there is none.

    Raises:
        InputError: a value does not fit the column's type, such as 2**60 + 1 in one of floats.
    """
    there = pa.table({}) if table is None else table
    columns: dict[str, Any] = {}
    for field in schema:
        name = field.name
        try:
            columns[name] = (
                there.column(name).cast(field.type) if name in there.column_names else pa.nulls(rows, field.type)
            )
        except pa.ArrowException as error:
            kind = there.column(name).type
            raise InputError(
                f"attribute {name!r} is {kind} in some rows and needs {field.type} for others, which does not hold "
                f"all values: {error}. Append it with one type"
            ) from error
    return pa.table(columns, schema=schema)


def joined_schema(tables: Sequence[pa.Table | None]) -> pa.Schema:
    """The columns of all tables that are there.

    Raises:
        InputError: columns of one name have types that Arrow does not join.
    """
    return join_schemas([table.schema for table in tables if table is not None])

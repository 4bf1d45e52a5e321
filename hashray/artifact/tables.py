"""The Parquet files of an artifact: the same bytes every time, read only after their checksum."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from hashray.artifact.manifest import FileRecord
from hashray.artifact.publish import RESTORE, missing, read_file
from hashray.errors import CorruptArtifact, InputError
from hashray.storage import Store, join

ROW_GROUP_ROWS = 1000


def table_bytes(table: pa.Table) -> bytes:
    """A Parquet file of `table`, the same bytes every time: row groups of 1,000, page checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_table(store: Store, record: FileRecord, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a whole Parquet file of an artifact, its sha256 verified before a byte is parsed."""
    return pq.read_table(io.BytesIO(read_file(store, record)), columns=columns)


def read_columns(store: Store, record: FileRecord, columns: Sequence[str]) -> pa.Table:
    """Read some columns of a Parquet file of an artifact, in the order asked for; the others stay where they are.

    The checksum of each page is verified, not the sha256 of the file, which needs every byte.

    Raises:
        CorruptArtifact: the file is missing, cannot be read, lacks a column or has other rows than the manifest says.
    """
    name = join(store.url, record.name)
    try:
        with store.open(record.name) as handle:
            table = pq.ParquetFile(handle, page_checksum_verification=True).read(columns=list(columns))
    except InputError as error:
        raise CorruptArtifact(missing(store, record)) from error
    except (pa.ArrowException, OSError) as error:
        raise CorruptArtifact(f"{name} cannot be read: {error}. {RESTORE}") from error
    lacks = [column for column in columns if column not in table.column_names]
    if lacks:
        raise CorruptArtifact(f"{name} has no column {', '.join(lacks)}: it has {', '.join(table.column_names)}")
    if record.rows is not None and len(table) != record.rows:
        raise CorruptArtifact(f"{name} holds {len(table)} rows, its manifest says {record.rows}. {RESTORE}")
    return table.select(list(columns))

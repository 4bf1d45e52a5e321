"""The Parquet files of an artifact: the same bytes every time, read only after their checksum."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from hashray.artifact.manifest import FileRecord
from hashray.artifact.publish import read_file
from hashray.storage import Store

ROW_GROUP_ROWS = 1000


def table_bytes(table: pa.Table) -> bytes:
    """A Parquet file of `table`, the same bytes every time: row groups of 1,000, page checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_table(store: Store, record: FileRecord, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a whole Parquet file of an artifact, its sha256 verified before a byte is parsed."""
    return pq.read_table(io.BytesIO(read_file(store, record)), columns=columns)

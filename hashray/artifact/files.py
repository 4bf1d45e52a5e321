"""The table of an artifact's files, for more of them than a manifest lists by itself.

files-<hash>.parquet    name, bytes, sha256, rows, info (JSON); a row a file, in the manifest's order
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from hashray.artifact.manifest import FROM_JSON, FileRecord

FILES = "files.parquet"
MOST_LISTED = 1000  # files in the JSON of a manifest; more have a table
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("rows", pa.int64()),
        pa.field("info", pa.string(), nullable=False),
    ]
)
_RECORDS = TypeAdapter(tuple[FileRecord, ...])


def pack(files: Sequence[FileRecord]) -> bytes:
    """The Parquet file of some records: the same bytes every time."""
    columns = [
        [record.name for record in files],
        [record.bytes for record in files],
        [record.sha256 for record in files],
        [record.rows for record in files],
        [json.dumps(record.info, sort_keys=True, ensure_ascii=False) for record in files],
    ]
    sink = io.BytesIO()
    table = pa.table([pa.array(*pair) for pair in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def unpack(data: bytes) -> tuple[FileRecord, ...]:
    """The records of the bytes that `pack` returned, which the caller has verified.

    Raises:
        ValueError: these are no such bytes.
    """
    try:
        table = pq.ParquetFile(io.BytesIO(data)).read(use_threads=False)
        names, sizes, digests, rows, texts = (table.column(name).to_pylist() for name in SCHEMA.names)
        infos = from_json(f"[{','.join(texts)}]")  # one by one it takes three times as long
        records = [
            {"name": name, "bytes": size, "sha256": digest, "rows": count, "info": info}
            for name, size, digest, count, info in zip(names, sizes, digests, rows, infos, strict=True)
        ]
        return _RECORDS.validate_python(records, context=FROM_JSON)
    except (pa.ArrowException, KeyError, TypeError, ValidationError) as error:
        raise ValueError(str(error)) from error

"""The Parquet files of an artifact: the same bytes every time, read only after their checksum."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from hashray.artifact.manifest import FileRecord
from hashray.artifact.publish import RESTORE, missing, read_file
from hashray.errors import CorruptArtifact, InputError
from hashray.storage import Store, join
from hashray.storage.ranged import RangedFile, Span

ROW_GROUP_ROWS = 1000
BATCH_BYTES = 32 << 20  # of wanted columns in memory at a time


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

    From S3 that is one request for the footer and, where the columns are not in it, a few more, for at most twice the
    bytes of the columns. The checksum of each page is verified, not the sha256 of the file, which needs every byte.

    Raises:
        CorruptArtifact: the file is missing, cannot be read, lacks a column or has other rows than the manifest says.
    """
    return pa.concat_tables(iterate_columns(store, record, columns))


def iterate_columns(store: Store, record: FileRecord, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns as `read_columns` does, in tables of some row groups each, at least one table.

    The columns of a table take at most 32 MiB in the file, if a row group does not take more by itself.
    """
    name = join(store.url, record.name)
    try:
        with store.open(record.name, ranged=True) as handle:
            file = pq.ParquetFile(handle, pre_buffer=False, page_checksum_verification=True)
            names = file.schema_arrow.names
            lacks = [column for column in columns if column not in names]
            if lacks:
                raise CorruptArtifact(f"{name} has no column {', '.join(lacks)}: it has {', '.join(names)}")
            if record.rows is not None and file.metadata.num_rows != record.rows:
                rows = file.metadata.num_rows
                raise CorruptArtifact(f"{name} holds {rows} rows, its manifest says {record.rows}. {RESTORE}")
            for groups, spans in _batches_of_groups(file.metadata, set(columns)):
                if isinstance(handle, RangedFile):
                    handle.fetch(spans)
                yield file.read_row_groups(groups, columns=list(columns)).select(list(columns))
    except InputError as error:
        raise CorruptArtifact(missing(store, record)) from error
    except (pa.ArrowException, OSError) as error:
        raise CorruptArtifact(f"{name} cannot be read: {error}. {RESTORE}") from error


def _batches_of_groups(metadata: pq.FileMetaData, columns: set[str]) -> Iterator[tuple[list[int], list[Span]]]:
    """Split the row groups into runs of some bytes; with each the places of the columns' pages."""
    groups, spans, size_bytes = list[int](), list[Span](), 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [chunk for chunk in map(group.column, range(metadata.num_columns)) if _top(chunk) in columns]
        more_bytes = sum(chunk.total_compressed_size for chunk in chunks)
        if groups and size_bytes + more_bytes > BATCH_BYTES:
            yield groups, spans
            groups, spans, size_bytes = [], [], 0
        groups.append(i)
        size_bytes += more_bytes
        for chunk in chunks:
            start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
            spans.append((start, start + chunk.total_compressed_size))
    yield groups, spans  # of a file without rows, too: its schema


def _top(chunk: pq.ColumnChunkMetaData) -> str:
    return str(chunk.path_in_schema).partition(".")[0]

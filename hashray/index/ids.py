"""The ids of one shard: an Arrow file of one ascending column, mapped into memory. No Ray.

A row's place in the column is its number inside FAISS. Ids ascend by their UTF-8 bytes, as Python compares text.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.errors import CorruptArtifact, InputError

TYPES = (pa.string(), pa.large_string())
# A page of ids that was touched counts as memory of the process until it is released: up to 2 MiB of file for one id,
# where the page cache holds it in one piece. Files below this size may stay.
KEEP_BYTES = 4 << 20


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of text as one array, with 64-bit offsets where 32 bits are too few."""
    if column.nbytes >= 1 << 31:
        column = column.cast(pa.large_string())
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def check_unique(ids: pa.Array) -> None:
    """Raise InputError when two neighbours of the ascending `ids` are equal."""
    same = pc.equal(ids[1:], ids[:-1])
    if pc.any(same).as_py():
        twice = ids[1:].filter(same).unique()
        raise duplicate_ids(len(twice), twice[0].as_py())


def duplicate_ids(count: int, first: str) -> InputError:
    """The error of ids that stand in more than one row."""
    return InputError(
        f"{count:,} ids stand in more than one row, the first {first!r}: in an index every id is one row. Where they "
        "come from a corpus, `hashray verify` on it and on its codes names the files; mend the corpus, encode again"
    )


def ids_bytes(ids: pa.Array) -> bytearray:
    """Return the Arrow file of a shard's ids, ascending: one batch, uncompressed; the same bytes every time."""
    ids = ids.cast(pa.string() if ids.nbytes < 1 << 31 else pa.large_string())
    batch = pa.record_batch([ids], names=["id"])
    size = pa.MockOutputStream()
    _write(batch, size)
    # Sized at once: a stream that grows by doubling would hold the ids up to three times.
    data = bytearray(size.size())
    _write(batch, pa.FixedSizeBufferWriter(pa.py_buffer(data)))
    return data


def _write(batch: pa.RecordBatch, sink: pa.NativeFile) -> None:
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_ids(data: Any) -> pa.Array:
    """The ids in the bytes of their file, without a copy; raises ValueError where it is another file."""
    reader = pa.ipc.open_file(pa.py_buffer(data))
    if reader.num_record_batches != 1 or reader.schema.names != ["id"] or reader.schema.types[0] not in TYPES:
        raise ValueError("expected one batch of one text column, id")
    return reader.get_batch(0).column(0)


class MappedIds:
    """The ids of a shard, in their file: only the pages of ids that are asked for are read."""

    def __init__(self, path: str | Path, rows: int) -> None:
        """Open a file whose sha256 the caller has verified.

        Raises:
            CorruptArtifact: it is no Arrow file of `rows` ids.
        """
        try:
            with Path(path).open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.array = read_ids(self._map)
        except (pa.ArrowInvalid, ValueError) as error:
            raise CorruptArtifact(f"{path} is no Arrow file of ids: {error}") from error
        if len(self.array) != rows:
            raise CorruptArtifact(f"{path} holds {len(self.array):,} ids, its version says {rows:,}")

    def take(self, positions: NDArray[np.int64]) -> list[str]:
        """Return the ids of rows int64 [n]."""
        return _take(self.array, positions).to_pylist()

    def release(self) -> None:
        """Give the pages that were touched back: they stay in the page cache, which is no memory of this process."""
        if len(self._map) > KEEP_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)


def find(array: pa.Array, wanted: pa.Array) -> NDArray[np.int64]:
    """The positions int64 [m] of `wanted` [m], ascending, in the ascending `array` [n]; -1 where one is not there.

    A binary search: only the pages of ids on the way are read.

    >>> find(pa.array(["a", "c", "e"]), pa.array(["b", "c"]))
    array([-1,  1])
    """
    if not len(array) or not len(wanted):
        return np.full(len(wanted), -1, np.int64)
    wanted = wanted.cast(array.type)
    places = np.minimum(pc.search_sorted(array, wanted).to_numpy().astype(np.int64), len(array) - 1)
    same = pc.equal(_take(array, places), wanted).to_numpy(zero_copy_only=False)
    return np.where(same, places, -1)


def _take(array: pa.Array, positions: NDArray[np.int64]) -> pa.Array:
    # Not pa.array: it imports pandas, 40 MB of a searcher's memory.
    buffer = pa.py_buffer(np.ascontiguousarray(positions, np.int64))
    return array.take(pa.Array.from_buffers(pa.int64(), len(positions), [None, buffer]))

"""The images of a corpus by the ids of their rows, and their thumbnails. No Ray.

Where a row stands is looked up by the hash of its id, in files under the cache that are written once for a corpus and
mapped: nothing in memory grows with its rows. An id is only ever compared, never a path.
"""

from __future__ import annotations

import io
import threading
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hashray.artifact import FileRecord
from hashray.data.corpus import Corpus, iterate_bytes
from hashray.data.images import BadImage, decode
from hashray.data.unique import hash_ids
from hashray.errors import CorruptArtifact
from hashray.search.metrics import Metrics
from hashray.storage import join
from hashray.storage.base import TEMP_PREFIX
from hashray.storage.cache import verified_path

CHUNK_ROWS = 4 << 20  # rows of one lookup file: 64 MiB
THUMBNAILS_BYTES = 64 << 20
PLACE = np.dtype([("hash", "<u8"), ("part", "<u4"), ("row", "<u4")])


class Picture(NamedTuple):
    """Encoded bytes of an image, and their media type."""

    data: bytes
    media_type: str


class Pictures:
    """Looks up images of a corpus; thumbnails are kept up to 64 MiB. Safe from several threads.

    Opening one makes the lookup files if they are not there: one read of the row tables, a second for 10^6 rows.
    """

    def __init__(self, corpus: Corpus, cache: Path, metrics: Metrics, most_pixels: int) -> None:
        self.corpus, self._cache, self._metrics, self._most_pixels = corpus, cache, metrics, most_pixels
        self._lookup = [np.load(path, mmap_mode="r") for path in _lookup_files(corpus, cache)]
        self._thumbnails: OrderedDict[tuple[str, int], Picture] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def original(self, row_id: str) -> Picture | None:
        """The bytes of an image as they were ingested; None where the corpus does not have the id.

        Raises:
            CorruptArtifact: a file of the corpus is missing or changed. StoreUnavailable: it cannot be read now.
        """
        data = self._bytes_of(row_id)
        return None if data is None else Picture(data, _media_type(data))

    def thumbnail(self, row_id: str, size: int) -> Picture | None:
        """The image with its longer side at `size` pixels, as JPEG, or PNG where it is small; None as `original`.

        Raises:
            BadImage: it cannot be decoded any more. Others as `original`.
        """
        with self._lock:
            if (kept := self._thumbnails.get((row_id, size))) is not None:
                self._thumbnails.move_to_end((row_id, size))
        self._metrics.cache.labels("thumbnail", "miss" if kept is None else "hit").inc()
        if kept is None and (data := self._bytes_of(row_id)) is not None:
            kept = shrink(data, size, self._most_pixels)
            with self._lock:
                if (other := self._thumbnails.pop((row_id, size), None)) is not None:  # of another thread
                    self._bytes -= len(other.data)
                self._thumbnails[(row_id, size)] = kept
                self._bytes += len(kept.data)
                while self._bytes > THUMBNAILS_BYTES:
                    self._bytes -= len(self._thumbnails.popitem(last=False)[1].data)
        return kept

    def _bytes_of(self, row_id: str) -> bytes | None:
        for part, row in self._places(row_id):
            record = self.corpus.parts[part]
            if self._read(record, row, ["id"]).column("id")[0].as_py() != row_id:
                continue  # another id with the same hash
            table = self._read(self.corpus.beside(record), row, ["image", "uri"])
            data = next(iterate_bytes(table.append_column("id", pa.array([row_id]))))[1]
            if isinstance(data, BadImage):
                raise CorruptArtifact(f"the image of row {row_id!r} cannot be read: {data}")
            return data
        return None

    def _places(self, row_id: str) -> list[tuple[int, int]]:
        wanted = hash_ids(pa.array([row_id], pa.string()))[0]
        places = []
        for chunk in self._lookup:
            first = int(np.searchsorted(chunk["hash"], wanted))
            while first < len(chunk) and chunk["hash"][first] == wanted:
                places.append((int(chunk["part"][first]), int(chunk["row"][first])))
                first += 1
        return places

    def _read(self, record: FileRecord, row: int, columns: list[str]) -> pa.Table:
        """One row of a part: its row group is read. Of a local file the sha256 is verified, once, as in every search;
        of one on S3 only the checksums of the pages that are read."""
        store = self.corpus.store
        try:
            if store.local_path(record.name) is not None:
                path = verified_path(store, record.name, record.bytes, record.sha256, self._cache)
                with pq.ParquetFile(path, memory_map=True) as file:
                    return _row(file, row, columns)
            with store.open(record.name, ranged=True) as handle:
                return _row(pq.ParquetFile(handle, page_checksum_verification=True), row, columns)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise CorruptArtifact(f"{join(store.url, record.name)} cannot be read: {error}") from error


def _row(file: pq.ParquetFile, row: int, columns: list[str]) -> pa.Table:
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < rows:
            return file.read_row_group(group, columns=columns, use_threads=False).slice(row, 1)
        row -= rows
    raise IndexError(f"row {row} is not there")


def shrink(data: bytes, size: int, most_pixels: int) -> Picture:
    """An image with its longer side at `size` pixels at most: JPEG, or PNG below 65 pixels, where JPEG smears.

    Raises:
        BadImage: it cannot be decoded.
    """
    image = decode(data, most_pixels)
    small = max(image.size) <= 64
    if max(image.size) > size:
        image.thumbnail((size, size), Image.Resampling.BILINEAR, reducing_gap=2.0)
    sink = io.BytesIO()
    if small:
        image.save(sink, "PNG")
        return Picture(sink.getvalue(), "image/png")
    image.save(sink, "JPEG", quality=85)
    return Picture(sink.getvalue(), "image/jpeg")


def _media_type(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Image.MIME.get(image.format or "", "application/octet-stream")
    except Exception:  # Pillow raises nearly anything on broken bytes
        return "application/octet-stream"


def _lookup_files(corpus: Corpus, cache: Path) -> list[Path]:
    """The files of (hash, part, row), sorted by hash, for some parts each; those that are missing are written."""
    folder = cache / "pictures" / corpus.manifest.id
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[int]] = [[]]
    rows = 0
    for number, record in enumerate(corpus.parts):
        if groups[-1] and rows + (record.rows or 0) > CHUNK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(number)
        rows += record.rows or 0
    paths = [folder / f"{number:05d}.npy" for number in range(len(groups))]
    for path, group in zip(paths, groups, strict=True):
        if not path.is_file():
            part = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")  # other processes may write the same file
            try:
                with part.open("wb") as file:
                    np.save(file, _chunk(corpus, group))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    return paths


def _chunk(corpus: Corpus, group: list[int]) -> np.ndarray:
    chunks = [np.empty(0, PLACE)]
    for number in group:
        ids = corpus.part_rows(corpus.parts[number], "all").column("id").combine_chunks()
        ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids
        some = np.empty(len(ids), PLACE)
        some["hash"], some["part"], some["row"] = hash_ids(ids), number, np.arange(len(ids))
        chunks.append(some)
    whole = np.concatenate(chunks)
    return whole[np.argsort(whole["hash"], kind="stable")]

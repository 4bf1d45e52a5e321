"""The corpus: schema, label protocol, reading. No Ray.

corpus/  rows/part-00000-<plan>.parquet … (id, labels, split, and the attributes of each row)
         images/part-00000-<plan>.parquet … (image, uri) · classes.json · quarantine.parquet · manifest.json

The row tables are small and read by everybody. A part of images has the same rows in the same order as the row table
of its name. `image` holds the bytes as they were, or is null where the corpus keeps a reference in `uri`. `labels`
are class indices into classes.json. A features artifact (a corpus seen through a frozen trunk) has features/ (feature)
in the place of images/, and is read by the same class.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray import artifact
from hashray.artifact import FileRecord, Manifest, read_table
from hashray.data.columns import in_split, list_matrix, multi_hot
from hashray.data.images import BadImage, Resize, decode_rows
from hashray.data.sources import fetch
from hashray.errors import CorruptArtifact, InputError, perhaps
from hashray.storage import Store, open_store

READ_THREADS = 8
ROW_SCHEMA = pa.schema([("id", pa.string()), ("labels", pa.list_(pa.int32())), ("split", pa.string())])
IMAGE_SCHEMA = pa.schema([("image", pa.large_binary()), ("uri", pa.string())])


@dataclass(frozen=True)
class Rows:
    """Ids and labels of some rows, in corpus order: ids [n], labels multi-hot uint8 [n, num_classes]."""

    ids: list[str]
    labels: NDArray[np.uint8]


class Corpus:
    """A finished corpus or features artifact, opened for reading."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        record = next((r for r in manifest.files if artifact.plain_name(r.name) == "classes.json"), None)
        if record is None:
            raise CorruptArtifact(f"{store.url}/manifest.json lists no classes.json")
        self.classes: list[str] = json.loads(artifact.read_file(store, record))

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def parts(self) -> list[FileRecord]:
        """The files of the row tables, in order; `info["splits"]` counts the rows of each split in each."""
        return [r for r in self.manifest.files if r.name.startswith("rows/")]

    def beside(self, record: FileRecord) -> FileRecord:
        """The file of images or of features with the rows of this part."""
        folder = "features" if self.manifest.kind == "features" else "images"
        return self.manifest.record(record.name.replace("rows", folder, 1))

    def input_bytes(self, record: FileRecord) -> int:
        """Bytes of what a part gives to a trunk: of its encoded images, or of its features."""
        return int(record.info.get("image_bytes", self.beside(record).bytes))

    def count(self, split: str) -> int:
        """Rows in a split; "all" is every row."""
        return sum(self.count_part(record, split) for record in self.parts)

    def count_part(self, record: FileRecord, split: str) -> int:
        if split == "all":
            return int(record.rows or 0)
        return sum(n for word, n in record.info["splits"].items() if split in word.split("+"))

    def require(self, split: str, why: str) -> int:
        """Rows in a split, or InputError naming the splits that there are."""
        count = self.count(split)
        if not count:
            words = {word for record in self.parts for word in record.info["splits"]}
            known = sorted({part for word in words for part in word.split("+")})
            have = ", ".join(f"{word} ({self.count(word):,})" for word in known)
            better = perhaps(split, known) or ". Ingest again with another --split-protocol"
            raise InputError(
                f"{self.store.url} has no {split!r} rows, {why} needs them; it has {have or 'no rows'}{better}"
            )
        return count

    def read_part(self, record: FileRecord, split: str = "all") -> pa.Table:
        """One part, verified, only the rows of a split: (id, labels, split) and (image, uri) or (feature)."""
        table, beside = self.part_rows(record, "all"), read_table(self.store, self.beside(record))
        if len(table) != len(beside):
            raise CorruptArtifact(
                f"{self.store.url}/{record.name} has {len(table)} rows, the file beside it {len(beside)}"
            )
        for name in beside.column_names:
            table = table.append_column(name, beside.column(name))
        return table if split == "all" else _of_split(table, split)

    def row_tables(self, split: str) -> Iterator[pa.Table]:
        """Yield (id, labels, split) of the rows of a split, part by part, some parts ahead; no image is read."""
        records = iter([record for record in self.parts if split == "all" or self.count_part(record, split)])
        with ThreadPoolExecutor(READ_THREADS) as pool:
            ahead = deque(pool.submit(self.part_rows, record, split) for record in islice(records, READ_THREADS))
            while ahead:
                table = ahead.popleft().result()
                ahead.extend(pool.submit(self.part_rows, record, split) for record in islice(records, 1))
                yield table

    def chosen(self, split: str, ids: Collection[str], parts: Sequence[FileRecord] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of a split with these ids, all columns, from those of `parts` (unset: all) that hold any."""
        wanted = pa.array(sorted(set(ids)), pa.string())
        left = len(wanted)
        for record in self.parts if parts is None else parts:
            if not left:
                return
            if not self.count_part(record, split):
                continue
            rows = self.part_rows(record, "all")
            mine = pc.is_in(rows.column("id"), wanted)
            if split != "all":
                mine = pc.and_(mine, pa.array(in_split(rows.column("split"), split)))
            if count := pc.sum(mine).as_py():
                left -= count
                yield self.read_part(record).filter(mine)

    def rows(self, split: str) -> Rows:
        """Ids and labels of a split, in corpus order; no image is read."""
        tables = list(self.row_tables(split))
        ids = [row_id for table in tables for row_id in table.column("id").to_pylist()]
        labels = [np.zeros((0, self.num_classes), dtype=np.uint8), *[self.label_matrix(table) for table in tables]]
        return Rows(ids, np.concatenate(labels))

    def part_rows(self, record: FileRecord, split: str) -> pa.Table:
        """(id, labels, split) of a part's rows of a split, verified; no image and no attribute is read."""
        table = read_table(self.store, record, ROW_SCHEMA.names)
        return table if split == "all" else _of_split(table, split)

    def whole_rows(self, record: FileRecord) -> pa.Table:
        """(id, labels, split) and the attributes of a part's rows, verified."""
        return read_table(self.store, record)

    def label_matrix(self, table: pa.Table) -> NDArray[np.uint8]:
        """Multi-hot labels uint8 [n, num_classes] of rows of this corpus."""
        return multi_hot(table.column("labels"), self.num_classes)

    def inputs(self, table: pa.Table, size: int, resize: Resize) -> NDArray[Any]:
        """The input of a trunk, for rows of this corpus: cached features float32 [n, d], or pixels uint8 [n, 3, s, s].

        Raises:
            CorruptArtifact: a row cannot be decoded; ingest decoded it, so it has changed since.
        """
        if "feature" in table.column_names:
            return list_matrix(table.column("feature"))
        pixels, _, bad = decode_rows(iterate_bytes(table), size, resize)
        if bad:
            raise CorruptArtifact(f"{self.store.url}: row {bad[0][0]!r} cannot be decoded any more: {bad[0][1]}")
        return pixels

    def images(self, split: str, ids: Sequence[str], parts: Sequence[FileRecord] | None = None) -> dict[str, bytes]:
        """The bytes of some rows by id, for galleries; only parts that hold such rows are read.

        Args:
            parts: where the rows are known to be; the row tables of the other parts are not opened.
        """
        return {
            row_id: data
            for table in self.chosen(split, ids, parts)
            for row_id, data in iterate_bytes(table)
            if isinstance(data, bytes)
        }


def _of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pa.array(in_split(table.column("split"), split)))


def iterate_bytes(table: pa.Table) -> Iterator[tuple[str, bytes | BadImage]]:
    """(id, bytes) of every row of a part, following references; BadImage where a reference cannot be read."""
    for row_id, image, uri in zip(*(table.column(n).to_pylist() for n in ("id", "image", "uri")), strict=True):
        if image is not None:
            yield row_id, image
            continue
        try:
            yield row_id, fetch(uri)
        except InputError as error:  # of this path alone; credentials or a store that fails end the stage
            yield row_id, BadImage(f"reference: {error}")


def open_corpus(url: str, kind: str | None = "corpus") -> Corpus:
    """Open a corpus (or, with kind="features", cached features).

    Raises:
        InputError: not there or not finished. CorruptArtifact: its manifest or classes.json was changed.
    """
    store = open_store(url)
    return Corpus(store, artifact.load_manifest(store, kind))

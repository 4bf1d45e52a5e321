"""The groups of a duplicates report, some at a time, for the page. No Ray."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hashray import artifact
from hashray.artifact import read_columns
from hashray.storage import open_store
from hashray.storage.cache import cache_folder, verified_path

MEMBERS = 100  # of a group in one answer
Kind = Literal["exact", "near"]


class Groups:
    """An open duplicates report: 16 bytes of memory a group."""

    def __init__(self, url: str) -> None:
        """Open a report.

        Raises:
            InputError: not there or not finished. MismatchError: another artifact.
        """
        self.store = open_store(url)
        manifest = artifact.load_manifest(self.store, "duplicates")
        self.within = int(manifest.info["within"])
        self._files = sorted((r for r in manifest.files if r.name.startswith("groups/")), key=lambda r: r.name)
        self._ends = np.cumsum([record.rows or 0 for record in self._files])
        starts, exact, last, row = [], [], -1, 0
        for record in self._files:
            table = read_columns(self.store, record, ["group", "kind"])
            numbers = table.column("group").to_numpy()
            first = np.flatnonzero(np.diff(numbers, prepend=last))
            starts.append(first + row)
            exact.append(pc.equal(table.column("kind"), "exact").to_numpy()[first])
            last, row = (numbers[-1] if len(numbers) else last), row + len(table)
        self._starts = np.concatenate([np.empty(0, np.int64), *starts, [row]]).astype(np.int64)
        self._exact = np.concatenate([np.empty(0, bool), *exact])

    def some(self, offset: int, limit: int, kind: Kind | None = None) -> tuple[int, list[dict[str, Any]]]:
        """How many groups there are, and those from `offset` on, the largest first."""
        numbers = np.arange(len(self._exact)) if kind is None else np.flatnonzero(self._exact == (kind == "exact"))
        chosen = numbers[offset : offset + limit].tolist()
        return len(numbers), [self._group(number) for number in chosen]

    def _group(self, number: int) -> dict[str, Any]:
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        order = [("kept", "descending"), ("distance", "ascending"), ("id", "ascending")]
        table = self._rows(start, end).sort_by(order).slice(0, MEMBERS)
        members = [
            {"id": row["id"], "distance": row["distance"], "keep": row["kept"]}
            for row in table.select(["id", "distance", "kept"]).to_pylist()
        ]
        kind = "exact" if self._exact[number] else "near"
        return {"group": number, "kind": kind, "rows": end - start, "members": members}

    def _rows(self, start: int, end: int) -> pa.Table:
        """Rows of all files: only the row groups that hold them are read, and a file is verified once."""
        tables = []
        for record, stop in zip(self._files, self._ends.tolist(), strict=True):
            before = stop - (record.rows or 0)
            if before < end and start < stop:
                path = verified_path(self.store, record.name, record.bytes, record.sha256, cache_folder())
                with pq.ParquetFile(path, memory_map=True) as file:
                    tables.append(_slice(file, max(0, start - before), min(end, stop) - before))
        return pa.concat_tables(tables)


def _slice(file: pq.ParquetFile, start: int, end: int) -> pa.Table:
    first, groups, skipped = 0, [], 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first < end and start < first + rows:
            groups.append(group)
        elif not groups:
            skipped += rows
        first += rows
    return file.read_row_groups(groups).slice(start - skipped, end - start)

"""Rows of an index by id: where they stand in its shards, which of them live, and marking them deleted. No Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hashray.artifact import read_file
from hashray.artifact.bitmap import Bitmap
from hashray.codes import Codes
from hashray.errors import InputError
from hashray.index.attributes import completed, joined_schema, open_attributes
from hashray.index.ids import MappedIds, find
from hashray.index.log import Version
from hashray.index.shard import open_shard
from hashray.index.version import ShardRecord, write_content
from hashray.storage import Store, join
from hashray.storage.cache import verified_path

SHOWN = 3  # ids in the text of an error

# A shard of a version, and the rows of it that are deleted by a change.
Marked = tuple[ShardRecord, Bitmap | None]


def open_ids(store: Store, shard: ShardRecord, cache: Path) -> MappedIds:
    """The ids of a shard, mapped into memory; every byte is verified first."""
    ids = shard.ids
    return MappedIds(verified_path(store, ids.name, ids.bytes, ids.sha256, cache), shard.rows)


def deleted_rows(store: Store, shard: ShardRecord) -> Bitmap | None:
    """The deleted rows of a shard; None where there are none."""
    record = shard.deleted
    if record is None:
        return None
    return Bitmap.from_bytes(read_file(store, record), shard.rows, record.rows or 0, join(store.url, record.name))


def attributes_of(store: Store, shard: ShardRecord, cache: Path) -> pa.Table | None:
    """The attributes of a shard's rows, mapped into memory; None where it has none."""
    record = shard.attributes
    if record is None:
        return None
    return open_attributes(verified_path(store, record.name, record.bytes, record.sha256, cache), shard.rows)


def require_joining(store: Store, shards: Iterable[ShardRecord], new: Iterable[ShardRecord], cache: Path) -> None:
    """Raise InputError where attributes of one name have types, or values, that a compaction could not join."""
    there, added = ([shard for shard in some if shard.attributes is not None] for some in (shards, new))
    types: dict[str, set[str]] = {}
    for shard in (*there, *added):
        for name, kind in shard.attributes.info["columns"].items() if shard.attributes else ():
            types.setdefault(name, set()).add(kind)
    if not added or all(len(kinds) == 1 for kinds in types.values()):
        return
    old, new_tables = ([attributes_of(store, shard, cache) for shard in some] for some in (there, added))
    before, after = joined_schema(old), joined_schema([*old, *new_tables])
    wider = any(after.field(field.name).type != field.type for field in before)
    for table in (*new_tables, *(old if wider else ())):
        assert table is not None
        completed(table, len(table), after)


@dataclass(frozen=True)
class ShardRows:
    """Living rows of a shard: positions int64 [n], ascending, and codes uint8 [n, num_bits // 8]."""

    positions: NDArray[np.int64]
    codes: Codes


def read_rows(store: Store, shard: ShardRecord, kind: str, num_bits: int, cache: Path) -> ShardRows:
    """Read the codes of a shard's living rows, its bytes verified.

    Raises:
        CorruptArtifact: the file is missing, is not what was published, or does not hold its version's rows.
    """
    record, dead = shard.codes, deleted_rows(store, shard)
    path = verified_path(store, record.name, record.bytes, record.sha256, cache)
    opened = open_shard(path, kind, num_bits, shard.rows)  # outlives the view of its codes
    positions = np.arange(shard.rows) if dead is None else (~dead).positions()
    return ShardRows(positions, opened.codes()[positions])


class Places:
    """Where some ids stand in the shards of an index. Shards are constant, so each is searched once."""

    def __init__(self, store: Store, cache: Path) -> None:
        self.store, self.cache = store, cache
        self._known: dict[str, NDArray[np.int64]] = {}

    def look(
        self, shards: Iterable[ShardRecord], names: Sequence[pa.Array], living: Literal["refuse", "delete"]
    ) -> tuple[list[Marked], int]:
        """Return every shard with the living rows of these ids in it, and their number.

        Args:
            names: ascending arrays of ids; the same at each call.
            living: "refuse": such a row is an error.

        Raises:
            InputError: a row is refused.
        """
        marked, count, shown = list[Marked](), 0, list[str]()
        for shard in shards:
            places = self._in(shard, names)
            if len(places):
                dead = deleted_rows(self.store, shard)
                places = places if dead is None else places[~dead.contains(places)]
            if len(places) and living == "refuse" and not shown:
                shown = open_ids(self.store, shard, self.cache).take(places[:SHOWN])
            marked.append((shard, Bitmap.of(shard.rows, places) if len(places) else None))
            count += len(places)
        if shown:
            raise InputError(
                f"{count:,} of the ids are in the index already, such as {', '.join(map(repr, shown))}; nothing was "
                "appended. Leave them out, delete them first, or replace their rows (--replace)"
            )
        return marked, count

    def _in(self, shard: ShardRecord, names: Sequence[pa.Array]) -> NDArray[np.int64]:
        """The positions of the ids in a shard, deleted rows or not."""
        key = shard.ids.sha256
        if key not in self._known:
            near = [within(some, shard.first, shard.last) for some in names]
            near = [some for some in near if len(some)]
            places = np.empty(0, np.int64)
            if near:
                ids = open_ids(self.store, shard, self.cache)
                places = np.concatenate([find(ids.array, some) for some in near])
                ids.release()
            self._known[key] = np.sort(places[places >= 0])
        return self._known[key]


def within(names: pa.Array, first: str, last: str) -> pa.Array:
    """The part of ascending ids from `first` to `last`.

    >>> within(pa.array(["a", "c", "e"]), "b", "e").to_pylist()
    ['c', 'e']
    """
    kind = names.type
    start = pc.sum(pc.less(names, pa.scalar(first, kind))).as_py() or 0
    end = pc.sum(pc.less_equal(names, pa.scalar(last, kind))).as_py() or 0
    return names[start:end]


def check_living(places: Places, head: Version, names: pa.Array) -> None:
    """Raise InputError with the ids that no living row has, of which there are some."""
    living = []
    for shard, rows in places.look(head.shards, [names], "delete")[0]:
        if rows is not None:
            living += open_ids(places.store, shard, places.cache).take(rows.positions())
    absent = names.filter(pc.invert(pc.is_in(names, pa.array(living, names.type))))
    shown = ", ".join(map(repr, absent[:SHOWN].to_pylist()))
    raise InputError(
        f"{len(absent):,} of the ids are not in version {head.number} of {places.store.url}, such as {shown}; nothing "
        "was deleted. Leave them out, or skip ids that are not there (--missing-ok)"
    )


def with_deleted(store: Store, marked: Iterable[Marked], generation: int) -> list[ShardRecord]:
    """The shards with more rows deleted, their bitmaps written; without those of which no row is left."""
    shards = []
    for shard, rows in marked:
        if rows is None:
            shards.append(shard)
            continue
        dead = deleted_rows(store, shard)
        whole = rows if dead is None else dead | rows
        if whole.count < shard.rows:
            record = write_content(store, "deleted", whole.to_bytes(), whole.count, generation)
            shards.append(shard.model_copy(update={"deleted": record}))
    return shards

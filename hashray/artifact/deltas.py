"""The files of an index's version as a few tables, which versions share.

Each table holds changes to the files of the tables before it: a record that is new or another, or one that is gone. A
version with few changes writes one small table. A table is merged with the next larger one while that is less than
twice its size, so a version of n files has at most log2(n) + 1 tables, and each record is written about log2(n) times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hashray.artifact.files import pack
from hashray.artifact.manifest import FileRecord

GONE = {"gone": True}
Records = Sequence[FileRecord]


def fold(tables: Iterable[Records]) -> tuple[FileRecord, ...]:
    """All files after the changes of each table in turn.

    >>> [file] = fold([(FileRecord(name="a", bytes=1, sha256=""),), (FileRecord(name="a", bytes=2, sha256=""),)])
    >>> file.bytes
    2
    """
    return tuple(record for record in _merged(tables).values() if record.info != GONE)


def changes(before: Records, after: Records) -> tuple[FileRecord, ...]:
    """What has to be folded after the files `before` to give the files `after`, in any order."""
    old, new = ({record.name: record for record in records} for records in (before, after))
    gone = [FileRecord(name=name, bytes=0, sha256="", info=GONE) for name in old if name not in new]
    return (*gone, *(record for name, record in new.items() if old.get(name) != record))


def add_changes(
    tables: Sequence[FileRecord],
    new: Records,
    read: Callable[[FileRecord], Records],
    write: Callable[[bytes, int], FileRecord],
) -> tuple[FileRecord, ...]:
    """Return the tables of a version: those of the version before, and the changes in one more or merged with the last.

    Args:
        tables: of the version before, each with its number of records in `rows`.
        new: what `changes` gave.
        read: returns the records of a table.
        write: writes a table of some bytes and number of records, and returns its record.
    """
    if not new:
        return tuple(tables)
    kept, merged = list(tables), [new]
    count = len(new)
    while kept and (kept[-1].rows or 0) < 2 * count:
        merged.insert(0, read(kept.pop()))
        count = len(_merged(merged))
    records = tuple(_merged(merged).values()) if kept else fold(merged)
    return (*kept, write(pack(records), len(records))) if records else ()


def _merged(tables: Iterable[Records]) -> dict[str, FileRecord]:
    return {record.name: record for table in tables for record in table}

"""Writing and reading the files of an artifact, each with its checksum; the manifest, written last, finishes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from hashray.artifact.deltas import fold
from hashray.artifact.files import FILES, MOST_LISTED, pack, unpack
from hashray.artifact.manifest import FileRecord, Manifest, audit, from_bytes, named, plain_name, sha256_hex, to_bytes
from hashray.errors import AlreadyExists, AuditError, CorruptArtifact, InputError, MismatchError
from hashray.storage import Store, check_conditional_put, join

MANIFEST = "manifest.json"
RESTORE = "Restore it from a copy, or delete the artifact and run the stage again"


def write_file(
    store: Store, name: str, data: bytes, rows: int | None = None, info: Mapping[str, Any] | None = None
) -> FileRecord:
    """Write one file of an artifact and return its record."""
    store.write(name, data)
    return FileRecord(name=name, bytes=len(data), sha256=sha256_hex(data), rows=rows, info=dict(info or {}))


def write_named(store: Store, name: str, data: bytes, rows: int | None = None) -> FileRecord:
    """Write one file of an artifact under a name that holds its content's hash; `Manifest.record(name)` finds it."""
    sha256 = sha256_hex(data)
    store.write(named(name, sha256), data)
    return FileRecord(name=named(name, sha256), bytes=len(data), sha256=sha256, rows=rows)


def write_plain(store: Store, manifest: Manifest) -> None:
    """Copy the files of a published artifact to their plain names (`report.html`), for people and other programs.

    Whichever run comes last writes them again from what is published, so they never differ from it for long.
    """
    for record in manifest.files:
        name = plain_name(record.name)
        if name != record.name and not (store.exists(name) and sha256_hex(store.read(name)) == record.sha256):
            store.write(name, read_file(store, record))


def read_file(store: Store, record: FileRecord) -> bytes:
    """Return a file's bytes, after checking them.

    Raises:
        CorruptArtifact: the file is missing, or its length or sha256 is not the manifest's.
    """
    try:
        data = store.read(record.name)
    except InputError as error:
        raise CorruptArtifact(missing(store, record)) from error
    check(store, record, len(data), sha256_hex(data))
    return data


def publish(store: Store, manifest: Manifest, key: str = MANIFEST) -> Manifest:
    """Write the manifest, which finishes the stage. Publishing the same content twice is fine.

    The records of more than 1,000 files go to a table of their own first; the manifest that is returned names it.

    Raises:
        AuditError: rows in are not rows out plus rows quarantined, or the files do not add up to them.
        AlreadyExists: another manifest has this name.
    """
    faults = audit(manifest)
    if faults:
        raise AuditError(f"{store.url} ({manifest.kind}) was not published: {'; '.join(faults)}")
    if not manifest.tables:
        manifest = manifest.model_copy(update={"table": _write_table(store, manifest)})
    data = to_bytes(manifest)
    _honours_create(store)
    try:
        store.create(key, data)
    except AlreadyExists as error:
        # Ours after a lost answer, or a twin's of the same run: either way what should stand there does.
        there = store.read(key)
        if there != data:
            raise AlreadyExists(
                f"{join(store.url, key)} already exists and is {_whose(there)}, not this {manifest.kind} "
                f"({manifest.id[:12]}): another run published here first, or the configuration or the input changed; "
                "choose another --out, or delete the folder to make it again"
            ) from error
    return manifest


def _write_table(store: Store, manifest: Manifest) -> FileRecord | None:
    if len(manifest.files) <= MOST_LISTED:
        return None
    record = write_named(store, FILES, pack(manifest.files), rows=len(manifest.files))
    return record.model_copy(update={"info": {"bytes": sum(file.bytes for file in manifest.files)}})


def with_files(store: Store, manifest: Manifest) -> Manifest:
    """The manifest with the files of its tables, if it has any.

    Raises:
        CorruptArtifact: a table is missing, or is not what was published.
    """
    if manifest.tables:
        return manifest.model_copy(update={"files": fold(read_records(store, table) for table in manifest.tables)})
    if manifest.table is None:
        return manifest
    return manifest.model_copy(update={"files": read_records(store, manifest.table)})


def read_records(store: Store, table: FileRecord) -> tuple[FileRecord, ...]:
    """The records of a table of files, as they stand there.

    Raises:
        CorruptArtifact: the table is missing, or is not what was published.
    """
    return _records(store, table.name, table.bytes, table.sha256)


@lru_cache(maxsize=64)  # versions of an index share tables
def _records(store: Store, name: str, size_bytes: int, sha256: str) -> tuple[FileRecord, ...]:
    data = read_file(store, FileRecord(name=name, bytes=size_bytes, sha256=sha256))
    try:
        return unpack(data)
    except ValueError as error:
        raise CorruptArtifact(f"{join(store.url, name)} is no table of files: {error}") from error


@lru_cache(maxsize=64)
def _honours_create(store: Store) -> None:
    """Check a store once in each process: one that ignores the condition lets a second publisher overwrite."""
    if store.local_path(MANIFEST) is None:
        check_conditional_put(store)


def _whose(data: bytes) -> str:
    try:
        manifest = from_bytes(data, "")
    except (CorruptArtifact, MismatchError):
        return "not a manifest this hashray can read"
    return f"a {manifest.kind} with id {manifest.id[:12]}, written by hashray {manifest.project_version}"


def missing(store: Store, record: FileRecord) -> str:
    """The error text of a file that is missing."""
    return f"{join(store.url, record.name)} is missing: its manifest lists it with {record.bytes} bytes. {RESTORE}"


def check_sizes(store: Store, manifest: Manifest) -> None:
    """Raise CorruptArtifact where a file of the manifest is missing or has another size."""
    for fault in wrong_sizes(store, manifest.stored).values():
        raise CorruptArtifact(fault)


def wrong_sizes(store: Store, records: Iterable[FileRecord]) -> dict[str, str]:
    """The faults of files that are missing or have another size, by name: one listing for all files."""
    wanted = {record.name: record for record in records}
    sizes = {name: size for name, size in store.list() if name in wanted}
    faults = {}
    for name, record in wanted.items():
        if name not in sizes:
            faults[name] = missing(store, record)
        elif sizes[name] != record.bytes:
            faults[name] = wrong_size(store, record, sizes[name])
    return faults


def wrong_size(store: Store, record: FileRecord, size_bytes: int) -> str:
    """The error text of a file of another size."""
    return f"{join(store.url, record.name)} has {size_bytes} bytes, its manifest says {record.bytes}. {RESTORE}"


def check(store: Store, record: FileRecord, size_bytes: int, digest: str) -> None:
    """Raise CorruptArtifact where length or sha256 are not those of the record."""
    if size_bytes != record.bytes:
        raise CorruptArtifact(wrong_size(store, record, size_bytes))
    if digest != record.sha256:
        differ = f"sha256 {digest[:12]}…, its manifest says {record.sha256[:12]}…"
        raise CorruptArtifact(f"{join(store.url, record.name)} is corrupt: {differ}. {RESTORE}")

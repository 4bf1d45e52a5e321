"""The versions of an index: each change is one more version, published by one conditional put. No Ray.

A writer reads the newest version N, writes new files, and puts version N + 1 if it is absent. If another writer was
first, the change is worked out again on that version. A put whose answer is lost may have landed: version N + 1 then
holds the attempt, a hash of the operation and its arguments, so the writer knows its own version again.

Garbage collection (garbage.py) is a version too, and closes a generation: every writer that began before it has to
begin again after it, and then writes its files under other names. If one of its files is deleted by then, it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from hashray.artifact import FileRecord, Manifest, canonical, load_manifest, publish, read_file, sha256_hex, version_key
from hashray.artifact.manifest import from_bytes
from hashray.artifact.versions import newest_version
from hashray.errors import (
    AlreadyExists,
    AuditError,
    CorruptArtifact,
    InputError,
    RunError,
    StorageError,
    StoreUnavailable,
)
from hashray.index.version import (
    ShardRecord,
    file_name,
    generation,
    generation_of,
    oldest_kept,
    shards_of,
    with_shards,
    write_tables,
)
from hashray.storage import Store, join
from hashray.storage.base import no_conditional_put

READ_THREADS = 8


@dataclass(frozen=True)
class Version:
    """A version of an index: its number, its manifest and its shards, in ascending order of their first ids."""

    number: int
    manifest: Manifest
    shards: Sequence[ShardRecord]

    @property
    def generation(self) -> int:
        """The version of the last garbage collection up to this one, 0 where there was none."""
        return generation(self.manifest)

    @property
    def rows(self) -> int:
        """Rows that are not deleted."""
        return sum(shard.living for shard in self.shards)


@dataclass(frozen=True)
class Change:
    """What the next version is to be: its shards, rows added and deleted. `base`: the manifest of another version."""

    shards: Sequence[ShardRecord]
    added: int = 0
    deleted: int = 0
    base: Manifest | None = None
    said: Mapping[str, Any] = field(default_factory=dict)  # more of the change, for people
    info: Mapping[str, Any] = field(default_factory=dict)  # fields of the manifest's info


def newest(store: Store) -> Version:
    """The newest version.

    Raises:
        InputError: there is none. CorruptArtifact, MismatchError: it cannot be read.
    """
    return _version(*newest_version(store))


def read_version(store: Store, number: int) -> Version:
    """A version by its number.

    Raises:
        InputError: it is not there, or garbage collection has removed its files.
    """
    key = version_key(number)
    if number < 1 or not store.exists(key):
        last = newest_version(store)[0]
        raise InputError(f"{join(store.url, key)} is not there: the newest version is {last}")
    try:
        return _version(number, load_manifest(store, "index", key))
    except CorruptArtifact:
        require_kept(store, number, newest(store))
        raise


def require_kept(store: Store, number: int, head: Version) -> None:
    """Raise InputError where garbage collection may have removed files of a version."""
    oldest = oldest_kept(head.manifest)
    if number < oldest:
        raise InputError(
            f"{store.url}: the files of version {number} were removed by garbage collection; versions {oldest} to "
            f"{head.number} are kept"
        )


def history(store: Store) -> list[dict[str, Any]]:
    """Every version, oldest first, from its manifest alone: the files of an old one may be gone."""
    last = newest(store)
    kept = oldest_kept(last.manifest)

    def describe(number: int) -> dict[str, Any]:
        manifest = _manifest_alone(store, number)
        change = manifest.info.get("change", {"operation": "build", "added": manifest.rows_out, "deleted": 0})
        facts = {name: value for name, value in change.items() if name != "attempt"}
        return {"version": number, "rows": manifest.rows_out, **facts, "kept": number >= kept}

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [*pool.map(describe, range(1, last.number + 1))]


def change_of(store: Store, number: int) -> Mapping[str, Any]:
    """What a version changed, {} for the first: from its manifest alone, since its files may be gone."""
    change: Mapping[str, Any] = _manifest_alone(store, number).info.get("change", {})
    return change


def _manifest_alone(store: Store, number: int) -> Manifest:
    key = version_key(number)
    return from_bytes(store.read(key), join(store.url, key))


def commit(
    store: Store, operation: str, arguments: Mapping[str, Any], change: Callable[[Version], Change | None]
) -> int:
    """Publish what `change` makes of the newest version as the next one; return its number.

    Args:
        arguments: what the operation depends on; a version with the same is this writer's, or a twin's.
        change: called again where another version comes first; what it raises ends the commit. None: nothing to do,
            and the number of the newest version is returned.

    Raises:
        AuditError: the rows do not add up. StorageError: the store does not refuse a second writer.
        StoreUnavailable: the store stopped answering; where the put was sent, the text says so.
    """
    attempt = sha256_hex(canonical({"operation": operation, **arguments}))[:32]
    while True:
        before = newest(store)
        wanted = change(before)
        if wanted is None:
            return before.number
        base = wanted.base or before.manifest
        facts = {"operation": operation, "attempt": attempt, "added": wanted.added, "deleted": wanted.deleted}
        inherited: dict[str, Any] = {name: before.manifest.info[name] for name in ("generation", "oldest_kept")
                     if name in before.manifest.info}  # fmt: skip
        manifest = with_shards(base, wanted.shards, {**inherited, **wanted.info, "change": {**facts, **wanted.said}})
        _audit(store, before, manifest, wanted)
        _require_exclusive(store, before.number)
        number = before.number + 1
        try:
            publish(store, write_tables(store, manifest, before.manifest), version_key(number))
        except AlreadyExists:
            if _is_of(store, number, attempt):
                return number
            continue
        except StoreUnavailable as error:
            if _landed(store, number, attempt):
                return number
            raise StoreUnavailable(
                f"{error} Version {number} was not published when this was looked for; `hashray index versions` says "
                "whether it has been since"
            ) from error
        return number


def carried(store: Store, shards: Sequence[ShardRecord], into: int) -> list[ShardRecord]:
    """The shards that a writer wrote, under names of the generation `into`.

    Raises:
        RunError: garbage collection has removed a file meanwhile.
    """
    return [
        shard.model_copy(
            update={name: _carry(store, record, into) for name in ("codes", "ids", "attributes")
                    if (record := getattr(shard, name)) is not None}
        )
        for shard in shards
    ]  # fmt: skip


def _carry(store: Store, record: FileRecord, into: int) -> FileRecord:
    if generation_of(record.name) == into:
        return record
    try:
        data = read_file(store, record)
    except CorruptArtifact as error:
        raise RunError(
            f"{join(store.url, record.name)} is gone: this change took longer than the grace period of a garbage "
            "collection that ran meanwhile. The index is whole and unchanged; run the change again"
        ) from error
    name = file_name(record.name.partition("/")[0], record.sha256, into)  # type: ignore[arg-type]  # a Folder
    store.write(name, data)
    return record.model_copy(update={"name": name})


def _version(number: int, manifest: Manifest) -> Version:
    return Version(number, manifest, shards_of(manifest))


def _audit(store: Store, before: Version, manifest: Manifest, wanted: Change) -> None:
    """No row vanishes: what was there, with what is added and without what is deleted, is what there is."""
    after = sum(shard.living for shard in wanted.shards)
    if after != before.rows + wanted.added - wanted.deleted or after != manifest.rows_out:
        raise AuditError(
            f"{store.url}: version {before.number} has {before.rows:,} rows, {wanted.added:,} were to be added and "
            f"{wanted.deleted:,} deleted, but {after:,} would be there; nothing was published"
        )


def _require_exclusive(store: Store, number: int) -> None:
    """Make sure that the store refuses a second writer of a version, by one that is there, with its own bytes."""
    key = version_key(number)
    if store.local_path(key) is None:
        data = store.read(key)
        try:
            store.create(key, data)
        except AlreadyExists:
            return
        raise StorageError(no_conditional_put(store))


def _is_of(store: Store, number: int, attempt: str) -> bool:
    manifest = load_manifest(store, "index", version_key(number))
    return bool(manifest.info.get("change", {}).get("attempt") == attempt)


def _landed(store: Store, number: int, attempt: str) -> bool:
    try:
        return store.exists(version_key(number)) and _is_of(store, number, attempt)
    except StoreUnavailable:
        return False

"""Garbage collection: the files that no kept version names are deleted, versions' manifests never. No Ray.

It publishes a version first. This closes a generation: a writer that began before loses the race for that version, so
it begins again after it, and its files get other names. Only files of closed generations are deleted then, so none that
a later version may name. The store's own clock tells the age of files: no writer's clock counts.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from hashray.artifact import load_manifest, version_key
from hashray.errors import ConfigError, InputError
from hashray.index.log import Change, Version, commit, newest
from hashray.index.version import SUFFIXES, generation_of, oldest_kept
from hashray.storage import Store
from hashray.storage.base import TEMP_PREFIX


@dataclass(frozen=True)
class Collected:
    """A garbage collection: its version, the first version whose files are kept, and the files deleted."""

    version: int
    oldest_kept: int
    files: tuple[tuple[str, int], ...]

    @property
    def size_bytes(self) -> int:
        """The bytes of the files."""
        return sum(size for _, size in self.files)


def collect(store: Store, keep: int, grace_s: float, dry_run: bool = False) -> Collected:
    """Delete the files that no kept version names and that are older than `grace_s` seconds.

    Args:
        keep: newest versions to keep, at least 1. Those that were the newest within the grace period are kept too.
        dry_run: only say what would be deleted.
    """
    if keep < 1 or not 0 <= grace_s < float("inf"):
        raise ConfigError(
            f"keep = {keep} and a grace of {grace_s} s: keep 1 version or more, and a grace of 0 s or more"
        )
    if dry_run:
        head, now_s = newest(store), _now_s(store)
        oldest = _oldest(store, head, keep, grace_s, now_s)
        return Collected(head.number, oldest, tuple(_garbage(store, head.number, oldest, now_s - grace_s)))

    def change(head: Version) -> Change:
        oldest = _oldest(store, head, keep, grace_s, _now_s(store))
        return Change(head.shards, info={"generation": head.number + 1, "oldest_kept": oldest})

    number = commit(store, "gc", {"keep": keep, "grace_s": grace_s}, change)
    manifest = load_manifest(store, "index", version_key(number))
    oldest, now_s = oldest_kept(manifest), store.modified(version_key(number))
    files = tuple(_garbage(store, number, oldest, now_s - grace_s))
    for name, _ in files:
        store.delete(name)
    return Collected(number, oldest, files)


def _oldest(store: Store, head: Version, keep: int, grace_s: float, now_s: float) -> int:
    """The first version to keep: never before the one that was kept last time."""
    oldest, first = max(1, head.number + 1 - keep), oldest_kept(head.manifest)
    # A version was the newest until the next one came.
    while oldest > first and store.modified(version_key(oldest)) > now_s - grace_s:
        oldest -= 1
    return max(oldest, first)


def _garbage(store: Store, closed: int, oldest: int, before_s: float) -> Iterator[tuple[str, int]]:
    """Files of generations before `closed` that no version from `oldest` on names, written before `before_s`."""
    kept = set[str]()
    for number in range(oldest, closed + 1):
        manifest = load_manifest(store, "index", version_key(number))
        kept |= {record.name for record in manifest.stored}
    for folder in (*SUFFIXES, "progress"):
        for name, size in store.list(f"{folder}/"):
            after = generation_of(name)
            closes = folder == "progress" or (after is not None and after < closed)
            if closes and name not in kept and _is_before(store, name, before_s):
                yield name, size


def _is_before(store: Store, name: str, time_s: float) -> bool:
    try:
        return store.modified(name) <= time_s
    except InputError:  # another collection has deleted it
        return False


def _now_s(store: Store) -> float:
    """The time by the store's own clock."""
    key = f"{TEMP_PREFIX}clock-{uuid.uuid4().hex}"
    store.write(key, b"")
    try:
        return store.modified(key)
    finally:
        store.delete(key)

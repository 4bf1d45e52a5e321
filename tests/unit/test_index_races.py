"""Races for an index, by name: each has lost rows or files of some index somewhere."""

from __future__ import annotations

import pytest
from simulation import GRACE_S, MemoryStore, codes_of, ids_in, names, rows_of

from hashray import artifact
from hashray.artifact import version_key
from hashray.errors import (
    InputError,
    RunError,
    StorageError,
    StoreUnavailable,
)
from hashray.index.catalog import Catalog
from hashray.index.compact import commit_joined, join_group, plan_groups
from hashray.index.garbage import collect
from hashray.index.log import newest, read_version
from hashray.index.version import index_manifest, write_tables
from hashray.search.reader import open_version


@pytest.fixture
def memory(tmp_path):
    """An index of 40 rows in a store whose calls a test can catch."""
    store = MemoryStore("memory://index")
    artifact.publish(store, write_tables(store, index_manifest(32, []), None), version_key(1))
    shared = Catalog(store, tmp_path / "cache")
    shared.append(names(0, 40), codes_of(40), {"class": ["a", "b"] * 20})
    return shared


def at(store, name, key, act, before=True):
    """Run `act` at the first call of the store's method `name` for a key that begins with `key`."""

    def hook(called, called_key, call):
        if (called, called_key[: len(key)]) != (name, key):
            return call()
        store.hook = lambda _name, _key, c: c()
        if before:
            act()
            return call()
        result = call()
        act()
        return result

    store.hook = hook


def test_a_lost_answer_to_a_commit_that_landed(memory):
    def lose():
        raise StoreUnavailable("no answer")

    at(memory.store, "create", version_key(3), lose, before=False)
    assert memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10}) == 3
    assert ids_in(memory) == names(0, 50) and memory.version == 3
    # The client asks again by itself, and learns that the version exists.
    at(memory.store, "create", version_key(4), lambda: memory.store.objects.setdefault("again", (b"", 0)), before=False)
    assert memory.delete(["0001"]) == 4
    at(memory.store, "create", version_key(5), lose)
    with pytest.raises(StoreUnavailable, match="Version 5 was not published when this was looked for"):
        memory.delete(["0002"])
    assert memory.version == 4 and "0002" in ids_in(memory)


def test_a_lost_race_is_worked_out_again(memory):
    other = Catalog(memory.store, memory.cache)
    at(memory.store, "create", version_key(3), lambda: other.delete(names(0, 10)))
    assert memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10}) == 4
    assert ids_in(memory) == names(10, 50)
    at(memory.store, "create", version_key(5), lambda: other.append(["x"], codes_of(1), {"class": ["a"]}))
    with pytest.raises(InputError, match="in the index already, such as 'x'"):
        memory.append(["w", "x"], codes_of(2), {"class": ["a", "a"]})
    assert ids_in(memory) == [*names(10, 50), "x"]


def test_two_writers_of_identical_content(memory):
    twin = Catalog(memory.store, memory.cache)
    rows = (names(40, 50), codes_of(10), {"class": ["a"] * 10})
    numbers = []
    at(memory.store, "create", version_key(3), lambda: numbers.append(twin.append(*rows)))
    assert [memory.append(*rows), *numbers] == [3, 3] and memory.version == 3
    assert ids_in(memory) == names(0, 50)
    with pytest.raises(InputError, match="10 of the ids are in the index already"):
        memory.append(*rows)


def test_deletes_that_a_compaction_would_bring_back(memory):
    memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10})
    memory.delete(["0002"])
    head, other = newest(memory.store), Catalog(memory.store, memory.cache)
    joined = [join_group(memory.store, memory.cache, group, head) for group in plan_groups(head.shards, 100)]
    other.delete(["0005", "0045"])
    assert commit_joined(memory.store, memory.cache, joined, head.number) == 6
    assert ids_in(memory) == sorted({*names(0, 50)} - {"0002", "0005", "0045"})
    assert len(newest(memory.store).shards) == 1 and newest(memory.store).shards[0].living == 47


def test_a_compaction_does_not_delete_what_a_rollback_brought_back(memory):
    memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10})
    memory.delete(["0002"])
    head = newest(memory.store)
    joined = [join_group(memory.store, memory.cache, group, head) for group in plan_groups(head.shards, 100)]
    assert memory.rollback(3) == 5
    assert commit_joined(memory.store, memory.cache, joined, head.number) is None
    assert memory.version == 5 and ids_in(memory) == names(0, 50)
    assert memory.compact() == 6 and ids_in(memory) == names(0, 50)  # planned again, on what there is


def test_a_compaction_keeps_the_groups_that_hold(memory):
    for first in (100, 200, 300):
        memory.append(names(first, first + 10), codes_of(10, first), {"class": ["a"] * 10})
    head = newest(memory.store)
    first, second = [head.shards[0], head.shards[1]], [head.shards[2], head.shards[3]]
    joined = [join_group(memory.store, memory.cache, tuple(group), head) for group in (first, second)]
    memory.delete(names(200, 210))  # a whole shard: it is gone
    number = commit_joined(memory.store, memory.cache, joined, head.number)
    assert len(read_version(memory.store, number).shards) == 2
    assert ids_in(memory) == [*names(0, 40), *names(100, 110), *names(300, 310)]


def test_a_writer_that_stalled_past_the_grace_fails(memory):
    def collect_late():
        memory.store.now_s += 2 * GRACE_S
        Catalog(memory.store, memory.cache).gc(keep=1, grace_s=GRACE_S)

    at(memory.store, "create", version_key(3), collect_late)
    with pytest.raises(RunError, match=r"took longer than the grace period .* run the change again"):
        memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10})
    assert ids_in(memory) == names(0, 40) and artifact.verify(memory.store) == []
    at(memory.store, "create", version_key(4), lambda: Catalog(memory.store, memory.cache).gc(keep=1, grace_s=GRACE_S))
    assert memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10}) == 5
    assert ids_in(memory) == names(0, 50)
    assert all(
        "-g4." in file.name for shard in newest(memory.store).shards if shard.first == "0040" for file in shard.files
    )


def test_a_collection_that_still_deletes_takes_nothing_from_later_writers(memory):
    """A file of equal content is written under another name after the collection's version."""
    memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10})
    memory.delete(names(40, 50))
    other = Catalog(memory.store, memory.cache)
    rows = (names(40, 50), codes_of(10), {"class": ["a"] * 10})
    at(memory.store, "delete", "", lambda: other.append(*rows))  # the first file is about to be deleted
    memory.gc(keep=1, grace_s=0)
    assert ids_in(memory) == names(0, 50) and artifact.verify(memory.store) == []


def test_numbers_are_not_used_again_and_manifests_stay(memory):
    for number in range(5):
        memory.delete([f"{number:04d}"])
    assert memory.gc(keep=1, grace_s=0) == 8
    assert [key for key, _ in memory.store.list("versions/")] == [version_key(number) for number in range(1, 9)]
    assert memory.delete(["0010"]) == 9
    for number in range(2, 7):  # version 1 has no files
        with pytest.raises(InputError, match=f"files of version {number} were removed .* versions 7 to 9 are kept"):
            open_version(memory.store, number, memory.cache)
    with pytest.raises(InputError, match="files of version 3 were removed"):
        memory.rollback(3)
    assert [facts["kept"] for facts in memory.versions()] == [False] * 6 + [True] * 3
    assert memory.rollback(7) == 10 and ids_in(memory) == names(5, 40)


def test_what_a_collection_keeps(memory):
    memory.delete(["0000"])
    memory.store.now_s += 10 * GRACE_S
    memory.delete(["0001"])
    memory.store.now_s += GRACE_S / 2  # version 3 was the newest until half a grace period ago
    planned = collect(memory.store, keep=1, grace_s=GRACE_S, dry_run=True)
    assert (planned.version, planned.oldest_kept) == (4, 3) and memory.version == 4
    before = {name for name, _ in memory.store.list()}
    done = collect(memory.store, keep=1, grace_s=GRACE_S)
    assert done.files == planned.files and before - {name for name, _ in memory.store.list()} == {
        n for n, _ in done.files
    }
    assert ids_in(memory, 3) == names(1, 40)
    assert collect(memory.store, keep=9, grace_s=0).oldest_kept == 3  # never before what was kept last time


def test_a_reader_that_opens_while_a_collection_runs(memory):
    memory.append(names(40, 50), codes_of(10), {"class": ["a"] * 10})

    def change():
        other = Catalog(memory.store, memory.cache)
        other.compact()
        other.gc(keep=1, grace_s=0)

    other_cache = memory.cache / "reader"
    at(memory.store, "size", "", change)
    at(memory.store, "read", "shards/", change)
    index = open_version(memory.store, None, other_cache, threads=1)
    assert index.version == 5 and sorted(rows_of(index)) == names(0, 50)


def test_a_store_that_ignores_the_condition_for_some_keys(memory):
    create = memory.store.create

    def careless(key, data):
        memory.store.write(key, data) if key.startswith("versions/") else create(key, data)

    memory.store.create = careless
    with pytest.raises(StorageError, match="does not keep the promise of `If-None-Match"):
        memory.delete(["0001"])
    assert memory.version == 2 and ids_in(memory) == names(0, 40)

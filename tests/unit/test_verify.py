"""What `verify` finds: rows, duplicate ids, damaged and lost versions of an index; on a folder and on S3."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_artifact import make_corpus, parquet

from hashray.artifact import (
    Manifest,
    describe,
    load_manifest,
    newest_version,
    publish,
    sha256_hex,
    verify,
    version_key,
    write_file,
)
from hashray.artifact.verify import find_duplicates
from hashray.storage import Store, open_store

VERIFY = sys.modules["hashray.artifact.verify"]  # the module: `artifact.verify` is the function


def make_version(store: Store, number: int, ids=("a", "b")) -> Manifest:
    table = parquet(list(ids))
    record = write_file(store, f"ids/{sha256_hex(table)[:16]}.parquet", table, rows=len(ids))
    return publish(
        store,
        Manifest(
            kind="index",
            project_version="0.1.0",
            config={},
            parents={"codes": "0" * 64},
            files=(record,),
            info={"number": number},
        ),
        version_key(number),
    )


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(tmp_path / "artifact")


def test_rows_are_those_of_the_parquet_footer(store):
    record = write_file(store, "part-0.parquet", parquet(["a", "b"]), rows=3)
    publish(store, make_corpus(store, files=[record], rows_in=3, rows_out=3, rows_quarantined=0))
    assert verify(store.url) == [f"{store.url}/part-0.parquet: holds 2 rows, its manifest says 3"]


def test_a_parquet_file_that_is_none(store):
    record = write_file(store, "part-0.parquet", b"this is no parquet file", rows=None)
    publish(store, make_corpus(store, files=[record]))
    (problem,) = verify(store.url)
    assert problem.startswith(f"{store.url}/part-0.parquet is no Parquet file: ")


def test_duplicate_ids(store):
    publish(store, make_corpus(store, parts=(("a", "b", "b"), ("c", "a"))))
    assert verify(store.url) == [
        f"{store.url}/part-00001.parquet: duplicate id 'a', in 2 rows of part-00000.parquet, part-00001.parquet",
        f"{store.url}/part-00000.parquet: duplicate id 'b', in 2 rows of part-00000.parquet",
    ]


def test_many_duplicate_ids_are_summed_up(store):
    publish(store, make_corpus(store, parts=(range(20), range(20))))
    problems = verify(store.url)
    assert len(problems) == 6 and problems[-1] == f"{store.url}: 15 more ids are duplicated"


@given(st.lists(st.lists(st.integers(-5, 5) | st.text("ab", max_size=2), max_size=8), max_size=4), st.integers(1, 40))
def test_find_duplicates_against_counting(blocks, most_hashes):
    """-1 and -2 have the same hash in Python: the last scan tells them apart."""
    named = [(f"part-{number}", ids) for number, ids in enumerate(blocks)]
    everything = [value for ids in blocks for value in ids]
    expected = {
        value: [name for name, ids in named for other in ids if other == value]
        for value in everything
        if everything.count(value) > 1
    }
    assert find_duplicates(lambda: named, most_hashes) == expected


def test_hashes_in_memory_are_bounded(monkeypatch):
    """More scans in their place: each keeps the hashes of one part of all."""
    kept, scans = [], []
    of_part = VERIFY._in_part
    monkeypatch.setattr(VERIFY, "_in_part", lambda *args: kept.append(len(of_part(*args))) or of_part(*args))

    def read():
        scans.append(len(kept))
        for start in range(0, 10_000, 100):
            yield "part-0", [f"id{number % 9_990}" for number in range(start, start + 100)]

    duplicates = find_duplicates(read, most_hashes=1000)
    assert sorted(duplicates) == sorted(f"id{number}" for number in range(10))
    assert len(scans) == 16 + 1  # a sixteenth of 10,000 is the first share below 1,000
    of_scan = [sum(kept[start:stop]) for start, stop in itertools.pairwise(scans)]
    assert sum(of_scan[1:]) < 10_000 and max(of_scan[1:]) < 1000


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 31])
def test_the_newest_version_is_found(store, count):
    for number in range(1, count + 1):
        make_version(store, number)
    assert newest_version(store) == (count, load_manifest(store, "index", version_key(count)))
    assert load_manifest(store, "index").info == {"number": count}
    assert describe(store.url)["version"] == count
    assert verify(store.url) == []


def test_damaged_versions_are_found(store):
    for number in range(1, 6):
        make_version(store, number)
    data = store.read(version_key(4))
    store.write(version_key(4), data.replace(b"4", b"5"))
    assert verify(store.url)[0].startswith(f"{store.url}/versions/00000004.json is corrupt")
    store.write(version_key(4), data)
    for number in (1, 2, 4):
        kept = store.read(version_key(number))
        store.delete(version_key(number))
        assert f"{store.url}/{version_key(number)} is missing: later versions are there" in verify(store.url)
        store.write(version_key(number), kept)
    data = store.read(version_key(5))
    store.write(version_key(5), data[:-1])
    assert f"{store.url}/versions/00000005.json is corrupt" in verify(store.url)[0]
    store.write(version_key(5), data)
    assert verify(store.url) == []


def test_files_of_the_newest_version_are_checked(store):
    make_version(store, 1, ids=("a", "b"))
    newest = make_version(store, 2, ids=("c", "d"))
    store.delete(newest.files[0].name)
    (problem,) = verify(store.url)
    assert f"{newest.files[0].name} is missing" in problem


def test_an_artifact_on_s3(s3_url, tmp_path):
    store = open_store(s3_url)
    publish(store, make_corpus(store))
    assert verify(s3_url) == [] and describe(s3_url)["whole"] is True
    record = load_manifest(s3_url).record("part-00001.parquet")
    data = bytearray(store.read(record.name))
    data[len(data) // 2] ^= 4
    store.write(record.name, bytes(data))
    assert verify(s3_url)[0].startswith(f"{s3_url}/part-00001.parquet is corrupt: sha256")
    store.delete(record.name)
    (problem,) = verify(s3_url)
    assert problem.startswith(
        f"{s3_url}/part-00001.parquet is missing: its manifest lists it with {record.bytes} bytes"
    )
    make_version(open_store(s3_url + "/index"), 1)
    assert newest_version(open_store(s3_url + "/index"))[0] == 1 and verify(s3_url + "/index") == []

"""Changes of an index: what each does, what it refuses, and what is reported of a damaged one."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pytest
from simulation import codes_of, ids_in, names, rows_of

from hashray import artifact, create_index, open_catalog, open_index
from hashray.artifact import version_key
from hashray.artifact.bitmap import Bitmap
from hashray.artifact.deltas import add_changes, changes, fold
from hashray.artifact.files import unpack
from hashray.cli import main
from hashray.codes import StampedCodes
from hashray.errors import (
    AlreadyExists,
    ConfigError,
    CorruptArtifact,
    InputError,
    MismatchError,
)
from hashray.index import compact as compaction
from hashray.index.compact import plan_groups
from hashray.index.ids import find, ids_bytes
from hashray.index.proof import verify_shards
from hashray.index.shard import build_shard, write_shard
from hashray.index.version import ShardRecord, index_manifest, write_content, write_tables
from hashray.storage import open_store

verify_module = sys.modules["hashray.artifact.verify"]  # the module: `artifact.verify` is the function


@pytest.fixture
def catalog(tmp_path):
    empty = create_index(tmp_path / "index", 32, fingerprint="ab" * 32, cache_dir=tmp_path / "cache")
    empty.append(names(0, 40), codes_of(40), {"class": ["a", "b"] * 20, "year": [*range(40)]})
    return empty


def test_the_changes(catalog):
    url = catalog.store.url
    assert catalog.version == 2 and ids_in(catalog) == names(0, 40) and ids_in(catalog, 1) == []
    assert catalog.append(names(40, 50), codes_of(10, 1), {"class": ["c"] * 10, "year": [7] * 10}) == 3
    assert catalog.delete(["0003", "0045", "0003"]) == 4
    assert ids_in(catalog) == sorted({*names(0, 50)} - {"0003", "0045"}) and ids_in(catalog, 3) == names(0, 50)
    assert catalog.append(["0003"], codes_of(1, 2), {"class": ["z"], "year": [1]}) == 5
    assert rows_of(open_index(url))["0003"] == (codes_of(1, 2)[0].tobytes(), "z")
    assert catalog.append(["0003", "0100"], codes_of(2, 3), {"class": ["y", "y"], "year": [1, 2]}, replace=True) == 6
    assert rows_of(open_index(url))["0003"] == (codes_of(2, 3)[0].tobytes(), "y")
    before = rows_of(open_index(url))
    assert catalog.compact() == 7 and rows_of(open_index(url)) == before
    assert len(open_index(url).pieces) == 1 and open_index(url).pieces[0].living is None
    assert catalog.compact() == 7  # nothing to do
    assert catalog.rollback(3) == 8 and ids_in(catalog) == names(0, 50)
    assert artifact.verify(url) == [] and open_index(url).fingerprint == "ab" * 32
    assert [facts["operation"] for facts in catalog.versions()] == [
        "build", "append", "append", "delete", "append", "append", "compact", "rollback",
    ]  # fmt: skip
    assert [facts["rows"] for facts in catalog.versions()] == [0, 40, 50, 48, 49, 50, 50, 50]


def test_what_is_refused_changes_nothing(catalog):
    refused = [
        (lambda: catalog.append(["0001", "x"], codes_of(2)), InputError, "1 of the ids are in the index already"),
        (lambda: catalog.append(["x", "x"], codes_of(2)), InputError, "1 ids stand in more than one row"),
        (lambda: catalog.append(["x"], codes_of(2)), InputError, "1 ids for 2 codes"),
        (lambda: catalog.append("x", codes_of(1)), InputError, "give a list of ids"),
        (lambda: catalog.append([3], codes_of(1)), InputError, "ids are text"),
        (lambda: catalog.append([None], codes_of(1)), InputError, "1 ids are null"),
        (lambda: catalog.append(["x"], codes_of(1, num_bits=64)), MismatchError, "codes of 64 bits cannot be appended"),
        (lambda: catalog.append(["x"], StampedCodes.stamp(codes_of(1), "cd")), MismatchError, "codes of model cd"),
        (lambda: catalog.append(["x"], codes_of(1), {"class": ["a", "b"]}), InputError, "the attributes are"),
        (lambda: catalog.append(["x"], codes_of(1), {"id": ["a"]}), InputError, "none that is 'id'"),
        (lambda: catalog.delete(["0001", "x", "y"]), InputError, "2 of the ids are not in version 2 .* 'x', 'y'"),
        (lambda: catalog.rollback(9), InputError, "the newest version is 2"),
        (lambda: catalog.gc(keep=0), ConfigError, "keep = 0"),
        (lambda: create_index(catalog.store.url, 32), AlreadyExists, "holds an artifact already"),
        (lambda: create_index(f"{catalog.store.url}2", 33), ConfigError, "num_bits = 33"),
        (lambda: open_catalog(f"{catalog.store.url}3"), InputError, "is not an index"),
    ]  # fmt: skip
    before = sorted(catalog.store.list())
    for call, error, text in refused:
        with pytest.raises(error, match=text):
            call()
    assert sorted(catalog.store.list()) == before
    assert catalog.delete(["x"], missing_ok=True) == 2 and catalog.append([], codes_of(0)) == 2
    assert catalog.delete([]) == 2 and catalog.delete(["0001", "x"], missing_ok=True) == 3


def test_all_rows_deleted_and_appended_again(catalog):
    catalog.delete(names(0, 40))
    index = open_index(catalog.store.url)
    assert index.rows == 0 and index.pieces == [] and index.search(codes_of(2), 3)[0].tolist() == [[None] * 3] * 2
    assert catalog.append(names(0, 40), codes_of(40), {"class": ["a", "b"] * 20, "year": [*range(40)]}) == 4
    assert ids_in(catalog) == names(0, 40) and artifact.verify(catalog.store.url) == []


def test_versions_share_their_tables(tmp_path):
    """Ten thousand versions of a thousand shards would be megabytes: each adds a few records."""
    written, before, tables = {}, (), ()

    def write(data, rows):
        name = f"tables/{artifact.sha256_hex(data)}.parquet"
        written[name] = data
        return artifact.FileRecord(name=name, bytes=len(data), sha256=artifact.sha256_hex(data), rows=rows)

    rng, current = np.random.default_rng(0), {}
    for number in range(300):
        if number % 3 == 2:
            for name in rng.choice(sorted(current), 2):
                current[name] = current[name].model_copy(update={"info": {"deleted": str(number)}})
        elif number % 50 == 49:
            current = dict(list(current.items())[::2])
        else:
            current[f"ids/{number}"] = artifact.FileRecord(name=f"ids/{number}", bytes=number, sha256="")
        after = tuple(current.values())
        tables = add_changes(tables, changes(before, after), lambda table: unpack(written[table.name]), write)
        assert {r.name: r for r in fold(unpack(written[table.name]) for table in tables)} == current
        assert len(tables) <= 10
        before = after
    records = sum(len(unpack(data)) for data in written.values())
    assert records < 300 * 12


def test_groups_of_a_compaction():
    def shard(number, living, rows=None):
        record = artifact.FileRecord(name=f"ids/{number}", bytes=1, sha256="", rows=rows or living)
        dead = record.model_copy(update={"rows": (rows or living) - living}) if rows else None
        return ShardRecord(
            rows=rows or living, first=f"{number}", last=f"{number}", codes=record, ids=record, deleted=dead
        )

    def planned(*shards):
        return [[int(shard.first) for shard in group] for group in plan_groups(shards, 100)]

    assert planned(shard(0, 100), shard(1, 60)) == []
    assert planned(shard(0, 10)) == []
    assert planned(shard(0, 10), shard(1, 99), shard(2, 10)) == [[0, 2]]
    assert planned(shard(0, 60, 100), shard(1, 85, 100)) == [[0]]
    assert planned(*(shard(n, 30) for n in range(7))) == [[0, 1, 2], [3, 4, 5]]
    assert planned(shard(0, 0, 40)) == [[0]]
    assert compaction.MOST_DELETED == 0.2


def test_find_against_a_naive_search():
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 3, 50, 1000):
        there = sorted({f"{number:x}" for number in rng.integers(0, 3 * size + 1, size)})
        wanted = sorted({f"{number:x}" for number in rng.integers(0, 3 * size + 2, 40)})
        for kind in (pa.string(), pa.large_string()):
            places = find(pa.array(there, kind), pa.array(wanted, pa.string()))
            assert places.tolist() == [there.index(name) if name in there else -1 for name in wanted]


def test_bitmaps_against_sets():
    rng = np.random.default_rng(0)
    for rows in (1, 7, 8, 9, 1000):
        left, right = ({*rng.integers(0, rows, rows // 2).tolist()} for _ in range(2))
        a, b = (Bitmap.of(rows, np.array(sorted(some), np.int64)) for some in (left, right))
        assert a.positions().tolist() == sorted(left) and a.count == len(left)
        assert (a | b).positions().tolist() == sorted(left | right)
        assert (a & b).positions().tolist() == sorted(left & right)
        assert (a - b).positions().tolist() == sorted(left - right)
        assert (
            (~a).positions().tolist() == sorted({*range(rows)} - left)
            and ~a <= ~(a & b)
            and (a <= b) == (left <= right)
        )
        assert a.contains(np.arange(-1, rows)).tolist() == [False, *(place in left for place in range(rows))]
        assert Bitmap.from_bytes(a.to_bytes(), rows, a.count, "x").positions().tolist() == sorted(left)
        for data, size in ((a.to_bytes()[:-3], rows), (b"x", rows), (a.to_bytes(), rows + 9)):
            with pytest.raises(CorruptArtifact, match="x is no bitmap of"):
                Bitmap.from_bytes(data, size, a.count, "x")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "swapped"])
def test_a_damaged_file_of_each_kind_is_refused_by_name(catalog, damage, tmp_path):
    catalog.append(names(40, 60), codes_of(20, 1), {"class": ["a"] * 20, "year": [1] * 20})
    catalog.delete(["0001", "0041", "0042"])
    folder = tmp_path / "index"
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "versions"]
    named = {file.name for file in artifact.load_manifest(folder).stored}
    paths = [path for path in paths if str(path.relative_to(folder)) in named]
    assert {path.parent.name for path in paths} == {"shards", "ids", "attributes", "deleted", "tables"}
    for path in paths:
        data = path.read_bytes()
        other = next((p for p in paths if p.parent == path.parent and p != path), None)
        if damage == "missing":
            path.unlink()
        elif damage == "swapped" and other is not None:
            path.write_bytes(other.read_bytes())
        else:
            path.write_bytes(data[: len(data) // 2] if damage != "flipped" else bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(CorruptArtifact, match=path.name):
            open_index(folder)
        assert any(path.name in problem for problem in artifact.verify(folder))
        path.write_bytes(data)
    assert artifact.verify(folder) == [] and open_index(folder).rows == 57


def test_what_does_not_belong_together_is_reported(tmp_path):
    """Bytes that are what was published, but should never have been: as a broken program might write them."""
    store, codes = open_store(tmp_path), codes_of(3)
    good = write_shard(store, pa.array(["a", "b", "c"]), codes, "flat")
    faults = {
        "its ids do not ascend": write_content(store, "ids", ids_bytes(pa.array(["b", "a", "c"])), 3),
        "its first and last id are not": write_content(store, "ids", ids_bytes(pa.array(["a", "b", "d"])), 3),
        "holds 2 ids, its version says 3": write_content(store, "ids", ids_bytes(pa.array(["a", "c"])), 3),
    }
    for number, (text, ids) in enumerate(faults.items(), 1):
        wrong = good.model_copy(update={"ids": ids})
        artifact.publish(store, write_tables(store, index_manifest(32, [wrong]), None), version_key(number))
        problems = verify_shards(store, tmp_path / "cache")
        assert len(problems) == number and text in problems[-1], problems
    few = good.model_copy(update={"codes": write_content(store, "shards", build_shard(codes[:2], "flat"), None)})
    artifact.publish(store, write_tables(store, index_manifest(32, [few]), None), version_key(4))
    assert "holds 2 codes of 32 bits, its version says 3" in verify_shards(store, tmp_path / "cache")[-1]
    dead = good.model_copy(
        update={"deleted": write_content(store, "deleted", Bitmap.of(3, np.array([1])).to_bytes(), 2)}
    )
    artifact.publish(store, write_tables(store, index_manifest(32, [dead]), None), version_key(5))
    assert "is no bitmap of 2 of 3 rows" in verify_shards(store, tmp_path / "cache")[-1]
    assert main(["verify", str(tmp_path)]) == 1


def test_an_interrupted_verify_goes_on(catalog, monkeypatch, tmp_path):
    """Files that were checked before the interruption are not read again; a whole run forgets them."""
    monkeypatch.setenv("HASHRAY_CACHE", str(tmp_path / "journal"))
    monkeypatch.setattr(verify_module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(verify_module, "CHECK_THREADS", 1)
    looked, check = [], verify_module._check_file

    def watched(store, record):
        looked.append(record.name)
        if len(looked) == 3:
            raise KeyboardInterrupt
        return check(store, record)

    monkeypatch.setattr(verify_module, "_check_file", watched)
    with pytest.raises(KeyboardInterrupt):
        artifact.verify(catalog.store)
    assert artifact.verify(catalog.store) == []
    assert len(looked) == len(artifact.load_manifest(catalog.store).stored) + 1  # one of them twice
    looked[:] = ["", "", ""]
    assert artifact.verify(catalog.store) == [] and len(looked) > 5


def test_an_id_twice_where_a_shard_ends(catalog, monkeypatch):
    monkeypatch.setattr("hashray.index.catalog.ROWS_PER_SHARD", 2)
    with pytest.raises(InputError, match="1 ids stand in more than one row, the first 'b'"):
        catalog.append(["a", "b", "b", "c"], codes_of(4))
    assert catalog.version == 2


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ([2**60 + 1], [0.5]),
        ([0.5], [2**60 + 1]),
        ([-5], pa.array([2**63 + 5], pa.uint64())),
        (pa.array([2**40], pa.timestamp("s")), pa.array([5], pa.timestamp("ns"))),
    ],
)
def test_values_that_no_type_holds_are_refused_before_they_are_there(tmp_path, values, others):
    catalog = create_index(str(tmp_path / "index"), 32)
    catalog.append(["a"], codes_of(1), {"x": values})
    with pytest.raises(InputError, match=r"attribute 'x' is .* in some rows and needs"):
        catalog.append(["b"], codes_of(1), {"x": others})
    catalog.append(["b"], codes_of(1), {"x": values})
    assert open_index(catalog.store.url).search(codes_of(1), 3, "is_valid(x)")[0].tolist() == [["a", "b", None]]
    assert catalog.compact() == 4


def test_a_third_type_is_held_against_all_rows(tmp_path):
    catalog = create_index(str(tmp_path / "index"), 32)
    catalog.append(["a"], codes_of(1), {"x": pa.array([1], pa.int32())})
    catalog.append(["b"], codes_of(1), {"x": [2**60 + 1]})
    with pytest.raises(InputError, match="attribute 'x' is int64 in some rows and needs double"):
        catalog.append(["c"], codes_of(1), {"x": pa.array([0.5], pa.float32())})
    assert catalog.append(["c"], codes_of(1), {"x": pa.array([5], pa.int8())}) == 4 and catalog.compact() == 5


def test_ids_and_attributes_that_arrow_cannot_hold(catalog):
    for call in (lambda: catalog.append(["\ud800"], codes_of(1)), lambda: catalog.delete(["\ud800"])):
        with pytest.raises(InputError, match="ids are text"):
            call()
    runs = pa.RunEndEncodedArray.from_arrays([1], ["a"])
    with pytest.raises(InputError, match="the attributes are no columns"):
        catalog.append(["x"], codes_of(1), {"x": runs})


def test_numbers_that_make_no_sense(catalog):
    for call in (
        lambda: catalog.compact(rows_per_shard=0),
        lambda: catalog.compact(most_deleted=float("nan")),
        lambda: catalog.gc(grace_s=float("inf")),
        lambda: catalog.gc(grace_s=float("nan")),
    ):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(InputError, match=r"1 queries and k = 100,000,000,000: ask for 1,073,741,824 answers or fewer"):
        open_index(catalog.store.url).search(codes_of(1), 10**11)
    assert catalog.version == 2

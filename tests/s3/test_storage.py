"""One contract for both stores, on a real folder and a real HTTP server; and every error's text."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashray.errors import AlreadyExists, InputError, StoreUnavailable
from hashray.storage import Store, check_conditional_put, join, local, open_store
from hashray.storage import s3 as storage_s3
from hashray.storage.base import TEMP_PREFIX
from hashray.storage.local import LocalStore
from hashray.storage.s3 import S3Store


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(request.getfixturevalue("s3_url"))


def test_write_read_overwrite_delete(store):
    assert not store.exists("a/b.bin")
    store.write("a/b.bin", b"one")
    store.write("a/b.bin", b"other")
    assert store.read("a/b.bin") == b"other"
    assert store.size("a/b.bin") == 5
    assert store.exists("a/b.bin") and not store.exists("a")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")


def test_empty_object(store):
    store.write("empty", b"")
    assert store.read("empty") == b"" and store.size("empty") == 0
    assert store.read_range("empty", 0, 10) == b""
    with store.open("empty") as file:
        assert file.read() == b""


@pytest.mark.parametrize("key", ["ä ö/ü+&%20?.txt", "a=b/c d", "'quoted\"", "-dash", ".hidden/x"])
def test_odd_keys(store, key):
    store.write(key, b"x")
    assert store.read(key) == b"x"
    assert list(store.list()) == [(key, 1)]


def test_read_range_is_a_slice(store):
    data = bytes(range(256))
    store.write("x", data)
    for start in (0, 1, 100, 255, 256, 1000):
        for length in (0, 1, 100, 256, 1000):
            assert store.read_range("x", start, length) == data[start : start + length]
    for start, length in ((-1, 2), (0, -1)):
        with pytest.raises(ValueError, match="must be 0 or more"):
            store.read_range("x", start, length)


def test_open_reads_and_seeks_like_a_file(store, monkeypatch):
    monkeypatch.setattr(storage_s3, "READ_BLOCK_BYTES", 1000)
    data = os.urandom(10_000)
    store.write("x", data)
    with store.open("x") as file:
        oracle = io.BytesIO(data)
        for offset, whence, length in [
            (0, 0, 10),
            (-100, 2, 200),
            (5000, 0, 3000),
            (-50, 1, 60),
            (9999, 0, 5),
            (20000, 0, 5),
        ]:
            assert file.seek(offset, whence) == oracle.seek(offset, whence)
            assert file.read(length) == oracle.read(length)
            assert file.tell() == oracle.tell()
        file.seek(123)
        assert file.read() == data[123:]
        assert file.seekable() and file.readable() and not file.writable()
        with pytest.raises((OSError, ValueError)):
            file.seek(-1)


def test_open_serves_parquet_and_tar(store):
    table = pa.table({"id": [f"image-{i}" for i in range(1000)], "x": list(range(1000))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    store.write("part-0.parquet", buffer.getvalue())
    assert pq.ParquetFile(store.open("part-0.parquet")).read().equals(table)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.jpg", b"123"), ("b.jpg", b"4567")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    store.write("shard.tar", buffer.getvalue())
    with store.open("shard.tar") as file, tarfile.open(fileobj=file) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == {"a.jpg": b"123", "b.jpg": b"4567"}


def test_list_is_recursive_sorted_and_relative(store):
    keys = ["b.txt", "a/x", "a.txt", "a-b/y", "a/b/c", "shards/1", "shards2"]
    for key in keys:
        store.write(key, key.encode())
    assert list(store.list()) == [(key, len(key)) for key in sorted(keys)]
    assert [key for key, _ in store.list("shards")] == ["shards/1", "shards2"]
    assert [key for key, _ in store.list("shards/")] == ["shards/1"]
    assert [key for key, _ in store.list("a/b/c")] == ["a/b/c"]
    assert list(store.list("nothing/here")) == []
    with pytest.raises(ValueError, match=r"without '\.\.'"):
        list(store.list("../"))


def test_a_level_is_what_lies_directly_below(store):
    for key in ("b/1", "b/c/2", "a", "b/c/d/3", "bc/4", "b.txt"):
        store.write(key, key.encode())
    assert store.level() == (["b/", "bc/"], [("a", 1), ("b.txt", 5)])
    assert store.level("b/") == (["b/c/"], [("b/1", 3)])
    assert store.level("nothing/") == ([], [])


def test_a_level_of_a_folder_that_holds_itself(tmp_path):
    store = open_store(tmp_path / "s")
    store.write("a/x", b"1")
    (tmp_path / "s" / "a" / "again").symlink_to(tmp_path / "s")
    faults = []
    assert store.level("a/") == (["a/again/"], [("a/x", 1)])
    assert store.level("a/again/", on_error=lambda key, error: faults.append(key)) == ([], [])
    assert [*store.list("a/again/", on_error=lambda key, error: faults.append(key))] == []
    assert faults == ["a/again", "a/again"]


def test_clear_leaves_no_empty_folders(tmp_path):
    store = open_store(tmp_path / "s")
    for key in ("progress/a/b/1", "progress/c/2", "rows/3"):
        store.write(key, b"1")
    store.clear("progress/a/")
    assert sorted(p.name for p in (tmp_path / "s").rglob("*")) == ["2", "3", "c", "progress", "rows"]
    store.clear("progress/")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["rows"]
    store.clear("")
    assert (tmp_path / "s").is_dir()


def test_list_does_not_see_the_neighbour(store):
    open_store(store.url + "-two").write("x", b"1")
    store.write("y", b"2")
    assert list(store.list()) == [("y", 1)]


def test_list_goes_past_one_page(s3_url):
    store = open_store(s3_url)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.write(f"x/{i:05d}", b"1"), range(1005)))
    assert [key for key, _ in store.list("x/")] == [f"x/{i:05d}" for i in range(1005)]


def test_list_of_a_folder_with_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"12")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert list(open_store(tmp_path).list()) == [("dangling", 0), ("linked/a.png", 2), ("real/a.png", 2)]


def test_folder_markers_of_consoles_are_not_listed(s3_url):
    store = open_store(s3_url)
    boto3.client("s3").put_object(Bucket=store.bucket, Key=store.prefix + "/folder/", Body=b"")
    store.write("folder/x", b"1")
    assert list(store.list()) == [("folder/x", 1)]


@pytest.mark.parametrize("large", [False, True])
def test_upload_and_download(store, tmp_path, monkeypatch, large):
    if large:  # two parts: 12 MB in parts of 8
        monkeypatch.setattr(storage_s3, "SINGLE_REQUEST_BYTES", 1 << 20)
        monkeypatch.setattr(storage_s3, "MB", 1 << 17)
    data = os.urandom(12 << 20 if large else 1000)
    (tmp_path / "from").write_bytes(data)
    store.upload("a/x", tmp_path / "from")
    assert store.size("a/x") == len(data)
    store.download("a/x", tmp_path / "new" / "folder" / "to")
    assert (tmp_path / "new" / "folder" / "to").read_bytes() == data
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["to"]
    if large:
        store.write("b", data)
        assert store.read("b") == data


def test_upload_of_a_missing_file_names_it(store, tmp_path):
    with pytest.raises(InputError, match="no-such-file not found"):
        store.upload("x", tmp_path / "no-such-file")
    with pytest.raises(InputError, match="x not found"):
        store.download("x", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_missing_objects_are_named_in_full(store):
    store.write("there", b"1")
    for call in (store.read, store.size, store.open, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(InputError, match=r"a/gone\.json not found") as caught:
            call("a/gone.json")
        assert join(store.url, "a/gone.json") in str(caught.value)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "folder/", "a\0b"])
def test_keys_stay_inside(store, key):
    for call in (store.read, store.exists, store.delete, store.local_path, lambda key: store.write(key, b"")):
        with pytest.raises(ValueError, match="not a relative path"):
            call(key)


def test_clear_removes_what_starts_so_and_nothing_else(store, monkeypatch):
    monkeypatch.setattr("hashray.storage.s3.KEYS_A_DELETE", 3)  # several batches
    for i in range(8):
        store.write(f"progress/a/{i} ü&<.json", b"x")
    store.write("progress-not/0.json", b"x")
    store.clear("progress/")
    store.clear("nothing/")
    assert [key for key, _ in store.list()] == ["progress-not/0.json"]


def test_create_only_once(store):
    store.create("versions/1.json", b"first")
    with pytest.raises(AlreadyExists, match=r"versions/1\.json already exists"):
        store.create("versions/1.json", b"second")
    with pytest.raises(AlreadyExists):
        store.create("versions/1.json", b"first")
    assert store.read("versions/1.json") == b"first"
    check_conditional_put(store)
    assert list(store.list()) == [("versions/1.json", 5)]


def _race(store: Store, key: str, me: int, barrier) -> bool:
    barrier.wait()
    try:
        store.create(key, str(me).encode() * 1000)
    except AlreadyExists:
        return False
    return True


def test_racing_threads_have_one_winner(store):
    with ThreadPoolExecutor(8) as pool:
        for number in range(10):
            barrier = threading.Barrier(8)
            key = f"v/{number}"
            won = list(pool.map(lambda me: _race(store, key, me, barrier), range(8)))  # noqa: B023
            assert won.count(True) == 1
            assert store.read(key) == str(won.index(True)).encode() * 1000


def _race_in_process(store: Store, barrier, me: int, results) -> None:
    results.put((me, [_race(store, f"v/{number}", me, barrier) for number in range(5)]))


def test_racing_processes_have_one_winner(store):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    workers = [spawn.Process(target=_race_in_process, args=(store, barrier, me, results)) for me in range(3)]
    for worker in workers:
        worker.start()
    won = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    for number in range(5):
        winners = [me for me in won if won[me][number]]
        assert len(winners) == 1
        assert store.read(f"v/{number}") == str(winners[0]).encode() * 1000


@pytest.mark.parametrize(("call", "cut"), [("create", "link"), ("write", "replace")])
def test_killed_before_the_name_is_given(tmp_path, call, cut):
    code = f"""
import os
from hashray.storage import open_store
os.{cut} = lambda *paths: os._exit(9)
open_store({str(tmp_path)!r}).{call}("manifest.json", b"half")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    store = open_store(tmp_path)
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(TEMP_PREFIX)
    assert not store.exists("manifest.json") and list(store.list()) == []
    store.create("manifest.json", b"whole")
    assert list(store.list()) == [("manifest.json", 5)]


def test_a_failed_write_leaves_the_old_object_and_no_litter(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.write("x", b"old")

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local.os, "replace", full)
    with pytest.raises(StoreUnavailable, match=r"x: No space left on device. Free some space"):
        store.write("x", b"new")
    assert store.read("x") == b"old" and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_pickled_store_works_and_is_equal(store):
    store.write("x", b"1")  # connects
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store and hash(copy) == hash(store) and repr(copy) == repr(store)
    assert copy.read("x") == b"1"


def test_a_store_travels_to_a_ray_worker(store, ray_session):
    store.write("x", b"1")

    @ray_session.remote
    def work(store):
        store.write("y", store.read("x") + b"2")
        return os.environ["AWS_ENDPOINT_URL"]

    assert ray_session.get(work.remote(store)) == os.environ["AWS_ENDPOINT_URL"]
    assert store.read("y") == b"12"


def test_a_pickled_store_keeps_its_endpoint(s3_url, s3_server, monkeypatch):
    store = open_store(s3_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    pickle.loads(pickle.dumps(store)).write("x", b"1")
    assert open_store(s3_url, endpoint_url=s3_server).read("x") == b"1"


def test_open_store_asks_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_s3, "_client", None)
    assert open_store(tmp_path / "new").url == str(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert isinstance(open_store("s3://bucket"), S3Store)
    assert open_store("s3://bucket//a/b//").url == "s3://bucket/a/b"
    monkeypatch.chdir(tmp_path)
    here = open_store("relative")
    assert isinstance(here, LocalStore) and here.local_path("x") == tmp_path / "relative" / "x"
    assert open_store("s3://bucket").local_path("x") is None

"""Verified files: read once, not again while nothing changed, and again after any change."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from hashray.artifact import sha256_hex
from hashray.errors import CorruptArtifact
from hashray.storage import cache as module
from hashray.storage import open_store
from hashray.storage.cache import verified_path

DATA = bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is read whole."""
    paths: list[Path] = []
    read = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path, *rest: (paths.append(path), read(path, *rest))[1])
    return paths


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a verification that comes long after the last change."""
    clock = time.time_ns
    monkeypatch.setattr(module.time, "time_ns", lambda: clock() + 60 * 10**9)


def write(tmp_path: Path) -> Path:
    open_store(tmp_path / "store").write("a.faiss", DATA)
    return tmp_path / "store" / "a.faiss"


def verify(path: Path, cache: Path, data: bytes = DATA) -> Path:
    return verified_path(open_store(path.parent), path.name, len(data), sha256_hex(data), cache)


def test_an_unchanged_file_is_read_once(tmp_path, cache, reads, quiet):
    path = write(tmp_path)
    assert [verify(path, cache) for _ in range(3)] == [path] * 3
    assert reads == [path]
    # Another path, and other bytes expected of the same path, have records of their own.
    link = path.with_name("b.faiss")
    link.hardlink_to(path)
    verify(link, cache)
    assert reads[1:] == [link]
    with pytest.raises(CorruptArtifact, match="is corrupt"):
        verify(path, cache, DATA[::-1])


def in_place(path: Path, wrong: bytes) -> None:
    with path.open("r+b") as file:
        file.write(wrong[:100])


def by_another(path: Path, wrong: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(wrong)
    shutil.copystat(path, other)
    other.replace(path)


def through_a_map(path: Path, wrong: bytes) -> None:
    import mmap

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as area:
        area[:100] = wrong[:100]


@pytest.mark.parametrize("change", [in_place, by_another, through_a_map, Path.write_bytes])
def test_changed_bytes_are_refused_also_with_the_old_times(tmp_path, cache, quiet, change):
    path = write(tmp_path)
    verify(path, cache)
    before = path.stat()
    change(path, bytes([DATA[0] ^ 1]) + DATA[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_size) == (before.st_mtime_ns, before.st_size)
    for _ in range(2):
        with pytest.raises(CorruptArtifact, match=r"a\.faiss is corrupt"):
            verify(path, cache)
    path.write_bytes(DATA)
    assert verify(path, cache) == path


def test_a_file_that_just_changed_gets_no_record(tmp_path, cache, reads):
    """A write in the same instant of the file system's clock would leave all times as they are."""
    path = write(tmp_path)
    for _ in range(2):
        os.utime(path)
        verify(path, cache)
    assert reads == [path] * 2 and not cache.exists()


def test_a_file_that_changes_while_it_is_read_gets_no_record(tmp_path, cache, quiet, monkeypatch):
    path, read = write(tmp_path), module.sha256_file

    def change_after_reading(name: Path, *rest: Any) -> str:
        digest = read(name, *rest)
        in_place(name, bytes(100))
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256_file", change_after_reading)
        verify(path, cache)
    with pytest.raises(CorruptArtifact, match="is corrupt"):
        verify(path, cache)


def test_records_that_prove_nothing(tmp_path, cache, reads, quiet, monkeypatch):
    path = write(tmp_path)
    verify(path, cache)
    (record,) = (cache / "verified").iterdir()
    whole = record.read_bytes()
    for wrong in (b"", whole[:-1], whole.replace(b"inode", b"inodf")):
        record.write_bytes(wrong)
        verify(path, cache)
        assert record.read_bytes() == whole
    assert len(reads) == 4
    monkeypatch.setattr(os, "geteuid", lambda: record.stat().st_uid + 1)
    verify(path, cache)
    assert len(reads) == 5


def test_without_a_cache_folder_each_open_reads(tmp_path, reads, quiet):
    path, cache = write(tmp_path), tmp_path / "file"
    cache.write_bytes(b"no folder")
    assert [verify(path, cache) for _ in range(2)] == [path] * 2
    assert len(reads) == 2


def test_files_of_s3_have_records_too(s3_url, cache, reads, quiet):
    store = open_store(s3_url)
    store.write("a.faiss", DATA)
    arguments = store, "a.faiss", len(DATA), sha256_hex(DATA), cache
    path = verified_path(*arguments)
    assert [verified_path(*arguments) for _ in range(3)] == [path] * 3
    assert reads.count(path) == 1
    times = path.stat()
    in_place(path, bytes(100))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert verified_path(*arguments).read_bytes() == DATA  # fetched again

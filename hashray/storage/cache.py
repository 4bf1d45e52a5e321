"""Files of a store on this machine: read in place where the store is local, else kept under their sha256.

Nothing is ever evicted, and any file of the cache may be deleted. Two processes may fill one cache: a file appears
there whole and verified, or not at all.

A file is verified by reading it whole. Then a record under CACHE/verified/ holds its path, its sha256 and its state:
device, inode, size, and the times of the last change of its bytes and of its inode. While all of them are the same, the
file is not read again. Nobody can set the second time, so a file that was rewritten or replaced differs, also where its
size and its first time were put back. A disk that loses a bit says nothing: `hashray verify` reads every byte.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hashray.errors import CorruptArtifact, InputError
from hashray.storage.base import TEMP_PREFIX, Store, join

logger = logging.getLogger(__name__)

# Times of files are multiples of a file system's granule, 2 s at most: a write soon after the last one may leave them
# as they are. So a file that changed so short a time before it was read gets no record yet.
QUIET_NS = 2_000_000_000
BLOCK_BYTES = 1 << 20


def _unheard(count: int) -> None:
    """Take a number of bytes that nobody counts."""


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Where files from S3 are kept: `cache_dir`, else $HASHRAY_CACHE, else ~/.cache/hashray."""
    return Path(cache_dir or os.environ.get("HASHRAY_CACHE") or "~/.cache/hashray").expanduser()


def sha256_file(path: str | Path, advance: Callable[[int], None] = _unheard) -> str:
    """Return the sha256 of a local file, read in blocks; `advance` gets the bytes of each."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with Path(path).open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            advance(size)
    return digest.hexdigest()


def recorded_path(store: Store, key: str, size_bytes: int, sha256: str, cache: Path) -> Path | None:
    """What `verified_path` gives, if it has nothing to read: the file is here, and unchanged since it was verified."""
    path = store.local_path(key) or _place(key, sha256, cache)
    try:
        return path if _is_recorded(path, path.stat(), size_bytes, sha256, cache) else None
    except OSError:
        return None


def verified_path(
    store: Store, key: str, size_bytes: int, sha256: str, cache: Path, advance: Callable[[int], None] = _unheard
) -> Path:
    """Return a local file with exactly these bytes: the store's own when it is local, else one in `cache`.

    Args:
        advance: gets numbers of bytes as they are fetched, or as a file on this machine is verified.

    Raises:
        CorruptArtifact: the file is missing in the store, or its bytes are others.
    """
    path = store.local_path(key)
    if path is None:
        path = _place(key, sha256, cache)
        if path.is_file() and _is_whole(path, size_bytes, sha256, cache, advance):
            return path
        part = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
        try:
            store.download(key, part, advance)
            _check(join(store.url, key), part, size_bytes, sha256, cache, _unheard)
            part.replace(path)
        except InputError as error:
            raise CorruptArtifact(f"{join(store.url, key)} is missing: its manifest lists it") from error
        finally:
            part.unlink(missing_ok=True)
    elif not path.is_file():
        raise CorruptArtifact(f"{path} is missing: its manifest lists it with {size_bytes} bytes")
    else:
        _check(str(path), path, size_bytes, sha256, cache, advance)
    return path


def _place(key: str, sha256: str, cache: Path) -> Path:
    return cache / sha256[:2] / f"{sha256}{Path(key).suffix}"


def _check(name: str, path: Path, size_bytes: int, sha256: str, cache: Path, advance: Callable[[int], None]) -> None:
    if not _is_whole(path, size_bytes, sha256, cache, advance):
        raise CorruptArtifact(
            f"{name} is corrupt: its bytes are not those its manifest lists (sha256 {sha256[:12]}…); "
            "restore it from a copy, or run the stage that made it again, elsewhere"
        )


def _is_whole(path: Path, size_bytes: int, sha256: str, cache: Path, advance: Callable[[int], None]) -> bool:
    """Whether the file has these bytes: by its record, else by reading it."""
    state = path.stat()
    if state.st_size != size_bytes:
        return False
    start_ns, seen = time.time_ns(), _seen(path, sha256, state)
    if _is_recorded(path, state, size_bytes, sha256, cache):
        return True
    if sha256_file(path, advance) != sha256:
        return False
    changed_ns = max(state.st_mtime_ns, state.st_ctime_ns)
    if changed_ns + QUIET_NS < start_ns and _seen(path, sha256, path.stat()) == seen:
        _write(_record(path, sha256, cache), seen)
    return True


def _record(path: Path, sha256: str, cache: Path) -> Path:
    return cache / "verified" / f"{hashlib.sha256(f'{sha256} {path.absolute()}'.encode()).hexdigest()[:32]}.json"


def _is_recorded(path: Path, state: os.stat_result, size_bytes: int, sha256: str, cache: Path) -> bool:
    return state.st_size == size_bytes and _read_mine(_record(path, sha256, cache)) == _seen(path, sha256, state)


def _seen(path: Path, sha256: str, state: os.stat_result) -> bytes:
    times = {"mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
    place = {"path": str(path.absolute()), "device": state.st_dev, "inode": state.st_ino}
    return json.dumps({"sha256": sha256, **place, "bytes": state.st_size, **times}, indent=2).encode()


def _read_mine(record: Path) -> bytes | None:
    """The bytes of a record of this user; another's proves nothing."""
    try:
        with record.open("rb") as file:
            return file.read() if os.fstat(file.fileno()).st_uid == os.geteuid() else None
    except OSError:
        return None


def _write(record: Path, seen: bytes) -> None:
    part = record.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(seen)
        part.replace(record)
    except OSError as error:  # the cache cannot be written: the file is read again next time
        logger.debug("no record of %s: %s", record, error)

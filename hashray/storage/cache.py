"""Files of a store on this machine: read in place where the store is local, else kept under their sha256.

Nothing is ever evicted, and any file of the cache may be deleted. Two processes may fill one cache: a file appears
there whole and verified, or not at all.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

from hashray.errors import CorruptArtifact, InputError
from hashray.storage.base import TEMP_PREFIX, Store, join


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a local file, read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verified_path(store: Store, key: str, size_bytes: int, sha256: str, cache: Path) -> Path:
    """Return a local file with exactly these bytes: the store's own when it is local, else one in `cache`.

    Raises:
        CorruptArtifact: the file is missing in the store, or its bytes are others.
    """
    path = store.local_path(key)
    if path is None:
        path = cache / sha256[:2] / f"{sha256}{Path(key).suffix}"
        if path.is_file() and _is_whole(path, size_bytes, sha256):
            return path
        part = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
        try:
            store.download(key, part)
            _check(join(store.url, key), part, size_bytes, sha256)
            part.replace(path)
        except InputError as error:
            raise CorruptArtifact(f"{join(store.url, key)} is missing: its manifest lists it") from error
        finally:
            part.unlink(missing_ok=True)
    elif not path.is_file():
        raise CorruptArtifact(f"{path} is missing: its manifest lists it with {size_bytes} bytes")
    else:
        _check(str(path), path, size_bytes, sha256)
    return path


def _check(name: str, path: Path, size_bytes: int, sha256: str) -> None:
    if not _is_whole(path, size_bytes, sha256):
        raise CorruptArtifact(
            f"{name} is corrupt: its bytes are not those its manifest lists (sha256 {sha256[:12]}…); "
            "restore it from a copy, or run the stage that made it again, elsewhere"
        )


def _is_whole(path: Path, size_bytes: int, sha256: str) -> bool:
    return path.stat().st_size == size_bytes and sha256_file(path) == sha256

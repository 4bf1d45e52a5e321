"""A local folder as a store: every write is a temporary file, fsync and a rename."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, final

from hashray.errors import AlreadyExists, InputError, StorageError, StoreUnavailable
from hashray.storage.base import TEMP_PREFIX, Level, Store, check_key, check_prefix, check_range

COPY_BLOCK_BYTES = 8 << 20
FOLDER_ATTEMPTS = 10


@final
class LocalStore(Store):
    """A folder. It need not exist: the first write makes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    def local_path(self, key: str) -> Path:
        return self.root / check_key(key)

    def read(self, key: str) -> bytes:
        path = self.local_path(key)
        with file_errors(path):
            return path.read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        path = self.local_path(key)
        with file_errors(path), path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def write(self, key: str, data: bytes) -> None:
        self._place(key, lambda temp: write_synced(temp, data), os.replace)

    def create(self, key: str, data: bytes) -> None:
        self._place(key, lambda temp: write_synced(temp, data), _link)

    def upload(self, key: str, path: Path) -> None:
        self._place(key, lambda temp: _copy_synced(path, temp), os.replace)

    def download(self, key: str, path: Path, advance: Callable[[int], None] | None = None) -> None:
        source = self.local_path(key)
        with file_errors(path, writes=True):
            place(path, lambda temp: _copy_synced(source, temp), os.replace)
        if advance is not None:
            advance(path.stat().st_size)

    def exists(self, key: str) -> bool:
        path = self.local_path(key)
        with file_errors(path):
            return path.is_file()

    def size(self, key: str) -> int:
        path = self.local_path(key)
        with file_errors(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            return path.stat().st_size

    def modified(self, key: str) -> float:
        path = self.local_path(key)
        with file_errors(path):
            return path.stat().st_mtime

    def list(
        self, prefix: str = "", on_error: Callable[[str, OSError], None] | None = None
    ) -> Iterator[tuple[str, int]]:
        folder = check_prefix(prefix).rpartition("/")[0]
        start = self.root / folder
        with file_errors(start):
            yield from _walk(start, f"{folder}/" if folder else "", prefix, self._above(start), on_error)

    def level(self, prefix: str = "", on_error: Callable[[str, OSError], None] | None = None) -> Level:
        folder = self.root / check_prefix(prefix)
        with file_errors(folder):
            items = [*_walk(folder, prefix, prefix, self._above(folder), on_error, deep=False)]
        return [key for key, _ in items if key.endswith("/")], [item for item in items if not item[0].endswith("/")]

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with file_errors(path, writes=True):
            path.unlink(missing_ok=True)

    def clear(self, prefix: str) -> None:
        super().clear(prefix)
        folder = self.root / check_prefix(prefix).rpartition("/")[0]
        inside = [path for path, _, _ in os.walk(folder, topdown=False)]
        for path in [*map(Path, inside), *folder.parents[: len(folder.parts) - len(self.root.parts) - 1]]:
            with suppress(OSError):  # it holds something, or is gone
                if path != self.root:
                    path.rmdir()

    def open(self, key: str, ranged: bool = False) -> BinaryIO:
        path = self.local_path(key)
        with file_errors(path):
            return path.open("rb")

    def _above(self, folder: Path) -> tuple[tuple[int, int], ...]:
        """Device and inode of every folder above, on the way by the names as they are, links and all."""
        inside = folder.parents[: len(folder.parts) - len(self.root.parts)]
        above = [*self.root.resolve().parents, *inside] if folder.is_dir() else []
        return tuple((status.st_dev, status.st_ino) for status in map(Path.stat, above))

    def _place(self, key: str, fill: Callable[[Path], None], commit: Callable[[Path, Path], None]) -> None:
        target = self.local_path(key)
        with file_errors(target, writes=True):
            place(target, fill, commit)


@contextmanager
def file_errors(path: Path, writes: bool = False) -> Iterator[None]:
    """Turn what the file system raises about `path` into our errors; `writes`: where it is written, not read."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} not found; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, a file was expected") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{path}: a part of this path is a file, not a folder") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise InputError(f"{path}: {error.strerror}") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreUnavailable(
                f"{path}: {error.strerror}. Free some space and run the same command again; finished files are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM) and not writes:
            raise InputError(f"{path}: {error.strerror}; make it readable") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP):
            raise StorageError(f"{path}: {error.strerror}; hashray needs a folder it may write and link in") from error
        raise StoreUnavailable(
            f"{path}: {error.strerror or error}. Run the same command again; finished files are kept"
        ) from error


def place(target: Path, fill: Callable[[Path], None], commit: Callable[[Path, Path], None]) -> None:
    """Fill a temporary file beside `target`, commit it under its name, make the name durable."""
    temp = target.parent / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        _fill(temp, fill)
        commit(temp, target)
    finally:
        temp.unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # another run has removed the file, and its folder, since
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _fill(temp: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder and fill the file; again where another run that tidies up removes the empty folder in between."""
    for _ in range(FOLDER_ATTEMPTS - 1):
        with suppress(FileNotFoundError, FileExistsError):  # the latter from a folder that goes while mkdir looks at it
            temp.parent.mkdir(parents=True, exist_ok=True)
            fill(temp)
            return
    temp.parent.mkdir(parents=True, exist_ok=True)
    fill(temp)


def _link(temp: Path, target: Path) -> None:
    try:
        os.link(temp, target)
    except FileExistsError as error:
        # NFS may lose the answer to a link and then say "exists": the file is ours all the same.
        if not target.exists() or not temp.samefile(target):
            raise AlreadyExists(f"{target} already exists") from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy_synced(source: Path, path: Path) -> None:
    with file_errors(source):
        reader = source.open("rb")
    with reader, path.open("xb") as file:
        shutil.copyfileobj(reader, file, COPY_BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _walk(
    folder: Path,
    base: str,
    prefix: str,
    above: tuple[tuple[int, int], ...],
    on_error: Callable[[str, OSError], None] | None,
    deep: bool = True,
) -> Iterator[tuple[str, int]]:
    entries: list[tuple[str, os.DirEntry[str]]] = []
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:  # followed, it would never end
            if on_error is not None:
                on_error(base.rstrip("/"), OSError(errno.ELOOP, "a link to a folder that holds it"))
            return
        for entry in os.scandir(folder):
            try:
                entries.append((entry.name + "/" * entry.is_dir(), entry))
            except OSError as error:  # a link to itself
                _report(base + entry.name, error, on_error)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # a folder without permission
        _report(base.rstrip("/"), error, on_error)
        return
    for name, entry in sorted(entries, key=lambda pair: pair[0]):
        key = base + name
        if name.endswith("/") and not deep:
            yield key, 0
        elif name.endswith("/"):
            if key.startswith(prefix[: len(key)]):
                yield from _walk(folder / entry.name, key, prefix, (*above, here), on_error)
        elif key.startswith(prefix) and not name.startswith(TEMP_PREFIX):
            try:
                size = entry.stat().st_size
            except FileNotFoundError:
                if not entry.is_symlink():
                    continue
                size = 0  # a dangling link is listed, so that reading it says what is wrong
            except OSError as error:
                _report(key, error, on_error)
                continue
            yield key, size


def _report(key: str, error: OSError, on_error: Callable[[str, OSError], None] | None) -> None:
    if on_error is None or not key:
        raise error
    on_error(key, error)

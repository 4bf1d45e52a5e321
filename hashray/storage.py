"""One door to a local folder or `s3://bucket/prefix`.

Store (read, write, create-if-absent, list, open)
├── LocalStore          a folder; writes are a temporary file, fsync and a rename
└── storage_s3.S3Store  a bucket and a prefix; one boto3 client per process and endpoint

A key is a path relative to the store. A reader never sees half an object. `create` has exactly one
winner, which is what every published manifest rests on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

from hashray.errors import AlreadyExists, InputError, StorageError, StoreUnavailable

if TYPE_CHECKING:
    from hashray.storage_s3 import S3Store as S3Store

COPY_BLOCK_BYTES = 8 << 20
TEMP_PREFIX = ".hashray-tmp-"
ALLOWED = "allowed are a local folder or s3://bucket/prefix"


class Store(ABC):
    """A folder of objects, local or on S3. Cheap to make, safe to pickle and to share between threads."""

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Return the whole object.

        Raises:
            InputError: there is no such object; the text holds its full path or url.
        """

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes from byte `start`; fewer (or none) where the object ends before."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write the whole object at once, over an older one if there is one."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Write the object only if there is none: of any number of racing writers exactly one returns.

        A writer whose answer was lost and who asks again may meet its own object, and gets AlreadyExists
        too: from here it cannot be told from a stranger that wrote the same bytes, and calling both
        winners would break the promise above. Whoever is content with "these bytes stand there" compares
        them, as `artifact.publish` does.

        Raises:
            AlreadyExists: the key is taken.
        """

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Copy a local file into the store, whole or not at all."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, whole or not at all; makes the folder of `path`."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Say whether there is an object (not a folder) under this key."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return the object's size in bytes; raises InputError when there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield (key, bytes) of every object whose key starts with `prefix`, in all sub-folders, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Open the object as a seekable read-only binary file, for pyarrow, tarfile and the like."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Return the file's path when the store is a local folder, else None."""

    def clear(self, prefix: str) -> None:
        """Remove every object whose key starts with `prefix`."""
        for key, _ in [*self.list(prefix)]:
            self.delete(key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.url)


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

    def download(self, key: str, path: Path) -> None:
        source = self.local_path(key)
        with file_errors(path):
            place(path, lambda temp: _copy_synced(source, temp), os.replace)

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

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        folder = check_prefix(prefix).rpartition("/")[0]
        start = self.root / folder
        with file_errors(start):
            yield from _walk(start, f"{folder}/" if folder else "", prefix, ())

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with file_errors(path):
            path.unlink(missing_ok=True)

    def open(self, key: str) -> BinaryIO:
        path = self.local_path(key)
        with file_errors(path):
            return path.open("rb")

    def _place(self, key: str, fill: Callable[[Path], None], commit: Callable[[Path, Path], None]) -> None:
        target = self.local_path(key)
        with file_errors(target):
            place(target, fill, commit)


def open_store(url: str | Path, endpoint_url: str | None = None) -> Store:
    """Return the store of a local folder or an s3 url; makes and asks for nothing.

    The endpoint, when none is given, is what AWS_ENDPOINT_URL says here: a pickled store keeps it.

    Raises:
        InputError: the url is empty, or neither a local path nor s3://.

    >>> open_store("s3://photos/corpus/").url
    's3://photos/corpus'
    """
    text = str(url)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/{1,2})", text)
    if scheme is None:
        if not text.strip():
            raise InputError(f"an empty path was given; {ALLOWED}")
        return LocalStore(Path(text).expanduser().absolute())
    if scheme[1].lower() != "s3":
        raise InputError(f"{text}: {scheme[1]}:// is not supported; {ALLOWED}")
    bucket, _, prefix = text[scheme.end() :].partition("/")
    if len(scheme[2]) != 2 or not bucket:
        raise InputError(f"{text}: not of the form s3://bucket/prefix (pathlib.Path drops a slash: pass text)")
    from hashray.storage_s3 import S3Store  # not at the top: half a second of imports: only who needs it pays

    env = os.environ
    endpoint = endpoint_url or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None
    return S3Store(bucket, prefix.strip("/"), endpoint)


def __getattr__(name: str) -> Any:
    if name == "S3Store":
        from hashray.storage_s3 import S3Store

        return S3Store
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def join(url: str | Path, *parts: str) -> str:
    """Append parts to a url or a path.

    >>> join("s3://photos/", "codes", "part-0.parquet")
    's3://photos/codes/part-0.parquet'
    """
    text = str(url)
    for part in parts:
        text = f"{text.rstrip('/')}/{part.strip('/')}" if text else part
    return text


def split_url(url: str | Path) -> tuple[str, str]:
    """Split a file's url into the url of its folder and its name.

    >>> split_url("s3://b/p/x.txt"), split_url("x.txt")
    (('s3://b/p', 'x.txt'), ('.', 'x.txt'))
    """
    text = str(url).rstrip("/")
    folder, slash, name = text.rpartition("/")
    if name in ("", ".", "..") or "s3:" in (name.lower(), folder.lower().rstrip("/")):
        raise InputError(f"{url} does not name a file; {ALLOWED}, then /file")
    return folder or slash or ".", name


def read_url(url: str | Path) -> bytes:
    """The bytes of one file, local or on S3.

    Raises:
        InputError: there is no such file, or the url names none.
    """
    folder, name = split_url(url)
    return open_store(folder).read(name)


def absolute(url: str) -> str:
    """The url as every worker must see it: local paths absolute, since Ray's workers run in folders of their own."""
    return open_store(url).url


def check_conditional_put(store: Store) -> None:
    """Make sure that `create` really refuses a second writer: some stores ignore the header it uses.

    Raises:
        StorageError: the second of two creates of one fresh key went through.
    """
    key = f"{TEMP_PREFIX}probe-{uuid.uuid4().hex}"
    try:
        for data in (b"first", b"second"):
            store.create(key, data)
    except AlreadyExists:
        return
    finally:
        store.delete(key)
    raise StorageError(no_conditional_put(store))


def check_key(key: str) -> str:
    """Return `key` when it is a relative path of an object; raise ValueError when it is not.

    >>> check_key("versions/00000001.json")
    'versions/00000001.json'
    """
    if not key or key[0] == "/" or key[-1] == "/" or "\0" in key or ".." in key.split("/"):
        raise ValueError(f"key {key!r} is not a relative path of a file, without '..'")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` when it can begin a key; raise ValueError when it cannot."""
    if prefix.startswith("/") or "\0" in prefix or ".." in prefix.split("/"):
        raise ValueError(f"prefix {prefix!r} is not a relative path without '..'")
    return prefix


def check_range(start: int, length: int) -> None:
    """Raise ValueError for a range before the object's first byte."""
    if start < 0 or length < 0:
        raise ValueError(f"range of {length} bytes from {start}: both must be 0 or more")


def no_conditional_put(store: Store) -> str:
    """Say what the store lacks and why publishing there could lose an index."""
    return (
        f"{store.url}: this store does not keep the promise of `If-None-Match: *` (write only if absent), so of two "
        "writers who publish at once the later would silently replace the other's version and an index could be "
        "lost; nothing was published. Use Amazon S3, MinIO, Ceph RGW or a local folder"
    )


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn what the file system raises about `path` into our errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path} not found; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, a file was expected") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{path}: a part of this path is a file, not a folder") from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP):
            raise StorageError(f"{path}: {error.strerror}; hashray needs a folder it may write and link in") from error
        raise StoreUnavailable(
            f"{path}: {error.strerror or error}; then run it again: finished files are kept"
        ) from error


def place(target: Path, fill: Callable[[Path], None], commit: Callable[[Path, Path], None]) -> None:
    """Fill a temporary file beside `target`, commit it under its name, make the name durable."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.parent / f"{TEMP_PREFIX}{uuid.uuid4().hex}"
    try:
        fill(temp)
        commit(temp, target)
    finally:
        temp.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _link(temp: Path, target: Path) -> None:
    try:
        os.link(temp, target)
    except FileExistsError as error:
        # NFS may lose the answer of a link that was made and then say "exists": our own file is ours.
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


def _walk(folder: Path, base: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
    try:
        status = folder.stat()
        entries = [(entry.name + "/" * entry.is_dir(), entry) for entry in os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder above itself
        return
    for name, entry in sorted(entries, key=lambda pair: pair[0]):
        key = base + name
        if name.endswith("/"):
            if key.startswith(prefix[: len(key)]):
                yield from _walk(folder / entry.name, key, prefix, (*above, here))
        elif key.startswith(prefix) and not name.startswith(TEMP_PREFIX):
            try:
                yield key, entry.stat().st_size
            except FileNotFoundError:
                if entry.is_symlink():  # a dangling link is listed, so that reading it says what is wrong
                    yield key, 0

"""What a store is: objects under keys, in a local folder or in a bucket.

A key is a path relative to the store. A reader never sees half an object. `create` has at most one winner, and every
published manifest relies on that.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hashray.errors import AlreadyExists, StorageError

TEMP_PREFIX = ".hashray-tmp-"
Level = tuple[list[str], list[tuple[str, int]]]


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
        """Write the object only if there is none: of any number of racing writers at most one returns.

        A writer that lost the answer and asks again may meet its own object. It gets AlreadyExists too, because equal
        bytes from another writer look the same. A caller that only needs these bytes compares them, as
        `artifact.publish` does.

        Raises:
            AlreadyExists: the key is taken.
        """

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Copy a local file into the store, whole or not at all."""

    @abstractmethod
    def download(self, key: str, path: Path, advance: Callable[[int], None] | None = None) -> None:
        """Copy an object to a local file, whole or not at all; makes the folder of `path`.

        Args:
            advance: gets numbers of bytes as they come, in any thread; a negative one where some are fetched again.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Say whether there is an object (not a folder) under this key."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Return the object's size in bytes; raises InputError when there is none."""

    @abstractmethod
    def modified(self, key: str) -> float:
        """Return when the object was last written, by the store's clock, in s since 1970.

        Raises:
            InputError: there is no such object.
        """

    @abstractmethod
    def list(
        self, prefix: str = "", on_error: Callable[[str, OSError], None] | None = None
    ) -> Iterator[tuple[str, int]]:
        """Yield (key, bytes) of every object whose key starts with `prefix`, in all sub-folders, sorted by key.

        Args:
            on_error: gets the key and the error of a path that cannot be looked at, such as a folder without
                permission; unset, the error is raised.
        """

    @abstractmethod
    def level(self, prefix: str = "", on_error: Callable[[str, OSError], None] | None = None) -> Level:
        """Return the prefixes ("a/b/") and the objects (key, bytes) directly below the prefix "a/", each sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when there is none."""

    @abstractmethod
    def open(self, key: str, ranged: bool = False) -> BinaryIO:
        """Open the object as a seekable read-only binary file.

        Args:
            ranged: for a Parquet file of which only some columns are read: nothing is read but what is asked for, and
                the file's last 64 KiB. Unset: for reading from one end to the other, by blocks of 8 MiB.
        """

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


def join(url: str | Path, *parts: str) -> str:
    """Append parts to a url or a path.

    >>> join("s3://photos/", "codes", "part-0.parquet")
    's3://photos/codes/part-0.parquet'
    """
    text = str(url)
    for part in parts:
        text = f"{text.rstrip('/')}/{part.strip('/')}" if text else part
    return text


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

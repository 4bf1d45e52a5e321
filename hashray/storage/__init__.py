"""One door to a local folder or `s3://bucket/prefix`.

Store (read, write, create-if-absent, list, open)      base.py
├── LocalStore   a folder                               local.py
└── S3Store      a bucket and a prefix                  s3.py
    ├── RangedFile   an object of which ranges are read     ranged.py
    ├── renew        a token that expired is replaced       credentials.py
    └── Requests     what this process asked of S3          requests.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hashray.errors import InputError
from hashray.storage.base import Store, check_conditional_put, join
from hashray.storage.local import LocalStore

__all__ = ["Store", "absolute", "check_conditional_put", "join", "open_store", "read_url", "split_url"]

ALLOWED = "allowed are a local folder or s3://bucket/prefix"


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
    from hashray.storage.s3 import S3Store  # half a second of imports, for those who need it

    env = os.environ
    endpoint = endpoint_url or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None
    return S3Store(bucket, prefix.strip("/"), endpoint)


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

"""Opening an artifact by its manifest; of an index, by its newest version."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from hashray.artifact.manifest import Manifest, from_bytes
from hashray.artifact.publish import MANIFEST, with_files
from hashray.errors import InputError, MismatchError
from hashray.storage import Store, join, open_store

PLURALS = ("codes", "duplicates", "features", "pseudo-labels")
PARSED = 16  # manifests that a process keeps


def load_manifest(url_or_store: str | Path | Store, kind: str | None = None, key: str = MANIFEST) -> Manifest:
    """Open an artifact by its manifest, an index by its newest version.

    A manifest with the same bytes is parsed once in a process: treat what is returned as constant.

    Raises:
        InputError: there is no manifest: the stage did not finish, or the path is another.
        CorruptArtifact: the manifest's bytes are not what was published.
        MismatchError: it is of another kind than `kind`, or written by a newer hashray.
    """
    store = url_or_store if isinstance(url_or_store, Store) else open_store(url_or_store)
    try:
        manifest = _parsed(store, key, store.read(key))
    except InputError as error:
        if key != MANIFEST or not store.exists(version_key(1)):
            raise InputError(
                f"{store.url} is not a finished artifact: no {key} there; check the path, or if it is right: "
                "the stage that writes it did not finish, run it again"
            ) from error
        manifest = newest_version(store)[1]
    if kind is not None and manifest.kind != kind:
        article = {
            "index": "an ",
            "evaluation": "an ",
            "codes": "",
            "duplicates": "",
            "features": "",
            "pseudo-labels": "",
        }
        there, wanted = (f"{article.get(name, 'a ')}{name}" for name in (manifest.kind, kind))
        raise MismatchError(f"{store.url} is {there}, expected {wanted}; check which path was given for the {kind}")
    return manifest


@lru_cache(maxsize=PARSED)
def _parsed(store: Store, key: str, data: bytes) -> Manifest:
    """The manifest of these bytes, with its files: the table, too, is named by its sha256."""
    return with_files(store, from_bytes(data, join(store.url, key)))


def version_key(number: int) -> str:
    """Return the key of an index version.

    >>> version_key(12)
    'versions/00000012.json'
    """
    return f"versions/{number:08d}.json"


def newest_version(store: Store) -> tuple[int, Manifest]:
    """Search for the newest version by number, doubling and then halving, never by a listing.

    Raises:
        InputError: there is no version at all.
    """
    missing = 1
    while store.exists(version_key(missing)):
        missing *= 2
    newest = missing // 2
    while missing - newest > 1:
        middle = (newest + missing) // 2
        newest, missing = (middle, missing) if store.exists(version_key(middle)) else (newest, middle)
    if newest == 0:
        raise InputError(
            f"{store.url} is not an index: no {version_key(1)} there; check the path, or if it is right: "
            "`hashray index build` did not finish, run it again"
        )
    return newest, load_manifest(store, "index", version_key(newest))


def is_finished(store: Store, key: str = MANIFEST) -> bool:
    """Say whether the stage that writes `key` has finished."""
    return store.exists(key)

"""The manifest every stage writes last: what the artifact is, from what, and every file's checksum.

A stage is finished when its manifest is there, and a reader opens manifests, never listings. The
stored bytes are the canonical JSON of `Manifest` plus its own "id", so a changed byte anywhere in an
artifact, manifest included, is found. Nothing here knows the time: a rerun publishes the same bytes.

artifact/manifest.json            corpus, features, model, codes, evaluation
index/versions/00000001.json ...  an index: each version a manifest, the newest is the index
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hashray.errors import AlreadyExists, AuditError, CorruptArtifact, InputError, MismatchError
from hashray.ids import find_duplicates
from hashray.manifest import (
    FORMAT_VERSION,
    QUARANTINE,
    FileRecord,
    Manifest,
    audit,
    canonical,
    from_bytes,
    sha256_file,
    sha256_hex,
    to_bytes,
)
from hashray.progress import Bar
from hashray.storage import TEMP_PREFIX, Store, check_conditional_put, join, open_store

__all__ = [
    "FORMAT_VERSION",
    "FileRecord",
    "Manifest",
    "canonical",
    "describe",
    "download_file",
    "is_finished",
    "load_manifest",
    "newest_version",
    "publish",
    "read_file",
    "sha256_file",
    "sha256_hex",
    "upload_file",
    "verify",
    "version_key",
    "write_file",
]

MANIFEST = "manifest.json"
TOMBSTONES = "tombstones/"
HASH_BLOCK_BYTES = 8 << 20
CHECK_THREADS = 4
LISTED_DUPLICATES = 5


def write_file(
    store: Store, name: str, data: bytes, rows: int | None = None, info: Mapping[str, Any] | None = None
) -> FileRecord:
    """Write one file of an artifact and return its record."""
    store.write(name, data)
    return FileRecord(name=name, bytes=len(data), sha256=sha256_hex(data), rows=rows, info=dict(info or {}))


def upload_file(
    store: Store, name: str, path: str | Path, rows: int | None = None, info: Mapping[str, Any] | None = None
) -> FileRecord:
    """Upload a local file into an artifact and return its record."""
    path = Path(path)
    store.upload(name, path)
    return FileRecord(name=name, bytes=path.stat().st_size, sha256=sha256_file(path), rows=rows, info=dict(info or {}))


def read_file(store: Store, record: FileRecord) -> bytes:
    """Return a file's bytes, after checking them.

    Raises:
        CorruptArtifact: the file is missing, or its length or sha256 is not the manifest's.
    """
    try:
        data = store.read(record.name)
    except InputError as error:
        raise CorruptArtifact(_missing(store, record)) from error
    _check(store, record, len(data), sha256_hex(data))
    return data


def download_file(store: Store, record: FileRecord, path: str | Path) -> Path:
    """Download a file to `path` and return it; nothing appears there before the bytes have been checked.

    Raises:
        CorruptArtifact: as for `read_file`.
    """
    path = Path(path)
    part = path.with_name(f"{TEMP_PREFIX}{uuid.uuid4().hex}")
    try:
        store.download(record.name, part)
        _check(store, record, part.stat().st_size, sha256_file(part))
        part.replace(path)
    except InputError as error:
        raise CorruptArtifact(_missing(store, record)) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def publish(store: Store, manifest: Manifest, key: str = MANIFEST) -> Manifest:
    """Write the manifest, which finishes the stage. Publishing the same content twice is fine.

    Raises:
        AuditError: rows in are not rows out plus rows quarantined, or the files do not add up to them.
        AlreadyExists: another manifest has this name.
    """
    faults = audit(manifest)
    if faults:
        raise AuditError(f"{store.url} ({manifest.kind}) was not published: {'; '.join(faults)}")
    data = to_bytes(manifest)
    _honours_create(store)
    try:
        store.create(key, data)
    except AlreadyExists as error:
        # Ours after a lost answer, or a twin's of the same run: either way what should stand there does.
        there = store.read(key)
        if there != data:
            raise AlreadyExists(
                f"{join(store.url, key)} already exists and is {_whose(there)}, not this {manifest.kind} "
                f"({manifest.id[:12]}): another run published here first, or the configuration or the input changed; "
                "choose another --out, or delete the folder to make it again"
            ) from error
    return manifest


@lru_cache(maxsize=64)
def _honours_create(store: Store) -> None:
    """Once a process and store: a store that ignores the condition would let a second publisher overwrite a first."""
    if store.local_path(MANIFEST) is None:
        check_conditional_put(store)


def load_manifest(url_or_store: str | Path | Store, kind: str | None = None, key: str = MANIFEST) -> Manifest:
    """Open an artifact by its manifest; of an index, by its newest version.

    Raises:
        InputError: there is no manifest: the stage did not finish, or the path is another.
        CorruptArtifact: the manifest's bytes are not what was published.
        MismatchError: it is of another kind than `kind`, or written by a newer hashray.
    """
    store = url_or_store if isinstance(url_or_store, Store) else open_store(url_or_store)
    try:
        manifest = from_bytes(store.read(key), join(store.url, key))
    except InputError as error:
        if key != MANIFEST or not store.exists(version_key(1)):
            raise InputError(
                f"{store.url} is not a finished artifact: no {key} there; check the path, or if it is right: "
                "the stage that writes it did not finish, run it again"
            ) from error
        manifest = newest_version(store)[1]
    if kind is not None and manifest.kind != kind:
        article = {"index": "an", "evaluation": "an"}
        found, wanted = (f"{article.get(name, 'a')} {name}" for name in (manifest.kind, kind))
        raise MismatchError(f"{store.url} is {found}, expected {wanted}; check which path was given for the {kind}")
    return manifest


def version_key(number: int) -> str:
    """Return the key of an index version.

    >>> version_key(12)
    'versions/00000012.json'
    """
    return f"versions/{number:08d}.json"


def newest_version(store: Store) -> tuple[int, Manifest]:
    """Find an index's newest version by asking for numbers, doubling and then halving: never by a listing.

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


def describe(url: str | Path | Store) -> dict[str, Any]:
    """Return what an artifact is, from what, how big, and whether all files are there in the right size."""
    store = url if isinstance(url, Store) else open_store(url)
    manifest = load_manifest(store)
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        problems = [text for text in pool.map(lambda record: _check_size(store, record), manifest.files) if text]
    summary: dict[str, Any] = {"url": store.url, "kind": manifest.kind, "id": manifest.id}
    if not store.exists(MANIFEST):
        summary["version"] = newest_version(store)[0]
    fields = manifest.model_dump(mode="json", exclude={"kind", "files"})
    size_bytes = sum(record.bytes for record in manifest.files)
    counts = {"rows": manifest.rows_out, "files": len(manifest.files), "bytes": size_bytes}
    return {**summary, **fields, **counts, "whole": not problems, "problems": problems}


def verify(url: str | Path | Store) -> list[str]:
    """Check every byte, every row count and the uniqueness of ids; return the problems, [] when whole.

    Raises:
        InputError: there is nothing at all under this url.
    """
    store = url if isinstance(url, Store) else open_store(url)
    problems: list[str] = []
    try:
        manifest = load_manifest(store)
        if not store.exists(MANIFEST):
            problems += _verify_versions(store)
    except CorruptArtifact as error:
        return [str(error)]
    except InputError as error:
        if next(store.list(), None) is None:
            raise
        return [str(error), *_verify_versions(store)]
    problems += [f"{join(store.url, MANIFEST)}: {fault}" for fault in audit(manifest)]
    size, found = sum(record.bytes for record in manifest.files), []
    with Bar("verify", size, "bytes") as bar, ThreadPoolExecutor(CHECK_THREADS) as pool:
        checked = pool.map(lambda record: _check_bytes(store, record), manifest.files)
        for record, text in zip(manifest.files, checked, strict=True):
            found.append(text)
            bar.add(record.bytes)
    problems += [text for text in found if text]
    whole = [record for record, text in zip(manifest.files, found, strict=True) if text is None]
    tables = []
    for record in whole:
        if record.name.endswith(".parquet"):
            rows = _footer_rows(store, record.name)
            if isinstance(rows, str):
                problems.append(rows)
                continue
            if record.rows is not None and rows != record.rows:
                problems.append(f"{join(store.url, record.name)}: holds {rows} rows, its manifest says {record.rows}")
            if record.name != QUARANTINE:
                tables.append(record.name)
    return problems + _duplicate_ids(store, tables)


def _verify_versions(store: Store) -> list[str]:
    """Check every version up to the highest one a listing shows: one that is lost would hide all after it."""
    listed = [int(key[9:-5]) for key, _ in store.list("versions/") if re.fullmatch(r"versions/\d{8}\.json", key)]
    problems = []
    for number in range(1, max(listed, default=0) + 1):
        name = version_key(number)
        try:
            from_bytes(store.read(name), join(store.url, name))
        except InputError:
            problems.append(f"{join(store.url, name)} is missing: later versions are there")
        except (CorruptArtifact, MismatchError) as error:
            problems.append(str(error))
    return problems


def _whose(data: bytes) -> str:
    try:
        manifest = from_bytes(data, "")
    except (CorruptArtifact, MismatchError):
        return "not a manifest this hashray can read"
    return f"a {manifest.kind} with id {manifest.id[:12]}, written by hashray {manifest.project_version}"


def _missing(store: Store, record: FileRecord) -> str:
    return f"{join(store.url, record.name)} is missing: its manifest lists it with {record.bytes} bytes"


def _check(store: Store, record: FileRecord, size_bytes: int, digest: str) -> None:
    name = join(store.url, record.name)
    if size_bytes != record.bytes:
        raise CorruptArtifact(f"{name} has {size_bytes} bytes, its manifest says {record.bytes}")
    if digest != record.sha256:
        raise CorruptArtifact(f"{name} is corrupt: sha256 {digest[:12]}…, its manifest says {record.sha256[:12]}…")


def _check_size(store: Store, record: FileRecord) -> str | None:
    try:
        _check(store, record, store.size(record.name), record.sha256)
    except InputError:
        return _missing(store, record)
    except CorruptArtifact as error:
        return str(error)
    return None


def _check_bytes(store: Store, record: FileRecord) -> str | None:
    problem = _check_size(store, record)
    if problem is None:
        digest = hashlib.sha256()
        with store.open(record.name) as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
        try:
            _check(store, record, record.bytes, digest.hexdigest())
        except CorruptArtifact as error:
            return str(error)
    return problem


def _footer_rows(store: Store, name: str) -> int | str:
    try:
        return pq.ParquetFile(store.open(name)).metadata.num_rows
    except pa.ArrowInvalid as error:
        return f"{join(store.url, name)} is no Parquet file: {error}"


def _duplicate_ids(store: Store, names: list[str]) -> list[str]:
    def read() -> Iterator[tuple[str, list[Any]]]:
        for name in names:
            table = pq.ParquetFile(store.open(name))
            if "id" in table.schema_arrow.names:
                for batch in table.iter_batches(columns=["id"]):
                    yield name, batch.column(0).to_pylist()

    problems = []
    for value, places in find_duplicates(read).items():
        files = [name for name in places if not name.startswith(TOMBSTONES)]
        # An id that was deleted may be there once more, appended again.
        if len(files) - (len(places) - len(files)) > 1:
            among = ", ".join(sorted(set(files)))
            problems.append(f"{join(store.url, files[-1])}: duplicate id {value!r}, in {len(files)} rows of {among}")
    if len(problems) > LISTED_DUPLICATES:
        more = f"{store.url}: {len(problems) - LISTED_DUPLICATES} more ids are duplicated"
        problems = [*problems[:LISTED_DUPLICATES], more]
    return problems

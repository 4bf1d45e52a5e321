"""What an artifact is, and proof that it is whole: every byte, every row count, every id once."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hashray.artifact.manifest import QUARANTINE, FileRecord, audit, from_bytes, plain_name
from hashray.artifact.publish import MANIFEST, check, missing
from hashray.artifact.versions import load_manifest, newest_version, version_key
from hashray.errors import CorruptArtifact, InputError, MismatchError
from hashray.progress import Bar
from hashray.storage import Store, join, open_store

CHECK_THREADS = 4
LISTED_DUPLICATES = 5
IDS_AT_ONCE = 1 << 16


def describe(url: str | Path | Store) -> dict[str, Any]:
    """Return an artifact's kind, parents, size, and whether all files are there in the right size."""
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
    size, faults = sum(record.bytes for record in manifest.files), []
    with Bar("verify", size, "bytes") as bar, ThreadPoolExecutor(CHECK_THREADS) as pool:
        checked = pool.map(lambda record: _check_bytes(store, record), manifest.files)
        for record, text in zip(manifest.files, checked, strict=True):
            faults.append(text)
            bar.add(record.bytes)
    problems += [text for text in faults if text]
    whole = [record for record, text in zip(manifest.files, faults, strict=True) if text is None]
    tables = []
    for record in whole:
        if record.name.endswith((".parquet", ".arrow")):
            rows = _footer_rows(store, record.name)
            if isinstance(rows, str):
                problems.append(rows)
                continue
            if record.rows is not None and rows != record.rows:
                problems.append(f"{join(store.url, record.name)}: holds {rows} rows, its manifest says {record.rows}")
            if plain_name(record.name) != QUARANTINE:
                tables.append(record.name)
    return problems + _duplicate_ids(store, tables)


def _verify_versions(store: Store) -> list[str]:
    """Check every version up to the highest in a listing: a lost one would hide all that follow."""
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


def _check_size(store: Store, record: FileRecord) -> str | None:
    try:
        check(store, record, store.size(record.name), record.sha256)
    except InputError:
        return missing(store, record)
    except CorruptArtifact as error:
        return str(error)
    return None


def _check_bytes(store: Store, record: FileRecord) -> str | None:
    problem = _check_size(store, record)
    if problem is None:
        with store.open(record.name) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed: no readinto
        try:
            check(store, record, record.bytes, sha256)
        except CorruptArtifact as error:
            return str(error)
    return problem


def _footer_rows(store: Store, name: str) -> int | str:
    kind = "Arrow" if name.endswith(".arrow") else "Parquet"
    try:
        if kind == "Arrow":
            return sum(len(batch) for batch in _arrow_batches(store, name))
        return pq.ParquetFile(store.open(name)).metadata.num_rows
    except pa.ArrowInvalid as error:
        return f"{join(store.url, name)} is no {kind} file: {error}"


def _arrow_batches(store: Store, name: str) -> Iterator[pa.RecordBatch]:
    with pa.ipc.open_file(store.open(name)) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _duplicate_ids(store: Store, names: list[str]) -> list[str]:
    def read() -> Iterator[tuple[str, list[Any]]]:
        for name in names:
            if name.endswith(".arrow"):
                for whole in _arrow_batches(store, name):
                    for start in range(0, len(whole) if "id" in whole.schema.names else 0, IDS_AT_ONCE):
                        yield name, whole.column("id").slice(start, IDS_AT_ONCE).to_pylist()
                continue
            table = pq.ParquetFile(store.open(name))
            if "id" in table.schema_arrow.names:
                for batch in table.iter_batches(columns=["id"]):
                    yield name, batch.column(0).to_pylist()

    problems = []
    for value, files in find_duplicates(read).items():
        among = ", ".join(sorted(set(files)))
        problems.append(f"{join(store.url, files[-1])}: duplicate id {value!r}, in {len(files)} rows of {among}")
    if len(problems) > LISTED_DUPLICATES:
        more = f"{store.url}: {len(problems) - LISTED_DUPLICATES} more ids are duplicated"
        problems = [*problems[:LISTED_DUPLICATES], more]
    return problems


def find_duplicates(read: Callable[[], Iterable[tuple[str, Sequence[Any]]]]) -> dict[Any, list[str]]:
    """Return each id of more than one row, with the place of each row.

    The first scan keeps 8 bytes a row: the sorted hashes of the ids, by this process's `hash`. Only if two hashes are
    equal, a second scan keeps the ids with those hashes.

    Args:
        read: Starts one scan and yields (where, ids) blocks. It is called once or twice and must yield the same.

    >>> find_duplicates(lambda: [("part-0", ["a", "b"]), ("part-1", ["c", "a"])])
    {'a': ['part-0', 'part-1']}
    """
    blocks = [np.fromiter(map(hash, ids), np.int64, len(ids)) for _, ids in read()]
    hashes = np.concatenate([np.empty(0, np.int64), *blocks])
    del blocks
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return {}
    rows: defaultdict[Any, list[str]] = defaultdict(list)
    for where, ids in read():
        for value in ids:
            if hash(value) in suspects:
                rows[value].append(where)
    return {value: places for value, places in rows.items() if len(places) > 1}

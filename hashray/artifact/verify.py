"""What an artifact is, and proof that it is whole: every byte, every row count, every id once."""

from __future__ import annotations

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hashray.artifact.bitmap import Bitmap
from hashray.artifact.journal import Journal
from hashray.artifact.manifest import QUARANTINE, FileRecord, audit, from_bytes, plain_name
from hashray.artifact.publish import MANIFEST, check, missing, read_file, with_files, wrong_sizes
from hashray.artifact.tables import iterate_columns
from hashray.artifact.versions import load_manifest, newest_version, version_key
from hashray.errors import CorruptArtifact, InputError, MismatchError
from hashray.progress import Bar
from hashray.storage import Store, join, open_store
from hashray.storage.cache import cache_folder

CHECK_THREADS = 4
LISTED_DUPLICATES = 5
WHOLE_BYTES = 8 << 20  # a file up to here is held by the thread that checks it
MOST_HASHES = 16 << 20  # in memory at a time: 128 MiB
HALVED_AT_ONCE = 1 << 20
MOST_PARTS = 1 << 10
IDS_AT_ONCE = 1 << 16


def describe(url: str | Path | Store) -> dict[str, Any]:
    """Return an artifact's kind, parents, size, and whether all files are there in the right size."""
    store = url if isinstance(url, Store) else open_store(url)
    manifest = load_manifest(store)
    problems = list(wrong_sizes(store, manifest.stored).values())
    summary: dict[str, Any] = {"url": store.url, "kind": manifest.kind, "id": manifest.id}
    if not store.exists(MANIFEST):
        summary["version"] = newest_version(store)[0]
    fields = manifest.model_dump(mode="json", exclude={"kind", "files", "table"})
    size_bytes = sum(record.bytes for record in manifest.files)
    counts = {"rows": manifest.rows_out, "files": len(manifest.files), "bytes": size_bytes}
    return {**summary, **fields, **counts, "whole": not problems, "problems": problems}


def verify(url: str | Path | Store) -> list[str]:
    """Check every byte, every row count and the uniqueness of ids; return the problems, [] when whole.

    Raises:
        InputError: there is nothing at all under this url.
    """
    store = url if isinstance(url, Store) else open_store(url)
    problems, older = list[str](), list[FileRecord]()
    try:
        manifest = load_manifest(store)
        if not store.exists(MANIFEST):
            problems, older = _verify_versions(store)
    except CorruptArtifact as error:
        return [str(error)]
    except InputError as error:
        if next(store.list(), None) is None:
            raise
        return [str(error), *_verify_versions(store)[0]]
    problems += [f"{join(store.url, MANIFEST)}: {fault}" for fault in audit(manifest)]
    newest = {record.name: record for record in manifest.stored}
    journal = Journal(cache_folder(), store.url, manifest.id)
    records = [*newest.values(), *(record for record in older if record.name not in newest)]
    checked = _check_files(store, records, journal)
    problems += [file.fault for file in checked if file.fault is not None]
    problems += [file.rows_fault for file in checked if file.rows_fault is not None]
    sound = [file.record for file in checked if file.fault is None and file.record.name in newest]
    names = {None, *(record.name for record in sound)}
    tables = [file.record for file in checked if file.has_ids and file.record.name in names]
    tables = [record for record in tables if record.info.get("deleted") in names]
    problems += _duplicate_ids(store, tables, sound)
    journal.end()
    return [*dict.fromkeys(problems)]


@dataclass(frozen=True)
class _Checked:
    """A file: what is wrong with its bytes, or with its number of rows; whether it is a table whose ids are unique."""

    record: FileRecord
    fault: str | None = None
    rows_fault: str | None = None
    has_ids: bool = False


def _check_files(store: Store, records: Sequence[FileRecord], journal: Journal) -> list[_Checked]:
    wrong = wrong_sizes(store, records)

    def look(record: FileRecord) -> _Checked:
        if record.name in wrong:
            return _Checked(record, wrong[record.name])
        key = f"{record.name} {record.sha256}"
        if (has_ids := journal.known.get(key)) is not None:
            return _Checked(record, has_ids=has_ids)
        file = _check_file(store, record)
        if record.bytes > WHOLE_BYTES and file.fault is None and file.rows_fault is None:
            journal.add(key, file.has_ids)
        return file

    size_bytes, checked = sum(record.bytes for record in records), list[_Checked]()
    with Bar("verify", size_bytes, "bytes") as bar, ThreadPoolExecutor(CHECK_THREADS) as pool:
        for file in pool.map(look, records):
            checked.append(file)
            bar.add(file.record.bytes)
    return checked


def _check_file(store: Store, record: FileRecord) -> _Checked:
    """Check every byte and the rows; a small file is read once, of a large one the footer is read again."""
    name, whole = join(store.url, record.name), None
    try:
        if record.bytes <= WHOLE_BYTES:
            whole = read_file(store, record)
        else:
            with store.open(record.name) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed: no readinto
            check(store, record, record.bytes, sha256)
        if record.name.endswith(".arrow"):
            counts = [(len(batch), "id" in batch.schema.names) for batch in _arrow_batches(store, record.name)]
            rows, has_ids = sum(count for count, _ in counts), any(ids for _, ids in counts)
            return _Checked(record, rows_fault=_rows_fault(name, record, rows), has_ids=has_ids)
        if not record.name.endswith(".parquet"):
            return _Checked(record)
        with store.open(record.name, ranged=True) if whole is None else io.BytesIO(whole) as file:
            footer = pq.ParquetFile(file)
            rows, has_ids = footer.metadata.num_rows, "id" in footer.schema_arrow.names
    except InputError:
        return _Checked(record, missing(store, record))
    except CorruptArtifact as error:
        return _Checked(record, str(error))
    except pa.ArrowInvalid as error:
        kind = "Arrow" if record.name.endswith(".arrow") else "Parquet"
        return _Checked(record, rows_fault=f"{name} is no {kind} file: {error}")
    has_ids = has_ids and plain_name(record.name) != QUARANTINE
    return _Checked(record, rows_fault=_rows_fault(name, record, rows), has_ids=has_ids)


def _rows_fault(name: str, record: FileRecord, rows: int) -> str | None:
    same = record.rows is None or rows == record.rows
    return None if same else f"{name}: holds {rows} rows, its manifest says {record.rows}"


def _verify_versions(store: Store) -> tuple[list[str], list[FileRecord]]:
    """Check every version up to the highest in a listing: a lost one would hide all that follow.

    Returns:
        The problems, and the files of all versions that garbage collection has kept, each once.
    """
    listed = [int(key[9:-5]) for key, _ in store.list("versions/") if re.fullmatch(r"versions/\d{8}\.json", key)]
    problems, files, oldest = list[str](), dict[str, FileRecord](), 1
    for number in range(max(listed, default=0), 0, -1):
        name = version_key(number)
        try:
            manifest = from_bytes(store.read(name), join(store.url, name))
            oldest = max(oldest, int(manifest.info.get("oldest_kept", 1)))
            if number >= oldest:
                files |= {record.name: record for record in with_files(store, manifest).stored}
        except InputError:
            problems.append(f"{join(store.url, name)} is missing: later versions are there")
        except (CorruptArtifact, MismatchError) as error:
            problems.append(str(error))
    return problems[::-1], [*files.values()]


def _arrow_batches(store: Store, name: str) -> Iterator[pa.RecordBatch]:
    with pa.ipc.open_file(store.open(name)) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _living_ids(store: Store, record: FileRecord, by_name: Mapping[str, FileRecord]) -> Iterator[tuple[str, list[Any]]]:
    """The ids of a shard in blocks, without those of its deleted rows."""
    deleted = by_name.get(record.info.get("deleted", ""))
    dead = None
    if deleted is not None:
        dead = Bitmap.from_bytes(read_file(store, deleted), record.rows or 0, deleted.rows or 0, deleted.name)
    first = 0
    for batch in _arrow_batches(store, record.name):
        for start in range(0, len(batch), IDS_AT_ONCE):
            ids = batch.column("id").slice(start, IDS_AT_ONCE)
            places = np.arange(first + start, first + start + len(ids))
            yield record.name, (ids if dead is None else ids.filter(pa.array(~dead.contains(places)))).to_pylist()
        first += len(batch)


def _duplicate_ids(store: Store, tables: Sequence[FileRecord], others: Sequence[FileRecord]) -> list[str]:
    by_name = {record.name: record for record in others}

    def read() -> Iterator[tuple[str, list[Any]]]:
        for record in tables:
            if record.name.endswith(".arrow"):
                yield from _living_ids(store, record, by_name)
                continue
            for table in iterate_columns(store, record.model_copy(update={"rows": None}), ["id"]):
                for batch in table.to_batches():
                    yield record.name, batch.column(0).to_pylist()

    problems = []
    for value, files in find_duplicates(read).items():
        among = ", ".join(sorted(set(files)))
        problems.append(f"{join(store.url, files[-1])}: duplicate id {value!r}, in {len(files)} rows of {among}")
    if len(problems) > LISTED_DUPLICATES:
        more = f"{store.url}: {len(problems) - LISTED_DUPLICATES} more ids are duplicated"
        problems = [*problems[:LISTED_DUPLICATES], more]
    return problems


def find_duplicates(
    read: Callable[[], Iterable[tuple[str, Sequence[Any]]]], most_hashes: int = MOST_HASHES
) -> dict[Any, list[str]]:
    """Return each id of more than one row, with the place of each row.

    A scan keeps 8 bytes a row: the hashes of the ids, by this process's `hash`. Above `most_hashes` rows it keeps those
    of one half, quarter … of all hashes, and a scan follows for each of the others. Only if two hashes are equal, one
    more scan keeps the ids with those hashes.

    Args:
        read: Starts one scan and yields (where, ids) blocks. It is called again and again and must yield the same.

    >>> find_duplicates(lambda: [("part-0", ["a", "b"]), ("part-1", ["c", "a"])])
    {'a': ['part-0', 'part-1']}
    """
    parts, part, suspects = 1, 0, set[int]()
    kept = np.empty(most_hashes + most_hashes // 8 + 1, np.int64)  # not all parts of the hashes are equally large
    while part < parts:
        count = 0
        for _, ids in read():
            hashes = _in_part(np.fromiter(map(hash, ids), np.int64, len(ids)), part, parts)
            while part == 0 and count + len(hashes) > most_hashes and parts < MOST_PARTS:
                parts *= 2
                hashes, before, count = _in_part(hashes, 0, parts), count, 0
                for start in range(0, before, HALVED_AT_ONCE):
                    block = _in_part(kept[start : min(before, start + HALVED_AT_ONCE)], 0, parts)
                    kept[count : count + len(block)] = block
                    count += len(block)
            if count + len(hashes) > len(kept):  # very many equal ids
                kept = np.concatenate([kept[:count], np.empty(count + len(hashes), np.int64)])
            kept[count : count + len(hashes)] = hashes
            count += len(hashes)
        ordered = kept[:count]
        ordered.sort()
        suspects.update(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        part += 1
    if not suspects:
        return {}
    rows: defaultdict[Any, list[str]] = defaultdict(list)
    for where, ids in read():
        for value in ids:
            if hash(value) in suspects:
                rows[value].append(where)
    return {value: places for value, places in rows.items() if len(places) > 1}


def _in_part(hashes: NDArray[np.int64], part: int, parts: int) -> NDArray[np.int64]:
    """The hashes of one of `parts` (a power of two) equal parts of all."""
    return hashes if parts == 1 else hashes[(hashes & (parts - 1)) == part]

"""A manifest: its fields, its one serialisation, and the counts that must add up. Knows no store.

The stored bytes are the canonical JSON of `Manifest` plus its own "id", the sha256 of that JSON: a
changed byte anywhere in the file is found on reading. The JSON of many files names only their table
(files.py), whose sha256 stands for them all.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import to_jsonable_python

from hashray.errors import CorruptArtifact, MismatchError
from hashray.storage.base import check_key

FORMAT_VERSION = 2
FROM_JSON: dict[str, Any] = {"from": "JSON"}  # the context of a validation of what JSON gave back
ID_LINE = re.compile(rb'^  "id": "([0-9a-f]{64})",\n', re.M)
QUARANTINE = "quarantine.parquet"


def canonical(data: Any) -> bytes:
    r"""Serialise to the one JSON text of `data`: sorted keys, two spaces, a newline at the end, no NaN.

    >>> canonical({"b": (1, 2.5), "a": None})
    b'{\n  "a": null,\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    """
    # There and back first: integer keys become text, and text sorts differently.
    plain = json.loads(json.dumps(data, allow_nan=False))
    return (json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(data: dict[str, Any], validation: ValidationInfo) -> dict[str, Any]:
    """As JSON gives it back, sorted. Not by `canonical`: with an indent, Python's encoder is 20 times as slow."""
    if not data or validation.context is FROM_JSON:
        return data
    plain = json.loads(json.dumps(to_jsonable_python(data, inf_nan_mode="constants"), allow_nan=False))
    return json.loads(json.dumps(plain, sort_keys=True))


Plain = Annotated[dict[str, Any], AfterValidator(_plain)]


class FileRecord(BaseModel):
    """One file of an artifact. `name` is its key, `bytes` its size, `rows` what it holds where that means something."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(check_key)]
    bytes: int
    sha256: str
    rows: int | None = None
    info: Plain = {}


class Manifest(BaseModel):
    """A finished artifact. `parents` holds the manifest ids of its inputs, by kind.

    `files` are all files of the stage. `table` is the record of the file that holds their records where they are too
    many for the JSON: `publish` writes it and sets it. `tables` are those of an index's version (deltas.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    kind: Literal["corpus", "features", "model", "pseudo-labels", "sweep", "codes", "index", "evaluation", "duplicates"]
    project_version: str
    config: Plain
    parents: dict[str, str]
    columns: dict[str, str] = {}
    bit_order: str | None = None
    fingerprint: str | None = None
    rows_in: int | None = None
    rows_out: int | None = None
    rows_quarantined: int | None = None
    files: tuple[FileRecord, ...]
    table: FileRecord | None = None
    tables: tuple[FileRecord, ...] = ()
    info: Plain = {}

    @cached_property
    def id(self) -> str:
        """The sha256 of the canonical JSON: equal artifacts have equal ids."""
        return sha256_hex(canonical(_fields(self)))

    @property
    def stored(self) -> tuple[FileRecord, ...]:
        """Every file that the artifact needs beside its manifest: `files`, and their tables."""
        return (*self.files, *self.tables, *([self.table] if self.table else []))

    def record(self, name: str) -> FileRecord:
        """Return the record of the file `name`, or of the one `named` after it; CorruptArtifact when there is none."""
        record = self._records.get(name)
        if record is None:
            raise CorruptArtifact(f"the manifest of this {self.kind} lists no file {name!r}")
        return record

    @cached_property
    def _records(self) -> dict[str, FileRecord]:
        """The files by name and by plain name; the first of each."""
        records: dict[str, FileRecord] = {}
        for record in self.files:
            records.setdefault(record.name, record)
            records.setdefault(plain_name(record.name), record)
        return records

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Manifest:
        """Return a copy with other fields; what was computed of the old ones is left behind."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("id", "_records"):
            copy.__dict__.pop(name, None)
        return copy


def named(name: str, sha256: str) -> str:
    """A name that no other content has: two runs into one folder never write over each other's files.

    >>> named("figures/scores.png", sha256_hex(b"x"))
    'figures/scores-2d711642b726.png'
    """
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{sha256[:12]}{dot}{ending}"


def plain_name(name: str) -> str:
    """The name that `named` was given; any other name as it is.

    >>> plain_name("figures/scores-2d711642b726.png"), plain_name("rows/part-00000-2d711642.parquet")
    ('figures/scores.png', 'rows/part-00000-2d711642.parquet')
    """
    return re.sub(r"-[0-9a-f]{12}(\.[^./]+)$", r"\1", name)


def sha256_hex(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _fields(manifest: Manifest) -> dict[str, Any]:
    """What is stored: without the files where they have a table, without the tables where there are none."""
    absent = {name for name in ("table", "tables") if not getattr(manifest, name)}
    return manifest.model_dump(mode="json", exclude=absent if len(absent) == 2 else {*absent, "files"})


def to_bytes(manifest: Manifest) -> bytes:
    """Return the bytes that are stored."""
    return canonical({**_fields(manifest), "id": manifest.id})


def from_bytes(data: bytes, name: str) -> Manifest:
    """Parse the bytes of `to_bytes`; `name` is for the texts of errors. Of many files only `table` is known then.

    Raises:
        CorruptArtifact: a byte is not what it was.
        MismatchError: a newer or an older hashray wrote it, in another format.
    """
    corrupt = CorruptArtifact(
        f"{name} is corrupt: its bytes are not what was published (the id inside does not match them); "
        "restore it from a copy, or delete the artifact and run the stage again"
    )
    # What the id is of: the text without its line, of which there is one. No line begins so inside a text or a table.
    pieces = ID_LINE.split(data)
    if len(pieces) != 3 or sha256_hex(pieces[0] + pieces[2]) != pieces[1].decode():
        raise corrupt
    try:
        fields = json.loads(pieces[0] + pieces[2])
    except (ValueError, RecursionError) as error:
        raise corrupt from error
    # Only now: a flipped digit of the version is damage, not a newer hashray.
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise MismatchError(
            f"{name} was written by a newer hashray ({fields.get('project_version')}, format {version}; this one "
            f"reads up to {FORMAT_VERSION}); upgrade hashray"
        )
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise MismatchError(
            f"{name} was written by an older hashray ({fields.get('project_version')}, format {version}; this one "
            f"reads format {FORMAT_VERSION}). Run the stage that made it again, into another folder"
        )
    try:
        fields = {"files": (), **fields} if "table" in fields or "tables" in fields else fields
        manifest = Manifest.model_validate(fields, context=FROM_JSON)
    except ValidationError as error:
        raise CorruptArtifact(f"{name} is no manifest of hashray's: {error}") from error
    manifest.__dict__["id"] = pieces[1].decode()  # verified above; computing it again would take as long as the rest
    return manifest


def audit(manifest: Manifest) -> list[str]:
    """Return the faults: rows in, out and in quarantine, rows of the files, names of files."""
    faults = []
    rows_in, rows_out, bad = manifest.rows_in, manifest.rows_out, manifest.rows_quarantined
    if rows_in is not None and rows_out is not None and bad is not None and rows_in != rows_out + bad:
        faults.append(f"{rows_in} rows came in, but {rows_out} went out and {bad} to quarantine")
    folders: dict[str, dict[str, int | None]] = {}
    for record in manifest.files:
        folder, _, name = record.name.rpartition("/")
        if name.startswith("part-"):
            folders.setdefault(folder, {})[name] = record.rows
    for folder, parts in folders.items():
        counted = [rows for rows in parts.values() if rows is not None]
        if rows_out is not None and counted and len(counted) == len(parts) and sum(counted) != rows_out:
            faults.append(
                f"the part files{f' of {folder}/' if folder else ''} hold {sum(counted)} rows, rows_out is {rows_out}"
            )
    if any(parts != next(iter(folders.values())) for parts in folders.values()):
        faults.append(f"the parts of {' and '.join(f'{folder}/' for folder in folders)} are not aligned")
    for record in manifest.files:
        if plain_name(record.name) == QUARANTINE and None not in (record.rows, bad) and record.rows != bad:
            faults.append(f"{QUARANTINE} holds {record.rows} rows, rows_quarantined is {bad}")
    twice = [name for name, count in Counter(record.name for record in manifest.files).items() if count > 1]
    if twice:
        faults.append(f"files listed twice: {', '.join(twice)}")
    return faults

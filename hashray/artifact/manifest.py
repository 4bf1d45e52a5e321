"""A manifest: its fields, its one serialisation, and the counts that must add up. Knows no store.

The stored bytes are the canonical JSON of `Manifest` plus its own "id", the sha256 of that JSON: a
changed byte anywhere in the file is found on reading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from hashray.errors import CorruptArtifact, MismatchError
from hashray.storage.base import check_key

FORMAT_VERSION = 2
QUARANTINE = "quarantine.parquet"


def canonical(data: Any) -> bytes:
    r"""Serialise to the one JSON text of `data`: sorted keys, two spaces, a newline at the end, no NaN.

    >>> canonical({"b": (1, 2.5), "a": None})
    b'{\n  "a": null,\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    """
    # There and back first: integer keys become text, and text sorts differently.
    plain = json.loads(json.dumps(data, allow_nan=False))
    return (json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    return json.loads(canonical(to_jsonable_python(data, inf_nan_mode="constants")))


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
    """A finished artifact. `parents` holds the manifest ids of its inputs, by kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    kind: Literal["corpus", "features", "model", "pseudo-labels", "sweep", "codes", "index", "evaluation"]
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
    info: Plain = {}

    @property
    def id(self) -> str:
        """The sha256 of the canonical JSON: equal artifacts have equal ids."""
        return sha256_hex(canonical(self.model_dump(mode="json")))

    def record(self, name: str) -> FileRecord:
        """Return the record of the file `name`, or of the one `named` after it; CorruptArtifact when there is none."""
        for record in self.files:
            if name in (record.name, plain_name(record.name)):
                return record
        raise CorruptArtifact(f"the manifest of this {self.kind} lists no file {name!r}")


def named(name: str, data: bytes) -> str:
    """A name that no other content has: two runs into one folder never write over each other's files.

    >>> named("figures/scores.png", b"x")
    'figures/scores-2d711642b726.png'
    """
    stem, dot, ending = name.rpartition(".")
    return f"{stem}-{sha256_hex(data)[:12]}{dot}{ending}"


def plain_name(name: str) -> str:
    """The name that `named` was given; any other name as it is.

    >>> plain_name("figures/scores-2d711642b726.png"), plain_name("rows/part-00000-2d711642.parquet")
    ('figures/scores.png', 'rows/part-00000-2d711642.parquet')
    """
    return re.sub(r"-[0-9a-f]{12}(\.[^./]+)$", r"\1", name)


def sha256_hex(data: bytes) -> str:
    """Return the sha256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def to_bytes(manifest: Manifest) -> bytes:
    """Return the bytes that are stored."""
    return canonical({**manifest.model_dump(mode="json"), "id": manifest.id})


def from_bytes(data: bytes, name: str) -> Manifest:
    """Parse the bytes of `to_bytes`; `name` is for the texts of errors.

    Raises:
        CorruptArtifact: a byte is not what it was.
        MismatchError: a newer or an older hashray wrote it, in another format.
    """
    corrupt = CorruptArtifact(
        f"{name} is corrupt: its bytes are not what was published (the id inside does not match them); "
        "restore it from a copy, or delete the artifact and run the stage again"
    )
    try:
        fields = json.loads(data)
        identity = fields.pop("id")
        if canonical({**fields, "id": identity}) != data or sha256_hex(canonical(fields)) != identity:
            raise corrupt
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise CorruptArtifact(f"{name} is no manifest of hashray's: {error}") from error
    if to_bytes(manifest) != data:
        raise corrupt
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

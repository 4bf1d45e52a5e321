"""A version of an index: its shards as the records of their files, and its manifest. No Ray.

Files are named by their content: `shards/<sha256>.faiss`. After the garbage collection that is version 12, files that
writers of later versions write are named `shards/<sha256>-g12.faiss`: no name that it deletes is ever written again,
so it cannot take a file from a version that comes while it still deletes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from hashray import __version__
from hashray.artifact import FileRecord, Manifest, sha256_hex
from hashray.artifact.deltas import add_changes, changes
from hashray.artifact.publish import read_records
from hashray.codes import BIT_ORDER
from hashray.errors import MismatchError
from hashray.storage import Store

Folder = Literal["shards", "ids", "attributes", "deleted", "quantizers", "tables"]
SUFFIXES: dict[Folder, str] = {
    "shards": "faiss", "ids": "arrow", "attributes": "arrow", "deleted": "bin", "quantizers": "faiss",
    "tables": "parquet",
}  # fmt: skip
NAME = re.compile(r"(\w+)/[0-9a-f]{64}(?:-g(\d+))?\.\w+")


class ShardRecord(BaseModel):
    """One shard of a version: its files, its rows, its first and last id.

    `files` are codes, ids and, where there are any, attributes; `deleted` holds the positions of deleted rows.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    first: str
    last: str
    codes: FileRecord
    ids: FileRecord
    attributes: FileRecord | None = None
    deleted: FileRecord | None = None

    @property
    def living(self) -> int:
        """Rows that are not deleted."""
        return self.rows - (self.deleted.rows or 0 if self.deleted else 0)

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """All its files; what belongs together stands in the info of the file of ids."""
        info = {
            "codes": self.codes.name, "first": self.first, "last": self.last,
            "attributes": self.attributes and self.attributes.name, "deleted": self.deleted and self.deleted.name,
        }  # fmt: skip
        ids = self.ids.model_copy(update={"info": {name: value for name, value in info.items() if value is not None}})
        return tuple(file for file in (self.codes, ids, self.attributes, self.deleted) if file is not None)


def file_name(folder: Folder, sha256: str, generation: int = 0) -> str:
    """The name of a file of an index by its content; `generation` is the last garbage collection's version, or 0.

    >>> file_name("ids", "ab", 12)
    'ids/ab-g12.arrow'
    """
    return f"{folder}/{sha256}{f'-g{generation}' if generation else ''}.{SUFFIXES[folder]}"


def generation_of(name: str) -> int | None:
    """The generation in the name of a file of an index; None where it is no such name.

    >>> generation_of(f"ids/{'a' * 64}-g12.arrow"), generation_of(f"ids/{'a' * 64}.arrow"), generation_of("x/y")
    (12, 0, None)
    """
    parts = NAME.fullmatch(name)
    return int(parts[2] or 0) if parts and parts[1] in SUFFIXES else None


def shards_of(manifest: Manifest) -> list[ShardRecord]:
    """The shards of a version, in ascending order of their first ids.

    Raises:
        MismatchError: an older hashray wrote it.
    """
    if "shards" in manifest.info or "num_bits" not in manifest.info:
        raise MismatchError(
            "this index was built by an older hashray; run `hashray index build` again, into another folder"
        )
    shards = []
    for ids in manifest.files:
        if ids.name.startswith("ids/"):
            named = {name: manifest.record(ids.info[name]) for name in ("codes", "attributes", "deleted")
                     if name in ids.info}  # fmt: skip
            first, last = ids.info["first"], ids.info["last"]
            shards.append(
                ShardRecord(
                    rows=ids.rows or 0, first=first, last=last, ids=ids.model_copy(update={"info": {}}), **named
                )
            )
    return sorted(shards, key=lambda shard: (shard.first, shard.ids.name))


def generation(manifest: Manifest) -> int:
    """The last garbage collection before, or of, this version: its version's number, 0 where there was none."""
    return int(manifest.info.get("generation", 0))


def oldest_kept(manifest: Manifest) -> int:
    """The first version whose files the last garbage collection kept."""
    return int(manifest.info.get("oldest_kept", 1))


def index_manifest(
    num_bits: int,
    shards: Sequence[ShardRecord],
    kind: str = "flat",
    config: Mapping[str, Any] | None = None,
    quantizer: FileRecord | None = None,
    info: Mapping[str, Any] | None = None,
    codes: Manifest | None = None,
    fingerprint: str | None = None,
) -> Manifest:
    """Return the manifest of an index with these shards; `write_tables` and `publish` write it.

    Args:
        quantizer: the file of the quantizer that all shards share, for "ivf".
        info: more to say in `info`, nprobe for one.
        codes: the codes it was built from: they name the model.
        fingerprint: of the model, where there are no such codes.
    """
    facts = {"num_bits": num_bits, "kind": kind, "nprobe": None, "quantizer": quantizer and quantizer.name}
    parents = codes.parents if codes else {}
    manifest = Manifest(
        kind="index",
        project_version=__version__,
        config=dict(config or {}),
        parents=({"codes": codes.id} if codes else {}) | {k: v for k, v in parents.items() if k == "model"},
        columns={"id": "string", "code": f"fixed_size_binary[{num_bits // 8}]"},
        bit_order=BIT_ORDER,
        fingerprint=codes.fingerprint if codes else fingerprint,
        rows_quarantined=0,
        files=() if quantizer is None else (quantizer,),
        info={**facts, **dict(info or {})},
    )
    return with_shards(manifest, shards, {})


def with_shards(manifest: Manifest, shards: Sequence[ShardRecord], info: Mapping[str, Any]) -> Manifest:
    """The manifest with other shards, in any order, and with more or other `info`."""
    shards = sorted(shards, key=lambda shard: (shard.first, shard.ids.name))  # whichever task wrote one first
    quantizer = [file for file in manifest.files if file.name == manifest.info["quantizer"]]
    # Two shards whose codes are equal, row by row, share one file.
    files = {file.name: file for file in (*quantizer, *(file for shard in shards for file in shard.files))}
    rows = sum(shard.living for shard in shards)
    update = {"files": tuple(files.values()), "rows_in": rows, "rows_out": rows, "info": {**manifest.info, **info}}
    return manifest.model_copy(update=update)


def write_tables(store: Store, manifest: Manifest, before: Manifest | None) -> Manifest:
    """Write the tables of a version's files, of which those of the version before are used again."""

    def write(data: bytes, rows: int) -> FileRecord:
        return write_content(store, "tables", data, rows, generation(manifest))

    old, tables = (before.files, before.tables) if before else ((), ())
    tables = add_changes(tables, changes(old, manifest.files), lambda table: read_records(store, table), write)
    return manifest.model_copy(update={"tables": tables})


def write_content(store: Store, folder: Folder, data: Any, rows: int | None, after: int = 0) -> FileRecord:
    """Write a file under the name of its content; `after` is the generation."""
    sha256 = sha256_hex(data)
    name = file_name(folder, sha256, after)
    store.write(name, data)
    return FileRecord(name=name, bytes=len(data), sha256=sha256, rows=rows)

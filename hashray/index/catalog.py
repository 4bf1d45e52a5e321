"""An index that changes: `open_catalog(url)` appends, deletes, compacts, rolls back and collects garbage. No Ray.

Each change is one new version (log.py), whole or not there at all. Nothing that is published is ever written again, so
a reader of any version is not disturbed. `hashray index …` (edit.py) runs the same changes, large ones as Ray tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hashray import artifact
from hashray.artifact import sha256_hex, version_key
from hashray.codes import Codes, as_codes, check_num_bits
from hashray.errors import AlreadyExists, ConfigError, InputError, MismatchError
from hashray.index import compact, garbage
from hashray.index.attributes import as_attributes
from hashray.index.ids import check_unique, one_array
from hashray.index.log import Change, Version, carried, commit, history, newest, read_version, require_kept
from hashray.index.rows import Places, check_living, require_joining, with_deleted
from hashray.index.shard import ROWS_PER_SHARD, write_sorted
from hashray.index.version import ShardRecord, index_manifest, write_tables
from hashray.storage import Store, check_conditional_put, open_store
from hashray.storage.cache import cache_folder

GRACE_S = 7 * 86_400.0
KEEP = 10


class Catalog:
    """The versions of an index, and the changes that make new ones. Safe to use from several processes at once."""

    def __init__(self, store: Store, cache: Path) -> None:
        """Take the store of an index that is there; `cache` keeps files of a store on S3."""
        self.store, self.cache = store, cache

    def __repr__(self) -> str:
        return f"Catalog({self.store.url!r})"

    @property
    def version(self) -> int:
        """The number of the newest version."""
        return newest(self.store).number

    def versions(self) -> list[dict[str, Any]]:
        """Every version, oldest first: number, operation, rows, added, deleted, and whether its files are kept."""
        return history(self.store)

    def append(
        self,
        ids: Sequence[str] | pa.Array,
        codes: Codes,
        attributes: pa.Table | Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> int:
        """Add rows; return the number of the version that has them.

        Args:
            ids: text [n], each once.
            codes: packed codes uint8 [n, num_bits // 8]; of `model.encode`, they must be of the index's model.
            attributes: columns of n values: a table, or arrays by name. `where` of a search is about these.
            replace: rows with ids that are there already take their place; unset, they are an error.

        Raises:
            InputError: an id twice, or there already. MismatchError: codes of another width or of another model.
        """
        names = as_ids(ids)
        matrix = as_codes(codes)
        if len(names) != len(matrix):
            raise InputError(f"{len(names):,} ids for {len(matrix):,} codes: each code needs one id")
        table = as_attributes(attributes, len(names))
        check_fits(newest(self.store), matrix.shape[1] * 8, getattr(codes, "fingerprint", None))
        order = pc.sort_indices(names)
        names, matrix = names.take(order), matrix[order.to_numpy()]
        check_unique(names)  # here: two equal ids may be the last of a shard and the first of the next
        table = None if table is None else table.take(order)
        content = [sha256_hex(matrix), *_digests(names)]
        arguments = {"content": content, "replace": replace, "attributes": None if table is None else _digest(table)}

        def write(head: Version) -> list[ShardRecord]:
            quantizer = quantizer_bytes(self.store, head)
            kind, after = head.manifest.info["kind"], head.generation
            pieces = max(1, -(-len(names) // ROWS_PER_SHARD))
            cuts = [len(names) * i // pieces for i in range(pieces + 1)]
            return [
                write_sorted(
                    self.store, names[a:b], matrix[a:b], kind, quantizer, None if table is None else table[a:b], after
                )
                for a, b in pairwise(cuts)
            ]

        return self.append_shards(write, [names], arguments, replace) if len(names) else newest(self.store).number

    def append_shards(
        self,
        write: Callable[[Version], Sequence[ShardRecord]],
        names: Iterable[pa.Array],
        arguments: Mapping[str, Any],
        replace: bool = False,
        said: Mapping[str, Any] | None = None,
    ) -> int:
        """Add shards that `write` writes, whose ids are the ascending arrays `names`; the rest as `append`.

        Args:
            said: more to say of the change, in its version.
        """
        written: list[ShardRecord] = []
        names, places = list(names), Places(self.store, self.cache)

        def change(head: Version) -> Change:
            old, gone = places.look(head.shards, names, "refuse" if not replace else "delete")
            written[:] = carried(self.store, written or write(head), head.generation)
            require_joining(self.store, head.shards, written, self.cache)
            kept = with_deleted(self.store, old, head.generation) if replace else list(head.shards)
            added = sum(shard.rows for shard in written)
            return Change([*kept, *written], added=added, deleted=gone, said=said or {})

        return commit(self.store, "append", arguments, change)

    def delete(self, ids: Iterable[str] | pa.Array, missing_ok: bool = False) -> int:
        """Delete rows by id; return the number of the version without them. Their ids can be appended again.

        Args:
            ids: text; an id twice counts once.
            missing_ok: ids that are not there are skipped; unset, they are an error and nothing is deleted.

        Raises:
            InputError: an id is not there.
        """
        names = as_ids(ids).unique()
        names = names.take(pc.sort_indices(names))
        places = Places(self.store, self.cache)

        def change(head: Version) -> Change | None:
            marked, gone = places.look(head.shards, [names], "delete")
            if gone < len(names) and not missing_ok:
                check_living(places, head, names)
            if not gone:
                return None
            return Change(with_deleted(self.store, marked, head.generation), deleted=gone)

        return (
            commit(self.store, "delete", {"content": _digests(names), "missing_ok": missing_ok}, change)
            if len(names)
            else self.version
        )

    def compact(self, rows_per_shard: int = ROWS_PER_SHARD, most_deleted: float = compact.MOST_DELETED) -> int:
        """Join small shards and leave out deleted rows; return the number of the version, unchanged if none needs it.

        Args:
            rows_per_shard: the most rows of a joined shard. Memory: three times its codes and ids.
            most_deleted: the share of deleted rows from which a shard is written again.
        """
        if rows_per_shard < 1 or not 0 <= most_deleted <= 1:
            raise ConfigError(
                f"rows_per_shard = {rows_per_shard} and most_deleted = {most_deleted}: 1 or more, and 0 to 1"
            )
        return compact.compact(self.store, self.cache, rows_per_shard, most_deleted)

    def rollback(self, version: int) -> int:
        """Make an old version's rows the newest version; return its number. No version is removed.

        Raises:
            InputError: no such version is there, or garbage collection has removed its files.
        """
        old = read_version(self.store, version)

        def change(head: Version) -> Change:
            require_kept(self.store, version, head)
            difference = old.rows - head.rows
            return Change(old.shards, max(0, difference), max(0, -difference), base=old.manifest, said={"to": version})

        return commit(self.store, "rollback", {"to": version}, change)

    def gc(self, keep: int = KEEP, grace_s: float = GRACE_S, dry_run: bool = False) -> int:
        """Delete the files that no kept version names; return the number of the version that says so.

        Args:
            keep: newest versions that stay readable, at least 1.
            grace_s: versions that were the newest within these seconds stay readable too, and younger files of
                writers that are not ready are left alone. A writer that takes longer fails.
            dry_run: delete nothing, publish nothing; return the newest version.
        """
        return garbage.collect(self.store, keep, grace_s, dry_run).version


def open_catalog(url: str | Path, endpoint_url: str | None = None, cache_dir: str | Path | None = None) -> Catalog:
    """Open an index for changes.

    Args:
        url: a local folder or s3://bucket/prefix.
        endpoint_url: of an S3 server other than AWS; unset: AWS_ENDPOINT_URL.
        cache_dir: where files from S3 are kept; unset: $HASHRAY_CACHE, else ~/.cache/hashray.

    Raises:
        InputError: no index is there.
    """
    store = open_store(url, endpoint_url)
    newest(store)
    return Catalog(store, cache_folder(cache_dir))


def create_index(
    url: str | Path,
    num_bits: int,
    fingerprint: str | None = None,
    endpoint_url: str | None = None,
    cache_dir: str | Path | None = None,
) -> Catalog:
    """Publish an empty flat index as version 1.

    Args:
        url: as `open_catalog`.
        num_bits: width of its codes, a multiple of 8.
        fingerprint: of the model whose codes it takes; unset: it takes codes of any model.

    Raises:
        ConfigError: `num_bits` is no multiple of 8. AlreadyExists: another artifact is there.
    """
    store = open_store(url, endpoint_url)
    require_unpublished(store)
    check_conditional_put(store)
    manifest = index_manifest(check_num_bits(num_bits), [], fingerprint=fingerprint)
    artifact.publish(store, write_tables(store, manifest, None), version_key(1))
    return Catalog(store, cache_folder(cache_dir))


def require_unpublished(store: Store) -> None:
    """Raise AlreadyExists where an artifact is published in the store."""
    for key in (artifact.MANIFEST, version_key(1)):
        if store.exists(key):
            raise AlreadyExists(f"{store.url} holds an artifact already; choose another folder for the index")


def as_ids(ids: Iterable[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids as one Arrow array of text.

    Raises:
        InputError: one of them is no text.
    """
    if isinstance(ids, str):
        raise InputError(f"ids = {ids!r}: give a list of ids, [{ids!r}] for one")
    try:
        array = one_array(ids) if isinstance(ids, pa.ChunkedArray) else ids
        array = array if isinstance(array, pa.Array) else pa.array([*ids], pa.string())
        array = array if array.type in (pa.string(), pa.large_string()) else array.cast(pa.string())
    except (pa.ArrowException, TypeError, UnicodeError) as error:
        raise InputError(f"ids are text, one for each row: {error}") from error
    if array.null_count:
        raise InputError(f"{array.null_count:,} ids are null; every row needs one")
    return pa.concat_arrays([array])


def check_fits(head: Version, num_bits: int, fingerprint: str | None) -> None:
    """Raise MismatchError where codes are of another width or of another model than the index's."""
    there = int(head.manifest.info["num_bits"])
    if num_bits != there:
        raise MismatchError(f"codes of {num_bits} bits cannot be appended to an index of {there} bits")
    model = head.manifest.fingerprint
    if fingerprint is not None and model is not None and fingerprint != model:
        raise MismatchError(
            f"codes of model {fingerprint[:12]}… cannot be appended to an index of model {model[:12]}…: their bits "
            "mean different things; encode with the model of the index, or build another index"
        )


def quantizer_bytes(store: Store, head: Version) -> bytes | None:
    """The quantizer that the ivf shards of an index share, verified; None for a flat one."""
    name = head.manifest.info.get("quantizer")
    return None if name is None else artifact.read_file(store, head.manifest.record(name))


def _digests(names: pa.Array) -> list[str]:
    return [sha256_hex(buffer) for buffer in names.buffers() if buffer is not None]


def _digest(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sha256_hex(sink.getvalue().to_pybytes())

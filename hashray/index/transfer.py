"""`hashray index import` and `hashray index export`: an index from other programs' codes, and for them. No Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from pydantic import Field

from hashray import artifact
from hashray.artifact import version_key
from hashray.codes import check_num_bits
from hashray.config import Config
from hashray.data.columns import bytes_column
from hashray.errors import InputError
from hashray.index.attributes import completed, joined_schema, merge_attributes
from hashray.index.catalog import require_unpublished
from hashray.index.exchange import Batch, BitOrder, Columns, read_batches
from hashray.index.ids import one_array
from hashray.index.log import Version, newest, read_version
from hashray.index.rows import Places, attributes_of, open_ids, read_rows
from hashray.index.shard import ROWS_PER_SHARD, write_shard
from hashray.index.version import ShardRecord, index_manifest, write_tables
from hashray.progress import Bar, say
from hashray.storage import Store, check_conditional_put, open_store, split_url
from hashray.storage.cache import cache_folder
from hashray.storage.requests import counting

ENDINGS = ("faiss", "parquet")


class ImportConfig(Config):
    """Make an index of codes that another program wrote."""

    source: Annotated[str, tyro.conf.Positional] = Field(
        description="*.faiss, *.parquet, *.npz, *.npy, *.csv (id, bits as pgvector copies them) or *.lance"
    )
    out: str = Field(description="Folder or s3:// url of the index")
    id_column: str = Field("id", description="Column of ids, of a table")
    code_column: str = Field("code", description="Column of codes, of a table: binary, lists of bytes, or 0 and 1")
    bit_order: BitOrder = Field("big", description="First bit of a byte in the source; ours is the most significant")
    model: str | None = Field(None, description="Model that made the codes; unset: the index takes any queries")


class ExportConfig(Config):
    """Write the rows of an index into one file for other programs."""

    index: Annotated[str, tyro.conf.Positional] = Field(description="Index, local folder or s3:// url")
    out: str = Field(description="File: *.parquet (id, code, attributes), or *.faiss with its ids in *.ids.parquet")
    version: int | None = Field(None, ge=1, description="Version of the index; unset: the newest")


def import_index(config: ImportConfig) -> None:
    """Write shards of the source's rows and publish them as version 1 of an index.

    Raises:
        InputError: the source cannot be read, or an id stands in two rows. AlreadyExists: `out` holds an artifact.
    """
    with counting("import"):
        store, cache = open_store(config.out), cache_folder()
        require_unpublished(store)
        check_conditional_put(store)
        shards, places = list[ShardRecord](), Places(store, cache)
        columns = Columns(config.id_column, config.code_column, config.bit_order)
        num_bits = 0
        with Bar("import", 0, "rows") as bar:
            for batch in _large(read_batches(config.source, columns)):
                width = check_num_bits(batch.codes.shape[1] * 8)
                if num_bits not in (0, width):
                    raise InputError(f"{config.source} holds codes of {num_bits} and of {width} bits")
                num_bits = width
                names = batch.ids.take(pc.sort_indices(batch.ids))
                places.look(shards, [names], "refuse")
                places = Places(store, cache)  # the next batch has other ids
                shards.append(write_shard(store, batch.ids, batch.codes, "flat", None, batch.attributes))
                bar.add(len(batch.ids))
        if not shards:
            raise InputError(f"{config.source} holds no rows: there is nothing to index")
        fingerprint = None if config.model is None else artifact.load_manifest(config.model, "model").fingerprint
        manifest = index_manifest(num_bits, shards, config={"source": config.source}, fingerprint=fingerprint)
        artifact.publish(store, write_tables(store, manifest, None), version_key(1))
        noun = "shard" if len(shards) == 1 else "shards"
        say(f"{config.out}: {manifest.rows_out:,} rows of {num_bits} bits in {len(shards)} flat {noun}, version 1")


def _large(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join batches to those of shards."""
    waiting, rows = list[Batch](), 0
    for batch in batches:
        waiting.append(batch)
        rows += len(batch.ids)
        if rows >= ROWS_PER_SHARD:
            yield _joined(waiting)
            waiting, rows = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(batches: list[Batch]) -> Batch:
    ids = one_array(pa.chunked_array([batch.ids.cast(pa.string()) for batch in batches], pa.string()))
    table = merge_attributes([batch.attributes for batch in batches], [len(batch.ids) for batch in batches])
    widths = {batch.codes.shape[1] for batch in batches}
    if len(widths) > 1:
        raise InputError(
            f"codes have {' and '.join(str(8 * width) for width in sorted(widths))} bits; expected one width"
        )
    return Batch(ids, np.concatenate([batch.codes for batch in batches]), table)


def export_index(config: ExportConfig) -> None:
    """Write the living rows of a version into a file.

    Raises:
        InputError: no index is there, or the file's ending is not known. CorruptArtifact: a file is not whole.
    """
    with counting("export"):
        ending = config.out.rpartition(".")[2]
        if ending not in ENDINGS:
            raise InputError(f"--out {config.out}: name a file *.parquet or *.faiss")
        store, cache = open_store(config.index), cache_folder()
        head = newest(store) if config.version is None else read_version(store, config.version)
        folder, name = split_url(config.out)
        target, info = open_store(folder), head.manifest.info
        with tempfile.TemporaryDirectory(prefix="hashray-export-") as work, Bar("export", head.rows, "rows") as bar:
            if ending == "parquet":
                path = Path(work, name)
                tables = [attributes_of(store, shard, cache) for shard in head.shards]
                schema = joined_schema(tables)
                _require_other_names(schema, config.index)
                _write_parquet(path, _living(store, cache, head, bar), int(info["num_bits"]), schema)
                target.upload(name, path)
            else:
                index, names = faiss.IndexBinaryFlat(int(info["num_bits"])), list[pa.Array]()
                for batch in _living(store, cache, head, bar):
                    index.add(batch.codes)
                    names.append(batch.ids.cast(pa.large_string()))
                target.write(name, faiss.serialize_index_binary(index).tobytes())
                path = Path(work, "ids.parquet")
                pq.write_table(pa.table({"id": pa.chunked_array(names, pa.large_string())}), path)
                target.upload(f"{name.removesuffix('.faiss')}.ids.parquet", path)
        say(f"{config.out}: {head.rows:,} rows of version {head.number}")


def _living(store: Store, cache: Path, head: Version, bar: Bar) -> Iterator[Batch]:
    """The living rows of a version, shard by shard."""
    info = head.manifest.info
    for record in head.shards:
        rows = read_rows(store, record, info["kind"], int(info["num_bits"]), cache)
        places, table = pa.array(rows.positions), attributes_of(store, record, cache)
        ids = open_ids(store, record, cache).array.take(places)
        yield Batch(ids, rows.codes, None if table is None else table.take(places))
        bar.add(len(ids))


def _require_other_names(attributes: pa.Schema, index: str) -> None:
    taken = [name for name in attributes.names if name in ("id", "code")]
    if taken:
        raise InputError(
            f"{index} has an attribute named {taken[0]!r}, which is a column of its own in a Parquet file: export to "
            "*.faiss, or make the index again with another name for it"
        )


def _write_parquet(path: Path, batches: Iterator[Batch], num_bits: int, attributes: pa.Schema) -> None:
    schema = pa.schema([("id", pa.large_string()), ("code", pa.binary(num_bits // 8)), *attributes])
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for batch in batches:
            columns: dict[str, Any] = {"id": batch.ids.cast(pa.large_string()), "code": bytes_column(batch.codes)}
            table = completed(batch.attributes, len(batch.ids), attributes)
            columns |= dict(zip(table.column_names, table.columns, strict=True))
            writer.write_table(pa.table(columns, schema=schema))

"""[Ray] `hashray index build`: codes -> shards -> version 1 of an index.

index/  versions/00000001.json · shards/<sha256>.faiss · ids/<sha256>.arrow · quantizers/<sha256>.faiss (ivf) ·
        tables/<sha256>.parquet (the records of these files)

A shard is a group of neighbouring code parts, sorted by id inside; the id ranges of shards may overlap (shards.py).
An id is one row of the whole index.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from hashray import artifact
from hashray.artifact import Manifest, canonical, sha256_hex, version_key
from hashray.artifact.manifest import from_bytes
from hashray.config import Config
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import refuse_other, require_free, run_stage
from hashray.errors import AuditError, InputError
from hashray.index import shard
from hashray.index.choose import Limits, parse_bytes
from hashray.index.described import describe_codes
from hashray.index.shard import NPROBE, ROWS_PER_SHARD, Kind
from hashray.index.shards import ShardBuild
from hashray.index.version import index_manifest, write_tables
from hashray.progress import say
from hashray.storage import Store, check_conditional_put, join, open_store

LIMITS = ("max_ram", "min_recall", "max_ms")  # of kind auto


class IndexConfig(Config):
    """Build an index of binary codes, searchable where it stands."""

    codes: str = Field(description="Codes, local folder or s3:// url")
    out: str = Field(description="Folder or s3:// url of the index")
    kind: Literal["auto", Kind] = Field(
        "flat", description="Kind of the shards; flat: exact; ivf: for shards above 5 million rows; auto: measure both"
    )
    max_ram: str | None = Field(None, description="For kind auto: memory of a searcher of all shards, such as 8GiB")
    min_recall: float = Field(0.99, gt=0, le=1, description="For kind auto: least distance-recall at 100")
    max_ms: float | None = Field(None, gt=0, description="For kind auto: most CPU milliseconds of a query")
    shards: int | None = Field(None, ge=1, description="Number of shards; unset: one for 5 million rows")
    nlist: int | None = Field(None, ge=1, description="Lists of an ivf shard; unset: square root of its rows")
    nprobe: int | None = Field(None, ge=1, description="Lists of an ivf shard that a query looks into; unset: 16")
    seed: int = Field(0, ge=0, description="Seed of the training rows and of k-means, for ivf")
    attributes: str | None = Field(None, description="Corpus, or Parquet or CSV file with a column id, for --where")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()

    @model_validator(mode="after")
    def _lists_are_of_ivf(self) -> IndexConfig:
        if self.kind != "ivf" and (self.nlist or self.nprobe):
            raise ValueError(f"nlist and nprobe are of kind ivf, not {self.kind}; leave them out, or use kind ivf")
        limits = [name for name in LIMITS if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind != "auto" and limits:
            raise ValueError(f"{' and '.join(limits)} are of kind auto, not {self.kind}")
        if self.max_ram is not None:
            parse_bytes(self.max_ram)
        return self


def build_index(config: IndexConfig) -> Manifest:
    """Run the stage; return the manifest of version 1. Rerun = resume.

    Raises:
        InputError: no codes there, no rows in them, or an id twice. StorageError: the store cannot publish safely.
        AlreadyExists: `out` holds an index of other codes or of another configuration.
        AuditError: the shards do not hold every row.
    """
    source, store = open_store(config.codes), open_store(config.out)
    codes = artifact.load_manifest(source, "codes")
    rows, parts = int(codes.rows_out or 0), [r for r in codes.files if r.name.startswith("parts/")]
    if not rows:
        raise InputError(f"{config.codes} holds no codes: there is nothing to index")
    # What is measured for kind auto is no part of the plan: a rerun meets the finished index, whatever the times.
    unused = () if config.kind == "auto" else LIMITS
    settings = config.model_dump(mode="json", exclude={"codes", "out", "pool", "attributes", *unused})
    described = describe_codes(config.attributes, codes, parts) if config.attributes else None
    depends_on = {"codes": codes.id, "config": settings, "format": artifact.FORMAT_VERSION}
    depends_on |= {"attributes": described.digest} if described else {}
    plan = sha256_hex(canonical(depends_on))[:16]

    if artifact.is_finished(store, version_key(2)):
        return _first_version(store, plan)

    def work() -> Manifest:
        check_conditional_put(store)
        num_shards = min(rows, config.shards or -(-rows // ROWS_PER_SHARD))
        if config.shards is not None and config.shards > rows:
            say(f"note: {rows:,} rows make {rows:,} shards at most, not {config.shards:,}")
        build = ShardBuild(
            source, store, parts, int(codes.info["num_bits"]), plan, config.kind, config.seed, config.pool, described
        )
        choice = build.choose(num_shards, _limits(config, rows, num_shards)) if config.kind == "auto" else None
        kind, nprobe = (choice.chosen.kind, choice.chosen.nprobe) if choice else (config.kind, config.nprobe)
        nlist = (choice.chosen.nlist if choice else config.nlist) or shard.default_nlist(rows // num_shards)
        nlist = 0 if kind == "flat" else nlist
        shards, quantizer = replace(build, kind=kind).run(num_shards, nlist)
        count = sum(shard.rows for shard in shards)
        if count != rows:
            raise AuditError(f"{config.codes} holds {rows:,} rows, the shards {count:,}; nothing was published")
        info: dict[str, Any] = {"plan": plan, "nlist": nlist or None, "nprobe": min(nprobe or NPROBE, nlist) or None}
        info |= {"choice": choice.model_dump(mode="json")} if choice else {}
        require_free(store, plan, key=version_key(1))
        manifest = index_manifest(build.num_bits, shards, kind, settings, quantizer, info, codes)
        manifest = artifact.publish(store, write_tables(store, manifest, None), version_key(1))
        store.clear(f"progress/{plan}/")
        noun = "shard" if len(shards) == 1 else "shards"
        say(f"{config.out}: {rows:,} rows in {len(shards)} {kind} {noun}, version 1")
        return manifest

    return run_stage(store, "index", plan, work, key=version_key(1))


def _limits(config: IndexConfig, rows: int, num_shards: int) -> Limits:
    max_ram = parse_bytes(config.max_ram) if config.max_ram else None
    return Limits(rows, num_shards, config.min_recall, max_ram, config.max_ms)


def _first_version(store: Store, plan: str) -> Manifest:
    """Version 1 of an index that has changed since, if it is this plan's: its files may be gone."""
    key = version_key(1)
    manifest = from_bytes(store.read(key), join(store.url, key))
    refuse_other(store, manifest, plan)
    say(f"{store.url} was built as version 1, and has changed since: see `hashray index versions {store.url}`")
    return manifest

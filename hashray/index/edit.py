"""[Ray] `hashray index append | delete | compact | rollback | versions | gc`: an index that changes.

Each is one change of `Catalog` (catalog.py). Building the shards of an append and joining those of a compaction are
Ray tasks; finding ids in mapped files and publishing are this process's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated

import tyro
from pydantic import Field, model_validator

from hashray import artifact
from hashray.artifact import canonical, sha256_hex
from hashray.config import Config
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.tasks import run_tasks
from hashray.errors import InputError
from hashray.index import compact as compaction
from hashray.index import garbage
from hashray.index.catalog import GRACE_S, KEEP, Catalog, check_fits, open_catalog
from hashray.index.compact import Joined, join_group
from hashray.index.described import describe_codes
from hashray.index.log import Version, change_of, newest, read_version
from hashray.index.rows import open_ids
from hashray.index.shard import ROWS_PER_SHARD
from hashray.index.shards import SHORT_ROWS, ShardBuild
from hashray.index.version import ShardRecord
from hashray.progress import Bar, say, show_table
from hashray.storage import Store, open_store, read_url
from hashray.storage.cache import cache_folder
from hashray.storage.requests import counting

HOUR_S = 3600.0
TEXT_ENDINGS = (".txt", ".csv", ".list", ".ids")
LOOK_BACK = 20  # versions in which a rerun of an append looks for its own
Target = Annotated[str, tyro.conf.Positional]


class AppendConfig(Config):
    """Add codes to an index as new shards: what is there is not written again."""

    index: Target = Field(description="Index, local folder or s3:// url")
    codes: str = Field(description="Codes, local folder or s3:// url")
    attributes: str | None = Field(None, description="Corpus, or Parquet or CSV file with a column id, for --where")
    replace: bool = Field(False, description="Rows whose ids are there already take their place; unset: an error")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


class DeleteConfig(Config):
    """Delete rows of an index by their ids, at once."""

    index: Target = Field(description="Index, local folder or s3:// url")
    ids: tuple[str, ...] = Field(min_length=1, description="Ids, or one text file of an id a line, local or s3://")
    missing_ok: bool = Field(False, description="Skip ids that are not there; unset: they are an error")


class CompactConfig(Config):
    """Join small shards of an index and leave out deleted rows."""

    index: Target = Field(description="Index, local folder or s3:// url")
    rows_per_shard: int = Field(ROWS_PER_SHARD, ge=1, description="Most rows of a joined shard")
    most_deleted: float = Field(
        compaction.MOST_DELETED, ge=0, le=1, description="Share of deleted rows above which a shard is written again"
    )
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


class RollbackConfig(Config):
    """Make the rows of an old version the newest version of an index."""

    index: Target = Field(description="Index, local folder or s3:// url")
    to: int = Field(ge=1, description="The old version's number")


class VersionsConfig(Config):
    """Print the versions of an index."""

    index: Target = Field(description="Index, local folder or s3:// url")
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON")


class GcConfig(Config):
    """Delete the files of an index that no kept version names."""

    index: Target = Field(description="Index, local folder or s3:// url")
    keep: int = Field(KEEP, ge=1, description="Newest versions that stay readable")
    grace_hours: float = Field(
        GRACE_S / HOUR_S, ge=0, description="Versions replaced within these hours stay readable, younger files stay"
    )
    dry_run: bool = Field(False, description="Only print what would be deleted")

    @model_validator(mode="after")
    def _finite(self) -> GcConfig:
        if self.grace_hours != self.grace_hours or self.grace_hours == float("inf"):
            raise ValueError("grace_hours is a number of hours")
        return self


def append(config: AppendConfig) -> None:
    """Add codes to an index; print the number of the version that has them. Rerun = resume."""
    with counting("append"):
        source, catalog = open_store(config.codes), open_catalog(config.index)
        codes = artifact.load_manifest(source, "codes")
        head = newest(catalog.store)
        check_fits(head, int(codes.info["num_bits"]), codes.fingerprint)
        if (number := _appended(catalog, codes.id)) is not None and not config.replace:
            say(f"{config.index}: these codes are there already, since version {number}")
            return
        rows, parts = int(codes.rows_out or 0), [r for r in codes.files if r.name.startswith("parts/")]
        if not rows:
            say(f"{config.codes} holds no codes: version {head.number} of {config.index} stays as it is")
            return
        described = describe_codes(config.attributes, codes, parts) if config.attributes else None
        arguments = {"codes": codes.id, "replace": config.replace, "attributes": described and described.digest}
        plan = sha256_hex(canonical({"append": arguments, "format": artifact.FORMAT_VERSION}))[:16]
        info = head.manifest.info
        build = ShardBuild(
            source, catalog.store, parts, int(info["num_bits"]), plan, info["kind"], 0, config.pool, described,
            head.generation,
        )  # fmt: skip
        quantizer = info.get("quantizer")
        shards = build.write(-(-rows // ROWS_PER_SHARD), quantizer and head.manifest.record(quantizer))
        names = [open_ids(catalog.store, shard, catalog.cache).array for shard in shards]
        number = catalog.append_shards(lambda _: shards, names, arguments, config.replace, {"codes": codes.id})
        catalog.store.clear(f"progress/{plan}/")
        _say_version(catalog.store, config.index, number)


def _appended(catalog: Catalog, codes: str) -> int | None:
    """The version that appended some codes, if it is one of the newest, and none since has taken rows away."""
    last = newest(catalog.store).number
    for number in range(last, max(0, last - LOOK_BACK), -1):
        change = change_of(catalog.store, number)
        if change.get("codes") == codes:
            return number
        if change.get("operation") not in ("append", "compact", "gc") or change.get("deleted"):
            return None
    return None


def delete(config: DeleteConfig) -> None:
    """Delete rows by id; print the number of the version without them."""
    with counting("delete"):
        catalog = open_catalog(config.index)
        ids = _ids_in(config.ids[0]) if len(config.ids) == 1 else [*config.ids]
        before = catalog.version
        number = catalog.delete(ids, config.missing_ok)
        if number == before:
            say(f"{config.index}: none of the {len(ids):,} ids is there: version {number} stays as it is")
        else:
            _say_version(catalog.store, config.index, number)


def _ids_in(word: str) -> list[str]:
    """The ids in a text file; the word itself where it names none.

    Raises:
        InputError: it has the ending of a text file and is not there, or holds no ids.
    """
    named = word.lower().endswith(TEXT_ENDINGS)
    try:
        lines = [line for line in read_url(word).decode("utf-8-sig").splitlines() if line]
    except (InputError, UnicodeDecodeError):
        if named:
            raise
        return [word]
    if not lines:
        raise InputError(f"{word} is an empty file: expected one id a line")
    return lines


def compact(config: CompactConfig) -> None:
    """Join small shards and leave out deleted rows; print the number of the version."""
    with counting("compact"):
        store, cache = open_store(config.index), cache_folder()
        before = newest(store).number

        def join(groups: Sequence[tuple[ShardRecord, ...]], head: Version) -> Iterator[Joined]:
            rows = sum(source.rows for group in groups for source in group)
            jobs = {number: (store, cache, group, head) for number, group in enumerate(groups)}
            with Bar("join shards", rows, "rows") as bar:
                meter = Meter(bar, "group")
                for number, joined in run_tasks(join_group, jobs, config.pool, rows <= SHORT_ROWS, meter):
                    meter.finish(number, sum(source.rows for source in groups[number]))
                    yield joined

        number = compaction.compact(store, cache, config.rows_per_shard, config.most_deleted, join)
        if number == before:
            say(f"{config.index}: no shard is small or has many deleted rows; version {number} stays as it is")
        else:
            _say_version(store, config.index, number)


def rollback(config: RollbackConfig) -> None:
    """Make an old version's rows the newest version; print its number."""
    with counting("rollback"):
        catalog = open_catalog(config.index)
        _say_version(catalog.store, config.index, catalog.rollback(config.to))


def versions(config: VersionsConfig) -> None:
    """Print every version of an index, oldest first."""
    with counting("versions"):
        lines = open_catalog(config.index).versions()
    if config.json_:
        print(json.dumps(lines))
        return
    columns = ["version", "operation", "rows", "added", "deleted", "kept"]
    rows = [[f"{line[name]:,}" if isinstance(line[name], int) and not isinstance(line[name], bool)
             else {True: "yes", False: "no"}.get(line[name], str(line[name])) for name in columns]
            for line in lines]  # fmt: skip
    show_table(config.index, columns, rows)


def gc(config: GcConfig) -> None:
    """Delete what no kept version names; print how many files and bytes, and the number of the version."""
    with counting("gc"):
        store = open_catalog(config.index).store
        done = garbage.collect(store, config.keep, config.grace_hours * HOUR_S, config.dry_run)
    if config.dry_run:
        for name, _ in done.files:
            print(name)
    verb = "would be deleted" if config.dry_run else "deleted"
    say(
        f"{config.index}: {len(done.files):,} files of {done.size_bytes:,} bytes {verb}; versions "
        f"{done.oldest_kept} to {done.version} are kept"
    )


def _say_version(store: Store, url: str, number: int) -> None:
    version = read_version(store, number)
    shards = len(version.shards)
    say(f"{url}: {version.rows:,} rows in {shards} {'shard' if shards == 1 else 'shards'}, version {number}")

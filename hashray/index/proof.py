"""`hashray verify`: every byte and row of an artifact; of an index, that codes and ids belong together. No Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc

from hashray import artifact
from hashray.artifact.command import ArtifactConfig
from hashray.errors import CorruptArtifact, HashrayError
from hashray.index.log import newest, read_version
from hashray.index.rows import deleted_rows, open_ids
from hashray.index.shard import open_shard
from hashray.index.version import ShardRecord, oldest_kept
from hashray.progress import Bar, say
from hashray.storage import Store, join, open_store
from hashray.storage.cache import cache_folder, verified_path
from hashray.storage.requests import counting


class VerifyConfig(ArtifactConfig):
    """Check every byte, every row count and every id of an artifact; exit code 1 where one is wrong."""


def verify(config: VerifyConfig) -> int:
    """Check an artifact, print each problem, and return 1 if there is one."""
    with counting("verify"):
        store = open_store(config.artifact)
        problems = artifact.verify(store)
        if not problems and store.exists(artifact.version_key(1)):
            problems = verify_shards(store, cache_folder())
    if config.json_:
        print(json.dumps({"artifact": config.artifact, "whole": not problems, "problems": problems}))
    elif not problems:
        print(f"{config.artifact} is whole")
    for problem in problems:
        say(f"error: {problem}")
    return 1 if problems else 0


def verify_shards(store: Store, cache: Path) -> list[str]:
    """Open every kept version of an index whose bytes are right; return what does not belong together.

    Codes, ids and bitmap of a shard have the same number of rows, and ids ascend, each once. A shard is looked at once.
    """
    problems, seen = list[str](), set[tuple[str, str | None]]()
    head = newest(store)
    last, first = head.number, oldest_kept(head.manifest)
    with Bar("open versions", last - first + 1, "versions") as bar:
        for number in range(first, last + 1):
            try:
                version = read_version(store, number)
                info = version.manifest.info
                for shard in version.shards:
                    key = (shard.ids.name, shard.deleted.name if shard.deleted else None)
                    if key not in seen:
                        seen.add(key)
                        _check_shard(store, cache, shard, info["kind"], int(info["num_bits"]))
            except HashrayError as error:
                problems.append(f"version {number}: {error}")
            bar.add(1)
    return problems


def _check_shard(store: Store, cache: Path, shard: ShardRecord, kind: str, num_bits: int) -> None:
    codes = shard.codes
    open_shard(verified_path(store, codes.name, codes.bytes, codes.sha256, cache), kind, num_bits, shard.rows)
    ids = open_ids(store, shard, cache)
    if not pc.all(pc.less(ids.array[:-1], ids.array[1:])).as_py():
        raise CorruptArtifact(f"{join(store.url, shard.ids.name)}: its ids do not ascend, each once")
    if (ids.array[0].as_py(), ids.array[-1].as_py()) != (shard.first, shard.last):
        raise CorruptArtifact(f"{join(store.url, shard.ids.name)}: its first and last id are not its version's")
    ids.release()
    deleted_rows(store, shard)

"""Compaction: small shards are joined and deleted rows left out, in groups that do not depend on each other. No Ray.

A group is planned on one version. If others come before it is published, a group counts only where all its shards are
still there and no row of them has been brought back; rows that were deleted meanwhile are deleted in its new shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hashray import artifact
from hashray.artifact.bitmap import Bitmap
from hashray.index.attributes import merge_attributes
from hashray.index.ids import find, one_array
from hashray.index.log import Change, Version, carried, commit, newest
from hashray.index.rows import attributes_of, deleted_rows, open_ids, read_rows, with_deleted
from hashray.index.shard import write_sorted
from hashray.index.version import ShardRecord
from hashray.storage import Store

MOST_DELETED = 0.2  # of a shard's rows
SMALL = 0.5  # of the rows of a joined shard: a shard below this is joined with others


@dataclass(frozen=True)
class Joined:
    """A group: the shards it was planned of, and the one that holds their living rows, if there are any."""

    sources: tuple[ShardRecord, ...]
    shard: ShardRecord | None


Join = Callable[[Sequence[tuple[ShardRecord, ...]], Version], Iterator[Joined]]


def plan_groups(
    shards: Sequence[ShardRecord], rows_per_shard: int, most_deleted: float = MOST_DELETED
) -> list[tuple[ShardRecord, ...]]:
    """The groups of shards to be joined, each of at most `rows_per_shard` living rows.

    Shards below half of that, and larger ones of which more than the share `most_deleted` is deleted, are packed
    together in ascending order of their first ids; a shard that would be written again as it is is left alone.
    """
    groups: list[list[ShardRecord]] = []
    room = -1
    for shard in shards:
        if shard.living >= SMALL * rows_per_shard and not _is_worn(shard, most_deleted):
            continue
        if shard.living > room:
            groups.append([])
            room = rows_per_shard
        groups[-1].append(shard)
        room -= shard.living
    return [tuple(group) for group in groups if len(group) > 1 or _is_worn(group[0], most_deleted)]


def _is_worn(shard: ShardRecord, most_deleted: float) -> bool:
    return shard.rows - shard.living > most_deleted * shard.rows


def compact(
    store: Store, cache: Path, rows_per_shard: int, most_deleted: float = MOST_DELETED, join: Join | None = None
) -> int:
    """Publish a version with the groups joined; return its number, or the newest one's where there are none.

    Args:
        join: joins the groups of a version: here, one after the other, if unset.
    """
    while True:
        head = newest(store)
        groups = plan_groups(head.shards, rows_per_shard, most_deleted)
        if not groups:
            return head.number
        joined = [*(join(groups, head) if join else (join_group(store, cache, group, head) for group in groups))]
        number = commit_joined(store, cache, joined, head.number)
        if number is not None:
            return number


def commit_joined(store: Store, cache: Path, joined: Sequence[Joined], planned: int) -> int | None:
    """Publish the groups that still hold; None where none does."""
    held: list[bool] = []

    def change(head: Version) -> Change | None:
        there = {shard.ids.name: shard for shard in head.shards}
        shards, good = dict(there), 0
        for group in joined:
            now = [there.get(source.ids.name) for source in group.sources]
            if not _holds(store, group.sources, now):
                continue
            good += 1
            for source in group.sources:
                del shards[source.ids.name]
            if group.shard is not None:
                moved = carried(store, [group.shard], head.generation)
                later = _deleted_since(store, cache, group.sources, now, moved[0])
                shards |= {shard.ids.name: shard for shard in with_deleted(store, [(moved[0], later)], head.generation)}
        held.append(good > 0)
        return Change([*shards.values()], said={"groups": good}) if good else None

    sources = sorted(source.ids.name for group in joined for source in group.sources)
    number = commit(store, "compact", {"sources": sources, "planned": planned}, change)
    return number if held[-1] else None


def _holds(store: Store, sources: Sequence[ShardRecord], now: Sequence[ShardRecord | None]) -> bool:
    """Whether the shards are all there still, and no row that was deleted has been brought back."""
    for source, shard in zip(sources, now, strict=True):
        before = deleted_rows(store, source)
        after = None if shard is None else deleted_rows(store, shard)
        if shard is None or (before is not None and (after is None or not before <= after)):
            return False
    return True


def _deleted_since(
    store: Store,
    cache: Path,
    sources: Sequence[ShardRecord],
    now: Sequence[ShardRecord | None],
    joined: ShardRecord,
) -> Bitmap | None:
    """The rows of the joined shard that were deleted in its sources since it was planned."""
    later = list[pa.Array]()
    for source, shard in zip(sources, now, strict=True):
        if shard is not None and shard.deleted is not None and shard.deleted != source.deleted:
            before, after = deleted_rows(store, source), deleted_rows(store, shard)
            new = after if before is None or after is None else after - before
            if new is not None:
                later.append(pa.array(open_ids(store, shard, cache).take(new.positions()), pa.string()))
    if not later:
        return None
    wanted = pa.concat_arrays(later)
    places = find(open_ids(store, joined, cache).array, wanted.take(pc.sort_indices(wanted)))
    return Bitmap.of(joined.rows, places)


def join_group(
    store: Store,
    cache: Path,
    sources: tuple[ShardRecord, ...],
    head: Version,
    advance: Callable[[int], None] = lambda _: None,
) -> Joined:
    """Write the shard of the living rows of some shards. Memory: three times its codes and ids."""
    info = head.manifest.info
    num_bits, kind, quantizer = int(info["num_bits"]), str(info["kind"]), info.get("quantizer")
    ids, codes, attributes = list[pa.Array](), list[np.ndarray](), list[pa.Table | None]()
    for source in sources:
        rows = read_rows(store, source, kind, num_bits, cache)
        places, table = pa.array(rows.positions), attributes_of(store, source, cache)
        codes.append(rows.codes)
        ids.append(open_ids(store, source, cache).array.take(places))
        attributes.append(None if table is None else table.take(places))
        advance(source.rows)
    counts = [len(some) for some in ids]
    if not sum(counts):
        return Joined(sources, None)
    names = one_array(pa.chunked_array([some.cast(pa.large_string()) for some in ids]).cast(pa.large_string()))
    order = pc.sort_indices(names)
    table = merge_attributes(attributes, counts)
    trained = None if quantizer is None else artifact.read_file(store, head.manifest.record(quantizer))
    shard = write_sorted(
        store, names.take(order), np.concatenate(codes)[order.to_numpy()], kind, trained,
        None if table is None else table.take(order), head.generation,
    )  # fmt: skip
    return Joined(sources, shard)

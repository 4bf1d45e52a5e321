"""A source listed as ingest lists it, with all rows in one list; and splits of rows that stand in lists."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from hashray.data.inventory import take_inventory
from hashray.data.labels import Labels
from hashray.data.listing import SourceConfig, Survey
from hashray.data.sources import Meaning, is_random_access
from hashray.data.splits import Candidates, Seen, SplitConfig, order_key, plan_splits
from hashray.engine.session import WorkersConfig
from hashray.storage import open_store


@dataclass(frozen=True)
class Row:
    id: str
    locator: str
    value: str
    labels: Labels
    split: str | None
    size_bytes: int


@dataclass(frozen=True)
class Listing:
    """All rows: a folder's and a list's by id, others in the order of their source."""

    format: str
    rows: list[Row]
    class_names: list[str] | None
    meaning: Meaning
    survey: Survey
    twins: tuple[tuple[str, ...], ...]


def list_source(url: str, config: SourceConfig) -> Listing:
    store = open_store("nothing-is-written-here")
    with take_inventory(url, config, 0, 1000, 1 << 30, WorkersConfig(ray="never"), store) as inventory:
        meaning, rows = inventory.meaning, []
        for block in inventory.blocks:
            table = pq.read_table(io.BytesIO(inventory.store.read(block.name)))
            assert len(table) == block.rows
            for item in table.to_pylist():
                split = meaning.splits.get(item["value"], item["split"])
                value = item["value"]
                rows.append(Row(item["id"], item["locator"], value, meaning.labels[value], split, item["size_bytes"]))
        if is_random_access(inventory.format):
            rows.sort(key=lambda row: row.id)
        return Listing(inventory.format, rows, meaning.class_names, meaning, inventory.survey, inventory.twins)


def assign_splits(
    ids: Sequence[str],
    labels: Sequence[Sequence[int]],
    given: Sequence[str | None],
    config: SplitConfig,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """The split of every row, as a plan from counts and from the rows that are drawn gives it."""
    counts: dict[tuple[tuple[int, ...], str | None], Seen] = {}
    groups: dict[tuple[int, ...], list[str]] = {}
    for row_id, row_labels, split in zip(ids, map(tuple, labels), given, strict=True):
        counts[row_labels, split] = Seen(counts.get((row_labels, split), Seen(0, row_id)).rows + 1, row_id)
        groups.setdefault(row_labels, []).append(row_id)
    for members in groups.values():
        members.sort(key=lambda row_id: order_key(config.seed, row_id))
    rule = plan_splits(
        config, counts,
        lambda n: [(name, Candidates(tuple(rows[:n]), len(rows) > n)) for name, rows in groups.items()], classes,
    )  # fmt: skip
    splits = [rule.of(row_id, tuple(row), split) for row_id, row, split in zip(ids, labels, given, strict=True)]
    check_counts(rule.count(counts), labels, splits)
    return splits


def check_counts(
    counted: Mapping[tuple[tuple[int, ...], str], int], labels: Sequence[Sequence[int]], splits: list[str]
) -> None:
    """What a rule says of all rows is what it says row by row."""
    mine: dict[tuple[tuple[int, ...], str], int] = {}
    for name in zip(map(tuple, labels), splits, strict=True):
        mine[name] = mine.get(name, 0) + 1
    assert counted == mine

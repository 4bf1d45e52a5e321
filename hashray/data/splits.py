"""Split protocols: which rows are train, query, database, unlabelled. Named, seeded, checked. No Ray.

A row's `split` names every split it is in, joined by "+" in alphabetical order: "database+train" is a
training image that is also in the database. Order among rows is that of sha256(seed, id), so a protocol
is a function of the ids, the labels and the seed, never of the order in which a source was listed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from hashray.config import Config
from hashray.errors import InputError

SPLITS = ("train", "query", "database", "unlabelled", "validation")
Protocol = Literal["as-given", "adalabelhash-cifar10", "cifar10-semi", "per-class"]


class SplitConfig(Config):
    """A named protocol and its numbers.

    as-given               the source's own folders, lists or column; train and unlabelled are the database
                           where none is given; a source without splits is all database
    adalabelhash-cifar10   given train rows are train and database (50,000), given test rows are queries (10,000)
    cifar10-semi           of all rows: 100 queries and 500 train rows a class, the rest unlabelled;
                           everything but the queries is the database (1,000 / 5,000 / 54,000, database 59,000)
    per-class              `query_per_class` and `train_per_class` rows a class; everything but the queries
                           is the database, without the train rows if `train_in_database` is false
    """

    protocol: Protocol = "as-given"
    seed: int = Field(0, ge=0)
    query_per_class: int = Field(100, ge=1)
    train_per_class: int = Field(500, ge=1)
    train_in_database: bool = True


def order_key(seed: int, row_id: str) -> bytes:
    """Where a row stands in the seeded order: sha256 of seed and id."""
    return hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()


def assign_splits(
    ids: Sequence[str], labels: Sequence[Sequence[int]], given: Sequence[str | None], config: SplitConfig
) -> list[str]:
    """The split of every row.

    Args:
        ids: n unique row ids; labels: class indices of each row; given: the split each row came with.

    Raises:
        InputError: ids twice, too few rows in a class, splits missing that the protocol needs, or a query
            row that is also in another split.
    """
    _check_unique(ids)
    if config.protocol == "as-given":
        splits = _as_given(given)
    elif config.protocol == "adalabelhash-cifar10":
        splits = _train_is_database(given)
    elif config.protocol == "cifar10-semi":
        splits = _per_class(ids, labels, config.seed, 100, 500, rest="database+unlabelled", train="database+train")
    else:
        train = "database+train" if config.train_in_database else "train"
        splits = _per_class(ids, labels, config.seed, config.query_per_class, config.train_per_class, "database", train)
    check_disjoint(ids, splits)
    return splits


def check_disjoint(ids: Sequence[str], splits: Sequence[str]) -> None:
    """Refuse a query (or validation) row that is in another split as well: its score would be a leak."""
    for alone in ("query", "validation"):
        shared = [i for i, split in enumerate(splits) if alone in (parts := split.split("+")) and len(parts) > 1]
        if shared:
            raise InputError(
                f"{len(shared)} {alone} rows are in another split too, the first {ids[shared[0]]!r} "
                f"({splits[shared[0]]}); a {alone} row may be in no other split: remove them from one of the lists"
            )


def _check_unique(ids: Sequence[str]) -> None:
    if len(set(ids)) < len(ids):
        twice = [(name, count) for name, count in Counter(ids).most_common(3) if count > 1]
        raise InputError(
            f"{len(ids) - len(set(ids)):,} ids occur more than once, for example "
            + ", ".join(f"{name!r} ({count} times)" for name, count in twice)
            + "; ids must be unique in a corpus"
        )


def _as_given(given: Sequence[str | None]) -> list[str]:
    present = {part for split in given if split for part in split.split("+")}
    if not present:
        return ["database"] * len(given)
    missing = sum(split is None for split in given)
    if missing:
        raise InputError(f"{missing:,} of {len(given):,} rows came with no split while others have one; name them all")
    splits = [str(split) for split in given]
    if "database" not in present:
        splits = [_in_database(split) for split in splits]
    return splits


def _in_database(split: str) -> str:
    parts = set(split.split("+"))
    return "+".join(sorted(parts | {"database"})) if parts & {"train", "unlabelled"} else split


def _train_is_database(given: Sequence[str | None]) -> list[str]:
    found = Counter(given)
    if not found["train"] or not found["query"] or len(found) != 2:
        raise InputError(
            f"protocol adalabelhash-cifar10 needs a source split into train and test; found {dict(found)}. "
            "Give a folder with train/ and test/, or choose per-class"
        )
    return ["database+train" if split == "train" else "query" for split in given]


def _per_class(
    ids: Sequence[str], labels: Sequence[Sequence[int]], seed: int, queries: int, trains: int, rest: str, train: str
) -> list[str]:
    order = sorted(range(len(ids)), key=lambda i: order_key(seed, ids[i]))
    members: dict[int, list[int]] = {}
    for i in order:
        for label in labels[i]:
            members.setdefault(label, []).append(i)
    if not members:
        raise InputError("this split protocol draws rows per class, and no row has a class")
    splits = [rest] * len(ids)
    # Rarest class first, so that a row with several classes is counted where it is needed most.
    for word, wanted in (("query", queries), (train, trains)):
        for label in sorted(members, key=lambda name: (len(members[name]), name)):
            free = [i for i in members[label] if splits[i] == rest]
            # A multi-label row already drawn for another class counts for none but that one.
            if len(free) < wanted:
                raise InputError(
                    f"class {label} has {len(free)} rows left for {word!r}, the protocol draws {wanted} a class; "
                    "choose --split-protocol per-class with a lower --query-per-class or --train-per-class"
                )
            for i in free[:wanted]:
                splits[i] = word
    return splits

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

Protocol = Literal["as-given", "adalabelhash-cifar10", "cifar10-semi", "per-class", "class-split"]


class SplitConfig(Config):
    """A named protocol and its numbers.

    as-given               the source's own folders, lists or column; train and unlabelled are the database
                           where none is given; a source without splits is all database
    adalabelhash-cifar10   given train rows are train and database (50,000), given test rows are queries (10,000)
    cifar10-semi           of all rows: 100 queries and 500 train rows a class, the rest unlabelled;
                           everything but the queries is the database (1,000 / 5,000 / 54,000, database 59,000)
    per-class              `query_per_class` and `train_per_class` rows a class; everything but the queries
                           is the database, without the train rows if `train_in_database` is false
    class-split            classes are split, not images (METHODS 3.3): `unseen_classes` of them, drawn by the seed, are
                           never trained on. Each half of the source (given train and test, else
                           `query_per_class` queries a class) falls into -seen and -unseen, beside train, database
                           and query. `pseudo_unseen_classes` of the seen ones are kept out of all these for tuning:
                           they are query-pseudo and database-pseudo
    """

    split_protocol: Protocol = Field(
        "as-given",
        description="Split protocol; docs/INGEST.md says which rows each one makes train, query and database",
    )
    seed: int = Field(0, ge=0, description="Seed of the split protocol and of the order of rows")
    query_per_class: int = Field(100, ge=1, description="Queries of each class, in the per-class protocol")
    train_per_class: int = Field(500, ge=1, description="Train rows of each class, in the per-class protocol")
    train_in_database: bool = Field(
        True, description="Whether train rows are in the database, in the per-class protocol"
    )
    unseen_classes: int | None = Field(
        None, ge=1, description="Classes that are never trained on, in the class-split protocol; unset: a quarter"
    )
    pseudo_unseen_classes: int = Field(
        0, ge=0, description="Seen classes kept aside for tuning, in the class-split protocol"
    )

    def parts_of_classes(self, present: Sequence[int]) -> dict[int, str]:
        """class-split: seen, unseen or pseudo, for each class that occurs; unset, a quarter of them is unseen.

        Raises:
            InputError: no class would be left to train on.
        """
        unseen = round(len(present) / 4) if self.unseen_classes is None else self.unseen_classes
        seen = len(present) - unseen - self.pseudo_unseen_classes
        if seen < 1 or unseen < 1:
            raise InputError(
                f"of {len(present)} classes {unseen} are to be unseen and {self.pseudo_unseen_classes} pseudo-unseen; "
                "at least one must be unseen and one left: lower --unseen-classes or --pseudo-unseen-classes"
            )
        order = sorted(present, key=lambda label: order_key(self.seed, f"class\0{label}"))
        names = ["unseen"] * unseen + ["pseudo"] * self.pseudo_unseen_classes + ["seen"] * seen
        return dict(zip(order, names, strict=True))


def order_key(seed: int, row_id: str) -> bytes:
    """The sort key of a row in the seeded order: sha256 of seed and id."""
    return hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()


def assign_splits(
    ids: Sequence[str],
    labels: Sequence[Sequence[int]],
    given: Sequence[str | None],
    config: SplitConfig,
    classes: Sequence[str] | None = None,
) -> list[str]:
    """The split of every row.

    Args:
        ids: n unique row ids; labels: class indices of each row; given: the split each row came with.
        classes: names of the classes, for the text of errors.

    Raises:
        InputError: ids twice, too few rows in a class, splits missing that the protocol needs, or a query
            row that is also in another split.
    """
    _check_unique(ids)
    if config.split_protocol == "as-given":
        splits = _as_given(given)
    elif config.split_protocol == "adalabelhash-cifar10":
        splits = _train_is_database(given)
    elif config.split_protocol == "cifar10-semi":
        splits = _per_class(ids, labels, config.seed, 100, 500, "database+unlabelled", "database+train", classes)
    elif config.split_protocol == "class-split":
        splits = _class_split(ids, labels, given, config, classes)
    else:
        train = "database+train" if config.train_in_database else "train"
        splits = _per_class(
            ids, labels, config.seed, config.query_per_class, config.train_per_class, "database", train, classes
        )
    check_disjoint(ids, splits)
    return splits


def check_disjoint(ids: Sequence[str], splits: Sequence[str]) -> None:
    """Refuse a query (or validation) row that is in another split as well: its score would be a leak."""
    for alone in ("query", "validation"):
        kinds = [{part.partition("-")[0] for part in split.split("+")} for split in splits]
        shared = [i for i, kind in enumerate(kinds) if alone in kind and len(kind) > 1]
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
    splits = [_train_wins(str(split)) for split in given]
    if "database" not in present:
        splits = [_in_database(split) for split in splits]
    return splits


def _train_wins(split: str) -> str:
    """A row of both the train and the unlabelled list is a train row."""
    parts = set(split.split("+"))
    return "+".join(sorted(parts - {"unlabelled"})) if {"train", "unlabelled"} <= parts else split


def _in_database(split: str) -> str:
    parts = set(split.split("+"))
    return "+".join(sorted(parts | {"database"})) if parts & {"train", "unlabelled"} else split


def _train_is_database(given: Sequence[str | None]) -> list[str]:
    counts = Counter(given)
    if not counts["train"] or not counts["query"] or len(counts) != 2:
        raise InputError(
            f"this protocol needs a source split into train and test; found {dict(counts)}. "
            "Give a folder with train/ and test/, or choose per-class"
        )
    return ["database+train" if split == "train" else "query" for split in given]


def class_split(labels: Sequence[Sequence[int]], classes: Sequence[str], config: SplitConfig) -> dict[str, list[str]]:
    """class-split: names of the seen, unseen and pseudo-unseen classes, of rows with one label each."""
    names: dict[str, list[str]] = {}
    for label, part in sorted(config.parts_of_classes(sorted({row_labels[0] for row_labels in labels})).items()):
        names.setdefault(part, []).append(classes[label])
    return names


def _class_split(
    ids: Sequence[str],
    labels: Sequence[Sequence[int]],
    given: Sequence[str | None],
    config: SplitConfig,
    classes: Sequence[str] | None,
) -> list[str]:
    several = [i for i, row_labels in enumerate(labels) if len(row_labels) != 1]
    if several:
        raise InputError(
            f"protocol class-split needs exactly one class a row; {ids[several[0]]!r} has {len(labels[several[0]])}"
        )
    part = config.parts_of_classes(sorted({row_labels[0] for row_labels in labels}))
    if any(given):
        halves = ["query" if split == "query" else "database" for split in _train_is_database(given)]
    else:
        halves = _per_class(ids, labels, config.seed, config.query_per_class, 0, "database", "database", classes)
    words = {
        ("database", "seen"): "database+database-seen+train",
        ("database", "unseen"): "database+database-unseen",
        ("query", "seen"): "query+query-seen",
        ("query", "unseen"): "query+query-unseen",
        ("database", "pseudo"): "database-pseudo",
        ("query", "pseudo"): "query-pseudo",
    }
    return [words[half, part[row_labels[0]]] for half, row_labels in zip(halves, labels, strict=True)]


def _per_class(
    ids: Sequence[str],
    labels: Sequence[Sequence[int]],
    seed: int,
    queries: int,
    trains: int,
    rest: str,
    train: str,
    classes: Sequence[str] | None,
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
                name = repr(classes[label]) if classes else label
                raise InputError(
                    f"class {name} has {len(free)} rows left for {word!r}, the protocol draws {wanted} of each class: "
                    "add images of it, leave it out, or lower --query-per-class or --train-per-class of per-class"
                )
            for i in free[:wanted]:
                splits[i] = word
    return splits

"""Split protocols: which rows are train, query, database, unlabelled. Named, seeded, checked. No Ray.

A row's `split` names every split it is in, joined by "+" in alphabetical order: "database+train" is a
training image that is also in the database. Order among rows is that of sha256(seed, id), so a protocol
is a function of the ids, the labels and the seed, never of the order in which a source was listed.

No table of all rows is needed: a protocol is planned from how often each set of labels and each given split occur, and
from the first rows of each set of labels in the seeded order. The plan, a `SplitRule`, then decides row by row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pydantic import Field

from hashray.config import Config
from hashray.errors import InputError

Protocol = Literal["as-given", "adalabelhash-cifar10", "cifar10-semi", "per-class", "random", "class-split"]
MOST_QUERIES = 1000  # that the random protocol draws by itself


class SplitConfig(Config):
    """A named protocol and its numbers.

    as-given               the source's own folders, lists or column; train and unlabelled are the database
                           where none is given; a source without splits is all database
    adalabelhash-cifar10   given train rows are train and database (50,000), given test rows are queries (10,000)
    cifar10-semi           of all rows: 100 queries and 500 train rows a class, the rest unlabelled;
                           everything but the queries is the database (1,000 / 5,000 / 54,000, database 59,000)
    per-class              `query_per_class` and `train_per_class` rows a class; everything but the queries
                           is the database, without the train rows if `train_in_database` is false
    random                 `query_rows` queries of all rows, which needs no labels; the others are the database, and
                           all of them, or `train_rows`, are train
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
    query_rows: int | None = Field(
        None, ge=0, description="Queries in the random protocol; unset: a tenth of all rows, 1,000 at most"
    )
    train_rows: int | None = Field(
        None, ge=1, description="Train rows in the random protocol; unset: all rows but the queries"
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


Labels = tuple[int, ...]


class Seen(NamedTuple):
    """How many rows have some labels and a given split, and the id of one of them."""

    rows: int
    id: str


class Candidates(NamedTuple):
    """The ids of some rows with equal labels that come first in the seeded order, and whether there are more."""

    ids: tuple[str, ...]
    more: bool


Counts = Mapping[tuple[Labels, str | None], Seen]
Draw = Callable[[int], Sequence[tuple[Labels, Candidates]]]
CLASS_SPLIT = {
    ("database", "seen"): "database+database-seen+train",
    ("database", "unseen"): "database+database-unseen",
    ("query", "seen"): "query+query-seen",
    ("query", "unseen"): "query+query-unseen",
    ("database", "pseudo"): "database-pseudo",
    ("query", "pseudo"): "query-pseudo",
}


@dataclass(frozen=True)
class SplitRule:
    """The split of every row of a source.

    Attributes:
        rest: of rows that nothing below decides.
        given: by the split that a row came with.
        drawn: by id, of rows that were drawn; with their labels.
        parts: class-split: seen, unseen or pseudo, by class.
    """

    rest: str = ""
    given: Mapping[str | None, str] = field(default_factory=dict)
    drawn: Mapping[str, tuple[str, Labels]] = field(default_factory=dict)
    parts: Mapping[int, str] | None = None

    def of(self, row_id: str, labels: Labels, given: str | None) -> str:
        """The split of one row."""
        word = self.drawn[row_id][0] if row_id in self.drawn else self.given.get(given, self.rest)
        return word if self.parts is None else CLASS_SPLIT[word, self.parts[labels[0]]]

    def count(self, counts: Counts) -> Counter[tuple[Labels, str]]:
        """How many rows have each set of labels and each split."""
        out = Counter[tuple[Labels, str]]()
        for (labels, given), seen in counts.items():
            out[labels, self.given.get(given, self.rest)] += seen.rows
        for word, labels in self.drawn.values():
            out[labels, self.rest] -= 1
            out[labels, word] += 1
        if self.parts is None:
            return +out
        parts = Counter[tuple[Labels, str]]()
        for (labels, word), count in out.items():
            parts[labels, CLASS_SPLIT[word, self.parts[labels[0]]]] += count
        return +parts


def plan_splits(config: SplitConfig, counts: Counts, draw: Draw, classes: Sequence[str] | None = None) -> SplitRule:
    """The rule of a protocol for a source.

    Args:
        counts: how often each set of labels (class indices) and given split occur.
        draw: gives, for a number n, the first n rows of each set of labels; a set may come in several pieces.
        classes: names of the classes, for the text of errors.

    Raises:
        InputError: too few rows in a class, splits missing that the protocol needs, or a query row that is also in
            another split.
    """
    seed = config.seed
    if config.split_protocol == "as-given":
        return SplitRule(given=_as_given(counts))
    if config.split_protocol == "adalabelhash-cifar10":
        return SplitRule(given=_train_is_database(counts))
    if config.split_protocol == "class-split":
        return _class_split(counts, draw, config, classes)
    if config.split_protocol == "random":
        return _random(counts, draw, config)
    if config.split_protocol == "cifar10-semi":
        drawn = _per_class(counts, draw, seed, 100, 500, "database+train", classes)
        return SplitRule("database+unlabelled", drawn=drawn)
    train = "database+train" if config.train_in_database else "train"
    drawn = _per_class(counts, draw, seed, config.query_per_class, config.train_per_class, train, classes)
    return SplitRule("database", drawn=drawn)


def check_disjoint(splits: Mapping[str, Seen]) -> None:
    """Refuse a query (or validation) row that is in another split as well: its score would be a leak.

    Raises:
        InputError: there are such rows.
    """
    for alone in ("query", "validation"):
        shared = [split for split in splits if _is_shared(alone, split)]
        if shared:
            count, first = sum(splits[split].rows for split in shared), splits[shared[0]].id
            raise InputError(
                f"{count} {alone} rows are in another split too, the first {first!r} "
                f"({shared[0]}); a {alone} row may be in no other split: remove them from one of the lists"
            )


def _is_shared(alone: str, split: str) -> bool:
    kinds = {part.partition("-")[0] for part in split.split("+")}
    return alone in kinds and len(kinds) > 1


def _as_given(counts: Counts) -> dict[str | None, str]:
    given: dict[str | None, Seen] = {}
    for (_, split), seen in counts.items():
        before = given.get(split, Seen(0, seen.id))
        given[split] = before._replace(rows=before.rows + seen.rows)
    present = {part for split in given if split for part in split.split("+")}
    if not present:
        return {None: "database"}
    total = sum(seen.rows for seen in given.values())
    if None in given:
        missing = given[None].rows
        raise InputError(f"{missing:,} of {total:,} rows came with no split while others have one; name them all")
    splits = {split: _train_wins(str(split)) for split in given}
    if "database" not in present:
        splits = {split: _in_database(word) for split, word in splits.items()}
    check_disjoint({word: given[split] for split, word in splits.items()})
    return splits


def _train_wins(split: str) -> str:
    """A row of both the train and the unlabelled list is a train row."""
    parts = set(split.split("+"))
    return "+".join(sorted(parts - {"unlabelled"})) if {"train", "unlabelled"} <= parts else split


def _in_database(split: str) -> str:
    parts = set(split.split("+"))
    return "+".join(sorted(parts | {"database"})) if parts & {"train", "unlabelled"} else split


def _train_is_database(counts: Counts) -> dict[str | None, str]:
    given = Counter[str | None]()
    for (_, split), seen in counts.items():
        given[split] += seen.rows
    if not given["train"] or not given["query"] or len(given) != 2:
        raise InputError(
            f"this protocol needs a source split into train and test; found {dict(given)}. "
            "Give a folder with train/ and test/, or choose per-class"
        )
    return {"train": "database+train", "query": "query"}


def class_split(counts: Counts, classes: Sequence[str], config: SplitConfig) -> dict[str, list[str]]:
    """class-split: names of the seen, unseen and pseudo-unseen classes, of rows with one label each."""
    names: dict[str, list[str]] = {}
    for label, part in sorted(config.parts_of_classes(_present(counts)).items()):
        names.setdefault(part, []).append(classes[label])
    return names


def _present(counts: Counts) -> list[int]:
    return sorted({label for labels, _ in counts for label in labels})


def _class_split(counts: Counts, draw: Draw, config: SplitConfig, classes: Sequence[str] | None) -> SplitRule:
    for (labels, _), seen in counts.items():
        if len(labels) != 1:
            raise InputError(f"protocol class-split needs exactly one class a row; {seen.id!r} has {len(labels)}")
    parts = config.parts_of_classes(_present(counts))
    if any(given for _, given in counts):
        halves = {
            given: "query" if word == "query" else "database" for given, word in _train_is_database(counts).items()
        }
        return SplitRule(given=halves, parts=parts)
    drawn = _per_class(counts, draw, config.seed, config.query_per_class, 0, "database", classes)
    return SplitRule("database", drawn=drawn, parts=parts)


def _random(counts: Counts, draw: Draw, config: SplitConfig) -> SplitRule:
    total = sum(seen.rows for seen in counts.values())
    queries = min(MOST_QUERIES, total // 10) if config.query_rows is None else config.query_rows
    size = queries + (config.train_rows or 0)
    if size + (config.train_rows is None) > total:
        raise InputError(
            f"the random protocol is to draw {queries:,} queries and {config.train_rows or 'other'} train rows of "
            f"{total:,} rows: lower --query-rows or --train-rows"
        )
    groups = draw(size) if size else ()
    keyed = sorted((order_key(config.seed, name), name, labels) for labels, some in groups for name in some.ids)
    words = ["query"] * queries + ["database+train"] * (size - queries)
    drawn = {name: (word, labels) for (_, name, labels), word in zip(keyed[:size], words, strict=True)}
    return SplitRule("database+train" if config.train_rows is None else "database", drawn=drawn)


def _per_class(
    counts: Counts, draw: Draw, seed: int, queries: int, trains: int, train: str, classes: Sequence[str] | None
) -> dict[str, tuple[str, Labels]]:
    members = Counter[int]()
    for (labels, _), seen in counts.items():
        members.update(dict.fromkeys(labels, seen.rows))
    if not members:
        raise InputError(
            "this split protocol draws rows per class, and no row has a class; --split-protocol random needs none"
        )
    size, drawn = queries + trains, None
    while drawn is None:  # rows of several classes that are drawn for one of them may leave too few for another
        drawn = _draw(draw(size), members, seed, (("query", queries), (train, trains)), classes)
        size *= 2
    return drawn


def _draw(
    groups: Sequence[tuple[Labels, Candidates]],
    members: Mapping[int, int],
    seed: int,
    words: Sequence[tuple[str, int]],
    classes: Sequence[str] | None,
) -> dict[str, tuple[str, Labels]] | None:
    """The drawn rows, or None where the candidates do not show which rows come next."""
    rows: dict[int, list[tuple[bytes, str, Labels]]] = {}
    known_to: dict[int, bytes] = {}  # up to this key, a class's candidates are all its rows
    for labels, candidates in groups:
        keyed = [(order_key(seed, row_id), row_id, labels) for row_id in candidates.ids]
        for label in labels:
            rows.setdefault(label, []).extend(keyed)
            if candidates.more:
                known_to[label] = min(known_to.get(label, keyed[-1][0]), keyed[-1][0])
    drawn: dict[str, tuple[str, Labels]] = {}
    for label_rows in rows.values():
        label_rows.sort()
    # Rarest class first, so that a row with several classes is counted where it is needed most.
    for word, wanted in words:
        for label in sorted(members, key=lambda name: (members[name], name)):
            # A multi-label row already drawn for another class counts for none but that one.
            free = [row for row in rows[label] if row[1] not in drawn]
            known = [row for row in free if label not in known_to or row[0] <= known_to[label]]
            if len(known) < wanted and label in known_to:
                return None
            if len(free) < wanted:
                name = repr(classes[label]) if classes else label
                raise InputError(
                    f"class {name} has {len(free)} rows left for {word!r}, the protocol draws {wanted} of each class: "
                    "add images of it, leave it out, or lower --query-per-class or --train-per-class of per-class"
                )
            drawn |= {row_id: (word, labels) for _, row_id, labels in known[:wanted]}
    return drawn

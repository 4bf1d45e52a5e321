"""What ingest saw and what became of it: a closing table, and warnings of what looks wrong. No Ray."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from hashray.data.folders import CONTAINERS
from hashray.data.labels import SPLIT_WORDS
from hashray.data.listing import Listing

SHOWN = 5
FEWEST_ROWS = 20  # below this, as many classes as rows say nothing


def closing_table(listing: Listing, splits: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """Lines of (what, how many) about every file and row of a source.

    Args:
        splits: the split of each row; classes: the names of the classes.
    """
    survey, rows = listing.survey, listing.rows
    parts = Counter(part for split in splits for part in split.split("+"))
    lines = [
        ["files seen", f"{survey.seen:,}"],
        [f"rows read ({listing.format})", f"{len(rows):,}"],
        ["files skipped", _counts(+survey.skipped) or "none"],
        ["images that cannot be listed", f"{len(survey.lost):,}"],
        ["rows without label", f"{sum(not row.labels for row in rows):,}"],
        ["rows per split", _counts(parts)],
        ["classes", f"{len(classes):,}" + (f": {_first(classes)}" if classes else "")],
    ]
    if survey.members:
        lines[3:3] = [
            ["files in tars", f"{survey.members:,}"],
            ["files in tars skipped", _counts(survey.members_skipped) or "none"],
        ]
    if survey.columns_read:
        lines.append(["columns read", ", ".join(survey.columns_read)])
        lines.append(["columns ignored", ", ".join(survey.columns_ignored) or "none"])
    return lines + [["recognised", note] for note in survey.notes]


def warnings(
    listing: Listing, labels: Sequence[Sequence[int]], splits: Sequence[str], classes: Sequence[str]
) -> list[str]:
    """Warnings, one sentence each, about things that are allowed but look like mistakes.

    Args:
        labels: class indices of each row; splits: the split of each row; classes: names of the classes.
    """
    sentences = [*_queries_alone(labels, splits, classes), *_equal_names(listing, classes)]
    if lost := listing.survey.lost:
        sentences.append(
            f"{len(lost):,} paths cannot be listed and go to quarantine, a folder as one row whatever it holds: "
            f"{_first([f'{row.id} ({row.reason})' for row in lost])}"
        )
    shared = set.intersection(*[set(split.split("+")) for split in set(splits)])
    if shared:  # never where there are queries and others: a query is in no other split
        sentences.append(
            f"every row is {'+'.join(sorted(shared))!r}: nothing can be both trained and scored. "
            "Give --split-protocol per-class, or name splits in folders, files or a column"
        )
    levels = [name for name in classes if name.lower() in SPLIT_WORDS or name.lower() in CONTAINERS]
    if levels:
        sentences.append(f"the classes {_first(levels)} look like splits or folders of images, not like classes")
    labelled = sum(bool(row.labels) for row in listing.rows)
    if labelled >= FEWEST_ROWS and 2 * len(classes) > labelled:
        sentences.append(f"{len(classes):,} classes for {labelled:,} labelled rows: the labels look like captions")
    return sentences


def _queries_alone(labels: Sequence[Sequence[int]], splits: Sequence[str], classes: Sequence[str]) -> list[str]:
    query: set[int] = set()
    database: set[int] = set()
    for row_labels, split in zip(labels, splits, strict=True):
        parts = {part.partition("-")[0] for part in split.split("+")}
        query.update(row_labels if "query" in parts else ())
        database.update(row_labels if "database" in parts else ())
    alone = [classes[i] for i in sorted(query - database)]
    have = "class has" if len(alone) == 1 else "classes have"
    return [f"{len(alone)} {have} queries and no database row: {_first(alone)}"] if alone and database else []


def _equal_names(listing: Listing, classes: Sequence[str]) -> list[str]:
    files = [str(PurePosixPath(row.id)) for row in listing.rows] if listing.format == "folder" else []
    sentences = []
    for kind, names in (("classes", classes), ("files", files)):
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
        pairs = [" = ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
        if pairs:
            sentences.append(f"names of {kind} that differ only in case or in how accents are encoded: {_first(pairs)}")
    return sentences


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items()))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")

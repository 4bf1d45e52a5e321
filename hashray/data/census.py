"""What ingest saw and what became of it: a closing table, and warnings of what looks wrong. No Ray."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from hashray.data.folders import CONTAINERS
from hashray.data.labels import SPLIT_WORDS
from hashray.data.listing import Format, Survey

SHOWN = 5
FEWEST_ROWS = 20  # below this, as many classes as rows say nothing
Counts = Mapping[tuple[tuple[int, ...], str], int]


def closing_table(survey: Survey, kind: Format, counts: Counts, classes: Sequence[str]) -> list[list[str]]:
    """Lines of (what, how many) about every file and row of a source.

    Args:
        counts: how many rows have each set of labels and each split; classes: the names of the classes.
    """
    parts = Counter[str]()
    for (_, split), count in counts.items():
        parts.update(dict.fromkeys(split.split("+"), count))
    lines = [
        ["files seen", f"{survey.seen:,}"],
        [f"rows read ({kind})", f"{sum(counts.values()):,}"],
        ["files skipped", _counts(+survey.skipped) or "none"],
        ["images that cannot be listed", f"{len(survey.lost):,}"],
        ["rows without label", f"{sum(count for (labels, _), count in counts.items() if not labels):,}"],
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


def warnings(survey: Survey, counts: Counts, classes: Sequence[str], twins: Sequence[Sequence[str]]) -> list[str]:
    """Warnings, one sentence each, about things that are allowed but look like mistakes.

    Args:
        counts: how many rows have each set of class indices and each split; classes: names of the classes.
        twins: groups of files whose names differ only in case or in how accents are encoded.
    """
    named: dict[str, list[str]] = {}
    for name in classes:
        named.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    sentences = [
        *_queries_alone(counts, classes),
        *_equal_names("classes", [group for group in named.values() if len(group) > 1]),
        *_equal_names("files", twins),
    ]
    if lost := survey.lost:
        sentences.append(
            f"{len(lost):,} paths cannot be listed and go to quarantine, a folder as one row whatever it holds: "
            f"{_first([f'{row.id} ({row.reason})' for row in lost])}"
        )
    shared = set.intersection(*[set(split.split("+")) for _, split in counts])
    if shared:  # never where there are queries and others: a query is in no other split
        sentences.append(
            f"every row is {'+'.join(sorted(shared))!r}: nothing can be both trained and scored. Give "
            f"--split-protocol {'per-class' if classes else 'random'}, or name splits in folders, files or a column"
        )
    levels = [name for name in classes if name.lower() in SPLIT_WORDS or name.lower() in CONTAINERS]
    if levels:
        sentences.append(f"the classes {_first(levels)} look like splits or folders of images, not like classes")
    labelled = sum(count for (labels, _), count in counts.items() if labels)
    if labelled >= FEWEST_ROWS and 2 * len(classes) > labelled:
        sentences.append(f"{len(classes):,} classes for {labelled:,} labelled rows: the labels look like captions")
    return sentences


def _queries_alone(counts: Counts, classes: Sequence[str]) -> list[str]:
    query: set[int] = set()
    database: set[int] = set()
    for labels, split in counts:
        parts = {part.partition("-")[0] for part in split.split("+")}
        query.update(labels if "query" in parts else ())
        database.update(labels if "database" in parts else ())
    alone = [classes[i] for i in sorted(query - database)]
    have = "class has" if len(alone) == 1 else "classes have"
    return [f"{len(alone)} {have} queries and no database row: {_first(alone)}"] if alone and database else []


def _equal_names(kind: str, groups: Sequence[Sequence[str]]) -> list[str]:
    pairs = [" = ".join(map(repr, group)) for group in groups]
    if not pairs:
        return []
    return [f"names of {kind} that differ only in case or in how accents are encoded: {_first(pairs)}"]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counter.items()))


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")

"""The pages of a duplicates report: the largest groups, each with its images, some groups a page. No Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from hashray.data.corpus import Corpus, iterate_bytes
from hashray.report.page import Table, render, thumbnail

IMAGES = 10  # of a group on a page
CROWDED = 0.2  # share of rows whose code is not theirs alone; above, the pages warn
RADII = 12  # rows of the table of radii


@dataclass(frozen=True)
class Shown:
    """A group on a page: its number, its kind, all its rows and those that are shown."""

    number: int
    kind: str
    rows: int
    cards: list[dict[str, Any]]


def page_name(number: int) -> str:
    """The name of a page, which the others link to.

    >>> page_name(0), page_name(1)
    ('report.html', 'report-0002.html')
    """
    return f"report-{number + 1:04d}.html" if number else "report.html"


def draw_pages(
    corpus: Corpus | None, groups: pa.Table, summary: Mapping[str, Any], groups_per_page: int, most: int
) -> dict[str, bytes]:
    """The pages by name, `report.html` first.

    Args:
        corpus: where the images are; None: the pages name the rows.
        groups: the table of groups, as hashray/index/tables.py makes it; the largest first.
        summary: what summary.json holds.
        groups_per_page: groups on one page.
        most: pages at most.
    """
    shown = list(_shown(groups, groups_per_page * most))
    ids = {card["id"] for group in shown for card in group.cards}
    thumbnails = {} if corpus is None else _thumbnails(corpus, ids)
    pages = [shown[start : start + groups_per_page] for start in range(0, len(shown), groups_per_page)] or [[]]
    names = [page_name(number) for number in range(len(pages))]
    facts = {
        "summary": summary, "warning": crowded(summary), "tiles": _tiles(summary), "radii": _radii(summary),
        "names": names, "thumbnails": thumbnails, "pictures": corpus is not None,
        "left": summary["groups"] - len(shown),
    }  # fmt: skip
    return {
        name: render("duplicates.html", groups=some, number=number, **facts).encode()
        for number, (name, some) in enumerate(zip(names, pages, strict=True))
    }


def crowded(summary: Mapping[str, Any]) -> str | None:
    """A warning where codes do not tell images apart: many rows share their code with another."""
    share = summary["rows_with_equal_codes"] / max(1, summary["rows"])
    if share <= CROWDED:
        return None
    return (
        f"{share:.0%} of the rows share their code with another row. Such codes name kinds of images, not images: look "
        "at the groups before you remove anything. More bits, or a model trained without labels, tell images apart"
    )


def _shown(groups: pa.Table, most: int) -> Iterator[Shown]:
    numbers = groups.column("group").to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))[: most + 1].tolist()
    ends = [*starts[1:], len(numbers)][: len(starts)]
    for number, (start, end) in enumerate(list(zip(starts, ends, strict=True))[:most]):
        # A row that is kept is shown, wherever it stands among the others.
        order = [("kept", "descending"), ("distance", "ascending"), ("id", "ascending")]
        some = groups.slice(start, end - start).sort_by(order)
        yield Shown(number, some.column("kind")[0].as_py(), end - start, some.slice(0, IMAGES).to_pylist())


def _thumbnails(corpus: Corpus, ids: set[str]) -> dict[str, bytes | None]:
    """PNG bytes by id; one part of images in memory at a time."""
    return {
        row_id: thumbnail(data if isinstance(data, bytes) else None)
        for table in corpus.chosen("all", ids)
        for row_id, data in iterate_bytes(table)
    }


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        ("groups", f"{summary['groups']:,}"),
        ("exact groups", f"{summary['exact_groups']:,}"),
        ("near groups", f"{summary['near_groups']:,}"),
        ("rows beside those that stay", f"{summary['rows_not_kept']:,}"),
    ]
    if summary["leaks"] is not None:
        tiles.append(("query rows near a train row", f"{summary['leaks']:,}"))
    return tiles


def _radii(summary: Mapping[str, Any]) -> Table:
    neighbours = summary["neighbours_by_radius"]
    first = max(0, min(summary["within"] + 2, len(neighbours)) - RADII)
    rows = [[str(radius), f"{count:,.4f}"] for radius, count in enumerate(neighbours)][first : first + RADII]
    return Table(("radius in bits", "neighbours of a code"), rows, summary["within"] - first)

"""The pages of a duplicates report, without a corpus: which groups and rows they show, and when they warn."""

from __future__ import annotations

import re

import pyarrow as pa

from hashray.report.duplicates import IMAGES, crowded, draw_pages

SUMMARY = {
    "rows": 1000, "codes": 900, "num_bits": 64, "within": 3, "within_because": "it was asked for", "sample": 900,
    "neighbours_by_radius": [0.0, 0.1, 0.5, 0.9, 2.0], "keep": "first", "groups": 5, "exact_groups": 1,
    "near_groups": 4, "rows_in_groups": 24, "rows_not_kept": 19, "pairs": 20, "leaks": None, "exact_leaks": None,
    "rows_with_equal_codes": 100,
}  # fmt: skip


def groups():
    rows = []
    for group, size in enumerate((15, 3, 2, 2, 2)):
        rows += [
            {"group": group, "id": f"<{group}>/{n:02d}", "distance": min(n, 3), "kept": n == size - 1, "kind": "near"}
            for n in range(size)
        ]
    return pa.Table.from_pylist(rows)


def shown(page):
    return re.findall(r'title="([^"]+)"', page)


def test_each_page_has_its_groups_and_the_row_that_stays_comes_first():
    pages = {name: data.decode() for name, data in draw_pages(None, groups(), SUMMARY, 2, 2).items()}
    assert list(pages) == ["report.html", "report-0002.html"]
    first, second = pages.values()
    ids = shown(first)
    assert len(ids) == IMAGES + 3 and ids[:2] == ["&lt;0&gt;/14", "&lt;0&gt;/00"] and ids[IMAGES] == "&lt;1&gt;/02"
    assert f"and {15 - IMAGES} more" in first and "and 0 more" not in first
    assert shown(second)[0] == "&lt;2&gt;/01" and len(shown(second)) == 4
    assert "1 smaller groups are in the tables only" in second and "<table>" not in second
    assert "The radius" in first and re.search(r'<tr class="ours"><td>3</td><td>0.9000</td>', first)


def test_an_empty_report_is_a_page():
    empty = {**SUMMARY, "groups": 0}
    (page,) = draw_pages(None, groups().slice(0, 0), empty, 2, 2).values()
    assert b"No two rows are within the radius." in page


def test_codes_that_name_kinds_of_images_are_warned_of():
    many = {**SUMMARY, "rows_with_equal_codes": 690}
    assert crowded(SUMMARY) is None and str(crowded(many)).startswith("69% of the rows share their code")
    assert b"Careful:" in draw_pages(None, groups(), many, 2, 1)["report.html"]
    assert b"Careful:" not in draw_pages(None, groups(), SUMMARY, 2, 1)["report.html"]

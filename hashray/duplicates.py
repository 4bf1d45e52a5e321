"""[Ray] `hashray index duplicates`: the search of the index room with the pages of the report room."""

from __future__ import annotations

from functools import partial

from hashray.artifact import Manifest
from hashray.index.duplicates import DuplicatesConfig, find_duplicates
from hashray.progress import say, show_table
from hashray.report.duplicates import crowded, draw_pages
from hashray.storage import join


def duplicates(config: DuplicatesConfig) -> Manifest:
    """Find the duplicates of an index, write tables and pages, print what there is; as `find_duplicates`."""
    draw = partial(draw_pages, groups_per_page=config.groups_per_page, most=config.pages)
    manifest = find_duplicates(config, draw)
    summary = manifest.info
    rows = [
        ["groups of equal codes", f"{summary['exact_groups']:,}"],
        ["groups of near codes", f"{summary['near_groups']:,}"],
        ["rows in groups", f"{summary['rows_in_groups']:,} of {summary['rows']:,}"],
        ["rows beside those that stay", f"{summary['rows_not_kept']:,}"],
    ]
    if summary["leaks"] is not None:
        rows.append(["query rows near a train row", f"{summary['leaks']:,} ({summary['exact_leaks']:,} equal)"])
    show_table(f"within {summary['within']} of {summary['num_bits']} bits", ["duplicates", "number"], rows)
    if crowded(summary):
        say(f"note: {crowded(summary)}")
    if summary["leaks"] == 0:
        say("note: no query row is near a train row; an index holds both only if `hashray encode` had --split all")
    say(f"the page: {join(config.out, 'report.html')}")
    return manifest

"""The pages of reports in a browser: a click on a header sorts, numbers as numbers; they fit a phone; axe is silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from hashray.report import drawn, figures
from hashray.report.page import Table, render

pytestmark = pytest.mark.browser

ROWS = [
    ["dseh", "32", "0.9", "1,500 of 2,000", "9.5%"],
    ["Adala", "128", "-", "90 of 2,000", "10.0%"],
    ["itq", "float", "0.1234 ± 0.01", "200 of 2,000", "-1.5%"],
    ["lsh", "8", "1e-3", "200 of 2,000", "0.0%"],
]
ASCENDING = {
    "name": ["Adala", "dseh", "itq", "lsh"],
    "bits": ["lsh", "dseh", "Adala", "itq"],
    "score": ["lsh", "itq", "dseh", "Adala"],
    "rows": ["Adala", "itq", "lsh", "dseh"],
    "share": ["itq", "lsh", "dseh", "Adala"],
}
DESCENDING = {
    "name": ["lsh", "itq", "dseh", "Adala"],
    "bits": ["Adala", "dseh", "lsh", "itq"],  # what is no number stays last
    "score": ["dseh", "itq", "lsh", "Adala"],
    "rows": ["dseh", "itq", "lsh", "Adala"],  # equal ones keep their order
    "share": ["Adala", "dseh", "lsh", "itq"],
}


@pytest.fixture
def report(tmp_path: Path) -> str:
    """The url of a page with a table of four rows, a table of one, and a figure."""
    picture = drawn.draw(figures.distances({"relevant": [0.5, 0.5], "other": [0.1, 0.9]}, "dseh"))
    summary = {"trials": 1, "stopped": 0, "failed": [], "epochs": 1, "epochs_of_full_grid": 3, "importance": {}}
    text = render(
        "sweep.html", summary=summary, trials=4, figures={"distances": picture}, schedule=None, compared=None,
        leaderboard=Table(list(ASCENDING), ROWS, marked=0), failed=Table(["trial", "reason"], [["7", "none"]]),
    )  # fmt: skip
    file = tmp_path / "report.html"
    file.write_text(text)
    return file.as_uri()


def names(page: Page) -> list[str]:
    return page.locator("table").first.locator("tbody tr td:first-child").all_text_contents()


@pytest.mark.parametrize("column", list(ASCENDING))
def test_a_header_sorts_up_and_then_down(open_page, report: str, column: str) -> None:
    page = open_page(report)
    header = page.get_by_role("columnheader", name=column, exact=True)
    assert header.get_attribute("aria-sort") == "none" and names(page) == [row[0] for row in ROWS]
    header.get_by_role("button").click()
    assert names(page) == ASCENDING[column] and header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").press("Enter")
    assert names(page) == DESCENDING[column] and header.get_attribute("aria-sort") == "descending"
    assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1
    assert page.locator("tr.ours td").first.text_content() == "dseh"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1180])
def test_the_page_fits_and_axe_finds_nothing(open_page, report: str, scheme: str, width: int) -> None:
    page = open_page(report, width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("table").nth(1).locator("button").count() == 0
    assert [fault["id"] for fault in Axe().run(page).response["violations"]] == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = np.mean([int(number) for number in paper.strip("rgb()").split(",")])
    assert (light > 200) == (scheme == "light") and (light < 60) == (scheme == "dark")

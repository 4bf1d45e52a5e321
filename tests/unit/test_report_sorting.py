"""The tables of the pages in a browser: a click on a header sorts, numbers as numbers; the page fits a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hashray.report.page import Table, render

sync_api = pytest.importorskip("playwright.sync_api")
BROWSERS = [path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
            if Path(path).exists()]  # fmt: skip
pytestmark = pytest.mark.skipif(not BROWSERS, reason="no Chromium on this machine")

ROWS = [
    ["dseh", "32", "0.9", "1,500 of 2,000", "9.5%"],
    ["Adala", "128", "-", "90 of 2,000", "10.0%"],
    ["itq", "float", "0.1234 ± 0.01", "200 of 2,000", "-1.5%"],
    ["lsh", "8", "1e-3", "200 of 2,000", "0.0%"],
]
EXPECTED = {
    "name": ["Adala", "dseh", "itq", "lsh"],
    "bits": ["lsh", "dseh", "Adala", "itq"],
    "score": ["lsh", "itq", "dseh", "Adala"],
    "rows": ["Adala", "itq", "lsh", "dseh"],  # equal ones keep their order
    "share": ["itq", "lsh", "dseh", "Adala"],
}
DESCENDING = {**{name: order[::-1] for name, order in EXPECTED.items()},
              "bits": ["Adala", "dseh", "lsh", "itq"], "score": ["dseh", "itq", "lsh", "Adala"],
              "rows": ["dseh", "itq", "lsh", "Adala"]}  # fmt: skip  # what is no number stays last


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sync_api.Page]:
    summary = {"trials": 1, "stopped": 0, "failed": [], "epochs": 1, "epochs_of_full_grid": 3, "importance": {}}
    text = render(
        "sweep.html", summary=summary, trials=4, figures={}, schedule=None, compared=None,
        leaderboard=Table(list(EXPECTED), ROWS, marked=0), failed=Table(["trial", "reason"], [["7", "none"]]),
    )  # fmt: skip
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(text)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSERS[0], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto(file.as_uri())
        yield page
        browser.close()


def names(page: sync_api.Page) -> list[str]:
    return page.locator("table").first.locator("tbody tr td:first-child").all_text_contents()


@pytest.mark.parametrize("column", list(EXPECTED))
def test_a_header_sorts_up_and_then_down(page: sync_api.Page, column: str) -> None:
    page.reload()
    header = page.get_by_role("columnheader", name=column, exact=True)
    assert header.get_attribute("aria-sort") == "none" and names(page) == [row[0] for row in ROWS]
    header.get_by_role("button").click()
    assert names(page) == EXPECTED[column] and header.get_attribute("aria-sort") == "ascending"
    header.get_by_role("button").press("Enter")
    assert names(page) == DESCENDING[column] and header.get_attribute("aria-sort") == "descending"
    assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1
    assert page.locator("tr.ours td").first.text_content() == "dseh"


def test_a_table_of_one_row_has_no_buttons_and_the_page_fits_a_phone(page: sync_api.Page) -> None:
    assert page.locator("table").nth(1).locator("button").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

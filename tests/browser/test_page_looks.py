"""How the search page looks: no violation that axe knows, no scrolling sideways, nothing that jumps."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from serving import behind_socket, config_of, write_all

import hashray
from hashray.duplicates import duplicates
from hashray.index.duplicates import DuplicatesConfig
from hashray.search.guard import SafetyConfig

pytestmark = pytest.mark.browser

WIDTHS = (390, 1280)
VIEWS = {
    "empty": ("", "#start-rows img.there"),
    "results": ("?id=0001", "#answers img.there"),
    "beside": ("?id=0001&against=main@3", ".column img.there"),
    "nothing": ("?id=0001&within=0&where=number+%3E+58", "#state .message"),
    "error": ("?id=0001&where=x+%3D", "#state .error"),
    "duplicates": ("?view=duplicates", "#groups img.there"),
}
SHIFTS = """window.shifts = [];
new PerformanceObserver((list) => list.getEntries().forEach((entry) => shifts.push([
    entry.value, ...entry.sources.map(({node}) => node?.id || node?.className || node?.nodeName)
]))).observe({type: "layout-shift", buffered: true});"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ray_session):
    """A service with everything."""
    folder = tmp_path_factory.mktemp("whole")
    at, report = write_all(folder), str(folder / "report")
    duplicates(DuplicatesConfig(index=at["index"], out=report, within=1))
    with behind_socket(config_of(at, duplicates=report)) as (url, _):
        yield url


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious_and_the_page_fits(open_page, whole, view, scheme, width):
    address, ready = VIEWS[view]
    # Without motion: what fades in has no colour of its own yet.
    page = open_page(f"{whole}/{address}", width, color_scheme=scheme, reduced_motion="reduce")
    expect(page.locator(ready).first).to_be_visible()
    if view == "duplicates":
        page.get_by_role("button", name="Keep the best of each").click()
    if view == "results":
        check(page, width)
        page.get_by_role("button", name="Details").first.click()
    check(page, width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_dialog_and_the_notice(open_page, tmp_path, scheme):
    at = write_all(tmp_path)
    (tmp_path / "token").write_text("s3cret")
    with behind_socket(config_of(at, safety=SafetyConfig(token_file=str(tmp_path / "token")))) as (url, service):
        page = open_page(f"{url}/?id=0001", 390, color_scheme=scheme, reduced_motion="reduce")
        dialog = page.get_by_role("dialog", name="This service asks for a token")
        expect(dialog).to_be_visible()
        check(page, 390)
        dialog.get_by_label("Token").fill("s3cret")
        dialog.get_by_role("button", name="Continue").click()
        expect(page.locator("#answers img.there").first).to_be_visible()
        assert hashray.open_catalog(at["index"]).delete(["0002"]) == 5 and service.indexes["main"].refresh()
        expect(page.locator("#toast")).to_contain_text("Version 5 is now served")
        check(page, 390)


def check(page, width):
    grave = [
        f"{fault['id']}: {node['html'][:160]} {node['failureSummary']}"
        for fault in Axe().run(page).response["violations"]
        for node in fault["nodes"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert not grave, grave
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("view", ["empty", "results", "duplicates"])
def test_nothing_jumps_while_the_page_loads(open_page, whole, view, width):
    address, ready = VIEWS[view]
    page = open_page(f"{whole}/{address}", width)
    page.add_init_script(SHIFTS)
    page.reload()
    expect(page.locator(ready).first).to_be_visible()
    shifts = page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(shifts))))")
    assert sum(shift for shift, *_ in shifts) < 0.02, shifts  # 0.1 is what the Web Vitals call good

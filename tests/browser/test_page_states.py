"""What the search page shows when something is wrong or slow: each comes from the real service."""

from __future__ import annotations

import io
import re
import threading

import pytest
from browsing import answer_pairs, drop
from PIL import Image
from playwright.sync_api import expect
from serving import behind_socket, config_of
from tiny import png

from hashray.search.guard import SafetyConfig
from hashray.search.limits import LimitsConfig
from hashray.search.nearest import Nearest
from hashray.search.opening import FleetConfig, open_here, open_service

pytestmark = pytest.mark.browser


class Hindered:
    """An open index that can be held up, or lack shards."""

    def __init__(self, opened):
        self.opened, self.facts, self.missing, self.free = opened, opened.facts, 0, threading.Event()
        self.free.set()

    def search(self, codes, k, where):
        assert self.free.wait(120)
        answer = self.opened.search(codes, k, where)
        return Nearest(answer.ids, answer.distances, self.missing)

    def describe(self, ids, near):
        return self.opened.describe(ids, near)


def hindered(at, **config):
    """The config of a service, the service, and its index."""
    made_of = config_of(at, **config)
    service = open_service(made_of, lambda store, version: Hindered(open_here(store, version)))
    return made_of, service, service.indexes["main"].at()


def test_a_token_is_asked_for_once(open_page, at, tmp_path, nearest):
    (tmp_path / "token").write_text("s3cret")
    with behind_socket(config_of(at, safety=SafetyConfig(token_file=str(tmp_path / "token")))) as (url, _):
        page = open_page(f"{url}/?id=0001")
        dialog = page.get_by_role("dialog", name="This service asks for a token")
        dialog.get_by_label("Token").fill("wrong")
        dialog.get_by_role("button", name="Continue").click()
        expect(dialog).to_contain_text("refused that token")
        dialog.get_by_label("Token").fill("s3cret")
        dialog.get_by_label("Token").press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#answers img.there").first).to_be_visible()
        assert page.locator("#answers img.there").first.get_attribute("src").startswith("blob:")
        assert answer_pairs(page) == nearest(1)[:10]
        assert "s3cret" not in page.url
        with page.expect_popup() as popup:
            page.get_by_role("link", name="Original").first.click()
        expect(popup.value.locator("img")).to_have_attribute("src", re.compile("^blob:"))
        page.reload()
        expect(page.locator("#answers img.there").first).to_be_visible()
        expect(dialog).to_be_hidden()

        other = open_page(url)
        other.get_by_role("button", name="Cancel").click()
        expect(other.get_by_role("alert")).to_contain_text("A token is needed")


def test_a_busy_service_is_asked_again(open_page, at):
    config = config_of(at)
    service = open_service(config)
    with behind_socket(config, service) as (url, _):
        page = open_page(url)
        expect(page.locator("#served")).to_contain_text("version 4")
        with service.admission.work(config.limits.queries):
            drop(page, "one.png", png(1))
            expect(page.locator("#state")).to_contain_text("The server is busy")
            expect(page.locator("#state")).to_contain_text("Trying again in 1 second")
        expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)
        expect(page.locator("#state")).to_be_empty()
        expect(page.locator("#answers img.there")).to_have_count(10)


def test_a_service_that_cannot_answer_yet_is_waited_for(open_page, at):
    config, service, index = hindered(at)
    index.missing = 1
    with behind_socket(config, service) as (url, _):
        page = open_page(f"{url}/?id=0001")
        expect(page.locator("#state")).to_contain_text("The server cannot answer yet")
        expect(page.locator("#state")).to_contain_text("1 shards of the index do not answer")
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("alert")).to_contain_text("cancelled")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#note")).to_have_text("Waiting for the server")
        index.missing = 0
        expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)
        expect(page.locator("#state")).to_be_empty()


def test_an_answer_that_lacks_shards_says_so(open_page, at):
    config, service, index = hindered(at, fleet=FleetConfig(partial=True))
    index.missing = 2
    with behind_socket(config, service) as (url, _):
        page = open_page(f"{url}/?id=0001")
        expect(page.locator("#state")).to_contain_text("This answer is not complete")
        expect(page.locator("#state")).to_contain_text("2 shards of main, version 4 did not answer")
        expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)
        index.missing = 0
        page.get_by_role("button", name="Search again").click()
        expect(page.locator("#state")).to_be_empty()


def test_a_slow_answer_has_a_note_and_a_late_one_an_error(open_page, at):
    config, service, index = hindered(at, limits=LimitsConfig(timeout_s=4.0))
    with behind_socket(config, service) as (url, _):
        page = open_page(url)
        expect(page.locator("#start-rows .card")).to_have_count(12)
        index.free.clear()
        drop(page, "one.png", png(1))
        expect(page.locator("#note")).to_contain_text("Still searching, 1 s so far")
        expect(page.locator("#bar")).to_be_visible()
        expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
        expect(page.get_by_role("alert")).to_contain_text("The search took too long")
        index.free.set()
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)


def test_a_service_that_is_gone_is_said(open_page, at):
    with behind_socket(config_of(at)) as (url, _):
        page = open_page(f"{url}/?id=0001")
        expect(page.locator("#answers img.there")).to_have_count(10)
    page.locator(".card .picture").nth(1).click()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    expect(page.locator("#served")).to_have_text("The server does not answer")


@pytest.mark.parametrize(
    ("address", "title", "text"),
    [
        ("?id=none+such", "Not there", "'none such' is not in version 4"),
        ("?id=0001&where=class+%3D+cat", "This search cannot be done", "where"),
        ("?code=00", "This search cannot be done", "the code has 8 bits"),
        ("?id=0001&version=99", "This search cannot be done", "there are 1 to 4"),
    ],
)
def test_what_cannot_be_answered_is_said(open_page, url, address, title, text):
    page = open_page(f"{url}/{address}")
    expect(page.get_by_role("alert")).to_contain_text(title)
    expect(page.get_by_role("alert")).to_contain_text(text)
    if text == "where":
        expect(page.get_by_label("Filter")).to_have_attribute("aria-invalid", "true")
        page.get_by_label("Filter").fill("class == 'cat'")
        page.get_by_label("Filter").press("Enter")
        expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)
        expect(page.get_by_role("alert")).to_have_count(0)


def test_nothing_near_is_said(open_page, url):
    page = open_page(f"{url}/?id=0001&within=0&where=number+%3E+58")
    expect(page.locator("#state")).to_contain_text("No row is near enough")
    page.get_by_role("button", name="Search without radius and filter").click()
    expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)


def test_files_that_are_no_images_are_refused(open_page, url):
    page = open_page(url)
    drop(page, "report.pdf", b"%PDF-1.7", "application/pdf")
    expect(page.get_by_role("alert")).to_contain_text("report.pdf is not an image")
    drop(page, "broken.png", b"\x89PNG\r\n\x1a\n broken")
    expect(page.get_by_role("alert")).to_contain_text("cannot be used as a query")


def test_an_image_above_the_limits_is_made_smaller(open_page, at):
    sink = io.BytesIO()
    Image.effect_noise((2400, 2400), 80).convert("RGB").save(sink, "JPEG", quality=95)
    assert len(sink.getvalue()) > 1 << 20
    with behind_socket(config_of(at, limits=LimitsConfig(body_mib=1, pixels=4_000_000))) as (url, _):
        page = open_page(url)
        page.locator("#pick").set_input_files(
            {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": sink.getvalue()}
        )
        expect(page.locator("#answers .card:not(.skeleton)")).to_have_count(10)

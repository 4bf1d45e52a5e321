"""Headless Chromium, and the real service of a tiny corpus that it looks at."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from serving import ROWS, behind_socket, config_of, write_all
from tiny import png

import hashray
from hashray.codes import hamming
from hashray.data.images import decode

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Long enough for a machine on which everything else runs too; nothing waits so long where it works.
PATIENCE_MS = 30_000


def answer_pairs(page: Page, selector: str = "#answers") -> list[tuple[int, str]]:
    """Distance and id of each card, in the order of the page."""
    cards = page.locator(f"{selector} .card:not(.skeleton)")
    return [
        (int(card.locator(".distance strong").inner_text()), card.locator(".id").inner_text()) for card in cards.all()
    ]


def drop(page: Page, name: str, data: bytes, kind: str = "image/png") -> None:
    """Drop a file on the page, as a mouse does."""
    transfer = page.evaluate_handle(
        """([name, kind, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, {type: kind}));
            return transfer;
        }""",
        [name, kind, list(data)],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser | None]:
    """Chromium, or None where this machine has none.

    Of one module: Playwright leaves an event loop running in this thread, in which no other test could start one.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        yield None
        return
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser | None, request: pytest.FixtureRequest) -> Iterator[Callable[..., Page]]:
    """Opens pages in contexts of their own; a script error, or anything that the content policy stops, is a failure."""
    if browser is None:
        text = f"no {' or '.join(NAMES)} on the PATH: apt-get install -y chromium"
        if request.node.get_closest_marker("browser"):
            pytest.fail(text)
        pytest.skip(text)
    faults: list[str] = []

    def listen(page: Page) -> None:
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)

    with ExitStack() as stack:

        def opens(url: str, width: int = 1280, **context: Any) -> Page:
            touch = width < 500
            made_for: BrowserContext = browser.new_context(
                viewport={"width": width, "height": 844}, is_mobile=touch, has_touch=touch, **context
            )
            stack.callback(made_for.close)
            made_for.set_default_timeout(PATIENCE_MS)
            page = made_for.new_page()
            listen(page)
            page.goto(url)
            return page

        yield opens
    assert not faults, faults


@pytest.fixture(scope="session")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of a corpus, its model and its index."""
    return write_all(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def url(at: dict[str, str]) -> Iterator[str]:
    """A service that no test changes."""
    with behind_socket(config_of(at)) as (url, _):
        yield url


@pytest.fixture(scope="session")
def nearest(at: dict[str, str]) -> Callable[..., list[tuple[int, str]]]:
    """A naive search: (distance, id) of all rows by the number of a row's image."""
    model = hashray.load_model(at["model"])
    codes = np.asarray(model.encode([decode(png(i)) for i in range(ROWS)]))

    def search(number: int, keep: Callable[[int], bool] = lambda i: True) -> list[tuple[int, str]]:
        distances = hamming(codes[number][None], codes)[0].tolist()
        return sorted((distances[i], f"{i:04d}") for i in range(ROWS) if keep(i))

    return search

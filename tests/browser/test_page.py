"""The search page in a browser: an image is dropped, its neighbours are the right ones, a click searches on."""

from __future__ import annotations

import re

from browsing import answer_pairs, drop
from playwright.sync_api import expect
from tiny import CLASSES, png


def test_an_image_is_dropped_and_a_result_is_clicked(open_page, url, nearest):
    page = open_page(url)
    drop(page, "seven.png", png(7))
    expect(page.locator("#note")).to_contain_text("10 of 60 rows")
    expect(page.locator("#live")).to_contain_text("10 results")
    assert answer_pairs(page) == nearest(7)[:10]
    expect(page.locator("#query-name")).to_contain_text("seven.png")
    expect(page).to_have_url(re.compile(r"\?code=[0-9a-f]{4}$"))

    second = nearest(7)[1][1]
    card = page.locator(".card").nth(1)
    expect(card.locator(".badge")).to_have_text(CLASSES[int(second) % 3])
    original = page.request.get(f"{url}/{card.get_by_role('link', name='Original').get_attribute('href')}")
    assert original.body() == png(int(second))

    card.get_by_role("button", name=f"Search by {second}").click()
    expect(page).to_have_url(f"{url}/?id={second}")
    expect(page.locator("#query-name")).to_contain_text(second)
    expect(page.locator(".card .distance").first).to_have_text("0 bits")
    assert answer_pairs(page) == nearest(int(second))[:10]
    page.go_back()
    expect(page.locator("#query-name")).to_contain_text("seven.png")
    assert answer_pairs(page) == nearest(7)[:10]

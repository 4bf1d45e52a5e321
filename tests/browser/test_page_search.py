"""The search page at work: options, addresses, versions, two answers, duplicates, keys alone."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from browsing import answer_pairs, drop
from playwright.sync_api import expect
from serving import ROWS, behind_socket, config_of, write_all
from tiny import CLASSES, png, write_tiny_model

import hashray
from hashray.cli import main
from hashray.data.images import decode
from hashray.duplicates import duplicates
from hashray.index.duplicates import DuplicatesConfig
from hashray.search.opening import open_service

pytestmark = pytest.mark.browser


def test_k_radius_and_filter(open_page, url, nearest):
    page = open_page(f"{url}/?id=0005")
    expect(page.locator(".card:not(.skeleton)")).to_have_count(10)
    page.get_by_label("How many").fill("4")
    page.get_by_label("Filter").fill("class == 'bee'")
    page.get_by_label("Filter").press("Enter")
    expect(page).to_have_url(f"{url}/?id=0005&k=4&where=class+%3D%3D+%27bee%27")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    assert answer_pairs(page) == nearest(5, lambda i: i % 3 == 1)[:4]
    page.get_by_label("Filter").fill("")
    page.get_by_label("How many").fill("60")
    page.get_by_label("Radius in bits").fill("1")
    page.get_by_label("Radius in bits").press("Enter")
    near = [pair for pair in nearest(5) if pair[0] <= 1]
    expect(page.locator("#note")).to_contain_text(f"{len(near)} of 60 rows")
    assert answer_pairs(page) == near
    expect(page).to_have_url(f"{url}/?id=0005&k=60&within=1")


def test_a_class_filters_by_a_click(open_page, url, nearest):
    page = open_page(f"{url}/?id=0005")
    page.locator(".card .badge", has_text="cat").first.click()
    expect(page.get_by_label("Filter")).to_have_value("class == 'cat'")
    expect(page.locator(".card .badge").first).to_have_text("cat")
    expect(page).to_have_url(re.compile("where=class"))
    assert answer_pairs(page) == nearest(5, lambda i: i % 3 == 2)[:10]


def test_more_comes_by_the_button_and_by_scrolling_to_the_end(open_page, url, nearest):
    page = open_page(f"{url}/?id=0005&k=12")
    expect(page.locator(".card:not(.skeleton)")).to_have_count(12)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator("#live")).to_have_text("24 results shown")
    cards = page.locator(".card:not(.skeleton)")
    while (count := cards.count()) < ROWS:
        cards.last.scroll_into_view_if_needed()
        page.mouse.wheel(0, 4000)
        expect(cards).not_to_have_count(count)
    expect(page.locator("#tail-note")).to_have_text("That is all.")
    assert answer_pairs(page) == nearest(5)
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()


def test_a_shared_address_gives_the_same_page_and_back_works(open_page, url):
    first = open_page(f"{url}/?id=0009&k=5&where=number+%3C+30")
    expect(first.locator(".card:not(.skeleton)")).to_have_count(5)
    expect(first.get_by_label("Filter")).to_have_value("number < 30")
    seen = answer_pairs(first)
    first.locator(".card .picture").nth(2).click()
    expect(first.locator("#query-name")).to_contain_text(seen[2][1])
    second = open_page(first.url)
    expect(second.locator(".card:not(.skeleton)")).to_have_count(5)
    assert answer_pairs(second) == answer_pairs(first)
    first.go_back()
    expect(first.locator("#query-name")).to_contain_text("0009")
    assert answer_pairs(first) == seen
    first.get_by_role("button", name="Clear").click()
    expect(first.get_by_label("Earlier searches").get_by_role("link")).to_have_count(2)
    first.get_by_role("link", name="Search by 0009 again").click()
    expect(first.locator("#query-name")).to_contain_text("0009")
    assert answer_pairs(first) == seen


def test_an_image_is_picked_pasted_or_photographed(open_page, url, nearest):
    page = open_page(url)
    photograph = page.locator("input[capture=environment][accept='image/*']")
    for number, name in ((3, "pick"), (4, "photograph")):
        chosen = page.locator("#pick") if name == "pick" else photograph
        chosen.set_input_files({"name": f"{name}.png", "mimeType": "image/png", "buffer": png(number)})
        expect(page.locator("#query-name")).to_contain_text(f"{name}.png")
        expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
        assert answer_pairs(page) == nearest(number)[:10]
    page.evaluate(
        """(bytes) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], "pasted.png", {type: "image/png"}));
            document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
        }""",
        list(png(11)),
    )
    expect(page.locator("#query-name")).to_contain_text("pasted.png")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    assert answer_pairs(page) == nearest(11)[:10]


def test_a_new_version_is_announced_and_used_without_a_refresh(open_page, tmp_path):
    at = write_all(tmp_path)
    with behind_socket(config_of(at)) as (url, service):
        page = open_page(f"{url}/?id=0001")
        expect(page.locator("#served")).to_contain_text("version 4 · 60 rows")
        page.evaluate("window.same = true")
        gone = answer_pairs(page)[1][1]
        assert hashray.open_catalog(at["index"]).delete([gone]) == 5 and service.indexes["main"].refresh()
        expect(page.locator("#toast")).to_contain_text("Version 5 is now served")
        expect(page.locator("#live")).to_contain_text("Version 5 is now served")
        expect(page.locator("#served")).to_contain_text("version 5 · 59 rows")
        assert gone in [name for _, name in answer_pairs(page)]  # what is on the page stays until it is asked again
        page.locator("#toast").get_by_role("button", name="Search again").click()
        expect(page.locator("#note")).to_contain_text("main, version 5")
        assert gone not in [name for _, name in answer_pairs(page)] and page.evaluate("window.same")
        page.get_by_label("Search in").select_option("main@4")
        expect(page.locator("#note")).to_contain_text("main, version 4")
        assert gone in [name for _, name in answer_pairs(page)]
        expect(page).to_have_url(re.compile("version=4"))


def test_two_models_beside_each_other(open_page, tmp_path):
    at = write_all(tmp_path / "a")
    other = {"model": str(tmp_path / "model"), "index": str(tmp_path / "index")}
    write_tiny_model(other["model"], seed=1)
    model = hashray.load_model(other["model"])
    catalog = hashray.create_index(other["index"], num_bits=model.num_bits, fingerprint=model.fingerprint)
    catalog.append([f"{i:04d}" for i in range(40)], model.encode([decode(png(i)) for i in range(40)]))
    config = config_of(at, compare=other["index"], compare_model=other["model"])
    with behind_socket(config) as (url, _):
        page = open_page(url)
        page.get_by_label("Side by side with").select_option("compare@")
        drop(page, "two.png", png(2))
        expect(page.locator("#note")).to_contain_text("of 10 results in both")
        expect(page.locator(".column h3")).to_have_text(["main, version 4", "compare, version 2"])
        sides = [[pair[1] for pair in answer_pairs(page, f".column:nth-child({n})")] for n in (1, 2)]
        for name, ids in zip(("main", "compare"), sides, strict=True):
            answer = page.request.post(
                f"{url}/search?index={name}", data=png(2), headers={"Content-Type": "image/png"}
            ).json()
            assert ids == [hit["id"] for hit in answer["hits"]]
        both = len(set(sides[0]) & set(sides[1]))
        expect(page.locator("#note")).to_have_text(f"{both} of 10 results in both")
        expect(page.locator(".column:first-child .card.alone")).to_have_count(10 - both)
        shared = page.url
        page.get_by_role("button", name="Show more").click()
        expect(page.locator("#note")).to_contain_text("of 20 results in both")

        alone = open_page(shared)  # the image stayed behind, and a code is of one model
        expect(alone.get_by_role("alert")).to_contain_text("A code belongs to one model")
        alone.get_by_label("Side by side with").select_option("main@3")
        expect(alone.locator(".column h3")).to_have_text(["main, version 4", "main, version 3"])


def test_two_versions_beside_each_other_by_a_row_that_only_one_has(open_page, url, nearest):
    page = open_page(f"{url}/?id=0059&against=main@3")  # version 3 ends at row 0039
    expect(page.locator(".column h3")).to_have_text(["main, version 4", "main, version 3"])
    assert answer_pairs(page, ".column:nth-child(1)") == nearest(59)[:10]
    assert answer_pairs(page, ".column:nth-child(2)") == nearest(59, lambda i: i < 40)[:10]


def test_duplicates_are_ticked_exported_and_deleted(open_page, tmp_path, ray_session):
    at = write_all(tmp_path)
    report = str(tmp_path / "report")
    duplicates(DuplicatesConfig(index=at["index"], out=report, within=1))
    with behind_socket(config_of(at, duplicates=report)) as (url, service):
        page = open_page(f"{url}/?id=0001")
        page.get_by_role("link", name="Duplicates").click()
        expect(page.locator("#duplicates-lead")).to_contain_text("within 1 bit of each other")
        answer = page.request.get(f"{url}/duplicates").json()
        first, second = answer["groups"][:2]
        page.get_by_role("button", name="Keep the best of group 1", exact=True).click()
        goes = {member["id"] for member in first["members"] if not member["keep"]}
        expect(page.locator("#basket-count")).to_contain_text(f"{len(goes)} row")
        chosen = second["members"][0]["id"]
        page.get_by_label(f"Delete {chosen}", exact=True).check()
        for member in second["members"][1:]:
            page.get_by_label(f"Delete {member['id']}", exact=True).check()
        expect(page.locator(".all-go").nth(1)).to_be_visible()
        for member in second["members"][1:]:
            page.get_by_label(f"Delete {member['id']}", exact=True).uncheck()
        expect(page.locator(".all-go").nth(1)).to_be_hidden()
        with page.expect_download() as download:
            page.get_by_role("button", name="Export the list of ids").click()
        listed = tmp_path / download.value.suggested_filename
        download.value.save_as(listed)
        assert set(listed.read_text().splitlines()) == goes | {chosen}
        assert main(["index", "delete", at["index"], "--ids", str(listed)]) == 0
        assert service.indexes["main"].refresh()
        assert service.indexes["main"].at().facts.rows == ROWS - len(goes) - 1
        page.get_by_label("Groups", exact=True).select_option("exact")
        total = page.request.get(f"{url}/duplicates?kind=exact").json()["total"]
        expect(page.locator("#duplicates-lead" if total else "#duplicates-state")).to_contain_text(
            f"{total} group" if total else "No duplicates"
        )
        page.go_back()
        expect(page.locator("#query-name")).to_contain_text("0001")


def focused(page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id")


def tab_to(page, name: str) -> None:
    """Press Tab until what has this label or id has the focus."""
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(focused(page))
        if seen[-1] == name:
            return
    raise AssertionError(f"Tab never comes to {name}: {seen}")


def test_the_keyboard_is_enough(open_page, url, nearest):
    page = open_page(url)
    page.on("filechooser", lambda chooser: None)  # from now on the dialog is the test's, not only while one is awaited
    expect(page.locator("#start-rows .card")).to_have_count(12)
    tab_to(page, "pick")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "six.png", "mimeType": "image/png", "buffer": png(6)})
    expect(page.locator("#query-name")).to_contain_text("six.png")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    rows = [row for _, row in nearest(6)[:10]]
    distances = [distance for distance, _ in nearest(6)[:10]]
    tab_to(page, f"Search by {rows[0]}, {distances[0]} of 16 bits differ")
    page.keyboard.press("ArrowRight")
    assert focused(page) == f"Search by {rows[1]}, {distances[1]} of 16 bits differ"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert focused(page).startswith(f"Search by {rows[1]},")
    tab_to(page, f"Details of {rows[1]}")
    page.keyboard.press("Enter")
    details = page.locator("#details")
    expect(details.get_by_role("heading")).to_have_text(rows[1])
    page.keyboard.press("ArrowRight")
    expect(details.get_by_role("heading")).to_have_text(rows[2])
    page.keyboard.press("Escape")
    expect(details).to_be_hidden()
    assert focused(page) == f"Details of {rows[1]}"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#query-name")).to_contain_text(rows[1])
    expect(page.locator("#results-title")).to_be_focused()
    assert answer_pairs(page) == nearest(int(rows[1]))[:10]


def test_a_reload_keeps_the_look_of_an_image(open_page, url, nearest):
    page = open_page(url, bypass_csp=True)  # which forbids to evaluate text, as wait_for_function does
    drop(page, "eight.png", png(8))
    expect(page).to_have_url(re.compile("code="))
    page.wait_for_function("sessionStorage.getItem('hashray-earlier')?.includes('eight.png')")
    page.reload()
    expect(page.locator("#query-name")).to_contain_text("eight.png")
    expect(page.get_by_role("img", name="Your image")).to_have_attribute("src", re.compile("^data:image/jpeg"))
    expect(page.locator(".card:not(.skeleton)")).to_have_count(10)
    assert answer_pairs(page) == nearest(8)[:10]


ODD = ["<img src=x onerror=alert(1)>", "a/b?c=d&e#f.jpg", "100%25 'q\" \\", "グラス/å.jpg", " two  spaces "]


def test_odd_ids_are_text_and_can_be_searched(open_page, at, tmp_path):
    model = hashray.load_model(at["model"])
    index = str(tmp_path / "index")
    catalog = hashray.create_index(index, num_bits=model.num_bits, fingerprint=model.fingerprint)
    codes = model.encode([decode(png(i)) for i in range(len(ODD))])
    catalog.append(ODD, codes, pa.table({"class": ["it's"] * len(ODD)}))
    with behind_socket(config_of({**at, "index": index})) as (url, _):
        page = open_page(url)
        for name in ODD:
            page.get_by_label("or by the id of a row").fill(name)
            page.get_by_label("or by the id of a row").press("Enter")
            expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
            expect(page.locator("#query-name span")).to_have_text(name)
            expect(page.locator(".card .distance").first).to_have_text("0 bits")
            assert {one.text_content() for one in page.locator(".card .id").all()} == set(ODD)
        page.locator(".card .badge").first.click()
        expect(page.get_by_label("Filter")).to_have_value("class == 'it\\'s'")
        expect(page.locator("#note")).to_contain_text("5 of 5 rows")


def test_which_bits_differ_is_said(open_page, url, nearest):
    page = open_page(f"{url}/?id=0006&k=60")
    expect(page.locator(".card:not(.skeleton)")).to_have_count(60)
    last = nearest(6)[-1]
    card = page.locator(".card").last
    card.get_by_role("button", name="Details").click()
    text = page.locator("#details").inner_text()
    codes = [
        page.request.post(f"{url}/search", data={"id": name, "k": 1}).json()["query"]["code"]
        for name in ("0006", last[1])
    ]
    apart = f"{int(codes[0], 16) ^ int(codes[1], 16):016b}"
    positions = [str(position) for position, bit in enumerate(apart) if bit == "1"]
    assert len(positions) == last[0] and f"of 16: {', '.join(positions)}" in text
    assert f"class\n{CLASSES[int(last[1]) % 3]}" in text.replace("\t", "\n")
    marked = card.locator("svg.bits path.differs").get_attribute("d")
    assert marked.count("M") == len(positions)


def test_rows_without_pictures_are_drawn_as_their_codes(open_page, at):
    service = open_service(config_of({**at, "corpus": None}))
    with behind_socket(config_of(at), service) as (url, _):
        page = open_page(f"{url}/?id=0001")
        expect(page.locator("#answers .card svg.print")).to_have_count(10)
        expect(page.get_by_role("link", name="Original")).to_have_count(0)

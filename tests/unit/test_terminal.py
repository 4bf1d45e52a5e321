"""Images in a terminal: each encoder is tested by a decoder of its protocol, which gives the pixels back."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving import write_all
from tiny import png

from hashray.cli import main
from hashray.progress import show_table
from hashray.search.terminal import TILE, detect, encode, picture_rows, sheet

Pixels = NDArray[np.uint8]


def decode_kitty(text: str) -> tuple[Pixels, dict[str, str]]:
    """Pixels of the only image, and the keys of its first sequence."""
    sequences = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in sequences) == text
    each = [dict(pair.split("=") for pair in keys.split(",")) for keys, _ in sequences]
    assert [keys["m"] for keys in each] == ["1"] * (len(each) - 1) + ["0"]
    assert all(len(data) <= 4096 and (len(data) % 4 == 0) for _, data in sequences)
    data = base64.b64decode("".join(data for _, data in sequences))
    return np.array(Image.open(io.BytesIO(data))), each[0]


def decode_iterm(text: str) -> tuple[Pixels, dict[str, str]]:
    (keys, data) = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", text).groups()  # type: ignore[union-attr]
    raw = base64.b64decode(data)
    named = dict(pair.split("=") for pair in keys.split(";"))
    assert int(named["size"]) == len(raw)
    return np.array(Image.open(io.BytesIO(raw))), named


def decode_sixel(text: str) -> Pixels:
    """RGBA; what no colour has set is clear."""
    width, height, body = re.fullmatch(r'\x1bP0;1;0q"1;1;(\d+);(\d+)(.*)\x1b\\', text, re.S).groups()  # type: ignore[union-attr]
    picture = np.zeros((int(height) + 6, int(width), 4), np.uint8)
    palette: dict[int, list[int]] = {}
    color, x, y = 0, 0, 0
    for token in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|([$-])", body):
        number, red, green, blue, chosen, count, repeated, single, move = token.groups()
        if number:
            palette[int(number)] = [round(int(value) * 255 / 100) for value in (red, green, blue)] + [255]
        elif chosen:
            color = int(chosen)
        elif move:
            x, y = 0, y + 6 * (move == "-")
        else:
            bits = ord(repeated or single) - 63
            for row in range(6):
                if bits >> row & 1:
                    picture[y + row, x : x + int(count or 1)] = palette[color]
            x += int(count or 1)
    assert not picture[int(height) :].any()
    return picture[: int(height)]


def decode_blocks(text: str) -> Pixels:
    """RGBA, two pixels a character."""
    lines = []
    for line in text.split("\n"):
        assert line.endswith("\x1b[0m")
        rows: list[list[list[int]]] = [[], []]
        front, back = [0] * 4, [0] * 4
        for token in re.finditer(r"\x1b\[([\d;]*)m|(.)", line):
            style, character = token.groups()
            if style is None:
                rows[0].append({"▀": front, "▄": back, " ": back}[character])
                rows[1].append({"▀": back, "▄": front, " ": back}[character])
                continue
            kind, *numbers = [int(word) for word in style.split(";")]
            assert kind in (0, 38, 48)
            if kind == 0:
                front, back = [0] * 4, [0] * 4
            elif kind == 38:
                front = [*numbers[1:], 255]
            else:
                back = [*numbers[1:], 255]
        lines += rows
    return np.array(lines, np.uint8)


@pytest.fixture
def picture() -> Image.Image:
    """Noise in 60 colours with a clear corner, a clear top edge and a clear bottom edge."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (60, 4), np.uint8)
    pixels = colors[rng.integers(0, 60, (32, 85))]
    pixels[..., 3] = 255
    pixels[:9, :11] = pixels[0, ::3] = pixels[-1, ::5] = 0
    return Image.fromarray(pixels, "RGBA")


def test_kitty_and_iterm_carry_the_pixels(picture: Image.Image) -> None:
    pixels, keys = decode_kitty(encode(picture, "kitty", 17, 8))
    assert (pixels == np.array(picture)).all() and (keys["c"], keys["r"], keys["a"]) == ("17", "8", "T")
    pixels, keys = decode_iterm(encode(picture, "iterm", 17, 8))
    assert (pixels == np.array(picture)).all() and (keys["width"], keys["height"], keys["inline"]) == ("17", "8", "1")


def test_a_large_image_is_several_sequences_of_kitty() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 4), np.uint8), "RGBA")
    text = encode(noise, "kitty", 16, 8)
    assert text.count("\x1b_G") > 3 and (decode_kitty(text)[0] == np.array(noise)).all()


@pytest.mark.parametrize("height", [32, 31, 5])
def test_sixels_carry_the_pixels_to_a_hundredth_of_a_colour(picture: Image.Image, height: int) -> None:
    picture = picture.crop((0, 0, picture.width, height))
    pixels, wanted = decode_sixel(encode(picture, "sixel", 9, 2)), np.array(picture)
    assert (pixels[..., 3] == wanted[..., 3]).all()
    assert np.abs(pixels.astype(int) - wanted).max() <= 2  # DEC's palette has 101 levels


def test_sixels_of_many_colours_take_at_most_255() -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), np.uint8)).convert("RGBA")
    text = encode(noise, "sixel", 6, 3)
    assert len(re.findall(r"#\d+;2;", text)) <= 255 and (decode_sixel(text)[..., 3] == 255).all()


@pytest.mark.parametrize("height", [32, 31])
def test_half_blocks_carry_the_pixels(picture: Image.Image, height: int) -> None:
    picture = picture.crop((0, 0, picture.width, height))
    text = encode(picture, "blocks", 85, 16)
    pixels = decode_blocks(text)
    assert pixels.shape == (32, 85, 4) and (pixels[:height] == np.array(picture)).all()
    assert not pixels[height:].any()


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"}, "kitty"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM": "xterm-sixel"}, "sixel"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "blocks"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "24bit"}, "blocks"),
        ({"TMUX": "/tmp/t", "TERM_PROGRAM": "iTerm.app"}, "none"),
        ({"TERM": "xterm-256color"}, "none"),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "none"),
        ({}, "none"),
    ],
)
def test_detection(environment: dict[str, str], protocol: str) -> None:
    assert detect(environment, True, "UTF-8") == protocol
    assert detect(environment, False, "UTF-8") == "none"
    assert detect(environment, True, "ascii") == (protocol if protocol != "blocks" else "none")


def test_a_sheet_keeps_shapes_and_leaves_places_empty() -> None:
    wide, tall = Image.new("RGB", (400, 100), "red"), Image.new("L", (2, 6), 255)
    pixels = np.array(sheet([wide, None, tall], (1, 2)))
    width = TILE[0] + 1
    assert pixels.shape == (2 * TILE[1], 3 * width, 4)
    solid = pixels[..., 3] == 255
    assert np.flatnonzero(solid[:, :width].any(1)).tolist() == [6, 7, 8, 9]  # 16 x 4 in the middle of 16 rows
    assert not solid[:, width : 2 * width].any()
    assert solid[:, 2 * width :].any(0).sum() == 5 and solid[:, 2 * width :].any(1).all()


def test_rows_of_pictures_fit_the_terminal_with_captions_below() -> None:
    images = [Image.new("RGB", (9, 9), color) for color in ("red", "lime", "blue")]
    text = list(picture_rows(images, ["query", "1: 3 bits", "a caption that is too long"], "blocks", 40))
    assert [decode_blocks(text[0])[8, x, :3].tolist() for x in (8, 25)] == [[255, 0, 0], [0, 255, 0]]
    assert text[1].split("  ")[0] == "" and [word for word in re.split(r"\s{2,}", text[1]) if word] == [
        "query", "1: 3 bits"
    ]  # fmt: skip
    assert decode_blocks(text[2]).shape[1] == TILE[0] + 1 and text[3] == "a caption that i"
    assert len(list(picture_rows(images, "abc", "kitty", 3))) == 6
    with pytest.raises(ValueError, match="draws no images"):
        list(picture_rows(images, "abc", "none", 40))


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("terminal")
    at = write_all(folder)
    (folder / "query.png").write_bytes(png(7))
    return at | {"query": str(folder / "query.png")}


def searched(at: dict[str, str], *words: str) -> int:
    return main(["search", at["index"], "--model", at["model"], "--image", at["query"], *words])


def test_the_table_has_attributes_and_the_images_stand_above(
    at: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert searched(at, "--k", "4") == 0
    table = capsys.readouterr().out
    assert re.search(r"┃ id +┃ distance of \d+ ┃ class ┃ number ┃", table) and "▀" not in table
    assert re.search(r"│ 0007 │ +0 │ +\w+ │ +7 │", table)
    assert searched(at, "--k", "4", "--corpus", at["corpus"]) == 0
    assert capsys.readouterr().out == table  # standard output is no terminal
    assert searched(at, "--k", "4", "--corpus", at["corpus"], "--thumbnails", "blocks") == 0
    pictures, _, rest = capsys.readouterr().out.partition("query")
    assert decode_blocks(pictures.rstrip().rstrip("\n")).shape == (16, 85, 4) and "1: 0 bits" in rest
    assert rest.partition("\n")[2] == table


def test_json_stays_as_it_is(at: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert searched(at, "--k", "2", "--json", "--corpus", at["corpus"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["query"] == at["query"] and [sorted(hit) for hit in answer["hits"]] == [["distance", "id"]] * 2


@pytest.mark.parametrize("words", [[], ["--corpus", "c", "--json"]])
def test_thumbnails_need_images(at: dict[str, str], capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert searched(at, "--thumbnails", "kitty", *words) == 2
    assert "needs --corpus CORPUS" in capsys.readouterr().err.replace("\n", " ")


def test_ids_command_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("a\x1b[31m", ["id"], [["[/b]\x1b]0;title\x07é\n"]])
    text = capsys.readouterr().out
    assert r"[/b]\x1b]0;title\x07é\n" in text and "\x1b" not in text

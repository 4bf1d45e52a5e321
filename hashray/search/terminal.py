"""Images as text for a terminal: kitty's and iTerm2's protocols, sixels, and half blocks in 24-bit colour. No Ray.

Images stand side by side on a sheet, whose tiles are some character cells wide and high, so that captions stand below
them in every protocol. Each encoder takes RGBA; what is transparent shows the terminal's background.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Protocol = Literal["kitty", "iterm", "sixel", "blocks", "none"]
TILE = (16, 8)  # columns and rows of an image
CELL = (10, 20)  # pixels of a character cell, where the terminal scales or draws pixels itself
KITTY_BYTES = 4096  # of base64 in one escape sequence
SIXEL_COLORS = 255
RESET = "\x1b[0m"
SIXEL_TERMS = ("foot", "mlterm", "yaft", "contour")


def detect(environment: Mapping[str, str], is_terminal: bool, encoding: str | None) -> Protocol:
    """The best protocol that a terminal says it knows, by its environment variables.

    Args:
        environment: TERM, TERM_PROGRAM, COLORTERM and the terminals' own variables.
        is_terminal: whether standard output is one.
        encoding: of standard output.

    >>> detect({"TERM": "xterm-kitty"}, True, "utf-8"), detect({"TERM": "xterm-kitty"}, False, "utf-8")
    ('kitty', 'none')
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not is_terminal or term == "dumb":
        return "none"
    if "TMUX" not in environment and not term.startswith(("tmux", "screen")):  # these swallow other protocols
        if "KITTY_WINDOW_ID" in environment or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm"
        if "sixel" in term or term.startswith(SIXEL_TERMS):
            return "sixel"
    if (encoding or "").lower().replace("-", "") == "utf8" and environment.get("COLORTERM") in ("truecolor", "24bit"):
        return "blocks"
    return "none"


def picture_rows(
    images: Sequence[Image.Image | None], captions: Sequence[str], protocol: Protocol, columns: int
) -> Iterator[str]:
    """Yield text to print: a row of images with a caption below each, as many rows as `columns` cells need.

    Args:
        images: any size and mode; None leaves the place empty.
        captions: of one line each, cut at the width of a tile.
        protocol: not "none".
        columns: width of the terminal in cells.
    """
    each = max(1, columns // (TILE[0] + 1))
    for start in range(0, len(images), each):
        some = images[start : start + each]
        picture = sheet(some, (1, 2) if protocol == "blocks" else CELL)
        yield encode(picture, protocol, len(some) * (TILE[0] + 1), TILE[1])
        yield "".join(f"{text[: TILE[0]]:^{TILE[0]}} " for text in captions[start : start + each]).rstrip()


def sheet(images: Sequence[Image.Image | None], cell: tuple[int, int]) -> Image.Image:
    """Images side by side in tiles, each as large as fits with its shape kept; RGBA, clear where there is none.

    Args:
        images: any size and mode.
        cell: pixels of a character cell, (width, height); they count as square pixels.
    """
    width, height = TILE[0] * cell[0], TILE[1] * cell[1]
    step = width + cell[0]
    whole = Image.new("RGBA", (step * len(images), height))
    for number, image in enumerate(images):
        if image is not None:
            scale = min(width / image.width, height / image.height)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            method = Image.Resampling.NEAREST if scale > 4 else Image.Resampling.BOX
            scaled = image.convert("RGBA").resize(size, method)
            whole.paste(scaled, (number * step + (width - size[0]) // 2, (height - size[1]) // 2))
    return whole


def encode(image: Image.Image, protocol: Protocol, columns: int, rows: int) -> str:
    """Escape sequences that draw an RGBA image on `columns` times `rows` cells, without a line feed at the end.

    Raises:
        ValueError: the protocol draws nothing.
    """
    if protocol not in ENCODERS:
        raise ValueError(f"{protocol!r} draws no images; expected {', '.join(ENCODERS)}")
    return ENCODERS[protocol](image, columns, rows)


def _kitty(image: Image.Image, columns: int, rows: int) -> str:
    """PNG in base64, in sequences of 4 KiB (sw.kovidgoyal.net/kitty/graphics-protocol); q=2: no answer is wanted."""
    text = base64.b64encode(_png(image)).decode()
    chunks = [text[start : start + KITTY_BYTES] for start in range(0, len(text), KITTY_BYTES)]
    lines = []
    for number, chunk in enumerate(chunks):
        keys = f"a=T,f=100,q=2,c={columns},r={rows}," if number == 0 else "q=2,"
        lines.append(f"\x1b_G{keys}m={int(number + 1 < len(chunks))};{chunk}\x1b\\")
    return "".join(lines)


def _iterm(image: Image.Image, columns: int, rows: int) -> str:
    """PNG in base64 as an inline file (iterm2.com/documentation-images.html)."""
    data = _png(image)
    keys = f"inline=1;size={len(data)};width={columns};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File={keys}:{base64.b64encode(data).decode()}\x07"


def _sixel(image: Image.Image, columns: int, rows: int) -> str:
    """Bands of six pixel rows, of each colour a line of them (DEC's VT330 manual, chapter 14); 255 colours."""
    clear = np.array(image.getchannel("A")) < 128
    flat = image.convert("RGB").quantize(SIXEL_COLORS, dither=Image.Dither.NONE)
    palette = np.array(flat.getpalette(), np.int64).reshape(-1, 3)
    numbers = np.where(clear, -1, np.array(flat, np.int64))
    text = [f'\x1bP0;1;0q"1;1;{image.width};{image.height}']  # 1: what no colour sets stays as it is
    for number in np.unique(numbers[numbers >= 0]).tolist():
        red, green, blue = (round(int(value) * 100 / 255) for value in palette[number])
        text.append(f"#{number};2;{red};{green};{blue}")
    for start in range(0, image.height, 6):
        band = numbers[start : start + 6]
        for color in np.unique(band[band >= 0]).tolist():
            bits = ((band == color) * (1 << np.arange(len(band)))[:, None]).sum(0)
            text.append(f"#{color}" + "".join(_run(bit, len(list(same))) for bit, same in groupby(bits.tolist())) + "$")
        text.append("-")
    return "".join(text) + "\x1b\\"


def _run(bits: int, count: int) -> str:
    character = chr(63 + bits)
    return f"!{count}{character}" if count > 3 else character * count


def _blocks(image: Image.Image, columns: int, rows: int) -> str:
    """Two pixels a cell: the upper half block in the colour of the upper one, on the colour of the lower one."""
    pixels = np.array(image)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
    return "\n".join(_line(upper, lower) for upper, lower in zip(pixels[::2], pixels[1::2], strict=True))


def _line(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> str:
    text, before = [], ""
    for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
        if above[3] >= 128 and below[3] >= 128:
            style, character = f"{RESET}{_color(38, above)}{_color(48, below)}", "▀"
        elif above[3] >= 128 or below[3] >= 128:
            style = RESET + _color(38, above if above[3] >= 128 else below)
            character = "▀" if above[3] >= 128 else "▄"
        else:
            style, character = RESET, " "
        text.append(character if style == before else style + character)
        before = style
    return "".join(text) + RESET


def _color(kind: int, color: Sequence[int]) -> str:
    return f"\x1b[{kind};2;{color[0]};{color[1]};{color[2]}m"


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


ENCODERS: dict[str, Callable[[Image.Image, int, int], str]] = {
    "kitty": _kitty,
    "iterm": _iterm,
    "sixel": _sixel,
    "blocks": _blocks,
}
assert {*ENCODERS, "none"} == {*get_args(Protocol)}

"""Image bytes -> uint8 arrays: decode, resize, augment. No Ray, no torch."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from hashray.config import Config

USUAL_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Formats that Pillow recognises but cannot decode without another program.
NOT_DECODED = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FPX", "MIC", "IPTC", "PDF"}
ORIENTATION_TAG = 0x0112
TILE_TAGS = (322, 323)  # width and length
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
LONGEST_ASPECT = 16
GREY = 124  # ImageNet's mean: near 0 after normalisation
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
Pixels = NDArray[np.uint8]
ResizeMode = Literal["crop", "squash"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Framing:
    """The way from an image to a square of `size` pixels.

    The shorter side (`crop`), or both sides (`squash`), become floor(size / crop_pct) pixels long. Then the centre is
    cut out. A `crop_pct` above 1 leaves a black border. Where the longer side or the corner of the cut is not whole,
    the default rounds to the nearest pixel and down. All others round as torchvision and timm do: down and to the
    nearest even pixel.
    """

    mode: ResizeMode = "crop"
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 1.0


Resize = ResizeMode | Framing  # a mode alone is bilinear, and keeps all that fits


class BadImage(ValueError):
    """One image cannot be used; the text is the reason that goes to the quarantine table."""


class AugmentConfig(Config):
    """Random changes of a training image; each a function of seed, epoch and row only."""

    flip: bool = Field(True, description="Whether half of the images are flipped horizontally")
    shift: int = Field(0, ge=0, description="Largest shift in pixels, in both directions; zeros come in")
    cutout: int = Field(0, ge=0, description="Side of a grey square with its centre anywhere (DeVries, 2017)")


def decode(data: bytes | None, most_pixels: int | None = None) -> Image.Image:
    """Decode the first frame to RGB, turned as its EXIF orientation says.

    Args:
        most_pixels: an image that claims more is refused before a pixel is decoded; unset: Pillow's own limit.

    Raises:
        BadImage: empty, no known format, truncated, or suspiciously large; the reason in one line.
    """
    if not data:
        raise BadImage("empty: 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                if most_pixels is not None and opened.width * opened.height > most_pixels:
                    raise BadImage(f"{opened.width} x {opened.height} pixels; at most {most_pixels:,} are taken")
                if most_pixels is not None and (pixels := _tile_pixels(opened)) > most_pixels:
                    raise BadImage(f"a tile of {pixels:,} pixels; at most {most_pixels:,} are taken")
                opened.load()
                return to_rgb(opened)
    except (BadImage, MemoryError):  # a worker short of memory says nothing about the image
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes; the row is quarantined
        text = " ".join(str(error).split()) or "cannot be decoded"
        text = text.split("<_io")[0].strip()
        raise BadImage(f"{type(error).__name__}: {text}"[:300]) from error


def _tile_pixels(image: Image.Image) -> int:
    """The pixels of a tile of a TIFF, which is decoded whole: it may be far larger than the image."""
    tags = getattr(image, "tag_v2", {})
    return math.prod(int(tags.get(tag, 0)) for tag in TILE_TAGS)


@lru_cache(maxsize=1)
def image_endings() -> tuple[str, ...]:
    """The endings of image files, in lower case: of every format that the installed Pillow decodes by itself."""
    known = Image.registered_extensions()
    others = {end for end, kind in known.items() if kind in Image.OPEN and kind not in NOT_DECODED}
    return (*USUAL_ENDINGS, *sorted(others - {*USUAL_ENDINGS}))


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image to RGB: turned as its EXIF orientation says, transparency on white.

    The orientation is read and applied, not written back: Pillow's own function writes all EXIF again, and fails on
    tags that cameras and phones really write.

    Raises:
        BadImage: its pixels have more than 16 bits.
    """
    turn = TURNS.get(image.getexif().get(ORIENTATION_TAG, 1))
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        image.info.pop("exif", None)  # so that turning twice is turning once
        image.getexif().clear()
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by its upper byte: Pillow's own conversion clips at 255 and gives a white image."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise BadImage(f"pixels of mode {image.mode} from {values.min()} to {values.max()}; at most 16 bits are known")
    return Image.fromarray((values >> 8).astype(np.uint8))


def to_pixels(image: Image.Image, size: int, resize: Resize) -> Pixels:
    """Resize to uint8 [3, size, size], antialiased.

    `crop` brings the shorter side to `size` and cuts the centre; `squash` changes the aspect ratio. A `Framing` sets
    the interpolation too, and the share of the side that the cut keeps.
    """
    framing = resize if isinstance(resize, Framing) else Framing(resize)
    usual = framing == Framing(framing.mode)
    shorter = max(1, math.floor(size / framing.crop_pct))
    if framing.mode == "crop":
        image = _near_square(image)
        least, scale = min(image.size), shorter / min(image.size)
        lengths = (round(side * scale) if usual else int(shorter * side / least) for side in image.size)
        width, height = (max(shorter, length) for length in lengths)
    else:
        width, height = shorter, shorter
    if image.size != (width, height):
        image = image.resize((width, height), FILTERS[framing.interpolation])
    if image.size != (size, size):
        left, top = (_start(side - size, usual) for side in (width, height))
        image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def _start(rest: int, usual: bool) -> int:
    """Where the cut begins that leaves `rest` pixels out, or adds a border of -rest."""
    if usual:
        return rest // 2
    return round(rest / 2) if rest > 0 else -(-rest // 2)


def _near_square(image: Image.Image) -> Image.Image:
    """Cut the far ends of a very long image, which the crop would drop anyway: resized, they can fill the memory."""
    width, height = image.size
    longest = LONGEST_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def augment(images: Pixels, config: AugmentConfig, seeds: NDArray[np.int64]) -> Pixels:
    """Change each image of uint8 [n, 3, h, w] by its own seed [n]: independent of the batch around it."""
    if not (config.flip or config.shift or config.cutout):
        return images
    out = images.copy()
    pad = config.shift
    for i, seed in enumerate(seeds):
        rng = np.random.Generator(np.random.PCG64(int(seed)))
        bits = rng.integers(0, 2 * pad + 1, 3)
        image = out[i]
        if config.flip and int(seed) & 1:
            image = image[:, :, ::-1]
        if pad:
            padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
            top, left = int(bits[0]), int(bits[1])
            image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        out[i] = image
        if config.cutout:
            top, left = (int(rng.integers(0, side)) - config.cutout // 2 for side in image.shape[1:])
            out[i, :, max(0, top) : top + config.cutout, max(0, left) : left + config.cutout] = GREY
    return out


def decode_rows(
    rows: Iterable[tuple[str, bytes | BadImage]], size: int, resize: Resize
) -> tuple[Pixels, list[int], list[tuple[str, str]]]:
    """Decode (id, bytes) rows to pixels uint8 [kept, 3, size, size].

    Returns:
        the pixels, the positions of the rows they came from, and (id, reason) of the rows left out.
    """
    pixels: list[Pixels] = []
    kept: list[int] = []
    bad: list[tuple[str, str]] = []
    for position, (row_id, data) in enumerate(rows):
        try:
            if isinstance(data, BadImage):
                raise data
            pixels.append(to_pixels(decode(data), size, resize))
            kept.append(position)
        except BadImage as error:
            bad.append((row_id, str(error)))
    shape = (0, 3, size, size)
    return np.stack(pixels) if pixels else np.zeros(shape, dtype=np.uint8), kept, bad

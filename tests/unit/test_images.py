"""Images: every mode comes out as RGB, everything broken as one reason, augmentation row by row."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from hashray.data.images import (
    FILTERS,
    AugmentConfig,
    BadImage,
    Framing,
    augment,
    decode,
    decode_rows,
    image_endings,
    to_pixels,
    to_rgb,
)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def picture(width: int = 12, height: int = 9) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_rgb_comes_back_as_it_was() -> None:
    assert np.array_equal(np.asarray(decode(encoded(picture()))), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    image = picture().convert(mode)
    out = decode(encoded(image))
    assert (out.mode, out.size) == ("RGB", (12, 9))
    assert np.array_equal(np.asarray(out), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Palette images")
def test_what_is_transparent_is_white() -> None:
    image = picture().convert("P")
    opacity = bytes(range(256))
    out = decode(encoded(image, transparency=opacity))
    colors, alpha = np.asarray(image.convert("RGB"), float), np.frombuffer(opacity, np.uint8)[np.asarray(image)] / 255
    expected = colors * alpha[:, :, None] + 255 * (1 - alpha[:, :, None])
    assert np.abs(np.asarray(out, float) - expected).max() <= 1
    logos = []
    for place in (0, 3):  # black on transparent, as logos are: without a ground both would be black
        logo = Image.new("RGBA", (6, 6), (0, 0, 0, 0))
        logo.putpixel((place, place), (0, 0, 0, 255))
        logos.append(np.asarray(decode(encoded(logo))))
        assert logos[-1][place, place].tolist() == [0, 0, 0] and logos[-1][5, 5].tolist() == [255, 255, 255]
    assert not np.array_equal(*logos)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    first = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.asarray(first)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(kind: str) -> None:
    values = (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096).astype(np.uint16)
    out = np.asarray(decode(encoded(Image.fromarray(values), kind)))
    assert np.array_equal(out, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, axis=2))


def test_pixels_of_unknown_range_are_refused() -> None:
    for values in (np.full((2, 2), 0.5, np.float32), np.full((2, 2), 1 << 20, np.int32), np.full((2, 2), -1, np.int32)):
        with pytest.raises(BadImage, match=r"pixels of mode [IF] from .* to .*; at most 16 bits are known"):
            decode(encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_jpeg() -> None:
    out = np.asarray(decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))).astype(int)
    assert np.abs(out - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = picture(4, 3)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = upright.transpose(turns[orientation]) if orientation in turns else upright
    out = decode(encoded(upright, exif=exif))
    assert np.array_equal(np.asarray(out), np.asarray(expected))


def test_a_photo_is_turned_whatever_else_its_exif_holds() -> None:
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    odd += struct.pack("<HHI", 0x11A, 2, 3) + b"72\0\0" + b"\0" * 4  # a resolution as text: cannot be written back
    plain = encoded(Image.new("RGB", (16, 8), (200, 30, 30)), "JPEG")
    turned = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(odd) + 2) + odd + plain[2:]
    assert decode(turned).size == (8, 16)
    assert to_rgb(decode(turned)).size == (8, 16)  # once is enough


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_turned_too(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (np.arange(8, dtype=np.uint16).reshape(2, 4) * 4096).astype(np.uint16)
    assert decode(encoded(Image.fromarray(values), kind, exif=exif)).size == (2, 4)


def test_every_format_that_pillow_decodes_is_an_image() -> None:
    endings = image_endings()
    assert {".png", ".jpg", ".jfif", ".jpe", ".webp", ".tga", ".ico", ".pbm"} <= set(endings)
    assert not {".eps", ".pdf", ".mpg", ".h5", ".wmf", ".md", ".mp4", ".txt"} & set(endings)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "empty: 0 bytes"),
        (b"", "empty: 0 bytes"),
        (b"this is no image at all", "UnidentifiedImageError: cannot identify image file"),
        (b"<html><body>404 Not Found</body></html>", "UnidentifiedImageError: cannot identify image file"),
        (encoded(picture(64, 64), "JPEG")[:-400], "OSError: image file is truncated"),
        (encoded(picture(64, 64), "PNG")[:3000], "truncated"),
        (encoded(picture(64, 64), "PNG")[:20], "Error: "),
        (encoded(picture(), "BMP")[:60], "truncated"),
    ],
)
def test_broken_bytes_have_a_reason_of_one_line(data: bytes | None, reason: str) -> None:
    texts = []
    for _ in range(2):
        with pytest.raises(BadImage) as caught:
            decode(data)
        texts.append(str(caught.value))
    assert reason in texts[0]
    assert "\n" not in texts[0]
    assert "0x" not in texts[0]
    assert texts[0] == texts[1]


def test_an_image_too_large_to_be_true_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match=r"DecompressionBombWarning: .*108 pixels"):
        decode(encoded(picture()))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.sampled_from(["crop", "squash"]))
def test_pixels_have_the_size_that_was_asked_for(width: int, height: int, size: int, resize: Any) -> None:
    pixels = to_pixels(picture(width, height), size, resize)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    assert pixels.flags.c_contiguous


def test_crop_keeps_the_centre_and_squash_keeps_all() -> None:
    image = Image.new("RGB", (40, 20), "red")
    ImageDraw.Draw(image).rectangle((10, 0, 29, 19), fill="blue")
    assert np.array_equal(to_pixels(image, 20, "crop"), np.asarray(image.crop((10, 0, 30, 20))).transpose(2, 0, 1))
    cropped, squashed = to_pixels(image, 10, "crop"), to_pixels(image, 10, "squash")
    assert cropped[2].min() > 200  # blue but for what antialiasing brings in at the seams
    assert squashed[0, :, 0].min() == 255
    assert squashed[2, :, 5].min() == 255
    assert np.array_equal(to_pixels(image, 20, "squash"), np.asarray(image.resize((20, 20), 2)).transpose(2, 0, 1))
    assert np.array_equal(to_pixels(picture(9, 9), 9, "crop"), np.asarray(picture(9, 9)).transpose(2, 0, 1))


@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 40),
    st.builds(Framing, st.sampled_from(["crop", "squash"]), st.sampled_from(sorted(FILTERS)), st.floats(0.25, 2)),
)  # fmt: skip
def test_every_framing_gives_the_size_that_was_asked_for(width: int, height: int, size: int, framing: Framing) -> None:
    assert to_pixels(picture(width, height), size, framing).shape == (3, size, size)


def test_a_framing_sets_the_interpolation_and_the_share_that_the_cut_keeps() -> None:
    image = picture(41, 20)
    assert np.array_equal(to_pixels(image, 12, Framing("crop")), to_pixels(image, 12, "crop"))
    larger = image.resize((32, 16), Image.Resampling.BICUBIC)  # 12 / 0.75 = 16; 41 * 16 / 20 = 32.8 rounds down
    expected = np.asarray(larger.crop((10, 2, 22, 14))).transpose(2, 0, 1)
    assert np.array_equal(to_pixels(image, 12, Framing("crop", "bicubic", 0.75)), expected)
    bordered = to_pixels(Image.new("RGB", (9, 9), "white"), 12, Framing("squash", "bilinear", 1.5))
    assert bordered[0].sum() == 255 * 8 * 8
    assert bordered[:, 2:10, 2:10].min() == 255


@pytest.mark.parametrize("shape", [(1, 70_000), (70_000, 1), (2, 20_000)])
def test_a_very_long_image_does_not_fill_the_memory(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a))
    assert to_pixels(Image.new("RGB", shape), 64, "crop").shape == (3, 64, 64)
    assert max(max(size) for size in sizes) <= 64 * 16


@given(st.permutations(range(6)), st.integers(0, 5), st.booleans(), st.integers(0, 9))
def test_augmentation_of_a_row_does_not_know_the_batch(order: list[int], shift: int, flip: bool, cutout: int) -> None:
    rng = np.random.default_rng(1)
    images, seeds = rng.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8), rng.integers(0, 2**62, 6)
    config = AugmentConfig(flip=flip, shift=shift, cutout=cutout)
    before = images.copy()
    together = augment(images, config, seeds)
    assert np.array_equal(images, before)
    assert np.array_equal(augment(images[order], config, seeds[order]), together[order])
    for i in range(6):
        assert np.array_equal(augment(images[i : i + 1], config, seeds[i : i + 1])[0], together[i])


def test_cutout_blanks_one_square_that_may_stick_out() -> None:
    images = np.full((2000, 3, 9, 9), 7, np.uint8)
    cut = augment(images, AugmentConfig(flip=False, cutout=4), np.random.default_rng(0).integers(0, 2**62, 2000))
    sizes = set()
    for image in cut:
        rows, columns = np.nonzero(image[0] != 7)
        sizes.add((np.ptp(rows) + 1, np.ptp(columns) + 1))
        assert (
            len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) and len(set(image[:, rows, columns].ravel())) == 1
        )
    assert (4, 4) in sizes and (2, 2) in sizes and max(max(size) for size in sizes) == 4


def test_augmentation_flips_half_and_shifts_zeros_in() -> None:
    images = np.full((400, 3, 6, 6), 7, np.uint8)
    images[:, :, :, 0] = 9
    seeds = np.random.default_rng(0).integers(0, 2**62, 400)
    flipped = augment(images, AugmentConfig(), seeds)[:, 0, 0, 5] == 9
    assert 150 < flipped.sum() < 250
    shifted = augment(images, AugmentConfig(flip=False, shift=2), seeds)
    assert {tuple(np.argwhere(image[0] == 9)[0]) if (image[0] == 9).any() else None for image in shifted} >= {
        (0, 0),
        (0, 2),
        (2, 0),
        (2, 2),
        None,
    }
    assert set(np.unique(shifted)) == {0, 7, 9}
    assert augment(images, AugmentConfig(flip=False), seeds) is images
    assert augment(images[:0], AugmentConfig(shift=1), seeds[:0]).shape == (0, 3, 6, 6)


def test_decode_rows_puts_broken_ones_aside() -> None:
    rows = [("a", encoded(picture())), ("b", b"junk"), ("c", BadImage("gone")), ("d", encoded(picture().convert("L")))]
    pixels, kept, bad = decode_rows(rows, 8, "squash")
    assert pixels.shape == (2, 3, 8, 8)
    assert kept == [0, 3]
    assert bad == [("b", "UnidentifiedImageError: cannot identify image file"), ("c", "gone")]
    pixels, kept, bad = decode_rows([], 8, "crop")
    assert (pixels.shape, pixels.dtype, kept, bad) == ((0, 3, 8, 8), np.uint8, [], [])


def test_a_worker_short_of_memory_says_nothing_about_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        decode(b"x")

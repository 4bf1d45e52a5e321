"""Where images come from: folder, list file, Parquet, tar shards. One file for each format. No Ray.

A source is read in two steps. `list_source` is cheap: it gives, for every row, its id, its labels, the split that the
source gives it and a locator of its bytes; no image is opened. `fetch` then takes locators to bytes, anywhere, in any
order. A new format is a file with a `list_x(survey, config, num_classes)`, named in READERS.
"""

from __future__ import annotations

import re
import threading
from pathlib import PurePosixPath
from urllib.parse import parse_qs

from hashray.data.folders import list_folder
from hashray.data.images import image_endings
from hashray.data.labels import SPLIT_WORDS
from hashray.data.listing import Format, Listing, SourceConfig, SourceRow, Survey, look, read_class_names
from hashray.data.lists import LIST_ENDINGS, list_lists
from hashray.data.parquet import ENDINGS as PARQUET_ENDINGS
from hashray.data.parquet import image_column, list_parquet
from hashray.data.tars import list_tar, refuse_compressed
from hashray.errors import InputError
from hashray.storage import open_store, split_url

__all__ = [
    "Format",
    "Listing",
    "SourceConfig",
    "SourceRow",
    "by_reference_allowed",
    "fetch",
    "list_source",
]

READERS = {"folder": list_folder, "list": list_lists, "parquet": list_parquet, "tar": list_tar}
FORMATS: dict[str, Format] = {
    ".tar": "tar", **dict.fromkeys(PARQUET_ENDINGS, "parquet"), **dict.fromkeys(LIST_ENDINGS, "list"),
}  # fmt: skip
_one_reader = threading.Lock()


def list_source(url: str, config: SourceConfig) -> Listing:
    """List every row of a source without opening an image.

    Raises:
        InputError: nothing there, no image in it, a malformed line, a label out of range, with place and reason.
    """
    survey = look(url)
    kind = config.format or _guess(survey)
    names = read_class_names(config.class_names)
    rows, named = READERS[kind](survey, config, len(names) if names else None)
    if not rows:
        endings = ", ".join(image_endings()[:10])
        raise InputError(f"{url} ({kind}) holds no images; image files end in {endings} or in what else Pillow decodes")
    return Listing(kind, rows, names or named, kind in ("folder", "list"), survey)


def _guess(survey: Survey) -> Format:
    """The format, from a file's ending, from lists named after splits, or from the files of a folder."""
    suffixes = [PurePosixPath(key).suffix.lower() for key in survey.keys]
    if survey.is_file:
        refuse_compressed(survey.url)
        if suffixes[0] in FORMATS:
            return FORMATS[suffixes[0]]
        if suffixes[0] in image_endings():
            raise InputError(f"{survey.url} is one image; give the folder that holds it, with a folder for each class")
    keys = set(survey.keys)
    if any(word + suffix in keys for word in SPLIT_WORDS for suffix in LIST_ENDINGS):
        return "list"
    lists, endings = False, image_endings()
    for key, suffix in zip(survey.keys, suffixes, strict=True):
        refuse_compressed(key)
        if suffix in endings:
            return "folder"
        if suffix in LIST_ENDINGS:  # or a README beside images
            lists = True
        elif suffix in PARQUET_ENDINGS and f"{key.removesuffix(suffix)}.tar" in keys:
            return "tar"  # with metadata beside each shard, as img2dataset writes them
        elif suffix in FORMATS:
            return FORMATS[suffix]
    if lists:
        return "list"
    raise InputError(
        f"{survey.url} is empty or of no known format; give a folder of images, a list file (.txt), Parquet or tar "
        "shards"
    )


def fetch(locator: str) -> bytes:
    """The encoded bytes of one image: a file, a range of one, or a row of a Parquet column.

    Raises:
        InputError: this object alone cannot be read: it is gone, or a local file without permission.
        StorageError: the bucket, the credentials or the endpoint do not work, as for every other object there.
    """
    if locator.startswith("parquet:"):
        url, _, fragment = locator.removeprefix("parquet:").rpartition("#")
        options = {key: values[0] for key, values in parse_qs(fragment).items()}
        with _one_reader:  # one thread fills the cache, the others find it filled
            column = image_column(url, options["column"], int(options["group"]))
        return column[int(options["row"])].as_py() or b""
    span = re.fullmatch(r"(.+)#offset=(\d+)&size=(\d+)", locator, re.DOTALL)
    folder, name = split_url(span[1] if span else locator)
    store = open_store(folder)
    return store.read_range(name, int(span[2]), int(span[3])) if span else store.read(name)


def by_reference_allowed(locator: str) -> bool:
    """Whether a corpus may keep the locator instead of the bytes: one addressable object or range an image."""
    return not locator.startswith("parquet:")

"""Where images come from: folder, list file, Parquet, tar shards. One file for each format. No Ray.

A source is read in three steps. A format's `scan` yields the rows of a unit (a share of the source) without opening
an image: ids, locators of their bytes, labels as the source has them. `read_values` then says what the labels and
splits mean; that depends on all of them together, and on nothing else. `fetch` takes locators to bytes, anywhere, in
any order. A new format is a file with a `scan_x`, named in `scan`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

from hashray.data.folders import ANNOTATIONS, read_folders, scan_folder
from hashray.data.images import image_endings
from hashray.data.labels import EXPECTED, SPLIT_WORDS, UNREADABLE, Labels, read_labels
from hashray.data.listing import Format, SourceConfig, SourceRow, Survey, Unit, look, look_at_level, look_under
from hashray.data.lists import LIST_ENDINGS, read_fields, scan_lists
from hashray.data.parquet import ENDINGS as PARQUET_ENDINGS
from hashray.data.parquet import LOCATOR, image_at, scan_parquet
from hashray.data.tars import refuse_compressed, scan_tars
from hashray.errors import InputError
from hashray.storage import Store, join, open_store, split_url

FORMATS: dict[str, Format] = {
    ".tar": "tar", **dict.fromkeys(PARQUET_ENDINGS, "parquet"), **dict.fromkeys(LIST_ENDINGS, "list"),
}  # fmt: skip
UNIT_FILES = 20_000  # of a folder
UNIT_BYTES = 128 << 20  # of containers
MOST_PREFIXES, MOST_LEVELS = 256, 4


class Meaning(NamedTuple):
    """What the labels and splits of a source mean.

    Attributes:
        labels: labels by value (as JSON text); indices or names.
        splits: the split by value, where the source's folders name splits.
        class_names: set where the source itself numbers its classes.
    """

    labels: Mapping[str, Labels]
    splits: Mapping[str, str | None]
    class_names: list[str] | None


def is_random_access(kind: Format) -> bool:
    """Whether each row is an object of its own, so that a corpus may have another order than its source."""
    return kind in ("folder", "list")


def require_columns(config: SourceConfig, kind: Format, url: str) -> None:
    """Refuse attributes of a source that has no columns.

    Raises:
        InputError: it has none, and no file gives them.
    """
    if config.attributes and config.attributes_file is None and kind != "parquet":
        raise InputError(
            f"{url}: --attributes names columns of a Parquet source, and this is a {kind} source; write them to a "
            "Parquet or CSV file with a column id and name it with --attributes-file"
        )


def guess_format(survey: Survey) -> Format:
    """The format, from a file's ending, from lists named after splits, or from the files of a folder.

    Raises:
        InputError: none is recognised.
    """
    suffixes = [PurePosixPath(key).suffix.lower() for key in survey.keys]
    if survey.is_file:
        refuse_compressed(survey.url)
        if suffixes[0] in FORMATS:
            return FORMATS[suffixes[0]]
        if suffixes[0] in image_endings():
            raise InputError(f"{survey.url} is one image; give the folder that holds it, with a folder for each class")
    keys = set(survey.keys)
    for key in (word + suffix for word in SPLIT_WORDS for suffix in LIST_ENDINGS):
        if key in keys or (not survey.complete and survey.store.exists(key)):
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


def units_of(survey: Survey, kind: Format) -> tuple[Survey, list[Unit]]:
    """The shares of a source that tasks list, in order, and a survey of what they do not count themselves.

    The shares are a function of the source alone. A folder of which not all files were looked at is shared out by its
    prefixes.
    """
    if not survey.complete:
        if kind == "folder":
            return _units_of_prefixes(survey)
        survey = look(survey.url)  # shards and lists are few beside their rows
    if kind == "tar":
        for key in survey.keys:
            refuse_compressed(join(survey.store.url, key) if survey.is_file else key)
    annotations = tuple(key for key in survey.keys if key.endswith(ANNOTATIONS)) if kind == "folder" else ()
    named: dict[str, int] = {}
    keys = survey.keys
    if kind == "list":
        named = {join(survey.store.url, key): size for key, size in survey.sizes.items()}
        keys = survey.take(LIST_ENDINGS)
    units: list[list[tuple[str, int]]] = [[]]
    held = 0
    for key in keys:
        size_bytes = survey.sizes.get(key, 0)
        if units[-1] and (len(units[-1]) == UNIT_FILES if kind == "folder" else held + size_bytes > UNIT_BYTES):
            units.append([])
            held = 0
        units[-1].append((key, size_bytes))
        held += size_bytes
    return survey, [Unit(n, tuple(unit), (), annotations, named) for n, unit in enumerate(units)]


def _units_of_prefixes(survey: Survey) -> tuple[Survey, list[Unit]]:
    """Go down level by level until there are prefixes enough for any cluster."""
    top = Survey(survey.url, survey.store, [], False)
    prefixes = [""]
    for _ in range(MOST_LEVELS):
        below: list[str] = []
        for prefix in prefixes:
            below += look_at_level(top, prefix)
        prefixes = below
        if not 0 < len(prefixes) < MOST_PREFIXES:
            break
    annotations = tuple(key for key in top.keys if key.endswith(ANNOTATIONS))
    count = min(len(prefixes), MOST_PREFIXES)
    shares = [prefixes[len(prefixes) * n // count : len(prefixes) * (n + 1) // count] for n in range(count)]
    units = [Unit(n, (), tuple(share), annotations) for n, share in enumerate(shares)]
    if top.keys:
        units.append(Unit(count, tuple((key, top.sizes[key]) for key in top.keys), (), annotations))
    return replace(top, keys=[], sizes={}), units


def scan(
    url: str, is_file: bool, kind: Format, unit: Unit, config: SourceConfig, num_classes: int | None
) -> tuple[Survey, Iterator[SourceRow]]:
    """The rows of a unit, and the survey that counts what is seen while they are read.

    Raises:
        InputError: a malformed line or file, with its place.
    """
    store = open_store(split_url(url)[0] if is_file else url)
    survey = Survey(url, store, [key for key, _ in unit.keys], is_file, dict(unit.keys))
    for prefix in unit.prefixes:
        look_under(survey, prefix)
    if kind == "list":
        return survey, scan_lists(survey, unit, config, num_classes)
    scanner = {"folder": scan_folder, "parquet": scan_parquet, "tar": scan_tars}[kind]
    rows = scanner(survey, unit, config)
    if kind == "tar" and not config.labels:
        rows = (row._replace(value=None) for row in rows)
    return survey, rows


def read_values(
    survey: Survey, kind: Format, values: Mapping[str, str], num_classes: int | None, labels: bool = True
) -> Meaning:
    """The meaning of the values of all rows; without `labels` none names a class.

    Args:
        values: the place of the first row of each value, in the order of the source.
        num_classes: how many class names there are, if a file gives them.

    Raises:
        InputError: a label out of range or of no known kind, with the place of its row.
    """
    texts = list(values)
    parsed = [json.loads(text) for text in texts]
    if kind == "folder":
        keys = {text: (tuple(value[0]), value[1]) for text, value in zip(texts, parsed, strict=True)}
        meaning = read_folders(survey, keys.values())
        return Meaning(
            {text: meaning[key][0] if labels else () for text, key in keys.items()},
            {text: meaning[key][1] for text, key in keys.items()}, None,
        )  # fmt: skip
    if not labels:
        return Meaning(dict.fromkeys(texts, ()), {}, None)
    places = list(values.values())
    for value, place in zip(parsed, places, strict=True):
        if isinstance(value, dict) and UNREADABLE in value:
            raise InputError(f"{place}: label {value[UNREADABLE]}; {EXPECTED}")
    if kind == "list":
        known, width = read_fields(parsed, places)
    else:
        if survey.class_names:  # Hugging Face's: each label is one of them, and -1 is none, as in its test splits
            num_classes = num_classes or len(survey.class_names)
            parsed = [None if value == -1 else value for value in parsed]
        known, width = read_labels(parsed, num_classes, places.__getitem__)
    named = survey.class_names or ([str(i) for i in range(width)] if width else None)
    return Meaning(dict(zip(texts, known, strict=True)), {}, named)


@lru_cache(maxsize=64)
def _local(folder: str) -> Store:
    return open_store(folder)


def fetch(locator: str) -> bytes:
    """The encoded bytes of one image: a file, a range of one, or a row of a Parquet column.

    Raises:
        InputError: this object alone cannot be read: it is gone, or a local file without permission.
        StorageError: the bucket, the credentials or the endpoint do not work, as for every other object there.
    """
    if locator.startswith(LOCATOR):
        return image_at(locator)
    span = re.fullmatch(r"(.+)#offset=(\d+)&size=(\d+)", locator, re.DOTALL)
    folder, name = split_url(span[1] if span else locator)
    store = _local(folder) if folder.startswith("/") else open_store(folder)
    return store.read_range(name, int(span[2]), int(span[3])) if span else store.read(name)

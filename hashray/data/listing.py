"""What every source has in common: its config, its rows, the words for splits, the reading of labels. No Ray."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import Field

from hashray.config import Config
from hashray.errors import InputError
from hashray.storage import Store, open_store, split_url

Format = Literal["folder", "list", "parquet", "tar"]
Labels = tuple[int | str, ...]
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "query", "query": "query", "queries": "query",
    "database": "database", "db": "database", "gallery": "database", "unlabelled": "unlabelled",
    "unlabeled": "unlabelled", "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip


class SourceConfig(Config):
    """How to read a source; unset columns are found by their usual names."""

    format: Format | None = Field(None, description="folder, list, parquet or tar; unset: told from the source")
    root: str | None = Field(None, description="list: folder that the paths are relative to; unset: the list's own")
    class_names: str | None = Field(None, description="text file, one class name a line; labels index into it")
    id_column: str | None = Field(None, description="parquet: column of row ids")
    image_column: str | None = Field(None, description="parquet: column of encoded image bytes")
    label_column: str | None = Field(None, description="parquet: index, name, list of them, or 0/1 list")
    split_column: str | None = Field(None, description="parquet: column of split names")


@dataclass(frozen=True)
class SourceRow:
    """One image of a source, not yet opened. `labels` are indices or names as found; `split` as it came."""

    id: str
    locator: str
    labels: Labels
    split: str | None = None


@dataclass(frozen=True)
class Listing:
    """All rows of a source. `class_names` is set where the source itself numbers its classes."""

    format: Format
    rows: list[SourceRow]
    class_names: list[str] | None
    random_access: bool


def is_file(url: str) -> bool:
    """Whether `url` is an object, not a folder or a whole bucket."""
    try:
        folder, name = split_url(url)
        return open_store(folder).exists(name)
    except (InputError, ValueError):  # a bucket, the root, "..": no name of a file
        return False


def files(url: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of the files of a folder, sorted, hidden ones left out; InputError where there is nothing at all."""
    found = False
    for key, size in open_store(url).list():
        if any(part.startswith(".") for part in PurePosixPath(key).parts):
            continue
        if not key.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in key):
            raise InputError(f"{url}: the file name {key!r} is not UTF-8; rename it")
        found = True
        yield key, size
    if not found:
        raise InputError(f"{url} not found, or an empty folder; nothing to ingest")


def shards(url: str, suffixes: tuple[str, ...]) -> tuple[Store, list[str]]:
    """The one file that `url` is, or the files of a folder with one of these endings."""
    if is_file(url):
        folder, name = split_url(url)
        return open_store(folder), [name]
    return open_store(url), [key for key, _ in files(url) if key.lower().endswith(suffixes)]


def read_text(store: Store, key: str) -> str:
    """A UTF-8 text file; InputError where it is none."""
    try:
        return store.read(key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{store.url}/{key} is not UTF-8 text: {error}") from error


def read_class_names(url: str | None) -> list[str] | None:
    """The names of a class-names file, one a line; None without a file."""
    if url is None:
        return None
    folder, name = split_url(url)
    names = [line.strip() for line in read_text(open_store(folder), name).rstrip().split("\n")]
    if "" in names:
        raise InputError(f"{url}, line {names.index('') + 1}: empty; each line names one class, numbered from 0")
    if len(set(names)) < len(names):
        raise InputError(f"{url} names a class twice; each line is one class")
    return names


def split_word(value: Any, where: str) -> str | None:
    """Splits as a row came with them ("train", "test+database") in our words; None stays None."""
    if value is None:
        return None
    words = [SPLIT_WORDS.get(word.strip().lower()) for word in str(value).split("+")]
    if None in words:
        raise InputError(f"{where}: split {value!r} is not known; allowed: {', '.join(sorted(SPLIT_WORDS))}")
    return "+".join(sorted({str(word) for word in words}))


def check_index(index: int, num_classes: int | None, where: str) -> int:
    """Return a class index, or raise InputError where it is out of range."""
    if index < 0 or (num_classes is not None and index >= num_classes):
        allowed = f"0 to {num_classes - 1}" if num_classes else "0 and up"
        raise InputError(f"{where}: label {index} is out of range; allowed: {allowed}")
    return index


def whole_number(word: str) -> int | None:
    """The integer that a word is, or None."""
    return int(word) if re.fullmatch(r"-?[0-9]+", word) else None


def read_labels(
    values: Sequence[Any], num_classes: int | None, place: Callable[[int], str]
) -> tuple[list[Labels], int | None]:
    """Labels of all rows of a source: an index, a name, a list of either, or a 0/1 list.

    A list of three or more fields that are all 0 or 1 can only be a 0/1 list, and where one is, all are. Lists of
    two are, if all of them are two fields of 0 or 1. Nothing (None, an empty list) is no label.

    Args:
        place: where row i is, for errors.

    Returns:
        the labels, and how many classes the 0/1 lists have, if they are such.
    """
    rows = [_flat(value, i, place) for i, value in enumerate(values)]
    lists = [i for i, value in enumerate(values) if isinstance(value, list | tuple) and rows[i]]
    binary = [i for i in lists if not set(rows[i]) - {0, 1}]
    width = max((len(rows[i]) for i in binary), default=0)
    pairs = width == 2 and len(binary) == len(lists) and all(len(rows[i]) == 2 for i in lists)
    if width <= 2 and not (pairs and num_classes in (None, 2)):
        return [_checked(row, num_classes, place, i) for i, row in enumerate(rows)], None
    if num_classes not in (None, width):
        raise InputError(f"{place(binary[0])}: {width} label fields, the class-names file has {num_classes} classes")
    wrong = next((i for i in lists if len(rows[i]) != width or set(rows[i]) - {0, 1}), None)
    if wrong is not None:
        raise InputError(
            f"{place(wrong)}: label {values[wrong]!r}; other rows are lists of {width} fields of 0 and 1, all must be"
        )
    hot = set(lists)
    return [
        tuple(j for j, bit in enumerate(row) if bit) if i in hot else _checked(row, width, place, i)
        for i, row in enumerate(rows)
    ], width


def _flat(value: Any, row: int, place: Callable[[int], str]) -> Labels:
    if value is None:
        return ()
    out: list[int | str] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str):
            out.append(item)
        elif isinstance(item, int) or (isinstance(item, float) and item.is_integer()):
            out.append(int(item))
        else:
            raise InputError(f"{place(row)}: label {value!r}; expected a class index, a class name or a list of them")
    return tuple(out)


def _checked(row: Labels, num_classes: int | None, place: Callable[[int], str], index: int) -> Labels:
    for value in row:
        if isinstance(value, int) and (value < 0 or num_classes is not None):
            check_index(value, num_classes, place(index))
    return row

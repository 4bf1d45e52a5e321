"""Labels and splits as people write them: an index, a name, a list of either, a 0/1 list; words for splits. No Ray."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from hashray.errors import InputError

Labels = tuple[int | str, ...]
UNREADABLE = "unreadable"  # in the place of a label that is no JSON, such as bytes
EXPECTED = "expected a class index, a class name or a list of them"
SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "query", "query": "query", "queries": "query",
    "database": "database", "db": "database", "gallery": "database", "unlabelled": "unlabelled",
    "unlabeled": "unlabelled", "val": "validation", "valid": "validation", "validation": "validation",
}  # fmt: skip


def split_word(value: Any, place: str) -> str | None:
    """Splits as a row has them in its source ("train", "test+database") in our words; None stays None."""
    if value is None:
        return None
    words = [SPLIT_WORDS.get(word.strip().lower()) for word in str(value).split("+")]
    if None in words:
        raise InputError(f"{place}: split {value!r} is not known; allowed: {', '.join(sorted(SPLIT_WORDS))}")
    return "+".join(sorted({str(word) for word in words}))


def split_of_path(key: str) -> str | None:
    """The split that a file's name or the nearest folder names; None where none does, or a name has two.

    >>> split_of_path("data/train-00000-of-00001.parquet"), split_of_path("imagenet1k-validation-00.tar")
    ('train', 'validation')
    >>> split_of_path("test/part-0.tar"), split_of_path("shards/00012.tar")
    ('query', None)
    """
    path = PurePosixPath(key)
    for name in (path.name.partition(".")[0], *reversed(path.parts[:-1])):
        words = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS}
        if len(words) == 1:
            return words.pop()
    return None


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
        raise InputError(f"{place(binary[0])}: {width} label fields, but {num_classes} class names")
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
            raise InputError(f"{place(row)}: label {value!r}; {EXPECTED}")
    return tuple(out)


def _checked(row: Labels, num_classes: int | None, place: Callable[[int], str], index: int) -> Labels:
    for value in row:
        if isinstance(value, int) and (value < 0 or num_classes is not None):
            check_index(value, num_classes, place(index))
    return row

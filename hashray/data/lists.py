"""List files as sources: lines of `path index` or `path 0 1 0 …`, as public deep-hashing code has them. No Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from hashray.data.labels import SPLIT_WORDS, check_index, whole_number
from hashray.data.listing import SourceConfig, SourceRow, Survey, read_text
from hashray.errors import InputError
from hashray.storage import join, open_store

LIST_ENDINGS = (".txt", ".lst")
Rows = tuple[list[SourceRow], list[str] | None]


def list_lists(survey: Survey, config: SourceConfig, num_classes: int | None) -> Rows:
    """Lines of `path index` or `path 0 1 0 …` (multi-hot); a file's stem with a split's name is a split.

    A path that stands in several lists is one row with all their splits: in the public lists the training list is
    part of the database list. Its labels must agree.
    """
    store, keys = survey.store, survey.take(LIST_ENDINGS)
    root = open_store(config.root).url if config.root else store.url
    names_file = open_store(config.class_names).url if config.class_names else None
    sizes = {join(store.url, key): size for key, size in survey.sizes.items()}
    if root != store.url:  # else these are the files that were listed already
        sizes |= {join(root, key): size for key, size in open_store(root).list(on_error=lambda key, error: None)}
    merged: dict[str, SourceRow] = {}
    width: int | None = None
    for key in keys:
        if join(store.url, key) == names_file:
            continue
        split = SPLIT_WORDS.get(PurePosixPath(key).stem.lower())
        for number, line in enumerate(read_text(store, key).split("\n"), 1):
            if not line.strip():
                continue
            place = f"{join(store.url, key)}, line {number}"
            name, labels, count = _parse_line(line, place, num_classes, split == "unlabelled")
            if count and width is not None and count != width:
                raise InputError(f"{place}: {count} label fields, the lines before have {width}")
            width = count or width
            if "\0" in name:
                survey.lose(name.replace("\0", "\\0"), f"{place}: the path holds a NUL")
                continue
            path, locator = _locate(name, root, bool(config.root))
            old = merged.get(path)
            if old is None:
                merged[path] = SourceRow(path, locator, labels, split, sizes.get(locator, 0))
            elif old.labels != labels:
                raise InputError(
                    f"{place}: {path} has labels {labels}, elsewhere {old.labels}; a row has one label set"
                )
            elif split is None or old.split is None or split in old.split.split("+"):
                raise InputError(f"{place}: {path} stands twice in the lists of one split; ids must be unique")
            else:
                merged[path] = replace(old, split="+".join(sorted({*old.split.split("+"), split})))
    named = {row.locator for row in merged.values()}
    survey.take_back(key for key in set(survey.keys) - set(keys) if join(store.url, key) in named)
    return list(merged.values()), [str(i) for i in range(width)] if width and width > 1 else None


def _locate(name: str, root: str, root_given: bool) -> tuple[str, str]:
    """Id and locator of a path of a list. An absolute path is used as it is, unless --root is given."""
    if name.startswith("s3://"):
        return name, name
    path = str(PurePosixPath(name))
    return path, path if path.startswith("/") and not root_given else join(root, path)


def _parse_line(line: str, place: str, num_classes: int | None, bare: bool) -> tuple[str, tuple[int, ...], int]:
    # The labels stand at the end; a path may hold spaces.
    words = line.split()
    numbers: list[int] = []
    while len(numbers) < len(words) - 1 and (number := whole_number(words[-1 - len(numbers)])) is not None:
        numbers.append(number)
    numbers.reverse()
    count = len(numbers)
    if count == 0 and bare:
        return line.strip(), (), 0
    if count == 0:
        raise InputError(f"{place}: no label after the path {line.strip()!r}; expected 'path index' or 'path 0 1 0 …'")
    path = line.strip().rsplit(maxsplit=count)[0]
    if count == 1:
        return path, (check_index(numbers[0], num_classes, place),), 1
    if set(numbers) - {0, 1}:
        raise InputError(f"{place}: a multi-hot row of {count} fields may hold only 0 and 1")
    if num_classes is not None and count != num_classes:
        raise InputError(f"{place}: {count} label fields, the class-names file has {num_classes} classes")
    return path, tuple(i for i, bit in enumerate(numbers) if bit), count

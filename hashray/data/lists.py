"""List files as sources: lines of `path index`, `path 0 1 0 …` or, where none has a label, of a path alone. No Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from hashray.data.images import image_endings
from hashray.data.labels import SPLIT_WORDS, Labels, check_index, whole_number
from hashray.data.listing import SourceConfig, SourceRow, Survey, Unit, read_text
from hashray.errors import InputError
from hashray.storage import join, open_store

LIST_ENDINGS = (".txt", ".lst")
BARE = -1  # in the place of the number of label fields


def scan_lists(survey: Survey, unit: Unit, config: SourceConfig, num_classes: int | None) -> Iterator[SourceRow]:
    """Yield the lines `path index` or `path 0 1 0 …` (multi-hot); a file's stem with a split's name is a split.

    A path may stand in several lists; `merge_rows` makes one row of it. A row's value is its number of label fields and
    its labels; BARE marks an image's path alone in another list than that of the unlabelled.
    """
    store = survey.store
    root = open_store(config.root).url if config.root else store.url
    names_file = open_store(config.class_names).url if config.class_names else None
    width: int | None = None
    taken = set[str]()
    for key in survey.take(LIST_ENDINGS):
        if join(store.url, key) == names_file:
            continue
        split = SPLIT_WORDS.get(PurePosixPath(key).stem.lower())
        for number, line in enumerate(read_text(store, key).split("\n"), 1):
            if not line.strip():
                continue
            place = f"{join(store.url, key)}, line {number}"
            name, labels, count = _parse_line(line, place, num_classes)
            if not config.labels or (count == BARE and split == "unlabelled"):
                labels, count = (), 0
            elif count == BARE and not name.lower().endswith(image_endings()):
                raise InputError(
                    f"{place}: no label after the path {name!r}; expected 'path index' or 'path 0 1 0 …' (or, for a "
                    "corpus without labels, nothing but paths of images, or --no-labels)"
                )
            if count > 0 and width is not None and count != width:
                raise InputError(f"{place}: {count} label fields, the lines before have {width}")
            width = count if count > 0 else width
            if "\0" in name:
                survey.lose(name.replace("\0", "\\0"), f"{place}: the path holds a NUL")
                continue
            path, locator = _locate(name, root, bool(config.root))
            size_bytes = unit.named.get(locator)
            if size_bytes is not None and locator not in taken:
                taken.add(locator)
                if not locator.lower().endswith(LIST_ENDINGS):
                    survey.take_back([locator])
            yield SourceRow(path, locator, [count, *labels], split, size_bytes, place)


def read_fields(values: Sequence[Sequence[int]], places: Sequence[str]) -> tuple[list[Labels], int | None]:
    """The labels of every value of `scan_lists`, and the number of classes where lines are multi-hot.

    Raises:
        InputError: lines with different numbers of label fields, or with none while others have some.
    """
    width, bare = 0, None
    for (count, *_), place in zip(values, places, strict=True):
        if count == BARE:
            bare = place
            continue
        if count and width and count != width:
            raise InputError(f"{place}: {count} label fields, other lines have {width}")
        width = count or width
    if bare and width:
        raise InputError(
            f"{bare}: no label after the path, but other lines have one; expected 'path index' or 'path 0 1 0 …' in "
            "every line. Rows without labels go into a list called unlabelled.txt"
        )
    return [tuple(labels) for _, *labels in values], width if width > 1 else None


def merge_rows(rows: list[SourceRow]) -> SourceRow:
    """The one row of a path that stands in several lists: with all their splits, and labels that must agree.

    In the public lists the training list is part of the database list.

    Raises:
        InputError: other labels, or twice in the lists of one split.
    """
    first, *others = rows
    splits = [first.split]
    for row in others:
        if row.value[1:] != first.value[1:]:
            labels, before = tuple(row.value[1:]), tuple(first.value[1:])
            raise InputError(f"{row.place}: {row.id} has labels {labels}, elsewhere {before}; a row has one label set")
        if row.split is None or row.split in splits or None in splits:
            raise InputError(f"{row.place}: {row.id} stands twice in the lists of one split; ids must be unique")
        splits.append(row.split)
    return first if len(rows) == 1 else first._replace(split="+".join(sorted(map(str, splits))))


def _locate(name: str, root: str, root_given: bool) -> tuple[str, str]:
    """Id and locator of a path of a list. An absolute path is used as it is, unless --root is given."""
    if name.startswith("s3://"):
        return name, name
    path = str(PurePosixPath(name))
    return path, path if path.startswith("/") and not root_given else join(root, path)


def _parse_line(line: str, place: str, num_classes: int | None) -> tuple[str, tuple[int, ...], int]:
    # The labels stand at the end; a path may hold spaces.
    words = line.split()
    numbers: list[int] = []
    while len(numbers) < len(words) - 1 and (number := whole_number(words[-1 - len(numbers)])) is not None:
        numbers.append(number)
    numbers.reverse()
    count = len(numbers)
    if count == 0:
        return line.strip(), (), BARE
    path = line.strip().rsplit(maxsplit=count)[0]
    if count == 1:
        return path, (check_index(numbers[0], num_classes, place),), 1
    if set(numbers) - {0, 1}:
        raise InputError(f"{place}: a multi-hot row of {count} fields may hold only 0 and 1")
    if num_classes is not None and count != num_classes:
        raise InputError(f"{place}: {count} label fields, the class-names file has {num_classes} classes")
    return path, tuple(i for i, bit in enumerate(numbers) if bit), count

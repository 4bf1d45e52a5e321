"""Where images come from: folder, list file, Parquet, tar shards. No Ray.

A source is read in two steps. `list_source` is cheap: it gives, for every row, its id, its labels, the
split it came with and a locator of its bytes; no image is opened. `fetch` then takes locators to bytes,
anywhere, in any order. The listing (about a hundred bytes a row) is all that the driver ever holds.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from hashray.data.containers import by_reference_allowed, fetch, list_parquet, list_tar, refuse_compressed
from hashray.data.images import EXTENSIONS
from hashray.data.listing import (
    SPLIT_WORDS,
    Format,
    Listing,
    SourceConfig,
    SourceRow,
    check_index,
    files,
    is_file,
    read_class_names,
    read_text,
    shards,
    whole_number,
)
from hashray.errors import InputError
from hashray.storage import join, open_store

__all__ = [
    "SPLIT_WORDS",
    "Format",
    "Listing",
    "SourceConfig",
    "SourceRow",
    "by_reference_allowed",
    "fetch",
    "guess_format",
    "list_source",
]

LIST_SUFFIXES = (".txt", ".lst")
FORMATS: dict[str, Format] = {".parquet": "parquet", ".tar": "tar", **dict.fromkeys(LIST_SUFFIXES, "list")}


def list_source(url: str, config: SourceConfig) -> Listing:
    """List every row of a source without opening an image.

    Raises:
        InputError: nothing there, no image in it, a malformed line, a label out of range, with place and reason.
    """
    kind = config.format or guess_format(url)
    names = read_class_names(config.class_names)
    readers = {"folder": _list_folder, "list": _list_lists, "parquet": list_parquet, "tar": list_tar}
    rows, width = readers[kind](url, config, len(names) if names else None)
    if not rows:
        raise InputError(f"{url} ({kind}) holds no images; image files end in {', '.join(EXTENSIONS)}")
    if width and not names:
        names = [str(i) for i in range(width)]
    return Listing(kind, rows, names, random_access=kind in ("folder", "list"))


def guess_format(url: str) -> Format:
    """Tell the format from a file's ending, from lists named after splits, or from the first files of a folder."""
    refuse_compressed(url)
    suffix = PurePosixPath(url.rstrip("/")).suffix.lower()
    if suffix in FORMATS and is_file(url):
        return FORMATS[suffix]
    store = open_store(url)
    if any(store.exists(word + suffix) for word in SPLIT_WORDS for suffix in LIST_SUFFIXES):
        return "list"
    lists = False
    for key, _ in files(url):
        refuse_compressed(key)
        suffix = PurePosixPath(key).suffix.lower()
        if suffix in EXTENSIONS:
            return "folder"
        if suffix in LIST_SUFFIXES:  # or a README beside images
            lists = True
        elif suffix in FORMATS:
            return FORMATS[suffix]
    if lists:
        return "list"
    raise InputError(
        f"{url} is empty or of no known format; give a folder of images, a list file (.txt), Parquet or tar shards"
    )


def _list_folder(url: str, config: SourceConfig, num_classes: int | None) -> tuple[list[SourceRow], None]:
    """`[split/]class/…/file`; images at the top have no class.

    First folders are splits when all have a split's name. CIFAR-100 has a class "train": among other classes,
    a folder of that name which holds no folders is a class too.
    """
    keys = [key for key, _ in files(url) if PurePosixPath(key).suffix.lower() in EXTENSIONS]
    paths = {key: PurePosixPath(key).parts[:-1] for key in keys}
    tops = {folders[0] for folders in paths.values() if folders}
    splits = {top for top in tops if top.lower() in SPLIT_WORDS}
    if splits != tops:
        deep = sorted(splits & {folders[0] for folders in paths.values() if len(folders) > 1})
        if deep:
            raise InputError(
                f"{url} holds the split {deep[0]!r} beside {sorted(tops - splits)[0]!r}, which is no split; first "
                f"folders are all splits ({', '.join(sorted(SPLIT_WORDS))}) or all classes: move one of them"
            )
        splits = set()
    rows = []
    for key, folders in paths.items():
        is_split = bool(folders) and folders[0] in splits
        labels = folders[is_split : is_split + 1]
        rows.append(SourceRow(key, join(url, key), labels, SPLIT_WORDS[folders[0].lower()] if is_split else None))
    return rows, None


def _list_lists(url: str, config: SourceConfig, num_classes: int | None) -> tuple[list[SourceRow], int | None]:
    """Lines of `path index` or `path 0 1 0 …` (multi-hot); a file's stem with a split's name is a split.

    A path in several lists is one row with all their splits, as in the public deep-hashing lists, where
    the training list is a part of the database list. Its labels must agree.
    """
    store, keys = shards(url, LIST_SUFFIXES)
    root = open_store(config.root).url if config.root else store.url
    names_file = open_store(config.class_names).url if config.class_names else None
    merged: dict[str, SourceRow] = {}
    width: int | None = None
    for key in keys:
        if join(store.url, key) == names_file:
            continue
        split = SPLIT_WORDS.get(PurePosixPath(key).stem.lower())
        for number, line in enumerate(read_text(store, key).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{join(store.url, key)}, line {number}"
            name, labels, found = _parse_line(line, where, num_classes, split == "unlabelled")
            if found and width is not None and found != width:
                raise InputError(f"{where}: {found} label fields, the lines before have {width}")
            width = found or width
            path, locator = _place(name, root, bool(config.root))
            old = merged.get(path)
            if old is None:
                merged[path] = SourceRow(path, locator, labels, split)
            elif old.labels != labels:
                raise InputError(
                    f"{where}: {path} has labels {labels}, elsewhere {old.labels}; a row has one label set"
                )
            elif split is None or old.split is None or split in old.split.split("+"):
                raise InputError(f"{where}: {path} stands twice in the lists of one split; ids must be unique")
            else:
                merged[path] = SourceRow(path, old.locator, labels, "+".join(sorted({*old.split.split("+"), split})))
    return list(merged.values()), width if width and width > 1 else None


def _place(name: str, root: str, root_given: bool) -> tuple[str, str]:
    """Id and locator of a path of a list. An absolute one stands for itself, but where --root is given."""
    if name.startswith("s3://"):
        return name, name
    path = str(PurePosixPath(name))
    return path, path if path.startswith("/") and not root_given else join(root, path)


def _parse_line(line: str, where: str, num_classes: int | None, bare: bool) -> tuple[str, tuple[int, ...], int]:
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
        raise InputError(f"{where}: no label after the path {line.strip()!r}; expected 'path index' or 'path 0 1 0 …'")
    path = line.strip().rsplit(maxsplit=count)[0]
    if count == 1:
        return path, (check_index(numbers[0], num_classes, where),), 1
    if set(numbers) - {0, 1}:
        raise InputError(f"{where}: a multi-hot row of {count} fields may hold only 0 and 1")
    if num_classes is not None and count != num_classes:
        raise InputError(f"{where}: {count} label fields, the class-names file has {num_classes} classes")
    return path, tuple(i for i, bit in enumerate(numbers) if bit), count

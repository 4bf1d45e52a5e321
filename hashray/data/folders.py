"""A folder of images as a source: `[split/]class/…/file`, and what else people have in folders. No Ray."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import PurePosixPath

from hashray.data.images import image_endings
from hashray.data.labels import SPLIT_WORDS, Labels
from hashray.data.listing import SourceConfig, SourceRow, Survey, Unit, read_text
from hashray.errors import InputError
from hashray.storage import Store, join

CONTAINERS = {"images", "image", "imgs", "img", "jpegimages"}  # folders that say nothing of a class
ANNOTATIONS = "annotations.txt"


def scan_folder(survey: Survey, unit: Unit, config: SourceConfig) -> Iterator[SourceRow]:
    """Yield an image a row; its value is its folders and, from a file beside them, its annotated class."""
    annotations = sorted({*unit.annotations, *(key for key in survey.keys if key.endswith(ANNOTATIONS))})
    keys = survey.take(image_endings())
    survey.take_back(key for key in annotations if key in survey.sizes)
    for key in keys:
        *folders, name = PurePosixPath(key).parts
        above = [path for path in annotations if key.startswith(path[: path.rfind("/") + 1])]
        label = next((text for path in above if (text := _annotated(survey.store, path).get(name))), None)
        yield SourceRow(key, join(survey.url, key), [folders, label], None, survey.sizes[key])


def read_folders(
    survey: Survey, values: Iterable[tuple[tuple[str, ...], str | None]]
) -> dict[tuple[tuple[str, ...], str | None], tuple[Labels, str | None]]:
    """The labels and the split of every value of `scan_folder`: `[split/]class/…/file`; at the top there is no class.

    First folders are splits when all have a split's name. CIFAR-100 has a class "train": among other classes,
    a folder of that name which holds no folders is a class too. A folder around everything (CUB_200_2011/images/…) is
    no class, and neither is one called "images"; inside a split, only "images" is none. In a split without classes,
    `*annotations.txt` beside the images gives each file's class, as in Tiny-ImageNet.
    """
    paths = _without_wrappers(survey, {value: value[0] for value in values})
    splits = _splits(survey.url, paths)
    groups: dict[str | None, Paths] = defaultdict(dict)
    for value, folders in paths.items():
        in_split = bool(folders) and folders[0] in splits
        groups[folders[0] if in_split else None][value] = folders[1:] if in_split else folders
    meaning: dict[tuple[tuple[str, ...], str | None], tuple[Labels, str | None]] = {}
    for name, group in groups.items():
        for value, folders in _without_wrappers(survey, group, in_split=name is not None).items():
            annotated = () if value[1] is None else (value[1],)
            meaning[value] = folders[:1] or annotated, SPLIT_WORDS[name.lower()] if name else None
    return meaning


Paths = dict[tuple[tuple[str, ...], str | None], tuple[str, ...]]


def _without_wrappers(survey: Survey, paths: Paths, in_split: bool = False) -> Paths:
    """Paths without a first folder that holds everything and is no class.

    That is a container, or, outside a split, a folder with several folders, a container or a split below it.
    """
    while paths:
        tops = {folders[:1] for folders in paths.values()}
        if len(tops) > 1 or tops == {()}:
            break
        ((top,),) = tops
        below = {folders[1:2] for folders in paths.values()}
        names = {folder.lower() for folders in below for folder in folders}
        holds_folders = () not in below and (len(below) > 1 or names <= {*CONTAINERS, *SPLIT_WORDS})
        wraps = holds_folders and not in_split and top.lower() not in SPLIT_WORDS
        if not wraps and top.lower() not in CONTAINERS:
            break
        survey.notes[f"{top}/ is not a class: all images are below it"] = None
        paths = {key: folders[1:] for key, folders in paths.items()}
    return paths


def _splits(url: str, paths: Paths) -> set[str]:
    """The first folders that are splits: all of them or none.

    Raises:
        InputError: a split with classes in it stands beside a class.
    """
    tops = {folders[0] for folders in paths.values() if folders}
    splits = {top for top in tops if top.lower() in SPLIT_WORDS}
    if splits == tops:
        return splits
    deep = sorted(splits & {folders[0] for folders in paths.values() if len(folders) > 1})
    if deep:
        raise InputError(
            f"{url} holds the split {deep[0]!r} beside {sorted(tops - splits)[0]!r}, which is no split; first "
            f"folders are all splits ({', '.join(sorted(SPLIT_WORDS))}) or all classes: move one of them"
        )
    return set()


@lru_cache(maxsize=8)
def _annotated(store: Store, key: str) -> dict[str, str]:
    """The class of each file by name, from lines of `file<TAB>class…`."""
    labels: dict[str, str] = {}
    for line in read_text(store, key).splitlines():
        name, tab, rest = line.partition("\t")
        if tab and rest.strip():
            labels[name] = rest.split("\t")[0].strip()
    return labels

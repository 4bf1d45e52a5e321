"""A folder of images as a source: `[split/]class/…/file`, and what else people have in folders. No Ray."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath

from hashray.data.images import image_endings
from hashray.data.labels import SPLIT_WORDS
from hashray.data.listing import SourceConfig, SourceRow, Survey, read_text
from hashray.data.lists import Rows
from hashray.errors import InputError
from hashray.storage import join

CONTAINERS = {"images", "image", "imgs", "img", "jpegimages"}  # folders that say nothing of a class
ANNOTATIONS = "annotations.txt"


def list_folder(survey: Survey, config: SourceConfig, num_classes: int | None) -> Rows:
    """`[split/]class/…/file`; images at the top have no class.

    First folders are splits when all have a split's name. CIFAR-100 has a class "train": among other classes,
    a folder of that name which holds no folders is a class too. A folder around everything (CUB_200_2011/images/…) is
    no class, and neither is one called "images"; inside a split, only "images" is none. In a split without classes,
    `*annotations.txt` beside the images gives each file's class, as in Tiny-ImageNet.
    """
    annotations = [key for key in survey.keys if key.endswith(ANNOTATIONS)]
    keys = survey.take(image_endings())
    survey.take_back(annotations)
    paths = {key: PurePosixPath(key).parts[:-1] for key in keys}
    paths = _without_wrappers(survey, paths)
    splits = _splits(survey.url, paths)
    groups: dict[str | None, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for key, folders in paths.items():
        in_split = bool(folders) and folders[0] in splits
        groups[folders[0] if in_split else None][key] = folders[1:] if in_split else folders
    rows = {}
    for name, group in groups.items():
        classes = _without_wrappers(survey, group, in_split=name is not None)
        labels = _annotated(survey, [key for key in annotations if name is None or f"{name}/" in key])
        for key, folders in classes.items():
            label = folders[:1] or labels.get(PurePosixPath(key).name, ())
            split = SPLIT_WORDS[name.lower()] if name else None
            rows[key] = SourceRow(key, join(survey.url, key), label, split, survey.sizes[key])
    return [rows[key] for key in keys], None


def _without_wrappers(
    survey: Survey, paths: dict[str, tuple[str, ...]], in_split: bool = False
) -> dict[str, tuple[str, ...]]:
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


def _splits(url: str, paths: dict[str, tuple[str, ...]]) -> set[str]:
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


def _annotated(survey: Survey, keys: list[str]) -> dict[str, tuple[str, ...]]:
    """The class of each file by name, from lines of `file<TAB>class…`."""
    labels: dict[str, tuple[str, ...]] = {}
    for key in keys:
        for line in read_text(survey.store, key).splitlines():
            name, tab, rest = line.partition("\t")
            if tab and rest.strip():
                labels[name] = (rest.split("\t")[0].strip(),)
    return labels

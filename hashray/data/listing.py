"""What every source has in common: its config, its rows, and an account of every file that was seen. No Ray."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from hashray.config import Config
from hashray.data.attributes import join_schemas
from hashray.errors import InputError
from hashray.storage import Store, join, open_store, split_url

Format = Literal["folder", "list", "parquet", "tar"]
# Folders and files that cameras, file servers and desktops leave beside images.
JUNK_FOLDERS = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "#recycle", "#snapshot", "lost+found", "__macosx",
    "$recycle.bin", "system volume information", "recycler", "recycled",
}  # fmt: skip
JUNK_FILES = {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}


class SourceConfig(Config):
    """How to read a source; unset columns are recognised by their usual names."""

    format: Format | None = Field(None, description="Layout of the source; unset: recognised from its files")
    root: str | None = Field(None, description="Folder that a list's paths are relative to; unset: the list's folder")
    class_names: str | None = Field(None, description="Text file of class names, one a line; labels index into it")
    id_column: str | None = Field(None, description="Parquet column of row ids")
    image_column: str | None = Field(None, description="Parquet column of encoded image bytes")
    label_column: str | None = Field(
        None, description="Parquet column of labels: index, name, list of them or 0/1 list; none: rows without labels"
    )
    split_column: str | None = Field(None, description="Parquet column of split names")
    labels: bool = Field(
        True, description="Whether labels are read; --no-labels: folders, lists, columns and files name no class"
    )
    attributes: tuple[str, ...] = Field(
        (), description="Columns of a Parquet source (or of --attributes-file) that each row keeps, for --where"
    )
    attributes_file: str | None = Field(
        None, description="Parquet or CSV file with a column id, whose other columns (or --attributes) each row keeps"
    )


class SourceRow(NamedTuple):
    """One image of a source, not yet opened.

    Attributes:
        value: its labels as the source has them, JSON-able; what they mean depends on the values of all rows.
        size_bytes: of its encoded bytes: exact, or the mean of a Parquet row group, or None where it is unknown.
        place: where the row stands, for errors; unset: its locator.
    """

    id: str
    locator: str
    value: Any
    split: str | None = None
    size_bytes: int | None = None
    place: str | None = None


class LostRow(NamedTuple):
    """An image that cannot even be listed: it goes to quarantine with the reason."""

    id: str
    uri: str
    reason: str


@dataclass
class Survey:
    """The files of a source, looked at once, and what became of each.

    Attributes:
        keys: the files that a reader may take, sorted.
        sizes: the size of each of these files in bytes.
        is_file: whether the url names one file, not a folder.
        lost: images whose path cannot be used.
        skipped: files that are no images and no labels, by ending or by kind of junk.
        members: the files inside tar shards.
        members_skipped: those of them that are no images and no labels.
        columns_read: Parquet columns that are used.
        columns_ignored: Parquet columns that are not.
        notes: what was recognised without being asked for, such as a usual column name.
        class_names: names of the classes that the source itself has, and the file that has them.
        elsewhere: labels of tar shards whose image is in another shard, by sample.
        attributes: the columns that each row keeps, of the types that hold those of all files.
        complete: whether `keys` are all files, not only the first.
    """

    url: str
    store: Store
    keys: list[str]
    is_file: bool
    sizes: dict[str, int] = field(default_factory=dict)
    lost: list[LostRow] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    columns_read: dict[str, None] = field(default_factory=dict)
    columns_ignored: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    seen: int = 0
    members: int = 0
    members_skipped: Counter[str] = field(default_factory=Counter)
    class_names: list[str] | None = None
    elsewhere: dict[str, list[Any]] = field(default_factory=dict)
    attributes: pa.Schema = field(default_factory=lambda: pa.schema([]))
    complete: bool = True

    def add(self, other: Survey) -> None:
        """Count what another survey saw of the same source."""
        self.seen, self.members = self.seen + other.seen, self.members + other.members
        self.lost += other.lost
        self.skipped.update(other.skipped)
        self.members_skipped.update(other.members_skipped)
        for mine, theirs in (
            (self.columns_read, other.columns_read),
            (self.columns_ignored, other.columns_ignored),
            (self.notes, other.notes),
        ):
            mine.update(theirs)
        if other.class_names:
            self.name_classes(other.class_names, self.url)
        self.attributes = join_schemas([self.attributes, other.attributes], self.url)
        for sample, values in other.elsewhere.items():
            self.elsewhere.setdefault(sample, []).extend(values)

    def name_classes(self, names: list[str], where: str) -> None:
        """Note the class names of a file; those of all files must agree."""
        if self.class_names and names != self.class_names:
            raise InputError(
                f"{where}: its class names are {names[:4]}…, other files have {self.class_names[:4]}…; make them agree"
            )
        self.class_names = names

    def take(self, endings: tuple[str, ...]) -> list[str]:
        """The files with one of these endings; the others count as skipped. A file that the url names is taken."""
        if self.is_file:
            return self.keys
        taken = [key for key in self.keys if key.lower().endswith(endings)]
        self.skipped.update(map(_ending, set(self.keys) - set(taken)))
        return taken

    def take_back(self, keys: Iterable[str]) -> None:
        """Files that were counted as skipped and are read all the same, such as the images that a list names."""
        self.skipped.subtract(map(_ending, keys))

    def lose(self, key: str, reason: str) -> None:
        """Put an image aside that cannot be listed."""
        name = key.encode("utf-8", "backslashreplace").decode()
        self.lost.append(LostRow(name, join(self.store.url, name), reason))


class Unit(NamedTuple):
    """A share of a source that one task lists: these files, or all files under these prefixes.

    Attributes:
        keys: files and their sizes in bytes.
        named: the sizes of all files of the source, by url, where they are few: for lists, which name files.
        annotations: files beside images that may give the class of one.
    """

    number: int
    keys: tuple[tuple[str, int], ...] = ()
    prefixes: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    named: Mapping[str, int] = {}  # a NamedTuple's defaults are never changed


def look(url: str, most: int | None = None) -> Survey:
    """Look at the files of a source once. A path that cannot be used never ends it: it is counted, with the reason.

    Args:
        most: the number of files to look at; unset: all.

    Raises:
        InputError: there is nothing at all.
    """
    if is_file(url):
        folder, name = split_url(url)
        return Survey(url, open_store(folder), [name], True, seen=1)
    survey = Survey(url, open_store(url), [], False)
    look_under(survey, "", most)
    if not survey.seen:
        raise InputError(f"{url} not found, or an empty folder; nothing to ingest")
    return survey


def look_under(survey: Survey, prefix: str, most: int | None = None) -> None:
    """Add the files under a prefix to a survey."""
    faults: list[tuple[str, OSError]] = []
    for key, size_bytes in survey.store.list(prefix, on_error=lambda key, error: faults.append((key, error))):
        if most is not None and survey.seen >= most:
            survey.complete = False
            break
        sort_in(survey, key, size_bytes)
    _lose(survey, faults)


def look_at_level(survey: Survey, prefix: str) -> list[str]:
    """Add the files of one level to a survey; return the prefixes below it."""
    faults: list[tuple[str, OSError]] = []
    prefixes, files = survey.store.level(prefix, on_error=lambda key, error: faults.append((key, error)))
    for key, size_bytes in files:
        sort_in(survey, key, size_bytes)
    _lose(survey, faults)
    return prefixes


def _lose(survey: Survey, faults: list[tuple[str, OSError]]) -> None:
    for key, error in faults:
        if kind_of_junk(key) is None:
            survey.seen += 1
            survey.lose(key, f"{error.strerror or error}")


def sort_in(survey: Survey, key: str, size_bytes: int) -> None:
    """Count a file: as junk, as an image that cannot be listed, or as one that a reader may take."""
    survey.seen += 1
    junk = kind_of_junk(key)
    if junk is not None:
        survey.skipped[junk] += 1
    elif not key.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in key):
        survey.lose(key, "the file name is not UTF-8: rename it")
    else:
        survey.keys.append(key)
        survey.sizes[key] = size_bytes


def kind_of_junk(key: str) -> str | None:
    """The kind of junk that a file of this path is, or None."""
    *folders, name = PurePosixPath(key).parts
    for folder in folders:
        if folder.lower() in JUNK_FOLDERS:
            return f"in {folder}/"
    if any(part.startswith(".") and part != ".." for part in (*folders, name)):
        return "hidden"
    return name if name.lower() in JUNK_FILES else "temporary" if name.startswith("~$") else None


def _ending(key: str) -> str:
    return PurePosixPath(key).suffix.lower() or "no ending"


def is_file(url: str) -> bool:
    """Whether `url` is an object, not a folder or a whole bucket."""
    try:
        folder, name = split_url(url)
        return open_store(folder).exists(name)
    except (InputError, ValueError):  # a bucket, the root, "..": no name of a file
        return False


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


def hive_values(key: str) -> dict[str, str]:
    """Values that folders of a path hold, as Spark and pyarrow write partitions.

    >>> hive_values("split=train/label=3/part-0.parquet")
    {'split': 'train', 'label': '3'}
    """
    pairs = (re.fullmatch(r"([A-Za-z_]\w*)=(.*)", folder) for folder in PurePosixPath(key).parts[:-1])
    return {pair[1]: pair[2] for pair in pairs if pair}

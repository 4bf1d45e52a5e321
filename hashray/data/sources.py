"""Where images come from: folder, list file, Parquet, tar shards. No Ray.

A source is read in two passes. `list_source` is cheap: it gives, for every row, its id, its labels, the
split it came with and a locator of its bytes; no image is opened. `fetch` then takes locators to bytes,
anywhere, in any order. The listing (about a hundred bytes a row) is all that the driver ever holds.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from hashray.config import Config
from hashray.data.images import EXTENSIONS
from hashray.errors import InputError, perhaps
from hashray.storage import Store, join, open_store, split_url

Format = Literal["folder", "list", "parquet", "tar"]
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
    labels: tuple[int | str, ...]
    split: str | None = None


@dataclass(frozen=True)
class Listing:
    """All rows of a source. `class_names` is set where the source itself numbers its classes."""

    format: Format
    rows: list[SourceRow]
    class_names: list[str] | None
    random_access: bool


def list_source(url: str, config: SourceConfig) -> Listing:
    """List every row of a source without opening an image.

    Raises:
        InputError: nothing there, no image in it, a malformed line, a label out of range, with place and reason.
    """
    kind = config.format or guess_format(url)
    names = _read_class_names(config.class_names)
    readers = {"folder": _list_folder, "list": _list_lists, "parquet": _list_parquet, "tar": _list_tar}
    rows = readers[kind](url, config, names)
    if not rows:
        raise InputError(f"{url} ({kind}) holds no images; image files end in {', '.join(EXTENSIONS)}")
    return Listing(kind, rows, names, random_access=kind in ("folder", "list"))


def guess_format(url: str) -> Format:
    """Tell the format from a file's ending, or from the first files of a folder."""
    by_suffix: dict[str, Format] = {".parquet": "parquet", ".tar": "tar", ".txt": "list", ".lst": "list"}
    suffix = PurePosixPath(url.rstrip("/")).suffix.lower()
    if suffix in by_suffix and _is_file(url):
        return by_suffix[suffix]
    for key, _ in _files(url):
        suffix = PurePosixPath(key).suffix.lower()
        if suffix in by_suffix:
            return by_suffix[suffix]
        if suffix in EXTENSIONS:
            return "folder"
    raise InputError(
        f"{url} is empty or of no known format; give a folder of images, a list file (.txt), Parquet or tar shards"
    )


def _is_file(url: str) -> bool:
    folder, name = split_url(url)
    return bool(name) and open_store(folder).exists(name)


def _files(url: str) -> Iterator[tuple[str, int]]:
    """(key, bytes) of the files of a source, sorted; InputError where there is nothing at all."""
    found = False
    for key, size in open_store(url).list():
        if not PurePosixPath(key).name.startswith("."):
            found = True
            yield key, size
    if not found:
        raise InputError(f"{url} not found, or an empty folder; nothing to ingest")


def _shards(url: str, suffix: str) -> tuple[Store, list[str]]:
    if _is_file(url):
        folder, name = split_url(url)
        return open_store(folder), [name]
    return open_store(url), [key for key, _ in _files(url) if key.lower().endswith(suffix)]


def _read_class_names(url: str | None) -> list[str] | None:
    if url is None:
        return None
    folder, name = split_url(url)
    names = [line.strip() for line in open_store(folder).read(name).decode().splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise InputError(f"{url} names a class twice; each line is one class")
    return names


def _list_folder(url: str, config: SourceConfig, names: list[str] | None) -> list[SourceRow]:
    """`[split/]class/…/file`; a first folder with a split's name is a split; images at the top have no class."""
    rows = []
    for key, _ in _files(url):
        path = PurePosixPath(key)
        if path.suffix.lower() not in EXTENSIONS:
            continue
        folders = list(path.parts[:-1])
        split = SPLIT_WORDS.get(folders[0].lower()) if folders else None
        if split:
            folders = folders[1:]
        labels = (folders[0],) if folders else ()
        rows.append(SourceRow(key, join(url, key), labels, split))
    return rows


def _list_lists(url: str, config: SourceConfig, names: list[str] | None) -> list[SourceRow]:
    """Lines of `path index` or `path 0 1 0 …` (multi-hot); a file's stem with a split's name is a split.

    A path in several lists is one row with all their splits, as in the public deep-hashing lists, where
    the training list is a part of the database list. Its labels must agree.
    """
    store, keys = _shards(url, ".txt")
    root = config.root or store.url
    merged: dict[str, SourceRow] = {}
    for key in keys:
        split = SPLIT_WORDS.get(PurePosixPath(key).stem.lower())
        width: int | None = None
        for number, line in enumerate(store.read(key).decode().splitlines(), 1):
            if not line.strip():
                continue
            where = f"{join(store.url, key)}, line {number}"
            path, labels, found = _parse_line(line, where, len(names) if names else None)
            if width is not None and found != width:
                raise InputError(f"{where}: {found} label fields, the lines above have {width}")
            width = found
            old = merged.get(path)
            if old is None:
                merged[path] = SourceRow(path, join(root, path), labels, split)
            elif old.labels != labels:
                raise InputError(
                    f"{where}: {path} has labels {labels}, elsewhere {old.labels}; a row has one label set"
                )
            elif split is None or old.split is None or split in old.split.split("+"):
                raise InputError(f"{where}: {path} stands twice in the same list; ids must be unique")
            else:
                merged[path] = SourceRow(path, old.locator, labels, "+".join(sorted({*old.split.split("+"), split})))
    return list(merged.values())


def _parse_line(line: str, where: str, num_classes: int | None) -> tuple[str, tuple[int, ...], int]:
    # The labels stand at the end; a path may hold spaces.
    words = line.split()
    count = 0
    while count < len(words) - 1 and words[-1 - count].lstrip("-").isdigit():
        count += 1
    path = line.strip() if not count else line.strip().rsplit(maxsplit=count)[0]
    numbers = [int(word) for word in words[len(words) - count :]]
    if count == 0:
        raise InputError(f"{where}: no label after the path {path!r}; expected 'path index' or 'path 0 1 0 …'")
    if count == 1:
        return path, (_check_index(numbers[0], num_classes, where),), 1
    if set(numbers) - {0, 1}:
        raise InputError(f"{where}: a multi-hot row of {count} fields may hold only 0 and 1")
    if num_classes is not None and count != num_classes:
        raise InputError(f"{where}: {count} label fields, the class-names file has {num_classes} classes")
    return path, tuple(i for i, bit in enumerate(numbers) if bit), count


def _check_index(index: int, num_classes: int | None, where: str) -> int:
    if index < 0 or (num_classes is not None and index >= num_classes):
        allowed = f"0 to {num_classes - 1}" if num_classes else "0 and up"
        raise InputError(f"{where}: label {index} is out of range; allowed: {allowed}")
    return index


def _column(schema: pa.Schema, given: str | None, usual: Sequence[str], what: str, where: str) -> str | None:
    if given is not None and given not in schema.names:
        raise InputError(f"{where} has no column {given!r}{perhaps(given, schema.names)} It has: {schema.names}")
    return given or next((name for name in usual if name in schema.names), None)


def _list_parquet(url: str, config: SourceConfig, names: list[str] | None) -> list[SourceRow]:
    store, keys = _shards(url, ".parquet")
    rows: list[SourceRow] = []
    for key in keys:
        where = join(store.url, key)
        with store.open(key) as handle:
            file = _open_parquet(handle, where)
            schema = file.schema_arrow
            image = _column(schema, config.image_column, ("image", "bytes", "jpg", "png", "img"), "image", where)
            if image is None:
                raise InputError(f"{where} has no image column; name it with --image-column. It has: {schema.names}")
            id_name = _column(schema, config.id_column, ("id", "key", "__key__", "path", "filename"), "id", where)
            label = _column(schema, config.label_column, ("labels", "label", "class", "cls"), "label", where)
            split_name = _column(schema, config.split_column, ("split",), "split", where)
            wanted = [name for name in (id_name, label, split_name) if name]
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                table = file.read_row_group(group, columns=wanted)
                columns = {name: table.column(name).to_pylist() for name in wanted}
                for row in range(count):
                    place = f"{where}, row group {group}, row {row}"
                    value = columns[label][row] if label else None
                    split = columns[split_name][row] if split_name else None
                    rows.append(
                        SourceRow(
                            str(columns[id_name][row]) if id_name else f"{key}:{group}:{row}",
                            f"parquet:{where}#column={image}&group={group}&row={row}",
                            _label_values(value, len(names) if names else None, place),
                            _split_word(split, place),
                        )
                    )
    return rows


def _split_word(value: Any, where: str) -> str | None:
    if value is None:
        return None
    words = [SPLIT_WORDS.get(word.lower()) for word in str(value).split("+")]
    if None in words:
        raise InputError(f"{where}: split {value!r} is not known; allowed: {sorted(SPLIT_WORDS)}")
    return "+".join(sorted({str(word) for word in words}))


def _label_values(value: Any, num_classes: int | None, where: str) -> tuple[int | str, ...]:
    """Index, name, list of either, or a 0/1 list as long as there are classes (and longer than one)."""
    if value is None:
        return ()
    values = list(value) if isinstance(value, list | tuple) else [value]
    if all(isinstance(v, str) for v in values):
        return tuple(values)
    if not all(isinstance(v, int | float | bool) and int(v) == v for v in values):
        raise InputError(f"{where}: label {value!r}; expected a class index, a class name or a list of them")
    numbers = [int(v) for v in values]
    multi_hot = isinstance(value, list | tuple) and len(numbers) > 2 and not set(numbers) - {0, 1}
    if multi_hot:
        if num_classes is not None and len(numbers) != num_classes:
            raise InputError(f"{where}: {len(numbers)} label fields, the class-names file has {num_classes} classes")
        return tuple(i for i, bit in enumerate(numbers) if bit)
    return tuple(_check_index(number, num_classes, where) for number in numbers)


def _list_tar(url: str, config: SourceConfig, names: list[str] | None) -> list[SourceRow]:
    """WebDataset shards: members of one key; `.cls`, `.txt` or `.json` ("label"/"labels") beside the image."""
    store, keys = _shards(url, ".tar")
    rows: list[SourceRow] = []
    for key in keys:
        where = join(store.url, key)
        split = SPLIT_WORDS.get(PurePosixPath(key).name.split("-")[0].split(".")[0].lower())
        images: dict[str, tuple[str, int, int]] = {}
        labels: dict[str, Any] = {}
        try:
            with store.open(key) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                    sample = str(PurePosixPath(member.name).with_name(stem))
                    if f".{suffix.lower()}" in EXTENSIONS:
                        images[sample] = (member.name, member.offset_data, member.size)
                    elif suffix in ("cls", "txt", "json"):
                        content = tar.extractfile(member)
                        labels[sample] = _tar_label(content.read().decode() if content else "", suffix)
        except tarfile.TarError as error:
            raise InputError(f"{where} is not an uncompressed tar file: {error}") from error
        for sample, (name, offset, size) in images.items():
            place = f"{where}, member {name}"
            values = _label_values(labels.get(sample), len(names) if names else None, place)
            rows.append(SourceRow(f"{key}/{sample}", f"{where}#offset={offset}&size={size}", values, split))
    return rows


def _tar_label(text: str, suffix: str) -> Any:
    value: Any = text.strip()
    if suffix == "json":
        data = json.loads(value)
        value = data.get("labels", data.get("label")) if isinstance(data, dict) else data
    if isinstance(value, str):
        words = value.split()
        return int(words[0]) if len(words) == 1 and words[0].isdigit() else value or None
    return value


def _open_parquet(handle: Any, where: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(handle)
    except pa.ArrowException as error:
        raise InputError(f"{where} is not a Parquet file: {error}") from error


@lru_cache(maxsize=2)
def _image_column(url: str, column: str, group: int) -> list[Any]:
    folder, name = split_url(url)
    data = open_store(folder).read(name)
    values = pq.ParquetFile(io.BytesIO(data)).read_row_group(group, columns=[column]).column(column).to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]


def fetch(locator: str) -> bytes:
    """The encoded bytes of one image.

    Raises:
        InputError: the object is not there any more.
    """
    url, _, fragment = locator.partition("#")
    options = {key: values[0] for key, values in parse_qs(fragment).items()}
    if url.startswith("parquet:"):
        return _image_column(url.removeprefix("parquet:"), options["column"], int(options["group"]))[
            int(options["row"])
        ]
    folder, name = split_url(url)
    store = open_store(folder)
    if "offset" in options:
        return store.read_range(name, int(options["offset"]), int(options["size"]))
    return store.read(name)


def by_reference_allowed(locator: str) -> bool:
    """Whether a corpus may keep the locator instead of the bytes: one addressable object or range an image."""
    return not urlsplit(locator).scheme.startswith("parquet")

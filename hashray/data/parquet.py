"""Parquet files as a source: which columns are read, and how one image is taken out. No Ray."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from hashray.data.attributes import fit, join_schemas, kept_schema
from hashray.data.labels import split_of_path, split_word, whole_number
from hashray.data.listing import SourceConfig, SourceRow, Survey, Unit, hive_values
from hashray.errors import InputError, perhaps
from hashray.storage import join, open_store, split_url

ENDINGS = (".parquet", ".pq")
LOCATOR = "parquet:"
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
IMAGES = ("image", "bytes", "jpg", "png", "img", "jpeg", "picture", "photo", "image_bytes", "img_bytes")
IDS = ("id", "key", "__key__", "path", "filename", "file_name", "image_id")
LABELS = (
    "labels", "label", "class", "cls", "fine_label", "target", "targets", "category", "class_name", "class_id",
    "class_label", "label_name", "category_id", "classes", "coarse_label",
)  # fmt: skip
SPLITS = ("split", "subset", "partition")
# Columns that describe an image and are never labels.
ABOUT = {
    "width", "height", "original_width", "original_height", "url", "caption", "text", "status", "error_message",
    "sha256", "md5", "exif", "size", "mode", "license", "source", "similarity", "punsafe", "pwatermark", "aesthetic",
    "date",
}  # fmt: skip
_one_reader = threading.Lock()  # one thread fills the cache, the others find it filled


class Columns(NamedTuple):
    """The names of the columns that are read; None where there is none."""

    image: str
    id: str | None
    label: str | None
    split: str | None


def scan_parquet(survey: Survey, unit: Unit, config: SourceConfig) -> Iterator[SourceRow]:
    """Yield the rows of Parquet files, in file order; only the columns of ids, labels and splits are read.

    A column may be a folder's `name=value` (a Hive partition). A split stands in its column, in a partition, or in the
    name of the file or folder. Class names are those of Hugging Face's metadata, where the schema has them.
    """
    for key in survey.take(ENDINGS):
        url, hive = join(survey.store.url, key), hive_values(key)
        try:
            with survey.store.open(key, ranged=True) as handle:
                file = pq.ParquetFile(handle)
                columns = _columns(file.schema_arrow, hive, config, url)
                kept = _kept(file.schema_arrow, hive, columns, config, url)
                survey.attributes = join_schemas([survey.attributes, kept], url)
                _account(survey, columns, file.schema_arrow.names, kept.names)
                _note_class_names(survey, file.schema_arrow, columns.label, url)
                for group in range(file.num_row_groups):
                    yield from _scan_group(file, group, columns, key, url, hive)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{url} is not a Parquet file, or broken: {error}") from error


def _scan_group(
    file: Any, group: int, columns: Columns, key: str, url: str, hive: dict[str, str]
) -> Iterator[SourceRow]:
    table = file.read_row_group(group, columns=[name for name in columns[1:] if name and name not in hive])
    count = file.metadata.row_group(group).num_rows
    place = f"{url}, row group {group}"
    size_bytes = _mean_bytes(file.metadata.row_group(group), columns.image)

    def column(name: str | None) -> list[Any]:
        if name is None:
            return [None] * count
        return [_number(hive[name])] * count if name in hive else table.column(name).to_pylist()

    ids = column(columns.id) if columns.id else [f"{key}:{group}:{row}" for row in range(count)]
    if None in ids:
        raise InputError(f"{place}, row {ids.index(None)}: {columns.id!r} is null")
    words = column(columns.split) if columns.split else [split_of_path(key)] * count
    before = f"{LOCATOR}{url}#" + urlencode({"column": columns.image, "group": group})
    for row, row_id, value, word in zip(range(count), ids, column(columns.label), words, strict=True):
        where = f"{place}, row {row}"
        yield SourceRow(str(row_id), f"{before}&row={row}", value, split_word(word, where), size_bytes, where)


def _mean_bytes(group: Any, column: str) -> int:
    """Mean size of the images of a row group, from its metadata alone."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    mine = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    return sum(chunk.total_uncompressed_size for chunk in mine) // max(1, group.num_rows)


def _number(text: str) -> Any:
    number = whole_number(text)
    return text if number is None else number


def _columns(schema: pa.Schema, hive: dict[str, str], config: SourceConfig, url: str) -> Columns:
    names = [*schema.names, *hive]

    def column(given: str | None, usual: Sequence[str]) -> str | None:
        if given is not None and given not in names:
            hint = perhaps(given, names) or "."
            raise InputError(f"{url} has no column {given!r}{hint} It has: {', '.join(names)}")
        lower = {name.lower(): name for name in reversed(names)}
        return given or next((lower[name] for name in usual if name in lower), None)

    image = column(config.image_column, IMAGES)
    if image is None:
        raise InputError(f"{url} has no image column; name it with --image-column. It has: {', '.join(names)}")
    kind = schema.field(image).type
    plain = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(plain) or pa.types.is_large_binary(plain) or pa.types.is_binary_view(plain)):
        raise InputError(
            f"{url}: column {image!r} holds {kind}; expected encoded images (PNG, JPEG, …) as binary, or a struct "
            "with a binary field `bytes`; name another with --image-column"
        )
    row_id, split = column(config.id_column, IDS), column(config.split_column, SPLITS)
    without = not config.labels or (config.label_column == "none" and "none" not in names)
    label = None if without else column(config.label_column, LABELS)
    used = (image, row_id, split, *config.attributes)
    left = [name for name in names if name not in used and name.lower() not in ABOUT]
    if label is None and left and not without:
        raise InputError(
            f"{url} has no column of a usual label name; name it with --label-column (or --no-labels for "
            f"images without labels). It has: {', '.join(names)}"
        )
    return Columns(image, row_id, label, split)


def _kept(schema: pa.Schema, hive: dict[str, str], columns: Columns, config: SourceConfig, url: str) -> pa.Schema:
    """The columns that rows of a file keep as attributes."""
    if config.attributes_file is not None:
        return pa.schema([])
    if columns.image in config.attributes:
        raise InputError(f"{url}: {columns.image!r} is the column of images; leave it out of --attributes")
    partitions = [pa.field(name, _hive_value(text).type) for name, text in hive.items() if name not in schema.names]
    return kept_schema(pa.schema([*schema, *partitions]), config.attributes, url)


def _hive_value(text: str) -> pa.Scalar:
    number = whole_number(text)
    if text == NO_VALUE:
        return pa.scalar(None)
    return pa.scalar(unquote(text) if number is None or abs(number) >= 1 << 63 else number)


def _account(survey: Survey, columns: Columns, names: Sequence[str], kept: Sequence[str]) -> None:
    used = [*(name for name in columns if name), *kept]
    survey.columns_read |= dict.fromkeys(used)
    survey.columns_ignored |= dict.fromkeys(name for name in names if name not in used)
    if columns.label is not None:
        survey.notes[f"labels are read from column {columns.label!r}"] = None


def _note_class_names(survey: Survey, schema: pa.Schema, label: str | None, url: str) -> None:
    """Class names from Hugging Face's metadata of the label column."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        feature = json.loads(text or b"{}").get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names") or feature.get("feature", {}).get("names")
    except (ValueError, AttributeError):  # somebody else's metadata of this name
        return
    if names:
        survey.name_classes(names, url)


class Place(NamedTuple):
    """Where an image of a Parquet file stands."""

    url: str
    column: str
    group: int
    row: int


def read_locator(locator: str) -> Place:
    """The place that a locator of `scan_parquet` names."""
    url, _, fragment = locator.removeprefix(LOCATOR).rpartition("#")
    options = {key: values[0] for key, values in parse_qs(fragment).items()}
    return Place(url, options["column"], int(options["group"]), int(options["row"]))


def image_at(locator: str) -> bytes:
    """The encoded image of a row; none is no bytes.

    Raises:
        InputError: the file is gone or broken.
    """
    place = read_locator(locator)
    with _one_reader:
        column = image_column(place.url, place.column, place.group)
    data: bytes | None = column[place.row].as_py()
    return data or b""


@lru_cache(maxsize=2)
def image_column(url: str, column: str, group: int) -> pa.ChunkedArray:
    """The encoded images of one row group, as a binary column. The two that were read last stay in memory.

    Raises:
        InputError: the file is gone or broken.
    """
    folder, name = split_url(url)
    try:
        with open_store(folder).open(name) as handle:
            values = pq.ParquetFile(handle).read_row_group(group, columns=[column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}, row group {group} cannot be read: {error}") from error
    if pa.types.is_struct(values.type):
        values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks], values.type.field("bytes").type)
    return values


def attributes_at(locators: Sequence[str], schema: pa.Schema) -> pa.Table:
    """The attributes of images of this source, in their order: columns of the row groups that hold the images.

    Raises:
        InputError: a file is gone or broken, or a value does not fit the type that all files share.
    """
    tables = [schema.empty_table()]
    for (url, group), some in groupby(map(read_locator, locators), lambda place: (place.url, place.group)):
        with _one_reader:
            table = _attributes(url, group, schema)
        tables.append(table.take(pa.array([place.row for place in some], pa.int64())))
    return pa.concat_tables(tables).combine_chunks()


@lru_cache(maxsize=2)
def _attributes(url: str, group: int, schema: pa.Schema) -> pa.Table:
    """The attributes of a row group: columns of the file, else values of its partition."""
    folder, name = split_url(url)
    try:
        with open_store(folder).open(name, ranged=True) as handle:
            file = pq.ParquetFile(handle)
            there = [column for column in schema.names if column in file.schema_arrow.names]
            table = file.read_row_group(group, columns=there).select(there)
            count = file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}, row group {group} cannot be read: {error}") from error
    hive = hive_values(url)
    for column in schema.names:
        if column not in there:
            table = table.append_column(column, pa.repeat(_hive_value(hive[column]), count))
    return fit(table, schema, url)

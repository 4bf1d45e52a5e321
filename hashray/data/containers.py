"""Sources that hold many images in a file, Parquet and tar shards: listing them, and taking one image out. No Ray."""

from __future__ import annotations

import json
import re
import tarfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlencode

import pyarrow as pa
import pyarrow.parquet as pq

from hashray.data.images import EXTENSIONS
from hashray.data.listing import (
    SPLIT_WORDS,
    SourceConfig,
    SourceRow,
    files,
    is_file,
    read_labels,
    shards,
    split_word,
    whole_number,
)
from hashray.errors import InputError, perhaps
from hashray.storage import join, open_store, split_url

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LABEL_SUFFIXES = ("cls", "json", "txt")
TAR_BLOCK_BYTES = 512
_one_reader = threading.Lock()


def list_parquet(url: str, config: SourceConfig, num_classes: int | None) -> tuple[list[SourceRow], int | None]:
    """Rows of Parquet files, in file order; only the columns of ids, labels and splits are read."""
    store, keys = shards(url, (".parquet",))
    found: list[tuple[str, str, str | None]] = []
    values: list[Any] = []
    places: list[tuple[str, int, int]] = []
    for key in keys:
        where = join(store.url, key)
        try:
            with store.open(key) as handle:
                file = pq.ParquetFile(handle)
                image, id_name, label, split = _columns(file.schema_arrow, config, where)
                wanted = [name for name in (id_name, label, split) if name]
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=wanted)
                    rows = range(file.metadata.row_group(group).num_rows)
                    columns = {name: table.column(name).to_pylist() for name in wanted}
                    nothing = [None] * len(rows)
                    ids = columns[id_name] if id_name else [f"{key}:{group}:{row}" for row in rows]
                    if None in ids:
                        raise InputError(f"{where}, row group {group}, row {ids.index(None)}: {id_name!r} is null")
                    places += [(where, group, row) for row in rows]
                    values += columns[label] if label else nothing
                    found += [
                        (
                            str(row_id),
                            f"parquet:{where}#" + urlencode({"column": image, "group": group, "row": row}),
                            split_word(word, f"{where}, row group {group}, row {row}"),
                        )
                        for row, row_id, word in zip(rows, ids, columns[split] if split else nothing, strict=True)
                    ]
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{where} is not a Parquet file, or broken: {error}") from error
    labels, width = read_labels(values, num_classes, lambda i: "{}, row group {}, row {}".format(*places[i]))
    rows_out = [SourceRow(*found[i][:2], labels[i], found[i][2]) for i in range(len(found))]
    return rows_out, width


def _columns(schema: pa.Schema, config: SourceConfig, where: str) -> tuple[str, str | None, str | None, str | None]:
    def column(given: str | None, usual: Sequence[str]) -> str | None:
        if given is not None and given not in schema.names:
            hint = perhaps(given, schema.names) or "."
            raise InputError(f"{where} has no column {given!r}{hint} It has: {', '.join(schema.names)}")
        return given or next((name for name in usual if name in schema.names), None)

    image = column(config.image_column, ("image", "bytes", "jpg", "png", "img"))
    if image is None:
        raise InputError(f"{where} has no image column; name it with --image-column. It has: {', '.join(schema.names)}")
    kind = schema.field(image).type
    plain = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(plain) or pa.types.is_large_binary(plain) or pa.types.is_binary_view(plain)):
        raise InputError(
            f"{where}: column {image!r} holds {kind}; expected encoded images (PNG, JPEG, …) as binary, or a struct "
            "with a binary field `bytes`; name another with --image-column"
        )
    return (
        image,
        column(config.id_column, ("id", "key", "__key__", "path", "filename")),
        column(config.label_column, ("labels", "label", "class", "cls")),
        column(config.split_column, ("split",)),
    )


def refuse_compressed(key: str) -> None:
    """Raise InputError for a compressed tar: no image in it has a place of its own."""
    if key.lower().endswith(COMPRESSED):
        raise InputError(f"{key} is a compressed tar, in which no image can be read alone; decompress it to .tar first")


def list_tar(url: str, config: SourceConfig, num_classes: int | None) -> tuple[list[SourceRow], int | None]:
    """WebDataset shards, in order: members of one key (the name up to its first dot) are one sample.

    Its label is in `.cls`, else `.json` ("labels" or "label"), else `.txt`. A shard's split is the first word of
    its name ("train-0000.tar") or its folder's name.
    """
    for key in [url] if is_file(url) else [join(url, key) for key, _ in files(url)]:
        refuse_compressed(key)
    store, keys = shards(url, (".tar",))
    found: list[tuple[str, str, str | None]] = []
    values: list[Any] = []
    places: list[str] = []
    for key in keys:
        where = join(store.url, key)
        path = PurePosixPath(key)
        words = (re.split(r"[^A-Za-z]", path.name)[0].lower(), path.parent.name.lower())
        split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
        with store.open(key) as handle:
            images, labels = _read_tar(handle, where)
        for sample, member in images.items():
            found.append((f"{key}/{sample}", f"{where}#offset={member.offset_data}&size={member.size}", split))
            values.append(labels.get(sample))
            places.append(f"{where}, member {member.name}")
    read, width = read_labels(values, num_classes, places.__getitem__)
    return [SourceRow(*found[i][:2], read[i], found[i][2]) for i in range(len(found))], width


def _read_tar(handle: Any, where: str) -> tuple[dict[str, tarfile.TarInfo], dict[str, Any]]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tuple[int, Any]] = {}
    dotted: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, suffix = path.name.lower().partition(".")
                if not member.isfile() or not stem:
                    continue
                sample = str(path.with_name(path.name[: len(stem)]))
                if f".{suffix}" in EXTENSIONS:
                    if sample in images:
                        raise InputError(
                            f"{where}: {images[sample].name} and {member.name} are two images of one sample; "
                            "a sample, named up to the first dot, may hold one"
                        )
                    images[sample] = member
                elif suffix in LABEL_SUFFIXES:
                    rank, content = LABEL_SUFFIXES.index(suffix), tar.extractfile(member)
                    value = _tar_label(content.read() if content else b"", suffix, f"{where}, member {member.name}")
                    if value is not None and rank <= labels.get(sample, (rank, None))[0]:
                        labels[sample] = (rank, value)
                elif suffix.endswith(EXTENSIONS):
                    dotted.setdefault(sample, member.name)
            handle.seek(tar.offset)
            if not handle.read(TAR_BLOCK_BYTES):
                raise InputError(f"{where} has no end mark: it was cut off, and images may be missing; copy it again")
    except tarfile.TarError as error:
        raise InputError(f"{where} is not an uncompressed tar file, or cut off: {error}") from error
    for sample, name in dotted.items():
        if sample not in images:
            raise InputError(
                f"{where}: {name} has a dot inside its name; a sample is named up to the first dot, "
                "and this one has no image but that: rename it"
            )
    return images, {sample: value for sample, (_, value) in labels.items()}


def _tar_label(data: bytes, suffix: str, where: str) -> Any:
    try:
        value: Any = json.loads(data) if suffix == "json" else data.decode("utf-8").strip()
    except ValueError as error:
        raise InputError(f"{where} is not {'JSON' if suffix == 'json' else 'UTF-8 text'}: {error}") from error
    if isinstance(value, dict):
        value = value.get("labels", value.get("label"))
    if not isinstance(value, str):
        return value
    numbers = [whole_number(word) for word in value.split()]
    if not numbers or None in numbers:
        return value or None
    return numbers if len(numbers) > 1 else numbers[0]


def fetch(locator: str) -> bytes:
    """The encoded bytes of one image: a file, a range of one, or a row of a Parquet column.

    Raises:
        InputError: the object is not there any more.
    """
    if locator.startswith("parquet:"):
        url, _, fragment = locator.removeprefix("parquet:").rpartition("#")
        options = {key: values[0] for key, values in parse_qs(fragment).items()}
        with _one_reader:  # one thread fills the cache, the others find it filled
            column = _image_column(url, options["column"], int(options["group"]))
        return column[int(options["row"])].as_py() or b""
    span = re.fullmatch(r"(.+)#offset=(\d+)&size=(\d+)", locator, re.DOTALL)
    folder, name = split_url(span[1] if span else locator)
    store = open_store(folder)
    return store.read_range(name, int(span[2]), int(span[3])) if span else store.read(name)


@lru_cache(maxsize=2)
def _image_column(url: str, column: str, group: int) -> pa.ChunkedArray:
    folder, name = split_url(url)
    try:
        with open_store(folder).open(name) as handle:
            values = pq.ParquetFile(handle).read_row_group(group, columns=[column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}, row group {group} cannot be read: {error}") from error
    if pa.types.is_struct(values.type):
        values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks], values.type.field("bytes").type)
    return values


def by_reference_allowed(locator: str) -> bool:
    """Whether a corpus may keep the locator instead of the bytes: one addressable object or range an image."""
    return not locator.startswith("parquet:")

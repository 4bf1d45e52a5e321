"""[Ray] `hashray ingest`: a source of images -> a corpus.

The driver lists the source (ids, labels, splits; no image), names the classes, draws the splits and cuts
the rows into units; workers fetch each unit's bytes, decode every image once to know that it can be used,
and write the part. A row that cannot be decoded is quarantined with the reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Annotated, Any, Literal

import pyarrow as pa
import tyro
from pydantic import Field

from hashray import __version__, artifact
from hashray.artifact import FileRecord, Manifest, canonical, sha256_hex
from hashray.data.census import closing_table, warnings
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA
from hashray.data.images import BadImage, decode
from hashray.data.sources import Listing, SourceConfig, by_reference_allowed, fetch, list_source
from hashray.data.splits import SplitConfig, assign_splits, class_split, order_key
from hashray.engine.parts import BadRow, Output, Part, PartWorker, part_files, run_parts, write_quarantine
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import run_stage
from hashray.errors import InputError
from hashray.progress import say, show_table
from hashray.storage import Store, open_store

FETCH_THREADS = 8
SHORT_ROWS = 5_000  # threads decode as fast as actors; above, a crashing decoder costs too much
MOST_CLASSES = 1_000_000


class IngestConfig(SplitConfig):
    """Read images from a folder, list files, Parquet or tar shards into a corpus."""

    source: Annotated[str, tyro.conf.Positional] = Field(description="Folder, file or s3:// url of the images")
    out: str = Field(description="Folder or s3:// url of the corpus")
    reader: Annotated[SourceConfig, tyro.conf.arg(name="")] = SourceConfig()
    store: Literal["bytes", "reference"] = Field(
        "bytes", description="Whether the corpus keeps the images or only their places"
    )
    max_bad: float = Field(0.05, ge=0, le=1, description="Share of rows that may go to quarantine")
    strict: bool = Field(False, description="Refuse a source that gives a warning")
    rows_per_part: int = Field(1024, ge=1, description="Most rows of a part, which one worker takes at a time")
    part_bytes: int = Field(
        128 << 20, ge=1, description="Most bytes of images in a part; a larger image is a part by itself"
    )
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


class _IngestWorker(PartWorker):
    def __init__(self, store: str) -> None:
        self.keep_bytes = store == "bytes"

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        rows, images, bad, hashes = [], [], [], []
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            fetched = list(pool.map(_fetch_or_reason, [row["uri"] for row in unit["items"]]))
        for row, data in zip(unit["items"], fetched, strict=True):
            advance(1)
            try:
                if isinstance(data, BadImage):
                    raise data
                decode(data)
            except BadImage as error:
                bad.append(BadRow(id=row["id"], uri=row["uri"], reason=str(error)))
                continue
            hashes.append([sha256_hex(data)[:16], row["split"].startswith("query")])
            rows.append(row)
            images.append({"image": data, "uri": None} if self.keep_bytes else {"image": None, "uri": row["uri"]})
        table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
        splits = dict(sorted(Counter(row["split"] for row in rows).items()))
        image_bytes = sum(len(data) for data in fetched if not isinstance(data, BadImage))
        info = {"splits": splits, "image_bytes": image_bytes}
        beside = {"images": pa.Table.from_pylist(images, schema=IMAGE_SCHEMA)}
        return Output(table, bad, info, {"hashes": hashes}, beside)


def cut_parts(sizes: Sequence[int], rows_per_part: int, part_bytes: int) -> list[int]:
    """Where each part begins, so that it holds at most these rows and, unless it is one row, these bytes of images.

    >>> cut_parts([1, 1, 9, 1, 1, 1], rows_per_part=2, part_bytes=4)
    [0, 2, 3, 5]
    """
    starts: list[int] = []
    held = 0
    for i, size_bytes in enumerate(sizes):
        if not starts or i - starts[-1] == rows_per_part or held + size_bytes > part_bytes:
            starts.append(i)
            held = 0
        held += size_bytes
    return starts


def _fetch_or_reason(locator: str) -> bytes | BadImage:
    try:
        return fetch(locator)
    except (InputError, ValueError) as error:  # of this path alone; credentials or a store that fails end the stage
        return BadImage(str(error))


def ingest(config: IngestConfig) -> Manifest:
    """Run the stage; return the corpus's manifest. Rerun = resume.

    Raises:
        InputError: the source, its labels or its splits cannot be used. TooManyBadRows: above `max_bad`.
        AlreadyExists: `out` holds a corpus of another source or configuration.
    """
    source = open_store(config.source).url
    require_apart(source, open_store(config.out).url)
    say(f"listing {source}")
    listing = list_source(source, config.reader)
    lost = [BadRow(**row._asdict()) for row in listing.survey.lost]
    classes, labels = name_classes(listing)
    ids = [row.id for row in listing.rows]
    splits = assign_splits(ids, labels, [row.split for row in listing.rows], config, classes)
    _warn(listing, labels, splits, classes, config.strict)
    items: list[dict[str, Any]] = [
        {"id": row.id, "uri": row.locator, "labels": labels[i], "split": splits[i]}
        for i, row in enumerate(listing.rows)
    ]
    sizes = {row.id: row.size_bytes for row in listing.rows}
    if config.store == "reference" and not by_reference_allowed(items[0]["uri"]):
        raise InputError("--store reference: a row of a Parquet file is no object of its own; use --store bytes")
    if listing.random_access:  # mixed on disk, so that a training window sees every class
        items.sort(key=lambda item: order_key(config.seed, str(item["id"])))
    starts = cut_parts([sizes[str(item["id"])] for item in items], config.rows_per_part, config.part_bytes)
    exclude = {"out", "max_bad", "pool", "source", "strict"}
    result_of = config.model_dump(mode="json", exclude=exclude) | {"source": source}
    depends_on: dict[str, Any] = {"config": result_of, "items": items, "starts": starts, "classes": classes}
    depends_on |= {"version": artifact.FORMAT_VERSION}
    depends_on |= {"lost": listing.survey.lost} if lost else {}
    plan = sha256_hex(canonical(depends_on))[:16]
    store = open_store(config.out)

    def work() -> Manifest:
        chunks = [items[start:stop] for start, stop in pairwise([*starts, len(items)])]
        units = [{"index": i, "rows": len(chunk), "items": chunk} for i, chunk in enumerate(chunks)]
        parts = run_parts(
            store, plan, units, _IngestWorker, {"store": config.store}, config.pool, "ingest", config.max_bad,
            len(items) <= SHORT_ROWS, lost,
        )  # fmt: skip
        info = {"plan": plan, "format": listing.format, "num_classes": len(classes)}
        if config.split_protocol == "class-split":
            info["class_split"] = class_split(labels, classes, config)
        return _publish(store, result_of, classes, parts, lost, info)

    manifest = run_stage(store, "corpus", plan, work)
    show_table("What ingest saw", ["", ""], closing_table(listing, splits, classes))
    return manifest


def require_apart(source: str, out: str) -> None:
    """Refuse a corpus inside its own source: the next listing would take it for images.

    Raises:
        InputError: `out` is the source or lies inside it.
    """
    places = [(url if "://" in url else os.path.realpath(url)).rstrip("/") for url in (source, out)]
    if f"{places[1]}/".startswith(f"{places[0]}/"):
        raise InputError(f"--out {out} is inside the source {source}; choose a folder beside it")


def _warn(listing: Listing, labels: list[list[int]], splits: list[str], classes: list[str], strict: bool) -> None:
    sentences = warnings(listing, labels, splits, classes)
    if strict and sentences:
        raise InputError("--strict refuses this source:\n  " + "\n  ".join(sentences))
    for sentence in sentences:
        say(f"warning: {sentence}")


def name_classes(listing: Listing) -> tuple[list[str], list[list[int]]]:
    """Class names in order of their integer, and each row's labels as ascending integers.

    Names are sorted; numbers keep their own value and are named by the source's class names or by themselves.

    Raises:
        InputError: names and numbers mixed, or a name that is not among the class names.
    """
    seen = {label for row in listing.rows for label in row.labels}
    kinds = {type(label) for label in seen}
    if len(kinds) > 1:
        raise InputError(f"labels are names and numbers mixed, for example {sorted(map(str, seen))[:4]}; use one kind")
    if kinds == {int}:
        top = max(int(label) for label in seen)
        if top >= MOST_CLASSES:
            raise InputError(f"label {top} is no class index: they count from 0 to {MOST_CLASSES - 1:,} at most")
        classes = listing.class_names or [str(i) for i in range(top + 1)]
        index: dict[Any, int] = {i: i for i in range(len(classes))}
    else:
        classes = listing.class_names or sorted(map(str, seen))
        index = {name: i for i, name in enumerate(classes)}
        unknown = sorted(str(label) for label in seen if label not in index)
        if unknown:
            raise InputError(f"{len(unknown)} labels are not among the class names, the first {unknown[0]!r}")
    return classes, [sorted({index[label] for label in row.labels}) for row in listing.rows]


def _publish(
    store: Store,
    config: dict[str, Any],
    classes: list[str],
    parts: list[Part],
    lost: list[BadRow],
    info: dict[str, Any],
) -> Manifest:
    files: list[FileRecord] = part_files(parts)
    files.append(artifact.write_named(store, "classes.json", canonical(classes)))
    files.append(write_quarantine(store, parts, lost))
    bad = sum(len(part.bad) for part in parts) + len(lost)
    rows_in = sum(part.rows_in for part in parts) + len(lost)
    hashes = [pair for part in parts for pair in part.notes["hashes"]]
    elsewhere = {name for name, is_query in hashes if not is_query}
    leaked = sum(is_query and name in elsewhere for name, is_query in hashes)
    if leaked:
        say(f"warning: {leaked:,} query images occur, byte for byte, outside the query split too")
    manifest = artifact.publish(
        store,
        Manifest(
            kind="corpus", project_version=__version__, config=config, parents={}, files=tuple(files),
            columns={field.name: str(field.type) for schema in (ROW_SCHEMA, IMAGE_SCHEMA) for field in schema},
            rows_in=rows_in, rows_out=rows_in - bad, rows_quarantined=bad,
            info={**info, "leaked_queries": leaked},
        ),
    )  # fmt: skip
    store.clear("progress/")
    say(
        f"{store.url}: {rows_in:,} rows in = {rows_in - bad:,} out + {bad:,} quarantined; "
        f"{len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
    )
    return manifest

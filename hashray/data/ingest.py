"""[Ray] `hashray ingest`: a source of images -> a corpus.

Tasks list the source (ids, labels, splits; no image) into files of rows. From what these add up to, the driver names
the classes and plans the splits. Workers then take a part at a time: they fetch its bytes, decode every image once to
know that it can be used, and write its row table and its images. A row that cannot be decoded is quarantined with the
reason. The driver holds nothing that grows with rows but those put aside.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from pydantic import Field

from hashray import __version__, artifact
from hashray.artifact import FileRecord, Manifest, canonical, sha256_hex
from hashray.data import listed
from hashray.data.attributes import Attributes, check_names, join_schemas, rows_by_id, shares_of, write_pieces
from hashray.data.census import closing_table, warnings
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA
from hashray.data.images import BadImage, decode
from hashray.data.inventory import Inventory, take_inventory
from hashray.data.parquet import attributes_at
from hashray.data.sources import Meaning, SourceConfig, fetch
from hashray.data.splits import Candidates, Labels, Seen, SplitConfig, SplitRule, class_split, plan_splits
from hashray.engine.parts import BadRow, Output, Part, PartWorker, part_files, run_parts, write_quarantine
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import run_stage
from hashray.errors import InputError
from hashray.progress import say, show_table
from hashray.storage import Store, open_store

FETCH_THREADS = 8
SHORT_ROWS = 5_000  # threads decode as fast as actors; above, a crashing decoder costs too much
MOST_CLASSES = 1_000_000
HASHES = np.dtype([("hash", np.uint64), ("query", np.bool_)])


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


@dataclass(frozen=True)
class Reading:
    """How listed rows become rows of a corpus.

    Attributes:
        listed: url of the files of listed rows.
        labels: class indices by value; splits: the split by value, where folders name splits.
        hashes: where the hashes of the images' bytes go, to compare queries with the others.
        attributes: the columns of the source or of a file that rows keep.
    """

    listed: str
    labels: Mapping[str, Labels]
    splits: Mapping[str, str | None]
    rule: SplitRule
    keep_bytes: bool
    out: Store
    hashes: str
    attributes: Attributes | None = None

    def rows(self, block: str, group: int) -> list[dict[str, Any]]:
        """The rows of a part: id, uri, labels and split."""
        with open_store(self.listed).open(block, ranged=True) as handle:
            table = pq.ParquetFile(handle).read_row_group(group)
        rows = []
        for item in listed.iterate(table):
            labels, given = self.labels[item["value"]], self.splits.get(item["value"], item["split"])
            split = self.rule.of(item["id"], labels, given)
            rows.append({"id": item["id"], "uri": item["locator"], "labels": labels, "split": split})
        return rows

    def table(self, rows: list[dict[str, Any]]) -> tuple[pa.Table, dict[str, int]]:
        """The row table of rows, with their attributes; how many of them a file of attributes has."""
        table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
        if (kept := self.attributes) is None:
            return table, {}
        if kept.file is None:
            columns, notes = attributes_at([row["uri"] for row in rows], kept.schema), {}
        else:
            columns, described = rows_by_id(kept, table.column("id").combine_chunks())
            notes = {"described": described}
        schema = pa.schema([*ROW_SCHEMA, *kept.schema])
        return pa.Table.from_arrays([*table.columns, *columns.columns], schema=schema), notes


class IngestWorker(PartWorker):
    """Fetches, checks and keeps the images of a part."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        rows, images, bad, hashes = [], [], [], []
        items = self.reading.rows(unit["block"], unit["group"])
        fetched = _fetch_all([row["uri"] for row in items])
        for row, data in zip(items, fetched, strict=True):
            advance(1)
            try:
                if isinstance(data, BadImage):
                    raise data
                decode(data)
            except BadImage as error:
                bad.append(BadRow(id=row["id"], uri=row["uri"], reason=str(error)))
                continue
            hashes.append((int(sha256_hex(data)[:16], 16), row["split"].startswith("query")))
            rows.append(row)
            keep = self.reading.keep_bytes
            images.append({"image": data, "uri": None} if keep else {"image": None, "uri": row["uri"]})
        table = np.array(hashes, dtype=HASHES)
        self.reading.out.write(f"{self.reading.hashes}{unit['index']:06d}.bin", table.tobytes())
        splits = dict(sorted(Counter(row["split"] for row in rows).items()))
        image_bytes = sum(len(data) for data in fetched if not isinstance(data, BadImage))
        info = {"splits": splits, "image_bytes": image_bytes}
        beside = {"images": pa.Table.from_pylist(images, schema=IMAGE_SCHEMA)}
        whole, notes = self.reading.table(rows)
        return Output(whole, bad, info, notes, beside)


def _fetch_all(locators: Sequence[str]) -> list[bytes | BadImage]:
    """Several at a time from S3; local files and rows of Parquet one by one, which threads would only slow down."""
    if not any(locator.startswith("s3://") for locator in locators):
        return [_fetch_or_reason(locator) for locator in locators]
    with ThreadPoolExecutor(FETCH_THREADS) as pool:
        return list(pool.map(_fetch_or_reason, locators))


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
    source, store = open_store(config.source).url, open_store(config.out)
    require_apart(source, store.url)
    check_names(config.reader.attributes, source)
    shares = shares_of(config.reader.attributes_file) if config.reader.attributes_file else []
    say(f"listing {source}")
    bounds = (config.seed, config.rows_per_part, config.part_bytes)
    with take_inventory(source, config.reader, *bounds, config.pool, store) as inventory:
        return _ingest(config, source, store, inventory, _attributes(config, store, inventory, shares))


def _attributes(
    config: IngestConfig, store: Store, inventory: Inventory, shares: Sequence[tuple[int, ...]]
) -> Attributes | None:
    """The columns that rows keep; a file of them is cut into pieces by tasks."""
    url, names = config.reader.attributes_file, config.reader.attributes
    if url is None:
        return Attributes(inventory.survey.attributes) if names else None
    place = inventory.store if config.pool.runs_here(_is_short(inventory)) else store
    jobs = {n: (place, inventory.folder, url, names, share) for n, share in enumerate(shares)}
    answers = inventory.each(write_pieces, jobs, "read attributes", "shares")
    pieces = tuple(piece for _, some in answers for piece in some)
    if not pieces:
        raise InputError(f"{url} has no rows of attributes")
    schema = join_schemas([schema for schema, _ in answers], url)
    inventory.survey.notes[f"attributes {', '.join(schema.names)} are read from {url}"] = None
    return Attributes(schema, url, place, pieces)


def _ingest(
    config: IngestConfig, source: str, store: Store, inventory: Inventory, attributes: Attributes | None
) -> Manifest:
    classes, labels = name_classes(inventory.meaning)
    counts, splits = _count(inventory, labels), inventory.meaning.splits
    rule = plan_splits(config, counts, lambda n: _candidates(inventory, labels, n), classes)
    final = rule.count(counts)
    _warn(inventory, final, classes, config.strict)
    if config.store == "reference" and inventory.format == "parquet":
        raise InputError("--store reference: a row of a Parquet file is no object of its own; use --store bytes")
    lost = [BadRow(**row._asdict()) for row in inventory.survey.lost]
    result_of = _result_of(config) | {"source": source}
    blocks = [[block.digest, block.part_rows] for block in inventory.blocks]
    depends_on: dict[str, Any] = {
        "config": result_of,
        "blocks": blocks,
        "classes": classes,
        "lost": inventory.survey.lost,
    }
    if attributes is not None:
        depends_on |= {"attributes": [_types(attributes.schema), [piece.sha256 for piece in attributes.pieces]]}
    plan = sha256_hex(canonical(depends_on | {"version": artifact.FORMAT_VERSION}))[:16]

    def work() -> Manifest:
        units = [
            {"rows": rows, "block": block.name, "group": group}
            for block in inventory.blocks
            for group, rows in enumerate(block.part_rows)
        ]
        units = [{"index": i, **unit} for i, unit in enumerate(units)]
        short = _is_short(inventory)
        place = inventory.store if config.pool.runs_here(short) else inventory.copied_to(store)
        hashes = f"progress/hashes-{plan}/"
        keep_bytes = config.store == "bytes"
        reading = Reading(place.url, labels, splits, rule, keep_bytes, store, hashes, attributes)
        parts = run_parts(
            store, plan, units, IngestWorker, {"reading": reading}, config.pool, "ingest", config.max_bad, short, lost
        )
        info: dict[str, Any] = {"plan": plan, "format": inventory.format, "num_classes": len(classes)}
        if config.split_protocol == "class-split":
            info["class_split"] = class_split(counts, classes, config)
        info["leaked_queries"] = _leaked(store, hashes)
        _say_described(attributes, parts)
        schema = ROW_SCHEMA if attributes is None else pa.schema([*ROW_SCHEMA, *attributes.schema])
        return _publish(store, result_of, classes, parts, lost, info, schema)

    manifest = run_stage(store, "corpus", plan, work)
    show_table("What ingest saw", ["", ""], closing_table(inventory.survey, inventory.format, final, classes))
    return manifest


def _is_short(inventory: Inventory) -> bool:
    return inventory.rows <= SHORT_ROWS


def _say_described(attributes: Attributes | None, parts: Sequence[Part]) -> None:
    if attributes is None or attributes.file is None:
        return
    rows, described = sum(part.file.rows or 0 for part in parts), sum(part.notes["described"] for part in parts)
    say(f"{described:,} of {rows:,} rows have attributes in {attributes.file}")
    if not described:
        say("warning: none has: its column id must hold the ids of the corpus, for a folder the path of each image")


def _result_of(config: IngestConfig) -> dict[str, Any]:
    """The settings that a corpus depends on. Those that newer versions have count only where they are used."""
    settings = config.model_dump(mode="json", exclude={"out", "max_bad", "pool", "source", "strict"})
    if config.split_protocol != "random":
        del settings["query_rows"], settings["train_rows"]
    for name in ("labels", "attributes", "attributes_file"):
        if getattr(config.reader, name) == SourceConfig.model_fields[name].default:
            del settings["reader"][name]
    return settings


def _count(inventory: Inventory, labels: Mapping[str, Labels]) -> dict[tuple[Labels, str | None], Seen]:
    counts: dict[tuple[Labels, str | None], Seen] = {}
    for (value, split), group in inventory.tally.items():
        name = labels[value], inventory.meaning.splits.get(value, split)
        before = counts.get(name, Seen(0, group.id))
        counts[name] = before._replace(rows=before.rows + group.rows)
    return counts


def _candidates(inventory: Inventory, labels: Mapping[str, Labels], count: int) -> list[tuple[Labels, Candidates]]:
    return [(labels[value], candidates) for value, candidates in inventory.smallest(count)]


def _leaked(store: Store, hashes: str) -> int:
    """Count the query images that occur, byte for byte, outside the query split too."""

    def read() -> Iterator[NDArray[Any]]:
        keys = [key for key, _ in store.list(hashes)]
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            for data in pool.map(store.read, keys):
                yield np.frombuffer(data, HASHES)

    queries = np.concatenate([np.zeros(0, np.uint64), *(table["hash"][table["query"]] for table in read())])
    elsewhere = [np.intersect1d(table["hash"][~table["query"]], queries) for table in read()] if len(queries) else []
    leaked = int(np.isin(queries, np.concatenate([np.zeros(0, np.uint64), *elsewhere])).sum())
    if leaked:
        say(f"warning: {leaked:,} query images occur, byte for byte, outside the query split too")
    return leaked


def require_apart(source: str, out: str) -> None:
    """Refuse a corpus inside its own source: the next listing would take it for images.

    Raises:
        InputError: `out` is the source or lies inside it.
    """
    places = [(url if "://" in url else os.path.realpath(url)).rstrip("/") for url in (source, out)]
    if f"{places[1]}/".startswith(f"{places[0]}/"):
        raise InputError(f"--out {out} is inside the source {source}; choose a folder beside it")


def _warn(inventory: Inventory, counts: Mapping[tuple[Labels, str], int], classes: list[str], strict: bool) -> None:
    sentences = warnings(inventory.survey, counts, classes, inventory.twins)
    if strict and sentences:
        raise InputError("--strict refuses this source:\n  " + "\n  ".join(sentences))
    for sentence in sentences:
        say(f"warning: {sentence}")


def name_classes(meaning: Meaning) -> tuple[list[str], dict[str, Labels]]:
    """Class names in order of their integer, and the labels of each value as ascending integers.

    Names are sorted; numbers keep their own value and are named by the source's class names or by themselves.

    Raises:
        InputError: names and numbers mixed, or a name that is not among the class names.
    """
    seen = {label for labels in meaning.labels.values() for label in labels}
    kinds = {type(label) for label in seen}
    if len(kinds) > 1:
        raise InputError(f"labels are names and numbers mixed, for example {sorted(map(str, seen))[:4]}; use one kind")
    if kinds == {int}:
        top = max(int(label) for label in seen)
        if top >= MOST_CLASSES:
            raise InputError(f"label {top} is no class index: they count from 0 to {MOST_CLASSES - 1:,} at most")
        classes = meaning.class_names or [str(i) for i in range(top + 1)]
        index: dict[Any, int] = {i: i for i in range(len(classes))}
    else:
        classes = meaning.class_names or sorted(map(str, seen))
        index = {name: i for i, name in enumerate(classes)}
        unknown = sorted(str(label) for label in seen if label not in index)
        if unknown:
            raise InputError(f"{len(unknown)} labels are not among the class names, the first {unknown[0]!r}")
    return classes, {
        value: tuple(sorted({index[label] for label in labels})) for value, labels in meaning.labels.items()
    }


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _publish(
    store: Store,
    config: dict[str, Any],
    classes: list[str],
    parts: list[Part],
    lost: list[BadRow],
    info: dict[str, Any],
    schema: pa.Schema,
) -> Manifest:
    files: list[FileRecord] = part_files(parts)
    files.append(artifact.write_named(store, "classes.json", canonical(classes)))
    files.append(write_quarantine(store, parts, lost))
    bad = sum(len(part.bad) for part in parts) + len(lost)
    rows_in = sum(part.rows_in for part in parts) + len(lost)
    manifest = artifact.publish(
        store,
        Manifest(
            kind="corpus", project_version=__version__, config=config, parents={}, files=tuple(files),
            columns=_types(schema) | _types(IMAGE_SCHEMA),
            rows_in=rows_in, rows_out=rows_in - bad, rows_quarantined=bad,
            info=info,
        ),
    )  # fmt: skip
    store.clear("progress/")
    say(
        f"{store.url}: {rows_in:,} rows in = {rows_in - bad:,} out + {bad:,} quarantined; "
        f"{len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
    )
    return manifest

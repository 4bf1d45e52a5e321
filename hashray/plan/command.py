"""[Ray] `hashray plan`: what the stages ahead take and cost, before anything is spent.

A sample of the source or of the corpus is measured in this process, and the numbers of all rows are worked out from it.
Nothing is written. Ray is asked for its nodes where RAY_ADDRESS names a cluster; else this machine is the cluster.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import tyro
from pydantic import Field

from hashray.config import parse_toml, validate
from hashray.data import ingest
from hashray.data.corpus import Corpus, open_corpus
from hashray.data.ingest import IngestConfig, name_classes
from hashray.data.inventory import BLOCK_ROWS, LISTED_AT_ONCE, MIXED_ROWS
from hashray.data.sources import UNIT_BYTES, SourceConfig, is_random_access
from hashray.data.splits import Candidates, Labels, Seen, SplitConfig, order_key, plan_splits
from hashray.encode.features import BATCH_ROWS, SHORT_PIXELS, pixels_of
from hashray.engine.session import WorkersConfig, connect
from hashray.errors import InputError
from hashray.evaluate import counts
from hashray.evaluate.run import EvaluateConfig
from hashray.evaluate.sides import CLASS_SPLIT
from hashray.index import shards
from hashray.index.shard import ROWS_PER_SHARD
from hashray.methods import build_method
from hashray.methods.backbone import build_trunk
from hashray.methods.base import Method
from hashray.model import load_model
from hashray.plan import costs
from hashray.plan.costs import Prices, Sample, Work
from hashray.plan.report import Cluster, as_json, exceeded, show
from hashray.plan.sample import (
    Listing,
    base_of,
    fetch_rows,
    look_at_source,
    measure,
    read_rows,
    sample_size,
    splits_of,
)
from hashray.progress import say
from hashray.storage import open_store, read_url
from hashray.train.config import TrainConfig, read_training_config
from hashray.train.job import fits_memory, with_epochs
from hashray.train.run import trains_here

WITHOUT_NETWORK = "hashray.data.ingest, ray.data"  # what such a driver or worker imports
WITH_NETWORK = "hashray.encode.codes, hashray.train.run, ray.data"
CONNECTED_BYTES = 64 << 20  # of Ray in a process that has joined it: workers of ingest had 249 MiB, of imports 187
# Splits that a protocol draws a fixed number of rows for, however many rows there are.
DRAWN = {
    "per-class": ("query", "train"),
    "cifar10-semi": ("query", "train"),
    "random": ("query",),
    "class-split": ("query",),
}
OBJECT_STORE_SHARE = 0.3  # of a node's memory: Ray's default


class PlanConfig(SplitConfig):
    """What the stages ahead take: rows, parts, shards, memory, disk, requests, time and money, from a measured sample.

    With a training config: all stages, or those after ingest if a corpus is there. With a model: encoding and after.
    """

    config: Annotated[str | None, tyro.conf.Positional] = Field(None, description="Training config, TOML")
    source: Annotated[str | None, tyro.conf.Positional] = Field(
        None, description="Images that are not ingested yet: folder, list files, Parquet or tar shards; local or s3://"
    )
    corpus: str | None = Field(None, description="Corpus, local folder or s3:// url")
    model: str | None = Field(None, description="Trained model, local folder or s3:// url")
    rows: int | None = Field(None, ge=1, description="Rows to plan for; unset: those that the source or corpus has")
    out: str | None = Field(
        None, description="Folder or s3:// url where everything is to go; its free disk is looked at"
    )
    prices: str | None = Field(
        None, description="TOML file of prices: currency, cpu_hour, gpu_hour, gb_month, reads_1000, writes_1000"
    )
    json_: Annotated[bool, tyro.conf.arg(name="json")] = Field(False, description="Print JSON, for programs")
    reader: Annotated[SourceConfig, tyro.conf.arg(name="")] = SourceConfig()
    store: str = Field(
        "bytes", description="Whether the corpus keeps the images (bytes) or only their places (reference)"
    )
    rows_per_part: int = Field(IngestConfig.model_fields["rows_per_part"].default, ge=1, description="As for ingest")
    part_bytes: int = Field(IngestConfig.model_fields["part_bytes"].default, ge=1, description="As for ingest")
    shards: int | None = Field(None, ge=1, description="Shards of the index; unset: one for 5 million rows")
    pool: Annotated[WorkersConfig, tyro.conf.arg(name="")] = WorkersConfig()


@dataclass(frozen=True)
class _Rows:
    """How many rows of each split a source or a corpus has, and how they are laid out."""

    splits: Counter[str]
    rows: int
    num_classes: int
    parts: int
    part_bytes: int
    blocks: int
    one_object_a_row: bool
    protocol: str


def plan(config: PlanConfig) -> dict[str, Any]:
    """Measure a sample, print what is ahead, return it as JSON has it.

    Raises:
        InputError: nothing to plan for, or nothing in the sample can be used. ConfigError: a fault of a TOML file.
    """
    training = None if config.config is None else read_training_config(config.config)
    _require_inputs(config)
    prices = None if config.prices is None else validate(
        Prices, parse_toml(read_url(config.prices), config.prices), config.prices
    )  # fmt: skip
    cluster = _cluster(config)
    listing, corpus = None, None
    if config.source is not None:
        say(f"listing a share of {config.source}")
        listing = look_at_source(config.source, config.reader, LISTED_AT_ONCE)
        images = fetch_rows(listing.picks, sample_size(_rows_wanted(config, listing)))
    else:
        assert config.corpus is not None
        corpus = open_corpus(config.corpus)
        images = read_rows(corpus, sample_size(corpus.count("all")))
    num_classes = corpus.num_classes if corpus else len(_classes(listing)[0])
    method = _method(config, training, num_classes)
    say(f"measuring {len(images):,} rows")
    gpu = config.pool.gpus_per_worker > 0 or bool(training and training.gpu)
    list_s, base = listing.list_s if listing else 0.0, base_of(WITHOUT_NETWORK, WITH_NETWORK)
    base = base._replace(bytes=base.bytes + CONNECTED_BYTES)
    sample = measure(images, method, BATCH_ROWS, config.store == "bytes", list_s, base, gpu)
    rows = _of_source(config, listing, sample) if listing else _of_corpus(config, corpus, sample)  # type: ignore[arg-type]
    work = _work(config, training, method, rows, sample, cluster)
    result = costs.work_out(sample, work)
    faults = exceeded(result, work, cluster)
    if config.json_:
        print(json.dumps(as_json(result, work, sample, cluster, faults, prices), indent=2))
    else:
        show(result, work, sample, cluster, faults, prices)
    return as_json(result, work, sample, cluster, faults, prices)


def _require_inputs(config: PlanConfig) -> None:
    if (config.config is None) == (config.model is None):
        raise InputError(
            "hashray plan needs a training config or a --model, one of the two: hashray plan CONFIG.toml …"
        )
    if (config.source is None) == (config.corpus is None):
        raise InputError("hashray plan needs a SOURCE of images or a --corpus, one of the two")


def _rows_wanted(config: PlanConfig, listing: Listing) -> int:
    if config.rows is None and listing.format == "folder" and not listing.exact and listing.rows >= LISTED_AT_ONCE:
        say(f"note: {config.source} holds more than {LISTED_AT_ONCE:,} files; give --rows N for what it really has")
    return config.rows or listing.rows


def _classes(listing: Listing | None) -> tuple[list[str], dict[str, Labels]]:
    assert listing is not None
    return name_classes(listing.meaning)


def _method(config: PlanConfig, training: TrainConfig | None, num_classes: int) -> Method:
    if training is None:
        return load_model(str(config.model), device="cpu").method
    # Random weights cost as much as any others, and are there without a network.
    return build_method(training.method, build_trunk(training.backbone, load_weights=False), max(2, num_classes))


def _of_source(config: PlanConfig, listing: Listing, sample: Sample) -> _Rows:
    rows = _rows_wanted(config, listing)
    classes, labels = _classes(listing)
    seen: dict[tuple[Labels, str | None], Seen] = {}
    for (value, split), group in listing.tally.items():
        name = labels[value], listing.meaning.splits.get(value, split)
        before = seen.get(name, Seen(0, group.id))
        seen[name] = before._replace(rows=before.rows + -(-group.rows * rows // listing.table_rows))

    def draw(count: int) -> list[tuple[Labels, Candidates]]:
        """Invented rows: which ones a protocol draws changes no cost."""
        groups = []
        for each in dict.fromkeys(drawn for drawn, _ in seen):
            ids = sorted((f"{each}{i}" for i in range(count)), key=lambda row_id: order_key(config.seed, row_id))
            groups.append((each, Candidates(tuple(ids), True)))
        return groups

    splits = splits_of(plan_splits(config, seen, draw, classes).count(seen))
    units, most = -(-listing.size_bytes * rows // listing.rows // UNIT_BYTES) or 1, BLOCK_ROWS
    if is_random_access(listing.format):
        units = -(-rows // MIXED_ROWS)
        most = -(-rows // units)
    block_rows = min(most, -(-rows // units))
    parts, largest = costs.lay_out_parts(sample.sizes, rows, block_rows, config.rows_per_part, config.part_bytes)
    blocks = -(-rows // block_rows)
    return _Rows(splits, rows, len(classes), parts, largest, blocks, listing.format != "parquet", config.split_protocol)


def _of_corpus(config: PlanConfig, corpus: Corpus, sample: Sample) -> _Rows:
    there = corpus.count("all")
    rows = config.rows or there
    words = Counter[str]()
    for record in corpus.parts:
        words.update(record.info["splits"])
    settings = corpus.manifest.config
    protocol = str(settings.get("split_protocol"))
    drawn = DRAWN.get(protocol, ()) if rows >= there else ()
    fixed = sum(count for word, count in words.items() if _is_of(word, drawn))
    scale = (rows - fixed) / max(1, there - fixed)
    splits = splits_of(
        {(0, word): count if _is_of(word, drawn) else round(count * scale) for word, count in words.items()}
    )
    sizes = [int(record.info.get("image_bytes", corpus.beside(record).bytes)) for record in corpus.parts]
    parts = -(-len(corpus.parts) * rows // there)
    return _Rows(splits, rows, corpus.num_classes, parts, max(sizes), 0, settings.get("store") == "reference", protocol)


def _is_of(word: str, splits: tuple[str, ...]) -> bool:
    """Whether a row of this split ("database+train") is in one of `splits`, or in a part of one ("query-seen")."""
    return any(split.partition("-")[0] in splits for split in word.split("+"))


def _work(
    config: PlanConfig, training: TrainConfig | None, method: Method, rows: _Rows, sample: Sample, cluster: Cluster
) -> Work:
    database = rows.splits["database"] or rows.rows
    trunk = method.trunk.config
    stages = ["encode", "index", *(["evaluate"] if rows.num_classes else [])]  # nothing is scored without labels
    if training is not None:
        stages = [*(["features"] if trunk.frozen else []), "train", *stages]
    elif trunk.frozen:
        stages = ["features", *stages]
    if training is not None:
        training = with_epochs(training, *(rows.splits[name] for name in ("train", "validation", "unlabelled")))
    train = rows.splits["train"] + (rows.splits["unlabelled"] if training and training.with_unlabelled else 0)
    row_inputs = 4 * method.trunk.feature_dim if trunk.frozen else 3 * trunk.image_size**2
    in_memory = training is not None and fits_memory(training, train * row_inputs)
    scenarios = len(CLASS_SPLIT) if rows.protocol == "class-split" else 1
    pool = config.pool
    workers = pool.workers or cluster.workers(pool.cpus_per_worker, pool.gpus_per_worker)

    def is_long(scanned: int) -> bool:
        return pixels_of(scanned, trunk.image_size, scanned * sample.mean_bytes) > SHORT_PIXELS

    epochs = sum(phase.epochs for phase in method.phases(training.num_epochs)) if training else 0
    long = {
        "ingest": rows.rows > ingest.SHORT_ROWS, "features": is_long(rows.rows),
        "encode": is_long(database) and not trunk.frozen, "index": database > shards.SHORT_ROWS,
        "evaluate": database > counts.SHORT_ROWS or database * rows.splits["query"] > counts.SHORT_PAIRS,
    }  # fmt: skip
    on_ray = [name for name, is_so in long.items() if not config.pool.runs_here(not is_so)]
    if training is not None and not trains_here(training, epochs, train, in_memory):
        on_ray.append("train")
    return Work(
        on_ray=tuple(on_ray),
        stages=(*(["ingest"] if config.source else []), *stages), rows=rows.rows, train=train, database=database,
        queries=rows.splits["query"], parts=rows.parts, part_bytes=rows.part_bytes,
        one_object_a_row=rows.one_object_a_row, blocks=rows.blocks,
        epochs=epochs, in_memory=in_memory, frozen=trunk.frozen, row_inputs=row_inputs,
        shards=min(database, config.shards or -(-database // ROWS_PER_SHARD)), num_bits=int(method.config.num_bits),
        scenarios=scenarios, sample_rows=_sample_rows(), workers=workers,
        train_workers=training.fewest_workers if training else 1,
        batch_size=training.batch_size if training else BATCH_ROWS,
        window_rows=training.shuffle_window if training else BATCH_ROWS,
    )  # fmt: skip


def _sample_rows() -> int:
    """Most rows of a database that the sample of an evaluation has."""
    return int(EvaluateConfig.model_fields["sample_rows"].default)


def _cluster(config: PlanConfig) -> Cluster:
    """The cluster that RAY_ADDRESS names, else this machine, which Ray is not started on."""
    free = _free_disk(config.out)
    if os.environ.get("RAY_ADDRESS"):
        connect()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers = [node for node in nodes if node.get("CPU", 0) > 0] or nodes
        smallest = min(workers, key=lambda node: node.get("memory", 0))
        memory, objects = int(smallest.get("memory", 0)), int(smallest.get("object_store_memory", 0))
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        return Cluster(len(workers), memory + objects, objects, float(cpus), float(gpus), free)
    memory = psutil.virtual_memory().total
    return Cluster(1, memory, int(memory * OBJECT_STORE_SHARE), float(os.cpu_count() or 1), 0.0, free)


def _free_disk(out: str | None) -> int | None:
    """Free bytes where a local `out` would be; None for S3, or where none is named."""
    path = None if out is None else open_store(out).local_path("x")
    if path is None:
        return None
    return shutil.disk_usage(next(parent for parent in Path(path).parents if parent.exists())).free

"""The stages under test: how each is called, which progress shows that it runs, and what must come out the same."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from tiny import CLASSES, METHOD, head_config, write_corpus, write_toml, write_trunk

from hashray import artifact
from hashray.artifact import Manifest, table_bytes
from hashray.codes import BIT_ORDER
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.model import write_model
from hashray.storage import open_store

IMAGES, SIDE, ROWS_PER_PART = 2400, 192, 20
CODES, CODE_BYTES, CODE_PARTS = 800_000, 8, 16


@dataclass(frozen=True)
class Stage:
    """A stage under test.

    Attributes:
        words: the command, without --out.
        bar: the stage that its progress lines name.
        worker: what the title of a working process holds.
        nodes: worker nodes that the stage starts with.
        result: what must be the same, from the folder of the artifact.
    """

    name: str
    words: tuple[str, ...]
    bar: str
    worker: str
    nodes: int = 2
    result: Callable[[Path], Any] = lambda out: artifact.load_manifest(out).id

    def command(self, out: Path) -> list[str]:
        """The words of the command that writes to a folder."""
        return [*self.words, "--out", str(out)]


def scores(out: Path) -> Any:
    """An evaluation's results: its manifest names what holds the environment and the command line too."""
    return json.loads((out / "metrics.json").read_text())["results"]


def index_id(out: Path) -> str:
    """The id of an index's first version."""
    return artifact.load_manifest(out, key=artifact.version_key(1)).id


def all_stages(folder: Path) -> dict[str, Stage]:
    """Write the inputs of every stage below a folder; return the stages by name."""
    corpus, model, small = folder / "corpus", folder / "model", folder / "small"
    images, codes = write_photos(folder / "images"), folder / "codes"
    write_codes(codes)
    write_larger_model(model)
    write_corpus(small, 240, 60, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    write_trunk(folder / "trunk.pth")
    training = write_toml(folder / "train.toml", {
        "method": {**METHOD, "rounds": 2}, "backbone": {"name": "resnet9", "width": 16, "image_size": 16},
        "epochs": 5, "batch_size": 32, "validation_rows": 30, "validation_every": 5, "checkpoint_every": 1,
        "workers": 2, "cpus_per_worker": 1, "input": "memory", "tensorboard": False,
    })  # fmt: skip
    sweep = write_toml(folder / "sweep.toml", {
        **head_config(folder / "trunk.pth"), "validation_rows": 30, "cpus_per_worker": 1.0, "epochs": 4,
        "space": {"optim.lr": {"log": [1e-4, 1e-1]}, "method.margin_ratio": {"linear": [0.05, 1.0]}},
        "search": {"trials": 6, "grace_epochs": 1, "reduction_factor": 2, "at_once": 3, "report_seeds": []},
    })  # fmt: skip
    encoding = ("--model", str(model), "--corpus", str(corpus))
    stages = (
        Stage("ingest", ("ingest", images, "--rows-per-part", str(ROWS_PER_PART)), "ingest", "MapWorker"),
        Stage("encode", ("encode", *encoding), "encode", "MapWorker"),
        Stage("index", ("index", "build", "--codes", str(codes), "--shards", "48"), "build shards", "ray::_call",
              result=index_id),
        Stage("evaluate", ("evaluate", *encoding, "--no-baselines"), "encode", "MapWorker", result=scores),
        Stage("train", ("train", training, "--corpus", str(small)), "train", "RayTrainWorker", nodes=3),
        Stage("tune", ("tune", sweep, "--corpus", str(small)), "tune", "train_here"),
    )  # fmt: skip
    return {stage.name: stage for stage in stages}


def write_photos(folder: Path) -> str:
    """A folder of JPEG files with smooth colours, no two the same; every tenth is a query."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(30):
        sink = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
        drawn.append(sink.getvalue())
    for number in range(IMAGES):
        split = "query" if number % 10 == 9 else "train"
        place = folder / split / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        # A decoder stops at the end of the image; what follows makes the file another one.
        (place / f"{number:05d}.jpg").write_bytes(drawn[number % 30] + number.to_bytes(4, "big"))
    return str(folder)


def write_larger_model(url: Path) -> None:
    """An untrained model that takes some milliseconds an image."""
    torch.manual_seed(0)
    trunk = build_trunk(BackboneConfig(name="resnet9", width=16, image_size=32))
    built = build_method(parse_method_config(METHOD), trunk, len(CLASSES))
    config = {"method": built.config.model_dump(mode="json"), "backbone": trunk.config.model_dump(mode="json")}
    write_model(open_store(url), built, built.state_dict(), CLASSES, config, {}, [], {})


def write_codes(url: Path) -> None:
    """Codes as `hashray encode` writes them, with ids in no order."""
    rng, store = np.random.default_rng(0), open_store(url)
    ids, files = rng.permutation(CODES), []
    for number, part in enumerate(np.array_split(ids, CODE_PARTS)):
        codes = rng.integers(0, 256, (len(part), CODE_BYTES), dtype=np.uint8)
        names = pa.array([f"{name:09d}" for name in part])
        table = pa.table({"id": names, "code": pa.array([row.tobytes() for row in codes], pa.binary(CODE_BYTES))})
        name = f"parts/part-{number:05d}.parquet"
        files.append(artifact.write_file(store, name, table_bytes(table), rows=len(part)))
    manifest = Manifest(
        kind="codes", project_version="0", config={}, parents={"model": "1" * 64, "corpus": "2" * 64},
        files=tuple(files), fingerprint="ab" * 32, bit_order=BIT_ORDER, rows_in=CODES, rows_out=CODES,
        rows_quarantined=0, info={"num_bits": CODE_BYTES * 8, "split": "database"},
    )  # fmt: skip
    artifact.publish(store, manifest)

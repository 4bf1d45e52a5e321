"""[Ray] `hashray demo`: real images, the whole pipeline, a page at the end.

scikit-learn's 1,797 handwritten digits are written as PNG files, then go through the same stages as
anybody's images: ingest, train DSEH, encode, index, search, evaluate.

With `--unlabelled` ITQ trains without labels, which then only score it.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from hashray import artifact
from hashray.config import Config, validate
from hashray.errors import InputError
from hashray.model import load_model
from hashray.pipeline import PipelineConfig, run_stages
from hashray.progress import say, show_table
from hashray.search.reader import open_index
from hashray.storage import open_store
from hashray.train.config import TrainConfig

DIGITS = 1797
TRAINING = {
    "method": {"kind": "dseh", "num_bits": 32},
    "backbone": {"name": "resnet9", "width": 16, "image_size": 32},
    "augment": {"flip": False, "shift": 2},
    "optim": {"lr": 3e-3},
    "epochs": 8,
    "batch_size": 64,
    "validation_rows": 150,
    "validation_every": 4,
    "cpus_per_worker": 2,
}


SPLITS = {"split_protocol": "per-class", "query_per_class": 30, "train_per_class": 100}
UNLABELLED = {
    "method": {"kind": "itq", "num_bits": 32},
    "backbone": {"name": "resnet9", "width": 32, "image_size": 16, "frozen": True},
    "validation_rows": 0,
}
UNLABELLED_SPLITS = {"split_protocol": "random", "query_rows": 300}


class DemoConfig(Config):
    """Run the whole pipeline on handwritten digits."""

    out: str | None = Field(
        None, description="Local folder of everything that the demo makes; unset: demo-out, or demo-out-unlabelled"
    )
    unlabelled: bool = Field(False, description="Train ITQ without labels; they only score the codes")


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; leave metrics.json and report.html in the folder. Rerun = resume."""
    start_s = time.monotonic()
    place = config.out or ("demo-out-unlabelled" if config.unlabelled else "demo-out")
    if open_store(place).local_path("digits") is None:
        raise InputError(f"--out {place}: the demo needs a local folder; `hashray pipeline` writes to s3:// too")
    out = Path(place)
    digits = write_digits(out / "digits")
    say(f"{digits:,} handwritten digits as PNG files in {out / 'digits'}")
    stages = PipelineConfig(
        config="(the demo's own)", source=str(out / "digits"), out=str(out), shards=2,
        **(UNLABELLED_SPLITS if config.unlabelled else SPLITS),
    )  # fmt: skip
    training = UNLABELLED if config.unlabelled else TRAINING
    metrics = run_stages(stages, validate(TrainConfig, training, "the demo's config"))
    for name in ("metrics.json", "report.html"):
        shutil.copyfile(out / "evaluation" / name, out / name)
    (out / "figures").mkdir(exist_ok=True)  # the page links them
    for record in artifact.load_manifest(open_store(str(out / "evaluation")), "evaluation").files:
        if (name := artifact.plain_name(record.name)).startswith("figures/"):
            shutil.copyfile(out / "evaluation" / name, out / name)
    _search_one(out, metrics)
    if config.unlabelled:
        say("No label was used but for the scores: queries were drawn at random, and ITQ reads the features alone.")
    say("Search in the browser, with an image of your own:")
    say(f"  hashray serve {out / 'index'} --model {out / 'model'} --corpus {out / 'corpus'}")
    say(f"{time.monotonic() - start_s:,.0f} s in all. The page: {(out / 'report.html').absolute()}")
    return metrics


def write_digits(folder: Path) -> int:
    """Write the digits as 8 x 8 grey PNG files, a folder a class; return how many there are."""
    if sum(1 for _ in folder.glob("*/*.png")) == DIGITS:
        return DIGITS
    from sklearn.datasets import load_digits  # a second of imports that a rerun does without

    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
    return len(data.images)


def _search_one(out: Path, metrics: dict[str, Any]) -> None:
    """Search the published index with one query image, as a service would."""
    index, model = open_index(str(out / "index")), load_model(str(out / "model"))
    query = metrics["gallery"][0]["query"]
    with Image.open(out / "digits" / query) as image:
        ids, distances = index.search(model.encode([image]), 5)
    rows = [[str(row_id), str(int(distance))] for row_id, distance in zip(ids[0], distances[0], strict=True)]
    show_table(f"The five rows nearest to {query}", ["id", "distance"], rows)

"""The training loop of hashray beside a plain loop of torch on the same rows, and how long Ray Train needs to start.

    python benchmarks/train.py [--trunk NAME] [--image-size 64] [--batch-size 128] [--threads 1] [--out FILE.json]

Both train the same method (AdaLabelHash, with its augmentation) on the same images in memory and take turns, an epoch
each, after one that does not count. The plain loop has no workers to agree with, no seeds a step, no report and no
check that losses are finite. Start-up is apart: seconds from the command to the first step of
`hashray train --ray always`, on 600 tiny images, with what the same command takes without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timing import median_seconds, write_json

from hashray.config import validate
from hashray.data.images import augment
from hashray.methods import build_method
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.methods.base import LabelTable, Method
from hashray.train.batches import EpochPlan, MemorySlices, row_seeds
from hashray.train.config import TrainConfig
from hashray.train.loop import Loop, build_optimizer

STEPS, TURNS, CLASSES, SEED = 8, 7, 10, 0


def config_of(given: argparse.Namespace) -> TrainConfig:
    """The settings of both loops."""
    return validate(
        TrainConfig,
        {
            "epochs": TURNS + 2, "batch_size": given.batch_size, "precision": given.precision, "seed": SEED,
            "method": {"kind": "adalabelhash", "num_bits": 32, "codeword_init": "spread"},
            "backbone": {"name": given.trunk, "image_size": given.image_size, "frozen_norms": True},
        },
        "this benchmark",
    )  # fmt: skip


def built(config: TrainConfig) -> Method:
    """A method with the same weights each time."""
    torch.manual_seed(SEED)
    backbone: BackboneConfig = config.backbone
    method = build_method(config.method, build_trunk(backbone), CLASSES)
    method.trunk.amp = config.precision == "bf16"
    return method


def ours(
    config: TrainConfig, images: NDArray[np.uint8], labels: NDArray[np.int8], ids: list[str]
) -> Callable[[], None]:
    """An epoch of the product's loop; the next call is the next epoch."""
    plan = EpochPlan((len(images),), config.batch_size, len(images), SEED)
    table = LabelTable.of(torch.as_tensor(labels.astype(np.uint8)))
    source = MemorySlices(plan, images, labels, ids, config.augment, 0, 1)
    loop = Loop(built(config), config, table, source, lambda line, write: None, None, torch.device("cpu"))

    def epoch() -> None:
        loop.run(None, loop.position.epochs_done(loop.phases) + 1)

    return epoch


def plain(
    config: TrainConfig, images: NDArray[np.uint8], labels: NDArray[np.int8], ids: list[str]
) -> Callable[[], None]:
    """An epoch as one would write it: shuffle, augment, forward, backward, step."""
    method = built(config).train()
    (phase,) = method.phases(config.num_epochs)
    optimizer, rng = build_optimizer(config.optim, method.trained(phase)), np.random.default_rng(SEED)

    def epoch() -> None:
        for rows in np.split(rng.permutation(len(images)), STEPS):
            seeds = row_seeds(SEED, 0, [ids[row] for row in rows])
            inputs = torch.as_tensor(augment(images[rows], config.augment, seeds))
            terms = method(phase, inputs, torch.as_tensor(labels[rows]), torch.ones(len(rows)))
            loss = sum(term.total / term.mass for term in terms.values() if term.in_loss)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return epoch


def throughput(given: argparse.Namespace) -> dict[str, Any]:
    """Images/s of both, medians over the turns, and their ratio."""
    torch.set_num_threads(given.threads)
    config, rng = config_of(given), np.random.default_rng(SEED)
    count, side = STEPS * given.batch_size, given.image_size
    images = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    labels = np.eye(CLASSES, dtype=np.int8)[rng.integers(0, CLASSES, count)]
    ids = [f"{row:06d}" for row in range(count)]
    contenders = {"ours": ours(config, images, labels, ids), "plain": plain(config, images, labels, ids)}
    for run in contenders.values():
        run()
    rates = {name: count / seconds for name, seconds in median_seconds(contenders, TURNS).items()}
    return {"images_per_second": rates, "ratio": rates["ours"] / rates["plain"]}


def start_up() -> dict[str, float]:
    """Seconds from the command to the first step, with Ray and without."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from tiny import BACKBONE, write_corpus

        write_corpus(Path(folder, "corpus"), 600, 100)
        config = Path(folder, "config.toml")
        lines = ["epochs = 200", "[method]", 'kind = "adalabelhash"', "num_bits = 32", "[backbone]"]
        config.write_text("\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in BACKBONE.items())]))
        for name, ray in (("ray", "always"), ("no_ray", "never")):
            words = ["train", str(config), "--corpus", f"{folder}/corpus", "--out", f"{folder}/{name}", "--ray", ray]
            seconds[name] = _until_first_step([sys.executable, "-m", "hashray", *words])
    return seconds


def _until_first_step(words: list[str]) -> float:
    start_s = time.perf_counter()
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        for text in process.stderr:
            said.append(text)
            if text.startswith("{") and "loss" in (line := json.loads(text)) and line["stage"] == "train":
                process.terminate()
                process.stderr.read()
                return time.perf_counter() - start_s
    raise SystemExit("the training ended without a step:\n" + "".join(said[-20:]))


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", default="mobilenet_v2")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--starts", type=int, default=3, help="how often Ray Train is started; 0: not at all")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report: dict[str, Any] = {
        "trunk": given.trunk, "image_size": given.image_size, "batch_size": given.batch_size,
        "precision": given.precision, "threads": given.threads, "turns": TURNS, "cores": os.cpu_count(),
        "torch": torch.__version__, **throughput(given),
    }  # fmt: skip
    if given.starts:
        starts = [start_up() for _ in range(given.starts)]
        report["seconds_to_first_step"] = {name: statistics.median(one[name] for one in starts) for name in starts[0]}
    print(json.dumps(report, indent=2))
    if given.out is not None:
        write_json(given.out, report)


if __name__ == "__main__":
    main()

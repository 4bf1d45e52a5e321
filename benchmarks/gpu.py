"""Training, encoding and search on a GPU beside the CPU, with equal answers; without a GPU the CPU alone, said.

    python benchmarks/gpu.py [--rows 2000] [--size 32] [--epochs 2] [--database 200000] [--backbone resnet18]

The same rows, seed and initial weights on each device. Prints seconds, the ratio, and how far the answers differ: the
loss of the last epoch, the share of equal bits of the same model's codes, and equal neighbours.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from hashray.codes import binarize
from hashray.index.shard import Shard
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.methods.base import LabelTable, Method
from hashray.train.batches import EpochPlan, MemorySlices
from hashray.train.config import TrainConfig
from hashray.train.loop import Loop

CLASSES, NUM_BITS, K = 10, 64, 100


def devices() -> list[str]:
    """The devices that there are."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def rows_of(count: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int8], list[str]]:
    """Images uint8 [n, 3, s, s] whose brightest quarter names their class, labels and ids."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 128, (count, 3, size, size), dtype=np.uint8)
    for number, label in enumerate(labels):
        images[number, label % 3, :, (label * size) // CLASSES : (label * size) // CLASSES + size // 4] += 100
    return images, np.eye(CLASSES, dtype=np.int8)[labels], [f"{number:06d}" for number in range(count)]


def trained(config: TrainConfig, images: Any, device: str) -> tuple[Method, float, float]:
    """The method after its epochs on a device, the seconds they took, and the loss of the last."""
    pixels, labels, ids = images
    torch.manual_seed(0)
    method = build_method(config.method, build_trunk(config.backbone), CLASSES).to(device)
    plan = EpochPlan((len(ids),), config.batch_size, config.shuffle_window, config.seed)
    source = MemorySlices(plan, pixels, labels, ids, config.augment, 0, 1)
    losses: list[float] = []

    def report(metrics: dict[str, Any], write: Any) -> None:
        if metrics["event"] == "epoch":
            losses.append(float(metrics["loss"]))

    loop = Loop(method, config, LabelTable.of(torch.as_tensor(labels.astype(np.uint8))), source, report, None,
                torch.device(device))  # fmt: skip
    seconds = timed(device, lambda: loop.run(None, None))
    return method, seconds, losses[-1]


def encoded(
    method: Method, pixels: NDArray[np.uint8], device: str, batch: int = 256
) -> tuple[NDArray[np.uint8], float]:
    """Codes of all images by one method on a device, and seconds."""
    method = method.to(device).eval()
    codes: list[NDArray[np.uint8]] = []

    def run() -> None:
        codes.clear()
        with torch.inference_mode():
            for start in range(0, len(pixels), batch):
                codes.append(binarize(method.encode(torch.as_tensor(pixels[start : start + batch], device=device))))

    seconds = timed(device, run)
    return np.concatenate(codes), seconds


def searched(database: NDArray[np.uint8], queries: NDArray[np.uint8], device: str) -> tuple[Any, float]:
    """Distances and positions [2, q, k] of the nearest rows of a shard, ties in order, and seconds."""
    if device == "cuda" and not getattr(faiss, "get_num_gpus", lambda: 0)():
        return None, float("nan")  # a FAISS without GPUs beside a torch with them
    index = faiss.IndexBinaryFlat(NUM_BITS)
    index.add(database)
    shard, answer = Shard(index, "flat", NUM_BITS, gpu=device == "cuda"), list[Any]()
    seconds = timed(device, lambda: answer.append(shard.search(queries, K)))
    return np.stack(answer[-1]), seconds


def timed(device: str, run: Callable[[], Any]) -> float:
    """Seconds of a run, with all that it put on the device."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 500, "size": 32, "epochs": 2, "database": 200_000, "queries": 1000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backbone", default="resnet9")
    options = parser.parse_args()
    images = rows_of(options.rows, options.size)
    backbone = BackboneConfig.model_validate({"name": options.backbone, "image_size": options.size})
    method = parse_method_config({"kind": "adalabelhash", "num_bits": NUM_BITS})
    config = TrainConfig(method=method, backbone=backbone, epochs=options.epochs, precision="fp32")  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    database = rng.integers(0, 256, (options.database, NUM_BITS // 8), dtype=np.uint8)
    queries = rng.integers(0, 256, (options.queries, NUM_BITS // 8), dtype=np.uint8)
    lines, answers = [], []
    model = trained(config, images, "cpu")[0]  # warms up; every device encodes with this one's weights
    for device in devices():
        _, train_s, loss = trained(config, images, device)
        codes, encode_s = encoded(model, images[0], device)
        distances, search_s = searched(database, queries, device)
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        lines.append({"device": device, "name": name, "train_s": train_s, "encode_s": encode_s, "search_s": search_s})
        answers.append((loss, codes, distances))
        print(json.dumps(lines[-1]))
    for (one, other), (first, second) in zip(pairwise(lines), pairwise(answers), strict=True):
        bits = np.unpackbits(first[1] ^ second[1], axis=1).mean()
        print(json.dumps({
            **{f"{name}_ratio": one[f"{name}_s"] / other[f"{name}_s"] for name in ("train", "encode", "search")},
            "loss_difference": abs(first[0] - second[0]), "share_of_equal_bits": 1 - float(bits),
            "equal_distances": None if second[2] is None else bool(np.array_equal(first[2], second[2])),
        }))  # fmt: skip
    if len(lines) == 1:
        print(json.dumps({"note": "torch sees no GPU here: the CPU alone"}))


if __name__ == "__main__":
    main()

"""Images a second of trunks on one core: by images at a time, and in bf16 beside fp32.

    python benchmarks/trunks.py [--names mobilenet_v2 timm:resnet50] [--size 224] [--out FILE.json]

Weights are random. The peer of a number at a time is what hashray takes (`Trunk.rows_at_a_time`); that of bf16 is fp32.
Printed are images a second and the cosine of the features with those of fp32. Clock: processor time of the thread.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import median_seconds, write_json

from hashray.methods.backbone import BackboneConfig, Trunk, build_trunk

IMAGES, REPETITIONS = 64, 3
AT_A_TIME = (4, 8, 16, 32, 64)


def run(trunk: Trunk, images: torch.Tensor, rows: int) -> torch.Tensor:
    """The features of the images, `rows` of them at a time."""
    with torch.inference_mode():
        return torch.cat([trunk._run(chunk) for chunk in images.split(rows)])


def measure(name: str, size: int) -> list[dict[str, Any]]:
    """One line a contender: fp32 at each number at a time, then bf16 at hashray's number."""
    torch.manual_seed(0)
    config = BackboneConfig.model_validate({"name": name, "image_size": size})
    trunk = build_trunk(config).eval()
    cast = Trunk(config.model_copy(update={"precision": "bf16"}), trunk.net, trunk.code).eval()
    images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    rows = trunk.rows_at_a_time
    contenders = {f"fp32, {count}": partial(run, trunk, images, count) for count in {*AT_A_TIME, rows}}
    contenders["bf16"] = partial(run, cast, images, rows)
    expected = run(trunk, images, rows)
    cosine = torch.nn.functional.cosine_similarity(run(cast, images, rows), expected).min().item()
    seconds = median_seconds(contenders, REPETITIONS, time.thread_time)
    lines = []
    for contender, taken in sorted(seconds.items(), key=lambda item: (item[0] == "bf16", len(item[0]), item[0])):
        line: dict[str, Any] = {"trunk": name, "size": size, "contender": contender, "images_per_s": IMAGES / taken,
                                "over_ours": seconds[f"fp32, {rows}"] / taken}  # fmt: skip
        if contender == "bf16":
            line["least_cosine"] = cosine
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in line.values()))
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name in options.names for line in measure(name, options.size)]
    if options.out is not None:
        write_json(options.out, {"lines": lines})


if __name__ == "__main__":
    main()

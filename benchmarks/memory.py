"""Training steps of a trunk on CPUs, with glibc as it is and as hashray sets it for the workers (`memory_environment`).

    python benchmarks/memory.py [--trunk mobilenet_v2] [--image-size 128] [--batch-size 128] [--out FILE.json]

Both are processes of their own, for the settings are read when a process starts, and take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import write_json

from hashray.engine.session import memory_environment
from hashray.methods.backbone import BackboneConfig, build_trunk

TURNS, WARM, STEPS = 5, 2, 5


def images_per_second(given: argparse.Namespace) -> float:
    """Forward, backward and AdamW on random images."""
    trunk = build_trunk(BackboneConfig(name=given.trunk, image_size=given.image_size, frozen_norms=True)).train()
    optimizer = torch.optim.AdamW(trunk.parameters())
    images = torch.randint(0, 256, (given.batch_size, 3, given.image_size, given.image_size), dtype=torch.uint8)
    for step in range(WARM + STEPS):
        if step == WARM:
            start = time.perf_counter()
        optimizer.zero_grad()
        trunk(images).square().mean().backward()
        optimizer.step()
    return STEPS * given.batch_size / (time.perf_counter() - start)


def main() -> None:
    """Time both in turns; print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", default="mobilenet_v2")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", action="store_true", help="in this process, for the number alone")
    given = parser.parse_args()
    if given.once:
        print(images_per_second(given))
        return
    rates: dict[str, list[float]] = {"default": [], "kept": []}
    for _ in range(TURNS):
        for name, env in (("default", {}), ("kept", memory_environment())):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--once"],
                env={**os.environ, **env},
                check=True,
                capture_output=True,
            )
            rates[name].append(float(done.stdout))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    report: dict[str, Any] = {
        "trunk": given.trunk, "image_size": given.image_size, "batch_size": given.batch_size,
        "turns": TURNS, "cores": os.cpu_count(), "torch": torch.__version__,
        "images_per_second": medians, "ratio": medians["kept"] / medians["default"],
    }  # fmt: skip
    print(f"{medians['default']:.1f} images/s; memory kept: {medians['kept']:.1f} images/s; {report['ratio']:.2f}x")
    if given.out is not None:
        write_json(given.out, report)


if __name__ == "__main__":
    main()

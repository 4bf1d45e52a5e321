"""hashray encode against a plain torch loop: the same images, decode, network and cores.

    python benchmarks/encode.py [--images FOLDER] [--weights FILE] [--rows 1024] [--out FILE.json]

Both use MobileNetV2 at 128 pixels. The plain loop is one process with torch's threads on all cores: decode 64
images, run the network, pack the bits. hashray is `run_units` over parts of the corpus, an actor a core.
Steady state: hashray's rate lies between the first finished part and the last, so Ray's start and the
loading of the model are left out on its side, as a loaded model and warm-up batches are on the other.
The two take turns. Ray starts workers at nice 15; the plain loop takes the same niceness, or a busy machine
would favour it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
import torchvision
from PIL import Image
from timing import write_json

from hashray.codes import binarize
from hashray.data.corpus import iterate_bytes, open_corpus
from hashray.data.images import decode_rows
from hashray.data.ingest import IngestConfig, ingest
from hashray.data.units import run_units
from hashray.encode import _EncodeWorker
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.model import load_model, write_model
from hashray.runtime import WorkersConfig, connect
from hashray.storage import open_store

BATCH, REPETITIONS, PART_ROWS = 64, 5, 64


def prepare(folder: Path, images: Path | None, weights: str | None, rows: int) -> tuple[str, str]:
    """A corpus of `rows` images in small parts and an untrained 32-bit model on a MobileNetV2 trunk."""
    source = folder / "images"
    source.mkdir()
    rng = np.random.default_rng(0)
    found = sorted(images.rglob("*.png"))[:: max(1, 50_000 // rows)][:rows] if images else []
    for i in range(rows):
        if found:
            shutil.copyfile(found[i % len(found)], source / f"{i:05d}.png")
        else:
            sink = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(sink, "PNG")
            (source / f"{i:05d}.png").write_bytes(sink.getvalue())
    ingest(IngestConfig(source=str(source), out=str(folder / "corpus"), rows_per_part=PART_ROWS))
    trunk = build_trunk(BackboneConfig(name="mobilenet_v2", weights=weights, image_size=128, frozen=True))
    method = build_method(parse_method_config({"kind": "dseh", "num_bits": 32}), trunk, 10)
    write_model(open_store(folder / "model"), method, method.state_dict(), ["x"] * 10, {}, {}, [], {})
    return str(folder / "corpus"), str(folder / "model")


@ray.remote(num_cpus=0)
class PlainLoop:
    """The usual loop in a process of its own, at the niceness of Ray's workers."""

    def __init__(self, corpus: str, model: str) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.model = load_model(model, device="cpu")
        opened = open_corpus(corpus)
        self.rows = [row for record in opened.parts for row in iterate_bytes(opened.read_part(record))]
        self.run(2 * BATCH)

    @torch.inference_mode()
    def run(self, count: int) -> float:
        """Encode `count` rows; images a second."""
        start = time.perf_counter()
        for at in range(0, count, BATCH):
            pixels, _, _ = decode_rows(self.rows[at : at + BATCH], 128, "crop")
            binarize(self.model.method.logits(torch.as_tensor(pixels)))
        return count / (time.perf_counter() - start)


def hashray_rate(corpus: str, model: str, out: Path) -> float:
    """Images a second between the first finished part and the last, from the times of their records."""
    store, opened = open_store(out), open_corpus(corpus)
    units = [{"index": i, "rows": record.rows, "part": record.name} for i, record in enumerate(opened.parts)]
    arguments = {"model": model, "source": corpus, "split": "all", "batch_size": BATCH, "gpu": False}
    run_units(store, "bench", units, _EncodeWorker, arguments, WorkersConfig(), "encode", 0.0)
    times = sorted(path.stat().st_mtime for path in (out / "progress/bench").glob("*.json"))
    # The first part of each actor ends the start-up; the last is where an actor may wait for the other.
    first = WorkersConfig().most()
    return (len(times) - first) * PART_ROWS / (times[-1] - times[first - 1])


def main() -> None:
    """Run both in turns, print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--weights")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/encode.json"))
    wanted = parser.parse_args()
    connect()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, model = prepare(folder, wanted.images, wanted.weights, wanted.rows)
        plain = PlainLoop.remote(corpus, model)  # type: ignore[attr-defined]
        ours, theirs = [], []
        for turn in range(REPETITIONS):
            theirs.append(ray.get(plain.run.remote(wanted.rows)))
            ours.append(hashray_rate(corpus, model, folder / f"codes{turn}"))
            print(json.dumps({"turn": turn, "hashray": ours[-1], "plain": theirs[-1]}), flush=True)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"encode: {ratio:.2f}x of a plain torch {torch.__version__} loop, {statistics.median(ours):.0f} images/s "
          f"against {statistics.median(theirs):.0f}")  # fmt: skip
    result = {
        "name": "encode",
        "ratio": ratio,
        "ours_per_s": statistics.median(ours),
        "peer_per_s": statistics.median(theirs),
        "peer": f"torch {torch.__version__}, torchvision {torchvision.__version__}, {os.cpu_count()} threads",
        "repetitions": REPETITIONS,
        "rows": wanted.rows,
    }
    write_json(wanted.out, result)


if __name__ == "__main__":
    main()

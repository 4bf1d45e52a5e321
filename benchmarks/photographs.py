"""The whole pipeline over a folder of photographs, and streamed training against a plain torch DataLoader loop.

    python benchmarks/photographs.py FOLDER [--out FILE.json] [--work DIR]

Every command runs as a process of its own; memory and CPU seconds by role are read as in scale.py. Images a second of
the streamed training: what EPOCHS epochs more take, by two trainings, so that starting Ray, torch and the stream is
left out. The peer reads the same files, decodes them by the same functions in as many DataLoader workers as there are
cores, with the same trunk and batch, after one epoch to warm up. Both train from the whole image, at 32 pixels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import tomli_w
import torch
from scale import HASHRAY, measure, show
from timing import write_json
from torch.utils.data import DataLoader, Dataset

from hashray.data.images import USUAL_ENDINGS, decode, to_pixels
from hashray.methods.backbone import BackboneConfig, build_trunk

SIZE, BATCH, EPOCHS, MOST_MIB = 32, 64, 3, 3 << 10
TRUNK = {"name": "resnet9", "width": 8, "image_size": SIZE}


class Photographs(Dataset[tuple[Any, int]]):
    """Files of a folder of folders, one a class."""

    def __init__(self, folder: Path) -> None:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self.items = [
            (path, label)
            for label, place in enumerate(classes)
            for path in sorted(place.rglob("*"))
            if path.suffix.lower() in USUAL_ENDINGS
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        path, label = self.items[place]
        return to_pixels(decode(path.read_bytes()), SIZE, "crop"), label


def peer(folder: Path) -> list[float]:
    """Images a second of the plain loop, epoch by epoch after the first."""
    torch.manual_seed(0)
    trunk = build_trunk(BackboneConfig(**TRUNK)).train()  # type: ignore[arg-type]
    head = torch.nn.Linear(trunk.feature_dim, 2)
    optimizer = torch.optim.AdamW([*trunk.parameters(), *head.parameters()])
    torch.set_num_threads(1)
    data = Photographs(folder)
    workers = len(os.sched_getaffinity(0))
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    rates = []
    for epoch in range(1 + EPOCHS):
        start = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(trunk(images)), labels).backward()
            optimizer.step()
        if epoch:
            rates.append(len(data) / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="hashray-photographs-"))
    work.mkdir(parents=True, exist_ok=True)
    count = len(Photographs(args.folder))
    at = {name: str(work / name) for name in ("corpus", "codes", "index", "evaluation")}

    def training(epochs: int) -> list[str]:
        config = work / f"train-{epochs}.toml"
        values = {
            "method": {"kind": "adalabelhash", "num_bits": 32}, "backbone": TRUNK, "batch_size": BATCH,
            "epochs": epochs, "validation_every": 100, "validation_rows": 10, "input": "stream",
        }  # fmt: skip
        config.write_text(tomli_w.dumps(values))
        return ["train", str(config), "--corpus", at["corpus"], "--out", str(work / f"model-{epochs}")]

    split = ["--split-protocol", "per-class", "--query-per-class", "10", "--train-per-class", str(count // 2 - 10)]
    on = ["--model", str(work / "model-1"), "--corpus", at["corpus"]]
    results: dict[str, Any] = {}
    for name, words in {
        "ingest": ["ingest", str(args.folder), "--out", at["corpus"], *split],
        "train": training(1),
        "train longer": training(1 + EPOCHS),
        "encode": ["encode", *on, "--out", at["codes"]],
        "index": ["index", "build", "--codes", at["codes"], "--out", at["index"]],
        "evaluate": ["evaluate", *on, "--codes", at["codes"], "--out", at["evaluation"]],
    }.items():
        results[name] = measure([*HASHRAY, *words], work / f"{name.replace(' ', '-')}.log")
        show(name, count, results[name])
    more_s = results["train longer"]["wall_s"] - results["train"]["wall_s"]
    rows = EPOCHS * (count - 20 - 10)
    theirs = peer(args.folder)
    largest = max(max(stage["peak_mib"].values()) for stage in results.values())
    report = {
        "photographs": count,
        "bytes": sum(path.stat().st_size for path, _ in Photographs(args.folder).items),
        "images_per_s": rows / more_s,
        "dataloader_images_per_s": statistics.median(theirs),
        "all_dataloader": theirs,
        "ratio": rows / more_s / statistics.median(theirs),
        "largest_process_mib": largest,
        "stages": results,
    }
    print(f"\nphotographs: {report['ratio']:.2f}x the images per second of a DataLoader loop", end=" ")
    print(f"({report['images_per_s']:.1f} against {report['dataloader_images_per_s']:.1f});", end=" ")
    print(f"the largest process had {largest:,} MiB, at most {MOST_MIB:,} are allowed")
    if args.out is not None:
        write_json(args.out, report)


if __name__ == "__main__":
    main()

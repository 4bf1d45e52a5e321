"""`hashray encode` (a pool of actors on Ray) against a plain torch loop over the same images in one process.

    python benchmarks/encode.py [--images FOLDER] [--weights FILE] [--out FILE.json]

MobileNetV2 at 128 pixels and 32 bits; 32-pixel PNG images as CIFAR-10's, drawn here when no folder is given; the
trunk's weights from a state-dict file, else random (the speed is the same). Both decode with hashray.data.images, both
may use every core: ours one worker a core with one torch thread each, the peer one process with as many torch threads.

Images per second at steady state. Ours: rows finished after every worker has finished its first part, by the times of
the part files, so that starting Ray, the pool and torch is left out; the number of parts is a multiple of the workers',
so no worker idles at the end for want of a part. The peer: after one batch to warm up. They take turns. Ray gives its
workers a niceness of 15, which loses to any other process of the machine: here it is 0, as the peer's. And OpenMP's
threads wait without spinning: beside one busy process, the peer's two were three times slower spinning. Our workers
keep their memory (engine/session.py, memory_environment: a good part of the ratio); the peer is the loop as one
writes it.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.update({"RAY_worker_niceness": "0", "OMP_WAIT_POLICY": "passive"})  # before torch is imported and Ray starts

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image
from timing import write_json

from hashray import artifact
from hashray.artifact import Manifest, canonical, table_bytes
from hashray.codes import Codes, binarize
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA
from hashray.data.images import USUAL_ENDINGS, decode_rows
from hashray.encode.codes import EncodeConfig, encode
from hashray.engine.parts import write_quarantine
from hashray.engine.session import WorkersConfig, connect
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.model import load_model, write_model
from hashray.storage import open_store

NUM_BITS, IMAGE_SIZE, BATCH, SEED = 32, 128, 64, 0
Images = list[tuple[str, bytes]]


def read_images(folder: str | None, count: int) -> Images:
    """`count` images as (id, bytes): from a folder, or 32-pixel PNGs of smooth random colours."""
    if folder is not None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in USUAL_ENDINGS)[:count]
        if len(paths) < count:
            raise SystemExit(f"{folder} holds {len(paths)} images, {count} are needed")
        return [(str(path), path.read_bytes()) for path in paths]
    rng, rows_found = np.random.default_rng(SEED), []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(noisy).save(sink, "PNG")
        rows_found.append((f"{number:06d}.png", sink.getvalue()))
    return rows_found


def write_corpus(url: str, images: Images, rows_per_part: int) -> None:
    """The corpus that `hashray ingest` would make of them."""
    store, files = open_store(url), []
    for start in range(0, len(images), rows_per_part):
        rows = [
            {"id": name, "image": data, "uri": None, "labels": [0], "split": "database"}
            for name, data in images[start : start + rows_per_part]
        ]
        info = {"splits": {"database": len(rows)}}
        for folder, schema in (("rows", ROW_SCHEMA), ("images", IMAGE_SCHEMA)):
            name, data = (
                f"{folder}/part-{start // rows_per_part:05d}.parquet",
                pa.Table.from_pylist(rows, schema=schema),
            )
            files.append(artifact.write_file(store, name, table_bytes(data), rows=len(rows), info=info))
    files += [artifact.write_file(store, "classes.json", canonical(["0"])), write_quarantine(store, [])]
    count = len(images)
    manifest = Manifest(kind="corpus", project_version="", config={}, parents={}, files=tuple(files), rows_in=count,
                        rows_out=count, rows_quarantined=0, info={"num_classes": 1})  # fmt: skip
    artifact.publish(store, manifest)


def write_untrained(url: str, weights: str | None) -> None:
    """A DSEH model on a frozen MobileNetV2."""
    torch.manual_seed(SEED)
    backbone = BackboneConfig(name="mobilenet_v2", weights=weights, image_size=IMAGE_SIZE, frozen=True)
    method = build_method(parse_method_config({"kind": "dseh", "num_bits": NUM_BITS}), build_trunk(backbone), 2)
    config = {"method": method.config.model_dump(mode="json"), "backbone": backbone.model_dump(mode="json")}
    write_model(open_store(url), method, method.state_dict(), ["0", "1"], config, {}, [], {})


def ours(model: str, corpus: str, out: str, workers: int) -> tuple[float, Codes]:
    """Images per second at steady state, and the codes in corpus order."""
    encode(EncodeConfig(model=model, corpus=corpus, out=out, batch_size=BATCH, pool=WorkersConfig(workers=workers)))
    store = open_store(out)
    records = [r for r in artifact.load_manifest(store, "codes").files if r.name.startswith("parts/")]
    finished = sorted((Path(out, r.name).stat().st_mtime_ns / 1e9, int(r.rows or 0)) for r in records)
    rate = sum(rows for _, rows in finished[workers:]) / (finished[-1][0] - finished[workers - 1][0])
    tables = [pa.parquet.read_table(Path(out, r.name)) for r in records]
    codes = b"".join(pa.concat_tables(tables).column("code").to_pylist())
    return rate, np.frombuffer(codes, np.uint8).reshape(-1, NUM_BITS // 8)


def peer(model_url: str, images: Images, threads: int) -> tuple[float, Codes]:
    """The plain loop: decode a batch, run the network, pack the bits."""
    torch.set_num_threads(threads)
    model = load_model(model_url, device="cpu")

    def run(batch: Images) -> Codes:
        pixels, _, _ = decode_rows(batch, IMAGE_SIZE, "crop")
        return binarize(model.logits(pixels))

    run(images[:BATCH])
    start = time.perf_counter()
    codes = [run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return len(images) / (time.perf_counter() - start), np.concatenate(codes)


def main() -> None:
    """Check that both give the same codes, time both, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="a folder of images; unset: drawn here")
    parser.add_argument("--weights", help="a state dict of MobileNetV2; unset: random weights")
    parser.add_argument("--parts-per-worker", type=int, default=8)
    parser.add_argument("--rows-per-part", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    images = read_images(options.images, cores * options.parts_per_worker * options.rows_per_part)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        model, corpus = f"{folder}/model", f"{folder}/corpus"
        write_untrained(model, options.weights)
        write_corpus(corpus, images, options.rows_per_part)
        connect()
        for number in range(options.repetitions):
            rate, codes = ours(model, corpus, f"{folder}/codes-{number}", cores)
            rates["ours"].append(rate)
            rate, expected = peer(model, images, cores)
            rates["peer"].append(rate)
            differing = float((codes != expected).any(1).mean())
            if differing > 0.005:  # another number of threads may tip a logit that is almost 0
                raise SystemExit(f"{differing:.1%} of the codes differ")
            print(f"  {rates['ours'][-1]:.1f} images/s against {rates['peer'][-1]:.1f}", flush=True)
        ray.shutdown()
    median = {name: statistics.median(values) for name, values in rates.items()}
    result = {
        "name": "encode",
        "ratio": median["ours"] / median["peer"],
        "ours_images_per_s": median["ours"],
        "peer_images_per_s": median["peer"],
        "all": rates,
        "peer": f"plain loop, torch {torch.__version__}, {cores} threads",
        "repetitions": options.repetitions,
        "images": len(images),
        "source": options.images or "32 px PNG, drawn",
        "image_size": IMAGE_SIZE,
        "batch": BATCH,
        "workers": cores,
        "ray": ray.__version__,
        "seed": SEED,
    }
    print(
        f"encode: {result['ratio']:.2f}x the images per second of a {result['peer']} ({median['ours']:.1f} against "
        f"{median['peer']:.1f}, median of {options.repetitions}, {len(images):,} images, "
        f"MobileNetV2 at {IMAGE_SIZE} px, {cores} workers)"
    )
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()

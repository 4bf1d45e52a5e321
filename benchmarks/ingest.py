"""`hashray ingest` of a folder of images against a plain multiprocessing loop that writes the same Parquet.

    python benchmarks/ingest.py FOLDER [--repetitions 3] [--out FILE.json]

The peer reads every file, decodes it by the same function and writes the same columns in files of as many rows, by as
many processes as there are cores; it lists the folder before and keeps no record of what it has done. Images per
second at steady state: of ours, rows finished after every worker has finished its first part, by the times of the part
files, so that listing, starting Ray and the pool is left out; of the peer, the same of its files. They take turns. The
seconds of the whole commands are printed too. Ray gives its workers a niceness of 15: here it is 0, as the peer's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from scale import HASHRAY
from timing import write_json

from hashray.artifact import table_bytes
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA
from hashray.data.images import USUAL_ENDINGS, decode

ROWS_PER_PART = 1024


def steady_rate(files: list[tuple[float, int]], workers: int) -> float:
    """Rows a second of (time, rows) of finished files, after each worker's first."""
    files = sorted(files)
    return sum(rows for _, rows in files[workers:]) / (files[-1][0] - files[workers - 1][0])


def ours(folder: Path, out: Path, workers: int) -> tuple[float, float]:
    """Rows a second at steady state, and seconds of the command."""
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    words = [*HASHRAY, "ingest", str(folder), "--out", str(out), "--rows-per-part", str(ROWS_PER_PART)]
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True, env=environment)
    seconds = time.perf_counter() - start
    parts = [(path.stat().st_mtime, pa.parquet.read_metadata(path).num_rows) for path in out.glob("rows/*.parquet")]
    return steady_rate(parts, workers), seconds


def _write(job: tuple[list[Path], Path, Path]) -> None:
    paths, folder, target = job
    rows, images = [], []
    for path in paths:
        data = path.read_bytes()
        decode(data)
        rows.append({"id": str(path.relative_to(folder)), "labels": [0], "split": "database"})
        images.append({"image": data, "uri": None})
    for name, schema, items in (("images", IMAGE_SCHEMA, images), ("rows", ROW_SCHEMA, rows)):
        Path(f"{target}-{name}.parquet").write_bytes(table_bytes(pa.Table.from_pylist(items, schema=schema)))


def peer(folder: Path, out: Path, workers: int) -> tuple[float, float]:
    """The same of the plain loop."""
    out.mkdir()
    start = time.perf_counter()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in USUAL_ENDINGS)
    chunks = [paths[i : i + ROWS_PER_PART] for i in range(0, len(paths), ROWS_PER_PART)]
    jobs = [(chunk, folder, out / f"part-{number:05d}") for number, chunk in enumerate(chunks)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_write, jobs, chunksize=1)
    seconds = time.perf_counter() - start
    files = [(path.stat().st_mtime, pa.parquet.read_metadata(path).num_rows) for path in out.glob("*-rows.parquet")]
    return steady_rate(files, workers), seconds


def main() -> None:
    """Time both in turns; print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    measured: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as work:
        for number in range(args.repetitions):
            for name, run in (("ours", ours), ("peer", peer)):
                measured[name].append(run(args.folder, Path(work, f"{name}-{number}"), workers))
                rate, seconds = measured[name][-1]
                print(f"  {name}: {rate:,.0f} images/s, {seconds:.1f} s", flush=True)
    rates = {name: statistics.median(rate for rate, _ in values) for name, values in measured.items()}
    whole = {name: statistics.median(seconds for _, seconds in values) for name, values in measured.items()}
    report: dict[str, Any] = {
        "name": "ingest", "ratio": rates["ours"] / rates["peer"], "images_per_s": rates, "whole_s": whole,
        "all": measured, "repetitions": args.repetitions, "workers": workers, "source": args.folder.name,
    }  # fmt: skip
    print(
        f"ingest: {report['ratio']:.2f}x the images per second of a plain multiprocessing loop at steady state "
        f"({rates['ours']:,.0f} against {rates['peer']:,.0f}); the whole: {whole['ours']:.1f} s against "
        f"{whole['peer']:.1f} s"
    )
    if args.out is not None:
        write_json(args.out, report)


if __name__ == "__main__":
    main()

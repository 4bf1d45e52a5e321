"""CPU seconds an image of `hashray ingest` and `hashray encode` on clusters of 1, 2 and 4 nodes on this machine.

    python benchmarks/cluster.py [--images N] [--nodes 1 2 4] [--out FILE.json]

cluster/local.py's nodes of one CPU, a head without CPUs. Counted is user and system time of all worker processes of
the nodes, read ten times a second, so the last tenth of a process is missing. Each stage runs over N and over 3 N
images: the difference is work, without the start of the processes, which each node pays once; both are printed. Images
a second on more nodes than cores say nothing, and are left out. The peer is the cluster of one node.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from encode import read_images, write_corpus, write_untrained
from timing import write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "cluster"))
import local  # noqa: E402

ROWS_PER_PART, READ_S = 32, 0.1
Seconds = dict[tuple[int, float], float]
Row = dict[str, Any]


def read_workers(state: local.State, into: Seconds) -> None:
    """Keep the CPU seconds that every worker process of the nodes has used so far."""
    for process in local.processes_of(state.cluster, list(state.nodes().values())):
        try:
            with process.oneshot():
                if "ray::MapWorker" in " ".join(process.cmdline()):
                    times = process.cpu_times()
                    into[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue


def cpu_seconds(state: local.State, words: list[str]) -> float:
    """Run a hashray command on the cluster; return the CPU seconds of its workers."""
    used, over = Seconds(), threading.Event()

    def watch() -> None:
        while not over.wait(READ_S):
            read_workers(state, used)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        command = [sys.executable, "-m", "hashray", *words, "--ray", "always"]
        done = subprocess.run(command, env=os.environ | state.environment(), cwd=ROOT, capture_output=True, check=False)
    finally:
        over.set()
        thread.join()
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-3000:])
    return sum(used.values())


def inputs(folder: Path, counts: tuple[int, int]) -> dict[str, list[list[str]]]:
    """Write images, corpora and a model; return the commands of each stage, for the smaller and the larger count."""
    write_untrained(f"{folder}/model", None)
    images = read_images(None, counts[1])
    commands: dict[str, list[list[str]]] = {"ingest": [], "encode": []}
    for count in counts:
        source, corpus = folder / f"images-{count}" / "a", f"{folder}/corpus-{count}"
        source.mkdir(parents=True)
        for name, data in images[:count]:
            (source / name).write_bytes(data)
        write_corpus(corpus, images[:count], ROWS_PER_PART)
        commands["ingest"].append(["ingest", str(source.parent), "--rows-per-part", str(ROWS_PER_PART)])
        commands["encode"].append(["encode", "--model", f"{folder}/model", "--corpus", corpus])
    return commands


def measure(folder: Path, nodes: int, commands: dict[str, list[list[str]]], counts: tuple[int, int]) -> list[Row]:
    """The CPU milliseconds an image of each stage on a cluster of some nodes."""
    cluster, rows = local.Cluster(folder / "c"), []
    with cluster.changing():
        state = cluster.up(nodes, 1, 0, False, 100 << 20)
        try:
            for stage, pair in commands.items():
                outs = [f"{folder}/{stage}-{nodes}-{count}" for count in counts]
                few, many = (cpu_seconds(state, [*w, "--out", out]) for w, out in zip(pair, outs, strict=True))
                work = 1000 * (many - few) / (counts[1] - counts[0])
                rows.append({"stage": stage, "nodes": nodes, "work_ms": work, "all_ms": 1000 * many / counts[1]})
        finally:
            cluster.down()
    return rows


def main() -> None:
    """Measure every stage on every cluster, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="the smaller count; the larger is three times this")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    counts, rows = (options.images, 3 * options.images), list[Row]()
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp") as name:
        commands = inputs(Path(name) / "data", counts)
        for nodes in options.nodes:
            for row in measure(Path(name), nodes, commands, counts):
                rows.append(row)
                one = next(other for other in rows if other["stage"] == row["stage"])
                compared = f"{row['work_ms'] / one['work_ms']:.2f}x of {one['nodes']} nodes"
                started = f"{row['all_ms']:.2f} with the start of the workers over {counts[1]:,} images"
                print(f"{row['stage']}, {nodes} nodes: {row['work_ms']:.2f} CPU ms an image, {compared}; {started}")
    if options.out:
        write_json(options.out, {"name": "cluster", "images": counts, "rows": rows, "cores": os.cpu_count()})


if __name__ == "__main__":
    main()

"""Real commands over many tiny images: seconds, CPU and memory by role, and what `hashray plan` said before.

    python benchmarks/scale.py ingest   [--rows 100000] [--formats parquet tar folder] [--work DIR] [--out FILE.json]
    python benchmarks/scale.py list     [--rows 10000000] …      lists a Parquet source only: the driver's memory
    python benchmarks/scale.py pipeline [--rows 1000000] …       every stage, beside the plan of a 1 % sample

Images of 4 x 4 pixels, few of them distinct, in 100 classes. Every command runs as a process of its own, as a user
starts it. Its process tree is sampled four times a second: resident memory (the largest process of a role) and CPU
seconds (the sum over a role). CPU seconds say more than wall seconds on a machine that others use too. Memory counts
pages that processes share, such as torch's code and Ray's object store, in each of them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from PIL import Image
from timing import write_json

CLASSES, SIDE, LOOK_S = 100, 4, 0.25
PER_FILE = {"parquet": 50_000, "tar": 20_000}
ROLES = {"_Actor)": "worker of parts", "_call": "task", "RayTrainWorker": "training worker",
         "MapBatches": "stream task"}  # fmt: skip
HASHRAY = [sys.executable, "-m", "hashray"]
TRAINING = {
    "method": {"kind": "adalabelhash", "num_bits": 64},
    "backbone": {"name": "resnet9", "width": 4, "image_size": 8},
    "epochs": 2, "batch_size": 256, "validation_every": 2, "cpus_per_worker": 1,
}  # fmt: skip


def splits(rows: int) -> list[str]:
    """1,000 queries and 50,000 train rows of a million; fewer of fewer."""
    counts = [max(1, min(most, rows // CLASSES // share)) for most, share in ((10, 4), (500, 2))]
    return f"--split-protocol per-class --query-per-class {counts[0]} --train-per-class {counts[1]}".split()


def images(distinct: int) -> list[bytes]:
    """PNG files of random pixels."""
    rng, files = np.random.default_rng(0), []
    for _ in range(distinct):
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(sink, "PNG")
        files.append(sink.getvalue())
    return files


def write_source(folder: Path, kind: str, rows: int, distinct: int) -> None:
    """Write `rows` images as a source of this format, or leave one that is whole as it is."""
    if (folder.parent / f"{folder.name}.whole").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = images(distinct)
    if kind == "folder":
        for name in range(min(CLASSES, rows)):
            (folder / f"{name:03d}").mkdir(exist_ok=True)
        for i in range(rows):
            (folder / f"{i % CLASSES:03d}" / f"{i:09d}.png").write_bytes(pool[i % distinct])
    else:
        for number, start in enumerate(range(0, rows, PER_FILE[kind])):
            places = range(start, min(rows, start + PER_FILE[kind]))
            (_write_parquet if kind == "parquet" else _write_tar)(folder / f"shard-{number:05d}.{kind}", places, pool)
    (folder.parent / f"{folder.name}.whole").touch()


def _write_parquet(path: Path, places: range, pool: list[bytes]) -> None:
    columns = {
        "id": [f"img{i:09d}" for i in places],
        "image": [pool[i % len(pool)] for i in places],
        "label": [i * 7919 % CLASSES for i in places],
    }
    pq.write_table(pa.table(columns), path, row_group_size=5000)


def _write_tar(path: Path, places: range, pool: list[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for i in places:
            for ending, data in (("png", pool[i % len(pool)]), ("cls", str(i * 7919 % CLASSES).encode())):
                member = tarfile.TarInfo(f"{i:09d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def role_of(process: psutil.Process, root: int) -> str:
    """The role of a process: the driver, a Ray worker by what it runs, or another process of Ray."""
    if process.pid == root:
        return "driver"
    words = process.cmdline()
    name = words[0] if words else ""
    return next((role for part, role in ROLES.items() if name.startswith("ray::") and part in name), "other Ray")


def measure(words: list[str], log: Path) -> dict[str, Any]:
    """Run a command; return wall seconds, CPU seconds and peak resident MiB by role, and its count of requests."""
    environment = {
        **os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    peak: dict[str, int] = defaultdict(int)
    cpu: dict[tuple[str, int], float] = {}
    start_s = time.monotonic()
    with log.open("wb") as sink:
        process = psutil.Popen(words, stdout=sink, stderr=sink, env=environment)
        while process.poll() is None:
            for member in [process, *_children(process)]:
                try:
                    role, times = role_of(member, process.pid), member.cpu_times()
                    peak[role] = max(peak[role], member.memory_info().rss)
                    cpu[role, member.pid] = times.user + times.system
                except psutil.Error:
                    continue
            time.sleep(LOOK_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {log}\n{log.read_text()[-2000:]}")
    seconds: dict[str, float] = defaultdict(float)
    for (role, _), spent in cpu.items():
        seconds[role] += spent
    return {
        "wall_s": round(time.monotonic() - start_s, 1),
        "cpu_s": {role: round(spent, 1) for role, spent in sorted(seconds.items())},
        "cpu_s_all": round(sum(seconds.values()), 1),
        "peak_mib": {role: size >> 20 for role, size in sorted(peak.items())},
        "requests": _requests(log),
    }


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _requests(log: Path) -> dict[str, Any]:
    """The requests to S3 that the command reported, by stage; {} where it reported none."""
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"event": "requests"')]
    return {event["stage"]: {k: v for k, v in event.items() if k not in ("event", "stage")} for event in events}


def show(name: str, rows: int, result: dict[str, Any]) -> None:
    """Print a line for each role."""
    each = result["cpu_s_all"] / rows * 1e6
    print(f"\n{name}: {rows:,} rows, {result['wall_s']:,.0f} s, {result['cpu_s_all']:,.0f} CPU s, {each:,.0f} us a row")
    for role, size in sorted(result["peak_mib"].items(), key=lambda pair: -result["cpu_s"].get(pair[0], 0)):
        print(f"  {role:<18} {size:>6,} MiB at most   {result['cpu_s'].get(role, 0):>8,.1f} CPU s", flush=True)


def run_ingest(args: argparse.Namespace) -> dict[str, Any]:
    """Ingest each format."""
    results = {}
    for kind in args.formats:
        source, out = args.work / f"{kind}-{args.rows}", tempfile.mkdtemp(dir=args.work)
        write_source(source, kind, args.rows, args.distinct)
        keep = [] if kind == "parquet" else ["--store", "reference"]
        words = [*HASHRAY, "ingest", str(source), "--out", f"{out}/corpus", *splits(args.rows), *keep]
        results[f"ingest {kind}"] = measure(words, args.work / f"ingest-{kind}-{args.rows}.log")
        show(f"ingest {kind}", args.rows, results[f"ingest {kind}"])
    return results


LISTING = """
import sys
from hashray.data.inventory import take_inventory
from hashray.data.sources import SourceConfig
from hashray.engine.session import WorkersConfig
from hashray.storage import open_store
bounds = (0, 1024, 128 << 20, WorkersConfig(ray="always"))
with take_inventory(sys.argv[1], SourceConfig(), *bounds, open_store(sys.argv[2])) as inventory:
    print(f"{inventory.rows:,} rows in {sum(len(block.part_rows) for block in inventory.blocks):,} parts")
"""


def run_list(args: argparse.Namespace) -> dict[str, Any]:
    """List a Parquet source by Ray tasks, without opening an image."""
    source, out = args.work / f"parquet-{args.rows}", tempfile.mkdtemp(dir=args.work)
    write_source(source, "parquet", args.rows, args.distinct)
    result = measure([sys.executable, "-c", LISTING, str(source), out], args.work / f"list-{args.rows}.log")
    show("list parquet", args.rows, result)
    return {"list parquet": result}


def run_pipeline(args: argparse.Namespace) -> dict[str, Any]:
    """Every stage, and the plan that a sample of one row in a hundred gives before it."""
    out = args.work / f"pipeline-{args.rows}"  # an interrupted run goes on: its seconds are those of what was left
    out.mkdir(exist_ok=True)
    config = out / "train.toml"
    small, whole = (args.work / f"parquet-{rows}" for rows in (args.rows // 100, args.rows))
    config.write_text(tomli_w.dumps(TRAINING))
    for rows, source in ((args.rows // 100, small), (args.rows, whole)):
        write_source(source, "parquet", rows, args.distinct)
    say = ["plan", str(config), str(small), "--rows", str(args.rows), "--json", *splits(args.rows)]
    measure([*HASHRAY, *say], args.work / f"plan-{args.rows}.log")
    text = (args.work / f"plan-{args.rows}.log").read_text()
    plan, _ = json.JSONDecoder().raw_decode(text, text.index("{\n"))
    at = {name: str(out / name) for name in ("corpus", "model", "codes", "index", "evaluation")}
    on = ["--model", at["model"], "--corpus", at["corpus"]]
    stages = {
        "ingest": ["ingest", str(whole), "--out", at["corpus"], *splits(args.rows)],
        "train": ["train", str(config), "--corpus", at["corpus"], "--out", at["model"]],
        "encode": ["encode", *on, "--out", at["codes"]],
        "index": ["index", "build", "--codes", at["codes"], "--out", at["index"]],
        "evaluate": ["evaluate", *on, "--codes", at["codes"], "--out", at["evaluation"], "--no-baselines"],
    }
    results: dict[str, Any] = {"plan": plan}
    for name, words in stages.items():
        results[name] = measure([*HASHRAY, *words], args.work / f"{name}-{args.rows}.log")
        show(name, args.rows, results[name])
    said = {stage["name"]: stage for stage in plan["stages"]}
    print(f"\n{'stage':<10} {'CPU s':>8} {'planned':>8}")
    for name in stages:
        print(f"{name:<10} {results[name]['cpu_s_all']:>8,.0f} {said[name]['cpu_s'] + said[name]['start_s']:>8,.0f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="The real commands over many tiny images")
    parser.add_argument("what", choices=["ingest", "list", "pipeline"])
    parser.add_argument("--rows", type=int, default=100_000)
    kinds = ["parquet", "tar", "folder"]
    parser.add_argument("--formats", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--distinct", type=int, default=256, help="Distinct images among the rows")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "hashray-scale")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = {"ingest": run_ingest, "list": run_list, "pipeline": run_pipeline}[args.what](args)
    if args.out is not None:
        write_json(args.out, {"what": args.what, "rows": args.rows, "results": results})


if __name__ == "__main__":
    main()

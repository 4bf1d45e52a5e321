"""The HTTP service beside raw FAISS in the same run: latency, batching, overload, and the fan-out over shards.

    python benchmarks/service.py [--rows 1000000] [--seconds 10] [--out FILE.json]

Clustered codes of 64 bits, as a trained model makes them. The service is a process of its own (`hashray serve`), the
load comes from another one, over keep-alive connections of the loopback; each query is a code in JSON. Raw FAISS is
one IndexBinaryFlat that searches the same queries one by one, with one thread.

Image queries are measured apart: one client and 16, with a trunk that is named by --model (any trained model).
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import ray
from search import clustered_codes
from timing import median_seconds, write_json

import hashray
from hashray import artifact
from hashray.artifact import version_key
from hashray.codes import Codes
from hashray.engine.session import start_local
from hashray.index.shard import write_shard
from hashray.index.version import index_manifest, write_tables
from hashray.search.fleet import Fleet
from hashray.storage import open_store

NUM_BITS, CLUSTERS, SEED, QUERIES, K = 64, 1000, 0, 512, 10
OVERLOAD = 5
BATCH, TOGETHER = "batch", 64  # requests of 64 queries to /search/batch


def write_index(folder: str, codes: Codes, shards: int) -> None:
    """Publish codes as a flat index of equal shards, with ascending ids."""
    store = open_store(folder)
    records = []
    for rows in np.array_split(np.arange(len(codes)), shards):
        records.append(write_shard(store, pa.array([f"{row:09}" for row in rows]), codes[rows], "flat"))
    artifact.publish(store, write_tables(store, index_manifest(NUM_BITS, records), None), version_key(1))


def write_model(folder: str) -> None:
    """An untrained model of the right width: a query by code does not use it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import write_tiny_model

    write_tiny_model(folder, num_bits=NUM_BITS)


@contextmanager
def service(index: str, model: str, *flags: str) -> Iterator[int]:
    """`hashray serve` at a free port, which is yielded once it is ready."""
    words = [sys.executable, "-m", "hashray", "serve", index, "--model", model, "--port", "0", "--ray", "never", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("{") and json.loads(line).get("event") == "ready":
                    port = json.loads(line)["port"]
                    break
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield port
        finally:
            process.terminate()


def _client(
    port: int, bodies: Sequence[bytes], kind: str, seconds: float, every_s: float, first: int, seen: list[Any]
) -> None:
    """Ask again after each answer, or every `every_s` seconds if that is not 0."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    end_s, number = time.perf_counter() + seconds, first
    due_s = time.perf_counter() + every_s * (first % 97) / 97
    while (start_s := time.perf_counter()) < end_s:
        if every_s and due_s > start_s:
            time.sleep(due_s - start_s)
            start_s = time.perf_counter()
        due_s += every_s
        path = "/search/batch" if kind == BATCH else f"/search?k={K}"
        content = kind if kind.startswith("image/") else "application/json"
        connection.request("POST", path, bodies[number % len(bodies)], {"Content-Type": content})
        answer = connection.getresponse()
        answer.read()
        seen.append((answer.status, time.perf_counter() - start_s))
        number += 1


def _load(
    port: int, bodies: Sequence[bytes], kind: str, clients: int, seconds: float, every_s: float, sink: Any
) -> None:
    seen: list[tuple[int, float]] = []
    threads = [
        threading.Thread(target=_client, args=(port, bodies, kind, seconds, every_s, n * 37, seen))
        for n in range(clients)
    ]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.send((seen, time.perf_counter() - start_s))


def load(
    port: int,
    bodies: Sequence[bytes],
    clients: int,
    seconds: float,
    kind: str = "application/json",
    per_s: float | None = None,
) -> dict[str, Any]:
    """What `clients` in another process see in some seconds.

    Args:
        kind: content type of the bodies; BATCH: of requests for several queries.
        per_s: requests a second that they send in all, whatever the answers; unset: each asks again after an answer.
    """
    every_s = clients / per_s if per_s else 0.0
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_load, args=(port, bodies, kind, clients, seconds, every_s, there)
    )
    process.start()
    seen, took_s = here.recv()
    process.join()
    good = np.array([taken for status, taken in seen if status == 200]) * 1e3
    p50, p99 = np.percentile(good, [50, 99]).round(2).tolist()
    statuses = dict(sorted(Counter(status for status, _ in seen).items()))
    return {"clients": clients, "per_s": round(len(good) / took_s, 1), "p50_ms": p50, "p99_ms": p99, "status": statuses}


def _batch(queries: Codes) -> bytes:
    """The body of a request for several queries."""
    return json.dumps({"queries": [{"code": query.tobytes().hex()} for query in queries], "k": K}).encode()


def raw(codes: Codes, queries: Codes, k: int) -> dict[str, Any]:
    """Raw FAISS, one query after the other, one thread."""
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexBinaryFlat(NUM_BITS)
    flat.add(codes)
    flat.search(queries[:8], k)
    taken = []
    for query in queries:
        start_s = time.perf_counter()
        flat.search(query[None], k)
        taken.append((time.perf_counter() - start_s) * 1e3)
    p50, p99 = np.percentile(taken, [50, 99]).round(3).tolist()
    return {"per_s": round(1e3 / float(np.mean(taken)), 1), "p50_ms": p50, "p99_ms": p99}


def fan_out(one: str, eight: str, queries: Codes) -> dict[str, Any]:
    """The time of 8 shards to that of one, k = 100, one thread, one query and 64 at a time."""
    indexes = {name: hashray.open_index(url, threads=1) for name, url in (("one", one), ("eight", eight))}
    ratios = {}
    for batch in (1, 64):
        some = queries[:batch]
        runs = {name: partial(index.search, some, 100) for name, index in indexes.items()}
        times = median_seconds(runs, 15)
        ratios[f"batch_{batch}"] = round(times["eight"] / times["one"], 3)
    return ratios


def fleet_of_8(one: str, eight: str, queries: Codes) -> dict[str, Any]:
    """The time of 8 Ray actors, a shard each, to that of one index in this process with one thread, k = 100."""
    start_local(num_cpus=8, object_store_memory=300 << 20)
    fleet = Fleet("benchmark", 1, 1, 0.5, 60.0)
    try:
        many, single = fleet.open(open_store(eight), 1), hashray.open_index(one, threads=1)
        ratios = {}
        for batch in (1, 64):
            some = queries[:batch]
            runs = {"fleet": partial(many.search, some, 100, None), "one": partial(single.search, some, 100)}
            times = median_seconds(runs, 15)
            ratios[f"batch_{batch}"] = round(times["fleet"] / times["one"], 3)
        return ratios
    finally:
        fleet.stop()
        ray.shutdown()


def image_queries(model: str, images: str, index: str, seconds: float) -> dict[str, Any]:
    """Queries by image, with a trained model and its index."""
    bodies = [path.read_bytes() for path in sorted(Path(images).rglob("*.jpg"))[:64]]
    result: dict[str, Any] = {}
    for name, flags in (("batched", ()), ("one_at_a_time", ("--limits.together", "1"))):
        with service(index, model, *flags) as port:
            load(port, bodies, 16, 2.0, "image/jpeg")
            result[name] = load(port, bodies, 16, seconds, "image/jpeg")
            if name == "batched":
                result["one_client"] = load(port, bodies, 1, seconds, "image/jpeg")
    result["batching_ratio"] = round(result["batched"]["per_s"] / result["one_at_a_time"]["per_s"], 2)
    return result


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--model", help="trained model, for queries by image; with --index and --images")
    parser.add_argument("--index", help="its index")
    parser.add_argument("--images", help="folder of JPEG files")
    options = parser.parse_args()
    rng = np.random.default_rng(SEED)
    words = rng.random((CLUSTERS, NUM_BITS)) < 0.5
    codes, queries = clustered_codes(rng, words, options.rows), clustered_codes(rng, words, QUERIES)
    bodies = [json.dumps({"code": query.tobytes().hex(), "k": K}).encode() for query in queries]
    result: dict[str, Any] = {"rows": options.rows, "num_bits": NUM_BITS, "k": K, "faiss": faiss.__version__}
    with tempfile.TemporaryDirectory() as folder:
        one, eight, model = (f"{folder}/{name}" for name in ("one", "eight", "model"))
        write_index(one, codes, 1)
        write_index(eight, codes, 8)
        write_model(model)
        result["fan_out_8_shards"] = fan_out(one, eight, queries)
        result["fleet_of_8_actors"] = fleet_of_8(one, eight, queries)
        result["raw_faiss"] = raw(codes, queries, K)
        with service(one, model) as port:
            load(port, bodies, 1, 1.0)
            result["one_client"] = load(port, bodies, 1, options.seconds)
            result["batched"] = load(port, bodies, 32, options.seconds)
            batches = [_batch(queries[n : n + TOGETHER]) for n in range(0, QUERIES, TOGETHER)]
            result["requests_of_64"] = load(port, batches, 1, options.seconds, BATCH)
        with service(one, model, "--limits.together", "1") as port:
            load(port, bodies, 1, 1.0)
            result["one_at_a_time"] = load(port, bodies, 32, options.seconds)
        with service(one, model, "--limits.queries", "32") as port:
            load(port, bodies, 1, 1.0)
            offered = OVERLOAD * result["batched"]["per_s"]
            result["overload"] = load(port, bodies, 200, options.seconds, per_s=offered) | {"offered_per_s": offered}
    result["raw_faiss_after"] = raw(codes, queries, K)
    result["added_ms_at_p50"] = round(result["one_client"]["p50_ms"] - result["raw_faiss"]["p50_ms"], 2)
    alone = result["one_at_a_time"]["per_s"]
    result["batching_ratio"] = round(result["batched"]["per_s"] / alone, 2)
    result["batching_ratio_of_requests_of_64"] = round(TOGETHER * result["requests_of_64"]["per_s"] / alone, 2)
    if options.model:
        result["images"] = image_queries(options.model, options.images, options.index, options.seconds)
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

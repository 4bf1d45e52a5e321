"""An index of many rows: what building costs, what opening and searching it costs in time and memory.

    python benchmarks/index.py [--rows 10000000] [--shards 2] [--searches 1000] [--folder DIR] [--out FILE.json]

Codes of 64 bits as in search.py; ids of 18 characters in no order: the id ranges of shards overlap. Each step runs in a
fresh process; memory is what it has beyond itself with hashray and FAISS imported. The build runs without Ray, one
group of parts after the other, as one worker does. The peer of a search is FAISS on the same shards in memory
(`IndexBinaryFlat`, counting) and `faiss.merge_knn_results`, which gives row numbers. Both use one thread, in turns;
times are CPU seconds, medians. `--rows 100000` takes some seconds; ten million need 1 GB of disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from search import clustered_codes
from timing import median_seconds, write_json

from hashray import artifact
from hashray.artifact import Manifest
from hashray.codes import BIT_ORDER
from hashray.data.columns import bytes_column
from hashray.engine.session import WorkersConfig
from hashray.index.build import IndexConfig, build_index
from hashray.index.version import shards_of
from hashray.search.reader import open_index
from hashray.storage import open_store

NUM_BITS, CLUSTERS, ROWS_PER_PART, BATCH, REPETITIONS, SEED = 64, 1000, 40_000, 64, 9, 0
MB = 1e6


def write_codes(folder: str, rows: int) -> None:
    """Publish generated codes, as `hashray encode` leaves them."""
    rng, store, files = np.random.default_rng(SEED), open_store(folder), []
    words = rng.random((CLUSTERS, NUM_BITS)) < 0.5
    for number, start in enumerate(range(0, rows, ROWS_PER_PART)):
        places = np.arange(start, min(rows, start + ROWS_PER_PART), dtype=np.uint64)
        mixed = ((places * np.uint64(0x9E3779B97F4A7C15)) & np.uint64((1 << 40) - 1)).tolist()
        codes = bytes_column(clustered_codes(rng, words, len(places)))
        table = pa.table({"id": pa.array([f"img/{name:010x}.jpg" for name in mixed]), "code": codes})
        name = f"parts/part-{number:05d}.parquet"
        files.append(artifact.write_file(store, name, artifact.table_bytes(table), rows=len(places)))
    manifest = Manifest(
        kind="codes", project_version="", config={}, parents={}, files=tuple(files), bit_order=BIT_ORDER,
        rows_in=rows, rows_out=rows, rows_quarantined=0, info={"num_bits": NUM_BITS},
    )  # fmt: skip
    artifact.publish(store, manifest)


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def build(codes: str, out: str, shards: int) -> dict[str, float]:
    """CPU seconds and peak memory of a build; the size of its largest shard."""
    bare, start = resident_bytes(), time.process_time()
    manifest = build_index(IndexConfig(codes=codes, out=out, shards=shards, pool=WorkersConfig(ray="never")))
    cpu_s = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = [shard.codes.bytes + shard.ids.bytes for shard in shards_of(manifest)]
    beyond = peak - bare
    return {"build_cpu_s": cpu_s, "build_peak_mb": peak / MB, "build_beyond_bare_mb": beyond / MB,
            "shard_mb": max(sizes) / MB, "build_beyond_bare_shards": beyond / max(sizes)}  # fmt: skip


def verify(url: str) -> dict[str, float]:
    """CPU seconds and peak memory of reading every checksum and looking for ids that stand twice."""
    bare, start = resident_bytes(), time.process_time()
    if faults := artifact.verify(url):
        raise SystemExit(f"verify: {faults}")
    beyond = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bare
    return {"verify_cpu_s": time.process_time() - start, "verify_beyond_bare_mb": beyond / MB}


def draw_queries(count: int) -> np.ndarray:
    """Queries of the same clusters."""
    words = np.random.default_rng(SEED).random((CLUSTERS, NUM_BITS)) < 0.5
    return clustered_codes(np.random.default_rng(SEED + 1), words, count)


def search(url: str, searches: int) -> dict[str, float]:
    """Seconds of the first and the second open, and memory after searches of one query each, k = 10 and 100 in turn."""
    bare, result = resident_bytes(), {}
    for name in ("first_open_s", "second_open_s"):
        start = time.perf_counter()
        index = open_index(url)
        result[name] = time.perf_counter() - start
    for number, query in enumerate(draw_queries(searches)):
        index.search(query[None], (10, 100)[number % 2])
    resident, codes = resident_bytes() - bare, index.rows * NUM_BITS // 8
    return {**result, "codes_mb": codes / MB, "resident_mb": resident / MB, "resident_codes": resident / codes}


def compare(url: str) -> dict[str, float]:
    """Time per search against raw FAISS shards: batches of 64 queries, and one query."""
    index, result = open_index(url, threads=1), {}
    faiss.omp_set_num_threads(1)
    raw = [faiss.read_index_binary(str(Path(url, shard.codes.name))) for shard in shards_of(index.manifest)]
    for shard in raw:
        shard.use_heap = False
    for k in (10, 100):
        for queries in (draw_queries(BATCH), draw_queries(1)):
            answers = lambda q=queries, k=k: faiss.merge_knn_results(  # noqa: E731
                *map(np.stack, zip(*(shard.search(q, k) for shard in raw), strict=True))
            )
            if not np.array_equal(answers()[0], index.search(queries, k)[1]):
                raise SystemExit("the two answers differ")
            ours = lambda q=queries, k=k: index.search(q, k)  # noqa: E731
            cpu_s = median_seconds({"ours": ours, "peer": answers}, REPETITIONS, time.process_time)
            result[f"ratio_k{k}_batch{len(queries)}"] = cpu_s["ours"] / cpu_s["peer"]
            result[f"ms_per_query_k{k}_batch{len(queries)}"] = cpu_s["ours"] / len(queries) * 1e3
    return result


def in_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Run a step in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    """Write codes, build, open, search, compare, verify; print every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--searches", type=int, default=1000)
    parser.add_argument("--folder", help="where codes and index are written for the time of the run")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["HASHRAY_CACHE"] = f"{folder}/cache"
        codes, url = f"{folder}/codes", f"{folder}/index"
        write_codes(codes, options.rows)
        result = {"rows": options.rows, "shards": options.shards, "searches": options.searches}
        steps = ((build, codes, url, options.shards), (search, url, options.searches), (compare, url), (verify, url))
        for step, *arguments in steps:
            result |= in_process(step, *arguments)  # type: ignore[arg-type]
    for name, value in result.items():
        print(f"{name:<28} {value:,.3f}" if isinstance(value, float) else f"{name:<28} {value:,}")
    if options.out:
        write_json(options.out, {"name": "index", **result, "peer": f"faiss {faiss.__version__}", "num_bits": NUM_BITS})


if __name__ == "__main__":
    main()

"""An index that chose its own kind, against the flat scan, raw FAISS IVF and usearch: queries/s at distance-recall.

    python benchmarks/kinds.py [--rows 10000000] [--centres 1000] [--min-recall 0.99] [--folder DIR] [--out FILE.json]

Codes of 64 bits as search.py draws them, other codes of the same centres as queries. The index is built by `hashray
index build --kind auto` without Ray. All answer the same batches of 64 queries, k = 100, on one thread, in turns;
times are CPU seconds, medians; recall is that of all rows, by distance, against the flat scan. usearch (HNSW; where it
is installed) is built for `--usearch-rows` rows only (default 1,000,000: a build costs a minute of CPU for each half
million), and stands beside a flat scan of the same rows.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from index import NUM_BITS, ROWS_PER_PART, SEED
from search import clustered_codes
from timing import median_seconds, write_json

from hashray import artifact
from hashray.artifact import Manifest
from hashray.codes import BIT_ORDER, Codes
from hashray.data.columns import bytes_column
from hashray.engine.session import WorkersConfig
from hashray.index.build import IndexConfig, build_index
from hashray.index.choose import distance_recall
from hashray.search.reader import open_index
from hashray.storage import open_store

BATCH, BATCHES, K, REPETITIONS = 64, 4, 100, 5


def write_codes(folder: str, codes: Codes) -> None:
    """Publish codes, as `hashray encode` leaves them."""
    store, files = open_store(folder), []
    for number, start in enumerate(range(0, len(codes), ROWS_PER_PART)):
        some = codes[start : start + ROWS_PER_PART]
        ids = pa.array([f"img/{row:010d}.jpg" for row in range(start, start + len(some))])
        data = artifact.table_bytes(pa.table({"id": ids, "code": bytes_column(some)}))
        files.append(artifact.write_file(store, f"parts/part-{number:05d}.parquet", data, rows=len(some)))
    artifact.publish(store, Manifest(
        kind="codes", project_version="", config={}, parents={}, files=tuple(files), bit_order=BIT_ORDER,
        rows_in=len(codes), rows_out=len(codes), rows_quarantined=0, info={"num_bits": NUM_BITS},
    ))  # fmt: skip


def in_batches(search: Callable[[Codes], Any], queries: Codes) -> list[Any]:
    """The distances of all queries, batch by batch."""
    return [search(queries[start : start + BATCH]) for start in range(0, len(queries), BATCH)]


def raw_ivf(codes: Codes, nlist: int, nprobe: int) -> Any:
    """FAISS's own IVF on all codes, as large a quantizer as ours, trained on as many codes."""
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(NUM_BITS), NUM_BITS, nlist)
    rng = np.random.default_rng(SEED)
    index.cp.min_points_per_centroid = 1
    index.train(codes[np.sort(rng.choice(len(codes), min(len(codes), 64 * nlist), replace=False))])
    index.add(codes)
    index.nprobe = nprobe
    return index


def usearch_index(codes: Codes) -> tuple[Any, float] | None:
    """An HNSW of usearch and the CPU seconds of its build, or None where it is not installed."""
    try:
        library = importlib.import_module("usearch.index")
    except ImportError:
        return None
    start = time.process_time()
    index = library.Index(ndim=NUM_BITS, metric="hamming", dtype="b1")
    index.add(np.arange(len(codes)), codes, threads=1)
    return index, time.process_time() - start


def compare(contenders: dict[str, Callable[[], Any]], queries: int) -> dict[str, float]:
    """Queries per CPU second of each."""
    seconds = median_seconds(contenders, REPETITIONS, time.process_time)
    return {f"{name}_per_s": queries / value for name, value in seconds.items()}


def main() -> None:
    """Build, check the recall of each, time all, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--centres", type=int, default=1000)
    parser.add_argument("--min-recall", type=float, default=0.99)
    parser.add_argument("--usearch-rows", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where codes and index are written for the time of the run")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(SEED)
    words = rng.random((options.centres, NUM_BITS)) < 0.5
    codes, queries = clustered_codes(rng, words, options.rows), clustered_codes(rng, words, BATCH * BATCHES)
    result: dict[str, Any] = {
        "name": "kinds", "rows": options.rows, "centres": options.centres, "num_bits": NUM_BITS, "k": K, "batch": BATCH,
        "min_recall": options.min_recall, "threads": 1, "seed": SEED, "peer": f"faiss {faiss.__version__}",
    }  # fmt: skip
    flat = faiss.IndexBinaryFlat(NUM_BITS)
    flat.add(codes)
    flat.use_heap = False
    exact = np.concatenate(in_batches(lambda some: flat.search(some, K)[0], queries))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["HASHRAY_CACHE"] = f"{folder}/cache"
        write_codes(f"{folder}/codes", codes)
        start = time.process_time()
        config = IndexConfig(
            codes=f"{folder}/codes", out=f"{folder}/index", kind="auto", min_recall=options.min_recall,
            pool=WorkersConfig(ray="never"),
        )  # fmt: skip
        info = build_index(config).info
        result |= {"build_cpu_s": time.process_time() - start,
                   "kind": info["kind"], "nlist": info["nlist"], "nprobe": info["nprobe"],
                   "sample_recall": info["choice"]["candidates"][0]["recall"]}  # fmt: skip
        index = open_index(f"{folder}/index", threads=1)
        result["shards"] = len(index.pieces)
        ours = np.concatenate(in_batches(lambda some: index.search(some, K)[1], queries))
        result["recall"] = distance_recall(np.where(ours < 0, NUM_BITS + 1, ours), exact)
        contenders = {
            "ours": lambda: in_batches(lambda some: index.search(some, K), queries),
            "flat": lambda: in_batches(lambda some: flat.search(some, K), queries[:BATCH]),
        }
        if info["kind"] == "ivf":
            raw = raw_ivf(codes, info["nlist"], info["nprobe"])
            result["raw_ivf_recall"] = distance_recall(
                np.concatenate(in_batches(lambda some: raw.search(some, K)[0], queries)), exact
            )
            contenders["raw_ivf"] = lambda: in_batches(lambda some: raw.search(some, K), queries)
        result |= compare(contenders, len(queries))
        result["flat_per_s"] *= BATCH / len(queries)  # of one batch
    result["ratio"] = result["ours_per_s"] / result["flat_per_s"]
    result |= beside_usearch(codes[: options.usearch_rows], queries)
    for name, value in result.items():
        print(f"{name:<24} {value:,.4f}" if isinstance(value, float) else f"{name:<24} {value}")
    if options.out:
        write_json(options.out, result)


def beside_usearch(codes: Codes, queries: Codes) -> dict[str, Any]:
    """usearch and the flat scan on these codes; {} where usearch is not installed."""
    built = usearch_index(codes)
    if built is None:
        return {}
    graph, build_s = built
    flat = faiss.IndexBinaryFlat(NUM_BITS)
    flat.add(codes)
    flat.use_heap = False
    exact = np.concatenate(in_batches(lambda some: flat.search(some, K)[0], queries))
    search = lambda some: graph.search(some, K, threads=1)  # noqa: E731
    near = np.concatenate([answer.distances for answer in in_batches(search, queries)])
    contenders = {
        "usearch": lambda: in_batches(search, queries),
        "usearch_flat": lambda: in_batches(lambda some: flat.search(some, K), queries),
    }
    version = importlib.import_module("usearch").__version__
    return {"usearch": version, "usearch_rows": len(codes), "usearch_build_cpu_s": build_s,
            "usearch_recall": distance_recall(near.astype(np.int32), exact),
            **compare(contenders, len(queries))}  # fmt: skip


if __name__ == "__main__":
    main()

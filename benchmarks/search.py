"""One million codes in 8 shards, through open_index, against one raw faiss.IndexBinaryFlat.

    python benchmarks/search.py [--out FILE.json] [--threads 1]

Both get the same batches of 64 queries, k = 100, and the same number of threads; ours returns text ids, ascending on
ties, the peer row numbers. Beside the peer as it comes stands the same with `use_heap = False`, the setting ours uses.
Codes of 64 bits as a trained model makes them: 1,000 clusters, every bit flipped with a probability of 5 %.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from timing import median_seconds, write_json

from hashray import artifact
from hashray.artifact import version_key
from hashray.codes import Codes
from hashray.index.shard import write_shard
from hashray.index.version import index_manifest, write_tables
from hashray.search.reader import open_index
from hashray.storage import open_store

ROWS, NUM_BITS, CLUSTERS, FLIP, SHARDS, BATCH, K, REPETITIONS, SEED = 1_000_000, 64, 1000, 0.05, 8, 64, 100, 15, 0


def clustered_codes(rng: np.random.Generator, words: np.ndarray, num: int) -> Codes:
    """Return packed codes uint8 [num, num_bits // 8], each near one of the words bool [clusters, num_bits]."""
    chunks = [
        np.packbits(words[rng.integers(len(words), size=n)] ^ (rng.random((n, words.shape[1])) < FLIP), axis=1)
        for n in np.diff([*range(0, num, 100_000), num])
    ]
    return np.concatenate(chunks)


def write_index(folder: str, ids: list[str], codes: Codes) -> None:
    """Publish the codes, whose ids ascend, as a flat index of equal shards."""
    store, cuts = open_store(folder), [ROWS * n // SHARDS for n in range(SHARDS + 1)]
    ranges = [slice(a, b) for a, b in pairwise(cuts)]
    shards = [write_shard(store, pa.array(ids[rows]), codes[rows], "flat") for rows in ranges]
    manifest = write_tables(store, index_manifest(NUM_BITS, shards), None)
    artifact.publish(store, manifest, version_key(1))


def main() -> None:
    """Check that both give the same answers, time both, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(SEED)
    words = rng.random((CLUSTERS, NUM_BITS)) < 0.5
    codes, queries = clustered_codes(rng, words, ROWS), clustered_codes(rng, words, BATCH)
    ids = [f"{row:08}" for row in range(ROWS)]
    raw = faiss.IndexBinaryFlat(NUM_BITS)
    raw.add(codes)

    def peer(counting: bool) -> tuple[np.ndarray, np.ndarray]:
        raw.use_heap = not counting
        return raw.search(queries, K)

    with tempfile.TemporaryDirectory() as folder:
        write_index(folder, ids, codes)
        index = open_index(folder, threads=options.threads)
        faiss.omp_set_num_threads(options.threads)
        ids, distances = index.search(queries, K)
        for counting in (False, True):
            expected, rows = peer(counting)
            if not (np.array_equal(distances, expected) and np.array_equal(ids.astype(int), rows)):
                raise SystemExit("the two answers differ")
        contenders = {
            "ours": lambda: index.search(queries, K),
            "peer": lambda: peer(False),
            "peer_counting": lambda: peer(True),
        }
        seconds = median_seconds(contenders, REPETITIONS)

    result = {
        "name": "search",
        "ratio": seconds["ours"] / seconds["peer"],
        "ratio_counting": seconds["ours"] / seconds["peer_counting"],
        "ours_ms_per_query": seconds["ours"] / BATCH * 1e3,
        "peer_ms_per_query": seconds["peer"] / BATCH * 1e3,
        "peer_counting_ms_per_query": seconds["peer_counting"] / BATCH * 1e3,
        "peer": f"faiss.IndexBinaryFlat {faiss.__version__}, one index",
        "repetitions": REPETITIONS,
        "threads": options.threads,
        "rows": ROWS,
        "shards": SHARDS,
        "num_bits": NUM_BITS,
        "batch": BATCH,
        "k": K,
        "seed": SEED,
    }
    print(
        f"search: {result['ratio']:.2f}x the time per query of {result['peer']} "
        f"({result['ours_ms_per_query']:.3f} ms against {result['peer_ms_per_query']:.3f}; "
        f"{result['ratio_counting']:.2f}x of its counting mode, {result['peer_counting_ms_per_query']:.3f}; "
        f"{SHARDS} shards of {ROWS:,} rows in all, {NUM_BITS} bits, k = {K}, batches of {BATCH}, "
        f"{options.threads} threads, median of {REPETITIONS})"
    )
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()

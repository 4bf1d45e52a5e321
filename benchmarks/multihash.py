"""Multi-index hashing against a flat scan, on codes as deep hashing makes them and on uniform ones.

    python benchmarks/multihash.py [--rows 1000000] [--out FILE.json]

Codes of 64 bits, k = 10, batches of 64 queries, one thread, CPU seconds, medians. FAISS `IndexBinaryMultiHash` cuts a
code into four words of 16 bits, and looks at all codes that share a word with the query up to `nflip` bits: with nflip
0 it finds every code within 3 bits, with 1 within 7, with 2 within 11. Beside it an `IndexBinaryIVF` of sqrt(rows)
lists, 4 of them probed. Recall is distance-recall. `hashray index build` has no such kind: on clustered codes many
codes share a word, and ivf is faster at the same recall.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from search import clustered_codes
from timing import median_seconds, write_json

from hashray.codes import Codes
from hashray.evaluate.environment import environment

NUM_BITS, CLUSTERS, WORDS, PROBES, BATCH, K, REPETITIONS, SEED = 64, 1000, 4, 4, 64, 10, 5, 0


def compare(codes: Codes, queries: Codes) -> dict[str, Any]:
    """Queries per CPU second of each kind, and its recall."""
    flat = faiss.IndexBinaryFlat(NUM_BITS)
    flat.use_heap = False
    flat.add(codes)
    hashed = faiss.IndexBinaryMultiHash(NUM_BITS, WORDS, NUM_BITS // WORDS)
    hashed.add(codes)
    farthest = flat.search(queries, K)[0][:, -1:]
    result: dict[str, Any] = {"flat": measure(flat, queries, farthest)}
    for nflip in range(3):
        hashed.nflip = nflip
        result[f"multihash, nflip {nflip}"] = measure(hashed, queries, farthest)
    lists = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(NUM_BITS), NUM_BITS, round(len(codes) ** 0.5))
    lists.train(codes[: len(codes) // 4])
    lists.add(codes)
    lists.nprobe = PROBES
    result[f"ivf, {PROBES} lists"] = measure(lists, queries, farthest)
    return result


def measure(index: Any, queries: Codes, farthest: NDArray[np.int32]) -> dict[str, float]:
    """Queries per CPU second, and the share of the answers that are no further away than the exact k-th."""
    distances, rows = index.search(queries, K)
    recall = float(((distances <= farthest) & (rows >= 0)).mean())
    seconds = median_seconds({"": lambda: index.search(queries, K)}, REPETITIONS, time.process_time)[""]
    return {"per_s": BATCH / seconds, "recall": recall}


def main() -> None:
    """Print the table, and write it with what it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(SEED)
    words = rng.random((CLUSTERS, NUM_BITS)) < 0.5
    drawn = {
        "clustered": clustered_codes(rng, words, options.rows + BATCH),
        "uniform": rng.integers(0, 256, (options.rows + BATCH, NUM_BITS // 8), dtype=np.uint8),
    }
    result: dict[str, Any] = {"rows": options.rows, **environment()}
    for name, codes in drawn.items():
        result[name] = compare(codes[BATCH:], codes[:BATCH])
        for kind, line in result[name].items():
            print(f"{name}, {kind}: {line['per_s']:,.0f} queries/s, recall {line['recall']:.3f}")
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()

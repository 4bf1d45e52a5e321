"""All pairs of codes within some bits: ours against FAISS's range search and, where it is installed, `hammingbird`.

    python benchmarks/duplicates.py [--rows 1000000] [--within 4] [--centres 4000] [--num-bits 64] [--out FILE.json]

Codes as search.py draws them: `centres` random words, each bit flipped with a probability of 5 %. One thread each, CPU
seconds. Ours finds each pair once and counts them; so does the peer, of whose answer only rows after the query count.
FAISS needs a quarter of an hour for a million rows, so `--faiss-queries` of them (default 20,000, evenly spread) are
searched among all rows, the number of answers is compared with ours for these rows, and the time is scaled up. Add
`--all-queries` to search all of them. hammingbird keeps all candidates in memory, some 16 bytes each: it is run on
`--hammingbird-rows` (default 100,000) with as many rows a centre, beside ours on the same rows.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time
from pathlib import Path

import faiss
import numpy as np
from search import SEED, clustered_codes
from timing import write_json

from hashray.index.pairs import pairs_within

QUERIES_AT_ONCE = 1024


def ours(codes: np.ndarray, within: int) -> tuple[int, np.ndarray, float]:
    """The number of pairs, the neighbours of each row, and CPU seconds."""
    neighbours, count, start = np.zeros(len(codes), np.int64), 0, time.process_time()
    counting = 0.0
    for pairs in pairs_within(codes, within):
        count += len(pairs)
        before = time.process_time()
        neighbours += np.bincount(pairs.left, minlength=len(codes)) + np.bincount(pairs.right, minlength=len(codes))
        counting += time.process_time() - before
    return count, neighbours, time.process_time() - start - counting


def range_search(codes: np.ndarray, within: int, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """FAISS: neighbours of some rows, without themselves, and CPU seconds."""
    index = faiss.IndexBinaryFlat(codes.shape[1] * 8)
    index.add(codes)
    counts, start = [], time.process_time()
    for first in range(0, len(rows), QUERIES_AT_ONCE):
        limits, _, _ = index.range_search(codes[rows[first : first + QUERIES_AT_ONCE]], within + 1)
        counts.append(np.diff(limits.astype(np.int64)) - 1)
    return np.concatenate(counts), time.process_time() - start


def hammingbird(codes: np.ndarray, within: int) -> dict[str, float | int]:
    """The number of pairs and CPU seconds of hammingbird, if it can be imported."""
    try:
        peer = importlib.import_module("hammingbird")
    except ImportError:
        return {}
    start = time.process_time()
    count = len(peer.find_pairs_self_bit(codes, within))  # the faster of its two
    return {"hammingbird_cpu_s": time.process_time() - start, "hammingbird_pairs": count}


def main() -> None:
    """Check that the counts agree, time all, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 1_000_000), ("within", 4), ("centres", 4000), ("num-bits", 64),
                        ("faiss-queries", 20_000), ("hammingbird-rows", 100_000)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--all-queries", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(SEED)
    words = rng.random((options.centres, options.num_bits)) < 0.5
    codes = clustered_codes(rng, words, options.rows)
    count, neighbours, ours_s = ours(codes, options.within)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    asked = options.rows if options.all_queries else min(options.rows, options.faiss_queries)
    rows = np.linspace(0, options.rows, asked, endpoint=False).astype(np.int64)
    of_rows, faiss_s = range_search(codes, options.within, rows)
    if not np.array_equal(of_rows, neighbours[rows]):
        raise SystemExit("the two answers differ")
    small = codes[: options.hammingbird_rows]
    few = max(1, options.centres * len(small) // options.rows)
    small = clustered_codes(rng, words[:few], len(small))
    small_pairs, _, small_s = ours(small, options.within)
    peer = hammingbird(small, options.within)
    if peer and peer["hammingbird_pairs"] != small_pairs:
        raise SystemExit(f"hammingbird finds {peer['hammingbird_pairs']:,} pairs of {small_pairs:,}")
    whole_s = faiss_s * options.rows / asked
    result = {
        "name": "duplicates", "ratio": ours_s / whole_s, "ours_cpu_s": ours_s, "faiss_cpu_s": whole_s,
        "faiss_queries": asked, "peer": f"faiss.IndexBinaryFlat.range_search {faiss.__version__}", "rows": options.rows,
        "num_bits": options.num_bits, "centres": options.centres, "within": options.within, "pairs": count,
        "ours_peak_mib": peak, "small_rows": len(small), "small_pairs": small_pairs, "ours_small_cpu_s": small_s,
        "seed": SEED, **peer,
    }  # fmt: skip
    print(
        f"duplicates: {count:,} pairs within {options.within} of {options.num_bits} bits among {options.rows:,} codes: "
        f"{ours_s:.1f} CPU s, {whole_s / ours_s:.0f} times as fast as {result['peer']} ({whole_s:,.0f} s"
        f"{'' if asked == options.rows else f', from {asked:,} queries'})"
    )
    if peer:
        print(f"on {len(small):,} codes: ours {small_s:.2f} s, hammingbird {peer['hammingbird_cpu_s']:.2f} s")
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()

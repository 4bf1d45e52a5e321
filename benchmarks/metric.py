"""mAP of 1,000 queries x 59,000 codes: ours against the usual per-query NumPy argsort.

    python benchmarks/metric.py [--out FILE.json]

The peer is CalcTopMap of swuxyj/DeepHash-pytorch (utils/tools.py), which HashNet's test.py also amounts to, given
its {-1, +1} float32 codes ready-made; ours starts from packed codes. Codes as a trained model makes them: 10 classes
with random 32-bit codewords, every bit flipped with a probability drawn per class between 4 and 6 %; the rows of
database and queries in random class order.

FAISS_SIMD_LEVEL=AVX2 with NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" keeps FAISS and NumPy from AVX-512.
OPENBLAS_NUM_THREADS=1 leaves the peer one thread; ours has one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timing import median_seconds, write_json

from hashray.codes import binarize, unpack
from hashray.metrics import mean_average_precision

CLASSES, NUM_BITS, QUERIES, DATABASE, REPETITIONS, SEED = 10, 32, 1_000, 59_000, 7, 0
Array = NDArray[Any]


def clustered_codes(rng: np.random.Generator, codewords: Array, flip: Array, num: int) -> tuple[Array, Array]:
    """Return packed codes uint8 [num, num_bits // 8] and one-hot labels uint8 [num, classes]."""
    classes = rng.integers(len(codewords), size=num)
    flipped = rng.random((num, codewords.shape[1])) < flip[classes, None]
    return binarize(np.where(flipped, -codewords[classes], codewords[classes])), np.eye(len(codewords), dtype=np.uint8)[
        classes
    ]


def calc_top_map(
    database: Array, queries: Array, database_labels: Array, query_labels: Array, top_k: int, kind: Any = None
) -> float:
    """The peer, per query: 0.5 * (K - q @ B.T), argsort, reorder the ground truth, mean(count / tindex)."""
    total = 0.0
    for query, label in zip(queries, query_labels, strict=True):
        gnd = (np.dot(label, database_labels.transpose()) > 0).astype(np.float32)
        hamm = 0.5 * (database.shape[1] - np.dot(query, database.transpose()))
        gnd = gnd[np.argsort(hamm, kind=kind)][0:top_k]
        tsum = np.sum(gnd).astype(int)
        if tsum == 0:
            continue
        count = np.linspace(1, tsum, tsum)
        tindex = np.asarray(np.where(gnd == 1)) + 1.0
        total += np.mean(count / tindex)
    return float(total / len(queries))


def _kernel() -> str:
    """What computes the distances here."""
    try:
        import faiss
    except ModuleNotFoundError:
        return f"numpy {np.__version__}"
    return f"faiss {faiss.__version__}, {faiss.SIMDConfig.get_level_name()}"


def main() -> None:
    """Check that both give the same mAP under the same tie order, time both, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result here, as JSON")
    out = parser.parse_args().out
    rng = np.random.default_rng(SEED)
    codewords, flip = rng.choice([-1.0, 1.0], size=(CLASSES, NUM_BITS)), rng.uniform(0.04, 0.06, CLASSES)
    database, database_labels = clustered_codes(rng, codewords, flip, DATABASE)
    queries, query_labels = clustered_codes(rng, codewords, flip, QUERIES)
    ours = (queries, query_labels, database, database_labels)
    peer = (
        unpack(database).astype(np.float32),
        unpack(queries).astype(np.float32),
        database_labels.astype(np.float32),
        query_labels.astype(np.float32),
        DATABASE,
    )

    expected, same_order = mean_average_precision(*ours), mean_average_precision(*ours, ties="deephash_pytorch")
    stable, unstable = calc_top_map(*peer, kind="stable"), calc_top_map(*peer)
    if abs(same_order - stable) > 1e-9:
        raise SystemExit(f"mAP differs under the same tie order: ours {same_order!r}, peer {stable!r}")

    seconds = median_seconds(
        {
            "ours": lambda: mean_average_precision(*ours),
            "ours_fixed_order": lambda: mean_average_precision(*ours, ties="deephash_pytorch"),
            "peer": lambda: calc_top_map(*peer),
        },
        REPETITIONS,
    )
    result = {
        "name": "metric",
        "distances": _kernel(),
        "ratio": seconds["peer"] / seconds["ours"],
        "ours_s": seconds["ours"],
        "ours_fixed_order_s": seconds["ours_fixed_order"],
        "peer_s": seconds["peer"],
        "peer": f"per-query argsort (CalcTopMap of DeepHash-pytorch), numpy {np.__version__}",
        "repetitions": REPETITIONS,
        "num_queries": QUERIES,
        "num_database": DATABASE,
        "num_bits": NUM_BITS,
        "num_distinct_database": len(np.unique(database, axis=0)),
        "seed": SEED,
        "mAP_expected": expected,
        "mAP_same_order": same_order,
        "mAP_peer_stable": stable,
        "mAP_peer": unstable,
    }
    print(
        f"metric: {result['ratio']:.1f}x faster than {result['peer']} "
        f"({seconds['ours']:.3f} s against {seconds['peer']:.2f} s, median of {REPETITIONS}, "
        f"{QUERIES} x {DATABASE} codes of {NUM_BITS} bits; distances by {result['distances']}; "
        f"mAP {expected:.6f}, peer {unstable:.6f})"
    )
    if out:
        write_json(out, result)


if __name__ == "__main__":
    main()

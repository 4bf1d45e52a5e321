"""An index that changes: what an append, a delete, deleted rows and a filter cost.

    python benchmarks/living.py [--rows 10000000] [--folder DIR] [--out FILE.json]

Codes of 64 bits as in search.py, ids in no order, an attribute of 100 values; two shards. The build is that of the same
rows in this process (sort, shards, ids, attributes). An append adds 1 % of the rows, a delete takes 1,000 ids, another
1 %. Searches of 64 queries and of one, k = 10, one thread: version 1, the version with 1 % deleted, and that with a
filter that keeps 1 %, in turns; CPU seconds, medians. Ten million rows need 3 GB of disk and of memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from search import clustered_codes
from timing import median_seconds, write_json

from hashray import artifact, open_catalog, open_index
from hashray.artifact import version_key
from hashray.evaluate.environment import environment
from hashray.index.shard import write_shard
from hashray.index.version import index_manifest, write_tables
from hashray.storage import open_store

NUM_BITS, CLUSTERS, SHARDS, REPETITIONS, SEED = 64, 1000, 2, 9, 0


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """CPU and wall seconds of one call."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    call()
    return {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}


def run(url: str, rows: int) -> dict[str, Any]:
    """Build, change and search an index of `rows` rows."""
    rng, store = np.random.default_rng(SEED), open_store(url)
    words = rng.random((CLUSTERS, NUM_BITS)) < 0.5
    few = rows // 100
    names = [f"img/{name:010x}.jpg" for name in rng.permutation(4 * rows)[: rows + few].tolist()]
    codes = clustered_codes(rng, words, rows + few)
    groups = rng.integers(100, size=rows + few).astype(np.int32)

    def build() -> None:
        cuts = [rows * number // SHARDS for number in range(SHARDS + 1)]
        shards = [
            write_shard(store, pa.array(names[a:b]), codes[a:b], "flat", None, pa.table({"group": groups[a:b]}))
            for a, b in pairwise(cuts)
        ]
        artifact.publish(store, write_tables(store, index_manifest(NUM_BITS, shards), None), version_key(1))

    result: dict[str, Any] = {"build": timed(build)}
    catalog, first = open_catalog(url), open_index(url, threads=1)
    result["append"] = timed(lambda: catalog.append(names[rows:], codes[rows:], {"group": groups[rows:]}))
    result["append_share_of_build"] = result["append"]["cpu_s"] / result["build"]["cpu_s"]
    chosen = rng.permutation(rows)
    result["delete_1000"] = timed(lambda: catalog.delete([names[row] for row in chosen[:1000]]))
    result["delete_1_percent"] = timed(lambda: catalog.delete([names[row] for row in chosen[1000 : 1000 + few]]))
    last, queries = open_index(url, threads=1), clustered_codes(rng, words, 64)
    for count in (64, 1):
        some = queries[:count]
        seconds = median_seconds(
            {
                "whole": lambda: first.search(some, 10),  # noqa: B023
                "deleted": lambda: last.search(some, 10),  # noqa: B023
                "filtered": lambda: last.search(some, 10, "group == 7"),  # noqa: B023
            },
            REPETITIONS,
            time.process_time,
        )
        result[f"{count}_queries"] = {
            **seconds,
            "deleted_ratio": seconds["deleted"] / seconds["whole"],
            "filtered_ratio": seconds["filtered"] / seconds["whole"],
        }
    return result


def main() -> None:
    """Print the ratios, and write them with what they were measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where the index is written and removed again; unset: the temporary folder")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = {"rows": options.rows, **run(folder, options.rows), **environment()}
    share, wall_s = result["append_share_of_build"], result["delete_1000"]["wall_s"]
    print(f"append of 1 %: {share:.3f} of a build's CPU; delete of 1,000 ids: {wall_s:.2f} s")
    for count in (64, 1):
        ratios = result[f"{count}_queries"]
        print(
            f"{count} queries: 1 % deleted {ratios['deleted_ratio']:.3f} x, 1 % kept {ratios['filtered_ratio']:.3f} x"
        )
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()

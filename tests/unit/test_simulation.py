"""Writers and readers of one index at once, with lost answers, deaths and jumps of the clock: every version is right.

`python tests/unit/test_simulation.py FIRST LAST` runs more seeds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from simulation import NUM_BITS, MemoryStore, Rows, Simulation, nearest

from hashray import artifact
from hashray.artifact import version_key
from hashray.index.catalog import Catalog
from hashray.index.log import newest
from hashray.index.shard import train_quantizer, write_shard
from hashray.index.version import index_manifest, oldest_kept, write_content, write_tables
from hashray.search.reader import open_version

SEEDS = 200
FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None


def first_version(store: MemoryStore, seed: int) -> Rows:
    """An index of 30 rows in two shards: flat, or ivf where the seed is odd."""
    rng = np.random.default_rng(seed)
    ids = [f"{number:02d}" for number in range(30)]
    codes, classes = rng.integers(0, 4, (30, NUM_BITS // 8), dtype=np.uint8), rng.choice(["a", "b"], 30).tolist()
    kind = "ivf" if seed % 2 else "flat"
    lists = rng.integers(0, 4, (200, NUM_BITS // 8), dtype=np.uint8)
    trained = train_quantizer(lists, 3) if seed % 2 else None
    quantizer = write_content(store, "quantizers", trained, None) if trained else None
    shards = [
        write_shard(store, pa.array(ids[a:b]), codes[a:b], kind, trained, pa.table({"class": classes[a:b]}))
        for a, b in ((0, 12), (12, 30))
    ]
    manifest = index_manifest(NUM_BITS, shards, kind, {}, quantizer, {"nprobe": 3} if trained else {})
    artifact.publish(store, write_tables(store, manifest, None), version_key(1))
    return {row: (code.tobytes(), name) for row, code, name in zip(ids, codes, classes, strict=True)}


def run(seed: int) -> tuple[str, int]:
    """Run a seed and check every version; return the digest of all that happened, and the number of versions."""
    store = MemoryStore(f"memory://{seed}")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        simulation = Simulation(seed, store, Path(folder))
        simulation.first = first_version(store, seed)
        simulation.run(writers=3, readers=1, each=6)
        expected = simulation.check()
        check_answers(store, Path(folder), seed, expected)
        check_garbage(store, Path(folder))
        assert artifact.verify(store) == []
    return simulation.trace.hexdigest(), len(expected)


def check_answers(store: MemoryStore, cache: Path, seed: int, expected: dict[int, Rows]) -> None:
    """The answers of every kept version equal those over its rows from scratch: k, radius and filter."""
    rng, last = np.random.default_rng(seed), newest(store)
    for number in range(oldest_kept(last.manifest), max(expected) + 1):
        index, rows = open_version(store, number, cache / "check", threads=1), expected[number]
        query = rng.integers(0, 4, (1, NUM_BITS // 8), dtype=np.uint8)
        k, farthest = int(rng.integers(1, 40)), int(rng.integers(0, 9))
        for chosen in (None, "a"):
            if not index.pieces:
                continue
            where = chosen and f"class == '{chosen}'"
            ids, distances = index.search(query, k, where)
            pairs = [pair for pair in zip(distances[0].tolist(), ids[0], strict=True) if pair[1] is not None]
            assert pairs == nearest(rows, query[0], k, NUM_BITS, chosen)
            near_ids, near = index.within(query, farthest, where)
            pairs = [*zip(near[0].tolist(), near_ids[0], strict=True)]
            assert pairs == nearest(rows, query[0], len(rows), farthest, chosen)


def check_garbage(store: MemoryStore, cache: Path) -> None:
    """A collection without grace leaves the files of the kept versions, and nothing else."""
    Catalog(store, cache / "check").gc(keep=1, grace_s=0)
    last = newest(store)
    kept = {version_key(number) for number in range(1, last.number + 1)}
    for number in range(oldest_kept(last.manifest), last.number + 1):
        kept |= {file.name for file in artifact.load_manifest(store, "index", version_key(number)).stored}
    assert {name for name, _ in store.list()} == kept


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """A pool of one thread asks the store in one order."""
    monkeypatch.setattr("hashray.search.reader.OPEN_THREADS", 1)
    monkeypatch.setattr("hashray.index.log.READ_THREADS", 1)


def test_every_version_of_many_seeds_is_right():
    versions = [run(seed)[1] for seed in range(SEEDS)]
    assert sum(versions) > 5 * SEEDS


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_replays(seed):
    assert run(seed) == run(seed)


if __name__ == "__main__":
    import hashray.index.log
    import hashray.search.reader

    hashray.search.reader.OPEN_THREADS = hashray.index.log.READ_THREADS = 1
    first, last = map(int, sys.argv[1:])
    for number in range(first, last):
        try:
            run(number)
        except BaseException:
            print(f"seed {number}")
            raise
    print(f"seeds {first} to {last - 1}: every version right")

"""Rows with equal codes as one code, the radius chosen from a sample, the rows of a shard."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from hashray.artifact import FileRecord
from hashray.artifact.bitmap import Bitmap
from hashray.codes import hamming
from hashray.errors import CorruptArtifact
from hashray.index.distinct import DistinctCodes, distinct, merge_distinct, num_buckets
from hashray.index.radius import Density, largest_radius, measure_density
from hashray.index.rows import open_ids, read_rows, with_deleted
from hashray.index.shard import train_quantizer, write_shard
from hashray.storage import open_store


def draw(seed, rows, num_bytes, alphabet=3):
    return np.random.default_rng(seed).integers(0, alphabet, (rows, num_bytes), dtype=np.uint8)


def members(parts):
    return {
        part.codes[i].tobytes(): part.rows[part.starts[i] : part.starts[i + 1]].tolist()
        for part in parts for i in range(len(part.codes))
    }  # fmt: skip


@pytest.mark.parametrize("num_bytes", [1, 3, 8, 16])
@pytest.mark.parametrize("buckets", [1, 4])
def test_every_row_is_with_its_equals_whatever_the_buckets_and_shards(num_bytes, buckets):
    codes, expected = draw(0, 900, num_bytes, alphabet=2 if num_bytes > 3 else 40), defaultdict(list)
    codes[::3] = codes[0]
    for row, code in enumerate(codes):
        expected[code.tobytes()].append(row)
    cuts = [0, 100, 100, 500, 900]  # one shard is empty
    shards = [distinct(codes[a:b], np.arange(a, b), buckets) for a, b in pairwise(cuts)]
    through_bytes = [[DistinctCodes.from_bytes(part.to_bytes()) for part in parts] for parts in shards]
    merged = [merge_distinct(parts) for parts in zip(*through_bytes, strict=True)]
    assert members(merged) == dict(expected)
    assert sum(len(part.codes) for part in merged) == len(expected)
    assert all(part.codes.tolist() == sorted(part.codes.tolist()) for part in merged)


def test_buckets_are_about_equal():
    parts = distinct(draw(1, 8000, 8, 256), np.arange(8000), 4)
    assert all(1800 < len(part.codes) < 2200 for part in parts)
    assert (num_buckets(0), num_buckets(4_000_000), num_buckets(4_000_001)) == (1, 1, 2)


def test_density_counts_the_pairs_of_the_sample():
    sample = np.unique(draw(2, 700, 4), axis=0)
    near = hamming(sample, sample)[np.triu_indices(len(sample), 1)]
    density = measure_density(sample, 10 * len(sample), 6)
    assert density.within.tolist() == [int((near <= d).sum()) for d in range(7)]
    assert density.neighbours[6] == pytest.approx(2 * density.pairs[6] / (10 * len(sample)))
    whole = measure_density(sample, len(sample), 6)
    assert whole.pairs.tolist() == pytest.approx(whole.within.tolist())


def test_the_radius_has_at_most_one_neighbour_a_code():
    assert Density(np.array([0, 10, 400, 600]), 1000, 1000).radius() == 2  # .8 neighbours at 2 bits, 1.2 at 3
    assert Density(np.array([0, 10, 400, 600]), 1000, 10_000).radius() == 1
    assert Density(np.array([0, 600, 700]), 1000, 1000).radius() == 0
    assert Density(np.array([0, 0, 0]), 1000, 1000).radius() == 2  # all that was looked at
    assert Density(np.array([0, 0]), 1, 1).radius() == 1 and Density(np.array([0]), 0, 0).radius() == 0
    assert [largest_radius(bits) for bits in (8, 64, 128)] == [1, 8, 16]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_rows_of_a_shard(tmp_path, kind):
    codes, store = draw(3, 500, 3, 256), open_store(tmp_path)
    quantizer = train_quantizer(codes, 5) if kind == "ivf" else None
    ids = [f"{number:04d}" for number in range(500)]
    written = write_shard(store, pa.array(ids), codes, kind, quantizer)
    rows = read_rows(store, written, kind, 24, tmp_path)
    assert np.array_equal(rows.codes, codes) and rows.positions.tolist() == list(range(500))
    living = np.arange(500) % 7 != 0
    [less] = with_deleted(store, [(written, Bitmap.of_mask(~living))], 0)
    some = read_rows(store, less, kind, 24, tmp_path)
    assert np.array_equal(some.codes, codes[living]) and np.array_equal(some.positions, np.flatnonzero(living))
    assert open_ids(store, less, tmp_path).take(some.positions[:2]) == ["0001", "0002"]
    with pytest.raises(CorruptArtifact, match="holds 500 codes of 32 bits, its version says 499"):
        read_rows(store, written.model_copy(update={"rows": 499}), kind, 24, tmp_path)
    path = tmp_path / written.codes.name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptArtifact, match="is corrupt"):
        read_rows(store, written, kind, 24, tmp_path)
    gone = FileRecord(name="shards/gone.faiss", bytes=1, sha256="0" * 64)
    with pytest.raises(CorruptArtifact, match="missing"):
        read_rows(store, written.model_copy(update={"codes": gone}), kind, 24, tmp_path)

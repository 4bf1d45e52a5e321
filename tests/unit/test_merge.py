"""The merge of several shards' answers, the groups of parts that make shards, and ids that stand twice."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashray.data import unique
from hashray.data.unique import duplicates, equal_hashes, hash_ids, ids_with, into_buckets, num_buckets
from hashray.index.groups import group_parts, sample_rows
from hashray.search.merge import merge

INT_MAX = np.iinfo(np.int32).max
TEXTS = st.lists(st.text(max_size=30) | st.text("ab", max_size=40), max_size=40)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_merge_against_sorting(data):
    """Ascending (distance, id), whatever is padding, however the distances tie and the ids of shards interleave."""
    shards, queries, k = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4)), data.draw(st.integers(1, 8))
    ascending = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    sizes = rng.integers(0, 12, shards)
    numbers = np.arange(sizes.sum()) if ascending else rng.permutation(sizes.sum())
    ids = [sorted(f"{number:03}" for number in some) for some in np.split(numbers, np.cumsum(sizes)[:-1])]
    distances = np.full((shards, queries, k), rng.choice([INT_MAX, np.iinfo(np.int32).min, 0]), np.int32)
    positions = np.full((shards, queries, k), -1, np.int64)
    everything: list[list[tuple[int, str]]] = [[] for _ in range(queries)]
    for number, some in enumerate(ids):
        for query in range(queries):
            answers = sorted((int(rng.integers(0, 3)), place) for place in range(len(some)))
            everything[query] += [(distance, some[place]) for distance, place in answers]
            for column, (distance, place) in enumerate(answers[:k]):
                distances[number, query, column], positions[number, query, column] = distance, place
    looked_up = []

    def lookup(shard, place):
        looked_up.extend(zip(shard.tolist(), place.tolist(), strict=True))
        return np.array([ids[i][j] for i, j in zip(shard, place, strict=True)], object)

    texts, best = merge(distances, positions, lookup, ascending)
    for query in range(queries):
        expected = sorted(everything[query])[:k]
        expected += [(-1, None)] * (k - len(expected))
        assert list(zip(best[query].tolist(), texts[query].tolist(), strict=True)) == expected
    assert best.dtype == np.int32 and best.shape == texts.shape == (queries, k)
    if ascending:
        assert len(looked_up) == (best >= 0).sum()


def test_only_the_ids_of_the_answer_and_of_ties_at_its_end_are_looked_up():
    distances = np.array([[[1, 2, 5, 5]], [[1, 3, 3, 7]]], np.int32)
    positions = np.array([[[0, 1, 2, 3]], [[0, 1, 2, 3]]])
    ids = np.array([list("bdgh"), list("acef")], object)
    asked = []

    def lookup(shard, place):
        asked.append(sorted(zip(shard.tolist(), place.tolist(), strict=True)))
        return ids[shard, place]

    assert merge(distances, positions, lookup)[0].tolist() == [["a", "b", "d", "c"]]
    # Of the two rows at distance 3, one fits: both are of one shard, the first of them is the answer.
    assert asked == [[(0, 0), (0, 1), (1, 0)], [(1, 1)]]


@given(rows=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), data=st.data())
def test_groups_hold_every_part_once_and_are_even(rows, data):
    num_shards = data.draw(st.integers(1, sum(rows)))
    groups = group_parts(rows, num_shards)
    assert [part for group in groups for part in group.parts] == [part for part, count in enumerate(rows) if count]
    assert sum(group.shards for group in groups) == num_shards
    for group in groups:
        assert group.rows == sum(rows[part] for part in group.parts) >= group.shards > 0
        assert group.shards == 1 or len(group.parts) == 1
        assert group.rows <= sum(rows) / len(groups) + 2 * max(rows)
    even = group_parts([7] * 100, 8)
    assert max(group.rows for group in even) - min(group.rows for group in even) <= 7


@given(rows=st.lists(st.integers(0, 50), min_size=1, max_size=30), size=st.integers(1, 400), seed=st.integers(0, 9))
def test_a_sample_reads_few_parts(rows, size, seed):
    sample = sample_rows(rows, size, seed)
    parts = [part for part, _ in sample]
    assert parts == sorted(set(parts)) and sum(len(picks) for _, picks in sample) == min(size, sum(rows))
    for part, picks in sample:
        assert len(set(picks.tolist())) == len(picks) and 0 <= picks.min() <= picks.max() < rows[part]
    assert sum(rows[part] for part in parts) < 4 * size + max(rows) + 1


def test_a_sample_is_of_rows_everywhere():
    counts = np.zeros(20, int)
    for seed in range(200):
        for part, picks in sample_rows([100] * 20, 50, seed):
            counts[part] += len(picks)
    assert counts.sum() == 200 * 50 and counts.min() > 300  # 500 on average


@given(TEXTS)
def test_equal_ids_have_equal_hashes_and_others_do_not(texts):
    hashes = hash_ids(pa.array(texts, pa.string()))
    assert len(set(hashes.tolist())) == len(set(texts))
    assert np.array_equal(hashes, hash_ids(pa.array(["before", *texts], pa.large_string())[1:]))
    for text, value in zip(texts[:3], hashes, strict=False):
        assert hash_ids(pa.array(["x" * 300, text]))[1] == value
    assert sorted(ids_with(pa.array(texts, pa.string()), hashes[:1])) == [text for text in texts if text == texts[0]]


def test_hashes_do_not_depend_on_blocks_or_processes(monkeypatch):
    ids = pa.array([f"{'x' * (number % 23)}/{number}" for number in range(1000)])
    hashes = hash_ids(ids)
    monkeypatch.setattr(unique, "BLOCK", 7)
    assert np.array_equal(hash_ids(ids), hashes)
    code = "import pyarrow as pa; from hashray.data.unique import hash_ids; print(hash_ids(pa.array(['a/b/c.jpg']))[0])"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(printed) == hash_ids(pa.array(["a/b/c.jpg"]))[0]


@pytest.mark.parametrize("buckets", [1, 2, 3, 7])
def test_buckets_are_ranges_of_the_same_hashes_everywhere(buckets):
    hashes = np.random.default_rng(0).integers(0, 1 << 64, 10_000, np.uint64)
    hashes[:2] = 0, np.iinfo(np.uint64).max
    cut = into_buckets(hashes, buckets)
    assert len(cut) == buckets and np.array_equal(np.concatenate(cut), np.sort(hashes))
    assert max(map(len, cut)) < 1.2 * 10_000 / buckets
    half = into_buckets(hashes[:5000], buckets)
    assert all(set(some.tolist()) <= set(whole.tolist()) for some, whole in zip(half, cut, strict=True))
    assert [num_buckets(rows) for rows in (1, 32_000_000, 32_000_001)] == [1, 1, 2]


def test_equal_hashes_come_in_rounds(monkeypatch):
    monkeypatch.setattr(unique, "SUSPECTS", 2)
    hashes = np.array([5, 0, 9, 9, 1, 0, 9, 7, 5, 8, 8], np.uint64)
    assert equal_hashes(hashes).tolist() == [0, 5] and equal_hashes(hashes, 0).tolist() == [5, 8]
    assert equal_hashes(hashes, 5).tolist() == [8, 9]
    assert equal_hashes(hashes, 9).tolist() == equal_hashes(hashes, (1 << 64) - 1).tolist() == []
    assert duplicates([["b", "a"], ["c"], ["a", "c"]]) == ["a", "c"]

"""All pairs within some bits, and groups by a centre: each beside the naive way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hashray.codes import hamming
from hashray.index import grouping, pairs
from hashray.index.grouping import group_by_centre
from hashray.index.pairs import pairs_within


def draw(seed, rows, num_bits, clusters=5, flip=0.04, dead=0):
    """Codes near a few words; the first `dead` bits are the same in all."""
    rng = np.random.default_rng(seed)
    words = rng.random((clusters, num_bits)) < 0.5
    bits = words[rng.integers(clusters, size=rows)] ^ (rng.random((rows, num_bits)) < flip)
    bits[:, :dead] = True
    return np.packbits(bits, axis=1)


def triples(blocks):
    return sorted(
        row for block in blocks
        for row in zip(block.left.tolist(), block.right.tolist(), block.distance.tolist(), strict=True)
    )  # fmt: skip


def naive(codes, within, others=None):
    near = hamming(codes, codes if others is None else others)
    return [
        (i, j, int(near[i, j])) for i in range(near.shape[0]) for j in range(near.shape[1])
        if near[i, j] <= within and (others is not None or i < j)
    ]  # fmt: skip


@pytest.mark.parametrize("num_bits", [8, 24, 64, 72, 128, 520])
@pytest.mark.parametrize("within", [0, 1, 4, 9])
def test_every_pair_once(num_bits, within):
    codes, others = draw(0, 400, num_bits), draw(0, 250, num_bits)
    assert triples(pairs_within(codes, within)) == naive(codes, within)
    assert triples(pairs_within(codes, within, others)) == naive(codes, within, others)


@pytest.mark.parametrize("short_run", [0, 3, 10_000])
def test_short_and_long_runs_find_the_same(monkeypatch, short_run):
    # Tiles and blocks far smaller than the runs, so that every edge of one is met.
    for name, value in {"SHORT_RUN": short_run, "TILE_ROWS": 7, "TILE_COLUMNS": 11, "AT_ONCE": 50, "YIELD": 9}.items():
        monkeypatch.setattr(pairs, name, value)
    codes, others = draw(1, 220, 32, clusters=3), draw(1, 150, 32, clusters=3)
    assert triples(pairs_within(codes, 3)) == naive(codes, 3)
    assert triples(pairs_within(codes, 3, others)) == naive(codes, 3, others)


def test_dead_bits_equal_codes_and_the_seed_change_nothing():
    codes = np.concatenate([draw(2, 300, 64, dead=48), draw(2, 100, 64, dead=48)])
    expected = naive(codes, 2)
    assert len(expected) > 1000
    for seed in range(3):
        assert triples(pairs_within(codes, 2, seed=seed)) == expected


def test_nothing_in_nothing_out():
    codes = draw(3, 10, 16)
    assert triples(pairs_within(codes[:0], 3)) == triples(pairs_within(codes, 3, codes[:0])) == []
    assert len(triples(pairs_within(codes, 16))) == 45  # every pair


def test_the_bits_are_dealt_out_so_that_few_codes_are_compared():
    # All codes agree in 32 bits: pieces of neighbouring bits would compare all with all.
    codes = pairs.to_words(draw(4, 5000, 64, clusters=5000, dead=32))
    pieces = pairs._choose_pieces(codes, None, 3, 64, 0)
    assert len(pieces) == 4 and np.bitwise_or.reduce(pieces)[0] == np.iinfo(np.uint64).max
    assert sum(pairs._equal_pairs(pairs.keys_of(codes, piece)) for piece in pieces) < 0.05 * 5000**2 / 2


def naive_groups(edges, rows, order_of_id):
    near = {node: {} for node in range(len(rows))}
    for left, right, distance in edges:
        near[left][right] = near[right][left] = distance
    count = [rows[node] + sum(rows[other] for other in near[node]) for node in near]
    centre, away = [-1] * len(rows), [0] * len(rows)
    for node in sorted(near, key=lambda node: (-count[node], order_of_id[node])):
        if centre[node] < 0:
            centre[node] = node
            for other, distance in near[node].items():
                if centre[other] < 0:
                    centre[other], away[other] = node, distance
    return centre, away


@st.composite
def graphs(draw_):
    count = draw_(st.integers(1, 25))
    both = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).filter(lambda pair: pair[0] != pair[1])
    edges = {tuple(sorted(pair)): draw_(st.integers(1, 9)) for pair in draw_(st.lists(both, max_size=60))}
    rows = draw_(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    return [(*pair, distance) for pair, distance in edges.items()], rows, draw_(st.permutations(range(count)))


@pytest.mark.parametrize("rounds", [0, 1, 32])
@settings(deadline=None, max_examples=150)
@given(graph=graphs())
def test_groups_are_those_of_one_code_after_the_other(rounds, graph):
    edges, rows, order_of_id = graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "ROUNDS", rounds)
        columns = np.array(edges, np.int64).reshape(-1, 3).T
        answer = group_by_centre(*columns, np.array(rows), np.array(order_of_id))
    assert (answer.centre.tolist(), answer.distance.tolist()) == naive_groups(edges, rows, order_of_id)


def test_no_member_is_further_from_its_centre_than_the_radius():
    codes = np.unique(draw(5, 800, 32, clusters=4, flip=0.03), axis=0)
    left, right, distance = np.array(triples(pairs_within(codes, 3))).T
    answer = group_by_centre(left, right, distance, np.ones(len(codes), np.int64), np.arange(len(codes)))
    assert len(np.unique(answer.centre)) < len(codes) / 2
    near = hamming(codes, codes)[np.arange(len(codes)), answer.centre]
    assert near.tolist() == answer.distance.tolist() and near.max() <= 3
    # Chains of neighbours would make fewer groups, with members further away.
    parts = connected_components(coo_array((np.ones(len(left)), (left, right)), shape=(len(codes),) * 2))[0]
    assert parts < len(np.unique(answer.centre))

"""Split protocols: counts, disjointness, and that the order of a listing does not matter."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from listing import assign_splits

from hashray.data.splits import Seen, SplitConfig, check_disjoint, order_key
from hashray.errors import InputError


def source(rows: int, classes: int, several: bool = False) -> tuple[list[str], list[list[int]]]:
    ids = [f"img/{i}.png" for i in range(rows)]
    labels = [[i % classes] + ([(i // classes) % classes] if several else []) for i in range(rows)]
    return ids, [sorted(set(row)) for row in labels]


def per_class(**fields: Any) -> SplitConfig:
    return SplitConfig(split_protocol="per-class", **fields)


@given(
    st.integers(0, 99),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_order_of_a_listing_does_not_matter(
    seed: int, queries: int, trains: int, inside: bool, several: bool, rng: random.Random
) -> None:
    ids, labels = source(60, 3, several)
    config = per_class(seed=seed, query_per_class=queries, train_per_class=trains, train_in_database=inside)
    splits = dict(zip(ids, assign_splits(ids, labels, [None] * 60, config), strict=True))
    order = list(range(60))
    rng.shuffle(order)
    again = assign_splits([ids[i] for i in order], [labels[i] for i in order], [None] * 60, config)
    assert {ids[i]: split for i, split in zip(order, again, strict=True)} == splits
    assert Counter(splits.values()) == {
        "query": 3 * queries, "database+train" if inside else "train": 3 * trains,
        "database": 60 - 3 * (queries + trains),
    }  # fmt: skip
    if not several:
        counts = Counter((label[0], splits[row_id]) for row_id, label in zip(ids, labels, strict=True))
        assert all(counts[label, "query"] == queries for label in range(3))
    assert not any("query" in split and split != "query" for split in splits.values())


def test_another_seed_draws_other_rows() -> None:
    ids, labels = source(60, 3)
    draws = {
        tuple(assign_splits(ids, labels, [None] * 60, per_class(seed=s, query_per_class=2, train_per_class=2)))
        for s in range(5)
    }
    assert len(draws) == 5
    assert order_key(1, "a") != order_key(0, "a") == order_key(0, "a")


def test_cifar10_semi_has_the_counts_of_the_papers() -> None:
    ids, labels = source(60_000, 10)
    splits = Counter(assign_splits(ids, labels, [None] * 60_000, SplitConfig(split_protocol="cifar10-semi")))
    assert splits == {"query": 1_000, "database+train": 5_000, "database+unlabelled": 54_000}


def test_adalabelhash_cifar10_trains_on_the_database() -> None:
    given_splits = ["train"] * 50 + ["query"] * 10
    ids, labels = source(60, 10)
    out = assign_splits(ids, labels, given_splits, SplitConfig(split_protocol="adalabelhash-cifar10"))
    assert Counter(out) == {"database+train": 50, "query": 10}
    for wrong in ([None] * 60, ["train"] * 60, [*given_splits[:-1], "database"]):
        with pytest.raises(InputError, match="needs a source split into train and test; found"):
            assign_splits(ids, labels, wrong, SplitConfig(split_protocol="adalabelhash-cifar10"))


@pytest.mark.parametrize(
    ("given_splits", "expected"),
    [
        ([None, None], ["database", "database"]),
        (["train", "query"], ["database+train", "query"]),
        (["train", "unlabelled", "query", "validation"],
         ["database+train", "database+unlabelled", "query", "validation"]),
        (["train+unlabelled", "query"], ["database+train", "query"]),
        (["train", "database", "query"], ["train", "database", "query"]),
        (["database+train", "database", "query"], ["database+train", "database", "query"]),
    ],
)  # fmt: skip
def test_as_given(given_splits: list[str | None], expected: list[str]) -> None:
    ids = [str(i) for i in range(len(given_splits))]
    assert assign_splits(ids, [[] for _ in ids], given_splits, SplitConfig()) == expected


def test_some_rows_with_a_split_and_some_without() -> None:
    with pytest.raises(InputError, match="1 of 3 rows came with no split while others have one"):
        assign_splits(["a", "b", "c"], [[], [], []], ["train", None, "query"], SplitConfig())


@pytest.mark.parametrize("alone", ["query", "validation"])
def test_a_query_in_another_split_is_a_leak(alone: str) -> None:
    splits = ["database", "+".join(sorted([alone, "database"])), "train"]
    with pytest.raises(InputError, match=f"1 {alone} rows are in another split too, the first 'b'"):
        check_disjoint({split: Seen(1, row_id) for split, row_id in zip(splits, "abc", strict=True)})
    with pytest.raises(InputError, match="remove them from one of the lists"):
        assign_splits(["a", "b", "c"], [[], [], []], splits, SplitConfig())


def test_too_few_rows_in_a_class() -> None:
    ids, labels = source(12, 3)
    with pytest.raises(
        InputError,
        match=r"class 0 has 4 rows left for 'query', the protocol draws 5 of each class: .*--query-per-class",
    ):
        assign_splits(ids, labels, [None] * 12, per_class(query_per_class=5, train_per_class=1))
    with pytest.raises(InputError, match="class 0 has 2 rows left for 'database\\+train', the protocol draws 3 of"):
        assign_splits(ids, labels, [None] * 12, per_class(query_per_class=2, train_per_class=3))
    with pytest.raises(InputError, match="class 'cat' has 4 rows left"):
        config = per_class(query_per_class=5, train_per_class=1)
        assign_splits(ids, labels, [None] * 12, config, ["cat", "dog", "emu"])
    with pytest.raises(InputError, match="draws rows per class, and no row has a class"):
        assign_splits(ids, [[] for _ in ids], [None] * 12, per_class())


def test_a_rare_class_is_served_before_a_common_one() -> None:
    # Class 1 has but three rows, all of them of class 0 too.
    ids = [str(i) for i in range(20)]
    labels = [[0, 1] if i < 3 else [0] for i in range(20)]
    splits = assign_splits(ids, labels, [None] * 20, per_class(query_per_class=1, train_per_class=2))
    assert sorted(split for split in splits[:3]) == ["database+train", "database+train", "query"]
    assert Counter(splits) == {"query": 2, "database+train": 4, "database": 14}


def naive(ids: list[str], labels: list[list[int]], seed: int, words: dict[str, int], rest: str) -> list[str] | None:
    """Rows drawn per class from a table of all rows; None where a class has too few."""
    order = sorted(range(len(ids)), key=lambda i: order_key(seed, ids[i]))
    members = {name: [i for i in order if name in labels[i]] for name in sorted({x for row in labels for x in row})}
    splits = [rest] * len(ids)
    for word, wanted in words.items():
        for name in sorted(members, key=lambda name: (len(members[name]), name)):
            free = [i for i in members[name] if splits[i] == rest]
            if len(free) < wanted:
                return None
            for i in free[:wanted]:
                splits[i] = word
    return splits


@given(
    st.lists(st.sets(st.integers(0, 3), max_size=3), min_size=1, max_size=40),
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 4),
)  # fmt: skip
def test_a_draw_from_the_first_rows_of_each_label_set_is_a_draw_from_all(
    sets: list[set[int]], seed: int, queries: int, trains: int
) -> None:
    ids, labels = [f"row {i}" for i in range(len(sets))], [sorted(row) for row in sets]
    config = per_class(seed=seed, query_per_class=queries, train_per_class=trains)
    expected = naive(ids, labels, seed, {"query": queries, "database+train": trains}, "database")
    if expected is None or not any(labels):
        with pytest.raises(InputError, match=r"rows left for|no row has a class"):
            assign_splits(ids, labels, [None] * len(ids), config)
    else:
        assert assign_splits(ids, labels, [None] * len(ids), config) == expected


@pytest.mark.parametrize("labelled", [True, False])
def test_random_draws_queries_from_all_rows_and_trains_on_the_others(labelled: bool) -> None:
    ids, labels = source(60, 3)
    labels = labels if labelled else [[] for _ in ids]
    given_splits: list[str | None] = ["train", *[None] * 59]

    def draw(**fields: Any) -> list[str]:
        return assign_splits(ids, labels, given_splits, SplitConfig(split_protocol="random", **fields))

    assert Counter(draw()) == {"query": 6, "database+train": 54}  # a tenth
    assert Counter(draw(query_rows=0)) == {"database+train": 60}
    some = draw(query_rows=5, train_rows=20)
    assert Counter(some) == {"query": 5, "database+train": 20, "database": 35}
    assert {i for i, word in enumerate(some) if word == "query"} <= {
        i for i, word in enumerate(draw()) if word == "query"
    }
    assert draw(seed=1) != draw()
    assert Counter(draw(query_rows=59)) == {"query": 59, "database+train": 1}
    for fields in ({"query_rows": 60}, {"query_rows": 41, "train_rows": 20}):
        with pytest.raises(InputError, match="of 60 rows: lower --query-rows or --train-rows"):
            draw(**fields)


def test_random_draws_no_more_queries_than_an_evaluation_needs() -> None:
    ids = [f"img/{i}.png" for i in range(12_000)]
    out = assign_splits(ids, [[]] * 12_000, [None] * 12_000, SplitConfig(split_protocol="random"))
    assert Counter(out) == {"query": 1_000, "database+train": 11_000}

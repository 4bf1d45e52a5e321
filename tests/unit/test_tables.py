"""Groups, pairs and leaks as tables, beside the naive way."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hashray.codes import hamming
from hashray.index.tables import Linked, make_tables, summarise

SPLITS = ("database+train", "query", "database", None)


def draw(seed, rows=160):
    """Codes with many neighbours and equals, ids in no order, a split each."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 256, (12, 3), dtype=np.uint8)
    codes = words[rng.integers(12, size=rows)]
    codes[:, 0] ^= rng.choice([0, 0, 1, 2, 4, 8, 16, 32], rows).astype(np.uint8)
    codes[:, 2] ^= rng.choice([0, 0, 0, 64, 128], rows).astype(np.uint8)
    ids = [f"{name:05x}" for name in rng.permutation(10 * rows)[:rows]]
    return ids, codes, [SPLITS[i] for i in rng.integers(4, size=rows)]


def link(ids, codes, splits, within, seed=0):
    """Give the codes numbers in a random order: the tables must not show it."""
    rng = np.random.default_rng(seed)
    unique, code = np.unique(codes, axis=0, return_inverse=True)
    new = rng.permutation(len(unique))
    near = hamming(unique, unique)
    left, right = np.nonzero(np.triu(near <= within, 1))
    shuffled, rows = rng.permutation(len(left)), rng.permutation(len(ids))
    left, right = left[shuffled], right[shuffled]
    columns = (new[right], new[left], near[left, right].astype(np.int64), new[code.ravel()][rows])
    of_rows = None if splits is None else pa.array(splits, pa.string()).take(pa.array(rows))
    return Linked(*columns, pa.array(ids).take(pa.array(rows)), of_rows)


def naive_groups(ids, codes, within):
    """Row by row over all rows: (members with distances, sorted) of each group of several rows."""
    near = hamming(codes, codes)
    count, left, groups = (near <= within).sum(1), set(range(len(ids))), []
    first = [min(ids[j] for j in range(len(ids)) if near[i, j] == 0) for i in range(len(ids))]
    for i in sorted(range(len(ids)), key=lambda i: (-count[i], first[i], ids[i])):
        if i in left:
            members = [j for j in left if near[i, j] <= within]
            left -= set(members)
            if len(members) > 1:
                groups.append(sorted((int(near[i, j]), ids[j]) for j in members))
    return sorted(groups, key=lambda members: (-len(members), members[0][1]))


@pytest.mark.parametrize("within", [0, 1, 3])
@pytest.mark.parametrize("keep", ["best", "first"])
def test_groups(within, keep):
    ids, codes, splits = draw(0)
    expected = naive_groups(ids, codes, within)
    tables = make_tables(link(ids, codes, splits, within), keep)
    assert len(expected) > 5
    rows = tables.groups.to_pylist()
    assert [(row["group"], row["distance"], row["id"]) for row in rows] == [
        (number, *member) for number, members in enumerate(expected) for member in members
    ]
    for number, members in enumerate(expected):
        kept = [row["id"] for row in rows if row["group"] == number and row["kept"]]
        assert kept == [members[0][1] if keep == "best" else min(name for _, name in members)]
        kinds = {row["kind"] for row in rows if row["group"] == number}
        assert kinds == {"near" if members[-1][0] else "exact"}
    assert {row["id"]: row["split"] for row in rows}.items() <= dict(zip(ids, splits, strict=True)).items()
    for seed in (1, 2):
        other = make_tables(link(ids, codes, splits, within, seed), keep)
        assert other.groups == tables.groups and other.leaks == tables.leaks
        assert other.pairs.table() == tables.pairs.table()


def test_pairs_name_each_code_by_its_first_id():
    ids, codes, _ = draw(1)
    table = make_tables(link(ids, codes, None, 2), "best").pairs.table()
    rows_of = {}
    for name, code in zip(ids, codes, strict=True):
        rows_of.setdefault(code.tobytes(), []).append(name)
    first = {min(names): (np.frombuffer(code, np.uint8)[None], len(names)) for code, names in rows_of.items()}
    expected = sorted(
        (int(hamming(first[a][0], first[b][0])[0, 0]), a, b, first[a][1], first[b][1])
        for a in first for b in first if a < b and hamming(first[a][0], first[b][0])[0, 0] <= 2
    )  # fmt: skip
    names = ("distance", "left", "right", "left_rows", "right_rows")
    assert [tuple(row[name] for name in names) for row in table.to_pylist()] == expected


def test_each_query_row_with_its_nearest_train_row():
    ids, codes, splits = draw(2)
    tables, near = make_tables(link(ids, codes, splits, 2), "best"), hamming(codes, codes)
    train = [i for i, split in enumerate(splits) if split == "database+train"]
    expected = sorted(
        (*min((int(near[i, j]), ids[j]) for j in train), ids[i])
        for i, split in enumerate(splits) if split == "query" and near[i, train].min() <= 2
    )  # fmt: skip
    answers = [(row["distance"], row["train"], row["query"]) for row in tables.leaks.to_pylist()]
    assert sorted(answers) == expected and len(expected) > 10
    assert [(row[0], row[2]) for row in answers] == sorted((row[0], row[2]) for row in answers)
    summary = summarise(tables)
    assert summary["leaks"] == len(expected) and summary["exact_leaks"] == sum(row[0] == 0 for row in expected)


def test_summary():
    ids, codes, _ = draw(3)
    tables = make_tables(link(ids, codes, None, 1), "first")
    expected = naive_groups(ids, codes, 1)
    summary = summarise(tables)
    assert summary["groups"] == len(expected) == summary["exact_groups"] + summary["near_groups"]
    assert summary["exact_groups"] == sum(members[-1][0] == 0 for members in expected)
    assert summary["rows_in_groups"] == sum(map(len, expected)) == summary["rows_not_kept"] + len(expected)
    assert summary["pairs_by_distance"] == {"1": len(tables.pairs)} and summary["leaks"] is None


def test_nothing_is_near():
    empty = np.zeros(0, np.int64)
    linked = Linked(empty, empty, empty, empty, pa.array([], pa.string()), pa.array([], pa.string()))
    tables = make_tables(linked, "best")
    assert (len(tables.groups), len(tables.pairs), len(tables.leaks)) == (0, 0, 0)
    assert summarise(tables)["groups"] == 0

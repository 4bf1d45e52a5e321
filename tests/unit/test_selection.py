"""Which rows are trained on, and that hidden labels stay hidden."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from listing import assign_splits

from hashray import artifact
from hashray.artifact import Manifest, canonical, table_bytes
from hashray.data.corpus import Corpus, open_corpus
from hashray.data.splits import Seen, SplitConfig, class_split
from hashray.errors import InputError
from hashray.storage import open_store
from hashray.train.selection import ACCEPTED, Selection

ROWS = [("a", [0], "database+train"), ("b", [1], "database+train"), ("c", [2], "database+unlabelled"),
        ("d", [], "unlabelled"), ("e", [1], "query"), ("f", [2], "train+unlabelled")]  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    store = open_store(tmp_path / "corpus")
    table = pa.table({"id": [r[0] for r in ROWS], "labels": pa.array([r[1] for r in ROWS], pa.list_(pa.int32())),
                      "split": [r[2] for r in ROWS]})  # fmt: skip
    splits = dict(Counter(r[2] for r in ROWS))
    part = artifact.write_file(store, "rows/p.parquet", table_bytes(table), rows=6, info={"splits": splits})
    names = artifact.write_file(store, "classes.json", canonical(["x", "y", "z"]))
    artifact.publish(store, Manifest(kind="corpus", project_version="0", config={}, parents={}, files=(part, names)))
    return open_corpus(store.url)


def pseudo_labels(folder: Path, labels: dict[str, list[int]]) -> str:
    store = open_store(folder)
    table = pa.table({"accepted": list(labels), "labels": pa.array(list(labels.values()), pa.list_(pa.int8(), 3))})
    record = artifact.write_file(store, ACCEPTED, table_bytes(table), rows=len(labels))
    artifact.publish(store, Manifest(kind="pseudo-labels", project_version="0", config={}, parents={}, files=(record,)))
    return store.url


def chosen(corpus: Corpus, selection: Selection) -> dict[str, list[int]]:
    table = selection.take(corpus.part_rows(corpus.parts[0], "all"))
    return dict(zip(table.column("id").to_pylist(), selection.labels(corpus, table).tolist(), strict=True))


def test_train_rows_without_those_held_out(corpus: Corpus) -> None:
    assert chosen(corpus, Selection(frozenset("b"))) == {"a": [1, 0, 0], "f": [0, 0, 1]}


def test_unlabelled_rows_hide_the_labels_that_the_corpus_holds(corpus: Corpus) -> None:
    labels = chosen(corpus, Selection(frozenset(), unlabelled=True))
    assert labels == {"a": [1, 0, 0], "b": [0, 1, 0], "c": [-1, -1, -1], "d": [-1, -1, -1], "f": [0, 0, 1]}


def test_accepted_rows_come_with_their_pseudo_labels(corpus: Corpus, tmp_path: Path) -> None:
    url = pseudo_labels(tmp_path / "pseudo", {"d": [0, 1, -1], "f": [1, 0, 0]})
    assert chosen(corpus, Selection(frozenset("af"), url)) == {"b": [0, 1, 0], "d": [0, 1, -1]}
    assert chosen(corpus, Selection(frozenset("abd"), url)) == {"f": [0, 0, 1]}  # it has a label of its own
    both = chosen(corpus, Selection(frozenset("af"), url, unlabelled=True))
    assert both == {"b": [0, 1, 0], "c": [-1, -1, -1], "d": [0, 1, -1]}


def test_none_accepted_is_no_row(corpus: Corpus, tmp_path: Path) -> None:
    url = pseudo_labels(tmp_path / "pseudo", {})
    assert set(chosen(corpus, Selection(frozenset(), url))) == {"a", "b", "f"}


def test_a_train_row_of_the_pool_is_a_train_row() -> None:
    splits = assign_splits(["0", "1"], [[0], [1]], ["train+unlabelled", "unlabelled"], SplitConfig())
    assert splits == ["database+train", "database+unlabelled"]


def split_of_classes(**fields: int | None) -> SplitConfig:
    return SplitConfig(split_protocol="class-split", **fields)  # type: ignore[arg-type]


def test_class_split_trains_on_seen_classes_only() -> None:
    ids, labels = [str(i) for i in range(80)], [[i % 8] for i in range(80)]
    given = ["query" if i // 8 < 2 else "train" for i in range(80)]
    splits = assign_splits(ids, labels, given, split_of_classes(unseen_classes=2, pseudo_unseen_classes=1))
    assert Counter(splits) == {
        "database+database-seen+train": 40, "database+database-unseen": 16, "query+query-seen": 10,
        "query+query-unseen": 4, "database-pseudo": 8, "query-pseudo": 2,
    }  # fmt: skip
    kinds = {(labels[i][0], splits[i].split("-")[-1].removesuffix("+train")) for i in range(80)}
    assert len(kinds) == 8  # a class is in one part alone
    other = assign_splits(ids, labels, given, split_of_classes(unseen_classes=2, pseudo_unseen_classes=1, seed=1))
    assert other != splits


def test_class_split_of_a_source_without_halves_draws_the_queries() -> None:
    ids, labels = [str(i) for i in range(40)], [[i % 4] for i in range(40)]
    splits = assign_splits(ids, labels, [None] * 40, split_of_classes(query_per_class=3))
    assert Counter(splits) == {
        "database+database-seen+train": 21, "database+database-unseen": 7, "query+query-seen": 9,
        "query+query-unseen": 3,
    }  # fmt: skip


def test_class_split_refuses_what_it_cannot_split() -> None:
    with pytest.raises(InputError, match=r"exactly one class a row; '0' has 2"):
        assign_splits(["0", "1"], [[0, 1], [1]], [None] * 2, split_of_classes())
    with pytest.raises(InputError, match="one left: lower --unseen-classes"):
        assign_splits(["0", "1"], [[0], [1]], [None] * 2, split_of_classes(unseen_classes=2))


def test_the_parts_of_a_class_split_are_written_down_by_name() -> None:
    config = split_of_classes(unseen_classes=2, pseudo_unseen_classes=1)
    labels = [[i % 5] for i in range(20)]
    counts = {(tuple(row), None): Seen(1, "0") for row in labels}
    parts = class_split(counts, list("abcde"), config)
    assert {part: len(names) for part, names in parts.items()} == {"seen": 2, "unseen": 2, "pseudo": 1}
    splits = assign_splits([str(i) for i in range(20)], labels, ["query"] * 5 + ["train"] * 15, config)
    for part, names in parts.items():
        assert {"abcde"[labels[i][0]] for i in range(20) if f"-{part}" in splits[i]} == set(names)

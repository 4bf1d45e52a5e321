"""The corpus: labels, splits, reading by column, references, and what a damaged one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import deny

from hashray import __version__, artifact
from hashray.artifact import FileRecord, Manifest, canonical, read_table, table_bytes
from hashray.data.columns import in_split, list_matrix, multi_hot
from hashray.data.corpus import IMAGE_SCHEMA, ROW_SCHEMA, Corpus, iterate_bytes, open_corpus
from hashray.data.images import BadImage
from hashray.errors import CorruptArtifact, InputError, MismatchError, StorageError, StoreUnavailable
from hashray.storage import open_store
from hashray.storage.local import LocalStore

SPLITS = ["database", "database+train", "query", "train", "database+unlabelled"]


def row(i: int, split: str, labels: list[int], **fields: Any) -> dict[str, Any]:
    return {"id": f"id{i}", "image": b"bytes %d" % i, "uri": None, "labels": labels, "split": split, **fields}


def write(
    folder: Path,
    parts: list[list[dict[str, Any]]],
    beside: pa.Schema = IMAGE_SCHEMA,
    kind: str = "corpus",
    **info: Any,
) -> Corpus:
    store = open_store(folder)
    files: list[FileRecord] = []
    for i, rows in enumerate(parts):
        other = "images" if kind == "corpus" else kind
        table, columns = (pa.Table.from_pylist(rows, schema=schema) for schema in (ROW_SCHEMA, beside))
        counts: dict[str, int] = {}
        for item in rows:
            counts[item["split"]] = counts.get(item["split"], 0) + 1
        files += [
            artifact.write_file(store, f"rows/part-{i}.parquet", table_bytes(table), len(rows), {"splits": counts}),
            artifact.write_file(store, f"{other}/part-{i}.parquet", table_bytes(columns), len(rows)),
        ]
    files.append(artifact.write_file(store, "classes.json", canonical(["ant", "bee", "cat"])))
    artifact.publish(
        store,
        Manifest(kind=kind, project_version=__version__, config={}, parents={}, files=tuple(files), info=info),  # type: ignore[arg-type]
    )
    return open_corpus(str(folder), kind)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write(
        tmp_path / "c",
        [
            [row(0, "database+train", [0]), row(1, "query", [1, 2]), row(2, "database", [])],
            [row(3, "query", [0])],
            [row(4, "database+train", [2]), row(5, "database", [0, 1, 2])],
        ],
    )


@given(st.lists(st.sampled_from(SPLITS), max_size=9), st.integers(0, 4), st.integers(0, 9))
def test_in_split_looks_at_whole_words(words: list[str], start: int, length: int) -> None:
    for column in (pa.array(words, pa.string()), pa.chunked_array([words[:2], words[2:]], pa.string())):
        column = column.slice(start, length)
        for split in ("train", "database", "query", "data", "validation"):
            expected = [split in word.split("+") for word in words[start : start + length]]
            assert in_split(column, split).tolist() == expected


@given(
    st.lists(st.none() | st.lists(st.integers(0, 3), max_size=3, unique=True), max_size=8),
    st.integers(0, 4),
    st.integers(0, 9),
)
def test_multi_hot(rows: list[list[int] | None], start: int, length: int) -> None:
    for column in (pa.array(rows, pa.list_(pa.int32())), pa.chunked_array([rows[:3], rows[3:]], pa.list_(pa.int32()))):
        out = multi_hot(column.slice(start, length), 4)
        assert out.dtype == np.uint8
        assert out.tolist() == [[int(j in (r or [])) for j in range(4)] for r in rows[start : start + length]]


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_damage(label: int) -> None:
    with pytest.raises(CorruptArtifact, match=f"a label {label} is outside 0 to 2"):
        multi_hot(pa.array([[0], [label]]), 3)


def test_rows_of_a_split(corpus: Corpus) -> None:
    assert corpus.classes == ["ant", "bee", "cat"]
    assert corpus.num_classes == 3
    assert {split: corpus.count(split) for split in ("train", "query", "database", "all", "validation")} == {
        "train": 2, "query": 2, "database": 4, "all": 6, "validation": 0,
    }  # fmt: skip
    rows = corpus.rows("database")
    assert rows.ids == ["id0", "id2", "id4", "id5"]
    assert rows.labels.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert corpus.rows("all").ids == [f"id{i}" for i in range(6)]
    nothing = corpus.rows("validation")
    assert nothing.ids == []
    assert nothing.labels.shape == (0, 3)


def test_reading_parts(corpus: Corpus) -> None:
    first = corpus.parts[0]
    assert corpus.read_part(first, "query").column("id").to_pylist() == ["id1"]
    both = corpus.read_part(first, "database")
    assert both.column_names == ["id", "labels", "split", "image", "uri"]
    assert both.column("image").to_pylist() == [b"bytes 0", b"bytes 2"]
    assert corpus.part_rows(first, "database").equals(both.select(ROW_SCHEMA.names))
    assert corpus.beside(first).name == "images/part-0.parquet"
    assert read_table(corpus.store, first, ["split"]).column_names == ["split"]
    assert corpus.images("query", ["id3", "id1", "id0", "none"]) == {"id1": b"bytes 1", "id3": b"bytes 3"}


def test_a_split_that_is_not_there_names_those_that_are(corpus: Corpus) -> None:
    assert corpus.require("query", "evaluation") == 2
    with pytest.raises(
        InputError,
        match=r"has no 'validation' rows, tuning needs them; it has database \(4\), query \(2\), train \(2\)",
    ):
        corpus.require("validation", "tuning")


def test_references_are_followed_and_bad_ones_are_rows_not_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a#b.png").write_bytes(b"some bytes")
    names = ("a#b.png", "none.png", "a#b.png#offset=5&size=5", "denied.png")
    uris = [f"{tmp_path}/{name}" for name in names]
    table = pa.table({"id": [f"id{i}" for i in range(4)], "image": pa.nulls(4, pa.large_binary()), "uri": uris})
    deny(monkeypatch, tmp_path / "denied.png")
    images = dict(iterate_bytes(table))
    assert images["id0"] == b"some bytes"
    assert images["id2"] == b"bytes"
    for row_id, reason in (("id1", "none.png not found"), ("id3", "denied.png: Permission denied; make it readable")):
        assert isinstance(images[row_id], BadImage)
        assert reason in str(images[row_id])

    for fault in (StoreUnavailable("the store does not answer"), StorageError("no usable credentials")):

        def down(locator: str, fault: Exception = fault) -> bytes:
            raise fault

        monkeypatch.setattr("hashray.data.corpus.fetch", down)
        with pytest.raises(type(fault)):  # an outage puts no rows aside
            dict(iterate_bytes(table))


def test_features(tmp_path: Path) -> None:
    schema = pa.schema([("feature", pa.list_(pa.float32(), 2))])
    parts = [
        [{"id": f"{p}{i}", "feature": [p, i], "labels": [0], "split": SPLITS[(p + i) % 2]} for i in range(3)]
        for p in range(2)
    ]
    features = write(tmp_path / "f", parts, schema, "features", feature_dim=2)
    read = {
        split: [list_matrix(features.read_part(record, split).column("feature")).tolist() for record in features.parts]
        for split in ("all", "train", "query")
    }
    assert read["all"] == [[[0, 0], [0, 1], [0, 2]], [[1, 0], [1, 1], [1, 2]]]
    assert read["train"] == [[[0, 1]], [[1, 0], [1, 2]]] and read["query"] == [[], []]
    assert list_matrix(features.read_part(features.parts[0], "query").column("feature")).shape == (0, 2)
    with pytest.raises(MismatchError, match="is features, expected a corpus"):
        open_corpus(str(tmp_path / "f"))


def test_the_same_table_is_the_same_file() -> None:
    table = pa.Table.from_pylist([row(i, "database", [i % 3]) for i in range(2500)], schema=ROW_SCHEMA)
    assert table_bytes(table) == table_bytes(pa.concat_tables([table.slice(0, 7), table.slice(7)]).combine_chunks())


def test_a_damaged_or_missing_part_is_named(corpus: Corpus) -> None:
    path = Path(corpus.store.url) / corpus.parts[0].name
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match=r"rows/part-0\.parquet is corrupt: sha256"):
        corpus.read_part(corpus.parts[0])
    path.write_bytes(b"PAR1")
    with pytest.raises(CorruptArtifact, match=r"rows/part-0\.parquet has 4 bytes"):
        corpus.rows("all")
    path.unlink()
    with pytest.raises(CorruptArtifact, match=r"rows/part-0\.parquet is missing"):
        corpus.rows("all")
    (Path(corpus.store.url) / "classes.json").write_text("[]")
    with pytest.raises(CorruptArtifact, match=r"classes\.json"):
        open_corpus(corpus.store.url)


def test_an_unfinished_corpus_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a finished artifact"):
        open_corpus(str(tmp_path))
    assert isinstance(open_store(tmp_path), LocalStore)

"""Attributes of a corpus: types that are kept, joined or refused; rows of a file by id against a plain dict."""

from __future__ import annotations

import datetime as dt
import decimal
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from listing import list_source

from hashray.artifact import table_bytes
from hashray.data import attributes as module
from hashray.data.attributes import Attributes, fit, join_schemas, kept_schema, rows_by_id, shares_of, write_pieces
from hashray.data.listing import SourceConfig
from hashray.data.parquet import attributes_at
from hashray.errors import InputError
from hashray.storage import open_store

VALUES: dict[str, tuple[pa.DataType, list[Any], pa.DataType]] = {
    "text": (pa.string(), ["a", "", None], pa.string()),
    "large": (pa.large_string(), ["a", "b", None], pa.large_string()),
    "view": (pa.string_view(), ["a", "b", None], pa.string()),
    "kind": (pa.dictionary(pa.int8(), pa.string()), ["x", "y", None], pa.string()),
    "small": (pa.int8(), [-1, 2, None], pa.int8()),
    "wide": (pa.uint64(), [0, 2**64 - 1, None], pa.uint64()),
    "half": (pa.float16(), [0.5, 2.0, None], pa.float16()),
    "good": (pa.bool_(), [True, False, None], pa.bool_()),
    "day": (pa.date32(), [dt.date(2026, 1, 1), dt.date(1, 1, 1), None], pa.date32()),
    "at": (pa.timestamp("us", "UTC"), [dt.datetime(2026, 1, 1, tzinfo=dt.UTC), None, None], pa.timestamp("us", "UTC")),
    "second": (pa.timestamp("s"), [dt.datetime(2026, 1, 1, 1, 2, 3), None, None], pa.timestamp("ms")),
    "time": (pa.time64("us"), [dt.time(1, 2, 3, 4), dt.time(0), None], pa.time64("us")),
    "price": (pa.decimal128(7, 2), [decimal.Decimal("1.50"), decimal.Decimal("-99.01"), None], pa.decimal128(7, 2)),
    "raw": (pa.binary(), [b"a", b"", None], pa.binary()),
    "tags": (pa.list_(pa.string()), [["a", "b"], [], None], pa.list_(pa.field("element", pa.string()))),
    "box": (pa.struct([("x", pa.int32())]), [{"x": 1}, {"x": None}, None], pa.struct([("x", pa.int32())])),
    "nothing": (pa.null(), [None, None, None], pa.null()),
}


def parquet(columns: Mapping[str, Any], groups: int = 2) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=groups)
    return sink.getvalue()


@pytest.mark.parametrize("name", VALUES)
def test_each_type_comes_back_from_a_corpus(name: str) -> None:
    kind, values, kept = VALUES[name]
    table = pa.table({name: pa.array(values, kind)})
    schema = kept_schema(table.schema, [name], "x.parquet")
    assert schema == pa.schema([(name, kept)])
    fitted = fit(table, schema, "x.parquet")
    again = pq.read_table(io.BytesIO(table_bytes(fitted)))
    assert again.schema.remove_metadata() == schema
    assert again.column(name).to_pylist() == values


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["ownr"], r"x has no column 'ownr', perhaps you meant 'owner'\? It has: id, owner, twice, twice, ends, class"),
        (["twice"], "x has 2 of 'twice'"),
        (["class"], "'class' is no name for an attribute: an index names the classes of a row so. Name the columns"),
        (["id"], "'id' is no name for an attribute: the id of a row is kept already"),
        (["split"], "'split' is no name for an attribute"),
        (["owner", "owner"], "'owner' stands twice among the attributes; name each column once"),
        (["labels"], "'labels' is no name for an attribute"),
        (["ends"], "attribute 'ends' is run_end_encoded.* which a corpus cannot keep .* write it as text or numbers"),
    ],
)  # fmt: skip
def test_columns_that_are_refused(names: list[str], text: str) -> None:
    text_of = pa.string()
    fields = [("id", text_of), ("owner", text_of), ("twice", text_of), ("twice", text_of)]
    schema = pa.schema([*fields, ("ends", pa.run_end_encoded(pa.int32(), text_of)), ("class", text_of)])
    with pytest.raises(InputError, match=text):
        kept_schema(schema, names, "x")


def test_types_of_several_files_are_joined_or_refused() -> None:
    one, two = pa.schema([("a", pa.int32()), ("b", pa.null())]), pa.schema([("a", pa.float64()), ("b", pa.string())])
    assert join_schemas([one, two]) == two
    with pytest.raises(InputError, match=r"y: attributes of one name have types that do not join: .*one type"):
        join_schemas([one, pa.schema([("a", pa.string())])], "y")
    with pytest.raises(InputError, match=r"x: attribute 'a' is int64 here and double with the other files .*one type"):
        fit(pa.table({"a": [2**60 + 1], "b": ["x"]}), two, "x")


def cut(folder: Path, url: Path, names: tuple[str, ...] = ()) -> Attributes:
    store = open_store(folder)
    answers = [write_pieces(store, "pieces/", str(url), names, share, lambda n: None) for share in shares_of(str(url))]
    return Attributes(answers[0][0], str(url), store, tuple(piece for _, some in answers for piece in some))


IDS = st.text("ab/é\0", max_size=9)
ROWS = st.lists(st.tuples(IDS, st.none() | st.integers(-5, 5)), unique_by=lambda row: row[0])


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS,
    asked=st.lists(st.text("ab/é\0", max_size=9), unique=True),
    few=st.integers(1, 3),
    modulus=st.integers(1, 9),
)
def test_rows_by_id_are_those_of_a_dict(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, int | None]],
    asked: list[str],
    few: int,
    modulus: int,
) -> None:
    """In any number of pieces, also where the hashes of different ids are equal."""
    folder, known = tmp_path_factory.mktemp("described"), dict(rows)
    columns = {"hash": pa.array(known.values(), pa.int64()), "id": pa.array(known, pa.string())}
    (folder / "x.parquet").write_bytes(parquet(columns, groups=2))
    asked = [*dict.fromkeys([*asked, *[row_id for row_id, _ in rows[::2]]])]
    real = module.hash_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_ROWS", few)
        patch.setattr(module, "JOB_BYTES", 40 * few)
        patch.setattr(module, "hash_ids", lambda ids: real(ids) % np.uint64(modulus))
        patch.setattr("hashray.data.unique.hash_ids", lambda ids: real(ids) % np.uint64(modulus))
        kept = cut(folder / "out", folder / "x.parquet")
        if not rows:
            assert kept.pieces == ()
            return
        table, count = rows_by_id(kept, pa.array(asked, pa.string()))
    assert table.to_pydict() == {"hash": [known.get(row_id) for row_id in asked]}
    assert count == len(set(asked) & set(known))
    assert sum(piece.rows or 0 for piece in kept.pieces) == len(rows)


def test_a_file_of_numbers_and_one_of_text(tmp_path: Path) -> None:
    """Ids that are numbers are those that the source has as text; a CSV file's types are those of all its rows."""
    (tmp_path / "n.parquet").write_bytes(parquet({"id": [3, 1, 2], "x": [1.5, None, 2.5]}))
    (tmp_path / "n.csv").write_text("id,x,day,y\n3,1,2026-01-01,\n01,,2026-01-02,a\n")
    table, count = rows_by_id(cut(tmp_path / "a", tmp_path / "n.parquet"), pa.array(["1", "2", "3", "4"]))
    assert (table.to_pydict(), count) == ({"x": [None, 2.5, 1.5, None]}, 3)
    kept = cut(tmp_path / "b", tmp_path / "n.csv", ("day", "x"))
    assert kept.schema == pa.schema([("day", pa.date32()), ("x", pa.int64())])
    table, count = rows_by_id(kept, pa.array(["3", "1", "01"]))
    assert table.to_pydict() == {"day": [dt.date(2026, 1, 1), None, dt.date(2026, 1, 2)], "x": [1, None, None]}
    again = cut(tmp_path / "c", tmp_path / "n.csv", ("day", "x"))
    assert again.pieces == kept.pieces


@pytest.mark.parametrize(
    ("name", "data", "names", "text"),
    [
        ("x.csv", b"name,x\na,1\n", (), "has no column 'id'; it has: name, x"),
        ("x.csv", b"id,x\na,1\na,2\n", (), "x.csv has two rows with the id 'a'; each id needs one row of attributes"),
        ("x.csv", b"id,class\na,1\n", (), "'class' is no name for an attribute"),
        ("x.csv", b"id,x\na,1\n", ("y",), "has no column 'y'"),
        ("x.csv", b"id,x\na,1,2\n", (), "cannot be read as a file of attributes"),
        ("x.parquet", b"id,x\n", (), "is no Parquet and no CSV file of attributes"),
        ("x.parquet", parquet({"id": ["a", None], "x": [1, 2]}), (), "1 rows have no id"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, data: bytes, names: tuple[str, ...], text: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=text):
        cut(tmp_path / "out", tmp_path / name, names)
    with pytest.raises(InputError, match=r"none\.csv not found"):
        shares_of(f"{tmp_path}/none.csv")


def test_an_id_in_two_pieces_is_refused_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 2)
    (tmp_path / "x.parquet").write_bytes(parquet({"id": ["a", "b", "c", "a"], "x": [1, 2, 3, 4]}))
    kept = cut(tmp_path / "out", tmp_path / "x.parquet")
    assert rows_by_id(kept, pa.array(["c", "b"]))[0].to_pydict() == {"x": [3, 2]}
    with pytest.raises(InputError, match="two rows with the id 'a'"):
        rows_by_id(kept, pa.array(["b", "a"]))


def test_columns_of_a_source_in_the_order_of_its_rows(tmp_path: Path) -> None:
    """From several row groups, files and partitions, of types that all files join to; any order of locators."""
    images = [b"1", b"2", b"3"]
    for part, size, kind in (("region=north%2Feast/year=2024", 1, pa.int16()), ("region=7/year=2025", 2, pa.float32())):
        (tmp_path / part).mkdir(parents=True)
        columns = {"image": images, "label": [0, 1, 2], "size": pa.array([size, None, 3], kind)}
        (tmp_path / part / "x.parquet").write_bytes(
            parquet(columns | {"who": pa.array(["a", "b", "a"]).dictionary_encode()})
        )
    config = SourceConfig(attributes=("who", "size", "year"))
    listing = list_source(str(tmp_path), config)
    schema = listing.survey.attributes
    assert schema == pa.schema([("who", pa.string()), ("size", pa.float32()), ("year", pa.int64())])
    assert {"who", "size", "year"} <= set(listing.survey.columns_read) and not listing.survey.columns_ignored
    rows = attributes_at([row.locator for row in reversed(listing.rows)], schema).to_pylist()
    expected = [
        {"who": who, "size": size, "year": year}
        for year, sizes in ((2025, (2, None, 3)), (2024, (1, None, 3)))
        for who, size in zip("aba", sizes, strict=True)
    ]
    assert rows[::-1] == [row for year in (2025, 2024) for row in expected if row["year"] == year]
    with pytest.raises(InputError, match="attributes of one name have types that do not join"):
        list_source(str(tmp_path), config.model_copy(update={"attributes": ("region",)}))
    with pytest.raises(InputError, match="no column 'wo'"):
        list_source(str(tmp_path), config.model_copy(update={"attributes": ("wo",)}))
    with pytest.raises(InputError, match="'image' is the column of images; leave it out"):
        list_source(str(tmp_path), config.model_copy(update={"attributes": ("image",)}))
    gone = replace(listing.rows[0], locator=listing.rows[0].locator.replace("x.parquet", "y.parquet"))
    with pytest.raises(InputError, match=r"y\.parquet"):
        attributes_at([gone.locator], schema)


def test_a_source_without_columns_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"is a folder source; write them to a Parquet or CSV file with a column id"):
        list_source(str(tmp_path), SourceConfig(attributes=("owner",)))

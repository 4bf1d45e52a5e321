"""Attributes from ingest to search: of a Parquet source and of a file by id, the same bytes on Ray, resumed too."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import files_of, png, write_images, write_tiny_model

from hashray import artifact
from hashray.cli import main
from hashray.data import ingest as module
from hashray.data.attributes import Attributes, rows_by_id, shares_of, write_pieces
from hashray.data.corpus import ROW_SCHEMA, open_corpus
from hashray.data.ingest import IngestConfig, ingest
from hashray.data.sources import SourceConfig
from hashray.engine.session import WorkersConfig
from hashray.errors import AlreadyExists, InputError
from hashray.search.reader import open_index
from hashray.storage import open_store

HERE, TWO = WorkersConfig(ray="never"), WorkersConfig(ray="always", workers=2, cpus_per_worker=0.5)
ROWS = 60
BROKEN = 17


def described(number: int) -> dict[str, Any]:
    owner = None if number % 7 == 0 else "xyz"[number % 3]
    return {"owner": owner, "date": date(2025, 12, 1) + timedelta(number), "tags": ["a", "b"][: number % 3]}


def write_parquet(folder: Path) -> str:
    """Two files with several row groups, one broken image, and integers of two widths."""
    folder.mkdir()
    for name, numbers, kind in (("a", range(25), pa.int8()), ("b", range(25, ROWS), pa.int64())):
        table = pa.Table.from_pylist([
            {"id": f"{i:03d}", "image": b"none" if i == BROKEN else png(i), "label": i % 3, **described(i)}
            for i in numbers
        ])  # fmt: skip
        table = table.append_column("number", pa.array(numbers, kind))
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=9)
    return str(folder)


def rows_of(url: str) -> dict[str, dict[str, Any]]:
    corpus = open_corpus(url)
    rows = [row for record in corpus.parts for row in corpus.whole_rows(record).to_pylist()]
    return {row["id"]: {name: row[name] for name in row if name not in ROW_SCHEMA.names} for row in rows}


def test_from_a_parquet_source_to_a_search(
    ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Ray, killed before the manifest and run again, or in this process: the same corpus, and the same index."""
    source, reader = write_parquet(tmp_path / "source"), SourceConfig(attributes=("owner", "date", "number", "tags"))
    config = IngestConfig(source=source, out=str(tmp_path / "ray"), reader=reader, rows_per_part=14, pool=TWO)
    manifest, here = ingest(config), config.model_copy(update={"out": str(tmp_path / "here"), "pool": HERE})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(here)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "here/rows").iterdir()}
    assert ingest(here) == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "here/rows").iterdir()} == parts
    assert files_of(tmp_path / "here") == files_of(tmp_path / "ray")
    kept = {"owner": "string", "date": "date32[day]", "number": "int64", "tags": "list<element: string>"}
    plain = {"id": "string", "labels": "list<item: int32>", "split": "string", "image": "large_binary", "uri": "string"}
    assert manifest.columns == kept | plain
    assert (manifest.rows_out, manifest.rows_quarantined) == (ROWS - 1, 1)
    assert artifact.verify(config.out) == []
    numbers = [i for i in range(ROWS) if i != BROKEN]
    assert rows_of(config.out) == {f"{i:03d}": {**described(i), "number": i} for i in numbers}
    with pytest.raises(AlreadyExists):
        ingest(config.model_copy(update={"reader": SourceConfig(attributes=("owner",)), "pool": HERE}))

    write_tiny_model(tmp_path / "model")
    words = {"model": ["--model", str(tmp_path / "model")], "corpus": str(tmp_path / "ray"), "here": ["--ray", "never"]}
    codes, index = str(tmp_path / "codes"), str(tmp_path / "index")
    assert main(["encode", *words["model"], "--corpus", words["corpus"], "--out", codes, *words["here"]]) == 0
    build = ["index", "build", "--codes", codes, "--out", index, "--attributes", words["corpus"]]
    assert main([*build, "--shards", "2", *words["here"]]) == 0
    conditions: dict[str, Callable[[dict[str, Any], int], bool]] = {
        "owner == 'x' and date >= '2026-01-01'": lambda row, i: row["owner"] == "x" and row["date"].year == 2026,
        "is_null(owner) or tags == 'b'": lambda row, i: row["owner"] is None or "b" in row["tags"],
        "class == '1' and number in [1, 4, 5]": lambda row, i: i in (1, 4),
    }
    expected = {where: {f"{i:03d}" for i in numbers if is_so(described(i), i)} for where, is_so in conditions.items()}
    query = np.zeros((1, 2), np.uint8)
    for where, ids in expected.items():
        assert {row_id for row_id in open_index(index).search(query, 100, where)[0][0] if row_id} == ids
    (tmp_path / "query.png").write_bytes(png(3))
    search = ["search", index, *words["model"], "--image", str(tmp_path / "query.png"), "--k", "100", "--json"]
    capsys.readouterr()
    assert main([*search, "--where", next(iter(expected))]) == 0
    assert {hit["id"] for hit in json.loads(capsys.readouterr().out)[0]["hits"]} == next(iter(expected.values()))
    (table,) = {str(piece.attributes.schema) for piece in open_index(index).pieces if piece.attributes}
    assert [line.split(":")[0] for line in table.splitlines() if ":" in line and "child" not in line] == [
        "class", "split", *reader.attributes,
    ]  # fmt: skip


def killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


def write_tar(path: Path) -> str:
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            for suffix, data in (("png", png(number)), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


def write_list(folder: Path) -> str:
    write_images(folder, 12)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (folder / "database.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))
    return str(folder)


SOURCES: dict[str, Callable[[Path], str]] = {
    "folder": lambda path: write_images(path, 12), "list": write_list, "tar": lambda path: write_tar(path / "x.tar"),
    "parquet": lambda path: write_parquet(path / "p"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_gives_attributes_to_any_source(
    tmp_path: Path, kind: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that it does not have get null, and rows of other ids do no harm. Another file is another corpus."""
    (tmp_path / "source").mkdir()
    source, file = SOURCES[kind](tmp_path / "source"), tmp_path / f"described.{ending}"
    plain = IngestConfig(source=source, out=str(tmp_path / "plain"), rows_per_part=5, pool=HERE)
    before = ingest(plain)
    ids = sorted(rows_of(plain.out))
    known = {row_id: number for number, row_id in enumerate(ids) if number % 4}
    rows = {"id": [*known, "other"], "owner": [*map(str, known.values()), "9"], "number": [*known.values(), 1]}

    def write(rows: dict[str, list[Any]]) -> None:
        table = pa.table(rows)
        if ending == "parquet":
            pq.write_table(table, file, row_group_size=3)
        else:
            lines = [",".join(map(str, row.values())) for row in table.to_pylist()]
            file.write_text("\n".join([",".join(table.column_names), *lines]))

    write(rows)
    config = plain.model_copy(update={"out": str(tmp_path / "out"), "reader": SourceConfig(attributes_file=str(file))})
    manifest = ingest(config)
    assert f"{len(known)} of {len(ids)} rows have attributes in {file}" in capsys.readouterr().err
    is_text = ending == "parquet"
    assert rows_of(config.out) == {
        row_id: {
            "owner": None if row_id not in known else str(known[row_id]) if is_text else known[row_id],
            "number": known.get(row_id),
        }
        for row_id in ids
    }
    assert manifest.columns.items() >= {"owner": "string" if is_text else "int64", "number": "int64"}.items()
    assert manifest.info["plan"] != before.info["plan"]
    assert ingest(config) == manifest
    chosen = SourceConfig(attributes_file=str(file), attributes=("number",))
    one = plain.model_copy(update={"out": str(tmp_path / "one"), "reader": chosen})
    ingest(one)
    assert rows_of(one.out) == {row_id: {"number": known.get(row_id)} for row_id in ids}
    write({**rows, "number": [*range(len(known) + 1)]})
    with pytest.raises(AlreadyExists):
        ingest(config)


def test_a_corpus_without_attributes_is_what_it_was(tmp_path: Path) -> None:
    """Its row tables, its manifest and so its id hold nothing of them; readers of rows never see them."""
    source = write_parquet(tmp_path / "source")
    config = IngestConfig(source=source, out=str(tmp_path / "a"), pool=HERE)
    manifest = ingest(config)
    assert set(manifest.config["reader"]) == {
        "class_names", "format", "id_column", "image_column", "label_column", "root", "split_column",
    }  # fmt: skip
    assert manifest.columns == {
        "id": "string", "labels": "list<item: int32>", "split": "string", "image": "large_binary", "uri": "string",
    }  # fmt: skip
    assert set(manifest.info) == {"plan", "format", "num_classes", "leaked_queries"}
    with_some = config.model_copy(update={"out": str(tmp_path / "b"), "reader": SourceConfig(attributes=("owner",))})
    ingest(with_some)
    plain, other = open_corpus(config.out), open_corpus(with_some.out)
    for one, two in zip(plain.parts, other.parts, strict=True):
        assert plain.whole_rows(one).equals(plain.part_rows(one, "all"))
        assert plain.part_rows(one, "all").equals(other.part_rows(two, "all"))
        assert plain.read_part(one).equals(other.read_part(two))
    assert all(table.column_names == ROW_SCHEMA.names for table in other.row_tables("all"))


def test_a_file_of_other_ids_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("id,owner\nnobody,ann\n")
    (tmp_path / "empty.csv").write_text("id,owner\n")
    source = write_images(tmp_path / "images", 4)
    config = IngestConfig(source=source, out=str(tmp_path / "out"), pool=HERE)
    ingest(config.model_copy(update={"reader": SourceConfig(attributes_file=str(tmp_path / "x.csv"))}))
    said = capsys.readouterr().err
    assert "0 of 4 rows have attributes" in said and "its column id must hold the ids of the corpus" in said
    with pytest.raises(InputError, match="has no rows of attributes"):
        ingest(config.model_copy(update={"reader": SourceConfig(attributes_file=str(tmp_path / "empty.csv"))}))


def test_everything_on_s3(s3_url: str, tmp_path: Path) -> None:
    """The columns of a source, read by ranges, and the pieces of a file, which every worker fetches once."""
    write_parquet(tmp_path / "source")
    store = open_store(s3_url)
    for name in ("a", "b"):
        store.write(f"source/{name}.parquet", (tmp_path / f"source/{name}.parquet").read_bytes())
    config = IngestConfig(source=f"{s3_url}/source", out=f"{s3_url}/out", pool=HERE)
    ingest(config.model_copy(update={"reader": SourceConfig(attributes=("owner", "number"))}))
    numbers = [i for i in range(ROWS) if i != BROKEN]
    expected = {f"{i:03d}": {"owner": described(i)["owner"], "number": i} for i in numbers}
    assert rows_of(config.out) == expected
    file, names = f"{s3_url}/source/b.parquet", ("owner", "number")
    (share,) = shares_of(file)
    schema, pieces = write_pieces(store, "pieces/", file, names, share, lambda count: None)
    table, count = rows_by_id(Attributes(schema, file, store, tuple(pieces)), pa.array(["030", "001", "059"]))
    assert (table.to_pylist(), count) == ([expected["030"], {"owner": None, "number": None}, expected["059"]], 2)

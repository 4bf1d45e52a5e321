"""Codes of other programs in, and out again: the same rows, whatever the format."""

from __future__ import annotations

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hashray import artifact, create_index, open_catalog, open_index
from hashray.codes import hamming
from hashray.data.columns import bytes_column
from hashray.errors import AlreadyExists, InputError
from hashray.index.exchange import numbered
from hashray.index.transfer import ExportConfig, ImportConfig, export_index, import_index

ROWS = 300
CODES = np.random.default_rng(0).integers(0, 256, (ROWS, 8), dtype=np.uint8)
IDS = [f"row-{number}" for number in np.random.default_rng(1).permutation(ROWS)]
BITS = ["".join(map(str, row)) for row in np.unpackbits(CODES, axis=1)]


def flat():
    index = faiss.IndexBinaryFlat(64)
    index.add(CODES)
    return index


def ivf():
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(64), 64, 4)
    index.train(CODES)
    index.add(CODES)
    return index


def id_map():
    index = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(64))
    index.add_with_ids(CODES, np.arange(ROWS) * 7)
    return index


def write_faiss(path, make):
    path = path.with_suffix(".faiss")
    faiss.write_index_binary(make(), str(path))
    return path


def write_table(path, column):
    path = path.with_suffix(".parquet")
    pq.write_table(pa.table({"id": IDS, "code": column, "year": [*range(ROWS)]}), path, row_group_size=70)
    return path


def write_numpy(path, suffix):
    if suffix == ".npz":
        np.savez(path.with_suffix(".npz"), ids=np.array(IDS), codes=CODES)
    else:
        np.save(path.with_suffix(".npy"), CODES)
        np.save(path.with_suffix(".ids.npy"), np.array(IDS))
    return path.with_suffix(suffix)


def write_text(path, separator):
    path = path.with_suffix(".tsv")
    lines = [f"{name}{separator}{bits}" for name, bits in zip(IDS, BITS, strict=True)]
    path.write_text("\n".join([f"id{separator}embedding", *lines]))
    return path


SOURCES = {
    "faiss flat": (lambda path: write_faiss(path, flat), numbered(ROWS)),
    "faiss ivf": (lambda path: write_faiss(path, ivf), numbered(ROWS)),
    "faiss ids": (lambda path: write_faiss(path, id_map), [f"{7 * number:010d}" for number in range(ROWS)]),
    "parquet fixed": (lambda path: write_table(path, bytes_column(CODES)), IDS),
    "parquet binary": (lambda path: write_table(path, pa.array([row.tobytes() for row in CODES])), IDS),
    "parquet lists": (lambda path: write_table(path, pa.array(CODES.tolist(), pa.list_(pa.uint8()))), IDS),
    "parquet text": (lambda path: write_table(path, pa.array(BITS)), IDS),
    "npz": (lambda path: write_numpy(path, ".npz"), IDS),
    "npy": (lambda path: write_numpy(path, ".npy"), IDS),
    "pgvector, tabs": (lambda path: write_text(path, "\t"), IDS),
    "pgvector, commas": (lambda path: write_text(path, ","), IDS),
}


@pytest.mark.parametrize("source", SOURCES)
def test_an_imported_index_answers_as_its_codes_do(tmp_path, monkeypatch, source):
    monkeypatch.setattr("hashray.index.transfer.ROWS_PER_SHARD", 100)
    monkeypatch.setattr("hashray.index.exchange.ROWS_AT_ONCE", 60)
    write, ids = SOURCES[source]
    path = write(tmp_path / "codes")
    import_index(ImportConfig(source=str(path), out=str(tmp_path / "index")))
    index = open_index(tmp_path / "index")
    assert index.rows == ROWS and len(index.pieces) > 1 and artifact.verify(tmp_path / "index") == []
    answers, distances = index.search(CODES[:20], 15)
    for row in range(20):
        nearest = sorted(zip(hamming(CODES[row : row + 1], CODES)[0].tolist(), ids, strict=True))[:15]
        assert [*zip(distances[row].tolist(), answers[row], strict=True)] == nearest
    if source.startswith("parquet"):
        assert index.search(CODES[:1], 400, "year < 9")[0].tolist()[0].count(None) == 391


def test_bits_in_the_other_order(tmp_path):
    np.savez(
        tmp_path / "codes.npz",
        ids=np.array(IDS),
        codes=np.packbits(np.unpackbits(CODES, axis=1), axis=1, bitorder="little"),
    )
    import_index(ImportConfig(source=str(tmp_path / "codes.npz"), out=str(tmp_path / "index"), bit_order="little"))
    answers, distances = open_index(tmp_path / "index").search(CODES, 1)
    assert answers[:, 0].tolist() == IDS and not distances.any()


@pytest.mark.parametrize("ending", ["parquet", "faiss"])
def test_what_is_exported_is_what_lives(tmp_path, ending):
    import_index(
        ImportConfig(source=str(write_table(tmp_path / "codes", bytes_column(CODES))), out=str(tmp_path / "index"))
    )
    catalog = open_catalog(tmp_path / "index")
    catalog.delete(IDS[:10])
    catalog.append(["new"], CODES[:1], {"tag": ["x"]})
    rows = dict(zip(IDS[10:], CODES[10:].tolist(), strict=True)) | {"new": CODES[0].tolist()}
    out = tmp_path / f"out.{ending}"
    export_index(ExportConfig(index=str(tmp_path / "index"), out=str(out)))
    if ending == "parquet":
        table = pq.read_table(out)
        assert sorted(table.column_names) == ["code", "id", "tag", "year"]
        codes = [[*code] for code in table.column("code").to_pylist()]
        assert sorted(table.column("tag").to_pylist(), key=str) == [None] * 290 + ["x"]
    else:
        index, table = faiss.read_index_binary(str(out)), pq.read_table(tmp_path / "out.ids.parquet")
        codes = faiss.vector_to_array(index.xb).reshape(-1, 8).tolist()
    assert dict(zip(table.column("id").to_pylist(), codes, strict=True)) == rows
    export_index(ExportConfig(index=str(tmp_path / "index"), out=str(out), version=1))
    again = ImportConfig(source=str(out), out=str(tmp_path / "again"))
    import_index(again)
    assert open_index(tmp_path / "again").rows == ROWS


def test_what_is_refused(tmp_path):
    def refused(error, text, name="codes.parquet", **options):
        with pytest.raises(error, match=text):
            import_index(ImportConfig(source=str(tmp_path / name), out=str(tmp_path / "index"), **options))
        assert not (tmp_path / "index/versions").exists()

    refused(InputError, "not found")
    refused(InputError, r"codes are read from files named \*.faiss", name="codes.pickle")
    write_table(tmp_path / "codes", bytes_column(CODES))
    refused(InputError, "no column 'key'; columns: id, code, year", id_column="key")
    refused(InputError, "a code column of int64; expected binary", code_column="year")
    (tmp_path / "bad.csv").write_text("a,0101\nb,01x1\n")
    refused(InputError, "line 2 is not an id and bits of 0 and 1: 'b,01x1'", name="bad.csv")
    (tmp_path / "odd.csv").write_text("a,0101\nb,0101\n")
    refused(InputError, "codes have 4 bits; expected one multiple of 8", name="odd.csv")
    (tmp_path / "twice.csv").write_text("a,01010101\na,01010101\n")
    refused(InputError, "1 ids stand in more than one row", name="twice.csv")
    (tmp_path / "empty.csv").write_text("id,bits\n")
    refused(InputError, "holds no rows", name="empty.csv")
    (tmp_path / "broken.faiss").write_bytes(b"IxBF nothing")
    refused(InputError, "cannot be read as codes", name="broken.faiss")
    np.save(tmp_path / "floats.npy", np.zeros((3, 8)))
    refused(InputError, r"codes are float64 \[3, 8\]", name="floats.npy")
    import_index(ImportConfig(source=str(tmp_path / "codes.parquet"), out=str(tmp_path / "index")))
    with pytest.raises(AlreadyExists, match="holds an artifact already"):
        import_index(ImportConfig(source=str(tmp_path / "codes.parquet"), out=str(tmp_path / "index")))
    with pytest.raises(InputError, match=r"name a file \*.parquet or \*.faiss"):
        export_index(ExportConfig(index=str(tmp_path / "index"), out=str(tmp_path / "out.csv")))


def test_an_id_in_two_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("hashray.index.transfer.ROWS_PER_SHARD", 2)
    monkeypatch.setattr("hashray.index.exchange.ROWS_AT_ONCE", 2)
    np.savez(tmp_path / "codes.npz", ids=np.array(["a", "b", "c", "a"]), codes=CODES[:4])
    with pytest.raises(InputError, match="1 of the ids are in the index already, such as 'a'"):
        import_index(ImportConfig(source=str(tmp_path / "codes.npz"), out=str(tmp_path / "index")))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array([5, 10]), ["0000000005", "0000000010"]),
        (np.array([b"a", b"\xc3\xa9"]), ["a", "é"]),
    ],
)
def test_ids_of_numpy(tmp_path, ids, expected):
    np.savez(tmp_path / "codes.npz", ids=ids, codes=CODES[:2])
    import_index(ImportConfig(source=str(tmp_path / "codes.npz"), out=str(tmp_path / "index")))
    assert sorted(open_index(tmp_path / "index").search(CODES[:1], 2)[0][0]) == expected


def test_ids_of_an_id_map_over_lists(tmp_path):
    index = faiss.IndexBinaryIDMap(faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(64), 64, 4))
    inner = faiss.downcast_IndexBinary(index.index)
    inner.train(CODES)
    index.add_with_ids(CODES, 1000 - np.arange(ROWS))
    faiss.write_index_binary(index, str(tmp_path / "codes.faiss"))
    import_index(ImportConfig(source=str(tmp_path / "codes.faiss"), out=str(tmp_path / "index")))
    ids, distances = open_index(tmp_path / "index").search(CODES[[3]], 1)
    assert ids.tolist() == [["0000000997"]] and distances.tolist() == [[0]]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (["a3f100ff"] * 2, "'a3f100ff' is no text of 0 and 1"),
        (["01234567"] * 2, "'01234567' is no text of 0 and 1"),
        ([[0.5, 0.7]] * 2, "expected lists of bytes"),
        ([[1, 300]] * 2, "out of bounds"),
        ([[1, None]] * 2, "cannot be read as codes"),
    ],
)
def test_columns_that_are_no_codes(tmp_path, column, text):
    pq.write_table(pa.table({"id": ["a", "b"], "code": column}), tmp_path / "codes.parquet")
    with pytest.raises(InputError, match=text):
        import_index(ImportConfig(source=str(tmp_path / "codes.parquet"), out=str(tmp_path / "index")))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("first.csv", b"a,0102\nb,00000000\n", "line 1 is not an id and bits"),
        ("three.csv", b"a,00000000,x\nb,00000000\n", "line 1 is not an id and bits"),
        ("none.csv", b"a,\nb,00000000\n", "line 1 is not an id and bits"),
        ("long.csv", b"x" * 200_000 + b",00000000\n", "field limit"),
        ("empty.npz", b"", "cannot be read as codes"),
        ("cut.npz", b"PK\x03\x04cut", "cannot be read as codes"),
    ],
)
def test_files_that_hold_something_else(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text):
        import_index(ImportConfig(source=str(tmp_path / name), out=str(tmp_path / "index")))


def test_an_attribute_named_as_the_codes_is_not_written_over_them(tmp_path):
    catalog = create_index(str(tmp_path / "index"), 64)
    catalog.append(["a"], CODES[:1], {"code": pa.array([b"Z" * 8], pa.binary(8))})
    with pytest.raises(InputError, match="an attribute named 'code'"):
        export_index(ExportConfig(index=str(tmp_path / "index"), out=str(tmp_path / "codes.parquet")))

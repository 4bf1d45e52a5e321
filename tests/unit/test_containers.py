"""Parquet and tar sources: how labels are read, how one image is taken out, what is refused and where."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from listing import Listing, list_source

from hashray.data.labels import read_labels
from hashray.data.sources import SourceConfig, fetch
from hashray.errors import InputError
from hashray.storage import open_store


def parquet(columns: dict[str, Any], rows_per_group: int = 2) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=rows_per_group)
    return sink.getvalue()


def tar(members: dict[str, bytes | str], mode: str = "w") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "source #1") if request.param == "local" else request.getfixturevalue("s3_url")


def listed(url: str, files: dict[str, bytes], **options: Any) -> Listing:
    for key, data in files.items():
        open_store(url).write(key, data)
    return list_source(url, SourceConfig(**options))


def refuse(url: str, files: dict[str, bytes], message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message):
        listed(url, files, **options)


IMAGES = [b"one", b"two", b"three"]


def test_parquet_with_usual_names(url: str) -> None:
    columns = {"id": ["a", "b", "c"], "image": IMAGES, "label": [1, 0, 1], "split": ["train", "Test", "db+train"]}
    listing = listed(url, {"a.parquet": parquet(columns), "b.parquet": parquet({**columns, "id": ["d", "e", "f"]})})
    assert listing.format == "parquet"
    assert [row.id for row in listing.rows] == list("abcdef")
    assert [row.labels for row in listing.rows[:3]] == [(1,), (0,), (1,)]
    assert [row.split for row in listing.rows[:3]] == ["train", "query", "database+train"]
    assert [fetch(row.locator) for row in reversed(listing.rows)] == IMAGES[::-1] * 2


def test_parquet_as_datasets_of_huggingface_have_it(url: str) -> None:
    image = [{"bytes": data, "path": "p.png"} for data in IMAGES[:2]] + [{"bytes": None, "path": "p.png"}]
    listing = listed(url, {"train.parquet": parquet({"image": image, "label": ["cat", "dog", None]})})
    assert [row.id for row in listing.rows] == ["train.parquet:0:0", "train.parquet:0:1", "train.parquet:1:0"]
    assert [row.labels for row in listing.rows] == [("cat",), ("dog",), ()]
    assert [fetch(row.locator) for row in listing.rows] == [b"one", b"two", b""]


def test_parquet_columns_by_option(tmp_path: Path) -> None:
    columns = {"a&b=c+d %": IMAGES, "image": [1, 2, 3], "k": [7, 8, 9], "y": [[0, 2], [], [1]], "s": ["val"] * 3}
    options = {"image_column": "a&b=c+d %", "id_column": "k", "label_column": "y", "split_column": "s"}
    listing = listed(str(tmp_path), {"x.parquet": parquet(columns)}, **options)
    assert [(row.id, row.labels, row.split) for row in listing.rows] == [
        ("7", (0, 2), "validation"), ("8", (), "validation"), ("9", (1,), "validation"),
    ]  # fmt: skip
    assert [fetch(row.locator) for row in listing.rows] == IMAGES


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        ([3, 0, 3], [(3,), (0,), (3,)], None),
        ([1.0, None, 2.0], [(1,), (), (2,)], None),
        (["cat", "dog", "cat"], [("cat",), ("dog",), ("cat",)], None),
        ([["cat", "dog"], [], ["dog"]], [("cat", "dog"), (), ("dog",)], None),
        ([[5, 1], [2], [0, 1]], [(5, 1), (2,), (0, 1)], None),
        ([[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], [(1,), (0, 1), ()], 4),
        ([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], None], [(1, 2), (2,), ()], 3),
        ([[0, 1], [1, 0], [1, 1]], [(1,), (0,), (0, 1)], 2),
        ([[0], [1], [0]], [(0,), (1,), (0,)], None),
    ],
)
def test_parquet_labels(tmp_path: Path, labels: list[Any], expected: list[Any], classes: int | None) -> None:
    listing = listed(str(tmp_path), {"x.parquet": parquet({"image": IMAGES, "labels": labels})})
    assert [row.labels for row in listing.rows] == expected
    assert listing.class_names == (None if classes is None else [str(i) for i in range(classes)])


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"pixels": IMAGES}, {}, r"x\.parquet has no image column; name it with --image-column. It has: pixels"),
        ({"image": IMAGES}, {"label_column": "lable"}, "has no column 'lable'. It has: image"),
        ({"image": IMAGES, "label": [1] * 3}, {"label_column": "lable"}, "'lable', perhaps you meant 'label'"),
        ({"image": ["a.png"] * 3}, {}, "column 'image' holds string; expected encoded images"),
        ({"image": [[1, 2]] * 3}, {}, "expected encoded images .* as binary, or a struct"),
        ({"image": IMAGES, "id": ["a", None, "c"]}, {}, "row group 0, row 1: 'id' is null"),
        ({"image": IMAGES, "split": ["train", "test", "tset"]}, {}, "group 1, row 0: split 'tset' is not known"),
        ({"image": IMAGES, "label": [0, 1, -1]}, {}, "row group 1, row 0: label -1 is out of range; allowed: 0 and up"),
        ({"image": IMAGES, "label": [0, 1.5, 1]}, {}, r"row 1: label 1\.5; expected a class index"),
        ({"image": IMAGES, "label": [0, float("nan"), 1]}, {}, "row 1: label nan; expected a class index"),
        ({"image": IMAGES, "label": [b"a"] * 3}, {}, "row 0: label b'a'; expected a class index"),
        ({"image": IMAGES, "label": [[0, 1, 1], [1, 0], [0, 0, 1]]}, {}, r"label \[1, 0\]; other rows are lists of 3"),
        ({"image": IMAGES, "label": [[0, 1, 1], [1, 0, 0], [0, 2, 1]]}, {}, r"row group 1, row 0: label \[0, 2, 1\]"),
    ],
)  # fmt: skip
def test_parquet_that_is_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], message: str
) -> None:
    refuse(str(tmp_path), {"x.parquet": parquet(columns)}, message, **options)


def test_labels_and_class_names(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("ant\nbee\n")
    names = str(tmp_path / "names")
    data = parquet({"image": IMAGES, "label": [0, 1, 2]})
    refuse(
        str(tmp_path),
        {"x.parquet": data},
        "row group 1, row 0: label 2 is out of range; allowed: 0 to 1",
        class_names=names,
    )
    data = parquet({"image": IMAGES, "label": [[0, 1, 1]] * 3})
    refuse(str(tmp_path), {"x.parquet": data}, "3 label fields, but 2 class names", class_names=names)


def test_broken_parquet_files(tmp_path: Path) -> None:
    refuse(str(tmp_path), {"x.parquet": b"PAR1 no"}, r"x\.parquet is not a Parquet file, or broken")
    listing = listed(str(tmp_path), {"x.parquet": parquet({"image": IMAGES})})
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"x\.parquet, row group 1 cannot be read"):
        fetch(listing.rows[2].locator)
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(InputError, match=r"x\.parquet not found"):
        fetch(listing.rows[0].locator)


def test_webdataset_shards(url: str) -> None:
    shards = {
        "train-0000.tar": tar({
            "a/0001.jpg": "one", "a/0001.cls": "3", "a/0001.json": '{"label": 9}', "a/0001.txt": "a caption",
            "a/0001.seg.png": "mask", "a/0002.JSON": '{"labels": [0, 2]}', "a/0002.png": "two", "._0003.png": "x",
        }),
        "test_7.tar": tar({"0.png": "three", "0.json": '{"other": 1}', "0.txt": "4 "}),
        "database/0.tar": tar({"0.png": "four"}),
        "0.tar": tar({"0.png": "five", "0.cls": "0"}),
    }  # fmt: skip
    listing = listed(url, shards)
    assert (listing.format, listing.class_names) == ("tar", None)
    assert {row.id: (row.labels, row.split, fetch(row.locator)) for row in listing.rows} == {
        "train-0000.tar/a/0001": ((3,), "train", b"one"), "train-0000.tar/a/0002": ((0, 2), "train", b"two"),
        "test_7.tar/0": ((4,), "query", b"three"), "database/0.tar/0": ((), "database", b"four"),
        "0.tar/0": ((0,), None, b"five"),
    }  # fmt: skip


def test_labels_in_tar_shards(tmp_path: Path) -> None:
    words = {"0.txt": "cat", "1.txt": "hot dog", "2.json": '"cat"', "3.txt": "", "4.json": '{"labels": ["a", "b"]}'}
    images = {f"{i}.png": "x" for i in range(5)}
    listing = listed(str(tmp_path / "a"), {"x.tar": tar(images | words)})  # type: ignore[operator]
    assert [row.labels for row in listing.rows] == [("cat",), ("hot dog",), ("cat",), (), ("a", "b")]
    listing = listed(
        str(tmp_path / "b"), {"x.tar": tar({"0.png": "x", "0.cls": "0 1 1", "1.png": "x", "1.json": "[1, 0, 0]"})}
    )
    assert [row.labels for row in listing.rows] == [(1, 2), (0,)]
    assert listing.class_names == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar({"0.png": "x"}, "w:gz"), r"x\.tar is not an uncompressed tar file"),
        (b"", r"x\.tar is not an uncompressed tar file"),
        (b"hello" * 400, r"x\.tar is not an uncompressed tar file"),
        (tar({"0.png": "x" * 5000})[:3000], r"x\.tar is not an uncompressed tar file, or cut off"),
        (tar({"0.png": "x" * 512, "1.png": "x"})[:1024], r"x\.tar has no end mark: it was cut off"),
        (tar({"0.png": "x", "0.cls": "-1"}), "member 0.png: label -1 is out of range"),
        (tar({"0.png": "x", "0.json": "{"}), "member 0.json is not JSON"),
        (tar({"0.png": "x", "0.txt": b"\xff"}), "member 0.txt is not UTF-8 text"),
        (tar({"0.png": "x", "0.json": '{"label": {"a": 1}}'}), r"member 0.png: label \{'a': 1\}; expected"),
        (tar({"0.png": "x", "0.jpg": "y"}), "0.png and 0.jpg are two images of one sample"),
        (tar({"IMG.2020.png": "x"}), "IMG.2020.png has a dot inside its name; .* rename it"),
    ],
)
def test_tar_shards_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    refuse(str(tmp_path), {"x.tar": data}, message)


def test_compressed_tars_are_refused_before_they_are_missed(tmp_path: Path) -> None:
    files = {"a.tar": tar({"0.png": "x"}), "b.tar.gz": b"x"}
    refuse(
        str(tmp_path),
        files,
        r"b\.tar\.gz is a compressed tar, in which no image can be read alone; decompress it",
        format="tar",
    )


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=8))
def test_multi_hot_rows_keep_their_width(rows: list[list[int]]) -> None:
    labels, width = read_labels(rows, None, str)
    assert width == 4
    assert labels == [tuple(i for i in range(4) if row[i]) for row in rows]


@given(st.lists(st.none() | st.integers(0, 5) | st.lists(st.integers(0, 9), max_size=4, unique=True), max_size=8))
def test_lists_of_distinct_indices_stay_indices(rows: list[Any]) -> None:
    lists = [row for row in rows if isinstance(row, list) and row]
    if lists and all(sorted(row) == [0, 1] for row in lists):
        return  # two fields of 0 and 1 in every row: two classes
    labels, width = read_labels(rows, None, str)
    assert width is None
    assert labels == [() if row is None else tuple(row) if isinstance(row, list) else (row,) for row in rows]

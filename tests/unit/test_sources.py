"""Folders and list files: ids, labels, splits, and errors with their place."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from listing import Listing, list_source

from hashray.data.sources import SourceConfig, fetch
from hashray.errors import InputError
from hashray.storage import open_store

Files = dict[str, bytes | str]
Put = Callable[[Files], str]


@pytest.fixture(params=["local", "s3"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Put:
    """Write files to a folder, or to S3; give its url."""
    url = str(tmp_path / "a source") if request.param == "local" else request.getfixturevalue("s3_url")

    def write(files: Files) -> str:
        for key, data in files.items():
            open_store(url).write(key, data.encode() if isinstance(data, str) else data)
        return url

    return write


@pytest.fixture
def local(tmp_path: Path) -> Put:
    def write(files: Files) -> str:
        for key, data in files.items():
            path = tmp_path / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(tmp_path)

    return write


def pictures(*keys: str) -> Files:
    return {key: f"bytes of {key}" for key in keys}


def rows(listing: Listing) -> dict[str, tuple[tuple[int | str, ...], str | None]]:
    assert len({row.id for row in listing.rows}) == len(listing.rows)
    return {row.id: (row.labels, row.split) for row in listing.rows}


def refuse(url: str, message: str, **options: str) -> None:
    with pytest.raises(InputError, match=message):
        list_source(url, SourceConfig(**options))  # type: ignore[arg-type]


def test_a_folder_of_classes(put: Put) -> None:
    names = ["cat/one.png", "cat/deep/er/two.JPG", "dog/three 3.jpeg", "top.webp", "odd #1%20+&=?/é.png"]
    url = put(pictures(*names) | {"cat/notes.md": "x", ".hidden/a.png": "x", "cat/.b.png": "x", "README.txt": "hello"})
    listing = list_source(url, SourceConfig())
    assert (listing.format, listing.class_names) == ("folder", None)
    assert rows(listing) == {
        "cat/one.png": (("cat",), None), "cat/deep/er/two.JPG": (("cat",), None), "dog/three 3.jpeg": (("dog",), None),
        "top.webp": ((), None), "odd #1%20+&=?/é.png": (("odd #1%20+&=?",), None),
    }  # fmt: skip
    for row in listing.rows:
        assert fetch(row.locator) == f"bytes of {row.id}".encode()


def test_a_folder_of_splits(put: Put) -> None:
    url = put(pictures("train/cat/1.png", "Test/dog/1.png", "unlabeled/9.png", "database/cat/x/1.png"))
    assert rows(list_source(url, SourceConfig())) == {
        "train/cat/1.png": (("cat",), "train"), "Test/dog/1.png": (("dog",), "query"),
        "unlabeled/9.png": ((), "unlabelled"), "database/cat/x/1.png": (("cat",), "database"),
    }  # fmt: skip


def test_a_class_may_have_the_name_of_a_split(local: Put) -> None:
    url = local(pictures("car/1.png", "train/1.png", "plane/1.png"))  # as in CIFAR-100
    assert {split for _, split in rows(list_source(url, SourceConfig())).values()} == {None}
    url = local(pictures("train/car/1.png"))
    refuse(url, "holds the split 'train' beside 'car', which is no split; .* move one of them")


def test_public_deep_hashing_lists(put: Put) -> None:
    url = put(
        {
            "train.txt": "images/a 1.jpg 1 0 0 0\n./images/b.jpg 0 1 1 0\r\n",
            "database.txt": "images/a 1.jpg 1 0 0 0\nimages/b.jpg 0 1 1 0\nimages/c.jpg 0 0 0 0\n\n",
            "test.txt": "images/d.jpg 0 0 1 0",
            **pictures("images/a 1.jpg", "images/b.jpg", "images/c.jpg", "images/d.jpg"),
        }
    )
    listing = list_source(url, SourceConfig())
    assert listing.format == "list"
    assert listing.class_names == ["0", "1", "2", "3"]  # the last class has no row, and is one all the same
    assert rows(listing) == {
        "images/a 1.jpg": ((0,), "database+train"), "images/b.jpg": ((1, 2), "database+train"),
        "images/c.jpg": ((), "database"), "images/d.jpg": ((2,), "query"),
    }  # fmt: skip
    assert all(fetch(row.locator) == f"bytes of {row.id}".encode() for row in listing.rows)
    one = list_source(f"{url}/train.txt", SourceConfig())
    assert {split for _, split in rows(one).values()} == {"train"}


def test_an_unlabelled_list_needs_no_labels(put: Put) -> None:
    url = put(
        {
            "train.txt": "images/a.jpg 1\n",
            "unlabelled.txt": "images/b 2.jpg\nimages/c.jpg 0\n",
            **pictures("images/a.jpg", "images/b 2.jpg", "images/c.jpg"),
        }
    )
    assert rows(list_source(url, SourceConfig())) == {
        "images/a.jpg": ((1,), "train"), "images/b 2.jpg": ((), "unlabelled"), "images/c.jpg": ((0,), "unlabelled"),
    }  # fmt: skip


def test_a_list_without_any_label_is_a_source_without_classes(put: Put) -> None:
    url = put({"train.txt": "images/a 1.JPG\nimages/b.jpg\n", "test.txt": "c.png\n", "unlabelled.txt": "d.png\n"})
    listing = list_source(url, SourceConfig())
    assert rows(listing) == {
        "images/a 1.JPG": ((), "train"), "images/b.jpg": ((), "train"), "c.png": ((), "query"),
        "d.png": ((), "unlabelled"),
    }  # fmt: skip
    assert listing.class_names is None


def test_no_labels_are_read_where_none_are_wanted(local: Put) -> None:
    """Folders by date are no classes, nor are the labels of lists and captions beside the images of a tar."""
    config = SourceConfig(labels=False)
    url = local(pictures("photos/2021/07/a.png", "photos/2022/b.png"))
    assert rows(list_source(f"{url}/photos", SourceConfig()))["2021/07/a.png"] == (("2021",), None)
    assert set(rows(list_source(f"{url}/photos", config)).values()) == {((), None)}
    url = local(pictures("split/train/2021/a.png", "split/test/b.png"))
    assert rows(list_source(f"{url}/split", config)) == {
        "train/2021/a.png": ((), "train"), "test/b.png": ((), "query"),
    }  # fmt: skip
    url = local({"list.txt": "a.png 0 1 1\nb.png\nimage 7\n"})
    assert rows(list_source(f"{url}/list.txt", config)) == dict.fromkeys(("a.png", "b.png", "image"), ((), None))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in (("0.png", b"x"), ("0.txt", b"a dog"), ("1.png", b"y"), ("1.txt", b"two dogs")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    url = local({"captions.tar": archive.getvalue()})
    listing = list_source(f"{url}/captions.tar", config)
    assert set(rows(listing).values()) == {((), None)} and len(listing.meaning.labels) == 1
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"], "breed": ["collie"], "label": [3]}), sink)
    assert set(rows(list_source(local({"p.parquet": sink.getvalue()}) + "/p.parquet", config)).values()) == {((), None)}


def test_a_list_of_indices_with_class_names(put: Put) -> None:
    url = put({"all.lst": "\ufeffa.png 2\nb.png 0\n", "classes.txt": "ant\nbee\ncat\n\n", **pictures("pix/a.png")})
    config = SourceConfig(class_names=f"{url}/classes.txt", root=f"{url}/pix", format="list")
    listing = list_source(url, config)
    assert listing.class_names == ["ant", "bee", "cat"]
    assert rows(listing) == {"a.png": ((2,), None), "b.png": ((0,), None)}
    assert fetch(listing.rows[0].locator) == b"bytes of pix/a.png"


def test_paths_of_a_list_that_stand_elsewhere(local: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    url = local({"l/list.txt": f"{Path('/') / 'far' / 'a.png'} 0\ns3://bucket/b.png 1\n", **pictures("pix/far/a.png")})
    listed = list_source(f"{url}/l/list.txt", SourceConfig())
    assert [row.locator for row in listed.rows] == ["/far/a.png", "s3://bucket/b.png"]
    monkeypatch.chdir(url)
    listed = list_source("l/list.txt", SourceConfig(root="pix"))  # relative: workers stand elsewhere
    assert listed.rows[0].locator == f"{url}/pix/far/a.png"
    assert fetch(listed.rows[0].locator) == b"bytes of pix/far/a.png"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png 0\nb.png\n", "line 2: no label after the path, but other lines have one; expected 'path index' or "),
        ("a.png 0\n\nb.png x 1.5\n", "line 3: no label after the path 'b.png x 1.5'; expected 'path index' or "),
        ("a.png\nb.png cat\n", r"line 2: no label after the path 'b.png cat'.*--no-labels"),
        ("a.png ²\n", "line 1: no label after the path"),
        ("a.png -1\n", r"line 1: label -1 is out of range; allowed: 0 and up"),
        ("a.png 0 2 1\n", "line 1: a multi-hot row of 3 fields may hold only 0 and 1"),
        ("a.png 0 1 1\nb.png 0 1\n", "line 2: 2 label fields, the lines before have 3"),
        ("a.png 0 1 1\nb.png 2\n", "line 2: 1 label fields, the lines before have 3"),
        ("a.png 0\na.png 0\n", "line 2: a.png stands twice in the lists of one split; ids must be unique"),
        ("a.png 0\n./a.png 1\n", r"line 2: a.png has labels \(1,\), elsewhere \(0,\); a row has one label set"),
        (b"a\xff.png 0\n", "train.txt is not UTF-8 text"),
        ("\n", r"\(list\) holds no images"),
    ],
)
def test_malformed_lines_are_refused_with_their_place(local: Put, lines: str | bytes, message: str) -> None:
    refuse(f"{local({'train.txt': lines})}/train.txt", message)


def test_two_lists_must_agree(local: Put) -> None:
    url = local({"train.txt": "a.png 0 1 0\n", "test.txt": "b.png 0 1\n"})
    refuse(url, r"train\.txt, line 1: 3 label fields, the lines before have 2")
    refuse(local({"test.txt": "a.png 1 1 0\n"}), r"train\.txt, line 1: a\.png has labels \(1,\), elsewhere \(0, 1\)")


def test_labels_are_compared_with_the_class_names(local: Put) -> None:
    url = local({"l.txt": "a.png 0\nb.png 2\n", "classes.txt": "ant\nbee\n"})
    names = f"{url}/classes.txt"
    refuse(f"{url}/l.txt", r"l\.txt, line 2: label 2 is out of range; allowed: 0 to 1", class_names=names)
    local({"l.txt": "a.png 0 1 1\n"})
    refuse(f"{url}/l.txt", "line 1: 3 label fields, the class-names file has 2 classes", class_names=names)
    local({"classes.txt": "ant\n\nbee\n"})
    refuse(f"{url}/l.txt", r"classes\.txt, line 2: empty", class_names=names)
    local({"classes.txt": "ant\nant\n"})
    refuse(f"{url}/l.txt", "names a class twice", class_names=names)
    refuse(f"{url}/l.txt", r"none\.txt not found", class_names=f"{url}/none.txt")


def test_nothing_there(put: Put) -> None:
    url = put({})
    refuse(url, "not found, or an empty folder; nothing to ingest")
    refuse(f"{url}/none.txt", "not found")
    url = put({"a.md": "x"})
    refuse(url, "is empty or of no known format; give a folder of images")
    refuse(url, r"\(folder\) holds no images; image files end in .png", format="folder")
    refuse(url, r"\(tar\) holds no images", format="tar")


def small(name: str) -> bytes:
    """A file with one row, of the kind that its ending says."""
    sink = io.BytesIO()
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"image": [b"x"]}), sink)
    elif name.endswith(".tar"):
        with tarfile.open(fileobj=sink, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("0.png"))
    else:
        sink.write(b"a.png 0\n")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["b/a.png", "README.txt"], "folder"),
        (["images/a.png", "train.txt"], "list"),
        (["images/a.png", "database.lst"], "list"),
        (["things.txt"], "list"),
        (["README.txt", "d/part-0.parquet"], "parquet"),
        (["00000.tar", "index.txt"], "tar"),
    ],
)
def test_the_format_is_told_from_the_files(local: Put, files: list[str], expected: str) -> None:
    assert list_source(local({name: small(name) for name in files}), SourceConfig()).format == expected


def test_the_format_of_one_file(put: Put) -> None:
    names = ("a.parquet", "b.tar", "c.txt")
    url = put({name: small(name) for name in names} | {"d.tar.gz": "x"})
    assert [list_source(f"{url}/{name}", SourceConfig()).format for name in names] == ["parquet", "tar", "list"]
    refuse(f"{url}/d.tar.gz", r"d\.tar\.gz is a compressed tar, .*; decompress it to \.tar first")


def test_a_whole_bucket_is_a_source(s3_url: str) -> None:
    bucket = "/".join(s3_url.split("/")[:3])
    open_store(bucket).write("cat/a.png", b"x")
    listing = list_source(bucket, SourceConfig())
    assert fetch(listing.rows[0].locator) == b"x"
    refuse(bucket, r"\(tar\) holds no images", format="tar")


def test_the_folder_above(local: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    url = local(pictures("in/cat/a.png"))
    monkeypatch.chdir(f"{url}/in/cat")
    assert rows(list_source("..", SourceConfig())) == {"cat/a.png": (("cat",), None)}
    refuse("..", r"\(parquet\) holds no images", format="parquet")


def test_a_missing_image_is_an_input_error(put: Put) -> None:
    url = put({"l.txt": "a.png 0\n"})
    with pytest.raises(InputError, match=r"a\.png"):
        fetch(list_source(f"{url}/l.txt", SourceConfig()).rows[0].locator)


def test_a_path_that_cannot_be_used_is_lost_with_its_reason(local: Put, tmp_path: Path) -> None:
    url = local(pictures("cat/a.png", "dog/b.png"))
    (tmp_path / "cat" / b"\xff.png".decode(errors="surrogateescape")).write_bytes(b"x")
    (tmp_path / "dog" / "itself.png").symlink_to("itself.png")
    (tmp_path / "dog" / "round").symlink_to(tmp_path / "dog")
    (tmp_path / "cat" / "above").symlink_to(tmp_path.parent)
    listing = list_source(url, SourceConfig())
    assert set(rows(listing)) == {"cat/a.png", "dog/b.png"}
    assert {row.id: row.reason for row in listing.survey.lost} == {
        "cat/\\udcff.png": "the file name is not UTF-8: rename it",
        "dog/itself.png": "Too many levels of symbolic links",
        "dog/round": "a link to a folder that holds it",
        "cat/above": "a link to a folder that holds it",
    }
    assert listing.survey.seen == 6
    with pytest.raises(InputError, match=r"cat/a\.png is one image; give the folder that holds it"):
        list_source(f"{url}/cat/a.png", SourceConfig())


def test_a_folder_without_permission_is_lost_and_the_rest_is_read() -> None:
    check = """
import os, pathlib, tempfile
from hashray.data.sources import SourceConfig
from listing import list_source
with tempfile.TemporaryDirectory(dir="/tmp") as folder:
    root = pathlib.Path(folder)
    root.chmod(0o755)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        (root / name / "a.png").write_bytes(b"x")
    (root / "dog").chmod(0)
    if os.geteuid() == 0:  # root may read everything
        os.seteuid(65534)
    listing = list_source(folder, SourceConfig())
    os.seteuid(os.getuid())
    (root / "dog").chmod(0o755)
    print([row.id for row in listing.rows], [(row.id, row.reason) for row in listing.survey.lost])
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "['cat/a.png'] [('dog', 'Permission denied')]\n"


def test_a_list_with_a_path_that_no_file_can_have(local: Put) -> None:
    url = local({"train.txt": f"a.png 0\nb\0.png 1\n{'x' * 300}.png 1\n", **pictures("a.png")})
    listing = list_source(f"{url}/train.txt", SourceConfig())
    assert [row.id for row in listing.survey.lost] == ["b\\0.png"]
    with pytest.raises(InputError, match="File name too long"):
        fetch(listing.rows[1].locator)


def test_ingest_starts_without_torch() -> None:
    check = "import hashray.data.ingest, sys; assert 'torch' not in sys.modules, 'torch'"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0

"""Layouts that people have: each is read as they mean it, and what is not read is counted."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from listing import Listing, assign_splits, list_source

from hashray.data.census import closing_table, warnings
from hashray.data.ingest import IngestConfig, ingest, name_classes, require_apart
from hashray.data.sources import SourceConfig, fetch
from hashray.data.splits import SplitConfig
from hashray.errors import InputError


def put(root: Path, *keys: str) -> str:
    for key in keys:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(key.encode())
    return str(root)


def table(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if features else None
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def tar(path: Path, members: dict[str, str], links: dict[str, tuple[bytes, str]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        for name, (kind, target) in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)


def listed(url: str | Path, **options: Any) -> Listing:
    return list_source(str(url), SourceConfig(**options))


def rows(listing: Listing) -> dict[str, tuple[Any, str | None]]:
    return {row.id: (row.labels[0] if row.labels else None, row.split) for row in listing.rows}


def test_hugging_face_parquet_has_its_split_in_the_file_name_and_its_classes_in_the_schema(tmp_path: Path) -> None:
    features: dict[str, Any] = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for split, count in (("train", 3), ("test", 2)):
        image = [{"bytes": bytes([i]), "path": None} for i in range(count)]
        columns = {"image": image, "label": [i % 2 for i in range(count)]}
        table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", columns, features)
    listing = listed(tmp_path)
    assert name_classes(listing.meaning)[0] == ["cat", "dog"]
    assert Counter(row.split for row in listing.rows) == {"train": 3, "query": 2}
    features["label"]["names"] = ["dog", "cat"]
    table(tmp_path / "data/test-00001-of-00001.parquet", {"image": [b"x"], "label": [0]}, features)
    with pytest.raises(InputError, match=r"its class names are .* make them agree"):
        listed(tmp_path)


def test_labels_are_compared_with_the_class_names_of_hugging_face(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    path = tmp_path / "train.parquet"
    table(path, {"image": [b"a", b"b", b"c"], "label": [0, 1, 5]}, features)
    with pytest.raises(InputError, match="row group 0, row 2: label 5 is out of range; allowed: 0 to 1"):
        listed(tmp_path)
    table(path, {"image": [b"a", b"b", b"c"], "label": [0, 1, -1]}, features)
    listing = listed(tmp_path)
    assert [row.labels for row in listing.rows] == [(0,), (1,), ()]
    assert census(listing)[0]["rows without label"] == "1"


def test_hive_partitions_are_columns(tmp_path: Path) -> None:
    for i in range(4):
        folder = tmp_path / f"split={'train' if i < 3 else 'test'}" / f"label={i % 2}"
        table(folder / f"part-{i}.parquet", {"id": [f"r{i}"], "image": [bytes([i])]})
    assert rows(listed(tmp_path)) == {
        "r0": (0, "train"), "r1": (1, "train"), "r2": (0, "train"), "r3": (1, "query"),
    }  # fmt: skip


def test_usual_column_names_are_taken_and_said_and_others_refused(tmp_path: Path) -> None:
    columns = {"img": [b"a", b"b"], "Fine_Label": [0, 2], "coarse_label": [0, 1], "width": [1, 1]}
    table(tmp_path / "a" / "x.parquet", columns)
    listing = listed(tmp_path / "a")
    assert [row.labels for row in listing.rows] == [(0,), (2,)]
    assert "labels are read from column 'Fine_Label'" in listing.survey.notes
    assert list(listing.survey.columns_ignored) == ["coarse_label", "width"]
    table(tmp_path / "b" / "x.parquet", {"image": [b"a"], "kind": ["cat"]})
    with pytest.raises(InputError, match=r"no column of a usual label name; .* --label-column .* image, kind"):
        listed(tmp_path / "b")
    assert listed(tmp_path / "b", label_column="kind").rows[0].labels == ("cat",)
    assert listed(tmp_path / "b", label_column="none").rows[0].labels == ()


def test_the_split_is_a_word_of_a_shards_name(tmp_path: Path) -> None:
    for split, count in (("train", 2), ("validation", 1)):
        members = {f"{i}.jpg": "x" for i in range(count)} | {f"{i}.cls": str(i) for i in range(count)}
        tar(tmp_path / f"imagenet1k-{split}-0000.tar", members)
    assert Counter(row.split for row in listed(tmp_path).rows) == {"train": 2, "validation": 1}


def test_tiny_imagenet(tmp_path: Path) -> None:
    keys = ("train/n00/images/a.JPEG", "train/n01/images/b.JPEG", "val/images/v0.JPEG", "val/images/v1.JPEG")
    url = put(tmp_path, *keys)
    (tmp_path / "val" / "val_annotations.txt").write_text("v0.JPEG\tn01\t0\t0\nv1.JPEG\tn00\t0\t0\n")
    listing = listed(url)
    labels = [("n00", "train"), ("n01", "train"), ("n01", "validation"), ("n00", "validation")]
    assert rows(listing) == dict(zip(keys, labels, strict=True))
    assert not +listing.survey.skipped


def test_a_folder_around_everything_is_no_class(tmp_path: Path) -> None:
    birds = [f"CUB_200_2011/images/00{i % 3}.Bird/{i}.jpg" for i in range(6)]
    url = put(tmp_path / "cub", *birds, "CUB_200_2011/classes.txt")
    assert {label for label, _ in rows(listed(url)).values()} == {"000.Bird", "001.Bird", "002.Bird"}
    url = put(tmp_path / "w", "cifar/train/cat/1.png", "cifar/test/dog/2.png")
    assert rows(listed(url)) == {"cifar/train/cat/1.png": ("cat", "train"), "cifar/test/dog/2.png": ("dog", "query")}
    url = put(tmp_path / "one", "only/1.png", "only/2.png")
    assert {label for label, _ in rows(listed(url)).values()} == {"only"}


def test_a_split_with_one_class_keeps_its_labels(tmp_path: Path) -> None:
    keys = {
        "train/cats/images/1.png": ("cats", "train"), "train/dogs/images/2.png": ("dogs", "train"),
        "test/cats/images/3.png": ("cats", "query"), "val/cats/a/4.png": ("cats", "validation"),
        "val/cats/b/5.png": ("cats", "validation"), "database/images/dogs/6.png": ("dogs", "database"),
    }  # fmt: skip
    assert rows(listed(put(tmp_path, *keys))) == keys


def test_junk_is_counted_and_never_a_class(tmp_path: Path) -> None:
    url = put(
        tmp_path, "a/1.jpg", "a/@eaDir/1.jpg/THUMB.jpg", "b/2.jpg", "#recycle/3.jpg", "__MACOSX/._1.jpg",
        "b/Thumbs.db", "b/.DS_Store", "lost+found/9.jpg", "b/clip.mp4", "b/notes",
    )  # fmt: skip
    listing = listed(url)
    assert rows(listing) == {"a/1.jpg": ("a", None), "b/2.jpg": ("b", None)}
    assert listing.survey.seen == 10
    assert listing.survey.skipped == {
        "in @eaDir/": 1, "in #recycle/": 1, "in __MACOSX/": 1, "Thumbs.db": 1, "hidden": 1, "in lost+found/": 1,
        ".mp4": 1, "no ending": 1,
    }  # fmt: skip


def test_a_sample_whose_label_stands_in_another_shard(tmp_path: Path) -> None:
    tar(tmp_path / "images-0.tar", {"0.jpg": "x", "1.jpg": "x"})
    tar(tmp_path / "labels-0.tar", {"0.cls": "1", "1.label": "0", "7.cls": "3"})
    assert [row.labels for row in listed(tmp_path).rows] == [(1,), (0,)]


def test_links_inside_an_archive(tmp_path: Path) -> None:
    good = {"a/1.jpg": (tarfile.SYMTYPE, "0.jpg"), "2.jpg": (tarfile.LNKTYPE, "a/0.jpg")}
    bad = {"3.jpg": (tarfile.SYMTYPE, "no"), "4.jpg": (tarfile.SYMTYPE, "4.jpg")}
    tar(tmp_path / "x.tar", {"a/0.jpg": "bytes"}, good | bad)
    listing = listed(tmp_path)
    read = {row.id: fetch(row.locator) for row in listing.rows}
    assert read == dict.fromkeys(("x.tar/a/0", "x.tar/a/1", "x.tar/2"), b"bytes")
    assert {row.id: row.reason for row in listing.survey.lost} == {
        f"x.tar/{name}": f"{name}.jpg is a link to {target!r}, which is not in this archive"
        for name, target in (("3", "no"), ("4", "4.jpg"))
    }


def test_metadata_beside_shards_is_not_the_source(tmp_path: Path) -> None:
    table(tmp_path / "00000.parquet", {"url": ["u"], "caption": ["c"]})
    tar(tmp_path / "00000.tar", {"0.jpg": "x", "0.txt": "a caption"})
    (tmp_path / "00000_stats.json").write_text("{}")
    listing = listed(tmp_path)
    assert listing.format == "tar"
    assert listing.survey.skipped == {".parquet": 1, ".json": 1}


def test_junk_inside_an_archive_is_counted_and_never_a_row(tmp_path: Path) -> None:
    names = ("./0.png", "0.cls", "0.md", "._0.png", ".DS_Store", "@eaDir/1.png", "a/Thumbs.db", "../b/2.png")
    tar(tmp_path / "x.tar", dict.fromkeys(names, "0"), {"3.png": (tarfile.SYMTYPE, ".cache/3.png")})
    tar(tmp_path / "y.tar", {".cache/4.png": "bytes"}, {"4.png": (tarfile.SYMTYPE, ".cache/4.png")})
    put(tmp_path, "notes.md")
    listing = listed(tmp_path)
    assert [row.id for row in listing.rows] == ["x.tar/0", "x.tar/../b/2", "y.tar/4"]
    lines = census(listing)[0]
    assert lines["files seen"] == "3" and lines["files skipped"] == ".md 1"
    assert lines["files in tars"] == "11"
    assert lines["files in tars skipped"] == ".md 1, Thumbs.db 1, hidden 3, in @eaDir/ 1"


def test_mixed_names_and_numbers_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "label.tar", {"0.jpg": "x", "0.label": "cat"})
    tar(tmp_path / "json.tar", {"2.jpg": "x", "2.json": '{"class_id": 1}'})
    with pytest.raises(InputError, match="names and numbers mixed"):
        name_classes(listed(tmp_path).meaning)
    assert listed(tmp_path / "json.tar").rows[0].labels == (1,)


def census(listing: Listing) -> tuple[dict[str, str], list[str]]:
    classes, indices = name_classes(listing.meaning)
    labels = [indices[row.value] for row in listing.rows]
    ids, given = [row.id for row in listing.rows], [row.split for row in listing.rows]
    splits = assign_splits(ids, labels, given, SplitConfig())
    counts = Counter(zip(labels, splits, strict=True))
    lines = {line[0]: line[1] for line in closing_table(listing.survey, listing.format, counts, classes)}
    return lines, warnings(listing.survey, counts, classes, listing.twins)


def test_the_closing_table_accounts_for_everything(tmp_path: Path) -> None:
    url = put(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/4.png", "notes.md", ".hidden")
    lines, sentences = census(listed(url))
    assert lines["files seen"] == "6" and lines["rows read (folder)"] == "4"
    assert lines["files skipped"] == ".md 1, hidden 1" and lines["rows without label"] == "1"
    assert lines["rows per split"] == "database 2, query 2, train 2" and lines["classes"] == "2: cat, dog"
    assert sentences == []


def test_images_that_a_list_names_are_not_skipped(tmp_path: Path) -> None:
    url = put(tmp_path, *[f"images/{i}.png" for i in range(7)], "images/notes.md")
    (tmp_path / "train.txt").write_text("".join(f"./images/{i}.png {i % 2}\n" for i in range(4)))
    (tmp_path / "test.txt").write_text(f"images/4.png 0\n{tmp_path}/images/5.png 1\nimages/none.png 1\n")
    lines, _ = census(listed(url))
    assert lines["files seen"] == "10" and lines["rows read (list)"] == "7"
    assert lines["files skipped"] == ".md 1, .png 1"


def test_a_path_that_cannot_be_listed_is_said_and_refused_by_strict(tmp_path: Path) -> None:
    url = put(tmp_path / "source", "train/cat/1.png", "test/cat/2.png")
    (tmp_path / "source" / "train" / "dog").symlink_to("dog")
    (sentence,) = census(listed(url))[1]
    assert sentence.startswith("1 paths cannot be listed and go to quarantine, a folder as one row")
    assert "train/dog (Too many levels of symbolic links)" in sentence
    with pytest.raises(InputError, match=r"--strict refuses this source"):
        ingest(IngestConfig(source=url, out=str(tmp_path / "out"), strict=True))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["train/cat/1.png", "test/cat/2.png", "test/dog/3.png"], "1 class has queries and no database row: dog"),
        (["cafe\u0301/1.png", "caf\u00e9/2.png"], "names of classes that differ only in case"),
        (["cat/A.png", "cat/a.png", "dog/b.png"], "names of files that differ only in case"),
        (["cat/1.png", "dog/2.png"], "every row is 'database'"),
        (["train/cat/1.png", "train/dog/2.png"], "every row is 'database+train'"),
        (["train/cat/1.png", "unlabelled/2.png"], "every row is 'database'"),
        (["images/1.png", "cat/2.png"], "the classes images look like splits or folders of images"),
        ([f"{i}/{i}.png" for i in range(30)], "30 classes for 30 labelled rows: the labels look like captions"),
    ],
)
def test_what_looks_wrong_is_said_and_refused_by_strict(tmp_path: Path, keys: list[str], sentence: str) -> None:
    url = put(tmp_path / "source", *keys)
    assert any(sentence in line for line in census(listed(url))[1])
    with pytest.raises(InputError, match=r"--strict refuses this source"):
        ingest(IngestConfig(source=url, out=str(tmp_path / "out"), strict=True))
    assert not (tmp_path / "out").exists()


def test_a_corpus_inside_its_source_is_refused(tmp_path: Path) -> None:
    url = put(tmp_path, "cat/1.png")
    for out in (url, f"{url}/corpus"):
        with pytest.raises(InputError, match=r"is inside the source .* choose a folder beside it"):
            ingest(IngestConfig(source=url, out=out))
    require_apart(url, f"{url}-corpus")
    (tmp_path.parent / f"{tmp_path.name}-link").symlink_to(url)
    with pytest.raises(InputError, match="is inside the source"):
        require_apart(url, f"{url}-link/corpus")

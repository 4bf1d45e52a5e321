"""Ingest: rows in = rows out + quarantined, resumed byte for byte, from every kind of source, never over another's."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from listing import list_source
from PIL import Image
from ray import cloudpickle
from tiny import deny, file_of

from hashray import artifact
from hashray.artifact import read_table
from hashray.data import ingest as ingest_module
from hashray.data.corpus import iterate_bytes, open_corpus
from hashray.data.ingest import IngestConfig, ingest
from hashray.data.listed import cut_parts
from hashray.data.sources import SourceConfig
from hashray.engine.parts import Output, Part, PartWorker, finished_parts, run_parts
from hashray.engine.session import WorkersConfig
from hashray.errors import AlreadyExists, AuditError, InputError, RunError, StorageError, TooManyBadRows
from hashray.storage import open_store

BROKEN = {3: b"", 17: b"no image"}
ONE = WorkersConfig(workers=1, cpus_per_worker=0.5)
TWO = WorkersConfig(workers=2, cpus_per_worker=0.5)
HERE = WorkersConfig(ray="never")  # in threads of this process


def png(number: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def write_folder(url: str, rows: int = 40, broken: Mapping[int, bytes] = BROKEN) -> str:
    store = open_store(url)
    for i in range(rows):
        split = ("train", "train", "test", "database")[i % 4]
        store.write(f"{split}/{('ant', 'bee', 'cat')[i % 3]}/{i:03d}.png", broken.get(i, png(i)))
    return url


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def check(out: str, rows_in: int, bad: Sequence[str]) -> None:
    """The law of rows: in = out + quarantined, every id once, a reason for each."""
    assert artifact.verify(out) == []
    corpus = open_corpus(out)
    manifest = corpus.manifest
    assert (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined) == (rows_in, rows_in - len(bad), len(bad))
    table = read_table(corpus.store, corpus.manifest.record("quarantine.parquet"))
    assert sorted(table.column("id").to_pylist()) == sorted(bad)
    assert all(table.column("reason").to_pylist())
    ids = corpus.rows("all").ids
    assert len(ids) == len(set(ids)) == rows_in - len(bad)
    assert not set(ids) & set(bad)


def test_broken_rows_resume_and_the_same_bytes_every_time(
    ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(str(tmp_path / "images"))
    bad = ["database/ant/003.png", "train/cat/017.png"]
    first = IngestConfig(source=source, out=str(tmp_path / "a"), rows_per_part=7, max_bad=0.04, pool=TWO)
    with pytest.raises(TooManyBadRows, match=r"2 of 40 rows could not be used, --max-bad allows 0\.04") as caught:
        ingest(first)
    assert caught.value.exit_code == 1
    assert "empty: 0 bytes" in str(caught.value)
    assert "run the same command again: finished parts are kept" in str(caught.value).replace("\nMend", " Mend")
    store = open_store(first.out)
    assert not artifact.is_finished(store)
    with pytest.raises(InputError, match="is not a finished artifact"):
        open_corpus(first.out)

    # The same command with a higher bound finishes, and does not redo what is there.
    (plan,) = {Path(key).parts[1] for key, _ in store.list("progress/") if "hashes-" not in key}
    before = {part.file.name: mtime(store, part) for part in finished_parts(store, plan, 6).values()}
    manifest = ingest(first.model_copy(update={"max_bad": 0.05}))
    parts = [record for record in manifest.files if record.name.startswith("rows/")]
    assert len(parts) == 6
    assert before
    assert {name: (Path(first.out) / name).stat().st_mtime_ns for name in before} == before
    check(first.out, 40, bad)
    assert not list(store.list("progress/"))
    reasons = pq.read_table(file_of(first.out, "quarantine.parquet")).to_pylist()
    assert {row["id"]: row["reason"] for row in reasons} == {
        bad[0]: "empty: 0 bytes", bad[1]: "UnidentifiedImageError: cannot identify image file",
    }  # fmt: skip
    assert all(row["uri"] == f"{source}/{row['id']}" for row in reasons)
    corpus = open_corpus(first.out)
    assert corpus.classes == ["ant", "bee", "cat"]
    assert {s: corpus.count(s) for s in ("train", "query", "database")} == {"train": 19, "query": 10, "database": 9}

    # Listed in other shares, by another number of workers: the same bytes. Killed before the manifest, with
    # one part lost, one record lost and one record half written: three units run again, the others do not.
    monkeypatch.setattr("hashray.data.sources.UNIT_FILES", 7)
    second = first.model_copy(update={"out": str(tmp_path / "b"), "max_bad": 1.0, "pool": ONE})
    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(second)
    other = open_store(second.out)
    done = finished_parts(other, plan, 6)
    times = {i: mtime(other, part) for i, part in done.items()}
    assert sorted(done) == list(range(6))
    other.delete(done[1].file.name)
    other.delete(f"progress/{plan}/000002.json")
    other.write(f"progress/{plan}/000004.json", b'{"index": 4, "fi')
    assert sorted(finished_parts(other, plan, 6)) == [0, 3, 5]
    ingest(second)
    assert contents(second.out) == contents(first.out)
    assert [i for i, part in done.items() if mtime(other, part) != times[i]] == [1, 2, 4]

    # A finished one is left alone, also by a run that ends at once.
    finished = contents(first.out)
    ingest(first)
    assert contents(first.out) == finished


def killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


def mtime(store: Any, part: Part) -> int:
    return (Path(store.url) / part.file.name).stat().st_mtime_ns


class Dies(PartWorker):
    """Kills its process in the middle of unit 2, once, and at each try of unit 11."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        with (self.marker.parent / f"attempt-{unit['index']}").open("a") as log:
            log.write("x")
        if unit["index"] == 2 and not self.marker.exists():
            self.marker.touch()
            os._exit(9)
        if unit["index"] == 11:
            os._exit(9)
        if unit["index"] == 9:
            raise InputError("a fault of the request, found by a worker")
        if unit["index"] == 10:
            raise KeyError("a fault of the code")
        lost = unit["index"] == 8
        return Output(pa.table({"id": [f"{unit['index']}-{i}" for i in range(unit["rows"] - lost)]}), [])


def test_a_worker_that_dies_loses_no_part(ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    store = open_store(tmp_path / "out")

    def run(indices: range) -> list[Part]:
        units = [{"index": i, "rows": 2} for i in indices]
        return run_parts(store, "plan", units, Dies, {"marker": str(tmp_path / "died")}, ONE, "t", 0.0)

    parts = run(range(6))
    assert (tmp_path / "died").exists()
    assert [part.index for part in parts] == list(range(6))
    tables = [pq.read_table(Path(store.url) / part.file.name) for part in parts]
    assert [x for t in tables for x in t.column("id").to_pylist()] == [f"{i}-{j}" for i in range(6) for j in range(2)]
    assert (tmp_path / "attempt-2").read_text() == "xx"
    assert "note: t: part 2 runs again, its worker was lost" in capsys.readouterr().err
    assert run(range(6)) == parts
    assert (tmp_path / "attempt-0").read_text() == "x"
    # What a worker raises comes back as itself; a row that is nowhere is an error, and leaves no record.
    with pytest.raises(AuditError, match=r"parts/part-00008-plan\.parquet: 2 rows in, 1 out, 0 quarantined"):
        run(range(8, 9))
    with pytest.raises(InputError, match="a fault of the request, found by a worker"):
        run(range(9, 10))
    # An error that would come again is final at once, and is no bare traceback.
    with pytest.raises(RunError, match="t: part 10: KeyError: 'a fault of the code'"):
        run(range(10, 11))
    # What kills each worker is not retried without end.
    with pytest.raises(RunError, match=r"t: part 11 lost its worker 4 times\. Its rows may need more memory"):
        run(range(11, 12))
    assert (tmp_path / "attempt-11").read_text() == "xxxx"
    assert sorted(finished_parts(store, "plan", 12)) == list(range(6))


@pytest.mark.parametrize(("place", "rows_per_part"), [("local", 1), ("local", 13), ("local", 100), ("s3", 13)])
def test_two_broken_files_in_any_number_of_parts(
    rows_per_part: int, place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = str(tmp_path) if place == "local" else request.getfixturevalue("s3_url")
    source = write_folder(f"{base}/images")
    ingest(IngestConfig(pool=HERE, source=source, out=f"{base}/c", rows_per_part=rows_per_part))
    check(f"{base}/c", 40, ["database/ant/003.png", "train/cat/017.png"])


def sources(url: str) -> dict[str, tuple[str, SourceConfig]]:
    """The same six images as each kind of source; the third is broken."""
    store = open_store(url)
    images = [b"broken" if i == 2 else png(i) for i in range(6)]
    for i, data in enumerate(images):
        store.write(f"folder/c{i % 2}/{i}.png", data)
    store.write("lists/train.txt", "".join(f"c{i % 2}/{i}.png {i % 2}\n" for i in range(5)).encode())
    store.write("lists/test.txt", b"c1/5.png 1\n")
    table = pa.table({"id": [str(i) for i in range(6)], "image": images, "label": [f"c{i % 2}" for i in range(6)]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=4)
    store.write("parquet/0.parquet", sink.getvalue())
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for i, data in enumerate(images):
            for name, content in ((f"{i}.png", data), (f"{i}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    store.write("tar/0.tar", shard.getvalue())
    return {
        "folder": (f"{url}/folder", SourceConfig()),
        "list": (f"{url}/lists", SourceConfig(root=f"{url}/folder")),
        "parquet": (f"{url}/parquet", SourceConfig()),
        "tar": (f"{url}/tar/0.tar", SourceConfig()),
    }


@pytest.mark.parametrize("place", ["local", "s3"])
def test_every_source_by_bytes_and_by_reference(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "s #1") if place == "local" else request.getfixturevalue("s3_url")
    for kind, (source, reader) in sources(url).items():
        for store in ("bytes", "reference"):
            out = f"{url}/{kind}-{store}"
            config = IngestConfig(
                pool=HERE,
                source=source,
                out=out,
                reader=reader,
                store=store,
                max_bad=0.2,
                rows_per_part=4,  # type: ignore[arg-type]
            )
            if (kind, store) == ("parquet", "reference"):
                with pytest.raises(
                    InputError, match="a row of a Parquet file is no object of its own; use --store bytes"
                ):
                    ingest(config)
                continue
            manifest = ingest(config)
            corpus = open_corpus(out)
            assert (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined) == (6, 5, 1)
            assert artifact.verify(out) == []
            assert manifest.info["format"] == kind
            assert corpus.classes == (["c0", "c1"] if kind in ("folder", "parquet") else ["0", "1"])
            tables = [corpus.read_part(record) for record in corpus.parts]
            assert sum(table.column("image").null_count for table in tables) == (5 if store == "reference" else 0)
            images = {row_id: data for table in tables for row_id, data in iterate_bytes(table)}
            for row_id, data in images.items():
                assert data == png(int(Path(row_id).stem))
            rows = corpus.rows("all")
            assert rows.labels.argmax(1).tolist() == [int(Path(row_id).stem) % 2 for row_id in rows.ids]
            assert corpus.count("query") == (1 if kind == "list" else 0)
            assert corpus.count("database") == (4 if kind == "list" else 5)


def test_parts_are_bounded_in_bytes_and_a_large_image_is_a_part_by_itself(tmp_path: Path) -> None:
    for kind, (source, reader) in sources(str(tmp_path)).items():
        size = max(row.size_bytes for row in list_source(source, reader).rows)
        assert (
            size >= len(png(0)) if kind == "parquet" else size == max(len(png(i)) for i in range(6))
        )  # of a row group
        for part_bytes, least in ((1, 5), (2 * size, 3), (100 * size, 1)):
            out = str(tmp_path / f"{kind}-{part_bytes}")
            ingest(IngestConfig(pool=HERE, source=source, out=out, reader=reader, max_bad=0.2, part_bytes=part_bytes))
            corpus = open_corpus(out)
            held = [record.info["image_bytes"] for record in corpus.parts]
            assert len(held) >= least and (part_bytes > 1 or {record.rows for record in corpus.parts} == {0, 1})
            assert sum(held) == sum(len(png(i)) for i in range(6) if i != 2) + len(b"broken")
            assert part_bytes == 1 or max(held) <= part_bytes


@given(st.lists(st.integers(0, 50)), st.integers(1, 5), st.integers(1, 60))
def test_parts_hold_every_row_once_within_their_bounds(sizes: list[int], rows: int, most: int) -> None:
    starts = cut_parts(sizes, rows, most)
    chunks = [sizes[a:b] for a, b in pairwise([*starts, len(sizes)])]
    assert [size for chunk in chunks for size in chunk] == sizes
    assert all(1 <= len(chunk) <= rows and (len(chunk) == 1 or sum(chunk) <= most) for chunk in chunks)
    for chunk, following in pairwise(chunks):  # no part could have taken the next row
        assert len(chunk) == rows or sum(chunk) + following[0] > most


def test_what_is_refused_writes_nothing(tmp_path: Path) -> None:
    source = write_folder(str(tmp_path / "images"), rows=8, broken={})
    config = IngestConfig(pool=HERE, source=source, out=str(tmp_path / "c"))
    ingest(config)
    before = contents(config.out)
    others = [
        {"source": write_folder(str(tmp_path / "more"), rows=12, broken={})},
        {"seed": 1}, {"store": "reference"}, {"rows_per_part": 3}, {"split_protocol": "per-class", "query_per_class": 1,
                                                                  "train_per_class": 1},
    ]  # fmt: skip
    for change in others:
        with pytest.raises(
            AlreadyExists, match=r"holds a finished corpus .* of another input or configuration. Nothing was"
        ):
            ingest(config.model_copy(update=change))
        assert contents(config.out) == before
    # The names of the classes are a part of the corpus, where labels are numbers as well.
    for names, refused in (("x\ny\n", False), ("x\nz\n", True)):
        for name, text in {"l/l.txt": "1.png 1\n", "names.txt": names}.items():
            open_store(tmp_path).write(name, text.encode())
        open_store(tmp_path).write("l/1.png", png(1))
        reader = SourceConfig(class_names=str(tmp_path / "names.txt"))
        named = IngestConfig(pool=HERE, source=str(tmp_path / "l/l.txt"), out=str(tmp_path / "n"), reader=reader)
        if refused:
            with pytest.raises(AlreadyExists):
                ingest(named)
        else:
            ingest(named)
        assert open_corpus(named.out).classes == ["x", "y"]

    new = str(tmp_path / "new")
    open_store(tmp_path).write("lists/database.txt", b"a.png 0\nb.png 0\n")
    open_store(tmp_path).write("lists/test.txt", b"a.png 0\n")
    with pytest.raises(InputError, match=r"1 query rows are in another split too, the first 'a\.png'"):
        ingest(IngestConfig(pool=HERE, source=str(tmp_path / "lists"), out=new))
    table = pa.table({"id": ["a", "b", "a"], "image": [png(1)] * 3})
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(InputError, match=r"1 ids occur more than once, for example 'a' \(2 times\)"):
        ingest(IngestConfig(pool=HERE, source=str(tmp_path / "twice.parquet"), out=new))
    pq.write_table(table.slice(0, 2).append_column("label", pa.array([1, 10**9])), tmp_path / "sku.parquet")
    with pytest.raises(InputError, match="label 1000000000 is no class index"):
        ingest(IngestConfig(pool=HERE, source=str(tmp_path / "sku.parquet"), out=new))
    assert not Path(new).exists()


def test_a_query_that_is_in_the_database_under_another_name_is_counted(tmp_path: Path) -> None:
    for name in ("test/ant/1.png", "train/ant/2.png", "train/ant/3.png"):
        open_store(tmp_path / "i").write(name, png(3 if name.endswith("3.png") else 1))
    manifest = ingest(IngestConfig(pool=HERE, source=str(tmp_path / "i"), out=str(tmp_path / "c")))
    assert manifest.info["leaked_queries"] == 1


def test_a_file_without_permission_is_a_bad_row_and_missing_credentials_are_not(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_folder(str(tmp_path / "images"), broken={})
    deny(monkeypatch, tmp_path / "images/train/ant/000.png")
    ingest(IngestConfig(pool=HERE, source=source, out=str(tmp_path / "c")))
    check(str(tmp_path / "c"), 40, ["train/ant/000.png"])

    lines = [f"{s3_url}/a.png 0", f"{source}/train/bee/001.png 1", f"{source}/train/bee/013.png 1"]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    open_store(s3_url).write("a.png", png(1))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    config = IngestConfig(pool=HERE, source=str(tmp_path / "train.txt"), out=str(tmp_path / "d"), max_bad=0.9)
    with pytest.raises(StorageError, match="no usable credentials"):
        ingest(config)
    monkeypatch.undo()
    assert ingest(config).rows_out == 3


def test_verify_names_the_file_of_a_flipped_byte(tmp_path: Path) -> None:
    source = write_folder(str(tmp_path / "images"))
    out = tmp_path / "c"
    ingest(IngestConfig(pool=HERE, source=source, out=str(out), rows_per_part=20))
    files = contents(out)
    names = {artifact.plain_name(name.split("/")[0]) for name in files}
    assert names == {"rows", "images", "classes.json", "quarantine.parquet", "manifest.json"}
    for name, data in files.items():
        for place in (0, len(data) // 2, len(data) - 1):
            broken = bytearray(data)
            broken[place] ^= 1
            (out / name).write_bytes(bytes(broken))
            problems = artifact.verify(out)
            assert problems
            assert all(name in problem for problem in problems)
        (out / name).write_bytes(data)
    assert artifact.verify(out) == []

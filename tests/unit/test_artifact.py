"""The manifest: one winner, every changed byte found, every row accounted for, every error's text."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hashray.artifact import (
    FORMAT_VERSION,
    Manifest,
    canonical,
    describe,
    is_finished,
    load_manifest,
    newest_version,
    publish,
    read_columns,
    read_file,
    sha256_hex,
    table_bytes,
    verify,
    version_key,
    write_file,
)
from hashray.artifact.manifest import audit, from_bytes, to_bytes
from hashray.errors import AlreadyExists, AuditError, CorruptArtifact, InputError, MismatchError
from hashray.storage import Store, open_store
from hashray.storage.cache import sha256_file, verified_path


def parquet(ids: list, **columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ids, **columns}), buffer)
    return buffer.getvalue()


def make_corpus(store: Store, parts=(("a", "b"), ("c",)), quarantined=1, **changes) -> Manifest:
    files = [
        write_file(store, f"part-{number:05d}.parquet", parquet(list(ids)), rows=len(ids))
        for number, ids in enumerate(parts)
    ]
    files.append(write_file(store, "classes.json", b'["cat"]'))
    files.append(write_file(store, "quarantine.parquet", parquet(["bad"] * quarantined), rows=quarantined))
    rows = sum(map(len, parts))
    fields = {
        "kind": "corpus",
        "project_version": "0.1.0",
        "config": {"source": "photos", "seed": 0},
        "parents": {},
        "columns": {"id": "string"},
        "rows_in": rows + quarantined,
        "rows_out": rows,
        "rows_quarantined": quarantined,
        "files": files,
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(tmp_path / "corpus")


@pytest.fixture
def corpus(store) -> Store:
    publish(store, make_corpus(store))
    return store


def test_round_trip(store):
    manifest = make_corpus(store, info={"nested": {"x": (1, 2.5, None, "ä")}})
    assert not is_finished(store)
    assert publish(store, manifest) == manifest
    assert is_finished(store)
    assert load_manifest(store.url, "corpus") == manifest
    assert load_manifest(Path(store.url)).id == manifest.id == json.loads(store.read("manifest.json"))["id"]
    assert verify(store.url) == []
    summary = describe(store.url)
    assert summary["kind"] == "corpus" and summary["rows"] == 3 and summary["whole"] is True
    assert summary["files"] == 4 and summary["bytes"] == sum(record.bytes for record in manifest.files)
    assert summary["config"] == {"source": "photos", "seed": 0} and summary["parents"] == {}
    canonical(summary)  # can be printed as JSON
    assert manifest.record("classes.json").bytes == 7
    with pytest.raises(CorruptArtifact, match="this corpus lists no file 'x'"):
        manifest.record("x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_any_config_round_trips(config):
    manifest = Manifest(kind="model", project_version="0", config=config, parents={}, files=())
    assert from_bytes(to_bytes(manifest), "x") == manifest


def test_canonical_does_not_depend_on_order_or_container():
    assert canonical({"b": [1], "a": {2: 0, 10: 1}}) == canonical({"a": {"10": 1, "2": 0}, "b": (1,)})
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical({"x": number})
        with pytest.raises(ValidationError, match="not JSON compliant"):
            Manifest(kind="model", project_version="0", config={"x": [number]}, parents={}, files=())


def test_the_id_is_a_function_of_the_content(store):
    ids = {
        make_corpus(store, **change).id
        for change in ({}, {"config": {}}, {"parents": {"corpus": "1"}}, {"info": {"x": 1}})
    }
    assert len(ids) == 4
    assert make_corpus(store).id == make_corpus(store).id
    with pytest.raises(ValidationError):
        make_corpus(store, kind="corpse")
    with pytest.raises(ValidationError):
        make_corpus(store, surprise=1)
    with pytest.raises(ValidationError):
        make_corpus(store).kind = "codes"
    with pytest.raises(ValidationError, match=r"without '\.\.'"):
        Manifest.model_validate(
            {**make_corpus(store).model_dump(), "files": [{"name": "../x", "bytes": 1, "sha256": ""}]}
        )


def test_every_flipped_byte_is_found(corpus):
    rng = random.Random(0)
    for key, size in list(corpus.list()):
        data = corpus.read(key)
        places = (
            range(size) if key == "manifest.json" else sorted({0, size - 1, *rng.sample(range(size), min(size, 20))})
        )
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << rng.randrange(8)
            Path(corpus.url, key).write_bytes(flipped)
            if key == "manifest.json":
                with pytest.raises(CorruptArtifact, match=r"manifest\.json is corrupt"):
                    load_manifest(corpus)
            else:
                with pytest.raises(CorruptArtifact, match=f"{key} is corrupt: sha256"):
                    read_file(corpus, load_manifest(corpus).record(key))
            if place == places[0]:
                problems = verify(corpus.url)
                assert len(problems) == 1 and f"/{key} is corrupt" in problems[0]
        Path(corpus.url, key).write_bytes(data)
    assert verify(corpus.url) == []


@pytest.mark.parametrize("change", [b"\n", b" ", b"{}", b""])
def test_a_manifest_of_other_bytes_is_corrupt(corpus, change):
    data = corpus.read("manifest.json")
    for bad in (data + change if change else data[:-1], change + data if change else b"", data.replace(b"  ", b" ")):
        corpus.write("manifest.json", bad)
        with pytest.raises(CorruptArtifact, match=r"manifest\.json is corrupt.*run the stage again"):
            load_manifest(corpus)
    for bad in (b"[1]", b"3", b'{"id": 1}', b"null", b"\xff\xfe", b"[" * 100_000):
        corpus.write("manifest.json", bad)
        with pytest.raises(CorruptArtifact, match=r"manifest\.json is corrupt"):
            load_manifest(corpus)


def test_a_consistent_file_that_is_no_manifest(corpus):
    fields = {"kind": "corpus", "format_version": FORMAT_VERSION}
    corpus.write("manifest.json", canonical({**fields, "id": sha256_hex(canonical(fields))}))
    with pytest.raises(CorruptArtifact, match=r"manifest\.json is no manifest of hashray's: "):
        load_manifest(corpus)


def test_truncated_and_missing_files(corpus, tmp_path):
    manifest = load_manifest(corpus)
    part, classes = manifest.record("part-00000.parquet"), manifest.record("classes.json")
    corpus.write(part.name, corpus.read(part.name)[:-1])
    corpus.delete(classes.name)
    with pytest.raises(
        CorruptArtifact, match=rf"part-00000\.parquet has {part.bytes - 1} bytes, its manifest says {part.bytes}"
    ):
        read_file(corpus, part)
    with pytest.raises(CorruptArtifact, match=r"classes\.json is missing: its manifest lists it with 7 bytes"):
        read_file(corpus, classes)
    for record in (part, classes):
        with pytest.raises(CorruptArtifact, match=record.name):
            verified_path(corpus, record.name, record.bytes, record.sha256, tmp_path / "cache")
    assert not [path for path in tmp_path.glob("cache/**/*") if path.is_file()]
    problems = verify(corpus.url)
    assert len(problems) == 2 and "part-00000.parquet has" in problems[0] and "classes.json is missing" in problems[1]
    summary = describe(corpus.url)
    assert summary["whole"] is False and summary["problems"] == problems


def test_writing_and_reading_a_file(store, tmp_path):
    record = write_file(store, "weights", b"12345", rows=5, info={"a": 1})
    assert (record.bytes, record.sha256, record.rows) == (5, sha256_hex(b"12345"), 5)
    assert read_file(store, record) == b"12345"
    local = verified_path(store, record.name, record.bytes, record.sha256, tmp_path / "cache")
    assert local.read_bytes() == b"12345" and sha256_file(local) == record.sha256


def test_opening_what_is_not_there(store, tmp_path):
    with pytest.raises(
        InputError, match=r"is not a finished artifact: no manifest\.json.*did not finish, run it again"
    ):
        load_manifest(store)
    with pytest.raises(InputError, match="not a finished artifact"):
        describe(store.url)
    with pytest.raises(InputError, match="not a finished artifact"):
        verify(store.url)
    make_corpus(store)  # the stage died before its manifest
    assert len(verify(store.url)) == 1 and "no manifest.json" in verify(store.url)[0]
    with pytest.raises(InputError, match=r"is not an index: no versions/00000001\.json there.*hashray index build"):
        newest_version(store)


def test_wrong_kind(corpus):
    with pytest.raises(MismatchError, match="is a corpus, expected a model; check which path"):
        load_manifest(corpus, "model")
    with pytest.raises(MismatchError, match="is a corpus, expected an index"):
        load_manifest(corpus, "index")


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (3, r"newer hashray \(9\.0, format 3; this one reads up to 2\); upgrade hashray"),
        (
            1,
            r"older hashray \(9\.0, format 1; this one reads format 2\)\. Run the stage that made it again, into anoth",
        ),
    ],
)
def test_written_by_another_hashray(corpus, version, text):
    fields = json.loads(corpus.read("manifest.json"))
    del fields["id"]
    fields |= {"format_version": version, "project_version": "9.0", "kind": "hologram", "unheard_of": True}
    corpus.write("manifest.json", canonical({**fields, "id": sha256_hex(canonical(fields))}))
    with pytest.raises(MismatchError, match=text):
        load_manifest(corpus)


def test_parts_of_two_folders_must_be_aligned(store):
    files = [
        write_file(store, f"{folder}/part-{n}.parquet", b"x", rows=rows)
        for folder, counts in (("rows", (2, 1)), ("images", (1, 2)))
        for n, rows in enumerate(counts)
    ]
    manifest = Manifest(kind="corpus", project_version="0", config={}, parents={}, files=tuple(files), rows_out=3)
    assert audit(manifest) == ["the parts of rows/ and images/ are not aligned"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rows_in": 5}, "5 rows came in, but 3 went out and 1 to quarantine"),
        ({"rows_out": 2, "rows_in": 3}, "the part files hold 3 rows, rows_out is 2"),
        ({"rows_quarantined": 0, "rows_in": 3}, "quarantine.parquet holds 1 rows, rows_quarantined is 0"),
    ],
)
def test_audit(store, changes, text):
    manifest = make_corpus(store, **changes)
    with pytest.raises(AuditError, match=text):
        publish(store, manifest)
    assert not is_finished(store)
    store.create("manifest.json", to_bytes(manifest))  # by another program
    assert verify(store.url) == [f"{store.url}/manifest.json: {text}"]


def test_audit_of_files_listed_twice_and_of_stages_without_rows(store):
    record = write_file(store, "x", b"1")
    model = {"kind": "model", "project_version": "0", "config": {}, "parents": {}}
    with pytest.raises(AuditError, match="files listed twice: x"):
        publish(store, Manifest(**model, files=(record, record)))
    publish(store, Manifest(**model, files=(record,)))
    assert verify(store.url) == []


def test_publishing_twice(store):
    mine = make_corpus(store)
    assert publish(store, mine) == publish(store, mine)
    other = make_corpus(store, config={"source": "other"})
    with pytest.raises(AlreadyExists) as caught:
        publish(store, other)
    for part in (
        f"manifest.json already exists and is a corpus with id {mine.id[:12]}",
        other.id[:12],
        "another --out",
    ):
        assert part in str(caught.value)
    store.write("manifest.json", b"dirt")
    with pytest.raises(AlreadyExists, match="not a manifest this hashray can read"):
        publish(store, other)


def test_racing_publishers_have_one_winner(store):
    make_corpus(store)
    for number in range(10):
        key, barrier = version_key(number + 1), threading.Barrier(6)

        def race(me: int) -> Manifest | None:
            manifest = make_corpus(store, config={"publisher": me // 2})
            barrier.wait()  # noqa: B023
            try:
                return publish(store, manifest, key)  # noqa: B023
            except AlreadyExists:
                return None

        with ThreadPoolExecutor(6) as pool:
            won = [manifest for manifest in pool.map(race, range(6)) if manifest]
        # Each content has two publishers: both of the winning content are content, nobody else is.
        assert len(won) == 2 and won[0] == won[1] == load_manifest(store, key=key)


def test_killed_before_the_manifest(store):
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_artifact import make_corpus
from hashray.artifact import publish
from hashray.storage import open_store
store = open_store({store.url!r})
manifest = make_corpus(store)
os.link = lambda *paths: os._exit(9)
publish(store, manifest)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(Path(store.url).iterdir())) == 5  # four files and what the kill left
    assert len(list(store.list())) == 4 and not is_finished(store)
    publish(store, make_corpus(store))
    assert verify(store.url) == []


def test_reading_some_columns_checks_their_pages(store):
    table = pa.table({"id": ["a", "b"], "image": [b"\0" * 5000, b"\1" * 5000], "split": ["train", "query"]})
    record = write_file(store, "part-0.parquet", table_bytes(table), rows=2)
    assert read_columns(store, record, ["split", "id"]).equals(table.select(["split", "id"]))
    with pytest.raises(CorruptArtifact, match=r"part-0\.parquet has no column labels: it has id"):
        read_columns(store, record, ["id", "labels"])
    with pytest.raises(CorruptArtifact, match=r"part-0\.parquet holds 2 rows, its manifest says 3"):
        read_columns(store, record.model_copy(update={"rows": 3}), ["id"])
    column = pq.ParquetFile(io.BytesIO(store.read(record.name))).metadata.row_group(0).column(0)
    data = bytearray(store.read(record.name))
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    store.write(record.name, bytes(data))
    with pytest.raises(CorruptArtifact, match=r"part-0\.parquet cannot be read: "):
        read_columns(store, record, ["id"])
    store.delete(record.name)
    with pytest.raises(CorruptArtifact, match=r"part-0\.parquet is missing: its manifest lists it"):
        read_columns(store, record, ["id"])

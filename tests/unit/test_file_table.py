"""The table of an artifact's files: above 1,000 of them, verified, named by the manifest's id, parsed once."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_artifact import make_corpus
from test_verify import make_version

from hashray import artifact
from hashray.artifact import (
    FileRecord,
    Manifest,
    canonical,
    check_sizes,
    describe,
    load_manifest,
    publish,
    sha256_hex,
    table_bytes,
    verify,
    version_key,
    versions,
)
from hashray.artifact.files import MOST_LISTED, pack, unpack
from hashray.artifact.manifest import named, to_bytes
from hashray.errors import CorruptArtifact
from hashray.storage import Store, open_store

PUBLISH = sys.modules["hashray.artifact.publish"]  # the module: `artifact.publish` is the function


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "corpus")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files at most stand in a manifest."""
    monkeypatch.setattr(PUBLISH, "MOST_LISTED", 2)


def records(count: int, **changes: object) -> list[FileRecord]:
    return [
        FileRecord(
            name=f"part-{i:06d}.parquet", bytes=i, sha256=sha256_hex(b"%d" % i), rows=i % 7, info={"n": {"x": i}}
        )
        for i in range(count)
    ]


def model(files: list[FileRecord]) -> Manifest:
    return Manifest(kind="model", project_version="0", config={}, parents={}, files=tuple(files))


def test_the_manifest_of_many_files_does_not_grow(store: Store) -> None:
    sizes = []
    for count in (MOST_LISTED, MOST_LISTED + 1, 5000):
        manifest, place = model(records(count)), open_store(f"{store.url}/{count}")
        published = publish(place, manifest)
        assert load_manifest(place) == published and published.files == manifest.files
        assert [key for key, _ in place.list()][1:] == ["manifest.json"] or count == MOST_LISTED
        sizes.append(place.size("manifest.json"))
        assert published.record("part-000999.parquet").bytes == 999
    listed = json.loads(open_store(f"{store.url}/5000").read("manifest.json"))
    assert sizes[0] > 100_000 and max(sizes[1:]) < 1000
    assert "files" not in listed
    assert listed["table"]["rows"] == 5000 and listed["table"]["info"] == {"bytes": sum(range(5000))}
    table = pq.read_table(io.BytesIO(open_store(f"{store.url}/5000").read(listed["table"]["name"])))
    assert table.column_names == ["name", "bytes", "sha256", "rows", "info"] and len(table) == 5000
    assert table.slice(3, 1).to_pylist() == [
        {"name": "part-000003.parquet", "bytes": 3, "sha256": sha256_hex(b"3"), "rows": 3, "info": '{"n": {"x": 3}}'}
    ]


def test_up_to_1000_files_a_manifest_has_no_table(store: Store) -> None:
    published = publish(store, model(records(3)))
    assert published.table is None and "table" not in json.loads(store.read("manifest.json"))
    assert published.stored == published.files


@pytest.mark.usefixtures("short")
def test_an_artifact_with_a_table_is_whole_and_every_stage_reads_it(store: Store) -> None:
    manifest = make_corpus(store)
    published = publish(store, manifest)
    assert publish(store, manifest) == published == load_manifest(store, "corpus")
    assert published.table is not None and published.stored == (*manifest.files, published.table)
    assert published.record("classes.json") == manifest.files[2]
    assert verify(store) == []
    summary = describe(store)
    assert summary["whole"] and summary["files"] == 4 and "table" not in summary
    assert summary["bytes"] == sum(record.bytes for record in manifest.files)
    check_sizes(store, published)
    store.delete("part-00001.parquet")
    for problems in (verify(store), describe(store)["problems"]):
        assert len(problems) == 1 and "part-00001.parquet is missing" in problems[0]


@pytest.mark.usefixtures("short")
def test_any_change_of_a_file_changes_the_id(store: Store) -> None:
    manifest = make_corpus(store)
    ids = {publish(store, manifest, "a.json").id}
    for i, (field, value) in enumerate(
        [("bytes", 1), ("sha256", "0" * 64), ("rows", 7), ("info", {"x": 1}), ("name", "other")]
    ):
        changed = manifest.files[2].model_copy(update={field: value})
        files = (*manifest.files[:2], changed, *manifest.files[3:])
        ids.add(publish(store, manifest.model_copy(update={"files": files}), f"{i}.json").id)
    assert len(ids) == 6


@pytest.mark.usefixtures("short")
def test_a_damaged_or_missing_table_is_found(store: Store) -> None:
    table = publish(store, make_corpus(store)).table
    assert table is not None
    data = store.read(table.name)
    for place in range(0, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 1
        store.write(table.name, bytes(changed))
        versions._parsed.cache_clear()
        with pytest.raises(CorruptArtifact, match=f"{table.name} is corrupt: sha256"):
            load_manifest(store)
    assert verify(store) == [str(caught) for caught in [_error_of(store)]]
    store.delete(table.name)
    with pytest.raises(CorruptArtifact, match=f"{table.name} is missing"):
        load_manifest(store)
    store.write(table.name, data)
    assert load_manifest(store).table == table
    store.delete(table.name)  # this process knows the manifest: what is missing is found all the same
    for problems in (verify(store), describe(store)["problems"]):
        assert problems == [f"{store.url}/{table.name} is missing: its manifest lists it with {table.bytes} bytes. "
                            "Restore it from a copy, or delete the artifact and run the stage again"]  # fmt: skip


def _error_of(store: Store) -> CorruptArtifact:
    with pytest.raises(CorruptArtifact) as caught:
        load_manifest(store)
    return caught.value


def test_a_table_of_something_else(store: Store) -> None:
    data = table_bytes(pq.read_table(io.BytesIO(pack(records(2)))).drop_columns(["info"]))
    table = artifact.write_named(store, "files.parquet", data, rows=2)
    manifest = model([]).model_copy(update={"table": table})
    store.write("manifest.json", to_bytes(manifest))
    with pytest.raises(CorruptArtifact, match=rf"{table.name} is no table of files: .*info"):
        load_manifest(store)


@pytest.mark.usefixtures("short")
def test_a_version_of_an_index_has_a_table_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PUBLISH, "MOST_LISTED", 0)
    first, second = make_version(store, 1), make_version(store, 2, ids=("c", "d"))
    assert load_manifest(store) == second and load_manifest(store, key=version_key(1)) == first
    assert first.table != second.table and verify(store) == []


info = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()))


@given(st.lists(st.tuples(st.integers(0, 1 << 60), st.none() | st.integers(0, 1 << 60), info), max_size=5))
def test_any_record_round_trips(values: list[tuple[int, int | None, dict[str, object]]]) -> None:
    files = tuple(
        FileRecord(name=f"ä/{i}", bytes=size, sha256="x", rows=rows, info=fields)
        for i, (size, rows, fields) in enumerate(values)
    )
    assert unpack(pack(files)) == files and pack(files) == pack(unpack(pack(files)))


def test_equal_bytes_are_parsed_once_and_others_never_served(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish(store, make_corpus(store))
    parsed = load_manifest(store)
    assert parsed == manifest and load_manifest(store) is parsed
    other = manifest.model_copy(update={"config": {"source": "elsewhere"}})
    store.write("manifest.json", to_bytes(other))
    assert load_manifest(store) == other != manifest
    store.write("manifest.json", to_bytes(manifest)[:-1])
    with pytest.raises(CorruptArtifact, match=r"manifest\.json is corrupt"):
        load_manifest(store)


def test_the_id_is_computed_once_and_not_copied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish(store, make_corpus(store))
    loaded = load_manifest(store)
    with monkeypatch.context() as patch:
        patch.setattr("hashray.artifact.manifest.canonical", None)  # the id was read, and verified, with the rest
        assert loaded.id == manifest.id
    copy = loaded.model_copy(update={"parents": {"corpus": "1"}})
    assert copy.id != loaded.id and copy.id == Manifest.model_validate(copy.model_dump()).id
    files = loaded.files[:1]
    loaded.record("classes.json")
    with pytest.raises(CorruptArtifact, match="lists no file"):
        loaded.model_copy(update={"files": files}).record("classes.json")


def test_a_plain_name_means_the_first_file_of_it() -> None:
    names = [named("a.json", sha256_hex(b"1")), named("a.json", sha256_hex(b"2")), "b.json"]
    manifest = model([FileRecord(name=name, bytes=1, sha256="") for name in names])
    assert [manifest.record(name).name for name in (*names, "a.json")] == [*names, names[0]]


def test_a_named_file_is_hashed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []
    monkeypatch.setattr(PUBLISH, "sha256_hex", lambda data: hashed.append(data) or sha256_hex(data))
    record = artifact.write_named(store, "x.bin", b"data", rows=4)
    assert hashed == [b"data"] and record.name == f"x-{sha256_hex(b'data')[:12]}.bin" and record.rows == 4
    assert artifact.read_file(store, record) == b"data"


def test_an_id_inside_a_value_is_no_id_of_the_manifest(store: Store) -> None:
    line = f'  "id": "{"0" * 64}",\n'
    config = {"id": "1" * 64, "text": line, "deep": {"id": "2" * 64}}
    manifest = publish(store, make_corpus(store, config=config, info={"id": line}))
    assert load_manifest(store) == manifest and load_manifest(store).config == json.loads(canonical(config))

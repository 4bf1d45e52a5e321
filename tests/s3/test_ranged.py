"""Files of which only ranges are read, and the requests that it takes, counted on a real HTTP server."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import asdict
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_flaky_store import through  # noqa: F401  # a fixture

from hashray.artifact import FileRecord, Manifest, describe, publish, read_columns, table_bytes, verify, write_file
from hashray.errors import CorruptArtifact, InputError, StorageError, StoreUnavailable
from hashray.storage import Store, open_store
from hashray.storage.ranged import TAIL_BYTES, RangedFile, join_spans
from hashray.storage.requests import Requests, total


class Count:
    """The requests within a block, in `.sent` after it."""

    def __enter__(self) -> Count:
        self.before = total()
        return self

    def __exit__(self, *args: object) -> None:
        self.sent = total() - self.before


def rows_table(rows: int, image_bytes: int = 0) -> pa.Table:
    """A corpus's rows; ids do not compress, as hashes of files do not."""
    columns = {
        "id": pa.array([os.urandom(12).hex() for _ in range(rows)]),
        "uri": pa.array([f"s3://photos/{os.urandom(8).hex()}.jpg" for _ in range(rows)]),
        "labels": pa.array([[i % 10, 10 + i % 7] for i in range(rows)], pa.list_(pa.int32())),
        "split": pa.array(["query" if i % 4 == 3 else "database+train" for i in range(rows)]),
    }
    if image_bytes:
        columns["image"] = pa.array([os.urandom(image_bytes) for _ in range(rows)], pa.large_binary())
    return pa.table(columns)


def bytes_of(data: bytes, columns: set[str]) -> int:
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)


@pytest.mark.parametrize(("rows", "image_bytes"), [(200, 0), (9000, 0), (60_000, 0), (900, 5000), (1900, 3000)])
def test_labels_of_a_part_take_few_requests_and_their_own_bytes(s3_url: str, rows: int, image_bytes: int) -> None:
    store, table, columns = open_store(s3_url), rows_table(rows, image_bytes), ["id", "labels", "split"]
    data = table_bytes(table)
    record = write_file(store, "part-0.parquet", data, rows)
    with Count() as count:
        assert read_columns(store, record, columns).equals(table.select(columns))
    assert count.sent.get <= 3
    assert count.sent.bytes_down <= TAIL_BYTES + 2 * bytes_of(data, set(columns))
    assert count.sent == Requests(get=count.sent.get, bytes_down=count.sent.bytes_down)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=8), st.integers(0, 200))
def test_joined_spans_hold_all_and_little_more(places: list[tuple[int, int]], spare: int) -> None:
    spans = [(start, start + length) for start, length in places]
    joined = join_spans(spans, spare)
    wanted = {place for span in spans for place in range(*span)}
    read = {place for span in joined for place in range(*span)}
    assert wanted <= read and len(read) <= len(wanted) + spare
    assert joined == sorted(joined) and all(before[1] <= after[0] for before, after in pairwise(joined))
    assert spare < 300 or len(joined) <= 1


@given(st.data())
def test_a_ranged_file_reads_like_a_file(data: st.DataObject) -> None:
    content = bytes(i % 251 for i in range(data.draw(st.integers(0, 120))))
    tail = data.draw(st.integers(0, len(content)))
    keep = data.draw(st.booleans())
    file = RangedFile(lambda start, n: content[start : start + n], len(content), tail, content[tail:], keep)
    oracle = io.BytesIO(content)
    for _ in range(6):
        if data.draw(st.booleans()):
            edges = st.lists(st.integers(0, len(content)), min_size=2, max_size=2).map(sorted)
            file.fetch([(start, stop) for start, stop in data.draw(st.lists(edges, max_size=4))])
        place, length = data.draw(st.integers(0, 130)), data.draw(st.integers(-1, 130))
        assert file.seek(place) == oracle.seek(place)
        assert file.read(length) == oracle.read(length) and file.tell() == oracle.tell()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_opening_knows_the_size_from_the_first_answer(s3_url: str) -> None:
    store = open_store(s3_url)
    for size in (0, 5, TAIL_BYTES, TAIL_BYTES + 5):
        store.write("x", os.urandom(size))
        for ranged in (True, False):
            with Count() as count, store.open("x", ranged=ranged) as file:
                assert file.seek(0, 2) == size
            assert (count.sent.get, count.sent.head) == (1, 0)
    for ranged in (True, False):
        with pytest.raises(InputError, match="nothing-here not found"):
            store.open("nothing-here", ranged=ranged)
        with pytest.raises(StorageError, match="does not exist"):
            open_store("s3://no-such-bucket/x").open("x", ranged=ranged)


def test_a_small_tar_is_one_request(s3_url: str) -> None:
    store, buffer = open_store(s3_url), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(50):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 1000
            tar.addfile(member, io.BytesIO(os.urandom(1000)))
    store.write("shard.tar", buffer.getvalue())
    with Count() as count, store.open("shard.tar") as file, tarfile.open(fileobj=file) as tar:
        assert len(tar.getmembers()) == 50
    assert (count.sent.get, count.sent.bytes_down) == (1, len(buffer.getvalue()))


def test_a_server_that_ignores_ranges_still_serves_columns(through) -> None:  # noqa: F811
    def drop_range(number, request):
        del request.headers["Range"]

    store, _ = through(drop_range)
    table = rows_table(3000)
    record = write_file(store, "part-0.parquet", table_bytes(table), 3000)
    assert read_columns(store, record, ["labels"]).equals(table.select(["labels"]))


def test_columns_survive_failing_requests_and_broken_bodies(through, monkeypatch) -> None:  # noqa: F811
    store, proxy = through(lambda number, request: (503, "cut", None)[number % 3] if request.command == "GET" else None)
    table = rows_table(3000)
    record = write_file(store, "part-0.parquet", table_bytes(table), 3000)
    assert read_columns(store, record, ["id"]).equals(table.select(["id"]))
    assert {"GET 503", "GET cut"} <= set(proxy.failed)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    gets = []
    down, _ = through(
        lambda number, request: 503 if (request.command == "GET" and gets.append(1)) or len(gets) > 1 else None
    )
    with pytest.raises(StoreUnavailable, match="kept answering 503"):
        read_columns(down, record, ["id"])  # the footer comes, its columns do not


def test_every_kind_of_request_is_counted(s3_url: str) -> None:
    store = open_store(s3_url)
    with Count() as count:
        store.write("a", b"12345")
        store.create("b", b"123")
        store.read("a")
        assert store.size("a") == 5 and not store.exists("c")  # the second asks for the bucket, too
        keys = list(store.list())
        store.delete("a")
        store.clear("b")
    sent = asdict(count.sent)
    assert len(keys) == 2 and sent.pop("bytes_up") >= 8 and sent.pop("bytes_down") >= 5
    assert sent == {"get": 1, "put": 2, "head": 3, "list": 2, "delete": 2}


def test_retries_are_requests(through) -> None:  # noqa: F811
    store, proxy = through(lambda number, request: 503 if number < 4 else None)
    with Count() as count:
        store.write("x", b"1")
    assert count.sent.put == proxy.count == 4


def artifact_of(store: Store, parts: int) -> Manifest:
    files: list[FileRecord] = []
    for number in range(parts):
        files.append(write_file(store, f"part-{number}.parquet", table_bytes(rows_table(3000)), 3000))
    return publish(store, Manifest(kind="corpus", project_version="0", config={}, parents={}, files=tuple(files)))


def test_describe_and_verify_list_once_and_read_a_small_part_once(s3_url: str) -> None:
    """And a second time the ids: with the footer, and for what the footer does not hold of them."""
    store = open_store(s3_url)
    manifest = artifact_of(store, 6)
    with Count() as count:
        assert describe(store)["whole"]
    assert (count.sent.get, count.sent.head, count.sent.list) == (1, 1, 1)
    with Count() as count:
        assert verify(store) == []
    assert (count.sent.get, count.sent.head, count.sent.list) == (1 + 3 * 6, 1, 1)
    store.delete(manifest.files[2].name)
    store.write(manifest.files[3].name, b"short")
    whole = describe(store)
    assert [text.split(f"{store.url}/")[1][:24] for text in whole["problems"]] == [
        "part-2.parquet is missin", "part-3.parquet has 5 byt",
    ]  # fmt: skip
    assert verify(store) == whole["problems"]
    with pytest.raises(CorruptArtifact, match=r"part-2\.parquet is missing"):
        read_columns(store, manifest.files[2], ["id"])

"""What the user reads when a url, a bucket, the credentials or the endpoint do not work."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from hashray.errors import InputError, StorageError, StoreUnavailable
from hashray.storage import join, open_store, split_url


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("gs://bucket/x", "gs:// is not supported; allowed are a local folder or s3://bucket/prefix"),
        ("http://host/x", "http:// is not supported"),
        ("s3://", "not of the form s3://bucket/prefix"),
        (Path("s3://bucket/x"), "pathlib.Path drops a slash"),
        ("", "an empty path was given"),
    ],
)
def test_unusable_urls(url, text):
    with pytest.raises(InputError) as caught:
        open_store(url)
    assert text in str(caught.value)


def test_join_and_split():
    assert join("/data/", "/x/", "y") == "/data/x/y"
    assert join("s3://b", "x") == "s3://b/x"
    for url in ("s3://b/p/x.txt", "s3://b/x.txt", "/x.txt", "/a/x.txt", "a/x.txt"):
        assert join(*split_url(url)) == url
    assert split_url("/x.txt") == ("/", "x.txt")
    for url in ("s3://bucket", "/", "", "s3://"):
        with pytest.raises(InputError, match="does not name a file"):
            split_url(url)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    store = open_store(tmp_path / "file")
    for call in (lambda: store.write("x", b""), lambda: store.read("x"), lambda: store.create("x", b"")):
        with pytest.raises(InputError, match="a part of this path is a file, not a folder"):
            call()
    (tmp_path / "folder").mkdir()
    for call in (open_store(tmp_path).read, open_store(tmp_path).size, open_store(tmp_path).open):
        with pytest.raises(InputError, match="is a folder, a file was expected"):
            call("folder")


def test_no_such_bucket(s3_server):
    store = open_store("s3://no-such-bucket/x")
    calls = [store.read, store.exists, store.size, store.open, lambda key: store.write(key, b"1")]
    calls += [lambda key: store.create(key, b"1"), lambda key: list(store.list())]
    for call in calls:
        with pytest.raises(
            StorageError, match=r"bucket 'no-such-bucket' does not exist at http://.*create it, or check"
        ):
            call("k")


def test_a_bucket_name_that_cannot_be(s3_server):
    with pytest.raises(InputError, match="Invalid bucket name"):
        open_store("s3://no such bucket/x").read("k")


@pytest.mark.parametrize("code", ["KeyTooLongError", "InvalidObjectState"])
def test_a_fault_of_one_object(code, s3_url, monkeypatch):
    def refused(request):
        answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(answer, "GetObject")

    monkeypatch.setattr("hashray.storage.s3._read_body", refused)
    with pytest.raises(InputError, match=code):
        open_store(s3_url).read("k")


def test_no_credentials_and_then_some(s3_url, monkeypatch):
    store = open_store(s3_url)
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(StorageError, match=r"AWS_SECRET_ACCESS_KEY.*|AWS_ACCESS_KEY_ID") as caught:
            store.read("x")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(
            StorageError, match=r"no usable credentials.*set AWS_ACCESS_KEY_ID and.*or AWS_PROFILE"
        ) as caught:
            store.read("x")
        assert caught.value.exit_code == 2
    store.write("x", b"1")


def test_unknown_profile(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="nobody"):
        open_store(s3_url).read("x")


def test_endpoint_that_is_no_url(s3_server):
    with pytest.raises(StorageError, match="endpoint 'localhost:9000' is not a url such as http://host:9000"):
        open_store("s3://b", endpoint_url="localhost:9000").read("x")


def test_nobody_listens_at_the_endpoint(s3_server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as taken:  # bound, never listening: the port refuses
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            StoreUnavailable, match=f"no answer from the store at {endpoint}.*AWS_ENDPOINT_URL"
        ) as caught:
            open_store("s3://bucket/x", endpoint_url=endpoint).read("k")
    assert caught.value.exit_code == 1

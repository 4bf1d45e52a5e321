"""Credentials that expire: every process asks its provider again, and no key is kept in what travels."""

from __future__ import annotations

import http.client
import json
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny import BACKBONE, METHOD, command, write_corpus, write_toml

from hashray import artifact
from hashray.cli import main
from hashray.errors import StorageError
from hashray.storage import open_store
from hashray.storage.s3 import arrow_filesystem


class Account:
    """A credentials provider as a container has it, and an S3 server that takes the newest token alone.

    With `requests_a_token` a token is the newest for that number of requests; then the provider has another.

    Attributes:
        overlap: the number of tokens before the newest that the server takes too.
        late: the provider gives the token before the newest until this number of requests is refused.
    """

    def __init__(self, s3_server: str) -> None:
        self.number, self.refused, self.behind = 1, 0, urlsplit(s3_server)
        self.requests_a_token: int | None = None
        self.taken, self.late, self.overlap, self.lock = 0, 0, 0, threading.Lock()
        account = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                if self.path == "/credentials":
                    soon = datetime.now(UTC) + timedelta(seconds=3)  # so soon that it is asked for again at once
                    account_keys = {"AccessKeyId": "a", "SecretAccessKey": "s", "Token": f"token-{account.offered()}"}
                    self.reply(200, json.dumps({**account_keys, "Expiration": f"{soon:%Y-%m-%dT%H:%M:%SZ}"}).encode())
                    return
                body = self.body()
                if not account.takes(self.headers.get("X-Amz-Security-Token")):
                    self.reply(400, b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>")
                    return
                server = http.client.HTTPConnection(str(account.behind.hostname), account.behind.port)
                skip = ("expect", "transfer-encoding", "content-length", "connection")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in skip}
                server.request(self.command, self.path, body, headers)
                response = server.getresponse()
                length = response.getheader("Content-Length") if self.command == "HEAD" else None
                self.reply(response.status, response.read(), dict(response.getheaders()), length)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                pieces = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)

            def reply(
                self, status: int, body: bytes, headers: dict[str, str] | None = None, length: str | None = None
            ) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                self.wfile.write(body if self.command != "HEAD" else b"")

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815  # names of http.server

            def log_message(self, *words: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def offered(self) -> int:
        """The number of the token that the provider gives."""
        return self.number - (self.late > 0)

    def takes(self, token: str | None) -> bool:
        """Count a request with this token; say whether it is good."""
        with self.lock:
            if token not in {f"token-{self.number - before}" for before in range(self.overlap + 1)}:
                self.refused, self.late = self.refused + 1, max(0, self.late - 1)
                return False
            self.taken += 1
            if self.requests_a_token and self.taken >= self.requests_a_token:
                self.number, self.taken = self.number + 1, 0
            return True


@pytest.fixture
def account(s3_server: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    account = Account(s3_server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{account.url}/credentials")
    yield account
    account.server.shutdown()


def test_a_token_that_expires_is_asked_for_again(account: Account, s3_url: str) -> None:
    store = open_store(s3_url, endpoint_url=account.url)
    store.write("a", b"one")
    filesystem, path = arrow_filesystem(store)
    with filesystem.open_output_stream(f"{path}/b") as sink:
        sink.write(b"two")
    travels = pickle.dumps(filesystem)
    assert b"token-1" not in travels
    account.number = 2  # the first token is worth nothing from here on
    with pickle.loads(travels).open_input_stream(f"{path}/b") as source:
        assert source.read() == b"two"
    with filesystem.open_output_stream(f"{path}/c") as sink:
        sink.write(b"three")
    assert store.read("a") == b"one" and store.read("c") == b"three"


def test_a_request_that_was_refused_with_an_old_token_is_sent_again(
    account: Account, s3_url: str, tmp_path: Path
) -> None:
    store, file = open_store(s3_url, endpoint_url=account.url), tmp_path / "file"
    file.write_bytes(b"file")
    requests: list[Callable[[], Any]] = [
        lambda: store.write("a", b"data"), lambda: store.create("b", b"data"), lambda: store.upload("c", file),
        lambda: store.read("a"), lambda: store.size("a"), lambda: [*store.list("")], lambda: store.delete("b"),
    ]  # fmt: skip
    for request in requests:
        account.number, account.late, refused = account.number + 1, 1, account.refused
        request()
        assert account.refused == refused + 1
    assert [*store.list("")] == [("a", 4), ("c", 4)] and store.read("c") == b"file"
    account.number, account.late = account.number + 1, 1000  # nothing newer comes
    with pytest.raises(StorageError, match="access denied"):
        store.read("a")


def train_words(tmp_path: Path, s3_url: str, *words: str) -> list[str]:
    """A tiny training from S3 to S3, with a checkpoint every few steps."""
    training = {
        "method": {**METHOD, "rounds": 1, "label_epochs": 3}, "backbone": BACKBONE, "epochs": 3, "batch_size": 8,
        "validation_rows": 4, "checkpoint_steps": 1, "cpus_per_worker": 0.5,
    }  # fmt: skip
    config = write_toml(tmp_path / "c.toml", training)
    return ["train", config, "--corpus", f"{s3_url}/corpus", "--out", f"{s3_url}/model", *words]


def test_a_training_goes_on_while_its_tokens_expire(
    account: Account, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", account.url)
    write_corpus(f"{s3_url}/corpus", 40, 10)
    account.requests_a_token, first = 5, account.number
    assert main(train_words(tmp_path, s3_url, "--ray", "never")) == 0
    assert account.number >= first + 10
    assert artifact.verify(f"{s3_url}/model") == []


@pytest.mark.slow
@pytest.mark.parametrize("input_", ["memory", "stream"])
def test_a_training_on_ray_goes_on_while_its_tokens_expire(
    account: Account, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, input_: str
) -> None:
    """In a process of its own, whose Ray knows this provider alone.

    Ray Train uploads the checkpoints with Arrow, which asks for a new token in time, and does not send a refused
    request again: as everywhere, a token is good for a while after the provider has the next.
    """
    monkeypatch.setenv("AWS_ENDPOINT_URL", account.url)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_corpus(f"{s3_url}/corpus", 40, 10)
    account.requests_a_token, account.overlap, first = 5, 1, account.number
    words = train_words(tmp_path, s3_url, "--ray", "always", "--input", input_)
    ended = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert account.number >= first + 10
    assert artifact.verify(f"{s3_url}/model") == []

"""Credentials that expire: every process asks its provider again, and no key is kept in what travels."""

from __future__ import annotations

import http.client
import json
import pickle
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from hashray.storage import open_store
from hashray.storage.s3 import arrow_filesystem


class Account:
    """A credentials provider as a container has it, and an S3 server that takes the newest token alone."""

    def __init__(self, s3_server: str) -> None:
        self.number, self.refused, self.behind = 1, 0, urlsplit(s3_server)
        account = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                if self.path == "/credentials":
                    soon = datetime.now(UTC) + timedelta(seconds=3)  # so soon that it is asked for again at once
                    account_keys = {"AccessKeyId": "a", "SecretAccessKey": "s", "Token": f"token-{account.number}"}
                    self.reply(200, json.dumps({**account_keys, "Expiration": f"{soon:%Y-%m-%dT%H:%M:%SZ}"}).encode())
                    return
                body = self.body()
                if self.headers.get("X-Amz-Security-Token") != f"token-{account.number}":
                    account.refused += 1
                    self.reply(403, b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>")
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
                self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815  # names of http.server

            def log_message(self, *words: object) -> None:
                """Print nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


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

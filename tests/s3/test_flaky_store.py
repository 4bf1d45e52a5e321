"""Stores that misbehave: a real HTTP proxy in front of the server fails requests, loses answers, drops headers."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from hashray.artifact import Manifest, is_finished, load_manifest, publish, verify, write_file
from hashray.errors import AlreadyExists, InputError, StorageError, StoreUnavailable
from hashray.storage import Store, check_conditional_put, open_store

CODES = {
    400: "InvalidArgument",
    401: "Unauthorized",
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    501: "NotImplemented",
    503: "SlowDown",
}


class Proxy(ThreadingHTTPServer):
    """Forwards to the server what `rule` lets through.

    `rule(number, request)` is asked for every request, numbered from 1, and returns None (forward), a
    status (answer it instead), "lose" (forward, then answer 503), "cut" (forward, break the body off
    half way) or "ignore-condition" (forward without If-None-Match).
    """

    daemon_threads = True

    def __init__(self, upstream: str, rule: Callable[[int, BaseHTTPRequestHandler], int | str | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.rule = urlsplit(upstream).netloc, rule
        self.lock, self.count = threading.Lock(), 0
        self.failed: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.count += 1
            action = self.server.rule(self.server.count, self)
            if action is not None:
                self.server.failed.append(f"{self.command} {action}")
        if isinstance(action, int):
            self.answer(action, f"<Error><Code>{CODES[action]}</Code><Message>by rule</Message></Error>".encode())
            return
        headers = dict(self.headers.items())
        if action == "ignore-condition":
            headers.pop("If-None-Match")
        upstream = http.client.HTTPConnection(self.server.upstream)
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        data = response.read()
        if action == "lose":
            self.answer(503, b"")
        else:
            self.answer(response.status, data, response.getheaders(), cut=action == "cut")
        upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def answer(self, status: int, data: bytes, headers=(), cut: bool = False) -> None:
        self.send_response(status)
        kept = [(name, value) for name, value in headers if name.lower() not in ("transfer-encoding", "connection")]
        if not any(name.lower() == "content-length" for name, _ in kept):
            kept.append(("Content-Length", str(len(data))))
        for name, value in kept:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut


@pytest.fixture
def through(s3_server, s3_url, monkeypatch) -> Iterator[Callable[..., tuple[Store, Proxy]]]:
    """Make a store behind a proxy with a rule; retries do not wait."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *args, **kwargs: 0)
    monkeypatch.setattr("hashray.storage.s3.CONFLICT_WAIT_S", 0)
    proxies = []

    def make(rule) -> tuple[Store, Proxy]:
        proxies.append(Proxy(s3_server, rule))
        return open_store(s3_url, endpoint_url=proxies[-1].endpoint), proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def manifest(store: Store, name: str = "weights") -> Manifest:
    record = write_file(store, name, b"data", info={"by": "test"})
    return Manifest(kind="model", project_version="0", config={"name": name}, parents={}, files=(record,))


def test_every_third_request_fails(through, tmp_path):
    store, proxy = through(lambda number, request: 503 if number % 3 == 0 else None)
    for number in range(12):
        store.write(f"x/{number:02d}", bytes([number]) * 1000)
    assert [size for _, size in store.list("x/")] == [1000] * 12
    for number in range(12):
        assert store.read(f"x/{number:02d}") == bytes([number]) * 1000
        assert store.read_range(f"x/{number:02d}", 10, 5) == bytes([number]) * 5
        store.create(f"v/{number}", b"first")
        with pytest.raises(AlreadyExists):
            store.create(f"v/{number}", b"second")
        assert store.read(f"v/{number}") == b"first" and not store.exists(f"w/{number}")
    store.download("x/03", tmp_path / "x")
    store.upload("y", tmp_path / "x")
    with store.open("y") as file:
        assert file.read() == b"\x03" * 1000
    store.delete("y")
    check_conditional_put(store)
    assert {text.split()[0] for text in proxy.failed} >= {"GET", "PUT", "HEAD"}


def test_a_store_that_is_down_says_so(through, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store, proxy = through(lambda number, request: 503)
    for call in (store.read, store.exists, lambda key: store.write(key, b""), lambda key: store.create(key, b"")):
        with pytest.raises(StoreUnavailable, match=f"the store at {proxy.endpoint} kept answering 503.*run it again"):
            call("k")
    assert proxy.count == 8


def test_a_multipart_upload_survives_and_a_failing_one_is_translated(through, tmp_path, monkeypatch):
    monkeypatch.setattr("hashray.storage.s3.SINGLE_REQUEST_BYTES", 1 << 20)
    (tmp_path / "big").write_bytes(bytes(6 << 20))
    store, _ = through(lambda number, request: 503 if number % 3 == 0 else None)
    store.upload("big", tmp_path / "big")
    store.download("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == bytes(6 << 20)
    down, _ = through(lambda number, request: 503)
    with pytest.raises(StoreUnavailable, match="kept answering 503"):
        down.upload("big", tmp_path / "big")
    with pytest.raises(StoreUnavailable, match="kept answering 503"):
        down.write("big", bytes(2 << 20))
    denied, _ = through(lambda number, request: 403)
    with pytest.raises(StorageError, match="access denied"):
        denied.upload("big", tmp_path / "big")


def test_a_body_that_breaks_off_is_read_again(through):
    store, proxy = through(lambda number, request: "cut" if request.command == "GET" and number % 3 else None)
    store.write("x", b"0123456789" * 1000)
    assert store.read("x") == b"0123456789" * 1000
    assert "GET cut" in proxy.failed
    broken, proxy = through(lambda number, request: "cut" if request.command == "GET" else None)
    with pytest.raises(StoreUnavailable, match=f"no answer from the store at {proxy.endpoint}"):
        broken.read("x")


def test_a_publish_whose_answer_is_lost_succeeds(through):
    puts = []

    def lose_first_conditional(number, request):
        if request.headers.get("If-None-Match") and request.path.endswith("/manifest.json"):  # not the probe
            puts.append(number)
            return "lose" if len(puts) == 1 else None
        return None

    store, _ = through(lose_first_conditional)
    mine = manifest(store)
    assert publish(store, mine) == mine  # the retry met 412, and the bytes there are ours
    assert len(puts) == 2 and load_manifest(store) == mine and verify(store) == []


def test_create_whose_answer_is_lost_claims_nothing(through):
    """It cannot know whether it won, so it raises: at most one writer returns."""
    puts = []
    store, _ = through(
        lambda number, request: "lose" if request.command == "PUT" and not puts.append(1) and len(puts) == 1 else None
    )
    with pytest.raises(AlreadyExists):
        store.create("x", b"mine")
    assert store.read("x") == b"mine"


def test_a_publish_that_loses_names_the_winner(through):
    store, _ = through(lambda number, request: 503 if number % 3 == 0 else None)
    winner = publish(store, manifest(store, "a"))
    with pytest.raises(
        AlreadyExists, match=f"is a model with id {winner.id[:12]}, written by hashray 0, not this model"
    ):
        publish(store, manifest(store, "b"))
    assert load_manifest(store) == winner


def test_a_conflict_is_tried_again(through):
    """409 says that another write is under way, not that it will win."""
    store, proxy = through(lambda number, request: 409 if number <= 3 else None)
    store.create("x", b"mine")
    assert proxy.count == 4 and store.read("x") == b"mine"
    stuck, _ = through(lambda number, request: 409 if request.command == "PUT" else None)
    with pytest.raises(AlreadyExists, match="x already exists"):
        stuck.create("x", b"other")
    with pytest.raises(StoreUnavailable, match="conditional writes all met another one; run it again"):
        stuck.create("y", b"other")


def test_the_probe_refuses_a_store_that_ignores_the_condition(through):
    store, _ = through(lambda number, request: "ignore-condition" if request.headers.get("If-None-Match") else None)
    with pytest.raises(
        StorageError, match=r"does not keep the promise of `If-None-Match: \*`.*index could be lost"
    ) as caught:
        check_conditional_put(store)
    assert store.url in str(caught.value) and caught.value.exit_code == 2
    assert not is_finished(store)
    import boto3

    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=store.bucket)  # the probe is gone


def test_the_probe_refuses_a_store_that_does_not_know_the_condition(through):
    store, _ = through(lambda number, request: 501 if request.headers.get("If-None-Match") else None)
    with pytest.raises(StorageError, match="does not keep the promise"):
        check_conditional_put(store)


def test_a_lost_answer_does_not_fool_the_probe(through):
    store, _ = through(lambda number, request: "lose" if number == 1 else None)
    check_conditional_put(store)


@pytest.mark.parametrize("status", [401, 403])
def test_access_denied(through, status):
    store, proxy = through(lambda number, request: status)
    for call in (store.read, store.exists, lambda key: store.create(key, b""), lambda key: list(store.list())):
        with pytest.raises(StorageError, match=f"access denied at {proxy.endpoint}.*AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
            call("k")


def test_other_refusals_carry_the_servers_words(through):
    store, _ = through(lambda number, request: 400)
    with pytest.raises(StorageError, match=r"k: the store at http.* refused the request: .*by rule"):
        store.write("k", b"")


def test_a_server_that_ignores_ranges(through):
    def drop_range(number, request):
        del request.headers["Range"]

    store, _ = through(drop_range)
    store.write("x", b"0123456789")
    assert store.read_range("x", 3, 4) == b"3456"
    with pytest.raises(InputError, match="gone not found at http"):
        store.read("gone")

"""The clients of the service: against the service itself, and against a server that fails in every way there is."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import behind_socket, config_of, write_all
from tiny import png

import hashray
from hashray.client import Answer, AsyncClient, Client, Query, ServiceVersion
from hashray.client.calls import plain_query
from hashray.data.images import decode
from hashray.errors import HashrayError, InputError, RequestError, ServiceUnavailable
from hashray.search.guard import SafetyConfig

ANSWER = {
    "version": 2, "index": "main", "num_bits": 16, "rows": 60, "query": {"id": "a/1.jpg", "code": "00ff"},
    "hits": [{"id": "b/2.jpg", "distance": 3, "code": "01ff", "attributes": {"class": "cat"}}],
    "more": True, "degraded": True, "missing_shards": 1, "took_ms": 2.5, "request_id": "r1",
    "something_newer": [1],
}  # fmt: skip

Step = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next step of the script, and notes what it was asked."""

    steps: list[Step]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append({"path": self.path, "headers": self.headers, "body": body})
        self.steps.pop(0)(self)

    do_GET = do_POST  # noqa: N815  # as http.server calls it

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


def reply(status: int, body: Any = None, **headers: str) -> Step:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def step(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return step


def drop(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def drop_amid_body(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"version"')
    drop(handler)


@contextmanager
def scripted(*steps: Step) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers by a script; its url, and the list of what it was asked."""
    handler = type("Scripted", (Handler,), {"steps": list(steps), "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


class Clock:
    """A clock that only its own sleeps, and the server, move."""

    def __init__(self) -> None:
        self.time_s, self.waits = 0.0, list[float]()

    def now(self) -> float:
        return self.time_s

    def sleep(self, wait_s: float) -> None:
        self.waits.append(wait_s)
        self.time_s += wait_s

    async def async_sleep(self, wait_s: float) -> None:
        self.sleep(wait_s)


def ask_waiting(url: str, clock: Clock, **settings: Any) -> Answer:
    with Client(url, sleep=clock.sleep, now=clock.now, **settings) as client:
        return client.search(id="a/1.jpg")


def ask_awaited(url: str, clock: Clock, **settings: Any) -> Answer:
    async def run() -> Answer:
        async with AsyncClient(url, sleep=clock.async_sleep, now=clock.now, **settings) as client:
            return await client.search(id="a/1.jpg")

    return asyncio.run(run())


@pytest.fixture(params=[ask_waiting, ask_awaited])
def ask(request: pytest.FixtureRequest) -> Callable[..., Answer]:
    return request.param


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_answer_is_read_into_frozen_objects(ask: Callable[..., Answer], clock: Clock) -> None:
    with scripted(reply(200, ANSWER)) as (url, asked):
        answer = ask(url, clock)
    assert (answer.hits[0].id, answer.hits[0].distance, answer.hits[0].attributes) == ("b/2.jpg", 3, {"class": "cat"})
    assert (answer.version, answer.query_id, answer.query_code, answer.degraded) == (2, "a/1.jpg", "00ff", True)
    assert asked[0]["path"] == "/search" and json.loads(asked[0]["body"]) == {
        "id": "a/1.jpg", "k": 10, "offset": 0, "index": "main"
    }  # fmt: skip
    with pytest.raises(AttributeError):
        answer.version = 3  # type: ignore[misc]


@pytest.mark.parametrize("fault", [reply(429, {}), reply(502, b"bad gateway"), reply(503, {}), reply(504, {}), drop,
                                   drop_amid_body])  # fmt: skip
def test_what_may_go_over_is_sent_again_with_the_same_id(ask: Callable[..., Answer], clock: Clock, fault: Step) -> None:
    with scripted(fault, fault, reply(200, ANSWER)) as (url, asked):
        assert ask(url, clock).version == 2
    assert len(asked) == 3 and len({line["headers"]["X-Request-Id"] for line in asked}) == 1
    assert len({line["body"] for line in asked}) == 1
    first, second = clock.waits
    assert 0.05 <= first <= 0.1 <= second <= 0.2


def test_retry_after_is_the_shortest_wait(ask: Callable[..., Answer], clock: Clock) -> None:
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    with scripted(reply(503, {}, Retry_After="3"), reply(429, {}, Retry_After=date), reply(200, ANSWER)) as (url, _):
        ask(url, clock)
    assert 3.05 <= clock.waits[0] <= 3.1 and 0.1 <= clock.waits[1] <= 0.2


def test_a_wait_beyond_the_deadline_is_not_waited(ask: Callable[..., Answer], clock: Clock) -> None:
    busy = reply(503, {"error": "a shard is missing", "request_id": "r9"}, Retry_After="60")
    with scripted(busy) as (url, asked), pytest.raises(ServiceUnavailable) as failed:
        ask(url, clock)
    assert clock.waits == [] and len(asked) == 1
    assert "answered 503: a shard is missing (request r9) (1 try in 0.0 of 10 s)" in str(failed.value)


def test_tries_end(ask: Callable[..., Answer], clock: Clock) -> None:
    with scripted(*[drop] * 9) as (url, asked), pytest.raises(ServiceUnavailable, match=r"does not answer: .*3 tries"):
        ask(url, clock, retries=2)
    assert len(asked) == 3


def test_nothing_listens(ask: Callable[..., Answer], clock: Clock) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{port} does not answer: .*5 tries.*hashray serve"):
        ask(f"http://127.0.0.1:{port}", clock)
    assert len(clock.waits) == 4


def test_an_answer_that_comes_too_slowly_is_given_up(ask: Callable[..., Answer], clock: Clock) -> None:
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(3):  # each chunk well within the timeout, all of them not
            handler.wfile.write(b" ")
            clock.time_s += 6
        handler.wfile.write(json.dumps(ANSWER).encode())
        drop(handler)

    with scripted(drip) as (url, _), pytest.raises(ServiceUnavailable, match="no whole answer in 10 s"):
        ask(url, clock)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422])
def test_a_wrong_request_is_not_sent_again(ask: Callable[..., Answer], clock: Clock, status: int) -> None:
    refusal = reply(status, {"error": "k: at most 1000", "request_id": "r7"})
    with scripted(refusal) as (url, asked), pytest.raises(RequestError) as failed:
        ask(url, clock)
    assert str(failed.value) == f"{url} refused the request ({status}): k: at most 1000 (request r7)"
    assert len(asked) == 1 and failed.value.exit_code == 2


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (reply(500, b"<html>oops"), "answered 500: <html>oops"),
        (reply(500, b""), "answered 500: an empty body"),
        (reply(301, b"", Location="https://elsewhere/"), "redirects to https://elsewhere/"),
        (reply(200, b"\xff not json"), "no answer of hashray serve"),
        (reply(200, b"[]"), "no answer of hashray serve"),
        (reply(200, {**ANSWER, "hits": [{"id": "x"}]}), "no answer of hashray serve"),
        (reply(404, {"error": {}}), "refused"),
        (reply(503, ["error"]), "1 try"),
        (reply(200, b"[" * 100_000), "no answer of hashray serve"),
        (reply(503, b"[" * 100_000), "1 try"),
        (reply(200, b"not gzip", Content_Encoding="gzip"), "does not answer"),
    ],
)
def test_answers_that_are_none(ask: Callable[..., Answer], clock: Clock, step: Step, text: str) -> None:
    with scripted(step) as (url, _), pytest.raises(HashrayError) as failed:
        ask(url, clock, retries=0)
    assert text in str(failed.value)


def test_a_batch_with_an_answer_too_few_is_no_answer(clock: Clock) -> None:
    with (
        scripted(reply(200, {"answers": [ANSWER]})) as (url, _),
        pytest.raises(ServiceUnavailable, match="1 answers to 2 queries"),
    ):
        Client(url, sleep=clock.sleep).search_batch(["a", "b"])


URLS = ["127.0.0.1:8000", "ftp://host", "http://", "", "http://[::1", "http://host:port", "http://\0", "http://h?x=1"]


@pytest.mark.parametrize("url", [*URLS, "http://ann:s3cret@host:1", "http://ann:s3cret@host:port"])
def test_an_url_that_is_none(url: str) -> None:
    with pytest.raises(InputError, match="expected http://host:port") as failed:
        Client(url)
    assert "s3cret" not in str(failed.value)


def test_a_token_is_sent_as_one_line_and_never_shown(ask: Callable[..., Answer], clock: Clock) -> None:
    with scripted(*[reply(200, ANSWER)] * 2) as (url, asked):
        ask(url, clock, token="s3cret\n")  # as it comes from a file
        ask(url, clock, token="s3crét")
    heads = [one["headers"]["Authorization"].encode("latin1").decode() for one in asked]
    assert heads == ["Bearer s3cret", "Bearer s3crét"]
    with pytest.raises(InputError, match="line feed") as failed:
        ask("http://127.0.0.1:9", clock, token="s3cret\r\nX: y")
    assert "s3cret" not in str(failed.value)


def test_readiness_of_a_server_that_speaks_nonsense() -> None:
    with scripted(reply(200, b"not gzip", Content_Encoding="gzip")) as (url, _), Client(url) as client:
        assert not client.ready()


def _file(mode: str, kind: str, turn: int) -> bytes:
    pixels = np.random.default_rng(turn).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200) if mode == "I;16" else image.convert(mode)
    exif, sink = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    image.save(sink, kind, exif=exif)
    return sink.getvalue()


KINDS = [("PNG", mode) for mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")]


@pytest.mark.parametrize(
    ("kind", "mode"), [*KINDS, ("TIFF", "LA"), ("TIFF", "CMYK"), ("JPEG", "RGB"), ("JPEG", "CMYK")]
)
@pytest.mark.parametrize("turn", [1, 6])
def test_a_pil_image_is_seen_as_its_file_is(kind: str, mode: str, turn: int) -> None:
    data = _file(mode, kind, turn)
    sent = plain_query(Query(image=Image.open(io.BytesIO(data))))["image"]
    assert isinstance(sent, bytes)
    np.testing.assert_array_equal(np.asarray(decode(sent)), np.asarray(decode(data)))


def test_queries_that_are_none(tmp_path: Path) -> None:
    client = Client("http://127.0.0.1:9")
    with pytest.raises(InputError, match="exactly one"):
        client.search()
    with pytest.raises(InputError, match="exactly one"):
        client.search("a", id="b")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        client.search(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="cannot be read: embedded null"):
        client.search(path="a\0b")
    with pytest.raises(InputError, match="cannot be sent"):
        client.search(id="\ud800")
    with pytest.raises(InputError, match="int is no query"):
        client.search(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected hexadecimal text"):
        client.search(code=np.zeros((1, 2), np.uint8))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The service itself, and the same behind a token."""
    at = write_all(tmp_path_factory.mktemp("client"))
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    guarded = config_of(at, safety=SafetyConfig(token_file=str(token)))
    with behind_socket(config_of(at)) as (url, _), behind_socket(guarded) as (guarded_url, _):
        yield url, guarded_url


def test_every_kind_of_query_has_the_same_answer(served: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "0007.png"
    file.write_bytes(png(7))
    picture = Image.open(io.BytesIO(png(7)))
    with Client(served[0]) as client:
        by_id = client.search("0007")
        code = by_id.query_code
        answers = [
            client.search(**query)
            for query in ({"query": str(file)}, {"query": file}, {"path": str(file)}, {"query": png(7)},
                          {"query": picture}, {"query": picture.convert("CMYK").convert("RGB")}, {"code": code},
                          {"code": bytes.fromhex(code)}, {"code": np.frombuffer(bytes.fromhex(code), np.uint8)})
        ]  # fmt: skip
        batch = client.search_batch([file, "0007", picture, Query(code=code), Query(id="0007")])
    assert by_id.query_id == "0007" and by_id.hits[0].distance == 0 and len(by_id.hits) == 10
    assert all(answer.hits == by_id.hits for answer in [*answers, *batch])


def test_options_reach_the_service(served: tuple[str, str]) -> None:
    with Client(served[0]) as client:
        for query in ("0007", png(7)):
            whole = client.search(query, k=60)
            assert client.search(query, k=5, offset=3).hits == whole.hits[3:8]
            near = client.search(query, k=60, within=whole.hits[5].distance)
            assert near.hits == tuple(hit for hit in whole.hits if hit.distance <= whole.hits[5].distance)
            name = whole.hits[0].attributes["class"]
            some = client.search(query, k=60, where=f"class == '{name}'")
            assert 0 < len(some.hits) < 60 and {hit.attributes["class"] for hit in some.hits} == {name}
            assert client.search(query, version=2, k=60).rows == 20
    with pytest.raises(RequestError, match="at most 1,000"):
        Client(served[0]).search("0007", k=2000)


def test_images_version_and_readiness(served: tuple[str, str]) -> None:
    url, guarded = served
    with Client(url) as client:
        assert client.image("0007", size=0) == png(7)
        assert Image.open(io.BytesIO(client.image("0007", size=32))).size == (16, 16)  # never enlarged
        with pytest.raises(RequestError, match="less than or equal to 1024"):
            client.image("0007", size=2000)
        facts = client.version()
        assert isinstance(facts, ServiceVersion) and facts.images and facts.indexes[0].rows == 60
        assert facts.indexes[0].versions == (1, 2, 3, 4) and facts.limits["k"] == 1000
        assert client.ready()
        with pytest.raises(RequestError, match="no/such"):
            client.image("no/such?a=b#c")
    with pytest.raises(RequestError, match="401"):
        Client(guarded).version()
    assert Client(guarded, token="secret").version().indexes[0].name == "main"
    with scripted(reply(503, {"ready": False})) as (busy, _):
        assert not Client(busy).ready()
    assert not Client("http://127.0.0.1:9").ready()


def test_the_awaited_client_has_every_method(served: tuple[str, str]) -> None:
    async def run() -> None:
        async with AsyncClient(served[1], token="secret") as client:
            assert await client.ready()
            one, batch = await asyncio.gather(client.search(png(7)), client.search_batch(["0007", png(8)]))
            assert one.hits == batch[0].hits
            assert await client.image("0007", size=0) == png(7)
            assert (await client.version()).indexes[0].num_bits == one.num_bits
        assert not await AsyncClient("http://127.0.0.1:9").ready()

    asyncio.run(run())
    public = [name for name in vars(Client) if not name.startswith("_")]
    assert sorted(public) == sorted(name for name in vars(AsyncClient) if not name.startswith("_"))


def test_the_client_imports_nothing_heavy() -> None:
    heavy = "('torch', 'ray', 'faiss', 'pyarrow', 'numpy', 'PIL', 'fastapi')"
    code = f"import sys, hashray; hashray.Client; hashray.AsyncClient; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n" and hashray.Client is Client

"""What a hostile client sends: the service refuses it at once, and goes on answering the others."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from serving import behind_socket, config_of, write_all
from tiny import png, write_part

import hashray
from hashray import artifact
from hashray.data.corpus import open_corpus
from hashray.data.images import decode
from hashray.engine.parts import Part, part_files, write_quarantine
from hashray.search import pictures
from hashray.search.connections import Connection
from hashray.search.guard import SafetyConfig
from hashray.search.limits import LimitsConfig
from hashray.search.messages import Ask, Query
from hashray.search.metrics import Metrics
from hashray.search.opening import open_service
from hashray.search.pictures import Pictures
from hashray.storage import open_store

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("attacked"))


@pytest.fixture(scope="module")
def client(at):
    with behind_socket(config_of(at)) as (url, _), httpx.Client(base_url=url) as client:
        yield client


def test_after_one_bad_image_of_a_batch_no_other_is_decoded(at):
    service = open_service(config_of(at))
    model, hold = service.models["main"], threading.Event()
    pixels = model.pixels

    def slow(image):
        assert hold.wait(60)
        return pixels(image)

    object.__setattr__(model, "pixels", slow)
    queries = [{"image": base64.b64encode(data).decode()} for data in (b"no image", *[png(1)] * 60)]
    with behind_socket(config_of(at), service) as (url, _):
        assert httpx.post(f"{url}/search/batch", json={"queries": queries}).status_code == 422
        hold.set()
        answer = httpx.post(f"{url}/search", content=png(2), headers={"content-type": "image/png"})
        assert answer.status_code == 200
        text = httpx.get(f"{url}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith('hashray_stage_seconds_count{stage="decode"}')]
    assert float(line.split()[-1]) <= 4  # the bad one, one in each of two threads, and the last
    assert service.admission.queries == service.admission.bytes == 0


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/search/batch", b'{"queries": [' + b"0," * 100_000 + b"0]}", "at most 256"),
        ("/search/batch", b'{"queries": [' + b"[]," * 200_000 + b"0]}", "more than 262,144 values"),
        ("/search", json.dumps(dict.fromkeys(map(str, range(100_000)), 0)).encode(), "at most 32"),
        ("/search/batch", json.dumps({"queries": [dict.fromkeys(map(str, range(100)), 0)]}).encode(), "at most 32"),
        ("/search", b'{"id": "\\ud800"}', "not Unicode"),
        ("/search", b'{"' + b"x" * 100_000 + b'": 0}', "xxx: Extra inputs"),
    ],
)
def test_a_body_of_many_values_is_refused_in_few_words(client, path, body, text):
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code == 422 and text in answer.json()["error"]
    assert len(answer.content) < 1000


def test_two_threads_that_make_one_thumbnail_count_it_once(at, tmp_path, monkeypatch):
    corpus = open_corpus(at["corpus"])
    pictures_ = Pictures(corpus, tmp_path, Metrics(), 1 << 20)
    both, shrink = threading.Barrier(2), pictures.shrink

    def together(*arguments):
        both.wait(60)
        return shrink(*arguments)

    monkeypatch.setattr(pictures, "shrink", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: pictures_.thumbnail("0001", 16), range(2))
    assert first == second and pictures_._bytes == len(first.data)


def test_two_processes_may_write_the_lookup_files_at_once(at, tmp_path, monkeypatch):
    corpus, both, chunk = open_corpus(at["corpus"]), threading.Barrier(2), pictures._chunk

    def together(*arguments):
        both.wait(60)
        return chunk(*arguments)

    monkeypatch.setattr(pictures, "_chunk", together)
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda _: Pictures(corpus, tmp_path, Metrics(), 1 << 20), range(2)))
    assert [one.original("0007").data for one in opened] == [png(7)] * 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".npy"]


def test_counts_return_to_zero_after_a_cancelled_query_whose_batch_is_at_work(at):
    service = open_service(config_of(at, limits=LimitsConfig(queries=4)))
    opened, hold, begun = service.indexes["main"]._current, threading.Event(), threading.Event()
    search = opened.search

    def slow(*arguments):
        begun.set()
        assert hold.wait(60)
        return search(*arguments)

    opened.search = slow

    async def run():
        tasks = [asyncio.create_task(service.answer([Query(code=bytes([n, n]))], Ask())) for n in range(3)]
        await asyncio.to_thread(begun.wait, 60)
        tasks[0].cancel()
        tasks[2].cancel()
        gone = await asyncio.gather(tasks[0], tasks[2], return_exceptions=True)
        hold.set()
        (answer,) = await tasks[1]
        return gone, answer

    gone, answer = asyncio.run(run())
    assert all(isinstance(error, asyncio.CancelledError) for error in gone)
    assert answer["query"]["code"] == "0101" and service.admission.queries == 0


def spoken(url, *pieces):
    """All that the service answers to some bytes until it closes the connection."""
    parts, heard = urlsplit(str(url)), b""
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as link:
        try:
            for piece in pieces:
                link.sendall(piece)
            while data := link.recv(1 << 16):
                heard += data
        except ConnectionError:  # closed before all was read
            pass
    return heard


HEAD = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        (b"GET /health?", *[b"x" * 1000] * 1000),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: ", *[b"x" * 1000] * 1000),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", *[b"A: x\r\n" * 200] * 1000),
        (HEAD, b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: ", *[b"x" * 1000] * 1000),
    ],
    ids=["line", "header", "headers", "trailer"],
)
def test_a_head_without_end_is_not_read(client, pieces):
    heard = spoken(client.base_url, *pieces)
    assert b" 200 " not in heard and (not heard or b" 400 " in heard)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"GET /health HT",),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\r\n"),
        (HEAD, b"Content-Length: 999999999999\r\n\r\n", b"x"),
    ],
    ids=["nothing", "half", "line-feeds", "refused-body"],
)
def test_a_connection_without_a_request_is_closed(at, monkeypatch, pieces):
    monkeypatch.setattr(Connection, "head_s", 0.2)
    with behind_socket(config_of(at)) as (url, service):
        spoken(url, *pieces)  # returns only when the service closes it
        assert httpx.get(f"{url}/health").status_code == 200
        assert service.admission.bytes == 0


def test_requests_at_once_on_one_connection_are_answered_in_their_order(client):
    one = b"GET /image/000%d?size=0 HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
    heard = spoken(client.base_url, one % (1, b"") + one % (2, b"") + one % (3, b"Connection: close\r\n"))
    places = [heard.find(png(number)) for number in (1, 2, 3)]
    assert places == sorted(places) and places[0] > 0 and heard.count(b" 200 OK") == 3


def test_what_needs_no_token_uses_up_no_places_of_bodies(at, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    safety = SafetyConfig(token_file=str(tmp_path / "token"))
    limits = LimitsConfig(body_mib=1, bodies_mib=1)
    with behind_socket(config_of(at, safety=safety, limits=limits)) as (url, service):
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as link:
            link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nx")
            assert b" 200 " in link.recv(1 << 16)
            assert service.admission.bytes == 0


def test_pages_of_the_named_sites_may_search(at):
    config = config_of(at, safety=SafetyConfig(cors_origins=("https://shop.example",)))
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}
    with behind_socket(config) as (url, _):
        answer = httpx.options(f"{url}/search", headers={"origin": "https://shop.example", **asks})
        assert answer.status_code == 200 and "POST" in answer.headers["access-control-allow-methods"]
        assert httpx.options(f"{url}/search", headers={"origin": "https://evil.example", **asks}).status_code == 400
        answer = httpx.post(f"{url}/search", json={"id": "0001"}, headers={"origin": "https://shop.example"})
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"


ODD = ["a\nb", "\n", "é", "e\u0301", "🐱/🐶", "q\"'<b>&", "../up", "%41", "a\0b", " ", "a?b#c", "x" * 3000]


def test_ids_of_any_text_are_rows_with_images(tmp_path):
    at = write_all(tmp_path)
    store = open_store(tmp_path / "odd")
    rows = [
        {"id": row_id, "image": png(n), "uri": None, "labels": [0], "split": "train"} for n, row_id in enumerate(ODD)
    ]
    record, images = write_part(store, 0, rows)
    part = Part(index=0, file=record, beside=(images,), rows_in=len(ODD))
    classes = artifact.write_file(store, "classes.json", b'["ant"]')
    files = (*part_files([part]), classes, write_quarantine(store, [part]))
    counts = {"rows_in": len(ODD), "rows_out": len(ODD), "rows_quarantined": 0}
    info = {"splits": {"train": len(ODD)}, "num_classes": 1}
    artifact.publish(store, artifact.Manifest(
        kind="corpus", project_version="0", config={}, parents={}, files=files, info=info, **counts,
    ))  # fmt: skip
    model = hashray.load_model(at["model"])
    catalog = hashray.create_index(tmp_path / "index2", num_bits=16, fingerprint=model.fingerprint)
    catalog.append(ODD, model.encode([decode(png(n)) for n in range(len(ODD))]))
    config = config_of({**at, "index": str(tmp_path / "index2"), "corpus": str(tmp_path / "odd")})
    with behind_socket(config) as (url, _), hashray.Client(url) as client:
        for number, row_id in enumerate(ODD):
            assert row_id in {hit.id for hit in client.search(id=row_id, k=len(ODD)).hits}
            assert client.image(row_id, size=0) == png(number), row_id


def tiff(side, tile):
    """A grey TIFF of one tile, which may be larger than the image."""
    data = zlib.compress(bytes(tile * tile), 9)
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 146),
            (325, len(data)), (284, 1)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head.ljust(146, b"\0") + data


def test_a_tile_larger_than_the_image_is_not_decoded(at):
    with behind_socket(config_of(at, limits=LimitsConfig(pixels=1_000_000))) as (url, _):
        for tile, status in ((16, 200), (2048, 422)):
            answer = httpx.post(f"{url}/search", content=tiff(16, tile), headers={"content-type": "image/tiff"})
            assert answer.status_code == status, answer.text
        assert "a tile of 4,194,304 pixels" in answer.json()["error"]

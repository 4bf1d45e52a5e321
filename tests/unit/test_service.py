"""The HTTP service against brute force: images, codes, ids, paging, filters, versions, limits, tokens, images."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import ROWS, behind_socket, config_of, write_all
from tiny import CLASSES, png, write_tiny_model

import hashray
from hashray.codes import hamming
from hashray.data.images import decode
from hashray.errors import ConfigError, InputError, MismatchError
from hashray.search.guard import SafetyConfig
from hashray.search.limits import LimitsConfig
from hashray.search.local import listen
from hashray.search.opening import ServeConfig, open_service

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(at):
    with behind_socket(config_of(at)) as (url, _), httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(at):
    """ids, codes of all rows, and a naive search."""
    model = hashray.load_model(at["model"])
    ids = [f"{i:04d}" for i in range(ROWS)]
    codes = np.asarray(model.encode([decode(png(i)) for i in range(ROWS)]))

    def search(code, keep=lambda i: True):
        away = hamming(code[None], codes)[0].tolist()
        return sorted((away[i], ids[i]) for i in range(ROWS) if keep(i))

    return model, ids, codes, search


def pairs(answer):
    return [(hit["distance"], hit["id"]) for hit in answer["hits"]]


def test_an_image_a_code_and_an_id_give_the_same_exact_neighbours(client, oracle):
    _, ids, codes, search = oracle
    for i in (0, 7, 31):
        expected = search(codes[i])[:10]
        raw = client.post("/search", content=png(i), headers={"content-type": "image/png"}).json()
        form = client.post("/search", files={"image": ("x.png", png(i))}, data={"k": "10"}).json()
        octets = client.post("/search", content=png(i), headers={"content-type": "application/octet-stream"}).json()
        text = client.post("/search", json={"image": base64.b64encode(png(i)).decode()}).json()
        code = client.post("/search", json={"code": codes[i].tobytes().hex()}).json()
        row = client.post("/search", json={"id": ids[i]}).json()
        assert all(pairs(answer) == expected for answer in (raw, form, octets, text, code, row))
        assert {answer["query"]["code"] for answer in (raw, form, text, code, row)} == {codes[i].tobytes().hex()}
        assert row["query"]["id"] == ids[i] and raw["query"]["id"] is None and raw["version"] == 4
        for hit in row["hits"]:
            n = int(hit["id"])
            assert hit["code"] == codes[n].tobytes().hex()
            assert hit["attributes"] == {"class": CLASSES[n % 3], "number": n}


def test_pages_of_an_answer_join_to_the_whole(client, oracle):
    _, _, codes, search = oracle
    seen, offset = [], 0
    while True:
        answer = client.post("/search", json={"code": codes[3].tobytes().hex(), "k": 7, "offset": offset}).json()
        seen += pairs(answer)
        offset += 7
        if not answer["more"]:
            break
    assert seen == search(codes[3])


def test_radius_and_filter(client, oracle):
    _, _, codes, search = oracle
    code = codes[5].tobytes().hex()
    near = [pair for pair in search(codes[5]) if pair[0] <= 1]
    answer = client.post("/search", json={"code": code, "k": 1000, "within": 1}).json()
    assert pairs(answer) == near and not answer["more"] and 0 < len(near) < ROWS
    first = client.post("/search", json={"code": code, "k": 1, "within": 1}).json()
    assert pairs(first) == near[:1] and first["more"] == (len(near) > 1)
    answer = client.post("/search", content=png(5), headers={"content-type": "image/png"},
                         params={"where": "class == 'bee' and number < 40"}).json()  # fmt: skip
    assert pairs(answer) == search(codes[5], lambda i: i % 3 == 1 and i < 40)[:10]


def test_a_batch_is_its_queries_one_by_one(client, oracle):
    _, ids, codes, search = oracle
    queries = [{"id": ids[4]}, {"code": codes[9].tobytes().hex()}, {"image": base64.b64encode(png(11)).decode()}]
    body = client.post("/search/batch", json={"queries": queries, "k": 4}).json()
    assert [pairs(answer) for answer in body["answers"]] == [search(codes[i])[:4] for i in (4, 9, 11)]


def test_queries_at_once_each_get_their_own_answer(client, oracle):
    _, _, codes, search = oracle

    def ask(i):
        body = {"code": codes[i % ROWS].tobytes().hex(), "k": 1 + i % 9}
        if i % 11 == 0:
            body["where"] = "no such column > 1"
        return client.post("/search", json=body)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(200)))
    for i, answer in enumerate(answers):
        if i % 11 == 0:
            assert answer.status_code == 422
        else:
            assert pairs(answer.json()) == search(codes[i % ROWS])[: 1 + i % 9]


WRONG = [
    ({"json": {}}, 422, "exactly one"),
    ({"json": {"id": "0001", "code": "00"}}, 422, "exactly one"),
    ({"json": {"id": "none such"}}, 404, "not in version"),
    ({"json": {"code": "zz"}}, 422, "not hexadecimal"),
    ({"json": {"code": "00"}}, 422, "8 bits, the index 16"),
    ({"json": {"image": "!"}}, 422, "base64"),
    ({"json": {"id": "0001", "k": 0}}, 422, "k:"),
    ({"json": {"id": "0001", "k": 1001}}, 422, "at most 1,000"),
    ({"json": {"id": "0001", "offset": 10_000}}, 422, "at most 10,000"),
    ({"json": {"id": "0001", "unknown": 1}}, 422, "unknown"),
    ({"json": {"id": "0001", "where": "import os"}}, 422, "where"),
    ({"json": {"id": "0001", "where": "1" * 5000}}, 422, "where"),
    ({"json": {"id": "0001", "version": 99}}, 422, "there are 1 to 4"),
    ({"json": {"id": "0001", "index": "compare"}}, 422, "--compare"),
    ({"json": {"id": "0001", "index": "../x"}}, 422, "index"),
    ({"content": b"[1]", "headers": JSON}, 422, "expected an object"),
    ({"content": b"{", "headers": JSON}, 400, "not JSON"),
    ({"content": b"[" * 100_000, "headers": JSON}, 400, "not JSON"),
    ({"content": b"x", "headers": {"content-type": "image/png"}}, 422, "cannot be used as a query"),
    ({"content": b"", "headers": {"content-type": "image/png"}}, 422, "empty"),
    ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "content type"),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "form"),
    ({"files": {"other": b"x"}}, 422, "no file named image"),
]


@pytest.mark.parametrize(("request_", "status", "text"), WRONG)
def test_what_cannot_be_answered_is_said(client, request_, status, text):
    answer = client.post("/search", **request_)
    assert answer.status_code == status and text in answer.json()["error"]
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert "/tmp" not in answer.text and "Traceback" not in answer.text


def test_an_image_of_too_many_pixels_is_not_decoded(at):
    sink = io.BytesIO()
    Image.new("1", (3000, 3000)).save(sink, "PNG")
    limits = LimitsConfig(pixels=1_000_000, body_mib=1)
    with behind_socket(config_of(at, limits=limits)) as (url, service):
        answer = httpx.post(f"{url}/search", content=sink.getvalue(), headers={"content-type": "image/png"})
        assert answer.status_code == 422 and "3000 x 3000 pixels" in answer.json()["error"]
        answer = httpx.post(f"{url}/search", content=b"x" * (1 << 20) + b"x", headers={"content-type": "image/png"})
        assert answer.status_code == 413

        def chunks():
            for _ in range(20):
                yield b"x" * (1 << 17)

        answer = httpx.post(f"{url}/search", content=chunks(), headers={"content-type": "image/png"})
        assert answer.status_code == 413 and "more than 1 MiB" in answer.json()["error"]
        assert service.admission.bytes == service.admission.queries == 0


def test_a_token_is_needed_where_one_is_set(at, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("s3cret\n")
    safety = SafetyConfig(token_file=str(tmp_path / "token"))
    with behind_socket(config_of(at, safety=safety)) as (url, _), httpx.Client(base_url=url) as client:
        for path in ("/version", "/metrics", "/image/0001", "/openapi.json"):
            assert client.get(path).status_code == 401
        answer = client.post("/search", json={"id": "0001"})
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert client.post("/search", json={"id": "0001"}, headers={"authorization": "Bearer no"}).status_code == 401
        right = {"authorization": "Bearer s3cret"}
        assert client.post("/search", json={"id": "0001"}, headers=right).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
    monkeypatch.setenv("HASHRAY_TOKEN", "other")
    assert SafetyConfig().token() == b"other"
    (tmp_path / "token").write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        safety.token()


def test_only_this_machine_is_served_and_no_other_site(client):
    assert client.get("/version", headers={"host": "evil.example"}).status_code == 400
    answer = client.get("/version", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_images_and_thumbnails_come_from_the_corpus_alone(client):
    original = client.get("/image/0007", params={"size": 0})
    assert original.content == png(7) and original.headers["content-type"] == "image/png"
    assert original.headers["content-security-policy"] == "sandbox"
    small = client.get("/image/0007")
    assert Image.open(io.BytesIO(small.content)).size == (16, 16)
    again = client.get("/image/0007", headers={"if-none-match": small.headers["etag"]})
    assert again.status_code == 304 and not again.content
    for name in ("nope", "../../etc/passwd", "%2e%2e%2fmanifest.json", "rows/part-00000.parquet", "a%00b", "%ff"):
        answer = client.get(f"/image/{name}")
        assert answer.status_code in (404, 400) and "manifest" not in answer.text.replace("manifest.json", "")
    assert client.get("/image/0007", params={"size": 5000}).status_code == 422
    text = client.get("/metrics").text
    assert re.search(r'hashray_cache_requests_total\{cache="thumbnail",result="miss"\} [1-9]', text)


def test_images_by_reference(tmp_path):
    from tiny import write_corpus

    at = write_all(tmp_path)
    write_corpus(tmp_path / "referring", ROWS, 25, reference=tmp_path / "pictures")
    with behind_socket(config_of({**at, "corpus": str(tmp_path / "referring")})) as (url, _):
        assert httpx.get(f"{url}/image/0042?size=0").content == png(42)
        (tmp_path / "pictures" / "0042.png").unlink()
        answer = httpx.get(f"{url}/image/0042?size=0")
        assert answer.status_code == 503 and str(tmp_path) not in answer.text


def test_a_new_version_is_served_and_an_old_one_stays_reachable(tmp_path):
    at = write_all(tmp_path)
    catalog = hashray.open_catalog(at["index"])
    with behind_socket(config_of(at)) as (url, service), httpx.Client(base_url=url) as client:

        def nearest(**more):
            return client.post("/search", json={"code": "0" * 4, "k": 60, **more}).json()

        whole, served = nearest(), service.indexes["main"]
        assert not served.refresh() and whole["version"] == 4
        gone = whole["hits"][0]["id"]
        assert catalog.delete([gone]) == 5
        assert nearest()["version"] == 4 and served.refresh() and not served.refresh()
        after = nearest()
        assert after["version"] == 5 and after["hits"] == whole["hits"][1:] and after["rows"] == ROWS - 1
        assert nearest(version=4)["hits"] == whole["hits"]
        assert client.post("/search", json={"id": gone}).status_code == 404
        assert client.get("/version").json()["indexes"][0]["versions"] == [1, 2, 3, 4, 5]
        assert catalog.rollback(4) == 6 and served.refresh() and nearest()["hits"] == whole["hits"]
        text = client.get("/metrics").text
        assert 'hashray_index_version{index="main"} 6.0' in text
        assert 'hashray_reloads_total{index="main",result="ok"} 2.0' in text


def test_a_version_that_cannot_be_opened_leaves_the_old_one_serving(tmp_path, capfd):
    at = write_all(tmp_path)
    catalog = hashray.open_catalog(at["index"])
    with behind_socket(config_of(at)) as (url, service):
        catalog.delete(["0001"])
        (bitmap,) = (tmp_path / "index" / "deleted").iterdir()
        data = bitmap.read_bytes()
        bitmap.write_bytes(b"\0" * len(data))
        assert not service.indexes["main"].refresh()
        assert httpx.post(f"{url}/search", json={"id": "0001"}).json()["version"] == 4
        assert '"event": "reload failed"' in capfd.readouterr().err
        bitmap.write_bytes(data)
        assert service.indexes["main"].refresh()
        assert httpx.post(f"{url}/search", json={"id": "0002"}).json()["version"] == 5


def test_two_indexes_beside_each_other(tmp_path):
    at, other = write_all(tmp_path / "a"), write_all(tmp_path / "b", rows=30)
    config = config_of(at, compare=other["index"], compare_model=other["model"])
    with behind_socket(config) as (url, _):
        sizes = [httpx.post(f"{url}/search", json={"id": "0001", "index": name}).json()["rows"]
                 for name in ("main", "compare")]  # fmt: skip
        assert sizes == [60, 30]
        assert [one["name"] for one in httpx.get(f"{url}/version").json()["indexes"]] == ["main", "compare"]


def test_more_than_the_limit_is_refused_at_once_and_the_rest_is_answered(at):
    service = open_service(config_of(at, limits=LimitsConfig(queries=3)))
    opened, hold, begun = service.indexes["main"]._current, threading.Event(), threading.Event()
    search = opened.search

    def slow(*arguments):
        begun.set()
        assert hold.wait(60)
        return search(*arguments)

    opened.search = slow  # a search that takes long, without a wait of its own
    with behind_socket(config_of(at), service) as (url, _), ThreadPoolExecutor(8) as pool:

        def ask(_):
            return httpx.post(f"{url}/search", json={"id": "0001"}, timeout=60)

        first = pool.submit(ask, 0)
        assert begun.wait(60)
        refused = httpx.post(f"{url}/search/batch", json={"queries": [{"id": "0001"}] * 3})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert httpx.get(f"{url}/health").status_code == 200
        hold.set()
        assert first.result().status_code == 200
        assert ask(0).status_code == 200
        assert 'hashray_rejected_total{reason="overload"} 1.0' in httpx.get(f"{url}/metrics").text


def test_an_answer_that_takes_too_long_is_given_up(at):
    service = open_service(config_of(at, limits=LimitsConfig(timeout_s=0.2)))
    hold = threading.Event()
    service.indexes["main"]._current.search = lambda *_: hold.wait(60)
    with behind_socket(config_of(at), service) as (url, _):
        try:
            assert httpx.post(f"{url}/search", json={"id": "0001"}, timeout=60).status_code == 504
        finally:
            hold.set()


def test_the_log_is_json_lines_with_the_request_id(client, capfd):
    client.post("/search", json={"id": "0001"}, headers={"x-request-id": "mine-1"})
    client.post("/search", json={"id": "0001"}, headers={"x-request-id": "not\tsafe" * 40})
    client.get("/health")  # answered after the lines of the requests before it are written
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    seen = [line for line in lines if line.get("event") == "request"]
    assert seen[0]["request_id"] == "mine-1" and seen[0]["route"] == "/search" and seen[0]["status"] == 200
    assert re.fullmatch("[0-9a-f]{16}", seen[1]["request_id"])


def test_the_page_asks_no_other_host(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=[\"']?https?://", page.text)


def test_what_is_wrong_is_said_before_a_request_is_taken(at, tmp_path):
    write_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="codes of another model"):
        open_service(config_of({**at, "model": str(tmp_path / "other")}))
    with pytest.raises(InputError, match="is not a"):
        open_service(config_of({**at, "index": str(tmp_path / "none")}))
    with pytest.raises(ValueError, match="give --compare too"):
        ServeConfig(index="i", model="m", compare_model="x")
    taken = listen(ServeConfig(index="i", model="m", port=0))
    with taken:
        taken.listen()
        with pytest.raises(ConfigError, match="cannot listen at"):
            listen(ServeConfig(index="i", model="m", port=taken.getsockname()[1]))

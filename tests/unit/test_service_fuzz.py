"""Anything may be sent to the service: it answers what its OpenAPI document says, never with a fault of its own."""

from __future__ import annotations

import gc
import json

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import behind_socket, config_of, write_all
from tiny import png

MALFORMED = [300, pytest.param(5000, marks=pytest.mark.slow)]
MOST_GROWTH_BYTES = 64 << 20


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with behind_socket(config_of(write_all(tmp_path_factory.mktemp("fuzzed")))) as (url, _):
        yield url


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_answers_are_those_of_the_openapi_document(url, examples):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck])
        @given(case=operation.as_strategy())
        def check(case):
            # A filter or a code of another width fits the document, and is refused all the same.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        check()
        checked += 1
    assert checked >= 8


def mangled(rng, data):
    """Bytes of an image with some changed, cut off, or put in."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 20)):
        data[rng.integers(len(data))] = rng.integers(256)
    if rng.random() < 0.5:
        del data[rng.integers(len(data)) :]
    if rng.random() < 0.3:
        place = rng.integers(len(data) + 1)
        data[place:place] = rng.bytes(rng.integers(1, 2000))
    return bytes(data)


@pytest.mark.parametrize("count", MALFORMED)
def test_malformed_images_and_bodies_are_no_fault_and_leave_no_memory(url, count, capfd):
    rng = np.random.default_rng(count)
    form_kind = "multipart/form-data; boundary=x"
    kinds = ["image/png", "image/jpeg", "application/octet-stream", "application/json", form_kind, "text/plain", ""]
    text = json.dumps({"id": "0001", "k": 3, "where": "class == 'ant'", "queries": [{"id": "0001"}]}).encode()
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + png(1) + b"\r\n--x--\r\n"
    process, statuses, start_bytes = psutil.Process(), {}, 0
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(count):
            data = mangled(rng, (png(number % 50), text, form)[number % 3])
            path = ("/search", "/search/batch")[number % 7 == 0]
            answer = client.post(path, content=data, headers={"content-type": kinds[rng.integers(len(kinds))]})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (number, answer.text)
            assert "Traceback" not in answer.text
            if number == count // 3:
                gc.collect()
                start_bytes = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - start_bytes < MOST_GROWTH_BYTES
    assert {400, 415, 422} <= set(statuses) and '"event": "fault"' not in capfd.readouterr().err

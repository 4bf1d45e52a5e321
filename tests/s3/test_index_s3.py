"""Changes of an index on a real HTTP server: each request fails, loses its answer, or is the writer's last one."""

from __future__ import annotations

import os

import numpy as np
import pytest
from test_flaky_store import Proxy

from hashray import artifact, create_index
from hashray.errors import HashrayError, StorageError
from hashray.index.catalog import Catalog
from hashray.index.garbage import collect
from hashray.search.reader import open_version
from hashray.storage import open_store

CODES = np.random.default_rng(0).integers(0, 256, (40, 4), dtype=np.uint8)


def names(first, last):
    return [f"{number:03d}" for number in range(first, last)]


def ids_in(catalog):
    index = open_version(catalog.store, None, catalog.cache, threads=1)
    if not index.pieces:
        return []
    return sorted(name for name in index.search(CODES[:1], 100)[0][0] if name)


CHANGES = {
    "append": lambda catalog: catalog.append(names(40, 50), CODES[:10]),
    "delete": lambda catalog: catalog.delete(names(0, 5), missing_ok=True),
    "compact": lambda catalog: catalog.compact(rows_per_shard=100),
    "rollback": lambda catalog: catalog.rollback(2),
    "gc": lambda catalog: collect(catalog.store, keep=1, grace_s=0).version,
}
AFTER = {
    "append": [names(0, 30), sorted([*names(0, 30), *names(40, 50)])],
    "delete": [names(0, 30), names(5, 30)],
    "compact": [names(0, 30)],
    "rollback": [names(0, 30), names(0, 20)],
    "gc": [names(0, 30)],
}


@pytest.mark.parametrize(
    ("change", "fault", "step"),
    [
        ("append", "lose", 6), ("compact", "lose", 6), ("gc", "die", 6),
        *(pytest.param(name, fault, 1, marks=pytest.mark.slow) for name in CHANGES for fault in (503, "lose", "die")),
    ],
)  # fmt: skip
def test_each_request_in_turn(s3_server, s3_url, tmp_path, monkeypatch, change, fault, step):
    """Whatever happens, the index is the one before the change or the one after it, and whole; a rerun goes on."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    bad = [0]

    def rule(number, _request):
        hit = number >= bad[0] if fault == "die" else number == bad[0]
        return (503 if fault == "die" else fault) if bad[0] and hit else None

    proxy = Proxy(s3_server, rule)
    try:
        number, requests = 1, 10**9
        while number <= requests:
            url = f"{s3_url}/{number}"
            direct = create_index(url, 32, endpoint_url=s3_server, cache_dir=tmp_path / "direct")
            direct.append(names(0, 20), CODES[:20])
            direct.append(names(20, 30), CODES[20:30])
            shaken = Catalog(open_store(url, endpoint_url=proxy.endpoint), tmp_path / f"cache-{number}")
            if requests == 10**9:  # the first time nothing fails: how many requests are there?
                bad[0], proxy.count = 0, 0
                CHANGES[change](shaken)
                requests = proxy.count
                assert ids_in(direct) == AFTER[change][-1] and requests > 8
                number += 1
                continue
            bad[0], proxy.count = number - 1, 0
            try:
                CHANGES[change](shaken)
                returned = True
            except HashrayError:
                returned = False
            there = ids_in(direct)
            assert there == AFTER[change][-1] if returned else there in AFTER[change]
            if there != AFTER[change][-1]:
                CHANGES[change](direct)
            assert ids_in(direct) == AFTER[change][-1] and artifact.verify(direct.store) == []
            number += step
        assert proxy.failed
    finally:
        proxy.close()


@pytest.mark.skipif("HASHRAY_TEST_S3" in os.environ, reason="a real server checks the header's signature")
def test_a_server_that_ignores_the_condition_for_versions(s3_server, s3_url, tmp_path):
    create_index(s3_url, 32, endpoint_url=s3_server).append(names(0, 20), CODES[:20])

    def rule(_number, request):
        return "ignore-condition" if "If-None-Match" in request.headers and "versions/" in request.path else None

    proxy = Proxy(s3_server, rule)
    try:
        catalog = Catalog(open_store(s3_url, endpoint_url=proxy.endpoint), tmp_path / "cache")
        with pytest.raises(StorageError, match="does not keep the promise of `If-None-Match"):
            catalog.delete(names(0, 2))
        assert catalog.version == 2
    finally:
        proxy.close()

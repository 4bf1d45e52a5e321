"""An index in Ray actors: its answers are those of one process, while actors die and versions change."""

from __future__ import annotations

import shutil
import threading

import httpx
import numpy as np
import pytest
import ray
from ray import serve as ray_serve
from serving import config_of, write_all

import hashray
from hashray.errors import CorruptArtifact, InputError
from hashray.index.log import newest
from hashray.search.fleet import NAMESPACE, Fleet, groups_of
from hashray.search.guard import SafetyConfig
from hashray.search.limits import LimitsConfig
from hashray.search.nearest import OpenIndex
from hashray.search.opening import FleetConfig
from hashray.search.reader import open_index
from hashray.search.serve import NAME, application
from hashray.storage import open_store

TINY = 1  # bytes in one actor: each shard is alone


@pytest.fixture
def at(tmp_path):
    return write_all(tmp_path, shards=2)


@pytest.fixture
def fleet(ray_session, request):
    fleet = Fleet(f"test-{request.node.name[:20]}", TINY, getattr(request, "param", 2), 0.1, 60.0)
    yield fleet
    fleet.stop()


def equal(one, other):
    return one.ids.tolist() == other.ids.tolist() and one.distances.tolist() == other.distances.tolist()


def actors_of(fleet):
    names = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)
             if entry["namespace"] == NAMESPACE and entry["name"].startswith(fleet.name)]  # fmt: skip
    return [ray.get_actor(name, NAMESPACE) for name in sorted(names)]


def test_answers_are_those_of_one_index(at, fleet):
    # A shard without attributes: a filter sees null there, in a fleet as in one process.
    catalog = hashray.open_catalog(at["index"])
    catalog.append(["extra-1", "extra-2"], np.array([[33, 121], [0, 0]], np.uint8))
    catalog.delete(["0003", "0050"])
    store = open_store(at["index"])
    one, many = OpenIndex(open_index(at["index"])), fleet.open(store, newest(store).number)
    assert len(many._groups) == 3 and many.facts == one.facts
    codes = np.random.default_rng(0).integers(0, 256, (40, 2), dtype=np.uint8)
    for where in (None, "class == 'bee'", "number > 1000", "class != 'ant' or number < 9"):
        for k in (1, 7, 100):
            assert equal(one.search(codes, k, where), many.search(codes, k, where))
    with pytest.raises(InputError, match="nothing"):
        many.search(codes, 3, "nothing == 1")
    ids = ["0001", "0003", "extra-2", "none"]
    here, there = one.describe(ids, None), many.describe(ids, None)
    assert {k: (v.code.tolist(), v.attributes) for k, v in here.rows.items()} == {
        k: (v.code.tolist(), v.attributes) for k, v in there.rows.items()
    }
    assert sorted(there.rows) == ["0001", "extra-2"] and there.missing == 0


def test_actors_that_are_killed_cost_no_query(at, fleet):
    store = open_store(at["index"])
    many, one = fleet.open(store, 3), OpenIndex(open_index(at["index"]))
    codes = np.random.default_rng(1).integers(0, 256, (8, 2), dtype=np.uint8)
    expected = one.search(codes, 9, None)
    ray.kill(actors_of(fleet)[0], no_restart=False)
    answer = many.search(codes, 9, None)
    assert answer.missing == 0 and equal(answer, expected)
    for actor in actors_of(fleet):  # all at once: Ray starts them again, they open their shards from storage
        ray.kill(actor, no_restart=False)
    answer = many.search(codes, 9, None)
    assert answer.missing == 0 and equal(answer, expected)


@pytest.mark.slow
@pytest.mark.parametrize("fleet", [1], indirect=True)
def test_shards_that_storage_has_lost_are_missing_and_said_to_be(at, fleet, tmp_path):
    store = open_store(at["index"])
    many = fleet.open(store, 3)
    lost = newest(store).shards[1]
    whole = many.search(np.zeros((1, 2), np.uint8), 60, None)
    (tmp_path / "index" / lost.codes.name).rename(tmp_path / "away")
    for actor in actors_of(fleet):
        ray.kill(actor, no_restart=False)
    # An actor that was killed may answer once more.
    while not (answer := many.search(np.zeros((1, 2), np.uint8), 60, None)).missing:
        pass
    left = [row_id for row_id in whole.ids[0] if not lost.first <= row_id <= lost.last]
    assert answer.missing == 1 and [i for i in answer.ids[0] if i is not None] == left
    described = many.describe([lost.first, left[0]], None)
    assert sorted(described.rows) == [left[0]] and described.missing == 1
    with pytest.raises(CorruptArtifact, match="is missing"):
        Fleet(fleet.name + "-b", TINY, 1, 0.1, 5.0).open(store, 3)
    some = Fleet(fleet.name + "-b", TINY, 1, 0.1, 5.0, partial=True).open(store, 3)
    answer = some.search(np.zeros((1, 2), np.uint8), 60, None)
    assert answer.missing == 1 and [i for i in answer.ids[0] if i is not None] == left
    Fleet(fleet.name + "-b", TINY, 1, 0.1, 5.0).stop()
    (tmp_path / "away").rename(tmp_path / "index" / lost.codes.name)
    assert many.search(np.zeros((1, 2), np.uint8), 60, None).missing == 0


def test_groups_fill_up_to_the_budget():
    class File:
        def __init__(self, size, name=""):
            self.bytes, self.name = size, name

    class Shard:
        def __init__(self, name, size):
            self.codes, self.ids = File(size // 2), File(size - size // 2, name)

    shards = [Shard("a", 4), Shard("b", 6), Shard("c", 5), Shard("d", 20), Shard("e", 1)]
    assert groups_of(shards, 10) == [("a", "b"), ("c",), ("d",), ("e",)]
    assert groups_of([], 10) == []


def test_ray_serve_answers_while_actors_die_and_versions_change(at, ray_session, free_port, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    fleet, safety = FleetConfig(replicas=2, cpus_per_holder=0.1), SafetyConfig(token_file=str(tmp_path / "token"))
    config = config_of(at, fleet=fleet, limits=LimitsConfig(timeout_s=60), safety=safety, poll_s=0.05)
    config = config.model_copy(update={"port": free_port})
    ray_serve.start(http_options={"host": "127.0.0.1", "port": free_port}, logging_config={"log_level": "WARNING"})
    try:
        built = application(config)
        (tmp_path / "token").unlink()  # as where a replica runs on a node without the file
        ray_serve.run(built, name=NAME, route_prefix="/")
        right = {"authorization": "Bearer s3cret"}
        with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=60, headers=right) as client:
            assert httpx.post(f"{client.base_url}/search", json={"id": "0002"}, timeout=60).status_code == 401
            catalog = hashray.open_catalog(at["index"])
            versions, statuses, stop = set(), [], threading.Event()

            def ask():
                with httpx.Client(base_url=client.base_url, timeout=60, headers=right) as mine:
                    while not stop.is_set():
                        answer = mine.post("/search", json={"id": "0002", "k": 5})
                        statuses.append(answer.status_code)
                        versions.add(answer.json().get("version"))

            thread = threading.Thread(target=ask)
            thread.start()
            try:
                while 3 not in versions:
                    assert thread.is_alive()
                number = catalog.delete(["0001"])
                holders = [entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True)
                           if entry["namespace"] == NAMESPACE]  # fmt: skip
                ray.kill(ray.get_actor(holders[0], NAMESPACE), no_restart=False)
                while number not in versions:
                    assert thread.is_alive()
            finally:
                stop.set()
                thread.join()
            assert set(statuses) == {200} and versions == {3, number}
            ready = client.get("/ready", headers={"x-request-id": "mine"})
            assert ready.json() == {"ready": True} and ready.headers.get_list("x-request-id") == ["mine"]
            assert client.get("/image/0002", params={"size": 0}).status_code == 200
    finally:
        ray_serve.shutdown()
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE:
                ray.kill(ray.get_actor(entry["name"], NAMESPACE))
    shutil.rmtree(at["index"])

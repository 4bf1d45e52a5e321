"""The requests of a stage: those of the driver and of Ray's workers together are what the server saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle
from test_flaky_store import Proxy, through  # noqa: F401  # a fixture
from tiny import BACKBONE, write_corpus, write_toml
from werkzeug.serving import WSGIRequestHandler

from hashray.artifact import Manifest, publish, write_file
from hashray.cli import main
from hashray.engine.parts import Output, PartWorker, run_parts
from hashray.engine.reports import Meter, listening, start_reports
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import run_stage
from hashray.engine.tasks import run_tasks
from hashray.progress import Bar, console
from hashray.storage import Store, open_store, requests
from hashray.storage.requests import Requests

OPERATIONS = ("get", "put", "head", "list", "delete")
UNITS = [{"index": i, "rows": 2} for i in range(4)]


class Reads(PartWorker):
    """Reads an object for each part."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        self.store.read("source")
        return Output(pa.table({"id": [f"{unit['index']}-{i}" for i in range(unit["rows"])]}), [])


def reads(store: Store, advance: Callable[[int], None]) -> int:
    return len(store.read("source"))


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"event": "requests"')]


@pytest.mark.parametrize("ray", ["always", "never"])
def test_a_stage_counts_what_the_server_saw(
    ray_session: Any,
    through: Callable[..., tuple[Store, Proxy]],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    ray: str,
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    store, proxy = through(lambda number, request: 503 if number % 7 == 0 else None)
    store.write("source", b"s" * 5000)
    pool = WorkersConfig(workers=2, cpus_per_worker=0.5, ray=ray)

    def work() -> Manifest:
        parts = run_parts(store, "plan", UNITS, Reads, {"store": store}, pool, "encode", 0.0)
        with Bar("t", 3, "tasks") as bar:
            jobs = dict.fromkeys(range(3), (store,))
            assert dict(run_tasks(reads, jobs, pool, False, Meter(bar, "task"))) == {0: 5000, 1: 5000, 2: 5000}
        files = tuple(part.file for part in parts)
        return publish(
            store,
            Manifest(kind="codes", project_version="0", config={}, parents={}, files=files, info={"plan": "plan"}),
        )

    capsys.readouterr()
    before = proxy.count
    manifest = run_stage(store, "codes", "plan", work)
    (event,) = events(capsys.readouterr().err)
    assert event["stage"] == "codes"
    assert sum(event[name] for name in OPERATIONS) == proxy.count - before
    assert event["get"] >= 4 + 3 and event["put"] >= 4 + 4 and event["bytes_down"] >= 7 * 5000
    assert event["bytes_up"] >= sum(record.bytes for record in manifest.files)
    assert "requests" not in store.read("manifest.json").decode()


def test_counts_are_carried_once() -> None:
    requests.take()
    requests.add(Requests(get=2, bytes_down=7))
    assert requests.take() == Requests(get=2, bytes_down=7)
    assert requests.take() == Requests()
    with pytest.raises(TypeError):
        Requests(got=1)  # type: ignore[call-arg]


def test_a_training_worker_reports_its_counts(ray_session: Any) -> None:
    lines: list[dict[str, Any]] = []
    reports, before = start_reports(), requests.total()
    with listening(reports, lines.append, lambda: None):
        ray_session.get(reports.put.remote({"sent": Requests(get=3, bytes_down=9)}))
        ray_session.get(reports.put.remote({"event": "start"}))
    assert requests.total() - before == Requests(get=3, bytes_down=9)
    assert lines == [{"event": "start"}]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that boto3 sent to the server from whatever process; those of Arrow are not counted."""
    lines: list[str] = []
    log = WSGIRequestHandler.log_request

    def log_request(self: WSGIRequestHandler, *words: Any) -> None:
        if "boto3" in self.headers.get("User-Agent", "").lower():
            lines.append(self.requestline)
        log(self, *words)

    monkeypatch.setattr(WSGIRequestHandler, "log_request", log_request)
    return lines


TRAINING = {
    "method": {"kind": "adalabelhash", "num_bits": 16}, "backbone": BACKBONE, "epochs": 2, "batch_size": 16,
    "validation_rows": 6, "cpus_per_worker": 0.5, "precision": "fp32", "tensorboard": False,
}  # fmt: skip
SWEEP = {
    **TRAINING, "space": {"optim.lr": {"log": [1e-4, 1e-1]}},
    "search": {"trials": 2, "scheduler": "none", "at_once": 2, "report_seeds": []},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "config", "words"),
    [
        ("train", TRAINING, ("--ray", "always", "--input", "memory")),
        ("train", TRAINING, ("--ray", "always", "--input", "stream")),
        ("tune", SWEEP, ()),
        ("tune", SWEEP, ("--input", "stream")),
    ],
    ids=["train-memory", "train-stream", "tune-memory", "tune-stream"],
)
def test_trainings_and_sweeps_on_ray_count_what_the_server_saw(
    ray_session: Any, s3_url: str, seen: list[str], tmp_path: Path, command: str, config: Any, words: tuple[str, ...]
) -> None:
    write_corpus(f"{s3_url}/corpus", 40, 10)
    before, lines = requests.total(), len(seen)
    path = write_toml(tmp_path / "c.toml", config)
    assert main([command, path, "--corpus", f"{s3_url}/corpus", "--out", f"{s3_url}/out", *words]) == 0
    sent = requests.total() - before
    assert sum(getattr(sent, name) for name in OPERATIONS) == len(seen) - lines


def test_verbose_says_it_on_a_terminal_and_elsewhere_it_is_a_line(
    s3_url: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hashray.progress._verbose", False)
    local = str(tmp_path / "model")
    for store in (open_store(s3_url), open_store(local)):
        files = (write_file(store, "weights", b"data"),)
        publish(store, Manifest(kind="model", project_version="0", config={}, parents={}, files=files))
    assert main(["describe", s3_url]) == 0 and main(["describe", local]) == 0
    (event,) = events(capsys.readouterr().err)  # the folder asks nothing of S3
    wanted = {"event": "requests", "stage": "describe", "get": 1, "put": 0, "head": 1, "list": 1, "delete": 0}
    assert {name: event[name] for name in wanted} == wanted and set(event) == {*wanted, "bytes_down", "bytes_up"}
    with monkeypatch.context() as patch:
        patch.setattr(type(console), "is_terminal", property(lambda self: True))
        assert main(["describe", s3_url]) == 0
        assert "requests" not in capsys.readouterr().err
        assert main(["--verbose", "describe", s3_url]) == 0 and main(["describe", local, "--verbose"]) == 0
        said = capsys.readouterr().err
    assert "describe: requests to S3: 1 get, 0 put, 1 head, 1 list, 0 delete, " in said
    assert "describe: requests to S3: 0 get, 0 put, 0 head" in said
    assert main(["describe", local]) == 0
    assert len(events(capsys.readouterr().err)) == 1

"""The service on a cluster, under load from another process, while versions change and actors and nodes are killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import local
import numpy as np
import psutil
import pytest
from nodes import ROOT, Nodes
from service_load import CODES, K
from serving import write_all
from tiny import command, wait_until

import hashray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NODES = 3
LOAD = Path(__file__).with_name("service_load.py")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        running = Nodes(Path(folder))
        running.cluster.up(0, 1, 0, False, 100 << 20)
        try:
            running.have(NODES)
            yield running
        finally:
            running.cluster.down()


@contextmanager
def service(nodes: Nodes, at: dict[str, str], log: Path, *flags: str) -> Iterator[int]:
    """`hashray serve` with two actors for each shard; its port once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fleet = ["--memory-gib", "1e-9", "--replicas", "2", "--cpus-per-holder", "0.1", "--listen-at", "head"]
    words = ["serve", at["index"], "--model", at["model"], "--port", str(port), "--poll-s", "0.2", *fleet, *flags]
    with log.open("wb") as sink:
        process = subprocess.Popen(command(*words), stdout=sink, stderr=sink, env=nodes.environment(), cwd=ROOT)
    try:
        wait_until(lambda: b'"event": "ready"' in log.read_bytes() or process.poll() is not None, "the service")
        assert process.poll() is None, log.read_text()
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


class Load:
    """Clients in a process of their own: every answer with its version and its milliseconds."""

    def __init__(self, port: int, sink: Path) -> None:
        self.sink = sink
        self.process = subprocess.Popen([sys.executable, str(LOAD), str(port), str(sink)], cwd=ROOT)

    def answers(self) -> list[dict[str, Any]]:
        """What has been answered so far."""
        text = self.sink.read_text() if self.sink.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def more(self, count: int = 20) -> None:
        """Wait for some more answers."""
        before = len(self.answers())
        wait_until(lambda: len(self.answers()) >= before + count or self.process.poll() is not None, "more answers")
        assert self.process.poll() is None

    def stop(self) -> list[dict[str, Any]]:
        """End the clients; all answers."""
        self.process.terminate()
        self.process.wait()
        return self.answers()


def holders(nodes: Nodes, name: str | None = None) -> list[psutil.Process]:
    """The actors that hold shards, of one node or of all."""
    state = nodes.cluster.read()
    members = [state.node(each) for each in ([name] if name else nodes.names())]
    return [p for p in local.processes_of(state.cluster, members) if "ShardHolder" in " ".join(p.cmdline())]


def test_no_query_is_lost_while_versions_actors_and_nodes_go(nodes: Nodes, tmp_path: Path) -> None:
    at = write_all(tmp_path, shards=2)
    catalog = hashray.open_catalog(at["index"])
    with service(nodes, at, tmp_path / "log") as port:
        load = Load(port, tmp_path / "answers")
        try:
            load.more()
            marks = {"quiet": len(load.answers())}
            number = catalog.delete(["0001"])
            wait_until(lambda: load.answers()[-1].get("version") == number, "the new version")
            load.more()
            marks["version"] = len(load.answers())
            os.kill(holders(nodes)[0].pid, signal.SIGKILL)
            load.more()
            wait_until(lambda: len(holders(nodes)) == 4, "the actor to be back")
            marks["actor"] = len(load.answers())
            name = next(n for n in nodes.names() if holders(nodes, n) and not nodes.runs(n, "ServeReplica"))
            nodes.cluster.kill(name)
            load.more(200)
            marks["node"] = len(load.answers())
        finally:
            answers = load.stop()
    print(json.dumps(summary(answers, marks)), file=sys.stderr)
    assert Counter(answer["status"] for answer in answers) == {200: len(answers)}
    assert {answer["version"] for answer in answers} == {3, number}
    check_against_one_index(at, answers, number)


def check_against_one_index(at: dict[str, str], answers: list[dict[str, Any]], number: int) -> None:
    """Every answer is that of one process that holds the version whole."""
    expected = {}
    for version in (3, number):
        index = hashray.open_index(at["index"], version=version)
        for code in range(CODES):
            ids, _ = index.search(np.full((1, 2), code * 31, np.uint8), K)
            expected[version, code] = ids[0].tolist()
    assert all(answer["ids"] == expected[answer["version"], answer["code"]] for answer in answers)


@pytest.mark.parametrize("flags", [(), ("--partial",)])
def test_shards_that_storage_has_lost_are_said_to_be_missing(
    nodes: Nodes, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    nodes.have(NODES)
    at = write_all(tmp_path, shards=2)
    with service(nodes, at, tmp_path / "log", *flags) as port:
        load = Load(port, tmp_path / "answers")
        try:
            load.more()
            lost = max((tmp_path / "index" / "shards").iterdir())
            lost.rename(tmp_path / "away")
            for holder in holders(nodes):
                holder.kill()
            honest = (lambda a: a.get("degraded")) if flags else (lambda a: a["status"] == 503)
            wait_until(lambda: any(map(honest, load.answers())), "an honest answer")
            load.more()
            (tmp_path / "away").rename(lost)
            wait_until(
                lambda: load.answers()[-1]["status"] == 200 and not load.answers()[-1]["degraded"], "a whole one"
            )
        finally:
            answers = load.stop()
    check_against_one_index(at, [a for a in answers if a["status"] == 200 and not a["degraded"]], 3)
    assert {answer["status"] for answer in answers} == ({200} if flags else {200, 503})


def summary(answers: list[dict[str, Any]], marks: dict[str, int]) -> dict[str, Any]:
    """p50 and p99 in ms of the answers of each part."""
    start, table = 0, {}
    for name, end in marks.items():
        times = [answer["ms"] for answer in answers[start:end]]
        table[name] = {"answers": len(times), "p50_ms": np.percentile(times, 50), "p99_ms": np.percentile(times, 99)}
        start = end
    return table

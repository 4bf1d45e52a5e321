"""What the chaos tests share: a cluster of real Ray nodes, commands that run on it, and a table of what events cost.

The cluster is cluster/local.py's, with a head without CPUs, as `make test-chaos` and a reader of docs/CLUSTER.md have
it. A command's driver runs on this machine and joins the cluster by RAY_ADDRESS; its progress lines say when an event
may happen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import command, wait_until

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "cluster"))
import local  # noqa: E402

RESULT = "HASHRAY_CHAOS_RESULT"  # where the table goes as JSON, if this is set
OBJECT_STORE_BYTES = 100 << 20


class Run:
    """A hashray command that runs in a process of its own, with what it prints in a file."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log, self.start_s, self.end_s = log, time.monotonic(), 0.0
        with log.open("wb") as sink:
            self.process = subprocess.Popen(command(*words), stdout=sink, stderr=sink, env=environment, cwd=ROOT)

    def share_done(self, stage: str) -> float:
        """The share of a stage that its last progress line reports."""
        for line in reversed(self.log.read_text(errors="replace").splitlines()):
            if line.startswith('{"stage": "') and line.endswith("}"):
                report = json.loads(line)
                if report["stage"] == stage:
                    return float(report["done"] / report["total"])
        return 0.0

    def wait_for(self, ready: Callable[[], Any], what: str) -> Any:
        """Wait until `ready`; fail where the command ends before that."""
        value = wait_until(lambda: ready() or (self.process.poll() is not None and "ended"), what)
        assert value != "ended", f"ended with {self.process.returncode} before {what}: {self.text()}"
        return value

    def finish(self) -> float:
        """Wait for a good end; return the seconds since the start."""
        code = self.process.wait()
        assert code == 0, self.text()
        return time.monotonic() - self.start_s

    def text(self) -> str:
        """The end of what the command has printed."""
        return self.log.read_text(errors="replace")[-5000:]

    def stop(self) -> None:
        """End the command where a test has failed."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Nodes:
    """The running cluster, whose worker nodes the tests add and end."""

    def __init__(self, folder: Path) -> None:
        self.cluster = local.Cluster(folder)

    def names(self) -> list[str]:
        """The worker nodes that are up."""
        return [name for name, member in self.cluster.read().nodes().items() if local.is_running(member)]

    def have(self, count: int) -> None:
        """Make the number of worker nodes this."""
        kept = self.names()[:count]
        for name in set(self.cluster.read().nodes()) - set(kept):
            self.cluster.kill(name)
        self.cluster.add(1, count - len(kept))

    def runs(self, name: str, title: str) -> bool:
        """Whether a process with this title is alive on a node."""
        state = self.cluster.read()
        for process in local.processes_of(state.cluster, [state.node(name)]):
            try:
                if title in " ".join(process.cmdline()):
                    return True
            except psutil.Error:
                continue
        return False

    def busy(self, title: str) -> str | None:
        """A worker node on which a process with this title is alive."""
        return next((name for name in self.names() if self.runs(name, title)), None)

    def environment(self) -> dict[str, str]:
        """The environment of a command that joins the cluster."""
        return os.environ | self.cluster.read().environment()


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """A cluster without worker nodes. In /tmp: a socket's path may not be long."""
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as folder:
        running = Nodes(Path(folder))
        running.cluster.up(0, 1, 0, False, OBJECT_STORE_BYTES)
        try:
            yield running
        finally:
            running.cluster.down()


@pytest.fixture(scope="session")
def table() -> Iterator[list[dict[str, Any]]]:
    """A list for one entry a stage and event; printed at the end, and written where HASHRAY_CHAOS_RESULT says."""
    entries: list[dict[str, Any]] = []
    yield entries
    print("\n" + as_text(entries), file=sys.stderr)
    if entries and (target := os.environ.get(RESULT)):
        kept = {"cores": os.cpu_count(), "processor": processor(), "runs": entries}
        Path(target).write_text(json.dumps(kept, indent=1) + "\n")


def as_text(entries: list[dict[str, Any]]) -> str:
    """The table as docs/CLUSTER.md shows it: seconds, and how many more than without an event."""
    events = list(dict.fromkeys(entry["event"] for entry in entries))
    lines = ["| stage | unbroken | " + " | ".join(f"a node {event}" for event in events) + " |"]
    lines.append("|---|---:|" + "---:|" * len(events))
    for stage in dict.fromkeys(entry["stage"] for entry in entries):
        cells = {entry["event"]: entry for entry in entries if entry["stage"] == stage}
        shown = [f"{e['with_event_s']:.0f} ({e['lost_s']:+.0f})" if (e := cells.get(event)) else "" for event in events]
        unbroken = next(iter(cells.values()))["unbroken_s"]
        lines.append(f"| {stage} | {unbroken:.0f} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def processor() -> str:
    """The model of the processor, as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))

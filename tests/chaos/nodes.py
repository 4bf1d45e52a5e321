"""A cluster of real Ray nodes that the chaos tests add and end, commands that run on it, and a table of the costs.

The cluster is cluster/local.py's, with a head without CPUs, as `make test-chaos` and a reader of docs/CLUSTER.md have
it. A command's driver runs on this machine and joins the cluster by RAY_ADDRESS; its progress lines say when an event
may happen.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import local
import psutil
from tiny import command, wait_until

ROOT = Path(__file__).parents[2]


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
        for _ in range(count - len(kept)):  # one after the other: Ray gives a node 30 s, however busy the machine is
            self.cluster.add(1)

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

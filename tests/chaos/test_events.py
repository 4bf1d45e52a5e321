"""Every stage on a cluster whose nodes come and go comes out as on one machine that nothing happened to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import ROOT, Nodes, Run, as_text, processor
from stages import Stage, all_stages
from tiny import command, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STAGES = ("ingest", "encode", "index", "evaluate", "train", "tune")
EVENTS = ("added", "removed", "killed")
SHARE = 0.15  # of a stage that is done when its event happens
RESULT = "HASHRAY_CHAOS_RESULT"  # where the table goes as JSON, if this is set
OBJECT_STORE_BYTES = 100 << 20


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


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return all_stages(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def expected(stages: dict[str, Stage], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each stage gives on this machine alone, filled as the tests ask for it."""
    return {}


def reference(stage: Stage, stages: dict[str, Stage], expected: dict[str, Any]) -> Any:
    """The result of a stage on one machine, where nothing happens."""
    if stage.name in expected:
        return expected[stage.name]
    ingest = stages["ingest"]
    folder = Path(ingest.words[1]).parent
    if stage.name in ("encode", "evaluate"):
        reference(ingest, stages, expected)  # its corpus is their input
    out = folder / "corpus" if stage is ingest else folder / f"{stage.name}-alone"
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for _ in range(3):
        ended = subprocess.run(command(*stage.command(out)), env=alone, cwd=ROOT, capture_output=True, check=False)
        if b"Ray does not start on this machine" not in ended.stderr:  # as on a busy one
            break
    assert ended.returncode == 0, ended.stderr.decode()[-5000:]
    expected[stage.name] = stage.result(out)
    return expected[stage.name]


@pytest.fixture
def run(nodes: Nodes, tmp_path: Path) -> Iterator[Any]:
    """Start a stage on a number of fresh nodes."""
    running: list[Run] = []

    def start(stage: Stage) -> tuple[Run, Path]:
        nodes.have(stage.nodes)
        out = tmp_path / "out"
        running.append(Run(stage.command(out), tmp_path / "log", nodes.environment()))
        return running[-1], out

    yield start
    for each in running:
        each.stop()


@pytest.fixture(scope="module")
def seconds() -> dict[str, float]:
    """How long each stage took on the cluster when nothing happened."""
    return {}


@pytest.mark.parametrize("name", STAGES)
def test_on_a_head_without_cpus_a_stage_comes_out_as_on_one_machine(
    name: str, nodes: Nodes, stages: dict[str, Stage], expected: dict[str, Any], seconds: dict[str, float], run: Any
) -> None:
    wanted = reference(stages[name], stages, expected)
    started, out = run(stages[name])
    seconds[name] = started.finish()
    assert stages[name].result(out) == wanted


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_comes_out_the_same_whatever_happens_to_its_nodes(
    name: str, event: str, nodes: Nodes, stages: dict[str, Stage], expected: dict[str, Any],
    seconds: dict[str, float], table: list[dict[str, Any]], run: Any,
) -> None:  # fmt: skip
    stage = stages[name]
    wanted = reference(stage, stages, expected)
    started, out = run(stage)
    started.wait_for(lambda: started.share_done(stage.bar) >= SHARE, f"{SHARE:.0%} of {name}")
    entry: dict[str, Any] = {"stage": name, "event": event, "at": round(started.share_done(stage.bar), 3)}
    if event == "added":
        (new,) = nodes.cluster.add(1)
        entry["used"] = wait_until(
            lambda: nodes.runs(new, stage.worker) or (started.process.poll() is not None and "ended"), "the new node"
        ) is True  # fmt: skip
    else:
        victim = started.wait_for(lambda: nodes.busy(stage.worker), f"a node that works at {name}")
        (nodes.cluster.kill if event == "killed" else nodes.cluster.remove)(victim)
        # A drained node may do what it has begun, and that may be the rest of the stage.
        assert event == "removed" or started.process.poll() is None, f"{name} had ended before its node was killed"
    entry |= {"with_event_s": round(started.finish(), 1), "unbroken_s": round(seconds.get(name, 0), 1)}
    entry["lost_s"] = round(entry["with_event_s"] - entry["unbroken_s"], 1)
    assert stage.result(out) == wanted
    table.append(entry)

"""cluster/local.py: what it starts takes jobs, hears on the loopback alone, and is ended without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import local
import psutil
import pytest
from nodes import ROOT
from tiny import wait_until, write_images

SCRIPT = str(ROOT / "cluster" / "local.py")
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@contextmanager
def cluster_folder() -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets; its cluster is ended."""
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)
        cluster = local.Cluster(Path(name))
        if cluster.file.exists():
            cluster.down()


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder of the cluster under test."""
    with cluster_folder() as path:
        yield path


@pytest.fixture
def other() -> Iterator[Path]:
    """The folder of another cluster on this machine."""
    with cluster_folder() as path:
        yield path


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, "--state", str(folder), *words], capture_output=True, text=True, check=False
    )


def state_with(folder: Path, *members: local.Member) -> local.Cluster:
    """A state file that names these members."""
    cluster = local.Cluster(folder)
    cluster.write(local.State("c1", "token", 1, 2, 100, members=list(members)))
    return cluster


@pytest.mark.slow
def test_a_cluster_takes_a_job_loses_a_node_and_is_ended(folder: Path, other: Path, tmp_path: Path) -> None:
    bystander = subprocess.Popen(SLEEP, start_new_session=True)
    assert call(other, "up", "--nodes", "1", "--object-store-mib", "100").returncode == 0
    up = call(folder, "up", "--nodes", "2", "--s3", "--object-store-mib", "100")
    assert up.returncode == 0, up.stderr
    again = call(folder, "up")
    assert again.returncode == 1 and "a cluster is up already" in again.stderr

    exported = dict(line.removeprefix("export ").split("=", 1) for line in up.stdout.splitlines())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | exported
    source = write_images(tmp_path / "images", 12)
    (line,) = [line for line in up.stderr.splitlines() if "ray job submit" in line]
    words = line.removeprefix("#").strip().replace("IMAGES", source).split()
    words[0] = str(Path(sys.executable).parent / "ray")
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "s3://hashray/corpus: 12 rows in = 12 out" in done.stdout, done.stdout + done.stderr

    state = local.Cluster(folder).read()
    processes = local.processes_of(state.cluster, state.members)
    heard = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, heard
    assert call(folder, "kill", "n1").returncode == 0
    assert not local.processes_of(state.cluster, [state.node("n1")])
    assert "n1    pid" in (status := call(folder, "status").stderr) and "killed" in status
    assert "no node 'n1' is up; up are: n2" in call(folder, "kill", "n1").stderr
    left = local.processes_of(state.cluster, state.members)
    ended = call(folder, "down")
    assert f"ended {len(left)} processes" in ended.stderr, ended.stderr
    assert not psutil.wait_procs(processes, timeout=30)[1] and bystander.poll() is None
    assert "no cluster is up" in call(folder, "status").stderr
    bystander.kill()
    bystander.wait()


def test_a_process_that_got_the_id_of_another_is_not_ended(folder: Path) -> None:
    other = subprocess.Popen(SLEEP, start_new_session=True)
    start_s = psutil.Process(other.pid).create_time()
    assert state_with(folder, local.Member("n1", other.pid, start_s - 5)).down() == 0
    assert other.poll() is None
    assert state_with(folder, local.Member("n1", other.pid, start_s)).down() == 1
    other.wait()


def test_what_a_crash_left_behind_is_ended_though_the_first_process_is_gone(folder: Path) -> None:
    code = f"import subprocess; print(subprocess.Popen({SLEEP!r}).pid, flush=True)"
    first = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE,
        env=os.environ | {local.MARK: "c1/n1"},
    )  # fmt: skip
    assert first.stdout is not None
    orphan = psutil.Process(int(first.stdout.readline()))
    first.wait()
    other = subprocess.Popen(SLEEP, start_new_session=True, env=os.environ | {local.MARK: "c2/n1"})
    assert state_with(folder, local.Member("n1", first.pid, 0.0)).down() == 1
    wait_until(lambda: not orphan.is_running(), "the orphan to end")
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_folder_whose_name_is_too_long_is_refused_before_anything_starts(folder: Path) -> None:
    cluster = local.Cluster(folder / ("x" * 40))
    with pytest.raises(local.ClusterError, match="the sockets of Ray allow 44; name a shorter folder"):
        cluster.up(1, 1, 0, False, 100 << 20)
    assert not cluster.file.exists()

"""`ray job submit` of jobs/ to a cluster of this test's own: the working directory travels, the results come out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import (
    BACKBONE,
    METHOD,
    head_config,
    kill_tree,
    wait_until,
    write_corpus,
    write_images,
    write_tiny_model,
    write_toml,
    write_trunk,
)

from hashray import artifact

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MOST_UPLOADED_BYTES = 5 << 20
TRAINING: dict[str, Any] = {
    "method": {**METHOD, "rounds": 1},
    "backbone": BACKBONE,
    "epochs": 1,
    "batch_size": 16,
    "validation_rows": 6,
    "cpus_per_worker": 0.5,
}


@dataclass(frozen=True)
class Cluster:
    """A running head node: what a client needs to reach it, and where it keeps its files."""

    environment: dict[str, str]
    folder: Path
    port: int

    def submit(self, *entrypoint: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- …`, from the root of the repository, to its end."""
        words = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", *options, "--", *entrypoint]
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_head(cpus=4) as head:
        yield head


@contextmanager
def running_head(cpus: int) -> Iterator[Cluster]:
    """`ray start --head` with a token, ports and a folder of its own; ended by the ids of its processes.

    Not by `ray stop`, which ends every Ray of this user on the machine. In /tmp: a socket's path may not be long.
    """
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as name:
        dashboard, port = free_port(), free_port()
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # the jobs' `python` is the one that runs this test
            "RAY_TMPDIR": name,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        words = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", str(cpus), "--temp-dir", name,
            "--port", str(port), "--dashboard-port", str(dashboard),
            "--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", str(free_port()),
            "--object-store-memory", str(400 << 20),
            "--disable-usage-stats",
        ]  # fmt: skip
        client = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        log = Path(name) / "start.log"
        head = start(words, environment, client, log) or start(words, environment, client, log)
        assert head is not None, log.read_text()
        try:
            yield Cluster(client, Path(name), port)
        finally:
            kill_tree(psutil.Process(head.pid))
            head.wait()


def start(
    words: list[str], environment: dict[str, str], client: dict[str, str], log: Path
) -> subprocess.Popen[bytes] | None:
    """Start a head node, wait until it takes jobs; None where Ray gave up, as it does after 30 s on a busy machine."""
    with log.open("wb") as sink:
        head = subprocess.Popen(words, env=environment, stdout=sink, stderr=sink)
    root = psutil.Process(head.pid)

    def takes_jobs() -> bool:
        if "Ray runtime started" not in log.read_text():
            return False
        listed = subprocess.run([str(BIN / "ray"), "job", "list"], env=client, capture_output=True, check=False)
        return listed.returncode == 0

    try:
        wait_until(lambda: head.poll() is not None or takes_jobs(), "the cluster to take jobs")
    except BaseException:
        kill_tree(root)
        raise
    if head.poll() is None:
        return head
    return None


def test_the_pipeline_as_a_job(cluster: Cluster, tmp_path: Path) -> None:
    source = write_images(tmp_path / "images", 48)
    config = write_toml(tmp_path / "train.toml", TRAINING)
    out = tmp_path / "out"
    small = ["--workers", "1", "--cpus-per-worker", "0.5"]
    ended = cluster.submit("python", "jobs/pipeline.py", config, "--source", source, "--out", str(out), *small)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("corpus", "model", "codes", "index", "evaluation"):
        assert artifact.verify(out / name) == []
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert metrics["results"][0]["name"] == "dseh"
    # What travelled is the code alone: no environment, no cache, no result.
    packages = list(cluster.folder.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*"))
    folders = [path for path in packages if path.is_dir()]
    assert folders
    for folder in folders:
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MOST_UPLOADED_BYTES
        assert (folder / "hashray" / "cli.py").is_file() and not (folder / ".venv").exists()

    # Run again, one stage of it alone: finished already. And a wrong request fails the job with our exit code.
    again = ["python", "jobs/ingest.py", source, "--out", str(out / "corpus")]
    ended = cluster.submit(*again)
    assert ended.returncode == 0 and "is finished already: 48 rows" in ended.stdout + ended.stderr
    ended = cluster.submit("python", "jobs/ingest.py", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x"))
    assert ended.returncode != 0
    text = ended.stdout + ended.stderr
    assert f"{tmp_path / 'nowhere'}" in text and "exit code 2" in text


def test_jobs_run_the_code_that_was_sent_and_without_the_token_nothing(cluster: Cluster) -> None:
    ended = cluster.submit("python", "-c", "import hashray, sys; print(hashray.__file__, sys.executable)")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "runtime_resources/working_dir_files" in ended.stdout
    assert str(BIN / "python") in ended.stdout
    stranger = replace(cluster, environment=cluster.environment | {"RAY_AUTH_TOKEN": uuid.uuid4().hex})
    ended = stranger.submit("python", "-c", "print('unreachable')")
    assert ended.returncode != 0 and "unreachable\n" not in ended.stdout


@contextmanager
def second_node(cluster: Cluster) -> Iterator[psutil.Process]:
    """Another node of the cluster, on this machine; what it yields may be killed.

    With a folder of its own: of one that it shares with the head it deletes the jobs' working directories at its end.
    """
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as name:
        words = [
            str(BIN / "ray"), "start", "--address", f"127.0.0.1:{cluster.port}", "--block", "--num-cpus", "2",
            "--resources", '{"second": 1}',
            "--temp-dir", name, "--object-store-memory", str(200 << 20),
            "--dashboard-agent-listen-port", str(free_port()), "--disable-usage-stats",
        ]  # fmt: skip
        log = Path(name) / "start.log"
        with log.open("wb") as sink:
            started = subprocess.Popen(words, env=cluster.environment | {"RAY_TMPDIR": name}, stdout=sink, stderr=sink)
        root = psutil.Process(started.pid)
        try:
            wait_until(lambda: "Ray runtime started" in log.read_text() or started.poll() is not None, "a second node")
            assert started.poll() is None, log.read_text()
            yield root
        finally:
            if started.poll() is None:
                kill_tree(root)
            started.wait()


def test_a_sweep_as_a_job_on_two_nodes_comes_out_as_on_one_though_a_node_is_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    corpus, weights = str(tmp_path / "corpus"), tmp_path / "trunk.pth"
    write_corpus(corpus, 60, 25, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    write_trunk(weights)
    config = {
        **head_config(weights), "validation_rows": 8, "cpus_per_worker": 2.0,  # so the head trains two at once
        "space": {"optim.lr": {"log": [1e-4, 1e-1]}, "method.margin_ratio": {"linear": [0.05, 1.0]}},
        "search": {"trials": 6, "grace_epochs": 1, "reduction_factor": 2, "at_once": 3, "report_seeds": []},
    }  # fmt: skip
    path = write_toml(tmp_path / "sweep.toml", config)
    elsewhere, two, one = tmp_path / "elsewhere", tmp_path / "two", tmp_path / "one"

    def ended(out: Path) -> int:
        return sum(1 for file in out.glob("trials/*/*/*/position.json") if file.parent.name.isdigit())

    with second_node(cluster) as node, ThreadPoolExecutor(1) as pool:
        # With the driver, and so what waits for the trials, away from the head.
        words = ["python", "jobs/tune.py", path, "--corpus", corpus, "--out", str(elsewhere)]
        done = cluster.submit(*words, options=["--entrypoint-resources", '{"second": 1}'])
        assert done.returncode == 0, done.stdout + done.stderr
        job = pool.submit(cluster.submit, "python", "jobs/tune.py", path, "--corpus", corpus, "--out", str(two))
        wait_until(lambda: ended(two) >= 4 or job.done(), "four segments")
        kill_tree(node)
        done = job.result()
    assert done.returncode == 0, done.stdout + done.stderr
    done = cluster.submit("python", "jobs/tune.py", path, "--corpus", corpus, "--out", str(one))
    assert done.returncode == 0, done.stdout + done.stderr
    assert artifact.verify(two) == [] == artifact.verify(one)
    for name in ("leaderboard.parquet", "epochs.parquet"):
        assert (elsewhere / name).read_bytes() == (two / name).read_bytes() == (one / name).read_bytes()
    assert len({artifact.load_manifest(out, "sweep").id for out in (elsewhere, two, one)}) == 1


def test_a_head_without_cpus_waits_for_nodes_and_uses_all_that_come(tmp_path: Path) -> None:
    source, out, alone = write_images(tmp_path / "images", 60), tmp_path / "out", tmp_path / "alone"
    words = ["--rows-per-part", "3", "--out"]
    with running_head(cpus=0) as cluster, ThreadPoolExecutor(1) as pool:
        job = pool.submit(cluster.submit, "python", "jobs/ingest.py", source, *words, str(out))
        wait_until(lambda: (out / "progress").exists() or job.done(), "the job to have listed its source")
        with second_node(cluster), second_node(cluster):
            done = job.result()
            model, codes = tmp_path / "model", tmp_path / "codes"
            write_tiny_model(model)
            encoded = cluster.submit(
                "python", "jobs/encode.py", "--model", str(model), "--corpus", str(out), "--out", str(codes)
            )
            indexed = cluster.submit(
                "python", "jobs/build_index.py", "--codes", str(codes), "--out", str(tmp_path / "i")
            )
    for ended in (done, encoded, indexed):
        assert ended.returncode == 0, ended.stdout + ended.stderr
    text = " ".join((done.stdout + done.stderr).split())
    assert "waiting for the cluster to scale up" in text
    local = [sys.executable, "-m", "hashray", "ingest", source, *words, str(alone), "--ray", "never"]
    subprocess.run(local, check=True, capture_output=True)
    assert artifact.load_manifest(out).id == artifact.load_manifest(alone).id
    assert [artifact.verify(out), artifact.verify(codes), artifact.verify(tmp_path / "i")] == [[], [], []]

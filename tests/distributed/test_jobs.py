"""`ray job submit` of jobs/ to a cluster of this test's own: the working directory travels, the results come out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import BACKBONE, METHOD, kill_tree, wait_until, write_images, write_toml

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

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- …`, from the root of the repository, to its end."""
        words = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *entrypoint]
        return subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head` with a token, ports and a folder of its own; ended by the ids of its processes.

    Not by `ray stop`, which ends every Ray of this user on the machine. In /tmp: a socket's path may not be long.
    """
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp", ignore_cleanup_errors=True) as name:
        dashboard = free_port()
        environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",  # the jobs' `python` is the one that runs this test
            "RAY_TMPDIR": name,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        words = [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "4", "--temp-dir", name,
            "--port", str(free_port()), "--dashboard-port", str(dashboard),
            "--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", str(free_port()),
            "--object-store-memory", str(400 << 20),
            "--disable-usage-stats",
        ]  # fmt: skip
        client = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
        log = Path(name) / "start.log"
        head = start(words, environment, client, log) or start(words, environment, client, log)
        assert head is not None, log.read_text()
        try:
            yield Cluster(client, Path(name))
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
    stranger = Cluster(cluster.environment | {"RAY_AUTH_TOKEN": uuid.uuid4().hex}, cluster.folder)
    ended = stranger.submit("python", "-c", "print('unreachable')")
    assert ended.returncode != 0 and "unreachable\n" not in ended.stdout

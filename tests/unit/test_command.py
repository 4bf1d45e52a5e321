"""The command as a process: any locale, a full disk, a folder that is gone, a cluster that is not there, Ctrl-C."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny import BACKBONE, METHOD, file_of, png, wait_until, write_corpus, write_images, write_toml


def run(*words: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONUTF8", "PYTHONIOENCODING")}
    command = [sys.executable, "-m", "hashray", *map(str, words)]
    return subprocess.run(
        command, env=env | environment, cwd=cwd, capture_output=True, check=False, encoding="utf-8", errors="replace"
    )


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    ],
)
def test_any_locale_reads_and_prints_every_name(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "bilder" / "kätzchen").mkdir(parents=True)
    (tmp_path / "bilder" / "kätzchen" / "日本.png").write_bytes(png(0))
    done = run("ingest", tmp_path / "bilder", "--out", tmp_path / "corpus", **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert '"kätzchen"' in file_of(tmp_path / "corpus", "classes.json").read_text(encoding="utf-8")


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    script = f"cd {folder} && rmdir {folder} && exec {sys.executable} -m hashray describe {tmp_path}"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "the working directory was deleted" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root to mount")
def test_a_full_disk_is_said_and_the_same_command_goes_on(tmp_path: Path) -> None:
    source, disk = write_images(tmp_path / "source", 60), tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine mounts nothing")
    try:
        words = ("ingest", source, "--out", disk / "corpus", "--rows-per-part", "10")
        done = run(*words)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "No space left on device. Free some space and run the same command again" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert run(*words).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 4)
    words = ("ingest", source, "--out", tmp_path / "corpus")
    address = f"127.0.0.1:{free_port()}"
    done = run(*words, RAY_ADDRESS=address)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"no Ray cluster answers at RAY_ADDRESS={address}" in done.stderr and "Connection refused" in done.stderr


def test_something_else_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hashray.engine import session
    from hashray.errors import RunError

    monkeypatch.setattr(session, "CONNECT_TIMEOUT_S", 1)
    with socket.socket() as listener:  # answers a connection, and then nothing
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(RunError, match="something listens there, but it does not answer"):
            session._require_listener(f"127.0.0.1:{listener.getsockname()[1]}")


def test_a_temporary_folder_with_a_path_too_long_for_ray(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", 4)
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    done = run("ingest", source, "--out", tmp_path / "corpus", "--ray", "always", TMPDIR=str(folder))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Ray cannot start below TMPDIR=" in done.stderr and "Set TMPDIR to a shorter folder" in done.stderr


def test_help_as_a_word_and_an_output_that_is_closed(tmp_path: Path) -> None:
    for words in (["help"], ["index", "help"], ["index", "--help"]):
        done = run(*words)
        assert done.returncode == 0 and "usage: hashray" in done.stdout
    write_corpus(str(tmp_path / "corpus"), 6, 6)
    line = f"{shlex.quote(sys.executable)} -m hashray describe {shlex.quote(str(tmp_path / 'corpus'))}"
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(f"{line} {closed}", shell=True, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Traceback" not in done.stderr
    done = run("search", "index", "--model", "model", "--image")
    assert done.returncode == 2 and "--image: Tuple should have at least 1 item" in done.stderr


def interrupted(words: list[str], ready: Callable[[str], bool], log: Path) -> tuple[int, str]:
    """Run a command, press Ctrl-C once what it has printed is `ready`; its exit code and text. Nothing is left."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "hashray", *words], env=env, stdout=sink, stderr=sink, start_new_session=True
        )
        try:
            wait_until(lambda: ready(log.read_text()) or process.poll() is not None, "the command to be half way")
            assert process.poll() is None, log.read_text()[-2000:]
            below = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the command and to all that it started
            code = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
    return code, log.read_text()


def train_words(tmp_path: Path, *flags: str) -> list[str]:
    write_corpus(str(tmp_path / "corpus"), 60, 30)
    config = {"method": METHOD, "backbone": BACKBONE, "epochs": 100_000, "batch_size": 8, "tensorboard": False}
    path = write_toml(tmp_path / "config.toml", config)
    return ["train", path, "--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "model"), *flags]


def said_what_to_run_again(text: str, words: list[str]) -> bool:
    return f"to go on, run the same command again: hashray {' '.join(words)}" in " ".join(text.split())


def test_ctrl_c_while_this_process_trains(tmp_path: Path) -> None:
    words = train_words(tmp_path, "--ray", "never")
    code, text = interrupted(words, lambda text: '"epoch"' in text, tmp_path / "log")
    assert code == 130 and said_what_to_run_again(text, words) and "Traceback" not in text
    assert list((tmp_path / "model" / "checkpoints").rglob("checkpoint.safetensors"))


@pytest.mark.parametrize("point", ["workers to start", pytest.param('"epoch"', marks=pytest.mark.slow)])
def test_ctrl_c_while_ray_starts_and_while_it_trains(tmp_path: Path, point: str) -> None:
    words = train_words(tmp_path, "--ray", "always", "--cpus-per-worker", "0.5")
    code, text = interrupted(words, lambda text: point in text, tmp_path / "log")
    assert code == 130 and said_what_to_run_again(text, words) and "Traceback" not in text

"""`hashray serve` as a process: it says when it is ready, follows the index, and drains when a signal comes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest
from serving import write_all

import hashray
from hashray.cli import main


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("command"))


@contextmanager
def serving(at, *flags):
    """The process, its url, and the lines of its log as they come."""
    words = ["serve", at["index"], "--model", at["model"], "--port", "0", *flags]
    command = [sys.executable, "-m", "hashray", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
        try:
            ready = next(line for line in lines if line.get("event") == "ready")
            yield process, f"http://127.0.0.1:{ready['port']}", lines
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(at, number):
    with serving(at) as (process, url, _):
        assert httpx.post(f"{url}/search", json={"id": "0001"}).status_code == 200
        process.send_signal(number)
        assert process.wait(60) == 0


def test_it_says_that_it_ends_and_answers_meanwhile(at):
    with serving(at, "--drain-s", "3600") as (process, url, lines), httpx.Client(base_url=url) as client:
        assert client.get("/ready").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert next(line for line in lines if line.get("event") == "draining")["signal"] == "SIGTERM"
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
        answer = client.get("/ready")
        assert answer.status_code == 503 and "ending" in answer.json()["why"]
        assert answer.headers["connection"] == "close"
        assert client.post("/search", json={"id": "0001"}).status_code == 200
        process.send_signal(signal.SIGTERM)  # a second one waits no longer
        assert process.wait(60) == 0


def test_a_client_that_asks_on_and_on_is_never_cut_off(at):
    """Every request is answered, until no connection is taken any more."""
    with serving(at, "--drain-s", "0.3") as (process, url, lines), httpx.Client(base_url=url) as client:
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
        statuses = [client.post("/search", json={"id": "0001"}).status_code]
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            while True:
                statuses.append(client.post("/search", json={"id": "0001"}).status_code)
        assert len(statuses) > 1 and set(statuses) == {200}
        assert process.wait(60) == 0


def test_it_follows_the_index_by_itself(tmp_path):
    at = write_all(tmp_path)
    with serving(at, "--poll-s", "0.02") as (_, url, lines):
        number = hashray.open_catalog(at["index"]).delete(["0001"])
        assert next(line for line in lines if line.get("event") == "reloaded")["version"] == number
        assert httpx.get(f"{url}/version").json()["indexes"][0]["version"] == number


def test_wrong_flags_are_said(at, capsys):
    serve = ["serve", at["index"], "--model", at["model"]]
    assert main([*serve, "--port", "70000"]) == 2 and "port" in capsys.readouterr().err
    assert main(["serve", at["corpus"], "--model", at["model"]]) == 2
    assert "is not an index" in capsys.readouterr().err
    assert main([*serve, "--token-file", "/none", "--port", "0"]) == 2
    assert "token file /none cannot be read" in capsys.readouterr().err

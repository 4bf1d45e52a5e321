"""What the driver shows and how big a pool is; errors that come back through Ray. No Ray is started."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from hashray.engine.session import API_SERVER, NOBODY, WorkersConfig, connect, memory_environment, require_room, unwrap
from hashray.errors import InputError, RunError, TooManyBadRows
from hashray.progress import Bar, console, say, show_table


def raised(error: BaseException, cause: BaseException | None) -> BaseException:
    error.__cause__ = cause
    return error


def test_the_error_inside_ray_errors_is_found() -> None:
    inner = InputError("no such file")
    wrapped = RayTaskError("process", "traceback", inner).as_instanceof_cause()
    for error in (
        inner,
        wrapped,
        raised(RuntimeError("x"), inner),
        raised(RuntimeError("y"), raised(ValueError("z"), wrapped)),
    ):
        cause = unwrap(error)
        assert type(cause) is InputError
        assert str(cause) == "no such file"
        assert cause.exit_code == 2


def test_an_error_that_is_not_ours_comes_back_as_it_is() -> None:
    error = ValueError("x")
    assert unwrap(error) is error
    assert unwrap(raised(error, error)) is error  # `raise error from error`
    assert unwrap(raised(KeyError("a"), raised(error, None))).args == ("a",)
    assert unwrap(raised(TooManyBadRows("t"), TooManyBadRows("u"))).args == ("t",)


@pytest.mark.parametrize(
    ("config", "resources", "cores", "nodes", "expected"),
    [
        ({}, {"CPU": 4}, 2, 1, 2),
        ({}, {"CPU": 4}, 2, 3, 4),
        ({"cpus_per_worker": 2}, {"CPU": 8}, 16, 3, 4),
        ({"cpus_per_worker": 8}, {"CPU": 4}, 16, 1, 1),
        ({"gpus_per_worker": 0.5}, {"CPU": 4, "GPU": 2}, 2, 1, 4),
        ({"gpus_per_worker": 1}, {"CPU": 4}, 2, 1, 1),
        ({"workers": 7}, {"CPU": 4}, 2, 1, 7),
    ],
)
def test_size_of_a_pool(
    config: dict[str, Any],
    resources: dict[str, float],
    cores: int,
    nodes: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "nodes", lambda: [{}] * nodes)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert WorkersConfig(**config).most() == expected


@pytest.mark.parametrize(
    ("nodes", "wanted", "fits"),
    [
        ([{"CPU": 4}], (1, 0, 4), True),
        ([{"CPU": 4}], (1, 0, 5), False),
        ([{"CPU": 4}], (0.8, 0, 5), True),  # 4 // 0.8 is 4
        ([{"CPU": 4}], (8, 0, 1), False),
        ([{"CPU": 4}], (1, 1, 1), False),
        ([{"CPU": 4}], (0, 0, 1), True),
        ([{"CPU": 4}, {"CPU": 4}], (3, 0, 3), False),  # one each: 8 CPUs are not 9, and not 6 in one place
        ([{"CPU": 4}, {"CPU": 4, "GPU": 2}], (1, 0.5, 4), True),
    ],
)
def test_what_fits_on_no_machine_is_said_at_once(
    nodes: list[dict[str, float]],
    wanted: tuple[float, float, int],
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [*({"Alive": True, "Resources": r} for r in nodes), {"Alive": False}])
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "cluster_resources", lambda: total)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if fits:
        require_room(*wanted)
    else:
        with pytest.raises(InputError, match=f"each were asked for, and there are {total['CPU']:g} CPUs and"):
            require_room(*wanted)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may grow
    require_room(*wanted)
    assert ("waiting for the cluster to scale up" in capsys.readouterr().err) == (not fits)


def test_a_cluster_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise ConnectionError("ray client timed out")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    with pytest.raises(RunError, match=r"no Ray cluster answers at RAY_ADDRESS=10\.0\.0\.9:6379"):
        connect()


def test_connect_starts_no_second_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.delenv(API_SERVER, raising=False)

    def init(**options: Any) -> None:
        started.append({**options, API_SERVER: os.environ.get(API_SERVER)})

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    connect()
    assert started == []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect()
    assert started[0]["address"] == "local"
    assert started[0]["num_cpus"] >= 4
    assert started[0][API_SERVER] == NOBODY and API_SERVER not in os.environ
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    connect()
    assert started[1]["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://store:9000"
    assert "secret" not in str(started[1])
    assert started[1][API_SERVER] is None


def test_without_a_terminal_progress_is_json_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("hashray.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(type(console), "is_terminal", property(lambda self: False))
    with Bar("encode", 10, "rows", done=2) as bar:
        for count in (1, 3, 1, 3):
            bar.add(count, loss=np.float32(0.5))
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [line["done"] for line in lines] == [6, 10]  # at 3 s and at the end; not at 1 s and 4 s
    assert lines[0] == {
        "stage": "encode", "done": 6, "total": 10, "unit": "rows", "per_s": 1.3, "eta_s": 3.0, "loss": "0.5",
    }  # fmt: skip
    assert lines[1]["eta_s"] == 0.0


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(type(console), "is_terminal", property(lambda self: True))
    with Bar("encode", 2, "rows") as bar:
        bar.add(2, loss=1)
    err = capsys.readouterr().err
    assert "encode" in err
    assert "{" not in err


def test_say_and_show_table(capsys: pytest.CaptureFixture) -> None:
    say("[bold]rows[/bold] in = " + "9" * 300)
    show_table("results", ["name", "mAP"], [["itq", "0.5"]])
    out, err = capsys.readouterr()
    assert err == "[bold]rows[/bold] in = " + "9" * 300 + "\n"
    assert "itq" in out
    assert "mAP" in out


FAULTS = """
import resource, torch
torch.set_num_threads(1)
for _ in range(3):
    torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are of glibc")
def test_memory_that_is_freed_is_not_faulted_in_again() -> None:
    def faults(**environment: str) -> int:
        # Through a shell, as Ray starts a worker: glibc hands on to it what it has read of the settings.
        command = ["bash", "-c", 'exec "$0" "$@"', sys.executable, "-c", FAULTS]
        done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
        return int(done.stdout)

    default = faults()
    assert default > 5 * (64 << 20) // (2 << 20)  # as many as with huge pages, at least
    assert faults(**memory_environment()) < default / 10

"""Tasks whose workers die: the same call again, said, and not without end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ray import cloudpickle

from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.tasks import run_tasks
from hashray.errors import InputError, RunError
from hashray.progress import Bar

pytestmark = pytest.mark.usefixtures("ray_session")


def call(number: int, folder: str, advance: Callable[[int], None]) -> int:
    with Path(folder, f"attempt-{number}").open("a") as log:
        log.write("x")
    advance(1)
    if number == 9 or (number == 2 and Path(folder, "attempt-2").read_text() == "x"):
        os._exit(1)
    if number == 8:
        raise InputError("a fault of the request, found by a task")
    return number * 10


def results(numbers: range, folder: Path) -> dict[int, int]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Bar("t", len(numbers), "rows") as bar:
        jobs = {number: (number,) for number in numbers}
        pool = WorkersConfig(workers=2, cpus_per_worker=0.5, ray="always")
        return dict(run_tasks(call, jobs, pool, False, Meter(bar, "shard"), (str(folder),)))


def test_a_call_whose_worker_dies_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results(range(4), tmp_path) == {0: 0, 1: 10, 2: 20, 3: 30}
    assert (tmp_path / "attempt-2").read_text() == "xx" and (tmp_path / "attempt-3").read_text() == "x"
    assert "note: t: shard 2 runs again, its worker was lost" in capsys.readouterr().err
    with pytest.raises(RunError, match="t: shard 9 lost its worker 4 times"):
        results(range(9, 10), tmp_path)
    with pytest.raises(InputError, match="a fault of the request, found by a task"):
        results(range(8, 9), tmp_path)
    assert (tmp_path / "attempt-8").read_text() == "x"

"""A stage is published once, whichever run finishes; short work runs in this process and gives the same parts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from hashray import artifact
from hashray.artifact import Manifest
from hashray.engine.parts import BadRow, Output, PartWorker, run_parts
from hashray.engine.reports import Meter
from hashray.engine.session import WorkersConfig
from hashray.engine.stage import require_free, require_no_artifact, run_stage
from hashray.engine.tasks import run_tasks
from hashray.errors import AlreadyExists, CorruptArtifact, InputError, MismatchError, RunError, TooManyBadRows
from hashray.progress import Bar
from hashray.storage import open_store

HERE = WorkersConfig(ray="never")


def manifest(plan: str, kind: str = "corpus") -> Manifest:
    return Manifest(kind=kind, project_version="0", config={}, parents={}, files=(), info={"plan": plan})  # type: ignore[arg-type]


def test_a_rerun_finds_the_artifact_and_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = run_stage(store, "corpus", "a", lambda: artifact.publish(store, manifest("a")))
    store.write("progress/a/000000.json", b"{}")
    assert run_stage(store, "corpus", "a", lambda: pytest.fail("worked again")) == first
    assert not list(store.list("progress/"))
    with pytest.raises(AlreadyExists, match=r"holds a finished corpus .* of another input or configuration"):
        run_stage(store, "corpus", "b", lambda: pytest.fail("worked"))
    with pytest.raises(MismatchError, match="is a corpus, expected a model"):
        run_stage(store, "model", "a", lambda: pytest.fail("worked"))


def test_of_two_runs_with_one_out_the_second_says_who_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path)

    def overtaken() -> Manifest:
        artifact.publish(store, manifest("a"))  # the other run
        require_free(store, "a")
        raise AssertionError("went on")

    assert run_stage(store, "corpus", "a", overtaken) == manifest("a")
    assert f"{tmp_path}: finished by another run" in capsys.readouterr().err


def test_a_run_that_fails_after_the_other_finished_has_succeeded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path)

    def disturbed() -> Manifest:
        artifact.publish(store, manifest("a"))  # the other run, which then clears the checkpoints of both
        raise InputError("checkpoints/x not found")

    assert run_stage(store, "corpus", "a", disturbed) == manifest("a")
    said = capsys.readouterr().err
    assert "note: this run ended with: checkpoints/x not found" in said and "finished by another run" in said
    with pytest.raises(InputError, match="really"):
        run_stage(open_store(tmp_path / "b"), "corpus", "a", fail)


def test_a_finished_artifact_that_lost_a_file_is_not_taken_for_whole(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = artifact.write_file(store, "classes.json", b"[]")
    run_stage(
        store, "corpus", "a", lambda: artifact.publish(store, manifest("a").model_copy(update={"files": (record,)}))
    )
    run_stage(store, "corpus", "a", fail)
    store.write("classes.json", b"[1]")
    with pytest.raises(
        CorruptArtifact, match=r"classes\.json has 3 bytes, its manifest says 2\. Restore it from a copy"
    ):
        run_stage(store, "corpus", "a", fail)
    store.delete("classes.json")
    with pytest.raises(
        CorruptArtifact, match=r"classes\.json is missing: .*delete the artifact and run the stage again"
    ):
        run_stage(store, "corpus", "a", fail)
    with pytest.raises(InputError, match="is a finished corpus: pictures need a folder that is no artifact"):
        require_no_artifact(store, "pictures")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(InputError, match=f"--out {place} cannot be written: "):
            run_stage(open_store(place), "corpus", "a", lambda: pytest.fail("worked"))


def fail() -> Manifest:
    raise InputError("really")


class Doubles(PartWorker):
    """Rows of a part doubled; part 3 fails, part 4 puts a row aside."""

    closed: list[int]

    def __init__(self, closed: list[int]) -> None:
        self.closed = closed

    def process(self, unit: Mapping[str, Any], advance: Callable[[int], None]) -> Output:
        advance(unit["rows"])
        if unit["index"] == 3:
            raise ZeroDivisionError("a fault of the code")
        bad = [BadRow(id="4-0", reason="broken")] if unit["index"] == 4 else []
        return Output(pa.table({"id": [f"{unit['index']}-{i}" for i in range(len(bad), unit["rows"])]}), bad)

    def close(self) -> None:
        self.closed.append(threading.get_ident())


def run(folder: Path, indices: list[int], max_bad: float = 0.0, **options: Any) -> list[Any]:
    units = [{"index": i, "rows": 2} for i in indices]
    return run_parts(open_store(folder), "p", units, Doubles, {"closed": []}, HERE, "t", max_bad, True, **options)


def test_short_work_starts_no_ray(tmp_path: Path) -> None:
    running = ray.is_initialized()
    assert [part.index for part in run(tmp_path, [0, 1, 2])] == [0, 1, 2]
    assert ray.is_initialized() == running

    def add(x: int, y: int, advance: Callable[[int], None]) -> int:
        advance(1)
        return x + y

    with Bar("t", 2, "rows") as bar:
        assert list(run_tasks(add, {0: (1,), 1: (2,)}, HERE, True, Meter(bar, "task"), (10,))) == [(0, 11), (1, 12)]
        assert bar.done == 2


def test_an_error_in_this_process_is_final_and_finished_parts_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="t: ZeroDivisionError: a fault of the code"):
        run(tmp_path, [0, 3])
    run(tmp_path, [0])
    with pytest.raises(TooManyBadRows, match="1 of 2 rows could not be used"):
        run(tmp_path / "b", [4])
    with pytest.raises(TooManyBadRows, match="2 of 3 rows could not be used"):  # one was lost before
        run(tmp_path / "c", [4], 0.5, lost=[BadRow(id="x", reason="no path")])
    assert len(run(tmp_path / "c", [4], 0.9, lost=[BadRow(id="x", reason="no path")])) == 1


@pytest.mark.parametrize(
    ("choice", "short", "address", "here"),
    [("auto", True, None, True), ("auto", False, None, False), ("auto", True, "auto", False),
     ("never", False, "auto", True), ("always", True, None, False)],
)  # fmt: skip
def test_where_work_runs(
    choice: Any, short: bool, address: str | None, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert WorkersConfig(ray=choice).runs_here(short) is here
    monkeypatch.setattr(ray, "is_initialized", lambda: True)  # a cluster that is joined already costs nothing more
    assert WorkersConfig(ray="auto").runs_here(True) is False

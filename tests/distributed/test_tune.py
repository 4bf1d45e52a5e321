"""Sweeps on Ray Tune: the same sweep whatever was killed, failures with their reasons, and a winner one can train."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tomli_w
from tiny import head_config, kill_command_when, write_corpus, write_trunk

from hashray import artifact
from hashray.cli import main

pytestmark = pytest.mark.usefixtures("ray_session")
WEIGHTS = Path(tempfile.gettempdir()) / f"tune-trunk-{os.getpid()}.pth"
CONFIG: dict[str, Any] = {
    **head_config(WEIGHTS),
    "validation_rows": 8,
    "space": {"optim.lr": {"log": [1e-4, 1e-1]}, "method.margin_ratio": {"linear": [0.05, 1.0]}},
    "search": {"trials": 6, "grace_epochs": 1, "reduction_factor": 2, "at_once": 2, "report_seeds": []},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = str(tmp_path_factory.mktemp("sweep") / "corpus")
    write_corpus(url, 60, 25, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    write_trunk(WEIGHTS)
    yield url
    WEIGHTS.unlink()


def written(folder: Path, **changes: Any) -> str:
    path = folder / "sweep.toml"
    path.write_bytes(tomli_w.dumps({**CONFIG, **changes}).encode())
    return str(path)


def board(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "leaderboard.parquet").to_pylist()
    return found


def ends(out: Path) -> dict[str, int]:
    """Every segment that has ended, and when its file was written."""
    found = out.glob("trials/*/*/state.json")
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in found if p.parent.name.isdigit()}


def test_a_sweep_that_was_stopped_goes_on_to_the_same_leaderboard_and_trains_nothing_twice(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(WEIGHTS.parent)  # weights by a path from here: workers are somewhere else
    out, path = tmp_path / "sweep", written(tmp_path, backbone={**CONFIG["backbone"], "weights": WEIGHTS.name})
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith('{"stage": "tune"')]
    assert lines[-1]["done"] == lines[-1]["total"] == 6 and lines[-1]["best"] == board(out)[0]["score"]
    assert artifact.verify(str(out)) == []
    first = artifact.load_manifest(out, "sweep")
    rows = board(out)
    assert {row["trial"] for row in rows} == set(range(6)) and len({row["folder"] for row in rows}) == 6
    assert {row["state"] for row in rows} == {"finished", "stopped"}
    assert first.info["passes"] == sum(row["passes"] for row in rows) < first.info["passes_of_full_grid"] == 24
    assert json.loads(next(row["point"] for row in rows if row["trial"] == 0))["optim.lr"] == 3e-3
    told = (out / "leaderboard.parquet").read_bytes(), (out / "passes.parquet").read_bytes()
    # As if it had been killed: a trial has lost its last stretch, another never began, and nothing was published.
    (out / "manifest.json").unlink()
    (out / "leaderboard.parquet").unlink()
    kept = ends(out)
    longest = max(rows, key=lambda row: row["passes"])
    lost = [f"trials/{longest['folder']}/{longest['passes']}"]
    lost += [str(Path(key).parent) for key in kept if rows[-1]["folder"] in key]
    for folder in lost:
        for file in (out / folder).iterdir():
            file.unlink()
    gone = {key for key in kept if str(Path(key).parent) in lost}
    # The stretch before the lost one gave up its weights when that one ended; a killed sweep would still have them.
    for key in [key for key in kept if longest["folder"] in key]:
        (out / key).unlink(missing_ok=True)
        gone.add(key)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert ((out / "leaderboard.parquet").read_bytes(), (out / "passes.parquet").read_bytes()) == told
    after = ends(out)
    assert after.keys() == kept.keys()
    assert {key for key in kept if after[key] != kept[key]} == gone
    assert artifact.load_manifest(out, "sweep").id == first.id
    # Finished: nothing runs. Another sweep does not go where one is.
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert main(["tune", path, "--corpus", corpus, "--out", str(out), "--search.seed", "1"]) == 1


@pytest.mark.slow
def test_a_trial_that_fails_is_reported_with_its_reason_and_the_others_go_on(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    space = {"optim.lr": {"choice": [3e-3, 1e30]}, "method.margin_ratio": {"linear": [0.05, 1.0]}}
    search = {**CONFIG["search"], "trials": 4, "algorithm": "random", "max_failures": 0}
    out = tmp_path / "sweep"
    path = written(tmp_path, space=space, search=search)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    rows = board(out)
    failed = [row for row in rows if row["state"] == "failed"]
    assert 0 < len(failed) < 4 and rows[-len(failed) :] == failed
    assert all("the loss is not finite" in row["reason"] and "1e+30" in row["point"] for row in failed)
    assert "the loss is not finite" in (out / "report.html").read_text()
    costs = json.loads((out / "costs.json").read_text())
    assert all(costs[str(row["trial"])]["seconds"] > 0 for row in rows)
    path = written(tmp_path, space={"optim.lr": {"choice": [1e30, 1e31]}}, optim={"lr": 1e30}, search=search)
    assert main(["tune", path, "--corpus", corpus, "--out", str(tmp_path / "none")]) == 1
    assert "all 4 trials failed; trial 0: " in capfd.readouterr().err
    assert not (tmp_path / "none/manifest.json").exists()


@pytest.mark.slow
def test_the_winner_trains_to_its_score_and_is_scored_beside_the_default(corpus: str, tmp_path: Path) -> None:
    search = {**CONFIG["search"], "scheduler": "median", "report_seeds": [1, 2]}
    out = tmp_path / "sweep"
    assert main(["tune", written(tmp_path, search=search), "--corpus", corpus, "--out", str(out)]) == 0
    rows, found = board(out), artifact.load_manifest(out, "sweep").info
    model = tmp_path / "model"
    assert main(["train", str(out / "best.toml"), "--corpus", corpus, "--out", str(model)]) == 0
    if rows[0]["state"] == "finished":
        assert artifact.load_manifest(model, "model").info["validation_map"] == rows[0]["score"]
    assert set(found["compared"]) == ({"winner", "default"} if rows[0]["trial"] else {"winner"})
    for own in found["compared"].values():
        assert [line["seed"] for line in own["seeds"]] == [1, 2]
        assert all(0 <= line["query_mAP"] <= 1 for line in own["seeds"])


@pytest.mark.slow
def test_a_population_exchanges_weights_and_its_best_schedule_trains_again_to_its_score(
    corpus: str, tmp_path: Path
) -> None:
    search = {**CONFIG["search"], "scheduler": "pbt", "algorithm": "random", "trials": 4}
    out, model = tmp_path / "sweep", tmp_path / "model"
    path = written(tmp_path, search=search)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    rows, first = board(out), artifact.load_manifest(out, "sweep")
    assert {row["state"] for row in rows} == {"finished"} and first.info["passes"] == 16
    configs = [json.loads(row["config"]) for row in rows]
    # One of four is the worst at each of three exchanges; who has never been it has no changes.
    assert 0 < sum("changes" in config for config in configs) <= 3
    assert main(["train", str(out / "best.toml"), "--corpus", corpus, "--out", str(model)]) == 0
    assert artifact.load_manifest(model, "model").info["validation_map"] == rows[0]["score"]
    changed = next(row for row, config in zip(rows, configs, strict=True) if "changes" in config)
    for change in json.loads(changed["config"])["changes"]:
        assert 1e-4 <= change["optim"].get("lr", 1e-3) <= 1e-1
    # As if it had been killed in the last stretch: the same exchanges, and nothing else is trained again.
    told = (out / "leaderboard.parquet").read_bytes(), (out / "passes.parquet").read_bytes()
    (out / "manifest.json").unlink()
    before = ends(out)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert ends(out) == before and artifact.load_manifest(out, "sweep").id == first.id
    assert ((out / "leaderboard.parquet").read_bytes(), (out / "passes.parquet").read_bytes()) == told


@pytest.mark.slow
def test_trials_of_two_workers_are_ray_train_runs(corpus: str, tmp_path: Path) -> None:
    search = {**CONFIG["search"], "trials": 2, "grace_epochs": 2}
    out = tmp_path / "sweep"
    path = written(tmp_path, search=search, workers=2)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    alone = tmp_path / "alone"
    assert main(["tune", written(tmp_path, search=search), "--corpus", corpus, "--out", str(alone)]) == 0
    ours, theirs = (sorted(board(folder), key=lambda row: row["trial"]) for folder in (out, alone))
    for two, one in zip(ours, theirs, strict=True):
        assert two["point"] == one["point"] and two["score"] == pytest.approx(one["score"], abs=0.05)


@pytest.mark.slow
def test_kill_9_at_three_points_leaves_the_leaderboard_of_an_unbroken_sweep(corpus: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["tune", path, "--corpus", corpus, "--out", str(whole)]) == 0
    words = ["tune", path, "--corpus", corpus, "--out", str(broken)]
    total = len(ends(whole))
    seen: dict[str, int] = {}
    for share in (0.1, 0.4, 0.8):
        kill_command_when(words, lambda share=share: len(ends(broken)) >= total * share, tmp_path / "log")  # type: ignore[misc]
        now = ends(broken)
        assert {key: now[key] for key in seen} == seen, "a finished stretch was trained again"
        seen = now
    assert main(words) == 0
    assert board(broken) == board(whole)
    assert {key: time for key, time in ends(broken).items() if key in seen} == seen

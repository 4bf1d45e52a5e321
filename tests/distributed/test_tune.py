"""Sweeps on Ray Tune: the same sweep whatever was killed, failures with their reasons, and a winner one can train."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import tomli_w
import torch
from ray.train.v2.api.exceptions import WorkerGroupError
from tiny import BACKBONE, head_config, kill_command_when, killing_worker_when, write_corpus, write_trunk

from hashray import artifact
from hashray.cli import main
from hashray.config import validate
from hashray.data.corpus import open_corpus
from hashray.errors import Diverged
from hashray.train.checkpoint import read_checkpoint
from hashray.train.config import TrainConfig
from hashray.train.job import plan_job
from hashray.train.rounds import train_model
from hashray.train.run import training_data
from hashray.tune.segments import Segment, train_segment
from hashray.tune.trial import reason_of

pytestmark = pytest.mark.usefixtures("ray_session")
WEIGHTS = Path(tempfile.gettempdir()) / f"tune-trunk-{os.getpid()}.pth"
TRAINING: dict[str, Any] = {**head_config(WEIGHTS), "validation_rows": 8}
CONFIG: dict[str, Any] = {
    **TRAINING,
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
    rows: list[dict[str, Any]] = pq.read_table(out / "leaderboard.parquet").to_pylist()
    return rows


def ends(out: Path) -> dict[str, int]:
    """Every segment that has ended, and when its file was written."""
    states = out.glob("trials/*/*/*/position.json")
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in states if p.parent.name.isdigit()}


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
    assert first.info["epochs"] == sum(row["epochs"] for row in rows) < first.info["epochs_of_full_grid"] == 24
    assert json.loads(next(row["point"] for row in rows if row["trial"] == 0))["optim.lr"] == 3e-3
    tables = (out / "leaderboard.parquet").read_bytes(), (out / "epochs.parquet").read_bytes()
    # As if it had been killed: a trial has lost its last segment, another never began, and nothing was published.
    (out / "manifest.json").unlink()
    (out / "leaderboard.parquet").unlink()
    kept = ends(out)
    longest = max(rows, key=lambda row: row["epochs"])
    lost = [f"trials/{longest['folder']}/{longest['epochs']}"]
    lost += [str(Path(key).parent) for key in kept if rows[-1]["folder"] in key]
    for folder in lost:
        for file in (out / folder).iterdir():
            file.unlink()
    gone = {key for key in kept if str(Path(key).parent) in lost}
    # The segment before the lost one gave up its weights when that one ended; a killed sweep would still have them.
    for key in [key for key in kept if longest["folder"] in key]:
        (out / key).unlink(missing_ok=True)
        gone.add(key)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert ((out / "leaderboard.parquet").read_bytes(), (out / "epochs.parquet").read_bytes()) == tables
    after = ends(out)
    assert after.keys() == kept.keys()
    assert {key for key in kept if after[key] != kept[key]} == gone
    assert artifact.load_manifest(out, "sweep").id == first.id
    # Finished: nothing runs. Another sweep does not go where one is.
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert main(["tune", path, "--corpus", corpus, "--out", str(out), "--search.seed", "1"]) == 1


def test_the_labels_of_the_queries_are_no_part_of_the_search(corpus: str, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    write_corpus(
        other, 60, 25, split_of=lambda i: "query" if i % 5 == 4 else "database+train",
        labels_of=lambda i: [(i + (i % 5 == 4)) % 3],
    )  # fmt: skip
    path = written(tmp_path, search={**CONFIG["search"], "trials": 3, "scheduler": "none"}, epochs=1)
    leaderboards = []
    for name, url in (("a", corpus), ("b", other)):
        assert main(["tune", path, "--corpus", url, "--out", str(tmp_path / name)]) == 0
        leaderboards.append([(row["trial"], row["point"], row["score"]) for row in board(tmp_path / name)])
    assert leaderboards[0] == leaderboards[1]


def test_rungs_beyond_the_last_epoch_are_refused(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", written(tmp_path), "--corpus", corpus, "--out", str(tmp_path / "sweep")]
    assert main([*words, "--search.grace-epochs", "9"]) == 2
    assert "search.grace_epochs = 9, but a trial has at most 4 epochs" in capfd.readouterr().err


def test_the_reason_of_a_trial_of_several_workers_is_the_first_workers() -> None:
    error = WorkerGroupError("[Rank 1]\nboom", {1: ValueError("boom\nat line 3")})
    assert reason_of(error) == "ValueError: boom"
    assert reason_of(WorkerGroupError("lost", {0: Diverged("not finite")})) == "Diverged: not finite"
    assert reason_of(RuntimeError("out of memory")) == "RuntimeError: out of memory"


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


def test_a_segment_goes_on_from_where_it_was_interrupted(corpus: str, tmp_path: Path) -> None:
    config = validate(TrainConfig, {**TRAINING, "corpus": corpus, "epochs": 3, "validation_every": 1}, "test")
    opened = open_corpus(corpus)
    job = plan_job(config, training_data(config, opened, None))
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    ray.get(train_segment.remote(job, Segment(whole, None, 3), print))
    ray.get(train_segment.remote(job, Segment(broken, None, 2), print))
    partial = Path(broken) / "3-partial"
    (Path(broken) / "2").rename(partial)
    edited = read_checkpoint(str(partial))
    edited.position.notes["history"][0]["loss"] = 123.0  # so that it shows from where it went on
    edited.save(partial)
    ray.get(train_segment.remote(job, Segment(broken, None, 3), print))
    ours, theirs = read_checkpoint(f"{broken}/3"), read_checkpoint(f"{whole}/3")
    assert ours.position.notes["history"][0]["loss"] == 123.0
    assert ours.position.notes["history"][1:] == theirs.position.notes["history"][1:]
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name
    # Nothing to go on from, so the segment is trained from its beginning.
    shutil.rmtree(partial)
    (Path(broken) / "3/position.json").unlink()
    ray.get(train_segment.remote(job, Segment(broken, None, 3), print))
    assert read_checkpoint(f"{broken}/3").position.notes["history"] == theirs.position.notes["history"]


@pytest.mark.slow
@pytest.mark.parametrize("title", ["ImplicitFunc", "train_here"])
def test_a_trial_whose_process_is_killed_goes_on_and_nothing_comes_out_differently(
    corpus: str, tmp_path: Path, title: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    assert main(["tune", path, "--corpus", corpus, "--out", str(whole)]) == 0
    with killing_worker_when(lambda: len(ends(hurt)) >= 3, title) as killed:
        assert main(["tune", path, "--corpus", corpus, "--out", str(hurt)]) == 0
    assert killed and board(hurt) == board(whole)
    if title == "train_here":  # the process of a trial is Ray Tune's, which starts it again
        assert "goes on from its last checkpoint, after a loss: " in capfd.readouterr().err
    assert artifact.load_manifest(hurt, "sweep").id == artifact.load_manifest(whole, "sweep").id


@pytest.mark.slow
def test_a_trial_whose_process_is_lost_once_too_often_has_failed_for_good(corpus: str, tmp_path: Path) -> None:
    search = {**CONFIG["search"], "trials": 3, "algorithm": "random", "scheduler": "none", "max_failures": 0}
    out, path = tmp_path / "sweep", written(tmp_path, search=search)
    with killing_worker_when(lambda: any(out.glob("trials/*/*")), "ImplicitFunc") as killed:
        assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    first = board(out)
    assert killed and [row["state"] for row in first] == ["finished", "finished", "failed"] and first[2]["reason"]
    (out / "manifest.json").unlink()
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert board(out) == first


@pytest.mark.slow
def test_an_unfinished_sweep_of_other_settings_in_the_same_folder_is_no_obstacle(corpus: str, tmp_path: Path) -> None:
    # Whose winners lie there too.
    path = written(tmp_path, epochs=2, search={**CONFIG["search"], "trials": 2, "report_seeds": [1]})
    out, alone = tmp_path / "sweep", tmp_path / "alone"
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    (out / "manifest.json").unlink()
    # Of the report seeds no trial knows: nothing is trained again.
    kept = ends(out)
    assert kept and main(["tune", path, "--corpus", corpus, "--out", str(out), "--search.report-seeds"]) == 0
    assert ends(out) == kept
    (out / "manifest.json").unlink()
    other = ["--search.reduction-factor", "3", "--search.report-seeds"]
    for folder in (out, alone):
        assert main(["tune", path, "--corpus", corpus, "--out", str(folder), *other]) == 0
    assert board(out) == board(alone)


@pytest.mark.slow
def test_a_seed_with_which_the_winner_diverges_is_reported_and_the_sweep_is_published(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: TrainConfig) -> artifact.Manifest:
        if config.seed == 2:
            raise Diverged("the loss is not finite at phase 0")
        return train_model(config)

    monkeypatch.setattr("hashray.tune.run.train_model", diverging)
    search = {**CONFIG["search"], "trials": 2, "scheduler": "none", "report_seeds": [1, 2]}
    out = tmp_path / "sweep"
    assert main(["tune", written(tmp_path, search=search), "--corpus", corpus, "--out", str(out)]) == 0
    info = artifact.load_manifest(out, "sweep").info
    winner = info["compared"]["winner"]
    assert [line["seed"] for line in winner["seeds"]] == [1]
    assert winner["failed"] == [{"seed": 2, "reason": "the loss is not finite at phase 0"}]
    assert "The loss of the winner is not finite with seed 2." in (out / "report.html").read_text()


@pytest.mark.slow
def test_the_winner_trains_to_its_score_and_is_scored_beside_the_default(corpus: str, tmp_path: Path) -> None:
    search = {**CONFIG["search"], "scheduler": "median", "report_seeds": [1, 2]}
    out = tmp_path / "sweep"
    assert main(["tune", written(tmp_path, search=search), "--corpus", corpus, "--out", str(out)]) == 0
    rows, info = board(out), artifact.load_manifest(out, "sweep").info
    model = tmp_path / "model"
    assert main(["train", str(out / "best.toml"), "--corpus", corpus, "--out", str(model)]) == 0
    assert rows[0]["state"] == "finished" and rows[0]["epochs"] == 4  # of the seed; a stopped winner trains on
    assert artifact.load_manifest(model, "model").info["validation_map"] == rows[0]["score"]
    assert set(info["compared"]) == ({"winner", "default"} if rows[0]["trial"] else {"winner"})
    for entry in info["compared"].values():
        assert [line["seed"] for line in entry["seeds"]] == [1, 2]
        assert all(0 <= line["query_mAP"] <= 1 for line in entry["seeds"])


@pytest.mark.slow
def test_a_population_exchanges_weights_and_its_best_schedule_trains_again_to_its_score(
    corpus: str, tmp_path: Path
) -> None:
    search = {**CONFIG["search"], "scheduler": "pbt", "algorithm": "random", "trials": 4}
    out, model = tmp_path / "sweep", tmp_path / "model"
    path = written(tmp_path, search=search)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    rows, first = board(out), artifact.load_manifest(out, "sweep")
    assert {row["state"] for row in rows} == {"finished"} and first.info["epochs"] == 16
    configs = [json.loads(row["config"]) for row in rows]
    # One of four is the worst at each of three exchanges; who has never been it has no changes.
    assert 0 < sum("changes" in config for config in configs) <= 3
    assert main(["train", str(out / "best.toml"), "--corpus", corpus, "--out", str(model)]) == 0
    assert artifact.load_manifest(model, "model").info["validation_map"] == rows[0]["score"]
    changed = next(row for row, config in zip(rows, configs, strict=True) if "changes" in config)
    for change in json.loads(changed["config"])["changes"]:
        assert 1e-4 <= change["optim"].get("lr", 1e-3) <= 1e-1
    # As if it had been killed in the last segment: the same exchanges, and nothing else is trained again.
    tables = (out / "leaderboard.parquet").read_bytes(), (out / "epochs.parquet").read_bytes()
    (out / "manifest.json").unlink()
    before = ends(out)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    assert ends(out) == before and artifact.load_manifest(out, "sweep").id == first.id
    assert ((out / "leaderboard.parquet").read_bytes(), (out / "epochs.parquet").read_bytes()) == tables


@pytest.mark.slow
def test_trials_of_two_workers_are_ray_train_runs(corpus: str, tmp_path: Path) -> None:
    search = {**CONFIG["search"], "trials": 2, "grace_epochs": 2}
    out = tmp_path / "sweep"
    path = written(tmp_path, search=search, workers=2)
    assert main(["tune", path, "--corpus", corpus, "--out", str(out)]) == 0
    alone = tmp_path / "alone"
    assert main(["tune", written(tmp_path, search=search), "--corpus", corpus, "--out", str(alone)]) == 0
    ours, theirs = (sorted(board(folder), key=lambda row: row["trial"]) for folder in (out, alone))
    assert [row["point"] for row in ours] == [row["point"] for row in theirs]
    losses = [pq.read_table(folder / "epochs.parquet").column("loss").to_pylist() for folder in (out, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_trials_that_stream_their_images_find_what_those_in_memory_find(corpus: str, tmp_path: Path) -> None:
    changes = {"backbone": BACKBONE, "epochs": 1, "search": {**CONFIG["search"], "trials": 2, "scheduler": "none"}}
    for name in ("memory", "stream"):
        path = written(tmp_path, **changes, input=name)
        assert main(["tune", path, "--corpus", corpus, "--out", str(tmp_path / name)]) == 0
    assert board(tmp_path / "stream") == board(tmp_path / "memory")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # six sweeps' worth of processes, each with a Ray of its own
@pytest.mark.parametrize(
    "search",
    [{"report_seeds": [1]}, {"scheduler": "pbt", "algorithm": "random", "trials": 4}],
    ids=["asha", "pbt"],
)
def test_kill_9_at_three_points_leaves_the_sweep_that_an_unbroken_one_makes(
    corpus: str, tmp_path: Path, search: dict[str, Any]
) -> None:
    path = written(tmp_path, search={**CONFIG["search"], **search})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(["tune", path, "--corpus", corpus, "--out", str(whole)]) == 0
    words = ["tune", path, "--corpus", corpus, "--out", str(broken)]
    total = len(ends(whole))
    seen: dict[str, int] = {}
    points: list[Callable[[], Any]] = [
        lambda share=share: len(ends(broken)) >= total * share  # type: ignore[misc]
        for share in (0.1, 0.5, 0.8)
    ]
    if "report_seeds" in search:  # and while the winner is trained again
        points.append(lambda: list(broken.glob("models/*/*/checkpoints/**/position.json")))
    for point in points:
        kill_command_when(words, point, tmp_path / "log")
        now = ends(broken)
        assert {key: now[key] for key in seen} == seen, "a finished segment was trained again"
        seen = now
    assert main(words) == 0
    assert board(broken) == board(whole)
    assert artifact.load_manifest(broken, "sweep").id == artifact.load_manifest(whole, "sweep").id
    assert {key: time for key, time in ends(broken).items() if key in seen} == seen

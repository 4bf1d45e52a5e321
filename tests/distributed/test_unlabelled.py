"""Images without labels: from a plain folder to an index that is searched, with methods that need no labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from PIL import Image
from tiny import BACKBONE, file_of, files_of, png, write_corpus, write_toml, write_trunk

import hashray
from hashray import artifact
from hashray.cli import main
from hashray.config import validate
from hashray.data.corpus import open_corpus
from hashray.errors import InputError
from hashray.train.config import TrainConfig
from hashray.train.job import plan_job
from hashray.train.run import train

pytestmark = pytest.mark.usefixtures("ray_session")
ROWS = 60


def write_plain_folder(folder: Path) -> str:
    folder.mkdir()
    for number in range(ROWS):
        (folder / f"{number:03d}.png").write_bytes(png(number))
    return str(folder)


def config_of(folder: Path, kind: str = "itq", **changes: Any) -> dict[str, Any]:
    if not (folder / "trunk.pth").exists():
        write_trunk(folder / "trunk.pth")
    return {
        "method": {"kind": kind, "num_bits": 16}, "cpus_per_worker": 0.5,
        "backbone": {**BACKBONE, "frozen": True, "weights": str(folder / "trunk.pth")}, **changes,
    }  # fmt: skip


def test_from_a_folder_without_classes_to_an_index(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, config = write_plain_folder(tmp_path / "images"), write_toml(tmp_path / "itq.toml", config_of(tmp_path))
    corpus, model, codes, index = (str(tmp_path / name) for name in ("corpus", "model", "codes", "index"))
    assert main(["ingest", source, "--out", corpus, "--split-protocol", "random", "--query-rows", "10"]) == 0
    opened = open_corpus(corpus)
    assert opened.classes == [] and opened.rows("all").labels.shape == (ROWS, 0)
    assert [opened.count(split) for split in ("query", "train", "database")] == [10, 50, 50]
    assert main(["train", config, "--corpus", corpus, "--out", model]) == 0
    manifest = artifact.load_manifest(model, "model")
    assert (manifest.info["train_rows"], manifest.info["labelled_rows"]) == (50, 0)
    assert "validation_map" not in manifest.info and manifest.info["phases"][0]["directions"] == 16
    (line,) = file_of(model, "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"event": "epoch", "epoch": 1, "phase": "fit", "round": 0, "phase_epoch": 1}
    assert main(["encode", "--model", model, "--corpus", corpus, "--out", codes, "--split", "database"]) == 0
    assert main(["index", "build", "--codes", codes, "--out", index]) == 0
    one = opened.rows("database").ids[7]
    image = Image.open(tmp_path / "images" / one)
    loaded = hashray.load_model(model)
    ids, distances = hashray.open_index(index).search(loaded.encode([image]), 3)
    assert loaded.classes == [] and distances[0][0] == 0 and one in ids[0]
    assert main(["describe", model]) == 0 and main(["verify", corpus]) == 0
    capfd.readouterr()
    # What needs labels says so, and what to do.
    assert main(["evaluate", "--model", model, "--corpus", corpus, "--out", str(tmp_path / "e")]) == 2
    assert "has no labels. Every score needs them" in capfd.readouterr().err
    other = write_toml(tmp_path / "other.toml", config_of(tmp_path, "adalabelhash"))
    assert main(["train", other, "--corpus", corpus, "--out", str(tmp_path / "m")]) == 2
    assert "50 of 50 train rows have no label, adalabelhash needs one for each" in (text := capfd.readouterr().err)
    assert "train a method without labels: itq or neighbours or pca" in " ".join(text.split())
    sweep = tmp_path / "sweep.toml"
    space = {"space": {"method.num_bits": {"choice": [8, 16]}}, "search": {"trials": 2}}
    sweep.write_bytes(tomli_w.dumps(config_of(tmp_path) | space).encode())
    assert main(["tune", str(sweep), "--corpus", corpus, "--out", str(tmp_path / "s")]) == 2
    assert "5 train rows with labels" in capfd.readouterr().err


def test_the_pipeline_ends_with_an_index_and_without_a_score(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, config = (
        write_plain_folder(tmp_path / "images"),
        write_toml(tmp_path / "c.toml", config_of(tmp_path, "pca")),
    )
    words = ["pipeline", config, "--source", source, "--out", str(tmp_path / "out"), "--split-protocol", "random"]
    assert main(words) == 0
    assert "no evaluation" in capfd.readouterr().err
    assert hashray.open_index(str(tmp_path / "out/index")).rows == 54
    assert not (tmp_path / "out/evaluation").exists()


@pytest.mark.parametrize("kind", ["itq", pytest.param("pca", marks=pytest.mark.slow)])
def test_workers_and_streams_give_the_same_model_to_the_byte(kind: str, tmp_path: Path) -> None:
    corpus = str(tmp_path / "corpus")
    write_corpus(corpus, ROWS, 25, labels_of=lambda i: [], class_names=())
    base = config_of(tmp_path, kind, corpus=corpus, tensorboard=False, batch_size=9)

    def model(name: str, **changes: Any) -> bytes:
        train(validate(TrainConfig, base | {"out": str(tmp_path / name)} | changes, "test"))
        return file_of(tmp_path / name, "model.safetensors").read_bytes()

    alone = model("alone")
    assert model("stream", input="stream", workers=2, batch_size=16) == alone
    assert artifact.load_manifest(tmp_path / "stream").parents == artifact.load_manifest(tmp_path / "alone").parents


def test_the_unlabelled_split_is_trained_on_and_labels_only_validate(tmp_path: Path) -> None:
    corpus = str(tmp_path / "corpus")
    write_corpus(
        corpus, ROWS, 25, split_of=lambda i: "database+train" if i < 30 else "database+unlabelled",
        labels_of=lambda i: [i % 3] if i < 20 else [],
    )  # fmt: skip
    config = validate(TrainConfig, config_of(tmp_path, validation_rows=5), "test")
    job = plan_job(config, open_corpus(corpus))
    assert (job.plan.rows, len(job.validation)) == (55, 5)
    assert int(job.table.counts.sum()) == len([i for i in range(20) if f"{i:04d}" not in job.validation])
    write_corpus(tmp_path / "bare", ROWS, 25, split_of=lambda i: "database+unlabelled", labels_of=lambda i: [])
    out = config.model_copy(update={"corpus": str(tmp_path / "bare"), "out": str(tmp_path / "model")})
    assert train(out).info["train_rows"] == ROWS
    write_corpus(tmp_path / "database", ROWS, 25, split_of=lambda i: "database", labels_of=lambda i: [])
    with pytest.raises(
        InputError, match="neither train nor unlabelled rows for training; ingest it with --split-protoc"
    ):
        train(out.model_copy(update={"corpus": str(tmp_path / "database"), "out": str(tmp_path / "none")}))


@pytest.mark.slow
def test_a_sweep_over_methods_and_bits_compares_them_by_validation(tmp_path: Path) -> None:
    corpus, out = str(tmp_path / "corpus"), tmp_path / "sweep"
    write_corpus(corpus, ROWS, 25, split_of=lambda i: "query" if i % 5 == 4 else "database+train")
    config = config_of(tmp_path, validation_rows=8) | {
        "space": {"method.kind": {"choice": ["itq", "pca"]}, "method.num_bits": {"choice": [8, 16]}},
        "search": {"trials": 4, "at_once": 2, "report_seeds": [1, 2]},
    }
    (tmp_path / "sweep.toml").write_bytes(tomli_w.dumps(config).encode())
    assert main(["tune", str(tmp_path / "sweep.toml"), "--corpus", corpus, "--out", str(out)]) == 0
    rows = pq.read_table(out / "leaderboard.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["finished"] * 4 and {row["epochs"] for row in rows} == {1}
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True) and all(0.3 < score <= 1 for score in scores)
    info = artifact.load_manifest(out, "sweep").info
    assert len(info["compared"]["winner"]["seeds"]) == 2 and info["epochs"] == info["epochs_of_full_grid"] == 4


@pytest.mark.slow
def test_a_trunk_without_weights_is_the_same_random_one_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = str(tmp_path / "corpus")
    write_corpus(corpus, ROWS, 25, split_of=lambda i: "query" if i % 4 == 3 else "database+train")
    plain = {**config_of(tmp_path), "backbone": {**BACKBONE, "frozen": True}, "corpus": corpus, "validation_rows": 10}
    config = validate(TrainConfig, plain | {"epochs": 3, "optim": {"lr": 0.1}}, "test")
    first = train(config.model_copy(update={"out": str(tmp_path / "a")}))
    said = capfd.readouterr().err
    assert "the trunk has random weights" in said
    assert "note: itq is fitted in closed form and ignores epochs, optim" in " ".join(said.split())
    assert 0 < first.info["validation_map"] <= 1 and first.info["best_at"] == "phase 0, epoch 1"
    other = train(
        config.model_copy(update={"out": str(tmp_path / "b"), "features": str(tmp_path / "again"), "workers": 2})
    )
    assert first.fingerprint == other.fingerprint
    assert main(["evaluate", "--model", str(tmp_path / "a"), "--corpus", corpus, "--out", str(tmp_path / "e")]) == 0
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert [row["name"] for row in metrics["results"]] == [
        "itq", "random", "lsh", "pca-sign", "itq-linear", "class-code", "float-cosine",
    ]  # fmt: skip
    kept = files_of(tmp_path / "a")
    assert (
        main(
            [
                "train",
                write_toml(tmp_path / "c.toml", {**plain, "epochs": 3, "optim": {"lr": 0.1}}),
                "--out",
                str(tmp_path / "a"),
            ]
        )
        == 0
    )
    assert files_of(tmp_path / "a") == kept
    assert np.isfinite([row["mAP"] for row in metrics["results"]]).all()


@pytest.mark.slow
def test_the_demo_without_labels_ends_with_a_page(tmp_path: Path) -> None:
    assert main(["demo", "--unlabelled", "--out", str(tmp_path / "demo")]) == 0
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    scores = {row["name"]: row["mAP"] for row in metrics["results"]}
    assert metrics["results"][0]["name"] == "itq" and scores["itq"] > scores["lsh"] > scores["random"]
    assert "<h1>" in (tmp_path / "demo" / "report.html").read_text()
    assert artifact.load_manifest(tmp_path / "demo" / "model").info["labelled_rows"] == 1497

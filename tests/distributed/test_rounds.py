"""Self-training on Ray: pseudo-labels as an artifact, rounds that resume, and hidden labels that stay hidden."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load, load_file
from tiny import BACKBONE, file_of, files_of, head_config, png, write_corpus, write_tiny_model, write_toml, write_trunk

from hashray import artifact
from hashray.artifact import Manifest
from hashray.cli import main
from hashray.config import validate
from hashray.data.corpus import open_corpus
from hashray.errors import AlreadyExists, ConfigError, InputError, MismatchError
from hashray.model import load_model
from hashray.storage import open_store
from hashray.train.config import TrainConfig
from hashray.train.rounds import pseudo_label, train_model

pytestmark = pytest.mark.usefixtures("ray_session")
ROWS, LABELLED = 72, 24
WEIGHTS = Path(tempfile.gettempdir()) / f"trunk-{os.getpid()}.pth"
CONFIG: dict[str, Any] = {
    **head_config(WEIGHTS),
    "validation_rows": 4,
    "validation_every": 4,
    "tensorboard": False,
    "self_training": {"rounds": 1, "threshold": 0.0, "epochs": 2, "temperature": "fitted", "most_falls": 9},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = str(tmp_path_factory.mktemp("semi") / "corpus")
    write_corpus(url, ROWS, 25, split_of=lambda i: "database+train" if i < LABELLED else "database+unlabelled")
    write_trunk(WEIGHTS)
    yield url
    WEIGHTS.unlink()


@pytest.mark.slow
def test_rounds_resume_to_the_same_model_and_learn_from_accepted_rows(corpus: str, tmp_path: Path) -> None:
    out = tmp_path / "model"
    path = write_toml(tmp_path / "c.toml", CONFIG)
    assert main(["train", path, "--corpus", corpus, "--out", str(out)]) == 0
    first = artifact.load_manifest(out, "model")
    rounds = first.info["rounds"]
    assert [line["round"] for line in rounds] == [1]
    for line in rounds:
        # Nothing is asked of the confidence, so only the balance bounds what is accepted: a third of 48 for each class.
        assert line["unlabelled"] == ROWS - LABELLED and 0 < line["accepted"] <= 48
        assert max(line["per_class"]) <= 16 and 0 <= line["precision"] <= 1
    for number, line in enumerate(rounds, 1):
        pseudo, model = (out / f"rounds/{number}" / name for name in ("pseudo-labels", "model"))
        assert artifact.verify(str(pseudo)) == [] and artifact.verify(str(model)) == []
        accepted = pq.read_table(file_of(pseudo, "accepted.parquet")).column("accepted").to_pylist()
        assert len(accepted) == line["accepted"] and all(int(row_id) >= LABELLED for row_id in accepted)
        trained = artifact.load_manifest(model, "model")
        assert trained.info["train_rows"] == LABELLED - 4 + line["accepted"]
        assert trained.parents["pseudo-labels"] == artifact.load_manifest(pseudo, "pseudo-labels").id
        assert trained.parents["init"] == artifact.load_manifest(out / f"rounds/{number - 1}/model").id
    best = out / f"rounds/{first.info['best_round']}/model"
    assert file_of(best, "model.safetensors").read_bytes() == file_of(out, "model.safetensors").read_bytes()
    # As if it had been killed in the last round, while it labelled.
    before, weights_before = files_of(out), file_of(out, "model.safetensors").read_bytes()
    round_0 = {path: path.stat().st_mtime_ns for path in (out / "rounds/0").rglob("*")}
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "rounds/1/model")
    (out / "rounds/1/pseudo-labels/manifest.json").unlink()
    assert main(["train", path, "--corpus", corpus, "--out", str(out)]) == 0
    again = artifact.load_manifest(out, "model")
    assert [line["accepted"] for line in again.info["rounds"]] == [line["accepted"] for line in rounds]
    assert set(map(artifact.plain_name, files_of(out))) == set(map(artifact.plain_name, before))
    assert round_0 == {path: path.stat().st_mtime_ns for path in (out / "rounds/0").rglob("*")}  # not trained again
    weights = (
        load_file(file_of(folder, "model.safetensors"))
        for folder in (out, out / f"rounds/{again.info['best_round']}/model")
    )
    for name, tensor in next(weights).items():
        torch.testing.assert_close(tensor, load(weights_before)[name], atol=1e-6, rtol=0)
    with pytest.raises(AlreadyExists, match="another input or configuration"):
        train_model(validate(TrainConfig, CONFIG | {"corpus": corpus, "out": str(out), "seed": 5}, "test"))


def test_what_self_training_needs_is_said_before_anything_runs(corpus: str, tmp_path: Path) -> None:
    def config_of(**changes: Any) -> TrainConfig:
        return validate(TrainConfig, CONFIG | {"corpus": corpus, "out": str(tmp_path / "m")} | changes, "test")

    plain = str(tmp_path / "plain")
    write_corpus(plain, 8, 8)
    with pytest.raises(InputError, match="no 'unlabelled' rows, self-training needs them"):
        train_model(config_of(corpus=plain))
    with pytest.raises(InputError, match="set validation_rows above 0"):
        train_model(config_of(validation_rows=0))
    with pytest.raises(ConfigError, match=r"self_training\.temperature: .*above 0"):
        config_of(self_training={"temperature": -1.0})
    with pytest.raises(ConfigError, match=r"self_training\.temperature.*: Input should be a finite number"):
        config_of(self_training={"temperature": float("nan")})
    with pytest.raises(ConfigError, match="would freeze random numbers"):
        config_of(backbone={**BACKBONE, "frozen": True})
    with pytest.raises(ConfigError, match="adalabelhash learns nothing from rows without labels"):
        config_of(unlabelled=True)
    with pytest.raises(InputError, match=r"unlabelled = true, and .* has no unlabelled rows"):
        train_model(
            config_of(corpus=plain, self_training=None, unlabelled=True, method={"kind": "lcgh"}, backbone=BACKBONE)
        )
    with pytest.raises(InputError, match=r"top_classes = 50, and the labelled rows have"):
        train_model(config_of(self_training={"top_classes": 50}))
    assert not (tmp_path / "m" / "rounds").exists()


def test_pseudo_labels_of_images_count_every_row_and_go_on_from_the_parts_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, model, out = str(tmp_path / "corpus"), str(tmp_path / "model"), tmp_path / "pseudo-labels"
    write_corpus(
        url, 40, 10, split_of=lambda i: "database+train" if i < 16 else "database+unlabelled",
        labels_of=lambda i: [i % 3, (i + 1) % 3], image_of=lambda i: b"no image" if i == 20 else png(i),
    )  # fmt: skip
    write_tiny_model(model, kind="adalabelhash")
    table = {**CONFIG, "backbone": BACKBONE, "corpus": url, "self_training": {"threshold": 0.0, "balance": 2.0}}
    config = validate(TrainConfig, table, "test")
    assert config.self_training is not None
    label = partial(pseudo_label, load_model(model), open_corpus(url), config, config.self_training, str(tmp_path))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifact, "publish", killed)
        label()
    parts = {path: path.stat().st_mtime_ns for path in sorted((out / "parts").iterdir())}
    lost = next(iter(parts))
    lost.unlink()
    manifest = label()
    assert {path for path in parts if path.stat().st_mtime_ns != parts[path]} == {lost} and len(parts) == 3
    assert (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined) == (24, 23, 1)
    assert artifact.verify(str(out)) == [] and manifest.info["summary"]["accepted"] == 23
    assert pq.read_table(file_of(out, "quarantine.parquet")).column("id").to_pylist() == ["0020"]
    # Labelled rows have two classes each: the two likeliest are set, and of the third nothing is known.
    labels = pq.read_table(file_of(out, "accepted.parquet")).column("labels").to_pylist()
    assert all(sorted(row) == [-1, 1, 1] for row in labels)


def test_a_start_that_does_not_fit_is_refused_before_training(corpus: str, tmp_path: Path) -> None:
    def start(**changes: Any) -> None:
        changes = {"self_training": None, "backbone": BACKBONE, "corpus": corpus, "out": str(tmp_path / "m")} | changes
        train_model(validate(TrainConfig, CONFIG | changes, "test"))

    init = str(tmp_path / "init")
    write_tiny_model(init, kind="adalabelhash", num_bits=8)
    with pytest.raises(InputError, match="is of another method, size or trunk: size mismatch"):
        start(init=init)
    other = str(tmp_path / "other")
    write_corpus(other, 12, 12)
    store = open_store(tmp_path / "pseudo")
    manifest = Manifest(kind="pseudo-labels", project_version="0", config={}, parents={"corpus": "x"}, files=())
    artifact.publish(store, manifest)
    with pytest.raises(MismatchError, match="are of another corpus"):
        start(pseudo_labels=store.url)
    assert not (tmp_path / "m" / "checkpoints").exists()


@pytest.mark.slow
def test_a_fall_of_the_validation_ends_the_rounds_and_the_round_before_it_is_the_model(
    corpus: str, tmp_path: Path
) -> None:
    # The first training learns its rows; ten thousand times its rate gives every row one code, which is chance.
    self_training = CONFIG["self_training"] | {"rounds": 3, "epochs": 1, "lr_factor": 1e4, "most_falls": 1}
    changes = {
        "self_training": self_training, "validation_rows": 12, "validation_every": 10, "epochs": 30,
        "optim": {"lr": 0.03},
    }  # fmt: skip
    out = tmp_path / "m"
    manifest = train_model(validate(TrainConfig, CONFIG | {"corpus": corpus, "out": str(out)} | changes, "test"))
    (line,) = manifest.info["rounds"]
    assert line["validation_map"] < line["before"] == manifest.info["validation_map"]
    assert manifest.info["best_round"] == 0 and not (out / "rounds/2").exists()
    assert (
        file_of(out / "rounds/0/model", "model.safetensors").read_bytes()
        == file_of(out, "model.safetensors").read_bytes()
    )


@pytest.mark.slow
def test_no_row_accepted_ends_the_rounds_with_the_first_model(corpus: str, tmp_path: Path) -> None:
    self_training = CONFIG["self_training"] | {"threshold": 1.0, "temperature": 1e6}
    changes = {"self_training": self_training, "epochs": 1, "validation_every": 1}
    config = validate(TrainConfig, CONFIG | {"corpus": corpus, "out": str(tmp_path / "m")} | changes, "test")
    manifest = train_model(config)
    assert manifest.info["rounds"] == [] and manifest.info["best_round"] == 0
    assert manifest.config["self_training"]["threshold"] == 1.0
    assert artifact.verify(str(tmp_path / "m/rounds/1/pseudo-labels")) == []


def test_rows_without_labels_train_the_decoder_of_lcgh(corpus: str, tmp_path: Path) -> None:
    method = {"kind": "lcgh", "num_bits": 16, "hidden": 16, "decoder_hidden": 16}
    changes = {"self_training": None, "unlabelled": True, "epochs": 1, "method": method}
    config = validate(TrainConfig, CONFIG | {"corpus": corpus, "out": str(tmp_path / "m")} | changes, "test")
    info = train_model(config).info
    assert (info["train_rows"], info["labelled_rows"]) == (ROWS - 4, LABELLED - 4)
    lines = [json.loads(line) for line in file_of(tmp_path / "m", "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["reconstruction"] < 10 and 0 <= lines[-1]["consistency"] <= 1

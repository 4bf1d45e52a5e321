"""`hashray pipeline` beside its training config: what the file says holds in every stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import head_config, write_images, write_toml, write_trunk

from hashray import artifact
from hashray.cli import main

pytestmark = pytest.mark.usefixtures("ray_session")


def test_features_and_bad_rows_are_what_the_training_config_says(tmp_path: Path) -> None:
    write_trunk(tmp_path / "trunk.pth")
    config = head_config(tmp_path / "trunk.pth") | {"epochs": 1, "validation_rows": 4, "max_bad": 0.5}
    config["features"] = str(tmp_path / "kept")
    source, out = write_images(tmp_path / "images", 24), tmp_path / "out"
    for i in range(6):  # a fifth of all
        (tmp_path / f"images/train/ant/broken{i}.png").write_bytes(b"no image")
    path = write_toml(tmp_path / "c.toml", config)
    words = ["pipeline", path, "--source", source, "--out", str(out)]
    assert main([*words, "--max-bad", "0.1"]) == 1  # the command line comes first
    assert main(words) == 0
    assert artifact.load_manifest(out / "corpus").rows_quarantined == 6
    kept = artifact.load_manifest(tmp_path / "kept", "features")
    assert not (out / "corpus/features").exists()  # one pass of the trunk for every stage
    metrics = json.loads((out / "evaluation/metrics.json").read_text())
    assert artifact.load_manifest(out / "model").parents["features"] == kept.id
    assert {row["name"] for row in metrics["results"]} >= {"adalabelhash", "itq", "float-cosine"}

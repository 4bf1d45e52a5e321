"""Law 2: one file adds a method. It trains and encodes through the command line, and nothing else knows of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import BACKBONE, write_corpus, write_toml

from hashray import artifact

ROOT = Path(__file__).resolve().parents[2]
TOY = """
from typing import Literal, final
import torch
from hashray.methods.base import Method, MethodConfig, Phase, Term
class ToyConfig(MethodConfig):
    kind: Literal["toy"] = "toy"
    pull: float = 1.0
@final
class Toy(Method):
    kind = "toy"
    def __init__(self, config, trunk, num_classes):
        super().__init__(config, trunk, num_classes)
        self.hash = torch.nn.Linear(trunk.feature_dim, config.num_bits)
    def phases(self, epochs):
        return (Phase("image", 0, epochs),)
    def loss_terms(self, phase, inputs, labels, weight):
        rows = (torch.tanh(self.logits(inputs))[:, : self.num_classes] - 2.0 * labels + 1).square().mean(1)
        return {"square": Term((self.config.pull * rows * weight).sum(), weight.sum())}
    def logits(self, inputs):
        return self.hash(self.trunk(inputs)).float()
"""


@pytest.mark.slow
def test_a_file_in_the_folder_is_a_method_of_the_command_line(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "hashray", tmp_path / "hashray", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "hashray/methods/toy.py").write_text(TOY)
    corpus, out = str(tmp_path / "corpus"), str(tmp_path / "model")
    write_corpus(corpus, 40, 20)
    config = {"method": {"kind": "toy", "num_bits": 8}, "backbone": BACKBONE, "epochs": 1, "tensorboard": False,
              "validation_rows": 0}  # fmt: skip
    path = write_toml(tmp_path / "toy.toml", config)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hashray", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    trained = run("train", path, "--corpus", corpus, "--out", out, "--method.pull", "0.5")
    assert trained.returncode == 0, trained.stderr
    assert artifact.load_manifest(out, "model").config["method"] == {"kind": "toy", "num_bits": 8, "pull": 0.5}
    encoded = run("encode", "--model", out, "--corpus", corpus, "--out", str(tmp_path / "codes"))
    assert encoded.returncode == 0, encoded.stderr
    assert artifact.load_manifest(tmp_path / "codes", "codes").rows_out == 40
    wrong = run("train", path, "--method.pul", "1")
    assert wrong.returncode == 2 and "--method.pull" in wrong.stderr

"""Precision: decided once by the processor, kept for every worker and every resume, said where it is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BACKBONE, METHOD, write_corpus

from hashray import artifact
from hashray.config import validate
from hashray.errors import AlreadyExists
from hashray.storage import open_store
from hashray.train.config import TrainConfig
from hashray.train.precision import multiplies_bf16, with_precision
from hashray.train.run import train


def config_of(precision: str = "auto", **fields: Any) -> TrainConfig:
    return validate(TrainConfig, {"method": METHOD, "backbone": BACKBONE, "precision": precision, **fields}, "test")


def never() -> bool:
    raise AssertionError("the processor was asked again")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_what_the_processor_multiplies_and_keeps_it(tmp_path: Path, native: bool, expected: str) -> None:
    store = open_store(tmp_path)
    assert with_precision(config_of(), store, "run", lambda: native).precision == expected
    # A resume on another machine, and every other run of the same plan, takes what was decided first.
    assert with_precision(config_of(), store, "run", never).precision == expected
    assert with_precision(config_of(), store, "other", lambda: not native).precision != expected


def test_what_is_asked_for_is_done_and_its_cost_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(tmp_path)
    assert with_precision(config_of("bf16"), store, "run", lambda: False).precision == "bf16"
    assert capsys.readouterr().err.count("a step takes about ten times as long") == 1
    assert with_precision(config_of("bf16"), store, "run", never).precision == "bf16"
    assert with_precision(config_of("bf16"), store, "native", lambda: True).precision == "bf16"
    assert with_precision(config_of("fp32"), store, "plain", lambda: False).precision == "fp32"
    assert capsys.readouterr().err == ""


def test_cached_features_are_fp32_on_every_machine(tmp_path: Path) -> None:
    config = config_of(backbone={**BACKBONE, "frozen": True, "weights": "w.pth"})
    assert with_precision(config, open_store(tmp_path), "run", never).precision == "fp32"


def test_torch_is_asked_about_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=capabilities: has)
        assert multiplies_bf16(gpu=False) is expected
    assert multiplies_bf16(gpu=True) is (torch.cuda.is_available() and torch.cuda.is_bf16_supported(False))


def test_the_decision_stands_in_the_models_manifest(tmp_path: Path) -> None:
    write_corpus(str(tmp_path / "corpus"), 24, 24)
    fields = {"epochs": 1, "batch_size": 8, "ray": "never", "tensorboard": False, "corpus": str(tmp_path / "corpus")}
    manifests = {}
    for name, decided in (("bf16", True), ("fp32", False)):
        config = config_of(out=str(tmp_path / name), **fields)
        run = train_with(config, tmp_path / name, decided)
        manifests[name] = run
        assert run.config["precision"] == name
        assert not list((tmp_path / name).glob("progress/**/*.json"))
    # One request, so one plan: the second machine finds the first one's model, whatever it would have decided.
    assert manifests["bf16"].info["run"] == manifests["fp32"].info["run"]
    assert train(config_of(out=str(tmp_path / "bf16"), **fields)) == manifests["bf16"]
    with pytest.raises(AlreadyExists):
        train(config_of("fp32", out=str(tmp_path / "bf16"), **fields))


def train_with(config: TrainConfig, out: Path, native: bool) -> artifact.Manifest:
    """Train as on a processor that does, or does not, multiply bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
        return train(config)

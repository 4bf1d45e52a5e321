"""Trunks of the user on Ray's workers: a function's file by its absolute path, TorchScript out of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import CLASSES, METHOD, SIZE, files_of, write_corpus
from torch import nn

from hashray.data.corpus import open_corpus
from hashray.encode.codes import EncodeConfig, encode
from hashray.encode.features import TrunkRecipe, compute_features
from hashray.engine.session import WorkersConfig
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, build_trunk
from hashray.model import write_model
from hashray.storage import open_store

pytestmark = pytest.mark.usefixtures("ray_session")
HERE, ON_RAY = WorkersConfig(ray="never"), WorkersConfig(workers=2, cpus_per_worker=0.5, ray="always")
SOURCE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
"""


def parts(folder: Path, kind: str) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name.startswith(f"{kind}/")}


def test_workers_give_the_features_of_a_function_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)  # the workers run in another folder
    torch.manual_seed(0)
    config = BackboneConfig(name="mine.py:build", image_size=SIZE)
    torch.save(build_trunk(config).net.state_dict(), tmp_path / "w.pth")
    write_corpus(tmp_path / "corpus", 24, 8)
    recipe = TrunkRecipe(config.model_copy(update={"weights": "w.pth", "frozen": True}))
    for out, pool in (("here", HERE), ("ray", ON_RAY)):
        compute_features(open_corpus(tmp_path / "corpus"), recipe, str(tmp_path / out), pool, 0.0)
    assert len(parts(tmp_path / "here", "features")) == 3
    assert parts(tmp_path / "here", "features") == parts(tmp_path / "ray", "features")


def test_workers_give_the_codes_of_a_torchscript_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    torch.jit.script(net).save(str(tmp_path / "net.pt"))
    trunk = build_trunk(BackboneConfig(name="torchscript", weights=str(tmp_path / "net.pt"), image_size=SIZE))
    method = build_method(parse_method_config(METHOD), trunk, len(CLASSES))
    write_model(open_store(tmp_path / "model"), method, method.state_dict(), CLASSES, {}, {}, [], {})
    (tmp_path / "net.pt").unlink()
    write_corpus(tmp_path / "corpus", 24, 8)
    for out, pool in (("here", HERE), ("ray", ON_RAY)):
        urls = {"model": str(tmp_path / "model"), "corpus": str(tmp_path / "corpus"), "out": str(tmp_path / out)}
        assert encode(EncodeConfig(**urls, pool=pool)).rows_out == 24
    assert len(parts(tmp_path / "here", "parts")) == 3
    assert parts(tmp_path / "here", "parts") == parts(tmp_path / "ray", "parts")

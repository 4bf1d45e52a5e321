"""Trunks of the user: a function by module or by file, and TorchScript; what a model keeps of them; errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import CLASSES, METHOD, SIZE, head_config, write_corpus
from torch import Tensor, nn

from hashray.config import validate
from hashray.encode.codes import EncodeConfig, encode
from hashray.encode.features import trunk_fingerprint
from hashray.engine.session import WorkersConfig
from hashray.errors import InputError
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, Trunk, build_trunk, with_absolute_weights, without_place
from hashray.model import load_model, write_model
from hashray.storage import open_store
from hashray.train.config import TrainConfig
from hashray.train.run import train

SOURCE = '''
import torch
from torch import nn

def build():
    """Features [n, 6]."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

def sized(image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 4))

def normalised():
    net = build()
    net.mean, net.std = (0.1, 0.2, 0.3), torch.tensor([0.4, 0.5, 0.6])
    return net

def one_channel():
    net = build()
    net.mean, net.std = [0.5], [0.5]
    return net

def half():
    net = build()
    net.std = (0.5, 0.5, 0.5)
    return net

def not_pooled():
    return nn.Conv2d(3, 6, 3)

def tokens():
    return nn.Sequential(nn.Flatten(2), nn.Linear(256, 5))

def needs_more(depth):
    return build()

def no_module():
    return 3

limit = 7
'''


class Scripted(nn.Module):
    """A trunk with its normalisation, a branch, and a constant that is no parameter."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.mean, self.std, self.factor = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], factor
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images).mean([2, 3])
        if images.shape[0] > 1:
            return x * self.factor
        return self.factor * x


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "mine_of_test.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    return path


def build(name: str, **fields: Any) -> Trunk:
    return build_trunk(BackboneConfig(name=name, **{"image_size": SIZE, **fields}))


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def script(path: Path, net: nn.Module) -> Path:
    torch.jit.script(net.eval()).save(str(path))
    return path


def write(folder: Path, trunk: Trunk) -> str:
    torch.manual_seed(0)
    method = build_method(parse_method_config(METHOD), trunk, len(CLASSES))
    write_model(open_store(folder), method, method.state_dict(), CLASSES, {}, {}, [], {})
    return str(folder)


@torch.no_grad()
def test_a_function_by_module_and_by_file_gives_its_features(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(module.parent)
    pixels = images(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for name in ("mine_of_test:build", f"{module}:build", "mine_of_test.py:build"):
        trunk = build(name).eval()
        expected = trunk.net((pixels / 255 - mean[:, None, None]) / std[:, None, None]).flatten(1)
        assert torch.allclose(trunk(pixels), expected, atol=1e-6)
        assert trunk.feature_dim == 6
    assert build(f"{module}:sized", image_size=8).feature_dim == 4
    trunk = build(f"{module}:normalised").eval()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    expected = trunk.net((pixels / 255 - mean[:, None, None]) / std[:, None, None]).flatten(1)
    assert torch.allclose(trunk(pixels), expected, atol=1e-6)
    assert build(f"{module}:normalised", mean=(0.5,) * 3, std=(0.5,) * 3).config.mean == (0.5, 0.5, 0.5)


def test_weights_of_a_function_are_its_state_dict(module: Path, tmp_path: Path) -> None:
    source = build(f"{module}:build")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.net.state_dict().items()}}, tmp_path / "w.pth")
    loaded = build(f"{module}:build", weights=str(tmp_path / "w.pth"), frozen=True)
    state = source.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    with pytest.raises(InputError, match=r"w\.pth does not fit .*:sized: \d+ keys are unknown"):
        build(f"{module}:sized", weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module:build", "No module named 'no_such_module'; it must be importable in every process"),
        ("json:dunps", "json has no function 'dunps', perhaps you meant 'dumps'"),
        ("none.py:build", "no such file: none.py; a stored model names it without its folder"),
        ("MINE:biuld", "has no function 'biuld', perhaps you meant 'build'"),
        ("MINE:limit", "has no function 'limit'"),
        ("MINE:needs_more", "its call failed: TypeError: .*missing 1 required positional argument: 'depth'"),
        ("MINE:no_module", "returned a int; expected a torch.nn.Module"),
        ("MINE:not_pooled", r"gave \(1, 6, 14, 14\) for 1 images; expected a tensor \[1, d\] or \[1, d, 1, 1\]"),
        ("MINE:tokens", r"gave \(1, 3, 5\) for 1 images; .*pool its tokens"),
        ("MINE:one_channel", "the module's mean has 1 numbers; expected three"),
        ("MINE:half", "has only one of the attributes mean and std"),
    ],
)
def test_functions_that_are_no_trunk(name: str, text: str, module: Path) -> None:
    with pytest.raises(InputError, match=text):
        build(name.replace("MINE", str(module)))


def test_a_module_that_cannot_be_imported_and_names_without_a_form(module: Path) -> None:
    module.write_text("import math\nmath.no_such_thing")
    with pytest.raises(InputError, match=r"its import failed: AttributeError: .*no_such_thing"):
        build(f"{module}:build")
    for name in ("a b:build", "module:", "module:1", ":build"):
        with pytest.raises(ValidationError, match="is no trunk: expected MODULE:FUNCTION"):
            BackboneConfig(name=name)


def test_a_model_names_the_file_of_its_function_without_its_folder(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(module.parent)
    config = with_absolute_weights(BackboneConfig(name=f"{module.name}:normalised", image_size=SIZE))
    assert config.name == f"{module}:normalised"
    assert without_place(config).name == "mine_of_test.py:normalised"
    trunk = build_trunk(config)
    url, pixels = write(tmp_path / "model", trunk), images(4).numpy()
    before = load_model(url).logits(pixels)
    assert load_model(url).backbone.mean == pytest.approx((0.1, 0.2, 0.3))
    assert "note" not in capsys.readouterr().err

    other = tmp_path / "other" / module.name
    other.parent.mkdir()
    module.rename(other)
    with pytest.raises(InputError, match=r"no such file: mine_of_test\.py"):
        load_model(url)
    monkeypatch.syspath_prepend(other.parent)
    moved = load_model(url)
    assert np.array_equal(moved.logits(pixels), before)
    assert trunk_fingerprint(moved.method.trunk) == trunk_fingerprint(trunk)
    other.write_text(SOURCE + "\n# edited\n")
    edited = load_model(url)
    assert "note: the file of mine_of_test.py:normalised has changed since" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert trunk_fingerprint(edited.method.trunk) != trunk_fingerprint(trunk)


@torch.no_grad()
def test_a_model_holds_its_torchscript_trunk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Scripted()
    path = script(tmp_path / "net.pt", net)
    trunk = build("torchscript", weights=str(path)).eval()
    pixels = images(4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (net.mean, net.std))
    assert torch.allclose(trunk(pixels), net((pixels / 255 - mean) / std), atol=1e-6)
    first = trunk(pixels)
    assert all(torch.equal(trunk(pixels), first) for _ in range(4))  # while the interpreter optimises
    url = write(tmp_path / "model", trunk)
    path.unlink()
    model = load_model(url)
    assert model.backbone.weights == "file"
    assert torch.equal(model.method.trunk(pixels), first)
    assert trunk_fingerprint(model.method.trunk) == trunk_fingerprint(trunk)
    again = build("torchscript", weights=url).eval()
    assert torch.equal(again(pixels), first)


def test_the_fingerprint_covers_what_a_torchscript_file_does(tmp_path: Path) -> None:
    prints = set()
    for factor in (2.0, 3.0):
        torch.manual_seed(0)
        trunk = build("torchscript", weights=str(script(tmp_path / f"{factor}.pt", Scripted(factor))))
        prints |= {trunk_fingerprint(trunk), load_model(write(tmp_path / f"model-{factor}", trunk)).fingerprint}
    assert len(prints) == 4


@torch.no_grad()
def test_a_frozen_script_gives_features_and_cannot_be_trained(tmp_path: Path) -> None:
    net = Scripted().eval()
    path = tmp_path / "net.pt"
    torch.jit.freeze(torch.jit.script(net), preserved_attrs=["mean", "std"]).save(str(path))
    trunk = build("torchscript", weights=str(path), frozen=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (net.mean, net.std))
    assert torch.allclose(trunk(images(4)), net((images(4) / 255 - mean) / std), atol=1e-5)
    assert not trunk.state_dict()
    with pytest.raises(InputError, match=r"no parameters to train .* set backbone\.frozen = true"):
        build("torchscript", weights=str(path))


def test_torchscript_needs_a_file_of_torchscript(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"name = 'torchscript' needs weights = FILE"):
        BackboneConfig(name="torchscript")
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth' is no TorchScript file"):
        build("torchscript", weights=str(tmp_path / "w.pth"))
    with pytest.raises(InputError, match=r"weights = 'none\.pt' for torchscript: no such file"):
        build("torchscript", weights="none.pt")
    path = script(tmp_path / "net.pt", nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    with pytest.raises(InputError, match=r"torchscript cannot take images of 16 x 16 pixels: RuntimeError: .*; raise"):
        build("torchscript", weights=str(path))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["function", "torchscript"])
def test_training_and_encoding(
    kind: str, frozen: bool, module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus", 24, 8)
    torch.manual_seed(0)
    if kind == "function":
        name, weights = f"{module}:normalised", tmp_path / "w.pth"
        torch.save(build(name).net.state_dict(), weights)
    else:
        name, weights = "torchscript", script(tmp_path / "net.pt", Scripted())
    table = head_config(weights) | {"corpus": str(tmp_path / "corpus"), "out": str(tmp_path / "model")}
    table["backbone"] = {"name": name, "weights": str(weights), "frozen": frozen, "image_size": SIZE}
    config = validate(TrainConfig, {**table, "ray": "never", "tensorboard": False, "precision": "fp32"}, "f")
    manifest = train(config)
    assert train(config).id == manifest.id  # the same request
    monkeypatch.syspath_prepend(module.parent)  # the model names the file without its folder
    start, end = build(name, weights=str(weights)), load_model(str(tmp_path / "model"), device="cpu").method.trunk
    changed = [key for key, tensor in start.state_dict().items() if not torch.equal(tensor, end.state_dict()[key])]
    assert bool(changed) != frozen
    codes = encode(
        EncodeConfig(
            model=str(tmp_path / "model"), corpus=str(tmp_path / "corpus"), out=str(tmp_path / "codes"),
            pool=WorkersConfig(ray="never"),
        )
    )  # fmt: skip
    assert codes.rows_out == 24

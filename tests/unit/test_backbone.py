"""Trunks: torchvision by name, CNN-F and resnet9; weights by name and by file; errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torchvision
from pydantic import ValidationError
from tiny import BACKBONE, write_tiny_model
from torch import nn

from hashray.artifact import canonical
from hashray.encode.features import trunk_fingerprint
from hashray.errors import InputError, MismatchError
from hashray.methods.backbone import BackboneConfig, Trunk, build_trunk, state_fingerprint
from hashray.model import load_model

ROOT = Path(__file__).parents[2]
WEIGHTS = Path(os.environ.get("HASHRAY_WEIGHTS", ROOT.parent / "shared" / "weights"))
SMALL = "squeezenet1_1"


def build(name: str = "resnet9", **fields: object) -> Trunk:
    return build_trunk(BackboneConfig(name=name, **{"image_size": 32, **fields}))  # type: ignore[arg-type]


def images(n: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def weights_file(name: str) -> str:
    path = WEIGHTS / name
    if not path.exists():
        pytest.skip(f"{path} is missing; HASHRAY_WEIGHTS names the folder of the pretrained weights")
    return str(path)


@pytest.mark.parametrize(
    ("name", "size", "dim"),
    [("resnet9", 32, 256), ("resnet9", 48, 256), ("mobilenet_v2", 32, 1280), (SMALL, 64, 512), ("resnet18", 32, 512)],
)
def test_features_have_the_width_that_the_trunk_reports(name: str, size: int, dim: int) -> None:
    trunk = build(name, image_size=size).eval()
    out = trunk(images(2, size))
    assert trunk.feature_dim == dim
    assert out.shape == (2, dim)
    assert out.dtype == torch.float32
    features = torch.randn(5, dim)
    assert trunk(features) is features


def test_resnet9_grows_with_its_width() -> None:
    assert build(width=8).feature_dim == 64
    assert sum(isinstance(m, nn.Conv2d) for m in build(width=8).modules()) == 8  # the ninth layer is in the head


def test_cnn_f_is_the_network_of_the_papers() -> None:
    trunk = build("cnn_f", image_size=224)
    shapes = [tuple(m.weight.shape) for m in trunk.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert shapes == [
        (64, 3, 11, 11), (256, 64, 5, 5), (256, 256, 3, 3), (256, 256, 3, 3), (256, 256, 3, 3),
        (4096, 256 * 36), (4096, 4096),
    ]  # fmt: skip
    assert trunk.feature_dim == 4096
    seen: list[tuple[int, ...]] = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:]))) for m in trunk.modules()
             if isinstance(m, nn.MaxPool2d)]  # fmt: skip
    trunk.eval()(images(1, 224))
    assert len(hooks) == 3
    assert seen == [(64, 27, 27), (256, 13, 13), (256, 6, 6)]


def test_pixels_are_normalised_inside() -> None:
    trunk = build()
    seen = []
    trunk.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = images(2, 32)
    trunk.eval()(pixels)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(seen[0], expected, atol=1e-6)


def test_weights_with_another_normalisation_set_it() -> None:
    config = BackboneConfig(name="efficientnet_v2_l", weights="IMAGENET1K_V1")
    from hashray.methods.backbone import _normalisation

    assert tuple(_normalisation(config)[0]) == (0.5, 0.5, 0.5)


def test_a_frozen_trunk_stays_in_evaluation_mode() -> None:
    trunk = build(frozen=True)
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    assert not any(p.requires_grad for p in trunk.parameters())
    nn.Sequential(trunk).train()
    assert not any(module.training for module in trunk.modules())
    trunk(images(4, 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.state_dict().items())
    assert all(module.training for module in build().train().modules())


def test_frozen_norms_keep_their_statistics_while_every_weight_learns() -> None:
    trunk = build(frozen_norms=True)
    before = {name: tensor.clone() for name, tensor in trunk.named_buffers()}
    nn.Sequential(trunk).train()
    trunk(images(4, 32)).sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in trunk.named_buffers())
    assert all(p.grad is not None for p in trunk.parameters())
    moved = build()
    moved.train()(images(4, 32))
    assert any(not torch.equal(before[name], tensor) for name, tensor in moved.named_buffers())


def test_mirrored_features_are_the_same_for_an_image_and_its_mirror_image() -> None:
    plain, trunk, pixels = build().eval(), build(mirrored=True).eval(), images(4, 32)
    trunk.load_state_dict(plain.state_dict())
    expected = torch.stack([plain(pixels), plain(pixels.flip(3))]).mean(0)
    assert torch.allclose(trunk(pixels), expected, atol=1e-6)
    assert torch.allclose(trunk(pixels), trunk(pixels.flip(3)), atol=1e-6)
    assert not torch.allclose(trunk(pixels), plain(pixels), atol=1e-3)
    cached = trunk(pixels)
    assert torch.equal(trunk(cached), cached)
    assert torch.equal(trunk.train()(pixels), plain.train()(pixels))


def test_the_fingerprint_of_plain_features_does_not_depend_on_the_mirrored_setting() -> None:
    plain, mirrored = (build(frozen=True, mirrored=value) for value in (False, True))
    mirrored.load_state_dict(plain.state_dict())
    settings = plain.config.model_dump(mode="json", exclude={"weights", "frozen_norms", "mirrored"})
    assert trunk_fingerprint(plain) == state_fingerprint(plain.state_dict(), canonical(settings).decode())
    assert trunk_fingerprint(mirrored) != trunk_fingerprint(plain)


def test_bfloat16_gives_float32_features_near_those_of_float32() -> None:
    trunk = build().eval()
    plain = trunk(images(4, 32))
    trunk.amp = True
    cast = trunk(images(4, 32))
    assert cast.dtype == torch.float32
    assert not torch.equal(plain, cast)
    assert torch.nn.functional.cosine_similarity(plain, cast).min() > 0.99


def test_a_strided_depthwise_convolution_trains_in_float32_and_the_others_in_bfloat16() -> None:
    trunk, seen = build("mobilenet_v2"), dict[str, torch.dtype]()
    layers = {name: m for name, m in trunk.net.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in layers.items():
        module.register_forward_hook(lambda m, given, out, name=name: seen.update({name: out.dtype}))
    strided = {name for name, m in layers.items() if m.stride != (1, 1) and m.groups > 1}
    trunk.amp = True
    trunk.train()(images(2, 32)).sum().backward()
    assert len(strided) == 4 and {name for name, dtype in seen.items() if dtype == torch.float32} == strided
    assert all(module.weight.grad is not None for module in layers.values())
    trunk.eval()(images(2, 32))
    assert set(seen.values()) == {torch.bfloat16}


def test_outside_training_the_size_of_the_images_says_how_many_the_network_takes_at_a_time() -> None:
    trunk, seen = build(width=4, image_size=128).eval(), []
    trunk.net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    pixels = images(40, 128)
    with torch.no_grad():
        whole = trunk(pixels)
        assert torch.equal(whole, torch.cat([trunk(pixels[:16]), trunk(pixels[16:])]))
        assert trunk(pixels[:0]).shape == (0, 32)
        trunk.train()(pixels)
    assert seen == [16, 16, 8, 16, 16, 8, 0, 40]
    assert [build(width=4, image_size=size).rows_at_a_time for size in (32, 224, 1024)] == [64, 5, 1]


def test_features_multiply_in_bfloat16_where_the_config_says_so() -> None:
    plain, trunk = build().eval(), build(precision="bf16").eval()
    trunk.load_state_dict(plain.state_dict())
    plain.amp = True
    assert torch.equal(trunk(images(4, 32)), plain(images(4, 32)))
    plain.amp = False
    assert not torch.equal(trunk(images(4, 32)), plain(images(4, 32)))
    assert torch.equal(trunk.train()(images(4, 32)), plain.train()(images(4, 32)))
    assert trunk_fingerprint(trunk) != trunk_fingerprint(plain)


def test_fields_that_came_later_change_no_hash_of_what_was_there() -> None:
    before = {
        "name": "resnet9", "weights": None, "image_size": 32, "resize": "crop", "width": 32, "frozen": False,
        "mirrored": False, "frozen_norms": False,
    }  # fmt: skip
    assert BackboneConfig().model_dump(mode="json") == before
    later = {"interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.2] * 3, "precision": "bf16"}
    config = BackboneConfig.model_validate(later)
    assert config.model_dump(mode="json") == before | later
    assert BackboneConfig.model_validate(config.model_dump(mode="json")) == config


def test_an_unknown_trunk_gets_a_hint() -> None:
    with pytest.raises(
        ValidationError, match=r"no trunk is called 'resnet19', perhaps you meant 'resnet.*'.; other forms: timm:NAME"
    ):
        BackboneConfig(name="resnet19")


def test_a_weights_name_is_used_only_when_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def offline(url: str, **options: object) -> None:
        requested.append(url)
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    config = BackboneConfig(name=SMALL, weights="IMAGENET1K_V1", image_size=32)
    build_trunk(config, load_weights=False)
    assert requested == []
    with pytest.raises(InputError, match=r"could not be downloaded from https://.*no network; .* weights = PATH"):
        build_trunk(config)
    assert len(requested) == 1


@pytest.mark.parametrize(
    ("name", "weights", "allowed"),
    [
        (
            SMALL,
            "IMAGENET1K_V9",
            r", perhaps you meant 'IMAGENET1K_V1'\? Allowed: IMAGENET1K_V1, DEFAULT, a state-dict file, the folder",
        ),
        ("resnet9", "none.pth", "; allowed: a state-dict file, the folder of a trained model, None"),
    ],
)
def test_a_missing_file_says_what_is_allowed(name: str, weights: str, allowed: str) -> None:
    with pytest.raises(InputError, match=f"weights = '{weights}' for {name}: no such file{allowed}"):
        build(name, weights=weights)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"w\.pth is not a state dict of torch or safetensors"):
        build(weights=str(path))
    torch.save([1, 2], path)
    with pytest.raises(InputError, match="holds a list; expected a state dict"):
        build(weights=str(path))
    torch.save({"state_dict": {}, "epoch": 3}, path)
    with pytest.raises(InputError, match=r"does not fit resnet9: 2 keys are unknown .*keys of the trunk are missing"):
        build(weights=str(path))
    torch.save(build(width=8).net.state_dict(), path)
    with pytest.raises(InputError, match=r"does not fit resnet9: \d+ keys are unknown or have another shape"):
        build(width=16, weights=str(path))


def test_a_trunk_holds_the_tensors_of_its_state_dict_file(tmp_path: Path, s3_url: str) -> None:
    source = build(width=8)
    path = tmp_path / "w.pth"
    torch.save(source.net.state_dict(), path)
    assert same(build(width=8, weights=str(path)), source)
    from hashray.storage import open_store

    open_store(s3_url).write("w.pth", path.read_bytes())
    assert same(build(width=8, weights=f"{s3_url}/w.pth"), source)


@pytest.mark.parametrize("name", ["mobilenet_v2", SMALL])
def test_the_classifier_of_a_file_may_be_missing_or_different(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    net = torchvision.models.get_model(name, weights=None, num_classes=7)
    states = [net.state_dict(), {k: v for k, v in net.state_dict().items() if not k.startswith("classifier")}]
    for state in states:
        torch.save(state, path)
        trunk = build(name, weights=str(path))
        loaded = trunk.net.state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in state.items() if k.startswith("features"))
        assert not any(tuple(v.shape[:1]) == (7,) for v in loaded.values())
    del state["features.0.weight" if name == SMALL else "features.0.0.weight"]
    torch.save(state, path)
    with pytest.raises(InputError, match="1 keys of the trunk are missing"):
        build(name, weights=str(path))


def test_cnn_f_needs_every_tensor_because_it_has_no_classifier(tmp_path: Path) -> None:
    state = build("cnn_f", image_size=64).net.state_dict()
    last = max((k for k in state if k.endswith("weight")), key=lambda k: int(k.split(".")[0]))
    del state[last]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="1 keys of the trunk are missing"):
        build("cnn_f", image_size=64, weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("vit_b_32", 32), ("inception_v3", 32), ("cnn_f", 32)])
def test_images_too_small_for_a_trunk_are_refused(name: str, size: int) -> None:
    with pytest.raises(InputError, match=f"{name} cannot take images of {size} x {size} pixels: .*raise image_size"):
        build(name, image_size=size)


def test_auxiliary_outputs_are_removed_for_training() -> None:
    trunk = build("googlenet", image_size=64).train()
    assert trunk(images(2, 64)).shape == (2, trunk.feature_dim)
    assert not any("aux" in name for name, _ in trunk.named_parameters())


def test_pretrained_mobilenet_from_a_local_file() -> None:
    trunk = build("mobilenet_v2", weights=weights_file("mobilenet_v2_features_fp32.pth"), image_size=64).eval()
    with torch.no_grad():
        out = trunk(images(2, 64))
    assert out.shape == (2, 1280)
    assert torch.isfinite(out).all()
    assert not same(trunk, build("mobilenet_v2", image_size=64))


def test_pretrained_squeezenet_from_a_local_file() -> None:
    path = weights_file("squeezenet1_1_fp32.pth")
    trunk = build(SMALL, weights=path, image_size=64).eval()
    state = torch.load(path, weights_only=True)
    assert torch.equal(trunk.net.state_dict()["features.0.weight"], state["features.0.weight"])
    with torch.no_grad():
        assert trunk(images(2, 64)).shape == (2, 512)


def test_fingerprint_covers_names_values_types_and_preprocessing() -> None:
    state = {"a": torch.arange(4.0), "b": torch.tensor(1)}
    base = state_fingerprint(state, "32 crop")
    assert state_fingerprint(dict(reversed(state.items())), "32 crop") == base
    changed = [
        ({**state, "a": torch.tensor([0.0, 1, 2, 4])}, "32 crop"),
        ({**state, "a": state["a"].reshape(2, 2)}, "32 crop"),
        ({**state, "a": state["a"].to(torch.bfloat16)}, "32 crop"),
        ({"A": state["a"], "b": state["b"]}, "32 crop"),
        ({"a": state["a"]}, "32 crop"),
        (state, "64 crop"),
    ]
    assert len({base, *(state_fingerprint(*pair) for pair in changed)}) == 7


def same(left: Trunk, right: Trunk) -> bool:
    a, b = left.net.state_dict(), right.net.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_trunk_of_a_model_with_another_normalisation_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    fields = BACKBONE | {"weights": str(tmp_path / "model")}
    build_trunk(BackboneConfig.model_validate(fields))
    other = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    with pytest.raises(InputError, match=r"trained with mean \(0\.485, .* use \(0\.5, .*backbone\.mean .* --init"):
        build_trunk(BackboneConfig.model_validate(fields | other))


def test_a_model_with_unknown_settings_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        fields = {**BACKBONE, "sharpen": True}
        newer.setattr("hashray.model.canonical", lambda value: canonical({**value, "backbone": fields}))
        write_tiny_model(tmp_path)
    with pytest.raises(MismatchError, match=r"written by another version of hashray: sharpen .* train it again"):
        load_model(str(tmp_path))

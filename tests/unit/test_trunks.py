"""timm's models as trunks: preprocessing, pooling, weights in the layouts of their authors, errors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny_vits
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from tiny import CLASSES, METHOD, file_of, head_config, write_corpus
from tiny_vits import SIZE, big_vision_features, dinov2_features, openclip_features

from hashray.config import merge, validate
from hashray.data.images import to_pixels
from hashray.encode.features import TrunkRecipe, compute_features, trunk_fingerprint
from hashray.engine.session import WorkersConfig
from hashray.errors import ConfigError, InputError
from hashray.methods import build_method, parse_method_config
from hashray.methods.backbone import BackboneConfig, Trunk, build_trunk
from hashray.model import load_model, write_model
from hashray.storage import open_store
from hashray.train.config import TrainConfig
from hashray.train.run import train

LAYOUTS = {
    "tiny_dinov2": (lambda: tiny_vits.dinov2_file(False), dinov2_features),
    "tiny_dinov2_reg": (lambda: tiny_vits.dinov2_file(True), dinov2_features),
    "tiny_clip": (tiny_vits.openclip_file, openclip_features),
}


def build(name: str, **fields: Any) -> Trunk:
    return build_trunk(BackboneConfig(name=f"timm:{name}", **fields)).eval()


def images(n: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def normalised(trunk: Trunk, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (trunk.config.mean, trunk.config.std))
    return (pixels / 255 - mean) / std


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_vit3", "test_resnet", "test_efficientnet", "test_convnext", "tiny_clip"]
)
def test_features_are_pooled_as_the_model_does(name: str) -> None:
    torch.manual_seed(0)
    trunk = build(name)
    size = trunk.config.image_size
    assert size == timm.models.get_pretrained_cfg(name).input_size[-1]
    pixels = images(2, size)
    with torch.no_grad():
        net: Any = trunk.net
        expected = net.forward_head(net.forward_features(normalised(trunk, pixels)), pre_logits=True)
        assert torch.allclose(trunk(pixels), expected, atol=1e-5)
    assert trunk.feature_dim == expected.shape[1] == net.num_features
    assert expected.std() > 1e-4  # random weights that give no zeros


@pytest.mark.parametrize(("width", "height"), [(SIZE, SIZE), (200, 200), (333, 160), (161, 320)])
@pytest.mark.parametrize("name", ["tiny_dinov2", "tiny_clip", "tiny_siglip"])
def test_pixels_are_those_of_timm(name: str, width: int, height: int) -> None:
    config = BackboneConfig(name=f"timm:{name}")
    entry = resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    assert (config.mean, config.std) == (entry["mean"], entry["std"])
    image = picture(width, height)
    expected = create_transform(**entry, is_training=False)(image)
    pixels = torch.from_numpy(to_pixels(image, config.image_size, config.framing))
    assert torch.allclose(normalised(build(name), pixels), expected, atol=1e-6)


def test_set_fields_override_the_model_and_flags_may_name_another_model() -> None:
    config = BackboneConfig(name="timm:tiny_siglip", image_size=14, resize="crop", crop_pct=0.5)
    assert (config.image_size, config.resize, config.crop_pct, config.interpolation) == (14, "crop", 0.5, "bicubic")
    before = validate(TrainConfig, {"method": METHOD, "backbone": {"name": "timm:tiny_siglip", "crop_pct": 0.5}}, "f")
    other = BackboneConfig.model_construct(**{**dict(before.backbone), "name": "resnet9"})
    merged = merge(before, before.model_copy(update={"backbone": other}), ["--backbone.name", "resnet9"]).backbone
    assert merged == BackboneConfig(name="resnet9", crop_pct=0.5)
    plain = validate(TrainConfig, {"method": METHOD, "backbone": {"name": "resnet9"}}, "f")
    other = BackboneConfig.model_construct(**{**dict(plain.backbone), "name": "timm:tiny_siglip"})
    merged = merge(
        plain, plain.model_copy(update={"backbone": other}), ["--backbone.name", "timm:tiny_siglip"]
    ).backbone
    assert merged == BackboneConfig(name="timm:tiny_siglip")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_file_in_a_published_layout_gives_the_features_of_its_authors(name: str, ending: str, tmp_path: Path) -> None:
    write, features = LAYOUTS[name]
    state, path = write(), tmp_path / f"w{ending}"
    if ending == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    trunk = build(name, weights=str(path))
    pixels = images(3)
    with torch.no_grad():
        actual, expected = trunk(pixels), features(state, normalised(trunk, pixels))
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


def test_an_archive_of_big_vision_gives_the_features_of_siglip(tmp_path: Path) -> None:
    arrays, path = tiny_vits.big_vision_file(), tmp_path / "siglip.npz"
    np.savez(path, **arrays)
    trunk = build("tiny_siglip", weights=str(path))
    pixels = images(3)
    with torch.no_grad():
        actual, expected = trunk(pixels), big_vision_features(arrays, normalised(trunk, pixels))
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    np.savez(path, **tiny_vits.big_vision_file(depth=3))
    with pytest.raises(InputError, match=r"siglip\.npz does not fit .* its image tower has [\d,]+ numbers"):
        build("tiny_siglip", weights=str(path))
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(InputError, match=r"does not fit timm:tiny_siglip: timm could not read it \(ValueError"):
        build("tiny_siglip", weights=str(path))


@pytest.mark.parametrize("wrap", ["as it is", "visual.trunk", "state_dict", "model_ema", "module", "with a classifier"])
def test_the_layouts_around_timms_own_names(wrap: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = timm.create_model("tiny_siglip", num_classes=5)
    state: dict[str, Any] = {
        k: v for k, v in net.state_dict().items() if wrap == "with a classifier" or k[:4] != "head"
    }
    path = tmp_path / "w.pth"
    torch.save(
        {
            # OpenCLIP's SigLIP: timm's image tower, a text tower, two scalars
            "visual.trunk": {f"visual.trunk.{k}": v for k, v in state.items()}
            | {"text.token_embedding.weight": torch.zeros(5, 8), "logit_scale": torch.tensor(1.0)},
            "state_dict": {"state_dict": state, "epoch": 3},
            "model_ema": {"model": {}, "model_ema": state},
            "module": {f"module.{k}": v for k, v in state.items()},
        }.get(wrap, state),
        path,
    )
    loaded = build("tiny_siglip", weights=str(path)).net.state_dict()
    assert loaded.keys() == {k for k in state if k[:4] != "head"}
    assert all(torch.equal(loaded[k], state[k]) for k in loaded)


def test_position_embeddings_follow_the_size_of_the_images(tmp_path: Path) -> None:
    torch.save(tiny_vits.dinov2_file(False), tmp_path / "w.pth")
    small, large = (build("tiny_dinov2", weights=str(tmp_path / "w.pth"), image_size=size) for size in (SIZE, 56))
    assert large.net.get_parameter("pos_embed").shape[1] == 1 + 64
    same = [k for k, v in small.net.state_dict().items() if torch.equal(v, large.net.state_dict().get(k, v + 1))]
    assert set(small.net.state_dict()) - set(same) == {"pos_embed"}
    assert large(images(1, 56)).shape == (1, tiny_vits.WIDTH)


def test_a_file_of_another_model_is_refused_with_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = tiny_vits.dinov2_file(False)
    torch.save({**state, "blocks.2.norm1.weight": torch.zeros(16)}, path)
    with pytest.raises(InputError, match=r"timm:tiny_dinov2: 1 keys are unknown .*'blocks\.2\.norm1\.weight'"):
        build("tiny_dinov2", weights=str(path))
    torch.save({k: v for k, v in state.items() if k != "blocks.1.ls1.gamma"}, path)
    with pytest.raises(InputError, match=r"1 keys of the trunk are missing \(\['blocks\.1\.ls1\.gamma'\]\)"):
        build("tiny_dinov2", weights=str(path))
    torch.save({f"vision_model.encoder.{k}": v for k, v in state.items()}, path)  # as transformers writes it
    with pytest.raises(InputError, match=r"keys are unknown .*'vision_model\.encoder\."):
        build("tiny_dinov2", weights=str(path))
    torch.save(
        {k: v for k, v in tiny_vits.openclip_file().items() if "blocks.0" not in k} | {"visual.conv1.weight": 3}, path
    )
    with pytest.raises(InputError, match="does not fit timm:tiny_clip"):
        build("tiny_clip", weights=str(path))


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("tiny_dinov3", {}, "timm has no model 'tiny_dinov3', perhaps you meant 'tiny_dinov2'?"),
        ("tiny_dinov2.other", {}, "timm's tiny_dinov2 has no weights 'other'; it has: test"),
        ("tiny_oblong", {}, f"was trained with images of {SIZE} x {2 * SIZE} pixels: set a square's image_size"),
        ("tiny_border", {}, "was trained with borders around whole images: set resize to crop or squash"),
        ("tiny_clip", {"mean": (0.5, 0.5, 0.5), "std": None}, "mean and std belong together"),
    ],
)
def test_names_and_settings_that_cannot_be(name: str, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as raised:
        BackboneConfig(name=f"timm:{name}", **fields)
    assert text in str(raised.value)


def test_faults_beside_an_unknown_model_are_listed_too() -> None:
    table = {"method": METHOD, "backbone": {"name": "timm:no", "image_size": 1}}
    with pytest.raises(ConfigError, match=r"2 faults\n  backbone\.name: timm has no model .*\n  backbone\.image_size"):
        validate(TrainConfig, table, "f")


def test_an_image_size_that_a_model_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"timm:test_vit3 cannot .* 8 x 8 pixels: .*leave image_size out"):
        build("test_vit3", image_size=8)


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:NAME needs timm, .* pip install 'hashray\[timm\]'"):
        BackboneConfig(name="timm:tiny_clip")


def test_timm_is_imported_for_its_names_only() -> None:
    code = (
        "import sys; from hashray.methods.backbone import BackboneConfig, build_trunk\n"
        "build_trunk(BackboneConfig()); sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_to_download_need_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    config = BackboneConfig(name="timm:test_vit", weights="DEFAULT")
    build_trunk(config, load_weights=False)
    with pytest.raises(InputError, match=r"'DEFAULT' of timm:test_vit could not .*no network; .* weights = PATH"):
        build_trunk(config)
    with pytest.raises(InputError, match=r"weights = 'DEFAULT' for timm:tiny_clip: no such file"):
        build("tiny_clip", weights="DEFAULT")


def test_a_model_keeps_its_preprocessing_and_its_fingerprint_covers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(tiny_vits.dinov2_file(False), tmp_path / "w.pth")
    fields = {"weights": str(tmp_path / "w.pth"), "frozen": True}
    prints, features = set(), set()
    for number, change in enumerate(
        [{}, {"crop_pct": 0.9}, {"interpolation": "bilinear"}, {"mean": (0.5,) * 3}, {"resize": "squash"}]
    ):
        torch.manual_seed(0)
        method = build_method(parse_method_config(METHOD), build("tiny_dinov2", **fields, **change), len(CLASSES))
        folder = tmp_path / str(number)
        prints.add(write_model(open_store(folder), method, method.state_dict(), CLASSES, {}, {}, [], {}).fingerprint)
        features.add(trunk_fingerprint(method.trunk))
    assert len(prints) == len(features) == 5
    described = json.loads(file_of(tmp_path / "1", "model.json").read_bytes())["backbone"]
    assert (described["crop_pct"], described["interpolation"], described["mean"]) == (0.9, "bicubic", [0.5, 0.4, 0.3])
    pixels = images(4).numpy()
    before = load_model(str(tmp_path / "0")).logits(pixels)
    (tmp_path / "w.pth").unlink()
    monkeypatch.setattr(timm.models.get_pretrained_cfg("tiny_dinov2"), "mean", (0.1, 0.1, 0.1))  # a later timm
    assert np.array_equal(load_model(str(tmp_path / "0")).logits(pixels), before)


def test_a_head_trains_on_the_cached_features_of_a_vision_transformer(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 24, 8)
    torch.save(tiny_vits.dinov2_file(False), tmp_path / "w.pth")
    table = head_config(tmp_path / "w.pth") | {"corpus": str(tmp_path / "corpus"), "out": str(tmp_path / "model")}
    table["backbone"] = {"name": "timm:tiny_dinov2", "weights": str(tmp_path / "w.pth"), "frozen": True}
    config = validate(TrainConfig, {**table, "ray": "never", "tensorboard": False}, "f")
    manifest = train(config)
    assert train(config).id == manifest.id
    model = load_model(str(tmp_path / "model"), device="cpu")
    recipe = TrunkRecipe(model.backbone, model.url)
    pool = WorkersConfig(ray="never")
    corpus = open_store(tmp_path / "corpus")
    from hashray.data.corpus import open_corpus

    features = compute_features(open_corpus(corpus.url), recipe, None, pool, 0.0)
    assert features.manifest.fingerprint == trunk_fingerprint(model.method.trunk)
    assert features.manifest.config["mean"] == [0.5, 0.4, 0.3]
    sink = io.BytesIO()
    picture(40, 30).save(sink, "PNG")
    assert model.encode([picture(40, 30)]).shape == (1, 2)

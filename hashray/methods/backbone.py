"""Trunks: what turns uint8 images into float features, with their weights and preprocessing.

A trunk normalises inside its forward, so a model's fingerprint covers preprocessing as well as weights.
Torchvision trunks lose their last linear layer (SqueezeNet its convolutional classifier); `cnn_f` is the
network of the papers; `resnet9` is a small trunk for 32-pixel images trained from scratch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from pydantic import Field, field_validator
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from hashray import artifact, storage
from hashray.config import Config
from hashray.errors import InputError, perhaps

OWN_TRUNKS = ("cnn_f", "resnet9")
MODEL_PREFIX = "trunk.net."  # of the trunk's tensors in a trained model
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BackboneConfig(Config):
    """Which trunk, from which weights, on images of which size."""

    name: str = Field("resnet9", description="cnn_f, resnet9 or a torchvision classification model")
    weights: str | None = Field(
        None,
        description="a torchvision weights name (DEFAULT, IMAGENET1K_V1), a state-dict file, a trained model"
        " (its trunk is taken), or unset",
    )
    image_size: int = Field(32, ge=8, le=2048, description="pixels, height and width")
    resize: Literal["crop", "squash"] = Field("crop", description="shorter side then centre crop, or both sides")
    width: int = Field(32, ge=4, description="channels of resnet9's first layer")
    frozen: bool = Field(False, description="features are computed once and cached; the trunk is not trained")
    mirrored: bool = Field(
        False, description="features are the mean of an image's and its mirror image's (not while the trunk trains)"
    )
    frozen_norms: bool = Field(
        False, description="fine-tuning: batch norms keep the statistics of their weights, whatever a batch holds"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in OWN_TRUNKS:
            return value
        models = _models()
        known = [*OWN_TRUNKS, *models.list_models(module=models)]
        if value not in known:
            raise ValueError(f"no trunk is called {value!r}{perhaps(value, known)}")
        return value


@final
class Trunk(nn.Module):
    """uint8 images [n, 3, h, w] -> float32 features [n, feature_dim]; features [n, d] pass unchanged.

    `amp` runs the network under bfloat16 autocast; normalisation and what leaves it are float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig, net: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.net = net.to(memory_format=torch.channels_last)
        self.amp = False
        mean, std = _normalisation(config)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if config.frozen:
            self.requires_grad_(False)
        self.train(not config.frozen)
        self.feature_dim = self._probe()

    @torch.no_grad()
    def _probe(self) -> int:
        training, size = self.training, self.config.image_size
        self.eval()
        try:
            return int(self(torch.zeros(1, 3, size, size)).shape[1])
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(
                f"{self.config.name} cannot take images of {size} x {size} pixels: {str(error).splitlines()[0]}; "
                "raise image_size (224 suits every torchvision trunk but those made for one larger size)"
            ) from error
        finally:
            self.train(training)

    def train(self, mode: bool = True) -> Trunk:
        """A frozen trunk stays in evaluation mode; with `frozen_norms` its batch norms do.

        Statistics of small, enlarged images are not those of the weights: with each batch's own, MobileNetV2 began to
        fine-tune on CIFAR-10 from features that fitted a trained head no more (.40 against .78 mAP after 8,000 images).
        """
        super().train(mode and not self.config.frozen)
        if self.config.frozen_norms:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim == 2:
            return inputs
        images = (inputs.to(self.mean.dtype) / 255 - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.amp):
            features = self.net(images)
            if self.config.mirrored and not self.training:
                features = (features + self.net(images.flip(3))) / 2
        return features.to(self.mean.dtype).flatten(1)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _conv(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


def resnet9(width: int = 64) -> nn.Module:
    """Nine layers for 32-pixel images, after the DAWNBench entries; feature_dim is 8 * width."""
    w = width
    return nn.Sequential(
        _conv(3, w), _conv(w, 2 * w, pool=True), _Residual(2 * w), _conv(2 * w, 4 * w, pool=True),
        _conv(4 * w, 8 * w, pool=True), _Residual(8 * w), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    )  # fmt: skip


def cnn_f() -> nn.Module:
    """CNN-F of Chatfield et al. (BMVC 2014), up to fc7 with dropout 0.5 after fc6 and fc7; 224 pixels."""
    lrn = lambda: nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # noqa: E731
    relu = lambda: nn.ReLU(inplace=True)  # noqa: E731
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4), relu(), lrn(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 256, 5, padding=2), relu(), lrn(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(256, 256, 3, padding=1), relu(),
        nn.Conv2d(256, 256, 3, padding=1), relu(),
        nn.Conv2d(256, 256, 3, padding=1), relu(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(6), nn.Flatten(),
        nn.Linear(256 * 36, 4096), relu(), nn.Dropout(), nn.Linear(4096, 4096), relu(), nn.Dropout(),
    )  # fmt: skip


def build_trunk(config: BackboneConfig, load_weights: bool = True) -> Trunk:
    """Build a trunk; with `load_weights` its pretrained weights are fetched or read.

    Raises:
        InputError: the weights name is not one of the model's, the file is missing or does not fit, or the
            network is not made for images of this size.
    """
    if config.name in OWN_TRUNKS:
        net = cnn_f() if config.name == "cnn_f" else resnet9(config.width)
    else:
        # These two draw their first weights for ten seconds, with SciPy; torch's own do as well.
        slow = {"init_weights": False} if config.name in ("googlenet", "inception_v3") else {}
        net = _models().get_model(config.name, weights=None, **slow)
    if load_weights and config.weights:
        names = _weight_names(config.name)
        if config.weights in names:
            net.load_state_dict(_download(config))
        else:
            _load_file(net, config)
    if config.name not in OWN_TRUNKS:
        _drop_classifier(net)
        _drop_auxiliary(net, pretrained=config.weights is not None)
    return Trunk(config, net)


def _normalisation(config: BackboneConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the weights were trained with: ImageNet's, but for a few of torchvision's."""
    if config.weights in _weight_names(config.name):
        preset = _models().get_model_weights(config.name)[str(config.weights)].transforms()
        return preset.mean, preset.std
    return IMAGENET_MEAN, IMAGENET_STD


def without_place(config: BackboneConfig) -> BackboneConfig:
    """The config to keep beside trained weights: a file's path becomes "file", a trained model's "model"; names stay,
    for their normalisation."""
    if _has_no_place(config) or config.weights in ("file", "model"):
        return config
    trained = artifact.is_finished(storage.open_store(str(config.weights)))
    return config.model_copy(update={"weights": "model" if trained else "file"})


def with_absolute_weights(config: BackboneConfig) -> BackboneConfig:
    """The config with a weights file named so that workers in other folders find it."""
    if _has_no_place(config):
        return config
    return config.model_copy(update={"weights": storage.absolute(str(config.weights))})


def weights_identity(config: BackboneConfig) -> str | None:
    """What `weights` stands for: a name of torchvision's as it is, a file as the sha256 of its bytes.

    Raises:
        InputError: there is no such file.
    """
    if _has_no_place(config):
        return config.weights
    return hashlib.sha256(_read_weights(config)).hexdigest()


def _download(config: BackboneConfig) -> Mapping[str, Tensor]:
    found = _models().get_model_weights(config.name)[str(config.weights)]
    try:
        return found.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"weights = {config.weights!r} of {config.name} could not be fetched from {found.url}: {error}; "
            "without a network give weights = PATH, a state-dict file"
        ) from error


def _has_no_place(config: BackboneConfig) -> bool:
    """Whether the weights are no file: unset, or a name of torchvision's."""
    return config.weights is None or config.weights in _weight_names(config.name)


def _weight_names(name: str) -> list[str]:
    if name in OWN_TRUNKS:
        return []
    return list(_models().get_model_weights(name).__members__)


def _models() -> Any:
    """torchvision's models; not at the top: importing them takes each worker five seconds, and our trunks need none."""
    import torchvision

    return torchvision.models


def _read_weights(config: BackboneConfig) -> bytes:
    """The bytes of a state-dict file, or of a trained model's tensors."""
    path = str(config.weights)
    try:
        store = storage.open_store(path)
        if artifact.is_finished(store):
            return artifact.read_file(store, artifact.load_manifest(store, "model").record("model.safetensors"))
        return storage.read_url(path)
    except InputError as error:
        names = _weight_names(config.name)
        allowed = ", ".join([*names, "a state-dict file or the folder of a trained model"])
        raise InputError(f"weights = {config.weights!r} for {config.name}: no such file; allowed: {allowed}") from error


def _load_file(net: nn.Module, config: BackboneConfig) -> None:
    path, data = str(config.weights), _read_weights(config)
    try:
        if data[8:9] == b"{":  # safetensors: the length of a JSON header, then the header
            state = load_safetensors(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is not a state dict of torch or safetensors: {error}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path} holds a {type(state).__name__}; expected a state dict")
    if any(str(k).startswith(MODEL_PREFIX) for k in state):  # a trained model: its trunk
        state = {k.removeprefix(MODEL_PREFIX): v for k, v in state.items() if k.startswith(MODEL_PREFIX)}
        _require_normalisation(config)
    own = net.state_dict()
    # The classifier goes: it may be missing, or be that of other classes.
    prefix = None if config.name in OWN_TRUNKS else _classifier_prefix(net)
    state = {k: v for k, v in state.items() if not (prefix and str(k).startswith(prefix))}
    wrong = [k for k, v in state.items() if k not in own or own[k].shape != getattr(v, "shape", None)]
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    missing = [k for k in missing if not (prefix and k.startswith(prefix))]
    if wrong or missing:
        raise InputError(
            f"{path} does not fit {config.name}: {len(wrong)} keys unknown or of another shape ({wrong[:3]}), "
            f"{len(missing)} keys of the trunk not in it ({missing[:3]})"
        )
    net.load_state_dict(state, strict=False)


def _require_normalisation(config: BackboneConfig) -> None:
    """Refuse the trunk of a model that saw pixels of another mean and spread than `config` would give it."""
    store = storage.open_store(str(config.weights))
    if not artifact.is_finished(store):  # the tensors alone
        return
    description = artifact.read_file(store, artifact.load_manifest(store, "model").record("model.json"))
    backbone = json.loads(description)["backbone"]
    theirs = BackboneConfig(name=backbone["name"], weights=backbone["weights"])  # what it depends on
    if _normalisation(theirs) != _normalisation(config):
        raise InputError(
            f"{config.weights} was trained with the normalisation of weights = {theirs.weights!r}, and as weights "
            "of another training it would get ImageNet's: go on from it with --init instead"
        )


def _last_linear(net: nn.Module) -> str | None:
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


def _classifier_prefix(net: nn.Module) -> str | None:
    name = _last_linear(net) or ("classifier" if hasattr(net, "classifier") else None)
    return f"{name}." if name else None


def _drop_classifier(net: nn.Module) -> None:
    linear = _last_linear(net)
    if linear is None:
        net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return
    parent, _, child = linear.rpartition(".")
    setattr(net.get_submodule(parent), child, nn.Identity())


def _drop_auxiliary(net: nn.Module, pretrained: bool) -> None:
    """GoogLeNet and Inception v3: no auxiliary outputs in training; pretrained weights want their input rescaled."""
    if hasattr(net, "aux_logits"):
        vars(net).update(aux_logits=False, transform_input=pretrained)
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(net, name):
                setattr(net, name, None)


def state_fingerprint(state: Mapping[str, Tensor], preprocessing: str) -> str:
    """sha256 over names, dtypes, shapes and bytes of the weights, and the preprocessing as text."""
    digest = hashlib.sha256(preprocessing.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Trunks turn uint8 images into float features. This file holds their networks, weights and preprocessing.

A trunk normalises pixels in its forward, so the fingerprint of a model covers preprocessing and weights. Torchvision
trunks lose their last linear layer (SqueezeNet loses its convolutional classifier). `cnn_f` is the network of the
papers, and `resnet9` is a small trunk for training from scratch on 32-pixel images.
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

BUILT_IN = ("cnn_f", "resnet9")  # trunks of this file; all others are torchvision's
MODEL_PREFIX = "trunk.net."  # prefix of the trunk's tensors in a trained model
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BackboneConfig(Config):
    """The trunk, its weights and its image size."""

    name: str = Field("resnet9", description="Trunk: cnn_f, resnet9 or a torchvision classification model")
    weights: str | None = Field(
        None,
        description="First weights: a torchvision name (DEFAULT, IMAGENET1K_V1), a state-dict file, or a trained model"
        " for its trunk; unset: random",
    )
    image_size: int = Field(32, ge=8, le=2048, description="Height and width of an image in pixels")
    resize: Literal["crop", "squash"] = Field(
        "crop", description="Way to a square: scale the shorter side and crop the centre, or scale both sides"
    )
    width: int = Field(32, ge=4, description="Channels of resnet9's first layer")
    frozen: bool = Field(False, description="Keep the trunk's weights; features are computed once and cached")
    mirrored: bool = Field(
        False, description="Average the features of an image and its mirror image, except while the trunk trains"
    )
    frozen_norms: bool = Field(
        False, description="Keep the statistics of pretrained batch norms while the trunk is fine-tuned"
    )

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in BUILT_IN:
            return value
        models = _models()
        known = [*BUILT_IN, *models.list_models(module=models)]
        if value not in known:
            raise ValueError(f"no trunk is called {value!r}{perhaps(value, known)}")
        return value


@final
class Trunk(nn.Module):
    """uint8 images [n, 3, h, w] -> float32 features [n, feature_dim]. Features [n, d] pass unchanged.

    `amp` runs the network under bfloat16 autocast. Normalisation and output stay float32.
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
                "raise image_size (224 suits every torchvision trunk except those with a fixed larger size)"
            ) from error
        finally:
            self.train(training)

    def train(self, mode: bool = True) -> Trunk:
        """Set the mode. A frozen trunk stays in evaluation mode, and with `frozen_norms` its batch norms stay there.

        Small, enlarged images have other statistics than the pretraining images. Measured for MobileNetV2 on CIFAR-10
        with a trained head: with batch statistics, fine-tuning had .40 mAP after 8,000 images, with frozen norms .78.
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
    """A network of nine layers for 32-pixel images, after the DAWNBench entries. feature_dim is 8 * width."""
    w = width
    return nn.Sequential(
        _conv(3, w), _conv(w, 2 * w, pool=True), _Residual(2 * w), _conv(2 * w, 4 * w, pool=True),
        _conv(4 * w, 8 * w, pool=True), _Residual(8 * w), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    )  # fmt: skip


def cnn_f() -> nn.Module:
    """CNN-F of Chatfield et al. (BMVC 2014) for 224 pixels, up to fc7, with dropout 0.5 after fc6 and fc7."""
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
    """Build a trunk. With `load_weights`, download or read its pretrained weights.

    Raises:
        InputError: the weights name is unknown, the file is missing or does not fit, or the network cannot take
            images of this size.
    """
    if config.frozen and config.weights is None and load_weights:  # random numbers that stay: the same in every process
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_trunk(config, load_weights=False)
    if config.name in BUILT_IN:
        net = cnn_f() if config.name == "cnn_f" else resnet9(config.width)
    else:
        # These two take ten seconds to draw their first weights with SciPy. Torch's defaults are as good.
        slow = {"init_weights": False} if config.name in ("googlenet", "inception_v3") else {}
        net = _models().get_model(config.name, weights=None, **slow)
    if load_weights and config.weights:
        names = _weight_names(config.name)
        if config.weights in names:
            net.load_state_dict(_download(config))
        else:
            _load_file(net, config)
    if config.name not in BUILT_IN:
        _drop_classifier(net)
        _drop_auxiliary(net, pretrained=config.weights is not None)
    return Trunk(config, net)


def _normalisation(config: BackboneConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the pixels for these weights: ImageNet's, except for some of torchvision's."""
    if config.weights in _weight_names(config.name):
        preset = _models().get_model_weights(config.name)[str(config.weights)].transforms()
        return preset.mean, preset.std
    return IMAGENET_MEAN, IMAGENET_STD


def without_place(config: BackboneConfig) -> BackboneConfig:
    """The config to store beside trained weights, without paths.

    The path of a state-dict file becomes "file", and that of a trained model becomes "model". Torchvision's names stay,
    because they decide the normalisation.
    """
    if _has_no_path(config) or config.weights in ("file", "model"):
        return config
    trained = artifact.is_finished(storage.open_store(str(config.weights)))
    return config.model_copy(update={"weights": "model" if trained else "file"})


def with_absolute_weights(config: BackboneConfig) -> BackboneConfig:
    """The config with an absolute path of the weights, so that workers in other folders can read them."""
    if _has_no_path(config):
        return config
    return config.model_copy(update={"weights": storage.absolute(str(config.weights))})


def weights_identity(config: BackboneConfig) -> str | None:
    """The identity of the weights: the sha256 of a file's bytes, or torchvision's name, or None.

    Raises:
        InputError: the file does not exist.
    """
    if _has_no_path(config):
        return config.weights
    return hashlib.sha256(_read_weights(config)).hexdigest()


def _download(config: BackboneConfig) -> Mapping[str, Tensor]:
    weights = _models().get_model_weights(config.name)[str(config.weights)]
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"weights = {config.weights!r} of {config.name} could not be downloaded from {weights.url}: {error}; "
            "without a network, set weights = PATH, a state-dict file"
        ) from error


def _has_no_path(config: BackboneConfig) -> bool:
    """Whether the weights are unset or a name of torchvision's, so that there is no file."""
    return config.weights is None or config.weights in _weight_names(config.name)


def _weight_names(name: str) -> list[str]:
    if name in BUILT_IN:
        return []
    return list(_models().get_model_weights(name).__members__)


def _models() -> Any:
    """torchvision's models. Their import costs a worker five seconds, and the built-in trunks do not need them."""
    import torchvision

    return torchvision.models


def _read_weights(config: BackboneConfig) -> bytes:
    """Read the bytes of a state-dict file, or of the tensors of a trained model."""
    path = str(config.weights)
    try:
        store = storage.open_store(path)
        if artifact.is_finished(store):
            return artifact.read_file(store, artifact.load_manifest(store, "model").record("model.safetensors"))
        return storage.read_url(path)
    except InputError as error:
        names = _weight_names(config.name)
        allowed = ", ".join([*names, "a state-dict file, the folder of a trained model, None"])
        hint = perhaps(path, [*names, "None"])
        fault = f"no such file{hint} Allowed" if hint else "no such file; allowed"
        raise InputError(f"weights = {config.weights!r} for {config.name}: {fault}: {allowed}") from error


def _load_file(net: nn.Module, config: BackboneConfig) -> None:
    path, data = str(config.weights), _read_weights(config)
    try:
        if data[8:9] == b"{":  # safetensors begins with the length of a JSON header, then the header
            state = load_safetensors(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path} is not a state dict of torch or safetensors: {error}") from error
    if not isinstance(state, Mapping):
        raise InputError(f"{path} holds a {type(state).__name__}; expected a state dict, tensors by name")
    if any(str(k).startswith(MODEL_PREFIX) for k in state):  # a trained model, from which only the trunk is read
        state = {k.removeprefix(MODEL_PREFIX): v for k, v in state.items() if k.startswith(MODEL_PREFIX)}
        _require_normalisation(config)
    expected = net.state_dict()
    # The classifier is dropped anyway, so it may be missing or have other classes.
    prefix = None if config.name in BUILT_IN else _classifier_prefix(net)
    state = {k: v for k, v in state.items() if not (prefix and str(k).startswith(prefix))}
    wrong = [k for k, v in state.items() if k not in expected or expected[k].shape != getattr(v, "shape", None)]
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    missing = [k for k in missing if not (prefix and k.startswith(prefix))]
    if wrong or missing:
        raise InputError(
            f"{path} does not fit {config.name}: {len(wrong)} keys are unknown or have another shape ({wrong[:3]}), "
            f"{len(missing)} keys of the trunk are missing ({missing[:3]}); set the backbone that these weights are for"
        )
    net.load_state_dict(state, strict=False)


def _require_normalisation(config: BackboneConfig) -> None:
    """Refuse the trunk of a model that trained with another normalisation of pixels than `config` would use."""
    store = storage.open_store(str(config.weights))
    if not artifact.is_finished(store):  # a tensors file without the rest of the model
        return
    description = artifact.read_file(store, artifact.load_manifest(store, "model").record("model.json"))
    backbone = json.loads(description)["backbone"]
    trained = BackboneConfig(name=backbone["name"], weights=backbone["weights"])  # decides the normalisation
    if _normalisation(trained) != _normalisation(config):
        raise InputError(
            f"{config.weights} was trained with the normalisation of weights = {trained.weights!r}, but a new training "
            "with its trunk as weights would use ImageNet's; continue from the model with --init instead"
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
    """Remove the auxiliary outputs of GoogLeNet and Inception v3. Pretrained weights need a rescaled input."""
    if hasattr(net, "aux_logits"):
        vars(net).update(aux_logits=False, transform_input=pretrained)
        for name in ("aux1", "aux2", "AuxLogits"):
            if hasattr(net, name):
                setattr(net, name, None)


def state_fingerprint(state: Mapping[str, Tensor], preprocessing: str) -> str:
    """The sha256 of the preprocessing (as text) and of names, dtypes, shapes and bytes of the weights."""
    digest = hashlib.sha256(preprocessing.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

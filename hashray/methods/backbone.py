"""Trunks turn uint8 images into float features: their config, their preprocessing and their fingerprint.

A trunk normalises pixels in its forward, so the fingerprint of a model covers preprocessing and weights. The networks
come from the sources in trunks/, one file each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self, final

import torch
from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn

from hashray import artifact, storage
from hashray.config import Config
from hashray.data.images import Framing, Interpolation, ResizeMode
from hashray.errors import InputError
from hashray.methods.trunks import source_of
from hashray.methods.trunks.custom import TORCHSCRIPT
from hashray.methods.trunks.files import MODEL_PREFIX, read_weights
from hashray.methods.trunks.source import Normalisation
from hashray.methods.trunks.timm_models import PREFIX as TIMM

Precision = Literal["fp32", "bf16"]
Channels = tuple[float, float, float]
# Pixels that go through a network at a time on a CPU, outside training: what stays in its caches. MobileNetV2 at 128
# pixels, images a second of one core (Xeon with AMX): 104 in batches of 8, 119 of 16, 107 of 32, 91 of 64.
CPU_PIXELS, CPU_ROWS, GPU_ROWS = 2**18, 64, 256
# Fields that came later. Where they say what was always so, they stay out of the dump: hashes of it hold.
LATER: Mapping[str, Any] = {
    "interpolation": "bilinear", "crop_pct": 1.0, "mean": None, "std": None, "precision": "fp32",
}  # fmt: skip


class BackboneConfig(Config):
    """The trunk, its weights and its preprocessing. A timm model sets the unset fields of the preprocessing."""

    name: str = Field(
        "resnet9",
        description="Trunk: cnn_f, resnet9, a torchvision classification model, timm:NAME (needs hashray[timm]),"
        " MODULE:FUNCTION or FILE.py:FUNCTION (importable on every node), or torchscript, the file in weights",
    )
    weights: str | None = Field(
        None,
        description="First weights: a name to download (DEFAULT, IMAGENET1K_V1), a file of weights, or a trained model"
        " for its trunk; unset: random",
    )
    image_size: int = Field(32, ge=8, le=2048, description="Height and width of an image in pixels")
    resize: ResizeMode = Field(
        "crop", description="Way to a square: scale the shorter side and crop the centre, or scale both sides"
    )
    interpolation: Interpolation = Field("bilinear", description="Interpolation of the scaling, antialiased")
    crop_pct: float = Field(
        1.0, ge=0.25, le=2, description="Share of the scaled side that the cut keeps; above 1 it adds a black border"
    )
    mean: Channels | None = Field(
        None, description="Mean of red, green and blue, each in 0 to 1; unset: that of the weights, else ImageNet's"
    )
    std: Channels | None = Field(None, description="Standard deviation of red, green and blue, as mean")
    precision: Precision = Field(
        "fp32", description="Number format of the trunk's multiplications for features and codes"
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
        source_of(value).check(value)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _preprocess_as_trained(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        name = data.get("name") if isinstance(data, dict) else None
        if not isinstance(name, str) or not name.startswith(TIMM):
            return build(data)
        source = source_of(name)
        try:
            source.check(name)
        except ValueError:
            return build(data)  # says it, beside all other faults
        config = build({**source.preprocessing(name, data), **data})
        config.model_fields_set.intersection_update(data)  # another name can replace the values of this one
        return config

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: set both, or neither")
        if self.name == TORCHSCRIPT and self.weights is None:
            raise ValueError("name = 'torchscript' needs weights = FILE, as torch.jit.save writes it")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table: dict[str, Any] = dump(self)
        if self.name.startswith(TIMM):  # a model holds its preprocessing, whatever a later timm says
            return {key: value for key, value in table.items() if key != "precision" or value != LATER[key]}
        return {key: value for key, value in table.items() if key not in LATER or value != LATER[key]}

    @property
    def framing(self) -> Framing:
        """The way from an image to the square that the trunk takes."""
        return Framing(self.resize, self.interpolation, self.crop_pct)


class StridedDepthwise(nn.Conv2d):
    """A strided depthwise convolution that trains in float32 on a CPU, under autocast too.

    There the backward pass in bfloat16 takes 8 to 23 times as long as in float32 (oneDNN in torch 2.15, AMX).
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.to(self.weight.dtype))


@final
class Trunk(nn.Module):
    """uint8 images [n, 3, h, w] -> float32 features [n, feature_dim]. Features [n, d] pass unchanged.

    `amp`, or `precision` outside training, runs the network under bfloat16 autocast. Normalisation and output stay
    float32. `code` is the file that says what the network is, where its name does not.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig, net: nn.Module, code: bytes | None = None) -> None:
        super().__init__()
        mean, std = _normalisation(config, net)
        if source_of(config.name).says_normalisation:
            config = config.model_copy(update={"mean": tuple(mean), "std": tuple(std)})
        self.config, self.code = config, code
        self.net = net.to(memory_format=torch.channels_last)
        for module in net.modules():
            if type(module) is nn.Conv2d and module.stride != (1, 1) and 1 < module.in_channels == module.groups:
                module.__class__ = StridedDepthwise
        self.amp = False
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if config.frozen:
            self.requires_grad_(False)
        self.train(not config.frozen)
        self.feature_dim = self._probe()

    @property
    def is_pretrained(self) -> bool:
        """Whether it begins with weights that were trained before."""
        return self.config.frozen or self.config.weights is not None

    @torch.no_grad()
    def _probe(self) -> int:
        training, size = self.training, self.config.image_size
        self.eval()
        try:
            return int(self(torch.zeros(1, 3, size, size)).shape[1])
        except (RuntimeError, AssertionError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            fault = lines[-1 if isinstance(self.net, torch.jit.ScriptModule) else 0]
            raise InputError(
                f"{self.config.name} cannot take images of {size} x {size} pixels: {fault}; "
                f"{source_of(self.config.name).hint}"
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
        if self.training:
            return self._run(inputs)
        return torch.cat([self._run(chunk) for chunk in inputs.split(self.rows_at_a_time)])

    @property
    def rows_at_a_time(self) -> int:
        """Images that go through the network at a time outside training, however many are given.

        The number depends on the size of the images and the kind of processor alone, never on a measurement: it can
        change the last bits of the features.
        """
        if self.mean.device.type != "cpu":
            return GPU_ROWS
        return max(1, min(CPU_ROWS, CPU_PIXELS // self.config.image_size**2))

    def _run(self, inputs: Tensor) -> Tensor:
        images = (inputs.to(self.mean.dtype) / 255 - self.mean) / self.std
        images = images.contiguous(memory_format=torch.channels_last)
        cast = self.amp or (self.config.precision == "bf16" and not self.training)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=cast):
            features = self._features(images)
            if self.config.mirrored and not self.training:
                features = (features + self._features(images.flip(3))) / 2
        return features.to(self.mean.dtype)

    def _features(self, images: Tensor) -> Tensor:
        features = self.net(images)
        n = len(images)
        if not isinstance(features, Tensor) or features.shape[:1] != (n,) or features.shape[2:].numel() != 1:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(
                f"{self.config.name} gave {got} for {n} images; expected a tensor [{n}, d] or [{n}, d, 1, 1]: pool its"
                " tokens or its feature map"
            )
        return features.flatten(1)


def build_trunk(config: BackboneConfig, load_weights: bool = True, code: bytes | None = None) -> Trunk:
    """Build a trunk. With `load_weights`, download or read its pretrained weights.

    Args:
        code: what a trained model keeps of a network that its name does not say; unset: it is read.

    Raises:
        InputError: the weights name is unknown, the file is missing or does not fit, or the network cannot take
            images of this size, or does not give features.
    """
    if config.frozen and config.weights is None and load_weights:  # random numbers that stay: the same in every process
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_trunk(config, load_weights=False, code=code)
    source = source_of(config.name)
    code = source.code(config) if code is None else code
    net = source.build(config, code)
    if load_weights and config.weights:
        names = source.weight_names(config.name)
        if config.weights in names:
            net.load_state_dict(source.download(config))
        else:
            data = read_weights(config, names)
            if MODEL_PREFIX.encode() in data:
                _require_normalisation(config, net)
            source.read(net, config, data)
    source.finish(net, config)
    return Trunk(config, net, code)


def _normalisation(config: BackboneConfig, net: nn.Module | None = None) -> Normalisation:
    """Mean and standard deviation of the pixels: the config's, else the weights' or the module's, else ImageNet's."""
    if config.mean is not None and config.std is not None:
        return config.mean, config.std
    return source_of(config.name).normalisation(config.name, config.weights, net)


def without_place(config: BackboneConfig) -> BackboneConfig:
    """The config to store beside trained weights, without paths.

    The path of a weights file becomes "file", and that of a trained model becomes "model". Names of weights stay,
    because they decide the normalisation. The file of a function keeps its name without its folder.
    """
    config = config.model_copy(update={"name": source_of(config.name).stored_name(config.name)})
    if _has_no_path(config) or config.weights in ("file", "model"):
        return config
    trained = artifact.is_finished(storage.open_store(str(config.weights)))
    return config.model_copy(update={"weights": "model" if trained else "file"})


def with_absolute_weights(config: BackboneConfig) -> BackboneConfig:
    """The config with the absolute paths of its files, so that workers in other folders can read them."""
    config = config.model_copy(update={"name": source_of(config.name).absolute_name(config.name)})
    if _has_no_path(config):
        return config
    return config.model_copy(update={"weights": storage.absolute(str(config.weights))})


def settings_by_content(config: BackboneConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config with what its files hold in place of where they are.

    Weights become the sha256 of the file's bytes, or stay a name, or None. A function's file becomes its name without
    its folder, and the sha256 of its bytes is added.

    Raises:
        InputError: a file does not exist.
    """
    source = source_of(config.name)
    known = _has_no_path(config)
    weights = config.weights if known else artifact.sha256_hex(read_weights(config, source.weight_names(config.name)))
    code = source.code(config)
    return {
        **settings, "weights": weights, "name": source.stored_name(config.name),
        **({} if code is None else {"code": artifact.sha256_hex(code)}),
    }  # fmt: skip


def _has_no_path(config: BackboneConfig) -> bool:
    """Whether the weights are unset or a name that is downloaded, so that there is no file."""
    return config.weights is None or config.weights in source_of(config.name).weight_names(config.name)


def _require_normalisation(config: BackboneConfig, net: nn.Module) -> None:
    """Refuse the trunk of a model that trained with another normalisation of pixels than `config` would use."""
    store = storage.open_store(str(config.weights))
    if not artifact.is_finished(store):  # a tensors file without the rest of the model
        return
    description = artifact.read_file(store, artifact.load_manifest(store, "model").record("model.json"))
    backbone = json.loads(description)["backbone"]
    decisive = {key: backbone[key] for key in ("name", "weights", "mean", "std") if key in backbone}
    trained = BackboneConfig.model_validate(decisive)
    (mean, std), (new_mean, new_std) = (map(tuple, _normalisation(each, net)) for each in (trained, config))
    if (mean, std) != (new_mean, new_std):
        raise InputError(
            f"{config.weights} was trained with mean {mean} and std {std}, but a training with its trunk as weights "
            f"would use {new_mean} and {new_std}; set backbone.mean and backbone.std to the first, or use --init"
        )


def state_fingerprint(state: Mapping[str, Tensor], preprocessing: str) -> str:
    """The sha256 of the preprocessing (as text) and of names, dtypes, shapes and bytes of the weights."""
    digest = hashlib.sha256(preprocessing.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""timm's models, `timm:NAME` or `timm:NAME.TAG`, with timm's preprocessing and pooling. timm is imported only for them.

A trunk is the model without its classifier: the features are what `forward_head(…, pre_logits=True)` gives, so tokens
are pooled as the model's authors do (DINOv2 and CLIP: the class token, SigLIP: attention, convnets: the mean). Weights
files may have any layout that timm converts: its own, DINOv2's, OpenCLIP's, big_vision's .npz.
"""

from __future__ import annotations

import importlib
import inspect
import io
import re
import sys
import zipfile
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from hashray.errors import InputError, perhaps
from hashray.methods.trunks.source import Source

if TYPE_CHECKING:
    from hashray.methods.backbone import BackboneConfig

PREFIX = "timm:"
# big_vision's patch embedding, and what may have another size: position embeddings and the classifier.
PATCHES, ELASTIC = "embedding/kernel", re.compile(r"pos_?embed|(^|/)(head|pre_logits)/")
# Where a file of timm keeps the function that converts published layouts.
CONVERTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")


class Timm(Source):
    """The models in timm's registry."""

    hint = "leave image_size out to take the size that the model was trained with, or set one that it can take"

    def check(self, name: str) -> None:
        timm, model = _timm(), name.removeprefix(PREFIX)
        architecture, _, tag = model.partition(".")
        if not timm.is_model(architecture):
            raise ValueError(f"timm has no model {model!r}{perhaps(architecture, timm.list_models())}")
        tags = timm.models.get_arch_pretrained_cfgs(architecture)
        if tag and model not in tags:
            allowed = ", ".join(each.partition(".")[2] for each in tags if "." in each) or "none"
            raise ValueError(f"timm's {architecture} has no weights {tag!r}; it has: {allowed}")

    def preprocessing(self, name: str, given: Container[str]) -> Mapping[str, Any]:
        """What timm's evaluation does, from the entry of these weights in its registry."""
        config = _timm().data.resolve_data_config(pretrained_cfg=_entry(name))
        _, height, width = config["input_size"]
        values = {key: config[key] for key in ("interpolation", "crop_pct")}
        values |= {key: tuple(float(x) for x in config[key]) for key in ("mean", "std")}
        if height != width and "image_size" not in given:
            raise ValueError(f"{name} was trained with images of {height} x {width} pixels: set a square's image_size")
        if config["crop_mode"] == "border" and "resize" not in given:
            raise ValueError(f"{name} was trained with borders around whole images: set resize to crop or squash")
        resize = "squash" if config["crop_mode"] == "squash" else "crop"
        return {"image_size": height, "resize": resize, **values}

    def weight_names(self, name: str) -> list[str]:
        return ["DEFAULT"] if _timm().models.is_model_pretrained(name.removeprefix(PREFIX)) else []

    def build(self, config: BackboneConfig, code: bytes | None) -> nn.Module:
        return self._create(config, pretrained=False)

    def _create(self, config: BackboneConfig, pretrained: bool) -> nn.Module:
        entry = _entry(config.name)
        sized = {"img_size": config.image_size} if entry["fixed_input_size"] else {}
        name = config.name.removeprefix(PREFIX)
        try:
            net: nn.Module = _timm().create_model(name, pretrained=pretrained, num_classes=0, **sized)
        except (AssertionError, ValueError, RuntimeError, TypeError) as error:
            if pretrained:
                raise
            size, usual = config.image_size, entry["input_size"][-1]
            fault = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{config.name} cannot be built for images of {size} x {size} pixels: {fault}; it was trained with "
                f"{usual} x {usual}: {self.hint}"
            ) from error
        return net

    def download(self, config: BackboneConfig) -> Mapping[str, Tensor]:
        try:
            return self._create(config, pretrained=True).state_dict()
        except Exception as error:  # of the hub's client, of HTTP, or of the operating system
            fault = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"weights = {config.weights!r} of {config.name} could not be downloaded by timm from its hub: {fault}; "
                "without a network, set weights = PATH, a file of weights"
            ) from error

    def read(self, net: nn.Module, config: BackboneConfig, data: bytes) -> None:
        if _is_archive(data) and hasattr(net, "load_pretrained"):
            _read_archive(net, config, data)
        else:
            super().read(net, config, data)

    def convert(self, net: nn.Module, config: BackboneConfig, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict in timm's layout, by timm's code for this model. It resizes position embeddings too."""
        converter = _converter(config.name)
        if converter is None:
            return state
        parameters = inspect.signature(converter).parameters
        # DeiT III's files name the layer scales as in the paper. Other vision transformers have no such names.
        options = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}
        try:
            converted: Mapping[str, Tensor] = converter(dict(state), *([net] if len(parameters) > 1 else []), **options)
            return converted
        except Exception as error:  # tensors that the code expects are missing or have another shape
            raise InputError(
                f"{config.weights} does not fit {config.name}: timm could not convert it "
                f"({type(error).__name__}: {error}); its first keys are {list(state)[:3]}"
            ) from error

    def unused(self, net: nn.Module, config: BackboneConfig) -> tuple[str, ...]:
        names = _entry(config.name)["classifier"] or ()
        return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _timm() -> Any:
    """timm, with its registry. Its import takes seconds.

    Raises:
        InputError: timm is not installed.
    """
    try:
        timm = importlib.import_module("timm")
        importlib.import_module("timm.data")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise InputError("timm:NAME needs timm, which is not installed: pip install 'hashray[timm]'") from error
    return timm


def _entry(name: str) -> dict[str, Any]:
    """The entry of a model's weights in timm's registry; without a tag, that of its default weights."""
    entry = _timm().models.get_pretrained_cfg(name.removeprefix(PREFIX))
    table: dict[str, Any] = entry.to_dict()
    return table


def _converter(name: str) -> Any:
    architecture = name.removeprefix(PREFIX).partition(".")[0]
    module = sys.modules[_timm().models.model_entrypoint(architecture).__module__]
    return next((getattr(module, each) for each in CONVERTERS if hasattr(module, each)), None)


def _is_archive(data: bytes) -> bool:
    """Whether the bytes are NumPy's .npz. A file of torch is a zip file too."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return False
    return all(name.endswith(".npy") for name in zipfile.ZipFile(io.BytesIO(data)).namelist())


def _read_archive(net: Any, config: BackboneConfig, data: bytes) -> None:
    """Read a .npz of JAX, as big_vision publishes SigLIP. timm skips what it does not know, so sizes are compared."""
    arrays = np.load(io.BytesIO(data))
    prefix = next(
        (each for each in ("params/img/", "opt/target/", "params/", "") if f"{each}{PATCHES}" in arrays), None
    )
    if prefix is not None:
        tower = [key for key in arrays.files if key.startswith(prefix) and not ELASTIC.search(key)]
        there = sum(arrays[key].size for key in tower)
        expected = sum(tensor.numel() for key, tensor in net.state_dict().items() if not ELASTIC.search(key))
        if there != expected:
            raise InputError(
                f"{config.weights} does not fit {config.name}: its image tower has {there:,} numbers, the network "
                f"{expected:,} (without position embeddings and classifier); set the backbone that they are for"
            )
    try:
        net.load_pretrained(io.BytesIO(data))
    except Exception as error:
        raise InputError(
            f"{config.weights} does not fit {config.name}: timm could not read it ({type(error).__name__}: {error})"
        ) from error

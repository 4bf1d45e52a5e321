"""Torchvision's classification models. A trunk has no last linear layer (SqueezeNet: no convolutional classifier)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hashray.errors import InputError, perhaps
from hashray.methods.trunks import built_in
from hashray.methods.trunks.source import IMAGENET_MEAN, IMAGENET_STD, Normalisation, Source

if TYPE_CHECKING:
    from hashray.methods.backbone import BackboneConfig

OTHERS = "timm:NAME, MODULE:FUNCTION, FILE.py:FUNCTION, torchscript"


class Torchvision(Source):
    """The classification models of torchvision, and its weights by name."""

    hint = "raise image_size (224 suits every torchvision trunk except those with a fixed larger size)"

    def check(self, name: str) -> None:
        models = _models()
        names = models.list_models(module=models)
        if name not in names:
            known = [*built_in.NAMES, *names, "torchscript"]
            raise ValueError(f"no trunk is called {name!r}{perhaps(name, known)}; other forms: {OTHERS}")

    def normalisation(self, name: str, weights: str | None, net: nn.Module | None = None) -> Normalisation:
        """ImageNet's, except for some of torchvision's weights."""
        if weights in self.weight_names(name):
            preset = _models().get_model_weights(name)[str(weights)].transforms()
            return preset.mean, preset.std
        return IMAGENET_MEAN, IMAGENET_STD

    def weight_names(self, name: str) -> list[str]:
        return list(_models().get_model_weights(name).__members__)

    def build(self, config: BackboneConfig, code: bytes | None) -> nn.Module:
        # These two take ten seconds to draw their first weights with SciPy. Torch's defaults are as good.
        slow = {"init_weights": False} if config.name in ("googlenet", "inception_v3") else {}
        net: nn.Module = _models().get_model(config.name, weights=None, **slow)
        return net

    def download(self, config: BackboneConfig) -> Mapping[str, Tensor]:
        weights = _models().get_model_weights(config.name)[str(config.weights)]
        try:
            state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
            return state
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"weights = {config.weights!r} of {config.name} could not be downloaded from {weights.url}: {error}; "
                "without a network, set weights = PATH, a state-dict file"
            ) from error

    def unused(self, net: nn.Module, config: BackboneConfig) -> tuple[str, ...]:
        name = _last_linear(net) or ("classifier" if hasattr(net, "classifier") else None)
        return (f"{name}.",) if name else ()

    def finish(self, net: nn.Module, config: BackboneConfig) -> None:
        _drop_classifier(net)
        _drop_auxiliary(net, pretrained=config.weights is not None)


def _models() -> Any:
    """torchvision's models. Their import costs a worker five seconds, and the built-in trunks do not need them."""
    import torchvision

    return torchvision.models


def _last_linear(net: nn.Module) -> str | None:
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None


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

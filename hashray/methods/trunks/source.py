"""What every source of trunks does: it names networks, builds them, and reads weights into them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hashray.methods.trunks import files

if TYPE_CHECKING:
    from hashray.methods.backbone import BackboneConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Normalisation = tuple[Sequence[float], Sequence[float]]


class Source:
    """A source of networks. `backbone.name` chooses the source and the network."""

    hint = "raise image_size"
    """What to do about images that a network cannot take."""
    says_normalisation = False
    """Whether the network says its normalisation, so that the config of a built trunk must keep it."""

    def check(self, name: str) -> None:
        """Raise ValueError if the source has no network of this name."""

    def preprocessing(self, name: str, given: Container[str]) -> Mapping[str, Any]:
        """Values for the preprocessing fields of the config that are not `given`: what the network was trained with.

        Raises:
            ValueError: the config must set a field, because it cannot have the value that the network was trained with.
        """
        return {}

    def normalisation(self, name: str, weights: str | None, net: nn.Module | None = None) -> Normalisation:
        """Mean and standard deviation of the pixels, each in [0, 1], where the config does not set them."""
        return IMAGENET_MEAN, IMAGENET_STD

    def weight_names(self, name: str) -> list[str]:
        """Names of weights that can be downloaded."""
        return []

    def stored_name(self, name: str) -> str:
        """The name without the folder of a file."""
        return name

    def absolute_name(self, name: str) -> str:
        """The name with the absolute path of a file, so that workers in other folders can read it."""
        return name

    def code(self, config: BackboneConfig) -> bytes | None:
        """The file that says what the network is, or None where the name says it."""
        return None

    def build(self, config: BackboneConfig, code: bytes | None) -> nn.Module:
        """The network with random weights. `code` is what `code()` returned, or what a model keeps of it.

        Raises:
            InputError: the network cannot be built.
        """
        raise NotImplementedError

    def download(self, config: BackboneConfig) -> Mapping[str, Tensor]:
        """The state dict of the weights that `config.weights` names.

        Raises:
            InputError: there is no network, or no such file on the other side.
        """
        raise NotImplementedError

    def read(self, net: nn.Module, config: BackboneConfig, data: bytes) -> None:
        """Read the bytes of a file of weights into the network.

        Raises:
            InputError: the file is no state dict, or does not fit the network.
        """
        state = self.convert(net, config, files.parse_state(str(config.weights), data))
        files.fit(net, state, config, self.unused(net, config))

    def convert(self, net: nn.Module, config: BackboneConfig, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict under the network's names, from a layout in which its authors publish it."""
        return state

    def unused(self, net: nn.Module, config: BackboneConfig) -> tuple[str, ...]:
        """Prefixes of the tensors of a classifier. A file may lack them or have other classes."""
        return ()

    def finish(self, net: nn.Module, config: BackboneConfig) -> None:
        """Remove what a trunk does not need."""

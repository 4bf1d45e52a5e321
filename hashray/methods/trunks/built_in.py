"""Trunks of this project: `cnn_f`, the network of the papers, and `resnet9`, a small one for images of 32 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from hashray.methods.trunks.source import Source

if TYPE_CHECKING:
    from hashray.methods.backbone import BackboneConfig

NAMES = ("cnn_f", "resnet9")


class BuiltIn(Source):
    """The networks of this file."""

    def build(self, config: BackboneConfig, code: bytes | None) -> nn.Module:
        return cnn_f() if config.name == "cnn_f" else resnet9(config.width)


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

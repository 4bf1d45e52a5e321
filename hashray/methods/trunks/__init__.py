"""Where trunks come from, a file each: this project, torchvision, timm, a function of the user, a TorchScript file."""

from __future__ import annotations

from hashray.methods.trunks import built_in, custom, timm_models, vision
from hashray.methods.trunks.source import Source

_BUILT_IN, _TORCHVISION, _TIMM = built_in.BuiltIn(), vision.Torchvision(), timm_models.Timm()
_FUNCTION, _TORCHSCRIPT = custom.Function(), custom.TorchScript()


def source_of(name: str) -> Source:
    """The source that `backbone.name` means. Names without a form of another source are torchvision's."""
    if name in built_in.NAMES:
        return _BUILT_IN
    if name == custom.TORCHSCRIPT:
        return _TORCHSCRIPT
    if name.startswith(timm_models.PREFIX):
        return _TIMM
    return _FUNCTION if ":" in name else _TORCHVISION

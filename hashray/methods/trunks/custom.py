"""Networks of the user: a function that returns a torch module, or a TorchScript file.

`package.module:function` must be importable in every process: installed, or on PYTHONPATH. `path/to/file.py:function`
is read from its path, else from the current folder, else from the folders of sys.path; a model keeps the file's name
without its folder. Loading a model imports what it names, so load models of people you trust only.
"""

from __future__ import annotations

import importlib
import inspect
import io
import sys
import types
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hashray.errors import InputError, perhaps
from hashray.methods.trunks import files
from hashray.methods.trunks.source import IMAGENET_MEAN, IMAGENET_STD, Normalisation, Source

if TYPE_CHECKING:
    from hashray.methods.backbone import BackboneConfig

TORCHSCRIPT = "torchscript"
WHERE = "it must be importable in every process: install it, or set PYTHONPATH (on every node of a cluster)"


class _Custom(Source):
    says_normalisation = True

    def normalisation(self, name: str, weights: str | None, net: nn.Module | None = None) -> Normalisation:
        """The module's attributes `mean` and `std`, three numbers each; without them, ImageNet's."""
        mean, std = (_three(getattr(net, key, None), key, name) for key in ("mean", "std"))
        if (mean is None) != (std is None):
            raise InputError(f"{name}: the module has only one of the attributes mean and std; set both, or neither")
        return (mean, std) if mean and std else (IMAGENET_MEAN, IMAGENET_STD)


class Function(_Custom):
    """`MODULE:FUNCTION` and `FILE.py:FUNCTION`. The function may take `image_size`."""

    def check(self, name: str) -> None:
        where, _, function = name.rpartition(":")
        if not function.isidentifier() or not (where.endswith(".py") or all(map(str.isidentifier, where.split(".")))):
            raise ValueError(
                f"{name!r} is no trunk: expected MODULE:FUNCTION, such as mine.trunks:build, or FILE.py:FUNCTION"
            )

    def stored_name(self, name: str) -> str:
        where, _, function = name.rpartition(":")
        return f"{Path(where).name}:{function}" if where.endswith(".py") else name

    def absolute_name(self, name: str) -> str:
        where, _, function = name.rpartition(":")
        return f"{_file(where)}:{function}" if where.endswith(".py") and _file(where).exists() else name

    def code(self, config: BackboneConfig) -> bytes | None:
        """The source of the file with the function, so that an edited function is another trunk."""
        try:
            path = inspect.getsourcefile(_function(config.name))
        except TypeError:  # a callable object: its class may be anywhere
            path = None
        return None if path is None else Path(path).read_bytes()

    def build(self, config: BackboneConfig, code: bytes | None) -> nn.Module:
        function = _function(config.name)
        try:
            takes_size = "image_size" in inspect.signature(function).parameters
            net = function(image_size=config.image_size) if takes_size else function()
        except Exception as error:
            raise InputError(
                f"backbone.name = {config.name!r}: its call failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(net, nn.Module):
            raise InputError(f"{config.name} returned a {type(net).__name__}; expected a torch.nn.Module")
        return net


class TorchScript(_Custom):
    """`torchscript`, with the file in `weights`. A model keeps the file, because it is the network too."""

    def code(self, config: BackboneConfig) -> bytes | None:
        return files.read_weights(config, [], files.CODE_FILE)

    def build(self, config: BackboneConfig, code: bytes | None) -> nn.Module:
        assert code is not None
        try:
            with warnings.catch_warnings():  # torch asks the authors of such files for torch.export
                warnings.simplefilter("ignore", FutureWarning)
                net: nn.Module = torch.jit.load(io.BytesIO(code), map_location="cpu")
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"weights = {config.weights!r} is no TorchScript file (torch.jit.save): {str(error).splitlines()[0]}"
            ) from error
        if not config.frozen and next(net.parameters(), None) is None:
            raise InputError(
                f"weights = {config.weights!r} has no parameters to train (torch.jit.freeze makes them constants): set "
                "backbone.frozen = true, or save the module without torch.jit.freeze"
            )
        return net

    def read(self, net: nn.Module, config: BackboneConfig, data: bytes) -> None:
        """The tensors of a trained model's trunk. Those of a TorchScript file are in the network already."""
        if data[8:9] == b"{":
            super().read(net, config, data)


def _function(name: str) -> Callable[..., Any]:
    """The function of a name.

    Raises:
        InputError: there is no such module, file or function, or its import fails.
    """
    where, _, function = name.rpartition(":")
    try:
        module = _module_of_file(where) if where.endswith(".py") else importlib.import_module(where)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"backbone.name = {name!r}: {error}; {WHERE}, or name a file, FILE.py:FUNCTION") from error
    except Exception as error:
        raise InputError(f"backbone.name = {name!r}: its import failed: {type(error).__name__}: {error}") from error
    value: Callable[..., Any] | None = getattr(module, function, None)
    if not callable(value):
        known = [key for key, each in vars(module).items() if callable(each) and not key.startswith("_")]
        hint = perhaps(function, known) or ";"
        raise InputError(f"backbone.name = {name!r}: {where} has no function {function!r}{hint} it has {known[:10]}")
    return value


def _file(where: str) -> Path:
    """The path of a file: as it is, else in the current folder, else in a folder of sys.path."""
    path = Path(where).expanduser()
    places = [path, *(Path(folder) / path.name for folder in (".", *sys.path))]
    return next((place for place in places if place.is_file()), path).absolute()


def _module_of_file(where: str) -> Any:
    path = _file(where)
    if not path.is_file():
        raise InputError(
            f"backbone.name: no such file: {where}; a stored model names it without its folder: put it into the "
            "current folder, or into one of PYTHONPATH"
        )
    return _executed(path, path.read_bytes())


@lru_cache(maxsize=16)
def _executed(path: Path, source: bytes) -> Any:
    """The module of a file, executed once for each content, without a file of bytecode beside it."""
    name = f"hashray_trunk_{path.stem}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # where dataclasses and pickles look
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def _three(value: Any, key: str, name: str) -> tuple[float, ...] | None:
    """An attribute as three floats; None where it is no such attribute."""
    if value is None or callable(value):
        return None
    numbers = tuple(float(each) for each in torch.as_tensor(value).flatten())
    if len(numbers) != 3:
        raise InputError(f"{name}: the module's {key} has {len(numbers)} numbers; expected three, for red, green, blue")
    return numbers

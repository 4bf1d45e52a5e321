"""The hashing methods, one file each. The package finds them by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any

from hashray.errors import ConfigError, perhaps
from hashray.methods.backbone import Trunk
from hashray.methods.base import Method, MethodConfig

_SHARED = {"base", "losses", "backbone", "codewords", "linear", "trunks"}


@lru_cache(maxsize=1)
def known_methods() -> dict[str, tuple[type[MethodConfig], type[Method]]]:
    """Config class and method class by kind, from every module in this folder that defines a method."""
    by_kind: dict[str, tuple[type[MethodConfig], type[Method]]] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name in _SHARED:
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
        configs = [x for x in classes if issubclass(x, MethodConfig)]
        methods = [x for x in classes if issubclass(x, Method)]
        for method in methods:
            config = next(x for x in configs if x.model_fields["kind"].default == method.kind)
            by_kind[method.kind] = (config, method)
    return by_kind


def parse_method_config(data: Any) -> MethodConfig:
    """Parse the config of a method from a table with `kind`.

    Raises:
        ConfigError: the kind is unknown.
        pydantic.ValidationError: the other fields do not validate.
    """
    if isinstance(data, MethodConfig):
        return data
    kind = data.get("kind") if isinstance(data, dict) else None
    methods = known_methods()
    if kind not in methods:
        hint = perhaps(str(kind), methods) or "."
        raise ConfigError(f"method.kind = {kind!r} is not known{hint} Known: {sorted(methods)}")
    return methods[kind][0].model_validate(data)


def of_kind(config: MethodConfig, kind: str) -> tuple[MethodConfig, list[str]]:
    """The config of another method with the settings that both have, and the names of those that are left out.

    Raises:
        ConfigError: as `parse_method_config`.
    """
    known = type(parse_method_config({"kind": kind})).model_fields
    given = sorted(config.model_fields_set - {"kind"})
    # Presets of two methods may have the same name; they do not have the same values.
    kept = {name: getattr(config, name) for name in given if name in known and name != "preset"}
    return parse_method_config({"kind": kind, **kept}), [name for name in given if name not in kept]


def build_method(config: MethodConfig, trunk: Trunk, num_classes: int) -> Method:
    """Build the method of a config, with fresh weights."""
    return known_methods()[config.kind][1](config, trunk, num_classes)

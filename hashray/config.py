"""Configuration: TOML file + command line -> one frozen, validated pydantic model.

Each stage owns its config class, at the top of its own file. This file only knows how to read one:
every fault of a file is listed at once, unknown keys with the nearest known name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError

from hashray import storage
from hashray.errors import ConfigError, InputError, perhaps

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, defaults validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file, local or on S3.

    Raises:
        InputError: no such file. ConfigError: it is not TOML; the text gives line and column.
    """
    folder, name = storage.split_url(str(path))
    try:
        text = storage.open_store(folder).read(name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def validate(config_class: type[ConfigT], data: Mapping[str, Any], where: str) -> ConfigT:
    """Validate `data`, or raise one ConfigError that lists every fault.

    Raises:
        ConfigError: one line a fault: the key, what was found, what is allowed.
    """
    try:
        return config_class.model_validate(dict(data))
    except ValidationError as error:
        lines = [_fault(config_class, fault) for fault in error.errors()]
        count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from error


def override(config: ConfigT, arguments: list[str], program: str) -> ConfigT:
    """Apply `--method.num-bits 32`-style flags over a config, by tyro; exits 2 on an unknown flag.

    A value that parses but is not allowed (a range, a rule between fields) is a ConfigError as in a file.
    """
    try:
        return tyro.cli(
            type(config),
            args=arguments,
            default=config,
            prog=program,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
        )
    except ValidationError as error:
        lines = [f"  {_fault(type(config), fault)}" for fault in error.errors()]
        raise ConfigError("the command line:\n" + "\n".join(lines)) from error


def _fault(config_class: type[BaseModel], fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        *parents, name = [str(part) for part in fault["loc"]]
        known = _fields_at(config_class, parents)
        return f"{path}: unknown key{perhaps(name, known)} Known here: {', '.join(sorted(known))}"
    message = fault["msg"].removeprefix("Value error, ")
    found = "" if fault["type"] == "missing" else f" (found {fault['input']!r})"
    return f"{path or 'config'}: {message}{found}"


def _fields_at(config_class: type[BaseModel], parents: list[str]) -> list[str]:
    """Field names of the model that `parents` leads to; union tags in the path are skipped."""
    model: type[BaseModel] = config_class
    for name in parents:
        field = model.model_fields.get(name)
        if field is None:
            model = next((m for m in _models(model) if _kind(m) == name), model)
            continue
        inner = _models(field.annotation)
        if len(inner) == 1:
            model = inner[0]
        elif inner:
            tag = parents[parents.index(name) + 1 :]
            model = next((m for m in inner if tag and _kind(m) == tag[0]), inner[0])
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]


def _kind(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None


def require_path(value: str | None, flag: str) -> str:
    """Return `value`, or raise InputError saying which flag was left out."""
    if not value:
        raise InputError(f"{flag} is missing: give {flag} PATH, a local folder or s3://bucket/prefix")
    return value

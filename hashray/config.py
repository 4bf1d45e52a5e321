"""Configuration: TOML file + command line -> one frozen, validated pydantic model.

Each stage owns its config class, at the top of its own file. This file only knows how to read one:
every fault of a file or a command line is listed at once, unknown keys with the nearest known name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError
from tyro.constructors import MISSING, ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from hashray.errors import ConfigError, InputError, perhaps

ConfigT = TypeVar("ConfigT", bound="Config")
SHOWN_CHARACTERS = 80
COMMAND_LINE = "the command line"


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, numbers finite, defaults validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def parse_toml(data: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a TOML file; `where` names it in errors.

    Raises:
        ConfigError: it is not UTF-8 or not TOML; the text gives line and column.
    """
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error


def validate(config_class: type[ConfigT], data: Mapping[str, Any], where: str) -> ConfigT:
    """Validate `data`, or raise one ConfigError that lists every fault.

    Raises:
        ConfigError: one line a fault: the key, what was found, what is allowed.
    """
    try:
        return config_class.model_validate(dict(data))
    except ValidationError as error:
        lines = [_fault(config_class, data, fault, flags=where == COMMAND_LINE) for fault in error.errors()]
        count = f"{len(lines)} fault{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{where}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from error


def parse(kind: Any, arguments: Sequence[str], program: str, description: str | None = None, **default: Any) -> Any:
    """Parse arguments by tyro into a config class or a union of subcommands; exits 2 on an unknown flag.

    Raises:
        ConfigError: a value does not validate; one line a fault.
    """
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)
    parsed = tyro.cli(
        kind, args=arguments, prog=program, description=description, config=markers, registry=_REGISTRY, **default
    )
    return validate(type(parsed), _values(parsed), COMMAND_LINE) if isinstance(parsed, Config) else parsed


_REGISTRY = ConstructorRegistry()


@_REGISTRY.struct_rule
def _not_yet_validated(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro builds a config: without validation, so that `parse` can list every fault of the whole at once."""
    kind = info.type
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        return None
    hints = get_type_hints(kind, include_extras=True)

    def build(**values: Any) -> Config:
        return kind.model_construct(**values)

    build.__doc__ = kind.__doc__  # the text of the help
    fields = []
    for name, field in kind.model_fields.items():
        known = MISSING if field.is_required() else field.get_default(call_default_factory=True)
        default = getattr(info.default, name) if isinstance(info.default, kind) else known
        fields.append(StructFieldSpec(name=name, type=hints[name], default=default, helptext=field.description or ""))
    return StructConstructorSpec(instantiate=build, fields=tuple(fields))


def _values(config: Config) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: _values(value) if isinstance(value, Config) else value for name, value in values.items()}


def _names(arguments: Sequence[str]) -> set[str]:
    """The flags among arguments, in the spelling of the help."""
    return {text.partition("=")[0].replace("_", "-") for text in arguments if text.startswith("-")}


def with_tables(config: ConfigT, arguments: Sequence[str]) -> ConfigT:
    """The config plus each optional table that it lacks and that a flag names, at its defaults."""
    flags = _names(arguments)
    about = {flag.removeprefix("--").partition(".")[0] for flag in flags if "." in flag}
    added = {}
    for name, field in type(config).model_fields.items():
        wanted = name.replace("_", "-") in about or flags & {"-h", "--help"}
        if getattr(config, name) is None and wanted and (tables := _models(field.annotation)):
            added[name] = tables[0]()
    return config.model_copy(update=added)


def merge(before: ConfigT, after: ConfigT, arguments: Sequence[str]) -> ConfigT:
    """The config `after`, which flags made of `before`, validated as a whole.

    A value that neither `before` nor a flag sets is computed again. A field that sets others (a preset) therefore
    works on the command line as it does in a file.

    Raises:
        ConfigError: each flag is allowed, but not all of them together.
    """
    return validate(type(before), _given(before, after, _names(arguments), "--"), COMMAND_LINE)


def _given(before: Config, after: Config, flags: set[str], prefix: str) -> dict[str, Any]:
    """What was set before, in a flag, or is different after, as nested tables."""
    table: dict[str, Any] = {}
    for name in type(after).model_fields:
        old, new, flag = getattr(before, name), getattr(after, name), prefix + name.replace("_", "-")
        if isinstance(new, Config) and type(new) is type(old):
            table[name] = _given(old, new, flags, f"{flag}.")
        elif name == "kind" or name in before.model_fields_set or flag in flags or new != old:
            table[name] = new
    return table


def _fault(config_class: type[BaseModel], data: Any, fault: Any, flags: bool) -> str:
    path = ".".join(_flag_parts(config_class, fault["loc"]) if flags else map(str, fault["loc"]))
    if flags and path:
        path = f"--{path.replace('_', '-')}"
    if fault["type"] == "extra_forbidden":
        *parents, name = fault["loc"]
        known = _fields_at(config_class, data, parents)
        return f"{path}: unknown key{perhaps(str(name), known) or '.'} Known here: {', '.join(sorted(known))}"
    message = fault["msg"].removeprefix("Value error, ")
    value = repr(fault["input"])
    if len(value) > SHOWN_CHARACTERS:
        value = f"{value[:SHOWN_CHARACTERS]}…"
    return f"{path or 'config'}: {message}" + ("" if fault["type"] == "missing" else f" (found {value})")


def _flag_parts(model: type[BaseModel], places: Sequence[str | int]) -> list[str]:
    """The parts of a field's flag: a table that is spread over its parent (`tyro.conf.arg(name="")`) gives no part."""
    field = model.model_fields.get(str(places[0])) if places else None
    spread = field is not None and any(getattr(mark, "name", None) == "" for mark in field.metadata)
    return list(map(str, places[1:] if spread else places))


def _fields_at(config_class: type[BaseModel], data: Any, parents: Sequence[str | int]) -> list[str]:
    """Field names of the model that `parents` leads to in `data`; of several, the one of the table's `kind`."""
    model: type[BaseModel] = config_class
    for name in parents:
        try:
            data = data[name]
        except (LookupError, TypeError):
            data = None
        field = model.model_fields.get(str(name))
        if field is not None and (inner := _models(field.annotation)):
            kind = data.get("kind") if isinstance(data, Mapping) else None
            model = next((m for m in inner if _kind(m) == kind), inner[0])
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

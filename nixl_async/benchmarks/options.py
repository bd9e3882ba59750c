"""What the benchmarks' options have in common: choices in any case, values as text, TOML files of the same names."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nixl_async.errors import ConfigurationError

if TYPE_CHECKING:
    import typer


class Word(enum.StrEnum):
    """A choice that is read whatever its case."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        return next((one for one in cls if str(value).lower() == one.value.lower()), None)


class Format(Word):
    """How results are written."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def plain(value: Any) -> Any:
    """Return an option's value as text, number or boolean."""
    if isinstance(value, tuple):
        return ",".join(str(plain(one)) for one in value)
    return value.value if isinstance(value, enum.Enum) else value


def flag(name: str, *, no: bool = False) -> str:
    """Write an option's name as the command line has it."""
    return f"--{'no-' if no else ''}{name.replace('_', '-')}"


def refusal(options: Any, name: str, allowed: str) -> ConfigurationError:
    """Return the error that names an option, its value, and what is allowed."""
    return ConfigurationError(f"{flag(name)} is {plain(getattr(options, name))}; it must be {allowed}")


def given(context: typer.Context, options: type, *, without: str = "config_file") -> dict[str, Any]:
    """Return what was said on the command line or by a variable, and not what is default, for a dataclass of options."""
    fields, found = {field.name: field for field in dataclasses.fields(options)}, {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name != without and source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT"):
            found[name] = _chosen(value, fields[name])
    return found


def _chosen(value: Any, field: dataclasses.Field[Any]) -> Any:
    # Older releases of Typer keep choices as text where the context has them.
    if isinstance(value, list | tuple):
        return tuple(field.metadata["of"](one) for one in value)
    kind = type(field.default)
    return kind(value) if issubclass(kind, enum.Enum) else value


def read_file(path: str, options: type, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Read values for a dataclass of options from a TOML file of `name = value` lines.

    A field that is a tuple takes a list, or text with commas; `metadata["of"]` is the choice that each of it is.

    Raises:
        ConfigurationError: it cannot be read, is no TOML, or has a name or a value that is not allowed.
    """
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"--config-file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config-file {path} is not TOML: {error}") from None
    fields = {field.name: field for field in dataclasses.fields(options)}
    made = {}
    for key, value in found.items():
        name = aliases.get(key.replace("-", "_"), key.replace("-", "_"))
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, 0.0)[0]
            raise ConfigurationError(f"{path} has the unknown key {key!r}; the closest that is allowed is {near!r}")
        made[name] = _value(path, key, value, fields[name])
    return made


def _value(path: str, key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    kind = type(field.default)
    if kind is tuple:
        listed = [one for one in (value.split(",") if isinstance(value, str) else value) if one]
        return tuple(_choice(path, key, field.metadata["of"], one) for one in listed)
    if issubclass(kind, enum.Enum):
        return _choice(path, key, kind, value)
    if kind is str and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigurationError(f"{path}: {key} is {value!r}; it must be of type {kind.__name__}")
    return value


def _choice(path: str, key: str, kind: Any, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(one.value for one in kind)
        raise ConfigurationError(f"{path}: {key} is {value!r}; allowed are {allowed}") from None

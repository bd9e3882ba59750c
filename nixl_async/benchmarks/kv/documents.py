"""Files of settings: YAML, JSON and TOML read into mappings, with errors that name the file."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from nixl_async.errors import ConfigurationError


def read_text(path: str | Path) -> str:
    """Read a file's text.

    Raises:
        ConfigurationError: the file cannot be read, or is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{str(path)!r} is no text file") from None


def read_document(path: str | Path) -> dict[str, Any]:
    """Read a mapping: TOML where the name ends in `.toml`, JSON in `.json`, otherwise YAML, which JSON is too.

    Raises:
        ConfigurationError: the file cannot be read, does not parse, or is no mapping.
    """
    text, suffix = read_text(path), Path(path).suffix.lower()
    # Loaded here: the plan of a model that is known by name needs no file.
    import yaml

    try:
        if suffix == ".toml":
            found: Any = tomllib.loads(text)
        elif suffix == ".json":
            found = json.loads(text)
        else:
            found = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ConfigurationError(f"{str(path)!r} does not parse as {suffix.lstrip('.') or 'yaml'}: {why}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{str(path)!r} holds {type(found).__name__}; it must be a mapping of names to values")
    return found

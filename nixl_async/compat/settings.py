"""Where NIXL's settings come from: the environment, and behind it a TOML file with the same names.

The file is the one that NIXL_CONFIG_FILE names, else `~/.nixl.cfg`, else `/etc/nixl.cfg`; it is read once
(src/utils/common/configuration.cpp of ai-dynamo/nixl).
"""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from nixl_async.errors import ConfigurationError

FILE_VARIABLE = "NIXL_CONFIG_FILE"
_HOME_FILE, _GLOBAL_FILE = ".nixl.cfg", "/etc/nixl.cfg"
_SWITCHES = {
    word: value
    for value, words in {
        True: ("y", "yes", "on", "1", "true", "enable"),
        False: ("n", "no", "off", "0", "false", "disable"),
    }.items()
    for word in words
}


def setting(name: str) -> str | None:
    """Return a setting's text; `None` if nobody has set it.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    given = os.environ.get(name)
    if given is not None:
        return given
    value = _file().get(name)
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def switch(name: str) -> bool | None:
    """Return whether a setting is on; `None` if nobody has set it.

    Raises:
        ConfigurationError: it is neither yes nor no.
    """
    given = setting(name)
    if given is None or not given.strip():
        return None
    value = _SWITCHES.get(given.strip().lower())
    if value is None:
        raise ConfigurationError(f"{name} is {given!r}; it must be one of {', '.join(_SWITCHES)}")
    return value


def number(name: str, default: int, least: int = 0) -> int:
    """Return a setting that is a whole number.

    Raises:
        ConfigurationError: it is none, or less than `least`.
    """
    given = setting(name)
    if given is None or not given.strip():
        return default
    try:
        value = int(given)
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigurationError(f"{name} is {given!r}; it must be a whole number, {least} at least")
    return value


@cache
def _file() -> dict[str, Any]:
    named = os.environ.get(FILE_VARIABLE)
    places = [Path(named)] if named else [Path(os.environ.get("HOME") or "/") / _HOME_FILE, Path(_GLOBAL_FILE)]
    for place in places:
        if named or place.exists():
            try:
                return tomllib.loads(place.read_text())
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"NIXL's settings cannot be read from {str(place)!r}: {error}") from error
    return {}

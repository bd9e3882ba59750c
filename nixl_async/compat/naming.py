"""Gives this package's modules the names of NIXL's: `nixl._bindings` is `nixl_async.compat.bindings`, and so on."""

from __future__ import annotations

import sys
from typing import Any

from nixl_async.compat import api, bindings, buffers, log

MODULES = {"_api": api, "_bindings": bindings, "_utils": buffers, "logging": log}
VERSION = "1.5.1"
"""The version of NIXL whose API this is."""


def install(package: str, namespace: dict[str, Any]) -> None:
    """Make the submodules of a package that stands for NIXL's, and what it offers at its top."""
    for name, module in MODULES.items():
        sys.modules[f"{package}.{name}"] = module
        namespace[name] = module
    namespace.update({name: getattr(api, name) for name in api.__all__})
    namespace["__all__"] = [name for name in api.__all__ if name != "nixlBind"]
    namespace["__version__"] = VERSION

"""What SGLang imports and this machine need not have: packages of GPU kernels and of models' parts. None of them is ever called.

A name that is really installed is left alone.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAMES = ("IPython", "compressed_tensors", "gguf", "sentencepiece", "torchvision", "triton", "tvm_ffi")


class _Named(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _Nothing(metaclass=_Named):
    """Stands for whatever a package offers: it can be called, subclassed, used as a decorator, and has every attribute."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        # As a decorator, with or without arguments, it leaves what it decorates.
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) and not named else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()

    def __getitem__(self, key: Any) -> Any:
        return self


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # What is called like a class is one: it is subclassed, and asked for with isinstance.
        found = type(name, (_Nothing,), {}) if name[0].isupper() and not name.isupper() else _Nothing()
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name.partition(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Let every import of what is not installed find an empty package."""
    import torch
    from torch.utils import _triton
    from transformers.utils import import_utils

    # These remember what they have found, and are to know that there is no such package.
    _triton.has_triton_package()
    import_utils.is_torchvision_available()
    # SGLang decorates kernels with it at import.
    torch.compile = lambda function=None, **options: function or (lambda decorated: decorated)
    sys.meta_path.append(_Finder())

"""The build backend: setuptools, after checking the machine, generating the C source and finding UCX's headers."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401 - the hooks that need nothing of ours
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.egg_info import manifest_maker

# What a source distribution has besides what setuptools finds: it is here because the top level is no place for it.
manifest_maker.template = "nixl_async/native/MANIFEST.in"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _ready()
    with _of_its_own():
        return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):  # type: ignore[no-untyped-def]
    _ready()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):  # type: ignore[no-untyped-def]
    return _setuptools.build_sdist(sdist_directory, config_settings)


def _ready() -> None:
    import builder as native

    if missing := _missing():
        sys.exit(f"nixl_async cannot be built here: {missing}")
    native.generate()
    include = native.ucx_include()
    if include:
        os.environ["C_INCLUDE_PATH"] = os.pathsep.join(filter(None, [include, os.environ.get("C_INCLUDE_PATH")]))


def _missing() -> str:
    if sys.platform != "linux":
        return f"it runs on Linux only, and this is {sys.platform}"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"it needs a C compiler, and there is no {compiler!r} on PATH: apt-get install gcc, or set CC"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"it needs Python's headers, and there is no {header}: apt-get install python3-dev"
    return ""


@contextmanager
def _of_its_own() -> Iterator[None]:
    """Build in a directory that is new: setuptools packs whatever earlier builds left in `build/`."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "setup.cfg").write_text(f"[build]\nbuild_base = {directory}/build\n")
        before = os.environ.get("DIST_EXTRA_CONFIG")
        os.environ["DIST_EXTRA_CONFIG"] = f"{directory}/setup.cfg"
        try:
            yield
        finally:
            os.environ.pop("DIST_EXTRA_CONFIG")
            if before is not None:
                os.environ["DIST_EXTRA_CONFIG"] = before

"""Builds the compiled module `nixl_async.native._native`: cffi in API mode, for the stable ABI of Python 3.11 and later.

Each unit is a pair `<unit>.h` (declarations, which are also what Python sees) and `<unit>.c`. `generate` writes one C file that
includes them all; `pyproject.toml` compiles that one. Run `python nixl_async/native/builder.py` to rebuild in place.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
GENERATED = HERE / "_native.c"
MODULE = "nixl_async.native._native"


def units() -> list[str]:
    """Return the units' names in the order in which they are compiled."""
    return sorted(path.stem for path in HERE.glob("*.h"))


def ucx_include() -> str | None:
    """Find the directory that holds `ucp/api/ucp.h`: of the libucx wheel, or of the system (`None`: the compiler's own)."""
    spec = importlib.util.find_spec("libucx")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(root) / "include/ucp/api/ucp.h").exists():
            return str(Path(root) / "include")
    for root in ("/usr/include", "/usr/local/include"):
        if (Path(root) / "ucp/api/ucp.h").exists():
            return None
    sys.exit("nixl_async needs UCX's headers to build: pip install libucx-cu12 (or apt-get install libucx-dev)")


def generate() -> Path:
    """Write the C source that is compiled."""
    try:
        from cffi import FFI
    except ImportError:
        sys.exit("nixl_async needs cffi to build: pip install cffi")
    ffi = FFI()
    sources = []
    for unit in units():
        ffi.cdef((HERE / f"{unit}.h").read_text())
        sources.append(f'#include "{unit}.c"')
    preamble = "\n".join(
        ["#ifndef _GNU_SOURCE", "#define _GNU_SOURCE", "#endif", "#include <stddef.h>", "#include <stdint.h>", *sources]
    )
    ffi.set_source(MODULE, preamble, py_limited_api=True)
    ffi.emit_c_code(str(GENERATED))
    return GENERATED


def build_in_place() -> Path:
    """Compile into this directory, for an uninstalled or editable tree."""
    include = ucx_include()
    target = HERE / "_native.abi3.so"
    command = [os.environ.get("CC", "cc"), "-O3", "-g", "-shared", "-fPIC", "-Wall", "-fvisibility=hidden", "-pthread"]
    command += ["-DPy_LIMITED_API=0x030b0000", f"-I{sysconfig.get_paths()['include']}", f"-I{HERE}"]
    command += [f"-I{include}"] if include else []
    subprocess.run([*command, str(generate()), "-o", f"{target}.part", "-ldl"], check=True)
    # Replaced at once: a process that has the old file mapped keeps it whole.
    Path(f"{target}.part").replace(target)
    return target


if __name__ == "__main__":
    print(build_in_place())

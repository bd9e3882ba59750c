"""The one compiled module: copies, checksums, the socket engine, the file engine, the UCX engine. `ffi` and `lib` are cffi's.

Every call releases the GIL. Arrays go in as `int64(array)`, which must stay alive while C uses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nixl_async.errors import MissingDependency

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

try:
    from nixl_async.native._native import ffi, lib
except ImportError as error:
    raise MissingDependency(
        f"the compiled module is missing from {Path(__file__).parent} ({error}); if that is a checkout, and the package was "
        "installed elsewhere, start Python elsewhere, or `pip install --editable .`, or run `python nixl_async/native/builder.py`"
    ) from error


def int64(array: Array) -> Any:
    """Return a C pointer to a contiguous int64 array's data; the array must outlive its use."""
    return ffi.from_buffer("int64_t[]", array)


__all__ = ["ffi", "int64", "lib"]

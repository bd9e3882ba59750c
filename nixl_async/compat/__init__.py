"""A drop-in for NIXL's Python API: programs written against `nixl` run on nixl_async without being changed.

`path()` names a directory with the packages `nixl`, `nixl_cu12` and `nixl_cu13`; put first on PYTHONPATH it takes NIXL's place
for a process and all that it starts. `nixl-async run-as-nixl -- COMMAND` does that. The names and calls are those of NIXL 1.5.
"""

from __future__ import annotations

from pathlib import Path


def path() -> str:
    """Return the directory whose packages stand for NIXL's, to be put first on PYTHONPATH."""
    return str(Path(__file__).parent / "shim")

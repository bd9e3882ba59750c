"""Say what machine and which versions a result comes from."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "nixl-async",
    "numpy",
    "ucxx-cu12",
    "ucxx-cu13",
    "libucx-cu12",
    "libucx-cu13",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "uvloop",
)


def describe(versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the header of a result: processor, cores that this process may use, memory, kernel, load, versions.

    `versions` adds those of other libraries that take part, in other interpreters for example.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_1min": os.getloadavg()[0],
        "ptrace_scope": _read("/proc/sys/kernel/yama/ptrace_scope") or "absent",
        "versions": {**found, **(versions or {})},
    }


def cpu_model() -> str:
    """Return the processor's name as the kernel has it."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""

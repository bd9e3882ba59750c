"""Say what machine and which versions a result comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.system import cpu_model

OURS = ("nixl-async", "numpy", "ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13", "uvloop")
PEERS = ("nixl-cu12", "nixl-cu13", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "numpy")
_ASK = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(" ".join(f"{k}={v}" for k, v in found.items()))
"""


def describe(interpreters: dict[str, str | None]) -> dict[str, Any]:
    """Return the header of a result: machine, kernel, load, and the versions in every interpreter that takes part."""
    versions = {"python": platform.python_version()}
    for name in OURS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    header: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "load_1min": os.getloadavg()[0],
        "ptrace_scope": _read("/proc/sys/kernel/yama/ptrace_scope"),
        "nixl_async": " ".join(f"{name}={value}" for name, value in versions.items()),
    }
    for peer, python in interpreters.items():
        if python:
            header[peer] = _versions(python)
    return header


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "absent"


def _versions(python: str) -> str:
    answer = subprocess.run([python, "-c", _ASK, *PEERS], capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.strip() or answer.stderr.strip()[-200:]

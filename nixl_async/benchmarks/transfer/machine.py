"""The header of a result: processor, NUMA nodes, kernel, UCX and what it can go over, GPUs, networks, versions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.system import describe
from nixl_async.benchmarks.transfer.control import Contender

ASK_SECONDS = 30.0
_NODES = Path("/sys/devices/system/node")
_NETWORKS = Path("/sys/class/net")
_INFINIBAND = Path("/sys/class/infiniband")
_VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""
_PEERS = {
    "nixl": ("nixl", "nixl-cu12", "nixl-cu13"),
    "mooncake": ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda"),
    "obstore": ("obstore",),
    "awscrt": ("awscrt",),
}


def header(contenders: Iterable[Contender] = ()) -> dict[str, Any]:
    """Return the machine's description, and the versions in every contender's interpreter."""
    versions: dict[str, str] = {}
    for one in contenders:
        packages = _PEERS.get(one.label.partition(",")[0])
        if packages and not one.absent:
            versions |= _versions(one.python, packages)
    ucx = _ucx()
    return describe(versions) | {
        "numa": _numa(),
        "gpu": ", ".join(_lines(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])) or "none",
        "networks": _networks(),
        "ucx": ucx,
        "ucx_settings": " ".join(f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("UCX_")),
    }


def _versions(python: str, packages: Iterable[str]) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in _lines([python, "-c", _VERSIONS, *packages]) if " " in line)


def _numa() -> str:
    nodes = sorted(_NODES.glob("node[0-9]*"), key=lambda path: int(path.name[4:]))
    return "; ".join(f"{node.name}: CPUs {_read(node / 'cpulist')}" for node in nodes) or "unknown"


def _networks() -> str:
    """List network devices that are up, with their speed where the driver tells it, and RDMA devices."""
    found = []
    for device in sorted(_NETWORKS.glob("*")):
        speed = _read(device / "speed")
        if _read(device / "operstate") in ("up", "unknown"):
            found.append(f"{device.name} {speed} Mb/s" if speed.isdecimal() else device.name)
    found += [f"{device.name} (RDMA)" for device in sorted(_INFINIBAND.glob("*"))]
    return ", ".join(found) or "none"


def _ucx() -> str:
    """Return UCX's version and the transports and devices that it finds, by its own `ucx_info`."""
    program = _ucx_info()
    if program is None:
        return "absent"
    version = next((line.split()[-1] for line in _lines([program, "-v"]) if "Library version" in line), "unknown")
    lanes: dict[str, list[str]] = {}
    transport = ""
    for line in _lines([program, "-d"]):
        if found := re.match(r"#\s+(Transport|Device):\s+(\S+)", line):
            if found[1] == "Transport":
                transport = found[2]
            else:
                lanes.setdefault(transport, []).append(found[2])
    listed = ", ".join(f"{name} ({' '.join(dict.fromkeys(devices))})" for name, devices in lanes.items())
    return f"{version}; {listed}" if listed else version


def _ucx_info() -> str | None:
    spec = importlib.util.find_spec("libucx")
    if spec is not None and spec.submodule_search_locations:
        program = Path(next(iter(spec.submodule_search_locations))) / "bin" / "ucx_info"
        if os.access(program, os.X_OK):
            return str(program)
    return shutil.which("ucx_info")


def _lines(command: list[str]) -> list[str]:
    try:
        # The wheel's `ucx_info` does not find the libraries beside it.
        paths = os.pathsep.join(filter(None, [str(Path(command[0]).parent.parent / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
        environment = os.environ | {"LD_LIBRARY_PATH": paths} if command[0].endswith("ucx_info") else None
        ran = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()] if ran.returncode == 0 else []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

"""Facts about the machine and this process, each with where it was read: files of the kernel, limits, packages, the environment."""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

Value: TypeAlias = str | int | float | bool | None
ROOT = Path("/")

PACKAGES = {
    "uvloop": "uvloop",
    "ucxx-cu12": "ucx-cu12",
    "ucxx-cu13": "ucx-cu13",
    "libucx-cu12": "ucx-cu12",
    "libucx-cu13": "ucx-cu13",
    "cupy-cuda12x": "cu12",
    "cupy-cuda13x": "cu13",
    "kvikio-cu12": "gds",
    "kvikio-cu13": "all-cu13",
    "aiobotocore": "s3",
    "awscrt": "s3",
    "azure-storage-blob": "azure",
    "azure-identity": "azure",
    "gcloud-aio-storage": "gcs",
}
"""Packages that add something, and the extra of this library that installs each."""
STOCK = ("nixl", "nixl-cu12", "nixl-cu13")
UNLIMITED = "unlimited"
_SHOWN = (
    "UCX_",
    "NIXL_ASYNC_",
    "CUDA_VISIBLE_DEVICES",
    "KVIKIO_",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RAPIDS_LIBUCX_",
    "PYTHONASYNCIODEBUG",
    "PYTHONDEVMODE",
)
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY", re.IGNORECASE)
_CAP_IPC_LOCK, _CAP_SYS_PTRACE = 14, 19
"""Bits of a capability set, `man 7 capabilities`."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that is known: which room it belongs to, its name, its value (`None`: it is not there), and where it was read."""

    room: str
    name: str
    value: Value
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


class Facts:
    """All facts, in the order in which they were read; later ones may be added."""

    def __init__(self, facts: Iterable[Fact] = ()) -> None:
        self.all: list[Fact] = list(facts)

    def add(self, room: str, name: str, value: Value, source: str) -> None:
        """Add a fact."""
        self.all.append(Fact(room, name, value, source))

    def get(self, room: str, name: str) -> Value:
        """Return a value, `None` if it is not there or was not read."""
        return next((fact.value for fact in self.all if (fact.room, fact.name) == (room, name)), None)

    def number(self, room: str, name: str, otherwise: float) -> float:
        """Return a value as a number; infinity for "unlimited", `otherwise` where there is none."""
        value = self.get(room, name)
        if value == UNLIMITED:
            return float("inf")
        return float(value) if isinstance(value, int | float) else otherwise

    def room(self, room: str) -> Iterator[Fact]:
        """Iterate over the facts of a room."""
        return (fact for fact in self.all if fact.room == room)


def gather(root: Path = ROOT) -> Facts:
    """Read what can be read without loading anything; `root` is where the kernel's files are."""
    facts = Facts()
    _machine(facts, root)
    _kernel(facts, root)
    _limits(facts)
    _memory(facts, root)
    _network(facts, root)
    _packages(facts)
    for name in sorted(os.environ):
        if name.startswith(_SHOWN):
            facts.add("environment", name, "(set)" if _SECRET.search(name) else os.environ[name], "environment")
    return facts


def _machine(facts: Facts, root: Path) -> None:
    text = _read(root / "proc/cpuinfo") or ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    facts.add("machine", "cpu", named[1] if named else platform.machine(), "/proc/cpuinfo")
    facts.add("machine", "cores", len(os.sched_getaffinity(0)), "sched_getaffinity")
    facts.add("machine", "cores online", os.cpu_count(), "sysconf")
    facts.add("machine", "cpu quota, cores", _cpu_quota(root), "cgroup cpu.max, cpu.cfs_quota_us")
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    facts.add("machine", "numa nodes", len(nodes) or None, "/sys/devices/system/node")
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    facts.add("machine", "cpufreq governor", governor, "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    facts.add("machine", "python", platform.python_version(), "platform")


def _cpu_quota(root: Path) -> float | None:
    group = root / "sys/fs/cgroup"
    if (text := _read(group / "cpu.max")) is not None:
        quota, _, period = text.partition(" ")
        return round(int(quota) / int(period), 2) if quota.isdecimal() and period.isdecimal() else None
    given, period_us = _number(group / "cpu/cpu.cfs_quota_us"), _number(group / "cpu/cpu.cfs_period_us")
    return round(given / period_us, 2) if given is not None and period_us and given > 0 else None


def _kernel(facts: Facts, root: Path) -> None:
    facts.add("kernel", "release", platform.release(), "uname")
    for name in ("yama/ptrace_scope", "io_uring_disabled"):
        facts.add("kernel", name.replace("/", "."), _number(root / "proc/sys/kernel" / name), f"/proc/sys/kernel/{name}")
    status = dict(line.split(":\t", 1) for line in (_read(root / "proc/self/status") or "").splitlines() if ":\t" in line)
    mode = {"0": "off", "1": "strict", "2": "filter"}.get(status.get("Seccomp", ""))
    facts.add("kernel", "seccomp", mode, "/proc/self/status")
    capabilities = int(status.get("CapEff", "0"), 16)
    facts.add("kernel", "CAP_SYS_PTRACE", bool(capabilities >> _CAP_SYS_PTRACE & 1), "/proc/self/status")
    facts.add("kernel", "CAP_IPC_LOCK", bool(capabilities >> _CAP_IPC_LOCK & 1), "/proc/self/status")
    facts.add("kernel", "user", os.geteuid(), "geteuid")
    facts.add("kernel", "container", *_container(root))


def _container(root: Path) -> tuple[str | None, str]:
    for kind, file in (("docker", ".dockerenv"), ("podman", "run/.containerenv")):
        if (root / file).exists():
            return kind, f"/{file}"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes", "KUBERNETES_SERVICE_HOST"
    return None, "/.dockerenv, /run/.containerenv, KUBERNETES_SERVICE_HOST"


def _limits(facts: Facts) -> None:
    for name in ("NOFILE", "MEMLOCK", "NPROC"):
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        for kind, value in (("", soft), (" hard", hard)):
            given = UNLIMITED if value == resource.RLIM_INFINITY else value
            facts.add("limits", f"RLIMIT_{name}{kind}", given, "getrlimit")


def _memory(facts: Facts, root: Path) -> None:
    found = dict(re.findall(r"^(\w+):\s+(\d+)", _read(root / "proc/meminfo") or "", re.MULTILINE))
    for name, key in (("bytes", "MemTotal"), ("available bytes", "MemAvailable"), ("huge page bytes", "Hugepagesize")):
        facts.add("memory", name, int(found[key]) << 10 if key in found else None, "/proc/meminfo")
    facts.add("memory", "huge pages", int(found["HugePages_Total"]) if "HugePages_Total" in found else None, "/proc/meminfo")
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    chosen = re.search(r"\[(\w+)\]", _read(root / path) or "")
    facts.add("memory", "transparent huge pages", chosen[1] if chosen else None, f"/{path}")
    limit = _read(root / "sys/fs/cgroup/memory.max") or _read(root / "sys/fs/cgroup/memory/memory.limit_in_bytes") or ""
    # Without a limit, version 1 has a number of this size.
    bounded = limit.isdecimal() and int(limit) < 1 << 60
    facts.add(
        "memory", "limit of the cgroup, bytes", int(limit) if bounded else None, "cgroup memory.max, memory.limit_in_bytes"
    )
    try:
        shm = os.statvfs(root / "dev/shm")
    except OSError:
        facts.add("memory", "/dev/shm bytes", None, "statvfs")
        return
    facts.add("memory", "/dev/shm bytes", shm.f_blocks * shm.f_frsize, "statvfs")
    facts.add("memory", "/dev/shm free bytes", shm.f_bavail * shm.f_frsize, "statvfs")


def _network(facts: Facts, root: Path) -> None:
    for path in sorted((root / "sys/class/net").glob("*")):
        state = _read(path / "operstate")
        if state not in ("up", "unknown"):
            continue
        facts.add("network", f"{path.name} MTU", _number(path / "mtu"), f"/sys/class/net/{path.name}/mtu")
        speed = _number(path / "speed")
        # A virtual interface has none, or -1.
        known = speed if speed is not None and speed > 0 else None
        facts.add("network", f"{path.name} Mbit/s", known, f"/sys/class/net/{path.name}/speed")
        node = _number(path / "device/numa_node")
        if node is not None and node >= 0:
            facts.add("network", f"{path.name} numa node", node, f"/sys/class/net/{path.name}/device/numa_node")
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        name, where = f"{port.parts[-3]}:{port.name}", f"/sys/class/infiniband/{port.parts[-3]}/ports/{port.name}"
        facts.add("rdma", name, f"{_read(port / 'rate')}, {_read(port / 'state')}, {_read(port / 'link_layer')}", where)
    facts.add("rdma", "nvidia_peermem", (root / "sys/module/nvidia_peermem").exists(), "/sys/module/nvidia_peermem")
    facts.add("gds", "nvidia-fs", (root / "proc/driver/nvidia-fs").exists(), "/proc/driver/nvidia-fs")
    facts.add("gpu", "driver", _driver(root), "/proc/driver/nvidia/version")
    for name in ("core/rmem_max", "core/wmem_max"):
        facts.add("network", f"net.{name.replace('/', '.')}", _number(root / "proc/sys/net" / name), f"/proc/sys/net/{name}")
    for name in ("tcp_rmem", "tcp_wmem"):
        text = (_read(root / "proc/sys/net/ipv4" / name) or "").split()
        facts.add("network", f"net.ipv4.{name} max", int(text[2]) if len(text) == 3 else None, f"/proc/sys/net/ipv4/{name}")


def _driver(root: Path) -> str | None:
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _read(root / "proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _packages(facts: Facts) -> None:
    for name in ("nixl-async", "numpy", *PACKAGES, *STOCK):
        found = installed(name)
        if found is not None or name in PACKAGES:
            facts.add("packages", name, found, "importlib.metadata")


def installed(name: str) -> str | None:
    """Return the version of a package, `None` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    text = _read(path)
    try:
        return int(text or "")
    except ValueError:
        return None

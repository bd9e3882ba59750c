"""Facts: those of this machine are the kernel's, and those of other machines are read from files as the kernel writes them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from nixl_async.doctor.facts import UNLIMITED, Facts, gather, installed


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_machines_facts() -> None:
    facts = gather()
    assert facts.get("machine", "cores") == len(os.sched_getaffinity(0))
    assert facts.get("kernel", "release") == os.uname().release
    assert facts.number("limits", "RLIMIT_NOFILE", 0) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert facts.number("memory", "bytes", 0) == pytest.approx(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.01
    )
    assert facts.get("packages", "numpy") == installed("numpy") is not None
    assert facts.get("network", "lo MTU") == 65536
    assert all(fact.source for fact in facts.all)


def test_a_machine_with_cards_and_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/sys/kernel/yama/ptrace_scope": "1\n",
            "proc/sys/kernel/io_uring_disabled": "2\n",
            "proc/self/status": "Name:\tx\nSeccomp:\t2\nCapEff:\t0000000000080000\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n",
            "proc/meminfo": "MemTotal: 1024 kB\nMemAvailable: 512 kB\nHugePages_Total: 3\nHugepagesize: 2048 kB\n",
            "proc/sys/net/ipv4/tcp_rmem": "4096\t131072\t6291456\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/memory.max": "1073741824\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            "sys/class/net/eth0/operstate": "up\n",
            "sys/class/net/eth0/mtu": "9000\n",
            "sys/class/net/eth0/speed": "100000\n",
            "sys/class/net/eth0/device/numa_node": "1\n",
            "sys/class/net/eth1/operstate": "down\n",
            "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
            "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
            "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
            "sys/devices/system/node/node0/x": "",
            "sys/devices/system/node/node1/x": "",
            ".dockerenv": "",
        },
    )
    facts = gather(root)
    expected = {
        ("kernel", "yama.ptrace_scope"): 1,
        ("kernel", "io_uring_disabled"): 2,
        ("kernel", "seccomp"): "filter",
        ("kernel", "CAP_SYS_PTRACE"): True,
        ("kernel", "CAP_IPC_LOCK"): False,
        ("kernel", "container"): "docker",
        ("machine", "cpu"): "Some CPU @ 2 GHz",
        ("machine", "numa nodes"): 2,
        ("machine", "cpu quota, cores"): 1.5,
        ("memory", "bytes"): 1 << 20,
        ("memory", "huge pages"): 3,
        ("memory", "huge page bytes"): 2 << 20,
        ("memory", "limit of the cgroup, bytes"): 1 << 30,
        ("memory", "transparent huge pages"): "never",
        ("memory", "/dev/shm bytes"): None,
        ("network", "eth0 Mbit/s"): 100_000,
        ("network", "eth0 MTU"): 9000,
        ("network", "eth0 numa node"): 1,
        ("network", "eth1 MTU"): None,
        ("network", "net.ipv4.tcp_rmem max"): 6291456,
        ("rdma", "mlx5_0:1"): "400 Gb/sec (4X NDR), 4: ACTIVE, InfiniBand",
        ("gpu", "driver"): "570.86.15",
        ("gds", "nvidia-fs"): False,
    }
    assert {key: facts.get(*key) for key in expected} == expected


@pytest.mark.parametrize(
    ("files", "quota", "limit"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"}, None, None),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None, None),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
            4.0,
            None,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "4096"}, None, 4096),
        ({}, None, None),
    ],
)
def test_limits_of_either_kind_of_cgroup(
    tmp_path: Path, files: dict[str, str], quota: float | None, limit: int | None
) -> None:
    facts = gather(write(tmp_path, files))
    assert facts.get("machine", "cpu quota, cores") == quota
    assert facts.get("memory", "limit of the cgroup, bytes") == limit


def test_secrets_of_the_environment_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_ASYNC_TOKEN", "hush")
    monkeypatch.setenv("UCX_TLS", "tcp")
    facts = gather()
    assert facts.get("environment", "NIXL_ASYNC_TOKEN") == "(set)"
    assert facts.get("environment", "UCX_TLS") == "tcp"
    assert "hush" not in str([fact.as_dict() for fact in facts.all])


def test_numbers_of_facts() -> None:
    facts = Facts()
    facts.add("a", "b", UNLIMITED, "here")
    facts.add("a", "c", 3, "here")
    facts.add("a", "d", None, "here")
    assert [facts.number("a", name, 7) for name in ("b", "c", "d", "e")] == [float("inf"), 3, 7, 7]
    assert [fact.name for fact in facts.room("a")] == ["b", "c", "d"]

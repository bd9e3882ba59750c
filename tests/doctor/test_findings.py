"""The rules: each is shown a machine that it is about, and one that it has nothing to say of."""

from __future__ import annotations

from typing import Any

import pytest

from nixl_async.doctor.facts import PACKAGES, UNLIMITED, Facts
from nixl_async.doctor.findings import judge
from nixl_async.doctor.report import Finding, Level, Report, Route, Tried
from nixl_async.doctor.ucx import PREFER_SYSTEM, UCX, Library

SAME = ("DRAM", "DRAM, same host")
FINE: dict[tuple[str, str], Any] = {
    ("machine", "cores"): 8,
    ("machine", "numa nodes"): 1,
    ("machine", "cpufreq governor"): "performance",
    ("kernel", "seccomp"): "off",
    ("kernel", "CAP_IPC_LOCK"): False,
    ("limits", "RLIMIT_NOFILE"): 65536,
    ("limits", "RLIMIT_NOFILE hard"): 65536,
    ("limits", "RLIMIT_MEMLOCK"): UNLIMITED,
    ("memory", "/dev/shm bytes"): 1 << 34,
    ("memory", "transparent huge pages"): "madvise",
    ("network", "eth0 Mbit/s"): 100_000,
    ("network", "eth0 MTU"): 9000,
    ("network", "net.ipv4.tcp_rmem max"): 64 << 20,
    ("network", "net.ipv4.tcp_wmem max"): 64 << 20,
    **{("packages", name): "1.0" for name in PACKAGES},
}
CARDS = {("rdma", "mlx5_0:1"): "400 Gb/sec (4X NDR), 4: ACTIVE, InfiniBand"}
DRIVER = {("gpu", "driver"): "570.1"}
ANOTHER = UCX(
    "/x/ucx_info",
    "1.21.0",
    "--with-verbs",
    (("tcp", "eth0"),),
    library=Library("1.21.0", "/x/libucp.so"),
    others=(("/usr/bin/ucx_info", "1.13.1"),),
)


def report(changes: dict[tuple[str, str], Any] | None = None, **given: Any) -> Report:
    facts = Facts()
    for (room, name), value in (FINE | (changes or {})).items():
        facts.add(room, name, value, "made")
    wanted = {
        "ucx": UCX("/x/ucx_info", "1.21.0", "--with-verbs", (("tcp", "eth0"),)),
        "engine": {"how": "io_uring", "why_threads": ""},
        "gpu": {"driver": False, "devices": []},
        "routes": [Route(*SAME, "samehost", "process_vm", ("tcp", "ucx"), {})],
        "trials": [Tried("samehost", "DRAM ↔ DRAM, same host", True, (9.0,), (9.0,), (10.0,))],
    }
    return Report(facts, **(wanted | given))


def found(of: Report, level: Level) -> list[Finding]:
    return [finding for finding in judge(of) if finding.level is level]


def test_a_machine_without_faults_has_no_advice() -> None:
    findings = judge(report())
    assert {finding.level for finding in findings} == {Level.OK}
    assert len(findings) >= 7


SLOW = Level.SLOW
CASES: list[tuple[str, dict[tuple[str, str], Any], dict[str, Any], Level, str, str]] = [
    ("nofile", {("limits", "RLIMIT_NOFILE"): 240}, {}, SLOW, "room for about 20 peers", "ulimit -n 65536"),
    (
        "nofile hard",
        {("limits", "RLIMIT_NOFILE"): 240, ("limits", "RLIMIT_NOFILE hard"): 512},
        {},
        SLOW,
        "RLIMIT_NOFILE is 240",
        "raise the hard limit (LimitNOFILE=65536)",
    ),
    ("quota", {("machine", "cpu quota, cores"): 1.5}, {}, SLOW, "the cgroup allows 1.5 cores' time on 8", "raise the quota"),
    ("huge pages", {("memory", "transparent huge pages"): "never"}, {}, Level.NOTE, "no transparent huge", "echo madvise"),
    ("shm", {("memory", "/dev/shm bytes"): 64 << 20}, {}, Level.NOTE, "/dev/shm has 64 MiB", "--shm-size"),
    ("slow card", {("network", "eth0 Mbit/s"): 1000}, {}, Level.NOTE, "eth0, has 1 Gbit/s", ""),
    ("mtu", {("network", "eth0 MTU"): 1500}, {}, Level.NOTE, "MTU of 1500", "ip link set eth0 mtu 9000"),
    (
        "tcp",
        {("network", "net.ipv4.tcp_wmem max"): 4 << 20},
        {},
        SLOW,
        "tcp_wmem ends at 4 MiB",
        "sysctl -w net.ipv4.tcp_wmem='4096 131072 16777216'",
    ),
    ("governor", {("machine", "cpufreq governor"): "powersave"}, {}, Level.NOTE, "powersave", "cpupower"),
    ("numa", {("machine", "numa nodes"): 2, ("network", "eth0 numa node"): 1}, {}, Level.NOTE, "2 NUMA nodes", "numactl"),
    ("container", {("kernel", "container"): "docker"}, {}, Level.NOTE, "this is a container (docker)", "--pid=host"),
    ("uvloop", {("packages", "uvloop"): None}, {}, Level.NOTE, "uvloop is not installed", "nixl-async[uvloop]"),
    (
        "stores",
        {("packages", "aiobotocore"): None, ("packages", "azure-identity"): None},
        {},
        Level.NOTE,
        "there is no s3://, az://",
        "pip install 'nixl-async[s3,azure]'",
    ),
    ("stock", {("packages", "nixl-cu12"): "1.5.1"}, {}, Level.NOTE, "NIXL's own wheel (nixl-cu12)", "run-as-nixl"),
    (
        "io_uring by sysctl",
        {("kernel", "io_uring_disabled"): 2},
        {"engine": {"why_threads": "io_uring_setup: Operation not permitted"}},
        SLOW,
        "the kernel refuses io_uring",
        "sysctl -w kernel.io_uring_disabled=0",
    ),
    (
        "io_uring by seccomp",
        {("kernel", "seccomp"): "filter"},
        {"engine": {"why_threads": "io_uring_setup: Operation not permitted"}},
        SLOW,
        "the kernel refuses io_uring",
        "a seccomp profile that allows io_uring_setup",
    ),
    ("no ucx", {}, {"ucx": None, "missing": {"ucx": "no ucxx"}}, Level.NOTE, "there is no UCX", "nixl-async[ucx-cu12]"),
    ("no ucx, cards", CARDS, {"ucx": None, "missing": {"ucx": "no ucxx"}}, SLOW, "there is no UCX", "nixl-async[ucx-cu12]"),
    (
        "ucx without verbs",
        CARDS,
        {"ucx": UCX("/x/ucx_info", "1.21.0", "--without-verbs", (("tcp", "eth0"),))},
        SLOW,
        "there are RDMA cards (mlx5_0:1), and UCX 1.21.0 does not use them",
        "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true",
    ),
    (
        "another ucx",
        {},
        {"ucx": ANOTHER},
        Level.NOTE,
        "UCX 1.21.0 is loaded, and there is also /usr/bin/ucx_info of 1.13.1",
        "libucx-dev",
    ),
    (
        "another ucx, preferred",
        {("environment", PREFER_SYSTEM): "true"},
        {"ucx": ANOTHER},
        SLOW,
        "UCX 1.21.0 is loaded, and there is also /usr/bin/ucx_info of 1.13.1",
        "libucx-dev",
    ),
    ("no device for verbs", CARDS, {}, SLOW, "UCX 1.21.0 does not use them", "--device=/dev/infiniband"),
    (
        "memlock",
        {**CARDS, ("limits", "RLIMIT_MEMLOCK"): 8 << 20},
        {"ucx": UCX("x", "1.21.0", "", (("rc_mlx5", "mlx5_0:1"),))},
        SLOW,
        "RLIMIT_MEMLOCK is",
        "ulimit -l unlimited",
    ),
    (
        "hidden devices",
        {**DRIVER, ("environment", "CUDA_VISIBLE_DEVICES"): ""},
        {},
        Level.NOTE,
        "finds no device",
        "unset CUDA",
    ),
    ("no devices", DRIVER, {}, Level.BROKEN, "CUDA finds no device", "nvidia-smi"),
    (
        "no cupy",
        DRIVER,
        {
            "gpu": {"driver": True, "cuda": "12.8", "devices": [{"reaches": []}]},
            "missing": {"cuda": "the cuda backend needs cupy", "gds": "kvikio"},
        },
        SLOW,
        "cupy is missing",
        "nixl-async[cu12]",
    ),
    (
        "devices apart",
        DRIVER,
        {"gpu": {"driver": True, "cuda": "12.8", "devices": [{"reaches": []}, {"reaches": []}]}},
        Level.NOTE,
        "devices [0, 1] do not reach",
        "by the host",
    ),
    (
        "ptrace by yama",
        {("kernel", "yama.ptrace_scope"): 1},
        {"routes": [Route(*SAME, "tcp", "", ("ucx",), {"samehost": "cannot read from process 7: Operation not permitted"})]},
        SLOW,
        "is reached by tcp, not by samehost",
        "sysctl -w kernel.yama.ptrace_scope=0",
    ),
    (
        "another pid namespace",
        {("kernel", "container"): "docker"},
        {
            "routes": [
                Route(*SAME, "tcp", "", ("ucx",), {"samehost": "peer 'x' is not on this host: process 7: No such process"})
            ]
        },
        SLOW,
        "is reached by tcp",
        "--pid=container:OTHER",
    ),
    (
        "by capability alone",
        {("kernel", "yama.ptrace_scope"): 1, ("kernel", "CAP_SYS_PTRACE"): True},
        {},
        Level.NOTE,
        "samehost works here by CAP_SYS_PTRACE",
        "kernel.yama.ptrace_scope=0",
    ),
    (
        "one way only",
        {},
        {"routes": [Route(*SAME, "samehost", "process_vm only: there is no shared memory to be had", ("tcp",), {})]},
        Level.NOTE,
        "one of its two ways",
        "memfd_create",
    ),
    (
        "a faster route",
        {},
        {
            "trials": [
                Tried("samehost", "a", True, (2.0,), (2.0,), (10.0,)),
                Tried("tcp", "a", True, (4.0,), (4.0,), (10.0,)),
            ]
        },
        Level.NOTE,
        "tcp was 2.0 times as fast as samehost",
        "backend='tcp'",
    ),
    (
        "wrong bytes",
        {},
        {"trials": [Tried("tcp", "a", False, error="3 of 9 pages arrived wrong")]},
        Level.BROKEN,
        "the self-test of tcp failed",
        "do not use it",
    ),
    (
        "descriptors",
        {},
        {"trials": [Tried("tcp", "a", False, error="Too many open files")]},
        Level.BROKEN,
        "the self-test of tcp failed",
        "ulimit -n 65536",
    ),
    (
        "no peer",
        {},
        {"absent": {"DRAM, same host": "gone"}},
        Level.BROKEN,
        "could not be connected to (DRAM, same host)",
        "again",
    ),
    ("no file", {}, {"absent": {"file": "No space left"}}, Level.BROKEN, "no file could be written", "--directory"),
    (
        "a crash",
        {("environment", "UCX_TLS"): "magic,tcp"},
        {"failures": {"opening ucx": "it was killed by SIGSEGV"}},
        Level.BROKEN,
        "opening ucx: it was killed by SIGSEGV",
        "unset UCX_TLS one by one",
    ),
    (
        "another crash",
        {},
        {"failures": {"opening gds": "it was killed by SIGSEGV"}},
        Level.BROKEN,
        "opening gds",
        "without 'gds'",
    ),
    (
        "crashes for want of descriptors",
        {("limits", "RLIMIT_NOFILE"): 24},
        {"failures": {"the routes": "it was killed by SIGABRT"}},
        Level.BROKEN,
        "the routes: it was killed by SIGABRT",
        "ulimit -n 65536",
    ),
]


@pytest.mark.parametrize(
    ("changes", "given", "level", "what", "do"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_what_a_machine_lacks_is_told(
    changes: dict[tuple[str, str], Any], given: dict[str, Any], level: Level, what: str, do: str
) -> None:
    matching = [finding for finding in found(report(changes, **given), level) if what in finding.what]
    assert len(matching) == 1, judge(report(changes, **given))
    assert do in matching[0].do


def test_the_worst_comes_first_and_decides() -> None:
    broken = report({("limits", "RLIMIT_NOFILE"): 240}, failures={"the routes": "it was killed by SIGABRT"})
    broken.findings = judge(broken)
    order = [finding.level for finding in broken.findings]
    assert order == sorted(order, key=[Level.BROKEN, Level.SLOW, Level.NOTE, Level.OK].index)
    assert not broken.healthy
    slow = report({("limits", "RLIMIT_NOFILE"): 240})
    slow.findings = judge(slow)
    assert slow.healthy


def test_failures_of_one_kind_are_one_finding() -> None:
    both = report(failures={"opening ucx": "it was killed by SIGSEGV", "the peer 'same host'": "it was killed by SIGSEGV"})
    (finding,) = found(both, Level.BROKEN)
    assert finding.what == "opening ucx, the peer 'same host': it was killed by SIGSEGV"


def test_shares_of_memcpy() -> None:
    trial = Tried("tcp", "a", True, (4.0, 5.0, 6.0), (), (10.0,))
    assert trial.share(trial.writes) == 0.5
    assert trial.share(trial.reads) is None
    assert trial.as_dict()["write_share_of_memcpy"] == 0.5
    assert trial.as_dict()["reads_gb_s"] is None

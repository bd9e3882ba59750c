"""What follows from the facts: pure rules, each of which says what is the case, why it matters, and what to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import TypeAlias

from nixl_async.doctor.facts import PACKAGES, STOCK
from nixl_async.doctor.hardware import judge_cpu, judge_gpu, judge_network
from nixl_async.doctor.report import Finding, Level, Report, Tried
from nixl_async.doctor.settings import judge_environment
from nixl_async.doctor.stage import FILE, HERE, SAME_HOST
from nixl_async.doctor.ucx import PREFER_SYSTEM

Rule: TypeAlias = Callable[[Report], Iterator[Finding]]
OK, NOTE, SLOW, BROKEN = Level.OK, Level.NOTE, Level.SLOW, Level.BROKEN

FDS_OF_AGENT, FDS_PER_PEER = 40, 10
"""Descriptors that an agent with the default backends takes, Python's own among them, and that each connected peer takes."""
LEAST_FDS, FEW_FDS, ENOUGH_FDS = 100, 1024, 65536
SHM_NBYTES = 256 << 20
FASTER = 1.5
"""How much faster a later route has to be before it is worth a word: single measurements differ by a fifth and more."""


def judge(report: Report) -> list[Finding]:
    """Return every finding, the worst first."""
    found = [finding for rule in RULES for finding in rule(report)]
    return sorted(found, key=lambda finding: -[OK, NOTE, SLOW, BROKEN].index(finding.level))


def _failures(report: Report) -> Iterator[Finding]:
    together: dict[str, list[str]] = {}
    for what, how in report.failures.items():
        together.setdefault(how, []).append(what)
    for how, parts in together.items():
        what = ", ".join(parts)
        do = "run the command again with a debugger or UCX_LOG_LEVEL=info, and file it with the text above"
        if _few_fds(how) or report.facts.number("limits", "RLIMIT_NOFILE", FEW_FDS) < LEAST_FDS:
            do = f"ulimit -n {ENOUGH_FDS} (systemd: LimitNOFILE={ENOUGH_FDS}; docker: --ulimit nofile={ENOUGH_FDS})"
        elif what.startswith("opening "):
            given = ", ".join(str(fact.name) for fact in report.facts.room("environment") if fact.name.startswith("UCX_"))
            if what == "opening ucx" and given:
                do = f"unset {given} one by one and run this again"
            else:
                do = f"until it is solved, leave it out: Agent(backends=[…]) without {what.removeprefix('opening ')!r}"
        yield Finding(BROKEN, f"{what}: {how}", "", do)


def _absent(report: Report) -> Iterator[Finding]:
    for place, why in report.absent.items():
        if place.startswith(f"{HERE}, "):
            what = f"a peer of this host could not be connected to ({place})"
            yield Finding(BROKEN, what, why, "run this again; see who closes TCP on 127.0.0.1")
        elif place == FILE:
            yield Finding(BROKEN, "no file could be written", why, "--directory names another place")


def _few_fds(text: str) -> bool:
    return "Too many open files" in text or "file descriptors" in text


def _same_host(report: Report) -> Iterator[Finding]:
    route = report.route(HERE, f"{HERE}, {SAME_HOST}")
    if route is None:
        return
    if "samehost" not in (route.route, *route.next):
        why = route.refusals.get("samehost", "it is not there")
        yield Finding(
            SLOW,
            f"memory of other processes of this host is reached by {route.route}, not by samehost, which copies once",
            why,
            _allow_ptrace(report, why),
        )
        return
    if route.how.startswith("process_vm only"):
        yield Finding(NOTE, "samehost has one of its two ways: many small segments go slower", route.how, "allow memfd_create")
    else:
        yield Finding(OK, "samehost reads and writes the memory of other processes of this user")
    scope = report.facts.number("kernel", "yama.ptrace_scope", 0)
    if scope and report.facts.get("kernel", "CAP_SYS_PTRACE"):
        yield Finding(
            NOTE,
            f"samehost works here by CAP_SYS_PTRACE; kernel.yama.ptrace_scope is {scope:g}, and processes without it go by TCP",
            "/proc/sys/kernel/yama/ptrace_scope",
            "sysctl -w kernel.yama.ptrace_scope=0, or give the capability to all of them (docker: --cap-add SYS_PTRACE)",
        )


def _allow_ptrace(report: Report, why: str) -> str:
    """Say what would let samehost work; by `why` the kernel knows no such process here, or does not allow it."""
    facts = report.facts
    ways = []
    if facts.number("kernel", "yama.ptrace_scope", 0):
        ways.append(
            "sysctl -w kernel.yama.ptrace_scope=0 (kept by a file in /etc/sysctl.d), or CAP_SYS_PTRACE for both processes"
        )
    if facts.get("kernel", "seccomp") == "filter":
        ways.append(
            "a seccomp profile that allows process_vm_readv, process_vm_writev and pidfd_open (docker: --cap-add SYS_PTRACE, or"
            " --security-opt seccomp=FILE; Kubernetes: securityContext.capabilities.add [SYS_PTRACE])"
        )
    if facts.get("kernel", "container") and "not permitted" not in why:
        ways.append(
            "one pid namespace for both containers (docker: --pid=container:OTHER; Kubernetes: shareProcessNamespace: true)"
        )
    ways.append("the same user for both processes, neither of them setuid or made undumpable")
    return "; ".join(ways)


def _containers(report: Report) -> Iterator[Finding]:
    kind = report.facts.get("kernel", "container")
    if kind:
        yield Finding(
            NOTE,
            f"this is a container ({kind}): processes of another container on this host are reached by TCP or UCX",
            "a process id means nothing in another pid namespace, and samehost and CUDA IPC need one",
            "docker: --pid=host or --pid=container:OTHER, --ipc=host; Kubernetes: one pod, shareProcessNamespace: true",
        )


def _file_engine(report: Report) -> Iterator[Finding]:
    why = report.engine.get("why_threads")
    if why is None:
        return
    if not why:
        yield Finding(OK, "files are read and written by io_uring")
        return
    if report.facts.number("kernel", "io_uring_disabled", 0):
        do = "sysctl -w kernel.io_uring_disabled=0"
    elif report.facts.get("kernel", "seccomp") == "filter":
        do = "a seccomp profile that allows io_uring_setup, _enter and _register (docker: --security-opt seccomp=FILE)"
    else:
        do = "Linux 5.6 or later with CONFIG_IO_URING"
    yield Finding(SLOW, "files are read and written by threads: the kernel refuses io_uring", why, do)


def _ucx(report: Report) -> Iterator[Finding]:
    cards = [fact for fact in report.facts.room("rdma") if fact.name != "nvidia_peermem"]
    if report.ucx is None or "ucx" in report.missing:
        if "opening ucx" not in report.failures:
            yield Finding(
                SLOW if cards else NOTE,
                "there is no UCX: no RDMA, and no stock NIXL agents",
                report.missing.get("ucx", ""),
                "pip install 'nixl-async[ucx-cu12]', or [ucx-cu13] where CUDA is 13",
            )
        return
    if (library := report.ucx.library) is not None and report.ucx.differing:
        programs = ", ".join(f"{program} of {version}" for program, version in report.ucx.differing)
        preferred = str(report.facts.get("environment", PREFER_SYSTEM) or "false").lower() != "false"
        yield Finding(
            SLOW if preferred else NOTE,
            f"UCX {library.version} is loaded, and there is also {programs}",
            f"{library.path}: the libucx package loads its own libucp.so, or the system's if {PREFER_SYSTEM} is set",
            f"if you want another: set {PREFER_SYSTEM}=true and LD_LIBRARY_PATH, and install the package that has libucp.so"
            " (libucx-dev, ucx-devel)",
        )
    if report.ucx.rdma:
        yield Finding(OK, f"UCX has RDMA: {', '.join(report.ucx.rdma)}")
    elif cards:
        built = "--without-verbs" in report.ucx.built
        reason = (
            "it was built without verbs"
            if built
            else "it finds none of their transports: /dev/infiniband is not here, or UCX_* forbids them"
        )
        yield Finding(
            SLOW,
            f"there are RDMA cards ({', '.join(fact.name for fact in cards)}), and UCX {report.ucx.version} does not use them",
            f"{report.ucx.program}: {reason}",
            f"install a UCX with verbs (rdma-core, then your distribution's or NVIDIA's UCX) and set {PREFER_SYSTEM}=true"
            if built
            else "docker: --device=/dev/infiniband --ulimit memlock=-1; Kubernetes: an RDMA device plugin; unset UCX_TLS",
        )
    else:
        yield Finding(OK, "there are no RDMA cards: other hosts are reached by TCP")


def _limits(report: Report) -> Iterator[Finding]:
    facts = report.facts
    nofile, hard = (facts.number("limits", f"RLIMIT_NOFILE{kind}", float("inf")) for kind in ("", " hard"))
    if nofile < FEW_FDS:
        to = ENOUGH_FDS if hard >= ENOUGH_FDS else int(hard)
        yield Finding(
            SLOW,
            f"RLIMIT_NOFILE is {nofile:g}: there is room for about {_peers(nofile)} peers",
            f"a peer takes about {FDS_PER_PEER} descriptors; the hard limit is {hard:g}",
            f"ulimit -n {to}"
            + ("" if to >= FEW_FDS else f" is the most that is allowed: raise the hard limit (LimitNOFILE={ENOUGH_FDS})"),
        )
    else:
        yield Finding(OK, f"RLIMIT_NOFILE is {nofile:g}: room for about {_peers(nofile)} peers")
    memlock = facts.number("limits", "RLIMIT_MEMLOCK", float("inf"))
    pins = report.ucx is not None and bool(report.ucx.rdma)
    if pins and memlock != float("inf") and not facts.get("kernel", "CAP_IPC_LOCK"):
        yield Finding(
            SLOW,
            f"RLIMIT_MEMLOCK is {memlock:g} bytes: RDMA cannot register more memory than that",
            "getrlimit; the process has no CAP_IPC_LOCK",
            "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1)",
        )
    if (quota := facts.number("machine", "cpu quota, cores", 0)) and quota < facts.number("machine", "cores", 0):
        yield Finding(
            SLOW,
            f"the cgroup allows {quota:g} cores' time on {facts.get('machine', 'cores')} cores: threads are halted meanwhile",
            "cpu.max",
            "raise the quota, or pin the process to as many cores (Kubernetes: requests equal to limits, static CPU manager)",
        )


def _peers(nofile: float) -> int:
    return int(max(0.0, min(nofile, 1e9) - FDS_OF_AGENT) // FDS_PER_PEER)


def _memory(report: Report) -> Iterator[Finding]:
    facts = report.facts
    if facts.get("memory", "transparent huge pages") == "never":
        yield Finding(
            NOTE,
            "there are no transparent huge pages: large pools cost more page faults and TLB misses",
            "/sys/kernel/mm/transparent_hugepage/enabled",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    shm = facts.number("memory", "/dev/shm bytes", 0)
    if shm < SHM_NBYTES:
        yield Finding(
            NOTE,
            f"/dev/shm has {shm / 2**20:g} MiB: UCX's shared memory between processes of this host may not fit",
            "statvfs; samehost does not need it",
            "docker: --shm-size=1g, or --ipc=host; Kubernetes: an emptyDir with medium: Memory at /dev/shm",
        )


def _packages(report: Report) -> Iterator[Finding]:
    facts = report.facts
    if facts.get("packages", "uvloop") is None:
        yield Finding(
            NOTE,
            "uvloop is not installed: small transfers take longer on asyncio's own loop",
            "",
            "pip install 'nixl-async[uvloop]'",
        )
    lacking: dict[str, list[str]] = {}
    for name, extra in PACKAGES.items():
        if extra in ("s3", "azure", "gcs") and facts.get("packages", name) is None:
            lacking.setdefault(extra, []).append(name)
    if lacking:
        stores = {"s3": "s3://", "azure": "az://", "gcs": "gs://"}
        yield Finding(
            NOTE,
            f"there is no {', '.join(stores[extra] for extra in lacking)}",
            "; ".join(f"{', '.join(names)}: not installed" for names in lacking.values()),
            f"pip install 'nixl-async[{','.join(lacking)}]'",
        )
    stock = [name for name in STOCK if facts.get("packages", name) is not None]
    if stock:
        yield Finding(
            NOTE,
            f"NIXL's own wheel ({', '.join(stock)}) is in this environment: no process may load both it and our ucx backend",
            "each brings a UCX of its own, and two of them crash each other",
            "import one of them only, or run NIXL's programs on this library: nixl-async run-as-nixl -- COMMAND",
        )


def _trials(report: Report) -> Iterator[Finding]:
    for trial in report.trials:
        if trial.error or not trial.verified:
            do = "do not use it: Agent(backends=[…]) without it" if "wrong" in trial.error else ""
            if _few_fds(trial.error):
                do = f"ulimit -n {ENOUGH_FDS}"
            yield Finding(
                BROKEN, f"the self-test of {trial.route} failed: {trial.what}", trial.error or "nothing was verified", do
            )
    good = [trial for trial in report.trials if trial.verified]
    if good:
        yield Finding(OK, f"{len(good)} routes moved bytes in the self-test, and every byte was right")
    by_what: dict[str, list[Tried]] = {}
    for trial in good:
        by_what.setdefault(trial.what, []).append(trial)
    for what, trials in by_what.items():
        chosen = trials[0]
        best = max(trials, key=_speed)
        if _speed(best) > FASTER * _speed(chosen):
            yield Finding(
                NOTE,
                f"{what}: {best.route} was {_speed(best) / _speed(chosen):.1f} times as fast as {chosen.route}, which is preferred",
                f"{_speed(best):.2f} and {_speed(chosen):.2f} GB/s, 64 KiB pages, in this self-test",
                f"if it is so again: agent.transfer(…, backend={best.route!r}), or Agent(backends=[…]) in that order",
            )


def _speed(trial: Tried) -> float:
    """Return the geometric mean of the median rates there and back, GB/s."""
    medians = [statistics.median(rates) for rates in (trial.writes, trial.reads) if rates]
    return statistics.geometric_mean(medians) if medians else 0.0


RULES: tuple[Rule, ...] = (
    _failures,
    _absent,
    _trials,
    _same_host,
    _file_engine,
    _ucx,
    judge_environment,
    judge_gpu,
    _limits,
    _memory,
    judge_network,
    judge_cpu,
    _containers,
    _packages,
)

"""Environment variables that hurt: rules about `UCX_*` and others, as `findings` has them about facts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nixl_async.doctor.report import Finding, Level, Report

_NETWORK = frozenset(
    {"tcp", "rc", "rc_x", "rc_v", "rc_verbs", "rc_mlx5", "dc", "dc_x", "ud", "ud_x", "ud_v", "ib", "all", "srd"}
)
_CUDA = frozenset({"cuda", "cuda_copy", "cuda_ipc", "all"})
_SEGMENTS = {"UCX_TCP_TX_SEG_SIZE": 64 << 10, "UCX_TCP_RX_SEG_SIZE": 256 << 10}
"""What the ucx backend sets where the environment does not; UCX's own 8k and 64k halve TCP's speed."""
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def judge_environment(report: Report) -> Iterator[Finding]:
    """Find what the environment sets against this library's own choices."""
    given = {fact.name: str(fact.value) for fact in report.facts.room("environment")}
    yield from _transports(given.get("UCX_TLS"), bool(report.gpu.get("devices")))
    yield from _devices(given.get("UCX_NET_DEVICES"), report)
    for name, ours in _SEGMENTS.items():
        nbytes = _nbytes(given.get(name, ""))
        if nbytes is not None and nbytes < ours:
            yield _slow(
                name, given[name], f"segments below {ours >> 10}k slow UCX over TCP down, to half with UCX's own 8k and 64k"
            )
    if given.get("UCX_RNDV_THRESH", "inf") != "inf":
        yield _slow(
            "UCX_RNDV_THRESH",
            given["UCX_RNDV_THRESH"],
            "notifications above it take one more round trip; the backend sets inf",
        )
    if (seconds := _seconds(given.get("UCX_KEEPALIVE_INTERVAL", "1s"))) > 1:
        shown = given["UCX_KEEPALIVE_INTERVAL"]
        yield _slow("UCX_KEEPALIVE_INTERVAL", shown, f"a peer's death may be noticed after {seconds:g} s; the backend sets 1s")
    if given.get("UCX_LOG_LEVEL", "warn").lower() in (
        "debug",
        "trace",
        "trace_req",
        "trace_data",
        "trace_async",
        "trace_func",
        "trace_poll",
    ):
        yield _slow("UCX_LOG_LEVEL", given["UCX_LOG_LEVEL"], "UCX writes a line for every operation")
    if given.get("UCX_MEMTYPE_CACHE", "y").lower() in ("n", "no", "0", "off") and report.gpu.get("devices"):
        yield _slow("UCX_MEMTYPE_CACHE", given["UCX_MEMTYPE_CACHE"], "UCX asks the CUDA driver about every address")
    if "expandable_segments:true" in given.get("PYTORCH_CUDA_ALLOC_CONF", "").lower().replace(" ", ""):
        why = "torch's memory has no CUDA IPC handle then: other processes of this host reach it by way of the host"
        yield _slow("PYTORCH_CUDA_ALLOC_CONF", given["PYTORCH_CUDA_ALLOC_CONF"], why, "set expandable_segments:False")
    for name in ("PYTHONASYNCIODEBUG", "PYTHONDEVMODE"):
        if given.get(name):
            yield _slow(name, given[name], "asyncio records where every future was made, and checks every call")


def _transports(value: str | None, devices: bool) -> Iterator[Finding]:
    if value is None:
        return
    names = {name.strip() for name in value.lower().lstrip("^").split(",")}
    if value.startswith("^"):
        if "tcp" in names:
            yield _slow("UCX_TLS", value, "without RDMA, ucx then reaches no other host")
        if "cma" not in names:
            yield _note_cma(value)
        if devices and names & {"cuda", "cuda_copy"}:
            yield _slow("UCX_TLS", value, "ucx then moves no VRAM")
        return
    if not names & _NETWORK:
        yield _slow("UCX_TLS", value, "ucx then reaches no other host: there is no network among them")
    if names & {"cma", "sm", "shm", "all"}:
        yield _note_cma(value)
    if devices and not names & _CUDA:
        yield _slow("UCX_TLS", value, "ucx then moves no VRAM: cuda is not among them")


def _note_cma(value: str) -> Finding:
    why = "offered cma, UCX may choose lanes over which stock NIXL agents of this host cannot answer; the backend sets ^cma"
    return Finding(
        Level.NOTE,
        f"UCX_TLS is {value!r}, which offers cma",
        why,
        "unset UCX_TLS, or leave cma out, if you use stock NIXL agents",
    )


def _devices(value: str | None, report: Report) -> Iterator[Finding]:
    if value is None or value.startswith("^") or value == "all":
        return
    # RDMA devices are named with their port.
    names = {name.strip() for name in value.split(",")}
    known = {fact.name.removesuffix(" MTU") for fact in report.facts.room("network") if fact.name.endswith(" MTU")}
    known |= {fact.name for fact in report.facts.room("rdma") if fact.name != "nvidia_peermem"}
    if unknown := sorted(name for name in names if name not in known and f"{name}:1" not in known):
        what = f"UCX_NET_DEVICES names {', '.join(unknown)}, which {'are' if len(unknown) > 1 else 'is'} not here or not up"
        yield Finding(
            Level.SLOW, what, f"there are {', '.join(sorted(known))}", "unset UCX_NET_DEVICES, or name some of those"
        )
    if names == {"lo"}:
        yield _slow("UCX_NET_DEVICES", value, "ucx then reaches no other host")


def _slow(name: str, value: str, why: str, do: str = "") -> Finding:
    return Finding(Level.SLOW, f"{name} is {value!r}", why, do or f"unset {name}")


def _nbytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+)\s*([kmg]?)b?", text.strip().lower())
    return int(found[1]) * _UNITS[found[2]] if found else None


def _seconds(text: str) -> float:
    """Read a time as UCX writes it; infinity for "inf", 1 for what it would not read either."""
    if text.strip().lower() in ("inf", "infinity", "0"):
        return float("inf")
    found = re.fullmatch(r"([\d.]+)\s*(us|ms|s|m)?", text.strip().lower())
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, None: 1.0}[found[2]] if found else 1.0

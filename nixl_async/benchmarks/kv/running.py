"""Run plans and traffic patterns in processes of their own on this machine, and make one result of what the ranks measured."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from nixl_async.benchmarks.kv import contents, profiling
from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.matrices import VRAM, Traffic
from nixl_async.benchmarks.kv.planning import Plan
from nixl_async.benchmarks.kv.processes import check_memory, run_ranks
from nixl_async.benchmarks.kv.traffic import Buffers
from nixl_async.errors import ConfigurationError

Progress = Callable[[int, dict[str, Any]], None]
IN_PROCESS = "memory"
MAX_CELLS = 1 << 20
"""Cells of all matrices together: every rank gets them all."""


def check_backend(name: str | None) -> list[str] | None:
    """Return the backends that ranks use: the one that is named, or None for the best there is.

    Raises:
        ConfigurationError: it is unknown, is not installed, or does not reach other processes.
    """
    from nixl_async.backend import load_backend

    if name is None:
        return None
    backend = load_backend(name.lower())
    if backend.name == IN_PROCESS:
        raise ConfigurationError(f"backend {name!r} does not reach other processes; ranks are processes of their own")
    return [backend.name]


async def profile(
    plan: Plan,
    decode: Layout,
    *,
    rank: int,
    ops: Sequence[str],
    modes: Sequence[str],
    repeats: int,
    warmup: int,
    backends: list[str] | None,
    memory: str | None,
    on_event: Progress = lambda rank, message: None,
) -> dict[str, Any]:
    """Move all requests' cache of one rank of a plan to the rank of `decode` that needs it; return what it took.

    The cases of `ops` (write: prefill pushes; read: decode pulls) and `modes` (prepared: the descriptors were checked before;
    one-shot: block tables are described, checked and moved) take turns. Seconds, bytes, and GB of 10^9 bytes.

    Raises:
        ConfigurationError: there is too little memory, or none of the kind; or the rank sends nothing.
        DescriptorError: a side cannot divide the model so, or there is no such rank.
        RanksFailed: a process died, or bytes arrived wrong.
    """
    geometry = plan.geometry
    job = profiling.describe(geometry, plan.layout.sharding(geometry), decode.sharding(geometry))
    pair, pages = profiling.find_pair(job, rank), plan.layout.pages * plan.layout.num_requests
    kind = contents.find_memory(memory or "dram")
    needed = profiling.pool_blocks(pages) * (pair.src.block_nbytes + pair.dst.block_nbytes)
    check_memory(needed if kind != VRAM else 0, 2, "give fewer --num-requests or a smaller --isl")
    common = {
        **job,
        "prefill_rank": rank,
        "pages": pages,
        "ops": list(ops),
        "modes": list(modes),
        "repeats": repeats,
        "warmup": warmup,
        "backends": backends,
        "memory": kind,
        "token": secrets.token_hex(16),
    }
    results = await run_ranks([{**common, "job": side} for side in ("prefill", "decode")], on_event)
    nbytes = results[0]["nbytes"]
    layers = 1 if plan.layout.by_block else len(pair.layers)
    cases = [case for result in results for case in result["cases"]]
    for case in cases:
        case["gb_per_second"] = nbytes / case["median_seconds"] / 1e9
        case["seconds_per_io"] = case["median_seconds"] / (pages * layers)
    return {
        "model": plan.model.name,
        "rank": pair.src.rank,
        "decode_rank": pair.dst.rank,
        "nbytes": nbytes,
        "ios": pages * layers,
        "ranges": results[0]["ranges"],
        "range_nbytes": nbytes // results[0]["ranges"],
        "memory": kind,
        "verified": True,
        "cases": sorted(cases, key=lambda case: (ops.index(case["op"]), modes.index(case["mode"]))),
    }


async def traffic(
    work: Traffic,
    *,
    iters: int | None = None,
    isolated_iters: int = 30,
    warmup: int | None = None,
    verify: bool = True,
    backends: list[str] | None = None,
    memory: str | None = None,
    on_event: Progress = lambda rank, message: None,
) -> dict[str, Any]:
    """Run patterns between as many processes as their matrices have rows; return what each took.

    By default one pattern runs `iters` times as its file says, a sequence 3 times after 30 rounds of each pattern alone.

    Raises:
        ConfigurationError: nothing is sent, or there is too little memory, or none of the kind.
        RanksFailed: a process died, or bytes arrived wrong.
    """
    if not any(pattern.nbytes for pattern in work.patterns):
        raise ConfigurationError("no rank sends anything: all cells of the matrices are 0")
    if (cells := len(work.patterns) * work.world**2) > MAX_CELLS:
        raise ConfigurationError(
            f"the matrices have {cells} cells, {MAX_CELLS} at most can run on one machine; give fewer patterns"
        )
    kinds = {memory or pattern.memory for pattern in work.patterns} - {None}
    if len(kinds) > 1:
        raise ConfigurationError("the patterns are for host and device memory; --memory dram or vram runs all of them in one")
    kind = contents.find_memory(next(iter(kinds), None))
    buffers = [Buffers.of(work.patterns, rank, apart=verify) for rank in range(work.world)]
    needed = sum(one.send_nbytes + one.receive_nbytes for one in buffers)
    advice = "smaller matrices are needed" + ("; --no-verify takes less" if verify and len(work.patterns) > 1 else "")
    check_memory(needed if kind != VRAM else 0, work.world, advice)
    if backends is not None and any(row[rank] for one in work.patterns for rank, row in enumerate(one.matrix)):
        # What a rank sends to itself stays in its process.
        backends = [*backends, IN_PROCESS]
    setup: dict[str, Any] = {
        "job": "traffic",
        "patterns": [pattern.as_dict() for pattern in work.patterns],
        "sequential": work.sequential,
        "iters": iters if iters is not None else 3 if work.sequential else work.iters,
        "isolated_iters": isolated_iters,
        "warmup": warmup if warmup is not None else 30 if work.sequential else work.warmup,
        "verify": verify,
        "backends": backends,
        "memory": kind,
        "token": secrets.token_hex(16),
    }
    # Ranks measure by the monotonic clock, which all processes of a machine share.
    wall = time.time() - time.monotonic()
    began = time.time()
    results = await run_ranks([setup] * work.world, on_event)
    common = {
        "ranks": work.world,
        "memory": kind,
        "verified": verify,
        "route": "+".join(sorted({route for result in results for route in result["routes"]})),
    }
    if not work.sequential:
        return common | _single(work, results, setup["iters"])
    return common | _sequence(work, results, began, wall)


def _single(work: Traffic, results: list[dict[str, Any]], iters: int) -> dict[str, Any]:
    spans = {rank: (one["start"], one["end"]) for rank, one in enumerate(results) if one["start"] is not None}
    total = max(end for _, end in spans.values()) - min(start for start, _ in spans.values())
    pattern = work.patterns[0]
    movers = _movers(pattern.as_dict(), spans, iters)
    return {
        "kind": "single",
        "matrix_file": pattern.name,
        "iters": iters,
        "total_seconds": total,
        "seconds_per_iter": total / iters,
        "size_gb": pattern.nbytes / 1e9,
        "num_senders": len(pattern.senders),
        "mean_bw": sum(one["gb_per_second"] for one in movers) / len(movers),
        "senders": movers,
    }


def _movers(pattern: dict[str, Any], spans: dict[int, tuple[float, float]], iters: int = 1) -> list[dict[str, Any]]:
    """Return what each rank moved that started transfers, and how long one round took it."""
    found = []
    for rank, (start, end) in spans.items():
        row = pattern["matrix"][rank] if pattern["op"] == "WRITE" else [row[rank] for row in pattern["matrix"]]
        seconds = (end - start) / iters
        nbytes = sum(row)
        found.append({"rank": rank, "nbytes": nbytes, "seconds": seconds, "gb_per_second": nbytes / seconds / 1e9})
    return found


def _sequence(work: Traffic, results: list[dict[str, Any]], began: float, wall: float) -> dict[str, Any]:
    isolated = [
        max((alone for one in results if (alone := one["isolated"][number]) is not None), default=None)
        for number in range(len(work.patterns))
    ]
    iterations, metadata = [], []
    for turn in range(len(results[0]["iterations"])):
        sides = [one["iterations"][turn] for one in results]
        rows = []
        for number, pattern in enumerate(work.patterns):
            spans = {rank: tuple(side["spans"][number]) for rank, side in enumerate(sides) if side["spans"][number]}
            rows.append(_row(pattern.as_dict(), pattern.nbytes, spans, isolated[number], wall, len(pattern.senders)))
        iterations.append(rows)
        metadata.append(
            {
                "start_ts": min(side["began"] for side in sides) + wall,
                "tps_start_ts": [row["min_start_ts"] for row in rows],
                "tps_end_ts": [row["max_end_ts"] for row in rows],
            }
        )
    return {
        "kind": "sequential",
        "patterns": [
            {"matrix_file": one.name, "sleep_before": one.sleep_before, "sleep_after": one.sleep_after}
            for one in work.patterns
        ],
        "iterations_results": iterations,
        "metadata": {
            "ts": began,
            "iters": metadata,
            "sol_calculation_ts": min(one["isolated_from"] for one in results) + wall,
            "prepare_tp_time": max(one["prepare_seconds"] for one in results),
            "finished_ts": time.time(),
        },
    }


def _row(
    pattern: dict[str, Any], nbytes: int, spans: dict[int, Any], isolated: float | None, wall: float, senders: int
) -> dict[str, Any]:
    """Return a pattern's figures in one iteration, under KVBench's names: GB of 10^9 bytes, milliseconds, GB/s."""
    movers = _movers(pattern, spans)
    first, last = min((s for s, _ in spans.values()), default=None), max((e for _, e in spans.values()), default=None)
    return {
        "size": nbytes / 1e9,
        "latency": None if first is None or last is None else (last - first) * 1e3,
        "isolated_latency": None if isolated is None else isolated * 1e3,
        "num_senders": senders,
        "mean_bw": sum(one["gb_per_second"] for one in movers) / len(movers) if movers else 0.0,
        "min_start_ts": None if first is None else first + wall,
        "max_end_ts": None if last is None else last + wall,
        "senders": movers,
    }

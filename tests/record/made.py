"""Parts of a recorded run for tests, with figures that are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.record.files import About, Part
from bench.record.sweep import NIXL, QUICK
from bench.report import Figure, Row
from nixl_async.benchmarks.results import Results
from nixl_async.benchmarks.results import Row as SweepRow
from nixl_async.benchmarks.transfer.conductor import OURS

SYSTEM: dict[str, Any] = {
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 7.0,
    "kernel": "6.1",
    "nixl_async": "python=3.12.1 nixl-async=0.1.0",
    "nixl": "python=3.12.1 nixl-cu12=1.5.1",
}
STARTED = "2026-01-31T12:00:00+00:00"


def about(name: str, **more: Any) -> About:
    """Say of a part how it was measured."""
    settings = {"most_nbytes": QUICK.most_nbytes} if name.startswith("sweep") else {"rounds": 3, "mib": 256}
    given = {"started": STARTED, "seconds": 12.0, "load": {"others_cpu": 0.01, "stolen_cpu": 0.02}} | more
    return About(name, STARTED, ("python", "-m", "bench", "results"), "abc", False, settings, **given)


def suite(name: str, rows: Sequence[Row], **more: Any) -> Part:
    """Make the part of a suite."""
    return Part(about(name, **more), SYSTEM, tuple(rows))


def row(mine: float, theirs: float, unit: str = "GB/s", label: str = "NIXL", **case: Any) -> Row:
    """Make a row with one other."""
    return Row(
        "throughput", case or {"path": "tcp", "page": 4096}, unit, Figure("nixl_async", (mine,)), [Figure(label, (theirs,))]
    )


def sweep(
    name: str,
    points: Mapping[tuple[str, int, int], tuple[Sequence[float], Sequence[float] | None]],
    p50: Sequence[float] = (1, 1),
) -> Part:
    """Make a sweep: GB/s of ours and of NIXL's in each round, by operation, block and batch; `p50` in microseconds."""
    rows = []
    for (op, block, batch), sides in points.items():
        for label, speeds, micros in zip((OURS, NIXL), sides, p50, strict=True):
            if speeds is not None:
                phases = {"request": {"p50": (micros * 1e-6,) * len(speeds)}}
                measured: dict[str, Any] = {"throughput": tuple(speeds), "phases": phases}
                rows.append(SweepRow(label, op, block, block * batch, parameters={"batch": batch}, **measured))
    system = {**SYSTEM, "versions": {"nixl": "1.5.1"}}
    return Part(about(name), SYSTEM, sweep=Results(("python",), system, tuple(rows), started=STARTED))

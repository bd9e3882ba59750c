"""The work per head slice, where two engines shard a KV cache differently."""

from __future__ import annotations

from collections.abc import Iterator

from bench.planner import CASES
from bench.process import Worker
from bench.report import Figure, Row
from bench.session import OURS, Settings, ours

N_SLICES = 1_000_000
LIMIT_NS = 10.0


def planner(settings: Settings) -> Iterator[Row]:
    """Time a million slices of 80 layers, all at once and layer by layer."""
    n_slices = 10_000 if settings.quick else N_SLICES
    worker = Worker(ours(), "planner")
    try:
        for case in CASES:
            settings.progress(f"planner: {case}")
            found = worker.call("planner", case=case, n_slices=n_slices, repeats=3 * settings.rounds)
            for made, values in found.items():
                row = Row("planner", {"work": case, "made": made, "slices": n_slices}, "ns each", Figure(OURS, tuple(values)))
                row.at_most(LIMIT_NS, text=f"<= {LIMIT_NS:g} ns each")
                yield row
    finally:
        worker.close()

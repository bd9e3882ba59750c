"""Results made for tests: two contenders, one case each, and more rows by size."""

from __future__ import annotations

import numpy as np

# It keeps a thread for good from its first import on: not within a test.
import scipy.stats  # noqa: F401

from nixl_async.benchmarks.results import Figures, Histogram, Latencies, Raw, Results, Row, Span, Timeline

SYSTEM = {"cpu": "CPU", "cores": 2, "kernel": "6.8", "versions": {"python": "3.12"}}


def made() -> Results:
    """Return a small result in which everything occurs."""
    rows = (
        Row(
            "nixl_async",
            "write",
            65536,
            1 << 26,
            "pairwise",
            "samehost",
            "DRAM",
            "DRAM",
            {"threads": 1, "warm": True},
            throughput=(9.0, 9.5, 8.5),
            latencies=(Latencies((0.01, 0.02)), Histogram((0.0, 0.01, 0.1), (3, 4))),
            cpu_seconds_per_gb=(0.1, 0.2),
            loop_stall_p999=(0.001,),
            raw=Raw("memcpy", (10.0, 10.0)),
        ),
        Row("NIXL", "write", 65536, 1 << 26, throughput=(4.0, 4.5), figures={"goodput": Figures("requests/s", (3.0, 3.5))}),
    )
    return Results(
        ("bench", "transfer"), SYSTEM, rows, (Timeline("t", (Span("a", "b", 0.0, 1.0),)),), "2026-01-31T12:00:00+00:00"
    )


def rates(factor: float = 1.0, seed: int = 1, n: int = 9, contender: str = "nixl_async") -> Results:
    """Return results of three sizes, `n` repetitions with a spread of 2 %, everything `factor` times as fast."""
    rng = np.random.default_rng(seed)
    rows = []
    for block, speed in ((4096, 3.0), (65536, 7.0), (1 << 20, 9.0)):
        given = tuple(rng.normal(speed * factor, 0.02 * speed, n).tolist())
        latencies = tuple(Latencies(tuple((1e-3 / speed / factor * rng.lognormal(0, 0.05, 200)).tolist())) for _ in range(n))
        cpu = tuple(rng.normal(0.2 / factor, 0.002, n).tolist())
        rows.append(
            Row(contender, "write", block, 1 << 26, throughput=given, latencies=latencies, cpu_seconds_per_gb=cpu, route="tcp")
        )
    return Results(("bench",), SYSTEM, tuple(rows), started="2026-01-31")

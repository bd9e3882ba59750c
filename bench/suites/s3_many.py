"""Very many small objects in one transfer: speed, what the event loop pays, and memory."""

from __future__ import annotations

from collections.abc import Iterator

from bench.report import Figure, Row
from bench.served import JUICEFS, NGINX, serving
from bench.session import OURS, Settings
from bench.storage import (
    SOCKET,
    Samples,
    Work,
    field,
    measure,
    nixl_label,
    nixl_s3,
    ours_s3,
    raw_http,
    rows,
    turn_checked,
)

NBYTES, QUICK_COUNT = 64 << 10, 200
COUNTS = {NGINX: 10_000, JUICEFS: 2_000}
"""JuiceFS takes minutes to be given ten thousand."""
CONCURRENCY = 64
THREADS = (8, 16)
FACTOR, STALL_MS, MEMORY_MIB = 2.5, 2.0, 64.0


def many(settings: Settings, kind: str) -> Iterator[Row]:
    """Get thousands of objects of 64 KiB, 64 requests in flight; the loop is watched in turns of its own.

    Memory is what the process's peak grows beyond what it held before, the registered buffer included.
    """
    count = QUICK_COUNT if settings.quick else COUNTS[kind]
    with serving(kind, NBYTES * count, settings) as place:
        if place is None:
            return
        contenders = [ours_s3(place, loop="watched", concurrency=CONCURRENCY), *nixl_s3(settings, place, THREADS)]
        with field(contenders, raw_http(place), NBYTES * count, settings) as players:
            work = Work("read", NBYTES, count, place.where([f"many/{n:06}" for n in range(count)]))
            samples = measure(players, work, f"s3-many {kind}")
            iterations: list[float] = []
            for turn in range(2 if settings.quick else settings.rounds):
                settings.progress(f"s3-many {kind}: watching the loop, round {turn + 1}")
                mine = players.contenders[OURS]
                iterations += turn_checked(players, mine, work, turn + 1, do="move_watched")
    case = {"server": kind, "work": f"{count} x 64 KiB"}
    speed, cost = rows("s3-many", case, work, samples)
    whom = tuple(map(nixl_label, THREADS))
    speed.at_least_best(whom, FACTOR, "NIXL's best")
    cost.at_least_best(whom, 2.0, "NIXL's best")
    yield speed
    yield cost
    stall = Row("s3-many", case | {"work": "CPU of a loop iteration, p99.9"}, "ms", _p999(iterations))
    stall.at_most(STALL_MS, text=f"<= {STALL_MS:g} ms")
    yield stall
    memory = _memory(samples)
    row = Row("s3-many", case | {"work": "memory at its peak"}, "MiB more", memory.pop(OURS), list(memory.values()))
    row.at_most(MEMORY_MIB, text=f"grows <= {MEMORY_MIB:g} MiB")
    yield row


def _p999(seconds: list[float]) -> Figure:
    ordered = sorted(seconds)
    p999 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.999))]
    return Figure(OURS, (p999 * 1e3,), f"max {ordered[-1] * 1e3:.2f}, n {len(ordered)}")


def _memory(samples: Samples) -> dict[str, Figure]:
    return {
        label: Figure(label, tuple(one["rss_growth"] / 2**20 for one in taken))
        for label, taken in samples.items()
        if label != SOCKET
    }

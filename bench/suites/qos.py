"""Traffic classes: whether each gets its share, and whether what is urgent stays fast beside what is large."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from bench.process import Contender
from bench.report import Check, Figure, Row
from bench.session import OURS, Path, Settings, check, ours, pairs, start_run

WORKER = "bench.workers.classes"
N_REQUESTS, REQUEST_NBYTES = 1000, 256 << 10
SHARES = {"latency": 16 / 21, "normal": 4 / 21, "bulk": 1 / 21}
"""The library's default, 16 : 4 : 1."""
WITHIN, JAIN = 0.1, 0.95
URGENT_NBYTES, BULK_NBYTES = 1 << 20, 1 << 30
FACTOR = 2.0
_US = 1e6


def qos(settings: Settings, path: Path) -> Iterator[Row]:
    """Measure both."""
    yield from shares(settings, path)
    yield from urgent(settings, path)


def contender(path: Path) -> Contender:
    """Describe our side, with the commands of this suite."""
    return replace(ours(path), module=WORKER)


def shares(settings: Settings, path: Path) -> Iterator[Row]:
    """Keep 1,000 requests of three classes going: each class's bytes over its configured share, and fairness within it."""
    count = 30 if settings.quick else N_REQUESTS
    rounds = settings.rounds if settings.quick else max(2, settings.rounds // 2)
    taken: dict[str, list[list[int]]] = {name: [] for name in SHARES}
    nbytes = min(settings.nbytes, 64 << 20)
    with pairs([contender(path)], nbytes, settings) as started:
        pair = started[OURS]
        for turn in range(rounds):
            settings.progress(f"shares {path.name}: round {turn + 1} of {rounds}")
            _, destination = start_run(pair, "write", nbytes, 1, turn + 1)
            destination.call("blank", salt=turn + 1)
            moved = pair.initiator.call("requests", count=count, nbytes=REQUEST_NBYTES, seconds=settings.seconds)
            check(pair, destination, turn + 1)
            for name in SHARES:
                taken[name].append(moved[name])
    totals = [sum(sum(taken[name][turn]) for name in SHARES) for turn in range(rounds)]
    for name, share in SHARES.items():
        got = tuple(sum(one) / total / share if total else 0.0 for one, total in zip(taken[name], totals, strict=True))
        case = {"path": path.name, "work": f"{count} requests at once: {name} class, bytes over its share"}
        row = Row("qos", case, "of its share", Figure(OURS, got, f"configured {share:.1%}"))
        far = abs(row.ours.median - 1)
        row.checks.append(Check(f"within {WITHIN:.0%}", far, far <= WITHIN, "{:.1%}"))
        fair = min(map(_jain, taken[name]))
        row.checks.append(Check(f"Jain >= {JAIN:g}", fair, fair >= JAIN))
        least = min(min(one) for one in taken[name]) / 2**20
        row.checks.append(Check("no request starves, least MiB", least, least > 0))
        yield row


def urgent(settings: Settings, path: Path) -> Iterator[Row]:
    """Time writes of 1 MiB in the latency class, alone and beside bulk transfers of 1 GiB, in turns; p99."""
    count = max(5, settings.count // settings.rounds // 2)
    times = max(1, (4 << 20 if settings.quick else BULK_NBYTES) // settings.nbytes)
    alone: list[float] = []
    beside: list[list[float]] = []
    bulk: list[float] = []
    with pairs([contender(path)], settings.nbytes, settings) as started:
        pair = started[OURS]
        for turn in range(settings.rounds + 1):
            settings.progress(f"urgent {path.name}: round {turn} of {settings.rounds}")
            _, destination = start_run(pair, "write", settings.nbytes, 1, turn + 1)
            destination.call("blank", salt=turn + 1)
            quiet = pair.initiator.call("urgent", count=count, nbytes=URGENT_NBYTES)
            result = pair.initiator.call("urgent_beside_bulk", count=count, nbytes=URGENT_NBYTES, times=times)
            check(pair, destination, turn + 1)
            if turn:
                alone += quiet
                beside.append(result["seconds"])
                bulk.append(result["bulk"])
    note = f"alone {_p99(alone) * _US:.0f}, bulk {statistics.median(bulk) / 1e9:.1f} GB/s"
    figure = Figure(OURS, tuple(_p99(one) * _US for one in beside), note)
    row = Row("qos", {"path": path.name, "work": "1 MiB, latency class, beside 1 GiB of bulk: p99"}, "us", figure)
    row.at_most(FACTOR, _p99(list(chain(*beside))) / _p99(alone), f"<= {FACTOR:g}x of alone")
    yield row


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[int(0.99 * (len(seconds) - 1))]


def _jain(values: list[int]) -> float:
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0

"""How soon a stream of transfers goes on by the next route when the one it takes is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.report import Figure, Row
from bench.session import OURS, Path, Settings, check, ours, pairs, start_run

WORKER = "bench.workers.failing"
CUTS = 50
PAGE_NBYTES = 1 << 20
LIMIT_MS = 50.0
CASES = (
    (("samehost", "tcp"), "the kernel refuses copies between the processes"),
    (("tcp", "ucx"), "its connections are reset, and no new one is to be had"),
    (("ucx", "tcp"), "its endpoint fails, and no other is to be had"),
    (("tcp",), "its connections are reset: by new ones"),
)
_MS = 1e3


def failover(settings: Settings) -> Iterator[Row]:
    """Cut each route while 32 transfers of 1 MiB follow each other, four at a time, and heal it; every byte is checked."""
    cuts = 4 if settings.quick else max(CUTS, settings.rounds)
    nbytes = 16 << 20 if settings.quick else 32 << 20
    for backends, what in CASES:
        first, second = backends[0], backends[-1]
        contender = replace(ours(Path("", backends)), module=WORKER)
        with pairs([contender], nbytes, settings) as started:
            pair = started[OURS]
            n_pages = nbytes // PAGE_NBYTES
            for op in ("write", "read"):
                seconds: list[float] = []
                for turn in range(cuts + 1):
                    settings.progress(f"failover {first} to {second}, {op}: cut {turn} of {cuts}")
                    _, destination = start_run(pair, op, PAGE_NBYTES, n_pages, turn + 1)
                    destination.call("blank", salt=turn + 1)
                    # Now one, now another stage of the stream.
                    after = 2 + turn % (n_pages // 2)
                    found = pair.initiator.call("stream", first=first, second=second, after=after)
                    check(pair, destination, turn + 1)
                    if turn:
                        seconds.append(found)
                figure = Figure(
                    OURS, tuple(one * _MS for one in seconds), f"p99 {_p99(seconds) * _MS:.1f}, max {max(seconds) * _MS:.1f}"
                )
                row = Row("failover", {"from": first, "to": second, "cut": what, "op": op}, "ms", figure)
                row.at_most(LIMIT_MS, text=f"p50 <= {LIMIT_MS:g} ms")
                yield row


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * 0.99))]

"""How long the event loop is kept busy or late while 1 GiB moves, on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.process import Pair
from bench.report import Figure, Row
from bench.session import OURS, Path, Settings, check, nixl, ours, pairs, start_run
from bench.workers.ours import WATCHED

LIMIT_MS = 1.0
PAGES = (4096, 65536)
_MS = 1e3
SIDES = ("initiator", "target")


def stall(settings: Settings, path: Path) -> Iterator[Row]:
    """Move 1 GiB in one transfer: thread CPU of each loop iteration, and in runs of its own the lag of a 1 ms ticker.

    NIXL is polled with `sleep(0)` by its initiator and every millisecond for notifications by its target.
    """
    # What is so little that the call itself copies it has no iteration of the loop.
    nbytes = max(settings.nbytes, 16 << 20) if settings.quick else 4 * settings.nbytes
    watched = ours(path)
    watched = replace(watched, environment=watched.environment | {WATCHED: "1"})
    with pairs([watched, *nixl(settings, path)[:1]], nbytes, settings) as started:
        for page in PAGES:
            yield from _page(started, settings, path.name, nbytes, page)


def _page(started: dict[str, Pair], settings: Settings, path: str, nbytes: int, page: int) -> Iterator[Row]:
    found: dict[tuple[str, str, str], list[float]] = {}
    # Three hundred iterations a round: fewer rounds than these would make the longest of all the p99.9.
    rounds = settings.rounds if settings.quick else 2 * settings.rounds
    for turn in range(rounds + 1):
        for label, pair in started.items():
            seed = page + turn
            _, destination = start_run(pair, "write", page, nbytes // page, seed)
            for measured, ticker in (("cpu", False), ("lag", True)):
                settings.progress(f"stall {path}, {page} B pages, {measured}: {label}, round {turn} of {rounds}")
                with pair.turn():
                    destination.call("blank", salt=seed)
                    pair.target.send("be_watched", ticker=ticker)
                    results = {"initiator": pair.initiator.call("move_watched", ticker=ticker)}
                    results["target"] = pair.target.receive()
                    check(pair, destination, seed)
                if turn:
                    for side in SIDES:
                        found.setdefault((label, side, measured), []).extend(results[side][measured])
    for side in SIDES:
        for measured, work in (("cpu", "CPU of an iteration"), ("lag", "wall lag")):
            figures = {
                label: _p999(label, values)
                for (label, where, what), values in found.items()
                if (where, what) == (side, measured) and values
            }
            mine = figures.pop(OURS)
            case = {"path": path, "page": page, "side": side, "p99.9 of": work}
            row = Row("stall", case, "ms", mine, list(figures.values()))
            if measured == "cpu":
                row.at_most(LIMIT_MS, text=f"<= {LIMIT_MS:g} ms")
            yield row


def _p999(label: str, seconds: list[float]) -> Figure:
    ordered = sorted(seconds)
    # The nearest rank above: with fewer than a thousand iterations it is the longest of them.
    p999 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.999))]
    return Figure(label, (p999 * _MS,), f"max {ordered[-1] * _MS:.2f}, n {len(ordered)}")

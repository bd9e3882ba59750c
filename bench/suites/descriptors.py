"""The work per descriptor, and what sending the same descriptors again costs."""

from __future__ import annotations

from collections.abc import Iterator

from bench.process import Worker
from bench.report import Figure, Row
from bench.session import NIXL, OURS, SAME_HOST, Settings, check, nixl, ours, pairs, start_run

N_PAGES = 131_072
PAGE = 2048
LIMIT_NS, LIMIT_AGAIN_US = 10.0, 100.0
STEPS = {
    "build": "build and validate page indices",
    "plan": "pair, check, coalesce; random order",
    "plan runs": "the same, runs of 16 neighbours",
}


def descriptors(settings: Settings) -> Iterator[Row]:
    """Time each step for 131,072 pages, then a prepared transfer of as many pages sent a second time."""
    n_pages = 4096 if settings.quick else N_PAGES
    settings.progress(f"descriptors: {n_pages} pages")
    worker = Worker(ours(), "descriptors")
    try:
        seconds = worker.call("descriptors", n_pages=n_pages, repeats=3 * settings.rounds)
    finally:
        worker.close()
    for step, work in STEPS.items():
        figure = Figure(OURS, tuple(value / n_pages * 1e9 for value in seconds[step]))
        row = Row("descriptors", {"work": work, "descriptors": n_pages}, "ns each", figure)
        row.at_most(LIMIT_NS, text=f"<= {LIMIT_NS:g} ns each")
        yield row
    yield from _again(settings, n_pages)


def _again(settings: Settings, n_pages: int) -> Iterator[Row]:
    again: dict[str, list[float]] = {}
    first: list[float] = []
    with pairs([ours(SAME_HOST), *nixl(settings)[:1]], n_pages * PAGE, settings) as started:
        destinations = {label: start_run(pair, "write", PAGE, n_pages, 1)[1] for label, pair in started.items()}
        for turn in range(settings.rounds):
            for label, pair in started.items():
                settings.progress(f"prepared transfer: {label}, round {turn + 1} of {settings.rounds}")
                with pair.turn():
                    destinations[label].call("blank", salt=turn)
                    result = pair.initiator.call("prepare_again", count=3)
                    if label == OURS:
                        check(pair, destinations[label], 1)
                again.setdefault(label, []).extend(value * 1e6 for value in result["again"])
                first += [value * 1e6 for value in result.get("first", ())]
    case = {"work": "a prepared transfer's preparation, second time", "descriptors": n_pages}
    mine = Figure(OURS, tuple(again.pop(OURS)), f"first {Figure('', tuple(first)).median:.0f}")
    row = Row("descriptors", case, "us", mine, [Figure(NIXL, tuple(values), "prepared lists") for values in again.values()])
    row.at_most(LIMIT_AGAIN_US, text=f"<= {LIMIT_AGAIN_US:g} us")
    yield row

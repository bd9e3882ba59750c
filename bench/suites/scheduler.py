"""What the scheduler costs: for each transfer, however many wait, and for each page."""

from __future__ import annotations

from collections.abc import Iterator

from bench.process import Worker
from bench.report import Figure, Row
from bench.session import DEFAULT, OURS, SAME_HOST, Settings, check, pairs, start_run
from bench.suites.qos import contender

COUNTS = (1000, 10_000, 100_000)
N_PAGES = 131_072
PLACE = 4096
BUFFER = 16 << 20
LIMIT_US, LIMIT_NS, FLAT = 15.0, 5.0, 1.25


def scheduler(settings: Settings) -> Iterator[Row]:
    """Time the scheduler alone, then `agent.submit` to awaited, with 1,000 to 100,000 transfers of 4 KiB at once."""
    counts, n_pages = ((50, 200), 4096) if settings.quick else (COUNTS, N_PAGES)
    worker = Worker(contender(DEFAULT), "scheduler")
    alone: dict[int, list[float]] = {count: [] for count in counts}
    per_page: dict[str, list[float]] = {"scheduled": [], "cut": []}
    try:
        for turn in range(settings.rounds):
            settings.progress(f"scheduler alone: round {turn + 1} of {settings.rounds}")
            for count in counts:
                alone[count] += worker.call("scheduler_transfers", count=count, repeats=1)
            for step, seconds in worker.call("scheduler_pages", count=n_pages, repeats=3).items():
                per_page[step] += [value * 1e9 for value in seconds]
    finally:
        worker.close()
    least = Figure(OURS, tuple(alone[counts[0]])).median
    for count in counts:
        row = _row("scheduler alone, each transfer", count, "us", Figure(OURS, tuple(value * 1e6 for value in alone[count])))
        row.at_most(LIMIT_US, text=f"<= {LIMIT_US:g} us")
        row.at_most(FLAT, row.ours.median / (least * 1e6), f"<= {FLAT:g}x of {counts[0]} at once")
        yield row
    row = _row("scheduler alone, each page", 1, "ns", Figure(OURS, tuple(per_page["scheduled"])))
    row.at_most(LIMIT_NS, text=f"<= {LIMIT_NS:g} ns")
    yield row
    yield _row("cutting a plan to a backend's limits, each page", 1, "ns", Figure(OURS, tuple(per_page["cut"])))
    yield from _end_to_end(settings, counts)


def _end_to_end(settings: Settings, counts: tuple[int, ...]) -> Iterator[Row]:
    samples: dict[int, list[float]] = {count: [] for count in counts}
    with pairs([contender(SAME_HOST)], BUFFER, settings) as started:
        pair = started[OURS]
        for turn in range(settings.rounds + 1):
            for count in counts:
                settings.progress(f"agent.submit, {count} at once: round {turn} of {settings.rounds}")
                _, destination = start_run(pair, "write", BUFFER, 1, turn + 1)
                destination.call("blank", salt=turn + 1)
                value = pair.initiator.call("submit_many", count=count, nbytes=PLACE)
                if count * PLACE >= BUFFER:
                    check(pair, destination, turn + 1)
                if turn:
                    samples[count].append(value / count * 1e6)
    for count in counts:
        row = _row("agent.submit to awaited, loop thread's CPU", count, "us", Figure(OURS, tuple(samples[count])))
        row.at_most(LIMIT_US, text=f"<= {LIMIT_US:g} us")
        yield row


def _row(work: str, count: int, unit: str, figure: Figure) -> Row:
    return Row("scheduler", {"work": work, "at once": count}, unit, figure)

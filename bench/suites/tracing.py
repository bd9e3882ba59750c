"""What the spans of transfers cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from bench.process import Pair, Worker
from bench.report import Check, Figure, Row
from bench.session import OURS, Path, Settings, alternate, check, ours, pairs, start_run

PAGE = 64 << 10
BATCHES = (16, 64, 256, 1024)
WAYS = (None, "not sampled", "recorded")
REPEATS = 6
"""How many times each way has its turn in a round: a turn is some tens of milliseconds, which is little beside a disturbance."""
LEAST = 0.95
_GB = 1e9


def tracing(settings: Settings, path: Path) -> Iterator[Row]:
    """Move pages of 64 KiB, some of them a transfer, without spans (the row's own figure), with spans not sampled, and recorded."""
    side = replace(ours(path), module="bench.workers.traced")
    with pairs([side], settings.nbytes, settings) as started:
        for batch in BATCHES:
            if batch * PAGE <= settings.nbytes:
                yield _row(settings, path, started, batch)


def _row(settings: Settings, path: Path, started: dict[str, Pair], batch: int) -> Row:
    n_pages, seed = settings.nbytes // PAGE, batch
    _, destination = start_run(started[OURS], "write", PAGE, n_pages, seed)
    turn = 0

    def once(pair: Pair) -> dict[str | None, float]:
        nonlocal turn
        found: dict[str | None, list[float]] = {way: [] for way in WAYS}
        for repeat in range(1 if settings.quick else REPEATS):
            # Who comes first finds other caches than who comes last.
            first = repeat % len(WAYS)
            for way in (*WAYS[first:], *WAYS[:first]):
                turn += 1
                found[way].append(_move(pair, destination, seed, turn, way, n_pages, batch))
        return {way: statistics.median(seconds) for way, seconds in found.items()}

    (samples,) = alternate(started, settings, f"{path.name}, {batch} pages a transfer", once).values()
    figures = {way: tuple(n_pages * PAGE / sample[way] / _GB for sample in samples) for way in WAYS}
    others = [Figure(f"spans {way}", figures[way]) for way in WAYS if way is not None]
    row = Row("tracing", {"path": path.name, "pages a transfer": batch}, "GB/s", Figure(OURS, figures[None]), others)
    for figure in others:
        share = figure.median / row.ours.median
        row.checks.append(Check(f">= {LEAST:.0%} with {figure.label}", share, share >= LEAST, "{:.1%}"))
    return row


def _move(pair: Pair, destination: Worker, salt: int, blank: int, way: str | None, n_pages: int, batch: int) -> float:
    """Return the seconds that one move of every page took.

    Raises:
        AssertionError: other spans came out than one for each transfer.
    """
    destination.call("blank", salt=blank)
    found: dict[str, float] = pair.initiator.call("move_traced", spans=way, batch=batch)
    check(pair, destination, salt)
    wanted = -(-n_pages // batch) if way == "recorded" else 0
    if found["spans"] != wanted:
        raise AssertionError(f"{found['spans']} spans were exported, {wanted} wanted")
    return found["seconds"]

"""NIXL's polled API: the drop-in and NIXL itself, asked by the same program, on one host."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.process import Contender, Pair
from bench.report import Figure, Row
from bench.session import NIXL, OURS, Settings, alternate, check, move_checked, nixl, pairs

N_PAGES = 64
BUFFER = 1 << 20
SMALL = 4096
IDLE_PERCENT = 1.0
COUNTS = (1, 64, 1024)
"""Pages of the lists that are prepared and of the transfers that are made."""
CALL_NBYTES = 1024
SAMPLES = 200
MOVES = 20
"""How many moves are one sample: a single one is too short to be timed beside what the machine does."""
_US = 1e6


def compat(settings: Settings) -> Iterator[Row]:
    """Prepare lists and make transfers; move 64 pages, from their indices to the state DONE; post 4 KiB again; do nothing."""
    contenders = [Contender(OURS, "bench.workers.compat"), *nixl(settings)[:1]]
    with pairs(contenders, BUFFER, settings) as started:
        for n_pages in COUNTS:

            def calls(pair: Pair, n_pages: int = n_pages) -> dict[str, float]:
                _ready(pair, CALL_NBYTES, n_pages, 1)
                move_checked(pair, pair.target, 1, 2)
                found: dict[str, float] = pair.initiator.call("calls", count=20 if settings.quick else SAMPLES)
                return found

            taken = alternate(started, settings, f"compat, calls for {n_pages}", calls)
            for work in next(iter(taken.values()))[0]:
                samples = {label: [one[work] * _US for one in found] for label, found in taken.items()}
                yield _row({"work": work, "pages": n_pages}, "us", samples, NIXL)
    for page_nbytes in settings.pages:
        with pairs(contenders, N_PAGES * page_nbytes, settings) as started:

            def move(pair: Pair, page_nbytes: int = page_nbytes) -> float:
                _ready(pair, page_nbytes, N_PAGES, 1)
                # The first move of a process, checked, is also what warms it up.
                move_checked(pair, pair.target, 1, 2)
                taken = [pair.initiator.call("move")["seconds"] for _ in range(2 if settings.quick else MOVES)]
                return sorted(taken)[len(taken) // 2] * _US

            samples = alternate(started, settings, f"compat, pages of {page_nbytes}", move)
        yield _row({"work": f"{N_PAGES} pages: choose, post, poll", "page": page_nbytes}, "us", samples, NIXL)
    with pairs(contenders, BUFFER, settings) as started:

        def post(pair: Pair) -> float:
            _ready(pair, SMALL, 1, 3)
            pair.target.call("blank", salt=4)
            count = max(2, settings.count // settings.rounds)
            taken: list[float] = pair.initiator.call("latency", nbytes=SMALL, count=count, prepared=True)
            check(pair, pair.target, 3)
            return sorted(taken)[len(taken) // 2] * _US

        def idle(pair: Pair) -> float:
            before = pair.target.call("usage")
            time.sleep(settings.seconds)
            after = pair.target.call("usage")
            return float((after["cpu"] - before["cpu"]) / (after["at"] - before["at"]) * 100)

        small = alternate(started, settings, "compat, small", post)
        yield _row({"work": "one page of 4 KiB, posted again"}, "us", small, NIXL)
        row = _row({"work": "CPU of an idle agent"}, "% of a core", alternate(started, settings, "compat, idle", idle), None)
        row.at_most(IDLE_PERCENT, text="below 1 % of a core")
        yield row


def _ready(pair: Pair, page_nbytes: int, n_pages: int, seed: int) -> None:
    """Fill the source and tell both sides what comes, within a turn."""
    pair.initiator.call("fill", salt=seed)
    for side in (pair.initiator, pair.target):
        side.call("ready", op="write", page_nbytes=page_nbytes, n_pages=n_pages, seed=seed)


def _row(case: dict[str, object], unit: str, samples: dict[str, list[float]], against: str | None) -> Row:
    figures = {label: Figure(label, tuple(values)) for label, values in samples.items()}
    mine = figures.pop(OURS)
    row = Row("compat", case, unit, mine, list(figures.values()))
    if against is not None:
        row.at_least(against, 1.0)
    return row

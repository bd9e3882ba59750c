"""Very many small transfers to one peer at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.report import Figure, Row
from bench.session import OURS, Path, Settings, check, nixl, ours, pairs, start_run

COUNT, NBYTES = 10_000, 4096
LIMIT_US = 25.0
MEMORY_MIB = 256.0
"""What "bounded" means here: about 26 KiB for each transfer in flight."""


def many(settings: Settings, path: Path) -> Iterator[Row]:
    """Submit 10,000 writes of 4 KiB, then await them all: time for each, and how much memory that took at its peak."""
    count = 200 if settings.quick else COUNT
    with pairs([ours(path), *nixl(settings, path)], count * NBYTES, settings) as started:
        samples: dict[str, list[dict[str, Any]]] = {label: [] for label in started}
        for turn in range(settings.rounds + 1):
            for label, pair in started.items():
                settings.progress(f"many {path.name}: {label}, round {turn} of {settings.rounds}")
                # The transfers pair place i with place i: one page of everything checks that.
                _, destination = start_run(pair, "write", count * NBYTES, 1, turn + 1)
                with pair.turn():
                    destination.call("blank", salt=turn + 1)
                    result = pair.initiator.call("many", count=count, nbytes=NBYTES)
                    check(pair, destination, turn + 1)
                if turn:
                    samples[label].append(result)
        figures = {
            label: Figure(label, tuple(one["seconds"] / count * 1e6 for one in taken), f"+{_peak(taken):.0f} MiB")
            for label, taken in samples.items()
        }
        mine = figures.pop(OURS)
        case = {"path": path.name, "work": f"{count} writes of 4 KiB at once, each"}
        row = Row("many", case, "us", mine, list(figures.values()))
        row.at_most(LIMIT_US, text=f"<= {LIMIT_US:g} us each")
        row.at_most(MEMORY_MIB, _peak(samples[OURS]), f"peak memory grows <= {MEMORY_MIB:g} MiB")
        yield row


def _peak(taken: list[dict[str, Any]]) -> float:
    return max(float(one["rss_growth"]) for one in taken) / 2**20

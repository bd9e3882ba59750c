"""How long one small operation takes, from the call to its awaited completion."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.process import Pair
from bench.report import Figure, Row
from bench.session import OURS, TCP, Path, Settings, check, nixl, ours, pairs, start_run

NBYTES = 4096
BUFFER = 1 << 20
SAME_HOST_LIMIT_US = {True: 20.0, False: 40.0}
TCP_LIMIT_US = 80.0
NOTIFICATION_LIMIT_US = 200.0
WARM_UP = 50
_US = 1e6


def page(settings: Settings, path: Path) -> Iterator[Row]:
    """Write one 4 KiB page at a time: prepared (the same descriptors again) and not."""
    with pairs([ours(path), *nixl(settings, path)], BUFFER, settings) as started:
        for prepared in (True, False):
            what = "prepared" if prepared else "not prepared"
            samples = {label: list[float]() for label in started}
            for turn in range(settings.rounds):
                for label, pair in started.items():
                    settings.progress(f"latency {path.name}, {what}: {label}, round {turn + 1} of {settings.rounds}")
                    _, destination = start_run(pair, "write", NBYTES, 1, turn + 1)
                    with pair.turn():
                        destination.call("blank", salt=turn + 1)
                        _small(pair, WARM_UP, prepared)
                        samples[label] += _small(pair, -(-settings.count // settings.rounds), prepared)
                        check(pair, destination, turn + 1)
            row = _row("latency", {"path": path.name, "work": f"4 KiB page, {what}"}, samples)
            limit = TCP_LIMIT_US if path is TCP else SAME_HOST_LIMIT_US[prepared]
            row.at_most(limit, text=f"p50 <= {limit:g} us")
            yield row


def _small(pair: Pair, count: int, prepared: bool) -> list[float]:
    seconds: list[float] = pair.initiator.call("latency", nbytes=NBYTES, count=count, prepared=prepared)
    return seconds


def notification(settings: Settings, path: Path) -> Iterator[Row]:
    """Write 4 KiB, notify, and await the answering notification."""
    count = max(1, settings.count // 5 // settings.rounds)
    with pairs([ours(path), *nixl(settings, path)], BUFFER, settings) as started:
        samples = {label: list[float]() for label in started}
        for turn in range(settings.rounds + 1):
            for label, pair in started.items():
                settings.progress(f"notification {path.name}: {label}, round {turn} of {settings.rounds}")
                _, destination = start_run(pair, "write", NBYTES, 1, turn + 1)
                with pair.turn():
                    destination.call("blank", salt=turn + 1)
                    pair.target.send("respond", count=count)
                    seconds = pair.initiator.call("round_trips", nbytes=NBYTES, count=count)
                    pair.target.receive()
                    check(pair, destination, turn + 1)
                if turn:
                    samples[label] += seconds
        row = _row("notification", {"path": path.name, "work": "4 KiB write + notification + answer"}, samples)
        row.at_most(NOTIFICATION_LIMIT_US, text=f"p50 <= {NOTIFICATION_LIMIT_US:g} us")
        yield row


def _row(command: str, case: dict[str, object], samples: dict[str, list[float]]) -> Row:
    figures = {label: _figure(label, values) for label, values in samples.items()}
    mine = figures.pop(OURS)
    return Row(command, case, "us", mine, list(figures.values()))


def _figure(label: str, seconds: list[float]) -> Figure:
    values = tuple(value * _US for value in seconds)
    p99 = statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]
    return Figure(label, values, f"p99 {p99:.0f}")

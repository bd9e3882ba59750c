"""Whether a peer whose interpreter is busy still serves its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from bench.process import Pair, Worker
from bench.report import Figure, Row
from bench.session import OURS, UCX_TCP, Path, Settings, check, move_checked, nixl, ours, pairs, start_run

PAGE = 65536
SHARE = 0.5


def busy_peer(settings: Settings, path: Path) -> Iterator[Row]:
    """Pull everything from a target that spins in pure Python on its loop's thread; a share of the speed without that."""
    contenders = [ours(path), *([] if path is UCX_TCP else nixl(settings, path)[:1])]
    n_pages = settings.nbytes // PAGE
    with pairs(contenders, settings.nbytes, settings) as started:
        shares: dict[str, list[float]] = {label: [] for label in started}
        notes: dict[str, str] = {}
        rounds = max(1, settings.rounds // 3)
        destinations = {label: start_run(pair, "read", PAGE, n_pages, 1)[1] for label, pair in started.items()}
        for turn in range(rounds):
            for label, pair in started.items():
                settings.progress(f"busy peer {path.name}: {label}, round {turn + 1} of {rounds}")
                with pair.turn():
                    share, within = _share(pair, destinations[label], settings)
                shares[label].append(share)
                if not within:
                    notes[label] = "only after the peer was free again"
        figures = {label: Figure(label, tuple(values), notes.get(label, "")) for label, values in shares.items()}
        mine = figures.pop(OURS)
        row = Row("busy-peer", {"path": path.name, "work": "256 MiB pull"}, "of normal speed", mine, list(figures.values()))
        row.at_least_value(SHARE, f">= {SHARE:.0%} of normal speed", "{:.0%}")
        yield row


def _share(pair: Pair, destination: Worker, settings: Settings) -> tuple[float, bool]:
    normal = statistics.median(move_checked(pair, destination, 1, turn)["seconds"] for turn in range(4))
    destination.call("blank", salt=9)
    end = pair.target.call("spin", seconds=settings.seconds)
    seconds = pair.initiator.call("move")["seconds"]
    within = time.monotonic() < end
    check(pair, destination, 1)
    pair.target.call("usage")
    return normal / seconds, within

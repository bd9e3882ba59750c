"""What it costs to compare both sides of a transfer by checksums, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.process import Pair, Worker
from bench.report import Figure, Row
from bench.session import OURS, Path, Settings, alternate, check, ours, pairs, start_run

ALGORITHMS = ("crc32c", "xxh3")
PAGES = (4096, 65536, 1 << 20)
_GB = 1e9


def verify(settings: Settings, path: Path) -> Iterator[Row]:
    """Move pages in random order without `verify`, which is the row's own figure, and with each of its algorithms."""
    with pairs([ours(path)], settings.nbytes, settings) as started:
        for op in ("write", "read"):
            for page in PAGES:
                if page in settings.pages:
                    yield _row(settings, path, started, op, page)


def _row(settings: Settings, path: Path, started: dict[str, Pair], op: str, page: int) -> Row:
    n_pages, seed = settings.nbytes // page, page + (op == "write")
    _, destination = start_run(started[OURS], op, page, n_pages, seed)
    turn = 0

    def once(pair: Pair) -> dict[str | None, tuple[float, float]]:
        nonlocal turn
        found = {}
        for algorithm in (None, *ALGORITHMS):
            turn += 1
            found[algorithm] = _move(pair, destination, seed, turn, algorithm)
        return found

    (samples,) = alternate(started, settings, f"{path.name} {op}, {page} B pages", once).values()
    figures = [
        Figure(
            f"verify={algorithm}" if algorithm else OURS,
            tuple(n_pages * page / sample[algorithm][0] / _GB for sample in samples),
            f"{_median([sample[algorithm][1] for sample in samples]) / (n_pages * page / _GB):.2f} CPU s/GB",
        )
        for algorithm in (None, *ALGORITHMS)
    ]
    return Row("verify", {"path": path.name, "op": op, "page": page}, "GB/s", figures[0], figures[1:])


def _move(pair: Pair, destination: Worker, salt: int, blank: int, algorithm: str | None) -> tuple[float, float]:
    """Return the seconds that one move took, and the CPU seconds of both sides."""
    destination.call("blank", salt=blank)
    before = pair.target.call("usage")["cpu"]
    result: dict[str, Any] = pair.initiator.call("move", verify=algorithm)
    after = pair.target.call("usage")["cpu"]
    check(pair, destination, salt)
    return result["seconds"], result["cpu"] + after - before


def _median(values: list[float]) -> float:
    return Figure("", tuple(values)).median

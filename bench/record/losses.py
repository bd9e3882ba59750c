"""Where we lose: every row in which a peer is faster or spends less, by more than 5 %, and every target that is missed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.record.files import Part
from bench.record.ratios import SLOWER, Ratio, paired
from bench.record.sweep import NIXL
from bench.report import Figure, Row, number, size
from nixl_async.benchmarks.results import Row as SweepRow
from nixl_async.benchmarks.transfer.conductor import OURS

VARIANTS = ("nixl_async", "verify=", "spans ")
"""How labels of our own begin: they are beside a row for information."""


@dataclass(frozen=True)
class Cell:
    """A point of a sweep: what was moved, both speeds in GB/s, and their ratio; without NIXL only ours."""

    part: str
    op: str
    block: int
    batch: int
    ours: float
    nixl: float | None
    ratio: Ratio | None
    p50: tuple[float | None, float | None]
    """Of a request, ours and NIXL's, seconds."""

    @property
    def p50_ratio(self) -> float | None:
        """How many times as short our median request is as NIXL's."""
        ours, theirs = self.p50
        return theirs / ours if ours and theirs else None

    @property
    def case(self) -> str:
        """What was moved."""
        return f"{self.op}, {size(self.block)} x {self.batch}"


def cells(part: Part) -> list[Cell]:
    """Return the points of a sweep."""
    if part.sweep is None:
        return []
    found: dict[tuple[str, int, int], dict[str, SweepRow]] = {}
    for row in part.sweep.rows:
        found.setdefault((row.op, row.block_nbytes, int(row.parameters["batch"])), {})[row.contender] = row
    made = []
    for (op, block, batch), sides in found.items():
        mine, theirs = sides[OURS], sides.get(NIXL)
        ratio = None if theirs is None else paired(mine.throughput, theirs.throughput)
        speed = None if theirs is None else statistics.median(theirs.throughput)
        p50 = _p50(mine), None if theirs is None else _p50(theirs)
        made.append(Cell(part.about.part, op, block, batch, statistics.median(mine.throughput), speed, ratio, p50))
    return made


def _p50(row: SweepRow) -> float | None:
    values = row.phases.get("request", {}).get("p50")
    return statistics.median(values) if values else None


def peers(row: Row) -> list[Figure]:
    """Return the figures of others' programs in a row."""
    return [figure for figure in row.others if not figure.label.startswith(VARIANTS)]


def lost(row: Row, figure: Figure) -> bool:
    """Whether a peer is better than we are by more than 5 %."""
    return row.ratio(figure) < SLOWER


@dataclass(frozen=True)
class Loss:
    """A row in which a peer is better: ours and the best peer's figure as text with the unit, and our ratio to it (below 1)."""

    part: str
    case: str
    peer: str
    ours: str
    theirs: str
    ratio: float
    also: str
    """What else is lost in the row."""
    doubt: str
    """What keeps it from being sure; empty if nothing does."""


@dataclass(frozen=True)
class Miss:
    """A target that a row misses."""

    part: str
    case: str
    target: str
    found: str


def losses(parts: Iterable[Part]) -> list[Loss]:
    """Return every row in which a peer is better than we are: part by part, the worst first."""
    return [loss for part in parts for loss in sorted([*_of_sweep(part), *_of_rows(part)], key=lambda one: one.ratio)]


def _of_sweep(part: Part) -> Iterator[Loss]:
    for cell in cells(part):
        if cell.ratio is None or cell.nixl is None:
            continue
        times = [time_text(one or 0.0) for one in cell.p50]
        slow = cell.p50_ratio is not None and cell.p50_ratio < SLOWER
        if cell.ratio.slower:
            also = f"median request {times[0]}, its {times[1]}: {cell.p50_ratio:.2f}" if slow else ""
            between = f"{cell.ratio.rounds} rounds: {cell.ratio.low:.2f} to {cell.ratio.high:.2f}"
            sides = f"{number(cell.ours)} GB/s", f"{number(cell.nixl)} GB/s"
            doubt = between if cell.ratio.doubtful else ""
            yield Loss(part.about.part, cell.case, "NIXL", *sides, cell.ratio.median, also, doubt)
        elif slow and cell.p50_ratio is not None:
            yield Loss(part.about.part, f"{cell.case}, median request", "NIXL", times[0], times[1], cell.p50_ratio, "", "")


def _of_rows(part: Part) -> Iterator[Loss]:
    for row in part.rows:
        better = sorted((figure for figure in peers(row) if lost(row, figure)), key=row.ratio)
        if not better:
            continue
        best, *others = better
        sides = f"{number(row.ours.median)} {row.unit}", f"{number(best.median)} {row.unit}"
        also = "; ".join(f"{figure.label} {row.ratio(figure):.2f}" for figure in others)
        yield Loss(part.about.part, case_text(row.case), best.label, *sides, row.ratio(best), also, _overlap(row.ours, best))


def _overlap(ours: Figure, theirs: Figure) -> str:
    """Say that the quartiles of the two overlap, where they do."""
    (a, b), (c, d) = ours.quartiles, theirs.quartiles
    return "quartiles overlap" if max(a, c) <= min(b, d) else ""


def misses(parts: Iterable[Part]) -> list[Miss]:
    """Return every target that a row misses."""
    return [
        Miss(part.about.part, case_text(row.case), check.target, shown(check.shown, check.value))
        for part in parts
        for row in part.rows
        for check in row.checks
        if check.met is False
    ]


def shown(form: str, value: float | None) -> str:
    """Write what a target's figure is; JSON has no infinity."""
    return "∞" if value is None else form.format(value)


def case_text(case: Mapping[str, Any]) -> str:
    """Write a row's case in words."""
    return ", ".join(_part_of_case(key, value) for key, value in case.items())


def _part_of_case(key: str, value: Any) -> str:
    says_what_it_is = isinstance(value, str) and " " not in key
    return value_text(key, value) if says_what_it_is else f"{key} {value_text(key, value)}"


def time_text(seconds: float) -> str:
    """Write a time."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def value_text(key: str, value: Any) -> str:
    """Write one value of a case; sizes of pages as people do."""
    return size(value) if key == "page" and isinstance(value, int) else str(value)


def judged(parts: Sequence[Part]) -> dict[str, int]:
    """Count rows by how we stand beside each peer in them, and targets by whether they are met."""
    ratios = [row.ratio(figure) for part in parts for row in part.rows for figure in peers(row)]
    checks = [check.met for part in parts for row in part.rows for check in row.checks]
    return {
        "better": sum(ratio > 1 / SLOWER for ratio in ratios),
        "equal": sum(SLOWER <= ratio <= 1 / SLOWER for ratio in ratios),
        "worse": sum(ratio < SLOWER for ratio in ratios),
        "met": sum(met is True for met in checks),
        "missed": sum(met is False for met in checks),
        "not judged": sum(met is None for met in checks),
    }

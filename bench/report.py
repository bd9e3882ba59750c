"""What a measurement is, how it is judged, and how it is shown: a table for people, JSON lines for programs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

HIGHER_IS_BETTER = frozenset({"GB/s", "of normal speed"})


@dataclass(frozen=True)
class Figure:
    """One contender's samples in a row; what counts is the median."""

    label: str
    samples: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, relative to the median."""
        low, high = self.quartiles
        return (high - low) / 2 / self.median if self.median else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what programs get."""
        low, high = self.quartiles
        return {
            "label": self.label,
            "median": self.median,
            "q1": low,
            "q3": high,
            "min": min(self.samples),
            "max": max(self.samples),
            "n": len(self.samples),
            "samples": list(self.samples),
        } | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Check:
    """One promise about a row: its wording, the figure that decides and how to write it, and whether it is met.

    `met` is `None` when the promise is not judged.
    """

    target: str
    value: float
    met: bool | None
    shown: str = "{:.3g}"


@dataclass
class Row:
    """One line of a result: the case, our figure, the others', the raw limit, and the promises."""

    command: str
    case: dict[str, Any]
    unit: str
    ours: Figure
    others: list[Figure] = field(default_factory=list)
    raw: Figure | None = None
    checks: list[Check] = field(default_factory=list)

    def ratio(self, other: Figure) -> float:
        """Return how many times better our median is than `other`'s."""
        mine, theirs = self.ours.median, other.median
        if self.unit not in HIGHER_IS_BETTER:
            mine, theirs = theirs, mine
        return mine / theirs if theirs else float("inf")

    def other(self, label: str) -> Figure | None:
        """Find another contender's figure."""
        return next((figure for figure in self.others if figure.label == label), None)

    def at_least(self, label: str, factor: float) -> None:
        """Promise that our median is at least `factor` times as good as that of `label`, if that was measured."""
        if (figure := self.other(label)) is not None:
            ratio = self.ratio(figure)
            self.checks.append(Check(f">= {factor:g}x {label}", ratio, ratio >= factor, "{:.2f}x"))

    def at_least_best(self, labels: Sequence[str], factor: float, whom: str) -> None:
        """Promise that our median is at least `factor` times as good as the best of `labels` that were measured."""
        ratios = [self.ratio(figure) for figure in self.others if figure.label in labels]
        if ratios:
            self.checks.append(Check(f">= {factor:g}x {whom}", min(ratios), min(ratios) >= factor, "{:.2f}x"))

    def at_most(self, limit: float, value: float | None = None, text: str | None = None) -> None:
        """Promise that our median, or `value`, is at most `limit`."""
        value = self.ours.median if value is None else value
        self.checks.append(Check(text or f"<= {limit:g} {self.unit}", value, value <= limit))

    def at_least_value(self, limit: float, text: str, shown: str = "{:.3g}") -> None:
        """Promise that our median is at least `limit`."""
        self.checks.append(Check(text, self.ours.median, self.ours.median >= limit, shown))

    def share_of_raw(self, share: float) -> None:
        """Promise that our median is at least `share` of the raw limit."""
        if self.raw is not None:
            value = self.ratio(self.raw)
            self.checks.append(Check(f">= {share:.0%} of {self.raw.label}", value, value >= share, "{:.0%}"))

    @property
    def met(self) -> bool | None:
        """Whether every promise is met; `None` where there is none, or none was judged."""
        judged = [check.met for check in self.checks if check.met is not None]
        return all(judged) if judged else None

    def as_dict(self) -> dict[str, Any]:
        """Return what programs get, one JSON object a row."""
        return {
            "command": self.command,
            "case": self.case,
            "unit": self.unit,
            "ours": self.ours.as_dict(),
            "others": [figure.as_dict() | {"ratio": self.ratio(figure)} for figure in self.others],
            "raw": None if self.raw is None else self.raw.as_dict() | {"share": self.ratio(self.raw)},
            "checks": [
                {"target": check.target, "value": check.value, "met": check.met, "shown": check.shown} for check in self.checks
            ],
            "met": self.met,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Row:
        """Make a row again of what `as_dict` returned.

        Raises:
            KeyError: something is missing.
        """
        raw, checks = found["raw"], [Check(one["target"], one["value"], one["met"], one["shown"]) for one in found["checks"]]
        others = [_figure(one) for one in found["others"]]
        ours = _figure(found["ours"])
        return cls(found["command"], found["case"], found["unit"], ours, others, _figure(raw) if raw else None, checks)


def _figure(found: Mapping[str, Any]) -> Figure:
    return Figure(found["label"], tuple(found["samples"]), found.get("note", ""))


def to_json(value: dict[str, Any]) -> str:
    """Render one JSON line; infinities become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def show(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print the rows of one command as a table; a row that misses a promise says so."""
    table = Table(title=title, title_justify="left", header_style="bold")
    cases = list(dict.fromkeys(key for row in rows for key in row.case))
    labels = list(dict.fromkeys(figure.label for row in rows for figure in row.others))
    raw = any(row.raw for row in rows)
    for key in cases:
        table.add_column(key)
    for name in ("nixl_async", *labels, *(["raw limit"] if raw else [])):
        table.add_column(name, justify="right")
    table.add_column("unit")
    table.add_column("target")
    table.add_column("met")
    for row in rows:
        cells = [_case(key, row.case[key]) if key in row.case else "" for key in cases]
        cells.append(f"[bold]{number(row.ours.median)}[/] ±{row.ours.spread:.0%}" + _note(row.ours))
        for label in labels:
            figure = row.other(label)
            cells.append("-" if figure is None else f"{number(figure.median)} ({times(row.ratio(figure))}){_note(figure)}")
        if raw:
            cells.append("-" if row.raw is None else f"{row.raw.label} {number(row.raw.median)} ({row.ratio(row.raw):.0%})")
        cells.append(row.unit)
        cells.append("\n".join(f"{check.target}: {check.shown.format(check.value)}" for check in row.checks) or "-")
        cells.append("\n".join(_met(check.met) for check in row.checks) or "-")
        table.add_row(*cells)
    console.print(table)


def _case(key: str, value: Any) -> str:
    return size(value) if key == "page" else str(value)


def _note(figure: Figure) -> str:
    return f"\n[dim]{figure.note}[/]" if figure.note else ""


def _met(met: bool | None) -> str:
    return "[dim]not judged[/]" if met is None else "[green]met[/]" if met else "[bold red]NOT MET[/]"


def times(value: float) -> str:
    """Write a ratio."""
    if value == float("inf"):
        return "∞"
    return f"{value:.0f}x" if value >= 100 else f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def number(value: float) -> str:
    """Write a figure with as many digits as it deserves."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def size(nbytes: int) -> str:
    """Write a byte count the way people do."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes} {unit}"
        nbytes //= 1024
    return f"{nbytes} GiB"

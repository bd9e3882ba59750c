"""Two results of the same benchmark, row by row: how many times better the second is, with an interval, and a verdict.

What is compared are medians over repetitions; the interval is the percentile bootstrap's, the two files resampled apart
(`scipy.stats.bootstrap`). With fewer than `LEAST` repetitions on a side no verdict is given: such intervals are too narrow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nixl_async.benchmarks.results import Results, Row, Scalar
from nixl_async.errors import ConfigurationError, MissingDependency

LEAST = 5
RESAMPLES = 9999
SEED = 1
SLOWER = "slower"
TAIL = 100
"""How many latencies a repetition needs for a 99th percentile."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What is compared: its name, its unit, whether more is better, the words for better and worse, and its samples of a row."""

    name: str
    unit: str
    more_is_better: bool
    better: str
    worse: str
    samples: Callable[[Row], tuple[float, ...]]


def _quantile(share: float, least: int = 1) -> Callable[[Row], tuple[float, ...]]:
    def samples(row: Row) -> tuple[float, ...]:
        enough = all(len(one) >= least for one in row.latencies)
        return tuple(one.quantile(share) for one in row.latencies) if enough else ()

    return samples


FIGURES = Metric("figures", "", True, "more", "less", lambda row: ())
"""Stands for all of `Row.figures` that both have, each by its own name."""
METRICS = (
    Metric("throughput", "GB/s", True, "faster", SLOWER, lambda row: row.throughput),
    Metric("latency-p50", "s", False, "faster", SLOWER, _quantile(0.5)),
    Metric("latency-p99", "s", False, "faster", SLOWER, _quantile(0.99, TAIL)),
    Metric("cpu", "s/GB", False, "less", "more", lambda row: row.cpu_seconds_per_gb),
    Metric("loop-stall", "s", False, "shorter", "longer", lambda row: row.loop_stall_p999),
    FIGURES,
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row in one metric: both medians, how many times better the second is (`ratio`), and between what it lies (`low`, `high`).

    `verdict` is one of the metric's words, "no difference", or "too few" repetitions; `low` and `high` are `None` then.
    """

    contender: str
    case: tuple[Scalar, ...]
    metric: str
    unit: str
    first: float
    second: float
    repetitions: tuple[int, int]
    ratio: float
    low: float | None
    high: float | None
    verdict: str
    worse: bool

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Compared:
    """Every comparison, and the rows that only one of the files has."""

    comparisons: tuple[Comparison, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def slower_by(self, percent: float) -> list[Comparison]:
        """Return those that are slower beyond doubt, by at least `percent` by their medians."""
        return [one for one in self.comparisons if one.verdict == SLOWER and one.ratio <= 1 - percent / 100]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "comparisons": [one.as_dict() for one in self.comparisons],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
        }


def compare(first: Results, second: Results, *, metrics: Sequence[Metric] = METRICS, confidence: float = 0.95) -> Compared:
    """Compare the rows that both have; `confidence` (0 … 1) is the interval's.

    Raises:
        ConfigurationError: they have no row in common.
        MissingDependency: scipy is not installed.
    """
    known = {(row.contender, row.case): row for row in second.rows}
    pairs = [(row, known[row.contender, row.case]) for row in first.rows if (row.contender, row.case) in known]
    if not pairs:
        raise ConfigurationError(
            f"the two results have no row in common: {len(first.rows)} and {len(second.rows)} rows; give two runs of one command"
        )
    found = tuple(one for a, b in pairs for one in _rows(a, b, metrics, confidence))
    mine = {(row.contender, row.case) for row in first.rows}
    return Compared(
        found,
        tuple(label(row) for row in first.rows if (row.contender, row.case) not in known),
        tuple(label(row) for row in second.rows if (row.contender, row.case) not in mine),
    )


def label(row: Row) -> str:
    """Name a row for people: its contender and what of its case is known."""
    return f"{row.contender}: {describe(row.case)}"


def describe(case: Sequence[Scalar]) -> str:
    """Write a case as people do: the operation, the places, the sizes."""
    op, scheme, route, src, dst, block, batch, *parameters = case
    places = f"{src} → {dst}" if src or dst else ""
    sizes = (
        f"{size(int(block))} of {size(int(batch))}" if batch and block else size(int(block or batch)) if block or batch else ""
    )
    return ", ".join(str(part) for part in (op, scheme, route, places, sizes, *parameters) if part != "")


def size(nbytes: int) -> str:
    """Write a byte count in the largest unit that divides it."""
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes and nbytes % (1 << width) == 0:
            return f"{nbytes >> width} {unit}"
    return f"{nbytes} B"


def _rows(first: Row, second: Row, metrics: Sequence[Metric], confidence: float) -> Iterator[Comparison]:
    for metric in metrics:
        a, b = metric.samples(first), metric.samples(second)
        if a and b:
            yield _compare(first, metric, a, b, confidence)
    if any(metric is FIGURES for metric in metrics):
        for name in [name for name in first.figures if name in second.figures]:
            mine, other = first.figures[name], second.figures[name]
            better, worse = ("more", "less") if mine.more_is_better else ("less", "more")
            metric = Metric(name, mine.unit, mine.more_is_better, better, worse, lambda row: ())
            yield _compare(first, metric, mine.values, other.values, confidence)


def _compare(row: Row, metric: Metric, a: tuple[float, ...], b: tuple[float, ...], confidence: float) -> Comparison:
    medians = statistics.median(a), statistics.median(b)
    better, base = (medians[1], medians[0]) if metric.more_is_better else medians
    ratio = better / base if base else float("inf") if better else 1.0
    low, high, verdict, worse = None, None, "too few", False
    if min(len(a), len(b)) >= LEAST and min(*a, *b) > 0:
        low, high = ratio_interval(a, b, confidence) if metric.more_is_better else ratio_interval(b, a, confidence)
        worse = high < 1
        verdict = metric.worse if worse else metric.better if low > 1 else "no difference"
    elif min(len(a), len(b)) >= LEAST:
        # A series with zeros has no ratio.
        verdict = "no difference" if medians[0] == medians[1] else "too few"
    return Comparison(
        row.contender, row.case, metric.name, metric.unit, *medians, (len(a), len(b)), ratio, low, high, verdict, worse
    )


def ratio_interval(base: Sequence[float], other: Sequence[float], confidence: float) -> tuple[float, float]:
    """Return between what the median of `other` over the median of `base` lies, all of them positive.

    Raises:
        MissingDependency: scipy is not installed.
    """
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise MissingDependency(f"comparing needs scipy ({error}): pip install 'nixl-async[report]'") from error

    def ratio(a: Any, b: Any, axis: int = -1) -> Any:
        return np.median(b, axis=axis) / np.median(a, axis=axis)

    interval = bootstrap(
        (np.asarray(base), np.asarray(other)),
        ratio,
        paired=False,
        vectorized=True,
        method="percentile",
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)

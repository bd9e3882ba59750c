"""Comparisons: verdicts that hold, intervals that cover, and what is not judged."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async.benchmarks.compare import LEAST, METRICS, compare, describe, ratio_interval, size
from nixl_async.benchmarks.results import Figures, Histogram, Latencies, Results, Row
from nixl_async.errors import ConfigurationError
from tests.benchmarks.made import SYSTEM, rates


def results(*rows: Row) -> Results:
    return Results(("x",), SYSTEM, rows)


def test_what_is_a_tenth_slower_is_slower() -> None:
    found = compare(rates(), rates(0.9, seed=2))
    verdicts = {one.metric: one.verdict for one in found.comparisons}
    assert verdicts == {"throughput": "slower", "latency-p50": "slower", "latency-p99": "slower", "cpu": "more"}
    assert len(found.comparisons) == 12
    for one in found.comparisons:
        assert one.worse
        assert one.low is not None
        assert one.high is not None
        assert one.low <= one.ratio <= one.high < 1
        assert one.ratio == pytest.approx(0.9, abs=0.04)
    assert len(found.slower_by(5)) == 9
    assert found.slower_by(20) == []


def test_what_is_faster_is_faster_both_ways() -> None:
    found = compare(rates(0.9, seed=2), rates())
    assert {one.verdict for one in found.comparisons} == {"faster", "less"}
    assert found.slower_by(0) == []


def test_a_file_beside_itself_shows_no_difference() -> None:
    found = compare(rates(), rates())
    assert {(one.verdict, one.ratio) for one in found.comparisons} == {("no difference", 1.0)}


def test_equal_machines_are_told_apart_about_as_seldom_as_promised() -> None:
    rng = np.random.default_rng(7)
    for n in (LEAST, 8):
        wrong = 0
        for _ in range(60):
            low, high = ratio_interval(rng.lognormal(0, 0.1, n).tolist(), rng.lognormal(0, 0.1, n).tolist(), 0.95)
            wrong += not low <= 1 <= high
        # 3 are expected; 9 and more would come about once in 600 times.
        assert wrong < 9, n


def test_few_repetitions_are_not_judged() -> None:
    (one, *_) = compare(rates(n=LEAST - 1), rates(0.5, n=20)).comparisons
    assert (one.verdict, one.low, one.high, one.worse) == ("too few", None, None, False)
    assert one.ratio == pytest.approx(0.5, abs=0.05)
    assert one.repetitions == (LEAST - 1, 20)


def test_rows_that_only_one_file_has_are_named() -> None:
    first = results(Row("a", "write", 4096, 0, throughput=(1.0,)), Row("a", "read", 4096, 0, throughput=(1.0,)))
    second = results(Row("a", "write", 4096, 0, throughput=(1.0,)), Row("b", "write", 4096, 0, throughput=(1.0,)))
    found = compare(first, second)
    assert found.only_first == ("a: read, 4 KiB",)
    assert found.only_second == ("b: write, 4 KiB",)
    with pytest.raises(ConfigurationError, match="no row in common: 2 and 1 rows"):
        compare(first, results(Row("c", "write", 4096, 0, throughput=(1.0,))))


def test_a_tail_needs_enough_latencies() -> None:
    def row(n: int) -> Results:
        return results(Row("a", "write", 1, 1, latencies=(Latencies((0.1,) * n),) * LEAST))

    assert {one.metric for one in compare(row(99), row(99)).comparisons} == {"latency-p50"}
    assert {one.metric for one in compare(row(100), row(100)).comparisons} == {"latency-p50", "latency-p99"}


def test_histograms_and_lists_compare() -> None:
    rng = np.random.default_rng(1)
    lists = [rng.lognormal(-7, 0.1, 300).tolist() for _ in range(8)]
    bounds = np.geomspace(1e-5, 1, 2000).tolist()
    first = results(Row("a", "write", 1, 1, latencies=tuple(Latencies(tuple(one)) for one in lists)))
    second = results(Row("a", "write", 1, 1, latencies=tuple(Histogram.of(one, bounds) for one in lists)))
    assert {one.verdict for one in compare(first, second).comparisons} == {"no difference"}


def test_zeros_have_no_ratio() -> None:
    still, moving = (results(Row("a", "write", 1, 1, loop_stall_p999=(value,) * 9)) for value in (0.0, 1.0))
    assert [one.verdict for one in compare(still, still).comparisons] == ["no difference"]
    assert [one.verdict for one in compare(still, moving).comparisons] == ["too few"]


def test_metrics_can_be_chosen() -> None:
    chosen = [metric for metric in METRICS if metric.name == "cpu"]
    assert {one.metric for one in compare(rates(), rates(), metrics=chosen).comparisons} == {"cpu"}


def test_cases_and_sizes_are_written_for_people() -> None:
    row = Row("a", "write", 65536, 1 << 26, "pairwise", "tcp", "DRAM", "VRAM", {"threads": 2})
    assert describe(row.case) == "write, pairwise, tcp, DRAM → VRAM, 64 KiB of 64 MiB, threads=2"
    assert [size(n) for n in (0, 1000, 1024, 3 << 20, 1 << 30)] == ["0 B", "1000 B", "1 KiB", "3 MiB", "1 GiB"]


def test_figures_without_a_field_are_compared_by_their_names() -> None:
    def run(goodput: float, misses: float) -> Results:
        found = {
            "goodput": Figures("requests/s", tuple(goodput + 0.01 * place for place in range(9))),
            "misses": Figures("", tuple(misses + 0.01 * place for place in range(9)), more_is_better=False),
        }
        return Results(("bench",), SYSTEM, (Row("a", "requests", 0, 0, figures=found),), started="2026-01-31")

    found = {one.metric: one for one in compare(run(4.0, 1.0), run(8.0, 2.0)).comparisons}
    assert (found["goodput"].verdict, found["goodput"].unit, found["goodput"].worse) == ("more", "requests/s", False)
    assert found["goodput"].ratio == pytest.approx(8.04 / 4.04)
    assert (found["misses"].verdict, found["misses"].worse) == ("more", True)
    assert found["misses"].ratio == pytest.approx(1.04 / 2.04)
    assert not compare(run(4.0, 1.0), run(8.0, 2.0), metrics=METRICS[:1]).comparisons

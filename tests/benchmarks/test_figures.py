"""What the figures show: the medians, shares and distributions of the rows, each contender in its own colour."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async.benchmarks import figures
from nixl_async.benchmarks.results import Figures, Histogram, Latencies, Raw, Row, Span, Timeline
from tests.benchmarks.made import rates


def row(contender: str, block: int, *rest: float, **more: object) -> Row:
    return Row(contender, "write", block, 1 << 20, throughput=rest or (1.0,), **more)  # type: ignore[arg-type]


def test_a_curve_is_a_contender_and_a_group_a_case() -> None:
    rows = [row("a", 4096), row("b", 4096), row("a", 1024), Row("a", "read", 4096, 1 << 20, throughput=(1.0,))]
    found = figures.groups(rows)
    assert list(found) == ["write", "read"]
    a, b = found["write"]
    assert [one.block_nbytes for one in a.rows] == [1024, 4096]
    assert a.colour != b.colour
    assert found["read"][0].colour == a.colour
    assert (a.name, b.name) == ("a", "b")


def test_routes_and_batches_of_one_contender_are_told_apart() -> None:
    rows = [row("a", 4096, route="tcp"), row("a", 4096, route="ucx")]
    first, second = figures.groups(rows)["write"]
    assert (first.name, second.name) == ("a, tcp, 1 MiB at once", "a, ucx, 1 MiB at once")
    assert first.dash != second.dash


def test_throughput_shows_medians_and_extremes() -> None:
    figure = figures.throughput("t", figures.groups([row("a", 4096, 1.0, 2.0, 5.0)])["write"])
    (trace,) = figure.data
    assert trace.x == (4096,)
    assert trace.y == (2.0,)
    assert (trace.error_y.array, trace.error_y.arrayminus) == ((3.0,), (1.0,))
    assert figure.layout.xaxis.ticktext == ("4 KiB",)


def test_what_was_not_measured_is_not_drawn() -> None:
    curves = figures.groups([row("a", 4096)])["write"]
    assert figures.throughput("t", curves) is not None
    for draw in (figures.latency, figures.distribution, figures.cpu, figures.stalls, figures.roofline):
        assert draw("t", curves) is None


def test_latency_shows_the_median_and_the_tail() -> None:
    curves = figures.groups(rates().rows)["write"]
    p50, p99 = figures.latency("t", curves).data
    assert (p50.name, p99.name) == ("nixl_async, p50", "nixl_async, p99")
    assert all(low < high for low, high in zip(p50.y, p99.y, strict=True))


@pytest.mark.parametrize("binned", [False, True])
def test_a_distribution_is_that_of_all_repetitions(binned: bool) -> None:
    rng = np.random.default_rng(1)
    seconds = rng.lognormal(-7, 0.5, (3, 2000))
    bounds = np.geomspace(1e-5, 1, 3000).tolist()
    latencies = tuple(Histogram.of(one.tolist(), bounds) if binned else Latencies(tuple(one.tolist())) for one in seconds)
    curves = figures.groups([Row("a", "write", 4096, 0, latencies=latencies)])["write"]
    (trace,) = figures.distribution("t", curves).data
    assert len(trace.x) <= 402
    assert trace.y[-1] == 1.0
    for share in (0.1, 0.5, 0.99):
        assert np.interp(share, trace.y, trace.x) == pytest.approx(np.quantile(seconds, share), rel=0.05)


def test_the_roof_is_the_raw_limit_and_the_shares_are_below_it() -> None:
    rows = [row("a", block, speed, raw=Raw("memcpy", (10.0, 12.0, 11.0))) for block, speed in ((4096, 5.5), (65536, 11.0))]
    roof, ours = figures.roofline("t", figures.groups(rows)["write"]).data
    assert (roof.name, roof.y) == ("raw limit: memcpy", (11.0, 11.0))
    assert ours.text == ("50%", "100%")


def test_a_timeline_has_a_line_for_each_lane() -> None:
    figure = figures.timeline(Timeline("t", (Span("a", "x", 1.0, 3.0), Span("b", "y", 2.0, 2.5), Span("a", "z", 4.0, 5.0))))
    first, second = figure.data
    assert (first.y, first.base, first.x, first.text) == (("a", "a"), (1.0, 4.0), (2.0, 1.0), ("x", "z"))
    assert second.y == ("b",)


def test_a_size_that_is_not_known_is_no_logarithm() -> None:
    figure = figures.throughput("t", figures.groups([row("a", 0)])["write"])
    assert figure.layout.xaxis.type == "linear"


def test_other_figures_have_a_panel_each() -> None:
    few = {"goodput": Figures("requests/s", (3.0, 5.0, 4.0)), "hits <b>": Figures("", (0.5,), more_is_better=False)}
    rows = [Row("a", "requests", 0, 0, figures=few), Row("b", "requests", 0, 0, figures={"goodput": few["goodput"]})]
    ((title, curves),) = figures.groups(rows).items()
    figure = figures.others(title, curves)
    assert figure is not None
    found = [(bar.name, bar.y[0], bar.xaxis, bar.error_y.array[0], bar.error_y.arrayminus[0]) for bar in figure.data]
    assert found == [("a", 4.0, "x", 1.0, 1.0), ("b", 4.0, "x", 1.0, 1.0), ("a", 0.5, "x2", 0.0, 0.0)]
    assert [one.text for one in figure.layout.annotations] == ["goodput", "hits &lt;b&gt;"]
    assert figures.others("none", figures.groups(list(rates().rows))["write"]) is None

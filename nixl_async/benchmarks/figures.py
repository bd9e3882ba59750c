"""Figures of results, as plotly has them: curves over block sizes, distributions, the raw limit as a roof, timelines."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

import plotly.graph_objects as graphs
from plotly.subplots import make_subplots

from nixl_async.benchmarks.compare import describe, size
from nixl_async.benchmarks.results import Histogram, Latencies, Row, Timeline

Figure: TypeAlias = Any

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_PANELS = 4
"""Panels side by side."""
_POINTS = 400
"""Points of a distribution's curve: more do not show."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The rows of one contender and batch size over block sizes; `name` tells the curves of a group apart, `colour` contenders."""

    name: str
    colour: str
    dash: str
    rows: tuple[Row, ...]


def groups(rows: Sequence[Row]) -> dict[str, list[Curve]]:
    """Group rows by what they have in common but the contender, its route and the sizes; in each, curves over block sizes."""
    contenders = list(dict.fromkeys(row.contender for row in rows))
    colours = dict(zip(contenders, itertools.cycle(COLOURS), strict=False))
    found: dict[str, dict[tuple[str, str, int], list[Row]]] = {}
    for row in rows:
        op, scheme, _, src, dst, _, _, *parameters = row.case
        title = describe((op, scheme, "", src, dst, 0, 0, *parameters)) or "all"
        found.setdefault(title, {}).setdefault((row.contender, row.route, row.batch_nbytes), []).append(row)
    made: dict[str, list[Curve]] = {}
    for title, curves in found.items():
        several = {
            contender: len({key[1:] for key in curves if key[0] == contender}) > 1 for contender in {key[0] for key in curves}
        }
        dashes = {contender: itertools.cycle(DASHES) for contender in several}
        for (contender, route, batch), its in curves.items():
            parts = [route, f"{size(batch)} at once" if batch else ""] if several[contender] else []
            name = ", ".join([contender, *filter(None, parts)])
            ordered = tuple(sorted(its, key=lambda row: row.block_nbytes))
            made.setdefault(title, []).append(Curve(name, colours[contender], next(dashes[contender]), ordered))
    return made


def throughput(title: str, curves: Iterable[Curve]) -> Figure | None:
    """Draw GB/s over block sizes: medians, with the least and the most of all repetitions."""
    return _over_sizes(title, curves, "GB/s", lambda row: row.throughput)


def cpu(title: str, curves: Iterable[Curve]) -> Figure | None:
    """Draw CPU seconds for each GB over block sizes."""
    return _over_sizes(title, curves, "CPU seconds a GB", lambda row: row.cpu_seconds_per_gb)


def stalls(title: str, curves: Iterable[Curve]) -> Figure | None:
    """Draw how late the event loop woke, in seconds, over block sizes."""
    return _over_sizes(title, curves, "loop stall p99.9, s", lambda row: row.loop_stall_p999, logarithmic=True)


def latency(title: str, curves: Iterable[Curve]) -> Figure | None:
    """Draw the median and the 99th percentile of latencies over block sizes, medians of repetitions."""
    figure = graphs.Figure()
    for curve in curves:
        rows = [row for row in curve.rows if row.latencies]
        for share, dash, symbol in ((0.5, "solid", "circle"), (0.99, "dot", "diamond")):
            samples = [tuple(one.quantile(share) for one in row.latencies) for row in rows]
            if samples:
                name = f"{curve.name}, p{share * 100:g}"
                _line(figure, name, curve.colour, dash, [row.block_nbytes for row in rows], samples, symbol)
    return _sized(figure, title, "latency, s", logarithmic=True)


def distribution(title: str, curves: Iterable[Curve]) -> Figure | None:
    """Draw which share of latencies lies below what; all repetitions together."""
    figure = graphs.Figure()
    for curve in curves:
        for row, dash in zip(curve.rows, itertools.cycle(DASHES), strict=False):
            if not row.latencies:
                continue
            name = f"{curve.name}, {size(row.block_nbytes)}" if row.block_nbytes else curve.name
            points = list(_cumulative(row.latencies))
            line = {"color": curve.colour, "dash": dash, "shape": "hv"}
            figure.add_trace(
                graphs.Scatter(x=[x for x, _ in points], y=[y for _, y in points], name=name, mode="lines", line=line)
            )
    if not figure.data:
        return None
    _style(figure, title)
    figure.update_xaxes(type="log", title="latency, s", exponentformat="SI", ticksuffix="s")
    figure.update_yaxes(title="share of all", tickformat=".0%", range=[0, 1.02])
    return figure


def roofline(title: str, curves: Sequence[Curve]) -> Figure | None:
    """Draw throughput below the raw limit, both logarithmic: how far from the roof each contender is, at each block size."""
    roofs: dict[str, dict[int, float]] = {}
    for row in (row for curve in curves for row in curve.rows):
        if row.raw is not None:
            limit = statistics.median(row.raw.throughput)
            most = roofs.setdefault(row.raw.label, {})
            most[row.block_nbytes] = max(limit, most.get(row.block_nbytes, 0.0))
    if not roofs:
        return None
    figure = graphs.Figure()
    for label, roof in roofs.items():
        sizes = sorted(roof)
        line = {"color": "#555555", "width": 3}
        figure.add_trace(
            graphs.Scatter(x=sizes, y=[roof[at] for at in sizes], name=f"raw limit: {label}", mode="lines+markers", line=line)
        )
    for curve in curves:
        rows = [row for row in curve.rows if row.throughput]
        if not rows:
            continue
        medians = [statistics.median(row.throughput) for row in rows]
        shares = [f"{row.share_of_raw:.0%}" if row.share_of_raw is not None else "" for row in rows]
        figure.add_trace(
            graphs.Scatter(
                x=[row.block_nbytes for row in rows],
                y=medians,
                text=shares,
                textposition="bottom center",
                name=curve.name,
                mode="lines+markers+text",
                line={"color": curve.colour, "dash": curve.dash},
                hovertemplate="%{y:.3g} GB/s, %{text} of the limit",
            )
        )
    figure = _sized(figure, title, "GB/s", logarithmic=True)
    return figure


def others(title: str, curves: Sequence[Curve]) -> Figure | None:
    """Draw the figures that have no field of their own, a panel each: medians, with the least and the most of all repetitions."""
    rows = [(curve, row) for curve in curves for row in curve.rows if row.figures]
    names = list(dict.fromkeys(name for _, row in rows for name in row.figures))
    if not names:
        return None
    titles = [escape(name.replace("_", " "), quote=False) for name in names]
    lines = -(-len(names) // _PANELS)
    figure = make_subplots(rows=lines, cols=min(_PANELS, len(names)), subplot_titles=titles)
    for place, name in enumerate(names):
        line, column = divmod(place, _PANELS)
        for curve, row in rows:
            if (found := row.figures.get(name)) is None:
                continue
            median = statistics.median(found.values)
            bar = graphs.Bar(
                x=[curve.name],
                y=[median],
                name=curve.name,
                marker={"color": curve.colour},
                showlegend=False,
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [max(found.values) - median],
                    "arrayminus": [median - min(found.values)],
                    "thickness": 1,
                },
                hovertemplate="%{y:.4g} " + found.unit.replace("%", "") + f" ({len(found.values)} repetitions)",
            )
            figure.add_trace(bar, row=line + 1, col=column + 1)
    _style(figure, title)
    figure.update_layout(height=90 + 300 * lines, margin={"t": 90, "b": 60})
    figure.update_yaxes(rangemode="tozero")
    return figure


def timeline(one: Timeline) -> Figure:
    """Draw what happened when, a line for each lane, from the top."""
    figure = graphs.Figure()
    lanes = list(dict.fromkeys(span.lane for span in one.spans))
    for lane, colour in zip(lanes, itertools.cycle(COLOURS), strict=False):
        spans = [span for span in one.spans if span.lane == lane]
        figure.add_trace(
            graphs.Bar(
                orientation="h",
                base=[span.start for span in spans],
                x=[span.end - span.start for span in spans],
                y=[lane] * len(spans),
                text=[span.label for span in spans],
                textposition="inside",
                insidetextanchor="middle",
                marker={"color": colour, "line": {"color": "white", "width": 1}},
                name=lane,
                showlegend=False,
                hovertemplate="%{text}: from %{base:.6f} s, %{x:.6f} s",
            )
        )
    _style(figure, one.title)
    figure.update_layout(barmode="overlay", height=120 + 46 * max(1, len(lanes)), margin={"b": 60})
    figure.update_xaxes(title="seconds", exponentformat="SI", ticksuffix="s")
    figure.update_yaxes(autorange="reversed")
    return figure


def _over_sizes(
    title: str,
    curves: Iterable[Curve],
    unit: str,
    samples: Callable[[Row], tuple[float, ...]],
    *,
    logarithmic: bool = False,
) -> Figure | None:
    figure = graphs.Figure()
    for curve in curves:
        rows = [row for row in curve.rows if samples(row)]
        if rows:
            sizes = [row.block_nbytes for row in rows]
            _line(figure, curve.name, curve.colour, curve.dash, sizes, [samples(row) for row in rows], "circle")
    return _sized(figure, title, unit, logarithmic=logarithmic)


def _line(
    figure: Figure, name: str, colour: str, dash: str, sizes: list[int], samples: list[tuple[float, ...]], symbol: str
) -> None:
    medians = [statistics.median(one) for one in samples]
    spread = {
        "type": "data",
        "symmetric": False,
        "array": [max(one) - median for one, median in zip(samples, medians, strict=True)],
        "arrayminus": [median - min(one) for one, median in zip(samples, medians, strict=True)],
        "thickness": 1,
    }
    figure.add_trace(
        graphs.Scatter(
            x=sizes,
            y=medians,
            error_y=spread,
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"symbol": symbol},
            customdata=[len(one) for one in samples],
            hovertemplate="%{y:.4g} (%{customdata} repetitions)",
        )
    )


def _sized(figure: Figure, title: str, unit: str, *, logarithmic: bool) -> Figure | None:
    """Finish a figure over block sizes; `None` if it shows nothing."""
    if not figure.data:
        return None
    _style(figure, title)
    sizes = sorted({at for trace in figure.data for at in trace.x})
    # Zero has no logarithm: where nothing was told of the size there is one point.
    kind = "log" if sizes[0] > 0 else "linear"
    figure.update_xaxes(type=kind, title="block", tickvals=sizes, ticktext=[size(at) if at else "-" for at in sizes])
    if logarithmic:
        figure.update_yaxes(type="log", title=unit, exponentformat="SI", nticks=8)
    else:
        figure.update_yaxes(title=unit, rangemode="tozero")
    return figure


def _style(figure: Figure, title: str) -> None:
    # The legend is below the plot, about two names to a line.
    legend_height = 20 * -(-len(figure.data) // 2)
    figure.update_layout(
        title={"text": title, "font": {"size": 14}},
        template="plotly_white",
        height=370 + legend_height,
        margin={"l": 70, "r": 20, "t": 50, "b": 70 + legend_height},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        hovermode="closest",
    )


def _cumulative(latencies: Sequence[Latencies | Histogram]) -> Iterator[tuple[float, float]]:
    """Yield (seconds, share of all that lie at or below), rising."""
    weighted: list[tuple[float, int]] = []
    for one in latencies:
        if isinstance(one, Latencies):
            weighted += [(seconds, 1) for seconds in one.seconds]
        else:
            weighted += [(high, count) for high, count in zip(one.bounds[1:], one.counts, strict=True) if count]
    weighted.sort()
    total, seen, told = sum(count for _, count in weighted), 0, 0.0
    for place, (seconds, count) in enumerate(weighted):
        seen += count
        if seen / total - told >= 1 / _POINTS or place in (0, len(weighted) - 1):
            told = seen / total
            yield seconds, told

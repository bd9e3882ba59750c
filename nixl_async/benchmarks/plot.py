"""Write results as one HTML file: figures with plotly's script inside, the system, every row as a table. Nothing is fetched."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from nixl_async.benchmarks.compare import describe
from nixl_async.benchmarks.results import Results, ResultsError, Row
from nixl_async.errors import MissingDependency

_OTHERS = 9
"""The column of figures that few rows have."""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1280px; padding: 0 1rem; color: #1b1b1b; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; border-bottom: 1px solid #ccc; }}
p {{ max-width: 60rem; }} code {{ background: #f3f3f3; padding: 0 .25em; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: 1rem; }}
.figures > div {{ min-width: 0; overflow: hidden; }}
.figures.wide {{ grid-template-columns: 1fr; }}
table {{ border-collapse: collapse; font-size: 13px; }} td, th {{ border: 1px solid #ddd; padding: .25em .6em; text-align: left; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }} tr:nth-child(even) td {{ background: #fafafa; }}
</style>
<script>{script}</script></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_report(results: Mapping[str, Results], path: str | os.PathLike[str]) -> None:
    """Write the report of one or more results, by the names they are to have in it.

    Raises:
        MissingDependency: plotly is not installed.
        ResultsError: the report cannot be written.
    """
    page = make_report(results)
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ResultsError(f"{path} cannot be written: {error.strerror}") from None


def make_report(results: Mapping[str, Results]) -> str:
    """Return the report as HTML.

    Raises:
        MissingDependency: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs

        from nixl_async.benchmarks import figures
    except ImportError as error:
        raise MissingDependency(f"drawing needs plotly ({error}): pip install 'nixl-async[report]'") from error
    rows = list(_together(results))
    groups = figures.groups(rows)
    sections = [
        _section("Throughput", "Medians of the repetitions; bars from the least to the most.", groups, figures.throughput),
        _section("Latency", "Medians of the repetitions' median and 99th percentile.", groups, figures.latency),
        _section("Distribution of latencies", "All repetitions together.", groups, figures.distribution),
        _section("Below the raw limit", "What is written at each point is the share of the limit.", groups, figures.roofline),
        _section("CPU", "All processes that took part.", groups, figures.cpu),
        _section("Loop stall", "99.9th percentile of how late the event loop woke.", groups, figures.stalls),
    ]
    panels = [figure for name, curves in groups.items() if (figure := figures.others(_plain(name), curves)) is not None]
    if panels:
        text = "Medians of the repetitions; bars from the least to the most."
        sections.append(_figures("Other figures", text, [_html(one) for one in panels], "figures wide"))
    drawn = [_html(figures.timeline(one)) for one_file in results.values() for one in one_file.timelines]
    if drawn:
        sections.append(_figures("Timelines", "", drawn, "figures wide"))
    body = "\n".join([*map(_system, results, results.values()), *filter(None, sections), _table(rows)])
    title = f"Benchmark of {', '.join(Path(name).name for name in results)}"
    return _PAGE.format(title=escape(title), script=get_plotlyjs(), body=body)


def _together(results: Mapping[str, Results]) -> Iterator[Row]:
    for name, one in results.items():
        for row in one.rows:
            yield row if len(results) == 1 else replace(row, contender=f"{row.contender} ({Path(name).name})")


def _section(title: str, text: str, groups: Mapping[str, Any], draw: Callable[[str, Any], Any]) -> str:
    drawn = [figure for name, curves in groups.items() if (figure := draw(_plain(name), curves)) is not None]
    return _figures(title, text, [_html(figure) for figure in drawn], "figures") if drawn else ""


def _plain(text: str) -> str:
    """Keep plotly from taking a file's words for the little HTML that it knows."""
    return escape(text, quote=False)


def _figures(title: str, text: str, drawn: list[str], kind: str) -> str:
    return f'<h2>{title}</h2><p>{text}</p><div class="{kind}">' + "".join(f"<div>{one}</div>" for one in drawn) + "</div>"


def _html(figure: Any) -> str:
    made: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return made


def _system(name: str, results: Results) -> str:
    known = {key: value for key, value in results.system.items() if key != "versions"}
    said = ", ".join(f"{escape(str(key))}: {escape(str(value))}" for key, value in known.items())
    versions = ", ".join(f"{escape(str(key))} {escape(str(value))}" for key, value in results.system["versions"].items())
    command = escape(" ".join(results.command))
    return f"<p><b>{escape(name)}</b>, {escape(results.started)}: <code>{command}</code><br>{said}<br>{versions}</p>"


def _table(rows: list[Row]) -> str:
    names = ["contender", "case", "GB/s", "of the raw limit", "p50", "p99", "CPU s/GB", "loop stall p99.9", "repetitions"]
    names += ["other figures"] if any(row.figures for row in rows) else []
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(_row(row, len(names) > _OTHERS) for row in rows)
    return f"<h2>Every row</h2><p>Medians of the repetitions.</p><table><tr>{head}</tr>{body}</table>"


def _row(row: Row, others_too: bool) -> str:
    p50, p99 = (tuple(one.quantile(share) for one in row.latencies) for share in (0.5, 0.99))
    share = "-" if row.share_of_raw is None else f"{row.share_of_raw:.0%}"
    others = [len(one.values) for one in row.figures.values()]
    count = max(len(row.throughput), len(row.latencies), len(row.cpu_seconds_per_gb), len(row.loop_stall_p999), *others)
    numbers = [_median(row.throughput), share, _time(p50), _time(p99)]
    numbers += [_median(row.cpu_seconds_per_gb), _time(row.loop_stall_p999), str(count)]
    words = "".join(f"<td>{escape(text)}</td>" for text in (row.contender, describe(row.case)))
    said = ", ".join(f"{name} {_median(one.values)} {one.unit}".strip() for name, one in row.figures.items())
    last = f"<td>{escape(said) or '-'}</td>" if others_too else ""
    return f"<tr>{words}" + "".join(f'<td class="n">{text}</td>' for text in numbers) + f"{last}</tr>"


def _median(samples: tuple[float, ...]) -> str:
    return f"{statistics.median(samples):.3g}" if samples else "-"


def _time(samples: tuple[float, ...]) -> str:
    if not samples:
        return "-"
    seconds = statistics.median(samples)
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"

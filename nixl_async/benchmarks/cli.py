"""The command line of the benchmark programs, mounted as `nixl-async bench`."""

from __future__ import annotations

import enum
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nixl_async.benchmarks.kv.cli import app as kv
from nixl_async.benchmarks.serve.command import serve
from nixl_async.benchmarks.transfer.command import transfer

if TYPE_CHECKING:
    from rich.console import Console

    from nixl_async.benchmarks.compare import Compared, Comparison
    from nixl_async.benchmarks.results import Results

app = typer.Typer(
    help="Plan and run benchmarks, compare their results and draw them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(kv, name="kv")
# NIXLBench writes its options with underscores.
app.command(
    "transfer", context_settings={"token_normalize_func": lambda text: str(getattr(text, "value", text)).replace("_", "-")}
)(transfer)
app.command("serve")(serve)
PROGRAM = "nixl-async bench"
WIDTH_WITHOUT_TERMINAL = 160
NAMED = 3


class Format(enum.StrEnum):
    """How a comparison is printed."""

    TABLE = "table"
    JSON = "json"


class Name(enum.StrEnum):
    """What can be compared."""

    THROUGHPUT = "throughput"
    LATENCY_P50 = "latency-p50"
    LATENCY_P99 = "latency-p99"
    CPU = "cpu"
    LOOP_STALL = "loop-stall"
    FIGURES = "figures"


@app.callback()
def bench() -> None:
    """Plan and run benchmarks, compare their results and draw them."""


def _fail(text: str, code: int = 2) -> typer.Exit:
    typer.echo(f"{PROGRAM}: {text}", err=True)
    return typer.Exit(code)


def _read(path: str) -> Results:
    from nixl_async.benchmarks.reading import read

    results, left = read(path)
    if left:
        typer.echo(f"{PROGRAM}: {path}: {left} rows are in other units than GB/s and times, and left out", err=True)
    return results


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A.json", help="The results to compare with.")],
    second: Annotated[str, typer.Argument(metavar="B.json", help="The results to judge.")],
    fail_on_slower: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=100.0, metavar="PERCENT", help="Exit with 1 if a row is slower beyond doubt, by PERCENT or more."
        ),
    ] = None,
    metric: Annotated[list[Name] | None, typer.Option(help="Compare this only; may be repeated (default: all).")] = None,
    confidence: Annotated[float, typer.Option(min=50.0, max=99.9, help="Confidence of the intervals, percent.")] = 95.0,
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.TABLE,
) -> None:
    """Compare two runs of a benchmark, row by row: how many times better B is, its interval, and a verdict."""
    from nixl_async.benchmarks.compare import METRICS
    from nixl_async.benchmarks.compare import compare as compare_results
    from nixl_async.errors import ConfigurationError

    names = {one.value for one in metric} if metric else None
    metrics = [one for one in METRICS if names is None or one.name in names]
    try:
        found = compare_results(_read(first), _read(second), metrics=metrics, confidence=confidence / 100)
    except ConfigurationError as error:
        raise _fail(str(error)) from None
    failed = [] if fail_on_slower is None else found.slower_by(fail_on_slower)
    if output is Format.JSON:
        print(json.dumps(found.as_dict() | {"failed": [one.as_dict() for one in failed]}))
    else:
        _show(found, confidence)
    if failed:
        raise _fail(f"{len(failed)} rows are slower by {fail_on_slower:g} % or more: {_names(failed)}", 1)


def _names(failed: list[Comparison]) -> str:
    from nixl_async.benchmarks.compare import describe

    named = [f"{one.contender}, {describe(one.case)}, {one.metric} ({one.ratio:.2f})" for one in failed[:NAMED]]
    return "; ".join(named) + (f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else "")


def _console() -> Console:
    from rich.console import Console

    plain = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDTH_WITHOUT_TERMINAL) if plain else Console()


def _show(found: Compared, confidence: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    from nixl_async.benchmarks.compare import LEAST, describe

    table = Table(title=f"How many times better B is than A, and the {confidence:g} % interval", title_justify="left")
    for name in ("contender", "case", "metric", "A", "B", "ratio", "interval", "verdict"):
        table.add_column(name, justify="right" if name in ("A", "B", "ratio", "interval") else "left")
    for one in found.comparisons:
        interval = "-" if one.low is None or one.high is None else f"{one.low:.3f} … {one.high:.3f}"
        style = {"no difference": "dim", "too few": "dim"}.get(one.verdict, "bold red" if one.worse else "green")
        verdict = one.verdict if one.verdict != "too few" else f"too few ({min(one.repetitions)} < {LEAST} repetitions)"
        numbers = (_number(one.first, one.unit), _number(one.second, one.unit), f"{one.ratio:.3f}")
        cells = (one.contender, describe(one.case), one.metric, *numbers, interval)
        table.add_row(*(escape(cell) for cell in cells), f"[{style}]{verdict}[/]")
    console = _console()
    console.print(table)
    for where, rows in (("A", found.only_first), ("B", found.only_second)):
        for row in rows:
            console.print(f"only in {where}: {escape(row)}")


def _number(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"
    return f"{value:.3g} {unit}"


@app.command()
def plot(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULTS.json...", help="Results to draw; several are drawn together.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="REPORT.html", help="The report to write.")],
) -> None:
    """Draw results as one HTML file that needs nothing else: curves, distributions, timelines, and the raw limit as a roof."""
    from nixl_async.benchmarks.plot import write_report
    from nixl_async.errors import ConfigurationError

    try:
        write_report({path: _read(path) for path in results}, output)
    except ConfigurationError as error:
        raise _fail(str(error)) from None
    typer.echo(output)

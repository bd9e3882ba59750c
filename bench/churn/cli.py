"""The command line of the drill."""

from __future__ import annotations

import asyncio
import enum
import os
import time
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from bench import system
from bench.churn import report
from bench.churn.drill import moved, planned, run
from bench.churn.fleet import Fleet
from bench.churn.options import INJECTED, Options
from bench.churn.plan import SECONDS
from bench.churn.verdict import judge

app = typer.Typer(add_completion=False)

WIDTH_WITHOUT_TERMINAL = 150
INTERRUPTED = 130
_LINES = 12


class Format(enum.Enum):
    """How the result is printed."""

    TEXT = "text"
    JSON = "json"


class Namespaces(enum.Enum):
    """Whether members get links of their own."""

    AUTO = "auto"
    YES = "yes"
    NO = "no"


@app.command()
def churn(
    seconds: Annotated[float, typer.Option(min=20, help="How long the fleet is at work.")] = 300.0,
    prefill: Annotated[int, typer.Option(min=5, help="Members that serve pages.")] = 24,
    decode: Annotated[int, typer.Option(min=3, help="Members that ask for them.")] = 8,
    seed: Annotated[int, typer.Option(help="What is done when, and to whom, follows from it.")] = 1,
    rate: Annotated[float, typer.Option(min=1, help="Requests a second of the whole fleet.")] = 120.0,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that each step of a request may take.")] = 5.0,
    allowance: Annotated[float, typer.Option(min=0, help="Seconds that the machine may add to what is promised.")] = 1.0,
    namespaces: Annotated[Namespaces, typer.Option(help="Links in network namespaces: they need root.")] = Namespaces.AUTO,
    only: Annotated[list[str] | None, typer.Option(help=f"Do nothing but this, of: {', '.join(SECONDS)}.")] = None,
    format: Annotated[Format, typer.Option(help="Tables, or one JSON object.")] = Format.TEXT,
    show_plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and end.")] = False,
    inject: Annotated[list[str] | None, typer.Option(hidden=True, help="wrong-byte, hang or leak: must be noticed.")] = None,
) -> None:
    """Transfer without pause while processes are killed, stopped and replaced, links cut, and etcd restarted; check every byte.

    The exit status is 0 only if nothing was lost, hung or leaked, and everything was noticed and whole again in time.
    """
    kinds, wrongs = _known("only", only, SECONDS), _known("inject", inject, INJECTED)
    options = Options(seconds, prefill, decode, seed, rate, limit, allowance, namespaces.value, kinds, wrongs)
    plan = planned(options)
    out, err = Console(), Console(stderr=True, soft_wrap=True)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(width=WIDTH_WITHOUT_TERMINAL)
    if show_plan:
        for action in plan:
            out.print(escape(str(action)))
        return
    live = Live(console=err, refresh_per_second=4, transient=True) if err.is_terminal else None
    lines: deque[str] = deque(maxlen=_LINES)
    began = time.monotonic()

    def tell(text: str) -> None:
        lines.append(text)
        if live is None:
            err.print(f"[dim]{time.monotonic() - began:6.1f} s[/] {escape(text)}", highlight=False)

    def show(fleet: Fleet, elapsed: float) -> None:
        if live is not None:
            live.update(_progress(fleet, elapsed, list(lines)))

    try:
        with live or nullcontext():
            records = asyncio.run(run(options, plan, tell, show))
    except RuntimeError as error:
        err.print(f"[bold red]the fleet does not start:[/] {escape(str(error))}")
        raise typer.Exit(1) from error
    verdict, machine = judge(records, options), system.describe({})
    if format is Format.JSON:
        print(report.to_json(report.as_dict(records, options, verdict, machine)), flush=True)
    else:
        report.show(out, records, options, verdict, machine)
    if records.interrupted:
        raise typer.Exit(INTERRUPTED)
    if verdict.faults:
        raise typer.Exit(1)


def _known(option: str, given: list[str] | None, allowed: Iterable[str]) -> tuple[str, ...]:
    allowed = list(allowed)
    if unknown := set(given or ()) - set(allowed):
        raise typer.BadParameter(f"--{option} {', '.join(unknown)}; it must be one of {', '.join(allowed)}")
    return tuple(given or ())


def _progress(fleet: Fleet, elapsed: float, lines: list[str]) -> Group:
    done, failed = moved(fleet)
    at_work = sum(fleet.up(name) is not None for name in fleet.processes)
    rate = done / elapsed if elapsed else 0.0
    records = fleet.records
    head = (
        f"{elapsed:5.0f} of {fleet.options.seconds:.0f} s   {at_work} members at work   {done} requests done ({rate:.0f}/s),"
        f" {failed} failed   wrong {len(records.wrong)}   hung {len(records.hangs)}   errors logged {len(records.logged)}"
    )
    return Group(Text(head, style="bold"), *(Text(line, style="dim") for line in lines))

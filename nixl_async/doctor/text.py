"""A report as text: findings, facts with their sources, routes with reasons, measured rates. Colour only repeats words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from nixl_async.doctor.facts import Facts, Value
from nixl_async.doctor.report import Level, Report, Route, Tried
from nixl_async.doctor.stage import OTHER_HOST

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.SLOW: "yellow", Level.BROKEN: "bold red"}
_ROOMS = {
    "machine": "machine",
    "kernel": "kernel",
    "limits": "limits",
    "memory": "memory",
    "network": "network",
    "rdma": "RDMA",
    "ucx": "UCX",
    "gpu": "GPU",
    "gds": "GPUDirect Storage",
    "storage": "files",
    "packages": "packages",
    "environment": "environment",
}


def print_report(console: Console, report: Report) -> None:
    """Print all of it, what to do first."""
    _findings(console, report)
    _facts(console, report.facts)
    _routes(console, report)
    if report.trials:
        _trials(console, report.trials)
    worst = "nothing is broken" if report.healthy else "something is broken: see the first findings"
    counts = {level: sum(finding.level is level for finding in report.findings) for level in reversed(Level)}
    console.print(f"\n{worst} ({', '.join(f'{count} {level.value}' for level, count in counts.items())})")


def _findings(console: Console, report: Report) -> None:
    _title(console, "Findings")
    for finding in report.findings:
        style = _STYLES[finding.level]
        console.print(f"[{style}]{finding.level.value.upper():<6}[/] {escape(finding.what)}")
        for label, text in (("why", finding.why), ("do", finding.do)):
            if text:
                console.print(Padding(f"{label}: {escape(text)}", (0, 0, 0, 7), expand=False))


def _facts(console: Console, facts: Facts) -> None:
    _title(console, "This machine")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for room, title in _ROOMS.items():
        for number, fact in enumerate(facts.room(room)):
            shown = _value(fact.name, fact.value)
            table.add_row(
                "" if number else f"[bold]{title}[/]", escape(fact.name), escape(shown), f"[dim]{escape(fact.source)}[/]"
            )
    console.print(table)


def _value(name: str, value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    sized = "bytes" in name or name.startswith("RLIMIT_MEMLOCK") or name.startswith(("net.", "tcp_"))
    return _size(value) if sized and isinstance(value, int | float) else str(value)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def _routes(console: Console, report: Report) -> None:
    if not report.routes:
        return
    _title(console, "Routes (as agent.explain tells them, 64 KiB pages)")
    table = Table()
    for name in ("from", "to", "route", "how", "next in line", "what would come before, and why it does not"):
        table.add_column(name, no_wrap=name in ("from", "to", "route"))
    for route, both in _paired(report.routes):
        arrow = f"⇄ {route.dst}" if both else f"→ {route.dst}"
        how = route.how + (f", expected {route.expected}" if route.expected else "")
        before = _refusals(report, route)
        table.add_row(
            *(escape(cell) for cell in (route.src, arrow, route.route or "none", how, ", ".join(route.next), before))
        )
    console.print(table)
    if any(OTHER_HOST in route.dst for route in report.routes):
        text = (
            f"“{OTHER_HOST}” is a process of this host that offers only what crosses a network; ⇄ stands for both directions."
        )
        console.print(text)
    for name, why in report.missing.items():
        console.print(f"{escape(name)} is not here: {escape(why)}")
    for place, why in report.absent.items():
        console.print(f"{escape(place)} is not here: {escape(why)}")


def _paired(routes: list[Route]) -> Iterable[tuple[Route, bool]]:
    """Join the two directions of a pair where they go the same way."""
    known = {(route.src, route.dst): route for route in routes}
    done = set()
    for route in routes:
        if (route.src, route.dst) in done or _of_peers(route):
            continue
        back = known.get((route.dst, route.src))
        both = back is not None and route.src != route.dst and (back.route, back.how) == (route.route, route.how)
        if both:
            done.add((route.dst, route.src))
        yield route, both


def _of_peers(route: Route) -> bool:
    """Tell whether both sides are peers', which no agent copies between."""
    return "," in route.src and "," in route.dst


def _refusals(report: Report, route: Route) -> str:
    """Group the reasons of the backends that would have gone before the one that is taken."""
    rank = report.ranks.get(route.route or "", 1 << 30)
    reasons: dict[str, list[str]] = {}
    for name, why in route.refusals.items():
        if name in report.ranks and report.ranks[name] < rank:
            reasons.setdefault(why, []).append(name)
    return "\n".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())


def _trials(console: Console, trials: list[Tried]) -> None:
    _title(console, "Self-test (GB/s, medians; share of one memcpy thread, measured in turns)")
    table = Table()
    for name in ("route", "between", "write", "share", "read", "share", "memcpy", "4 KiB p50", "rounds", "bytes"):
        table.add_column(name, justify="left" if name in ("route", "between", "bytes") else "right")
    for trial in trials:
        cells = [trial.route, trial.what]
        for rates in (trial.writes, trial.reads):
            share = trial.share(rates)
            cells += [_rate(rates), "-" if share is None else f"{share:.0%}"]
        small = "-" if trial.small_p50 is None else f"{trial.small_p50 * 1e6:.0f} µs"
        cells += [_rate(trial.memcpy), small, str(len(trial.memcpy))]
        said = "every one right" if trial.verified and not trial.error else f"FAILED: {trial.error or 'not verified'}"
        table.add_row(*(escape(cell) for cell in cells), f"[{'green' if trial.verified else 'bold red'}]{escape(said)}[/]")
    console.print(table)


def _rate(rates: tuple[float, ...]) -> str:
    return f"{statistics.median(rates):.2f}" if rates else "-"


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/]")

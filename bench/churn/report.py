"""Shows what came out of a drill: for people, and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from bench.churn.options import Options
from bench.churn.plan import TOLD
from bench.churn.records import Records
from bench.churn.verdict import LIMITS, TITLES, Verdict

if TYPE_CHECKING:
    from rich.console import Console


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def as_dict(records: Records, options: Options, verdict: Verdict, system: dict[str, Any]) -> dict[str, Any]:
    """Return the result as JSON values."""
    kinds = Counter(done.action.kind for done in records.done if not done.skipped)
    return {
        "system": system,
        "options": {name: getattr(options, name) for name in Options.__dataclass_fields__},
        "network": records.network,
        "seconds": records.ended - records.began,
        "start_seconds": records.start_seconds,
        "cpu_share": records.cpu_share,
        "cpu_seconds": records.cpu_seconds,
        "processes": len(records.lives),
        "killed": sum(life.killed for life in records.lives),
        "actions": dict(kinds),
        "skipped": sum(bool(done.skipped) for done in records.done),
        "total": verdict.total._asdict(),
        "died_with": {"requests": verdict.died_with.requests, "transfers": verdict.died_with.transfers},
        "failures": [
            {"what": what, "kind": kind, "explained": explained, "count": count, "example": verdict.examples[what, kind]}
            for (what, kind, explained), count in sorted(verdict.outcomes.items())
        ],
        "detected_seconds": {what: _figures(values) for what, values in verdict.detections.items()},
        "recovered_seconds": {what: _figures(values) for what, values in verdict.recoveries.items()},
        "growth_nbytes": _figures(verdict.growth) if verdict.growth else None,
        "quarantined_pages": verdict.quarantined,
        "nbytes_by_route": dict(verdict.routes),
        "faults": verdict.faults,
        "interrupted": records.interrupted,
    }


def _figures(values: Sequence[float]) -> dict[str, float]:
    return {
        "count": len(values),
        "p50": percentile(values, 0.5),
        "p99": percentile(values, 0.99),
        "max": max(values),
    }


def to_json(result: dict[str, Any]) -> str:
    """Return the result on one line."""
    return json.dumps(result)


def show(out: Console, records: Records, options: Options, verdict: Verdict, system: dict[str, Any]) -> None:
    """Print tables."""
    out.print(
        f"{escape(str(system['cpu']))}, {system['cores']} cores, Linux {system['kernel']}, load {system['load_1min']:.0f};"
        f" {system['nixl_async']}",
        highlight=False,
    )
    seconds = max(records.ended - records.began, 1e-9)
    total = verdict.total
    killed = sum(life.killed for life in records.lives)
    out.print(
        f"[bold]{options.prefill} prefill and {options.decode} decode members for {seconds:.0f} s[/], seed {options.seed};"
        f" {len(records.lives)} processes in all, {killed} killed; ready after {records.start_seconds:.0f} s;"
        f" {records.cpu_seconds:.0f} s of CPU; the machine was busy to {records.cpu_share:.0%}"
    )
    out.print(f"links: {escape(records.network)}")
    out.print(
        f"requests: {total.requests} = {total.requests_done} done + {total.requests_failed} failed"
        f" + {verdict.died_with.requests} whose process was killed"
    )
    out.print(
        f"transfers: {total.transfers} = {total.transfers_done} done + {total.transfers_failed} failed"
        f" + {verdict.died_with.transfers} whose process was killed; {total.nbytes / 1e9:.1f} GB;"
        f" {total.pages_checked} pages of 16 KiB checked, wrong: {len(records.wrong)}"
    )
    routes = ", ".join(f"{name} {nbytes / 1e9:.1f} GB" for name, nbytes in sorted(verdict.routes.items()))
    out.print(f"by route, without what killed members moved: {routes or 'nothing'}")
    _actions(out, records, verdict)
    _detected(out, verdict)
    _failed(out, verdict)
    if verdict.growth:
        grown = sorted(value / 2**20 for value in verdict.growth)
        out.print(
            f"memory of the {len(grown)} members that lived throughout, from a third of the run to its end: p50"
            f" {percentile(grown, 0.5):+.1f} MiB, most {grown[-1]:+.1f} MiB"
        )
    for who, count in verdict.quarantined.items():
        out.print(f"quarantined: {count} pages of {escape(who)} (granted to a peer that was lost and did not come back)")
    left = sum(len(life.left or ()) for life in records.lives)
    out.print(f"left behind (descriptors, threads, tasks, regions, shared memory): {left + len(records.shared_memory)}")
    for fault in verdict.faults[:30]:
        out.print(f"[bold red]fault:[/] {escape(fault)}")
    if len(verdict.faults) > 30:
        out.print(f"[bold red]and {len(verdict.faults) - 30} more[/]")
    if records.interrupted:
        out.print("[yellow]interrupted: it says nothing of what was not tried[/]")
    elif not verdict.faults:
        out.print("[bold green]passed: nothing was lost, hung or leaked[/]")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _actions(out: Console, records: Records, verdict: Verdict) -> None:
    table = _table("What was done, and how soon all went well again", "action", "times", "recovered p50", "p99", "most (s)")
    kinds = Counter(done.action.kind for done in records.done if not done.skipped)
    for kind, told in TOLD.items():
        if kinds[kind]:
            found = verdict.recoveries.get(kind)
            figures = [f"{value:.2f}" for value in (*_three(found),)] if found else ["-"] * 3
            table.add_row(told, str(kinds[kind]), *figures)
    out.print(table)
    skipped = sum(bool(done.skipped) for done in records.done)
    if skipped:
        out.print(f"skipped, as their target was not ready: {skipped}")


def _detected(out: Console, verdict: Verdict) -> None:
    table = _table("How soon every connected peer knew", "what", "observers", "p50", "p99", "most", "promised (s)")
    for what, title in TITLES.items():
        if found := verdict.detections.get(what):
            figures = [f"{value:.2f}" for value in _three(found)]
            table.add_row(title, str(len(found)), *figures, f"{LIMITS[what]:g}")
    out.print(table)


def _failed(out: Console, verdict: Verdict) -> None:
    table = _table("What failed", "what", "error", "while one of the two was disturbed", "otherwise")
    for what, kind in sorted({(what, kind) for what, kind, _ in verdict.outcomes}):
        explained, other = verdict.outcomes[what, kind, True], verdict.outcomes[what, kind, False]
        title = f"{kind} (on purpose)" if kind == "GivenUp" else kind
        table.add_row(what, title, str(explained), str(other))
    out.print(table)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return percentile(values, 0.5), percentile(values, 0.99), max(values)

"""`nixl-async top`: a process's agents as a table in the terminal, brought up to date until it is interrupted."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from nixl_async.inspection import ask

MAX_ROWS = 20
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def watch(path: str | Path, seconds: float, rounds: int | None, console: Console, stop: threading.Event | None = None) -> None:
    """Show the agents of the process at `path` every `seconds`, for as many `rounds`, or until `stop` is set or it is gone.

    Raises:
        ConfigurationError: nobody answers there.
    """
    before: dict[str, Any] | None = None
    stop = stop or threading.Event()
    try:
        with Live(console=console, screen=console.is_terminal and rounds is None, auto_refresh=False) as live:
            while (rounds is None or rounds > 0) and not stop.is_set():
                told = ask(path, {"do": "dump", "limit": MAX_ROWS})
                live.update(render(told, before), refresh=True)
                before = told
                if rounds is not None:
                    rounds -= 1
                if rounds != 0:
                    stop.wait(seconds)
    finally:
        if before is not None and not console.is_terminal:
            # There only the last look is written, without the end of its line.
            console.line()


def render(told: dict[str, Any], before: dict[str, Any] | None) -> RenderableType:
    """Return what is shown for an answer; rates are those since the answer before."""
    seconds = told["time"] - before["time"] if before is not None else 0.0
    earlier = {agent["agent"]: agent for agent in before["agents"]} if before is not None else {}
    parts: list[RenderableType] = [Text(f"process {told['pid']}  {time.strftime('%H:%M:%S', time.localtime(told['time']))}")]
    for agent in told["agents"]:
        parts += _agent(agent, earlier.get(agent["agent"]), seconds)
    return Group(*parts)


def _agent(agent: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> list[RenderableType]:
    counts = agent["counts"]
    head = (
        f"[bold]{escape(agent['agent'])}[/]  {len(agent['peers'])} peers, {agent['regions']} regions, {counts['live']} live,"
        f" {counts['draining']} draining | done {counts['done']}, failed {counts['failed']}, cancelled {counts['cancelled']} |"
        f" retries {counts['retries']}, failovers {counts['failovers']} | {agent['unread_notifications']} unread notifications"
    )
    parts: list[RenderableType] = [Text.from_markup(head), _rates(agent, before, seconds), _queues(agent), _peers(agent)]
    if agent["transfers"]:
        parts.append(_transfers(agent))
    return parts


def _rates(agent: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> Table:
    known = {_key(row): row for row in before["moved"]} if before is not None else {}
    table = Table(
        "peer", "backend", "direction", "class", "bytes/s", "transfers/s", "bytes", title="moved", title_justify="left"
    )
    rows = []
    for row in agent["moved"]:
        old = known.get(_key(row), {"bytes": 0, "transfers": 0})
        rate = (row["bytes"] - old["bytes"]) / seconds if seconds > 0 else 0.0
        each = (row["transfers"] - old["transfers"]) / seconds if seconds > 0 else 0.0
        rows.append((rate, each, row))
    rows.sort(key=lambda one: (-one[0], -one[2]["bytes"]))
    for rate, each, row in rows[:MAX_ROWS]:
        names = [escape(row[name]) for name in ("peer", "backend", "direction", "class")]
        table.add_row(*names, size(rate), f"{each:.1f}", size(row["bytes"]))
    return table


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["peer"], row["backend"], row["direction"], row["class"]


def _queues(agent: dict[str, Any]) -> Table:
    table = Table("backend", "ops", "in flight", "waiting", title="queues", title_justify="left")
    for queue in agent["queues"]:
        if queue["ops"] or any(queue["waiting"].values()):
            waiting = ", ".join(f"{name} {count}" for name, count in queue["waiting"].items() if count)
            table.add_row(escape(queue["backend"]), str(queue["ops"]), size(queue["bytes"]), waiting)
    return table


def _peers(agent: dict[str, Any]) -> Table:
    table = Table("peer", "state", "routes", "regions", title="peers", title_justify="left")
    for peer in agent["peers"][:MAX_ROWS]:
        routes = [f"[red]{escape(name)} down[/]" if name in peer["down"] else escape(name) for name in peer["backends"]]
        state = "[yellow]suspect[/]" if peer["suspect"] else "connected"
        table.add_row(escape(peer["name"]), state, ", ".join(routes), str(peer["regions"]))
    return table


def _transfers(agent: dict[str, Any]) -> Table:
    title = f"oldest transfers ({agent['omitted']['transfers']} more)"
    table = Table("id", "state", "waits for", "peer", "backend", "done", "age", title=title, title_justify="left")
    for row in agent["transfers"][:MAX_ROWS]:
        done = f"{size(row['bytes_done'])} of {size(row['bytes'])}"
        route = escape(row["routes"][0]) if row["routes"] else ""
        table.add_row(str(row["id"]), row["state"], row["waits_for"], escape(row["peer"]), route, done, f"{row['age']:.3f} s")
    return table


def size(nbytes: float) -> str:
    """Return a number of bytes to be read by people."""
    for unit in _UNITS[:-1]:
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} {_UNITS[-1]}"

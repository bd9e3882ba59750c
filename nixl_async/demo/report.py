"""Progress bars while the demo runs, and the table at its end."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from nixl_async.demo.job import Job

WIDTH_WITHOUT_TERMINAL = 120


class Progress:
    """Two bars on standard error, one for each side; nothing where that is no terminal."""

    def __init__(self, job: Job, title: str) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} layers"))
        self._bars = Bars(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._layers = job.shape.layers
        self._title = title

    def __enter__(self) -> Progress:
        # rich before 14.3 writes a line even where it shows no bars.
        if not self._bars.disable:
            self._bars.start()
        for event, text in (("pushed", "prefill pushes"), ("verified", "decode checks")):
            self._tasks[event] = self._bars.add_task(f"{self._title}: {text}", total=self._layers)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._bars.disable:
            self._bars.stop()

    def take(self, role: str, message: dict[str, Any]) -> None:
        """Take an event of a side."""
        if (task := self._tasks.get(message.get("event", ""))) is not None:
            self._bars.advance(task, message["layers"])


LINES = (
    ("bytes", "bytes moved and checked", "{:,}", None),
    ("pages", "pages", "{:,}", None),
    ("gb_per_second", "GB/s while transfers are under way", "{:.2f}", "gb_per_second"),
    ("memcpy_share", "share of one thread's memcpy", "{:.0%}", None),
    ("transfer_seconds", "transfers under way, seconds", "{:.4f}", None),
    ("exposed_seconds", "of it not hidden behind compute, seconds", "{:.4f}", "exposed_seconds"),
    ("ttft_seconds", "request to last layer at decode, seconds", "{:.4f}", "ttft_seconds"),
    ("loop_stall_p999_seconds", "loop stall p99.9 (thread CPU), seconds", "{:.6f}", "loop_stall_p999_seconds"),
    ("cpu_seconds_per_gb", "CPU seconds per GB, both sides", "{:.3f}", "cpu_seconds_per_gb"),
    ("route", "route", "{}", None),
    ("verified", "every byte verified", "{}", None),
)


def print_result(result: dict[str, Any]) -> None:
    """Print the table; with NIXL's column and how many times better ours is when both ran."""
    console = Console()
    if not sys.stdout.isatty():
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    versus = result.get("versus")
    table = Table(title=f"{result['model']}, {result['tokens']} tokens, pages of {result['page_nbytes']} bytes")
    table.add_column("")
    table.add_column("nixl_async", justify="right")
    if versus:
        table.add_column("NIXL", justify="right")
        table.add_column("times better", justify="right")
    for key, text, form, ratio in LINES:
        row = [text, form.format(result[key])]
        if versus:
            better = versus["ratios"].get(ratio) if ratio else None
            row += [form.format(versus["nixl"][key]), "" if better is None else f"{better:.2f}"]
        table.add_row(*row)
    console.print(table)

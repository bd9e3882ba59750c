"""What a run has measured: NIXLBench's columns and more, as a table, as rows of a result file, CSV or Parquet."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from nixl_async.benchmarks.options import Format
from nixl_async.benchmarks.results import Raw, Results, Row, condensed
from nixl_async.benchmarks.tables import write_rows
from nixl_async.benchmarks.transfer.conductor import OURS, Round, Step
from nixl_async.benchmarks.transfer.options import Options

WIDTH_WITHOUT_TERMINAL = 250
_MICROSECONDS = 1e6

COLUMNS = {
    "contender": "Contender",
    "block_nbytes": "Block Size (B)",
    "batch": "Batch Size",
    "gb_per_second": "B/W (GB/Sec)",
    "aggregate_gb_per_second": "Aggregate B/W (GB/Sec)",
    "average_latency_us": "Avg Lat. (us)",
    "average_prep_us": "Avg Prep (us)",
    "p99_prep_us": "P99 Prep (us)",
    "average_post_us": "Avg Post (us)",
    "p99_post_us": "P99 Post (us)",
    "average_tx_us": "Avg Tx (us)",
    "p99_tx_us": "P99 Tx (us)",
    "p50_us": "P50 (us)",
    "p99_us": "P99 (us)",
    "p999_us": "P99.9 (us)",
    "spread": "Spread",
    "cpu_seconds_per_gb": "CPU (s/GB)",
    "loop_stall_p999_ms": "Stall P99.9 (ms)",
    "share_of_raw": "Of Raw",
    "times": "Ours x",
    "route": "Route",
}
"""Names of the figures, and how the table heads them. Those up to "P99 Tx" are NIXLBench's, and mean what they do there."""


def figures(options: Options, step: Step) -> list[dict[str, Any]]:
    """Return a row of figures for each contender; `None` where something was not measured."""
    limit = statistics.median(one.throughput for one in step.raw) if step.raw else None
    mine = statistics.median(one.throughput for one in step.rounds[OURS]) if step.rounds.get(OURS) else None
    found = []
    for label, rounds in step.rounds.items():
        speed = statistics.median(one.throughput for one in rounds)
        times = {name: np.concatenate([getattr(one, name) for one in rounds]) for name in ("prep", "post", "tx", "latency")}
        batch = step.point.batch
        # Who moves bytes by a program that tells no single latency has none.
        known = len(times["latency"]) > 0
        per_slot = sum(one.requests for one in rounds) / options.slots
        row: dict[str, Any] = {
            "contender": label,
            "block_nbytes": step.point.block,
            "batch": batch,
            "gb_per_second": statistics.median(one.each for one in rounds),
            "aggregate_gb_per_second": speed,
            "average_latency_us": sum(one.seconds for one in rounds) / (per_slot * batch) * _MICROSECONDS if known else None,
        }
        for name in ("prep", "post", "tx"):
            row[f"average_{name}_us"] = float(times[name].mean()) * _MICROSECONDS if known else None
            row[f"p99_{name}_us"] = _quantile(times[name], 0.99) if known else None
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
            row[f"{name}_us"] = _quantile(times["latency"], share) if known else None
        row |= {
            "spread": _spread([one.throughput for one in rounds]),
            "cpu_seconds_per_gb": _median(one.cpu_per_gb for one in rounds),
            "loop_stall_p999_ms": None if (stall := _median(one.stall for one in rounds)) is None else stall * 1e3,
            "share_of_raw": speed / limit if limit else None,
            "times": mine / speed if mine and label != OURS else None,
            "route": rounds[0].route,
        }
        found.append(row)
    return found


def _quantile(seconds: Any, share: float) -> float:
    """As NIXLBench does: the value at that place of the sorted ones."""
    ordered = np.sort(seconds)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * share))]) * _MICROSECONDS


def _median(values: Any) -> float | None:
    known = [one for one in values if one is not None]
    return statistics.median(known) if known else None


def _spread(values: Sequence[float]) -> float:
    """Half the distance of the quartiles, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


# For people.


def print_table(options: Options, steps: Sequence[Step], absent: Mapping[str, str]) -> None:
    """Print all steps as a table, and who is `absent` and why."""
    rows = [row for step in steps for row in figures(options, step)]
    names = [name for name in COLUMNS if any(row.get(name) not in (None, "") for row in rows)]
    if options.n_initiators == 1 and "aggregate_gb_per_second" in names:
        names.remove("aggregate_gb_per_second")
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", title=_title(options, steps), title_justify="left")
    for name in names:
        table.add_column(COLUMNS[name], justify="left" if name in ("contender", "route") else "right")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in names), style="bold" if row["contender"] == OURS else None)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    console.print(table)
    for label, why in absent.items():
        console.print(f"absent: {label}: {why}", markup=False, highlight=False, soft_wrap=True)


def _title(options: Options, steps: Sequence[Step]) -> str:
    where = f"{options.initiator_seg_type.value} to {options.target_seg_type.value}"
    limits = ", ".join(dict.fromkeys(step.raw_label for step in steps if step.raw_label))
    checked = "every byte checked" if all(step.checked for step in steps) else "not checked"
    raw = f"; raw limit: {limits}" if limits else ""
    return f"{options.op_type.value}, {options.scheme.value}, {where}; {checked}{raw}"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if name in ("share_of_raw", "spread"):
        return f"{'±' if name == 'spread' else ''}{value:.0%}"
    if name in ("gb_per_second", "aggregate_gb_per_second"):
        return f"{value:.6f}"
    if name.endswith("_us"):
        return f"{value:.1f}"
    return f"{value:.2f}x" if name == "times" else f"{value:.3g}"


# For programs.


def result_rows(options: Options, step: Step) -> list[Row]:
    """Return a step's rows as result files have them."""
    point, found = step.point, []
    raw = Raw(step.raw_label, tuple(one.throughput for one in step.raw)) if step.raw else None
    parameters = {name: value for name, value in options.changed().items() if name in _PARAMETERS}
    for label, rounds in step.rounds.items():
        known = all(len(one.latency) for one in rounds)
        stalls = tuple(one.stall for one in rounds if one.stall is not None)
        found.append(
            Row(
                label,
                options.op_type.value.lower(),
                point.block,
                point.block * point.batch,
                scheme=options.scheme.value,
                route=rounds[0].route,
                src=(options.initiator_seg_type if point.op == "WRITE" else options.target_seg_type).value.replace(*_OBJECT),
                dst=(options.target_seg_type if point.op == "WRITE" else options.initiator_seg_type).value.replace(*_OBJECT),
                parameters={**parameters, "batch": point.batch},
                throughput=tuple(one.throughput for one in rounds),
                latencies=tuple(condensed(one.latency.tolist()) for one in rounds) if known else (),
                cpu_seconds_per_gb=tuple(one.cpu_per_gb for one in rounds if one.cpu_per_gb is not None),
                loop_stall_p999=stalls if len(stalls) == len(rounds) else (),
                raw=raw,
                phases={name: _phase(name, rounds) for name in ("prep", "post", "tx")} if known else {},
            )
        )
    return found


_OBJECT = ("OBJ", "OBJECT")
_PARAMETERS = frozenset(
    {
        "mode",
        "num_initiator_dev",
        "num_target_dev",
        "num_threads",
        "pipeline_depth",
        "recreate_xfer",
        "reregister_mem",
        "prepared_xfer",
        "notify",
        "use_hugepages",
        "randomize_location_mode",
        "storage_enable_direct",
        "num_files",
    }
)


def _phase(name: str, rounds: Sequence[Round]) -> dict[str, tuple[float, ...]]:
    """Return the mean and the 99th percentile of each round, in seconds."""
    series = [getattr(one, name) for one in rounds]
    return {
        "mean": tuple(float(one.mean()) for one in series),
        "p99": tuple(_quantile(one, 0.99) / _MICROSECONDS for one in series),
    }


def write(options: Options, steps: Sequence[Step], command: Sequence[str], system: Mapping[str, Any], started: str) -> None:
    """Write the result in the form that is asked for."""
    if options.format is Format.TEXT:
        if options.output:
            with open(options.output, "w") as file:
                print(_text(options, steps), file=file)
        return
    if options.format is Format.JSON:
        rows = tuple(row for step in steps for row in result_rows(options, step))
        results = Results(tuple(command), system, rows, started=started)
        if options.output:
            results.write(options.output)
        else:
            import json

            print(json.dumps(results.as_dict(), allow_nan=False), flush=True)
        return
    rows_of_figures = [row | {"op": options.op_type.value, "scheme": options.scheme.value} for row in _all(options, steps)]
    write_rows(options.format, options.output, [*COLUMNS, "op", "scheme"], rows_of_figures, system)


def _all(options: Options, steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [row for step in steps for row in figures(options, step)]


def _text(options: Options, steps: Sequence[Step]) -> str:
    rows = _all(options, steps)
    lines = ["  ".join(COLUMNS.values())]
    lines += ["  ".join(_cell(name, row[name]).rjust(len(head)) for name, head in COLUMNS.items()) for row in rows]
    return "\n".join(lines)

"""Plans and measurements as people and programs read them: tables, CSV."""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nixl_async.benchmarks.kv import kvbench
from nixl_async.benchmarks.kv.layouts import Layout
from nixl_async.benchmarks.kv.planning import Plan, RankPlan

WIDTH_WITHOUT_TERMINAL = 160


def console() -> Console:
    """Return standard output, wide enough where it is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH_WITHOUT_TERMINAL, highlight=False)


def print_plan(out: Console, plan: Plan, config: str | None, parameters: dict[str, Any] | None) -> None:
    """Print what each rank moves, what KVBench says instead, and the nixlbench command of the fullest rank."""
    layout, model = plan.layout, plan.model
    out.print(f"[bold]{escape(model.name)}[/] ({escape(model.source)}){'' if config is None else f', {escape(config)}'}")
    out.print(
        f"cache in {layout.kv_dtype}: {plan.geometry.token_nbytes} bytes a token; requests: {layout.num_requests} of {layout.isl} "
        f"tokens, {layout.pages} pages of {layout.page_size} each; {plan.tokens_nbytes} bytes of tokens, {plan.pages_nbytes} of "
        "pages, "
        f"{plan.nbytes} on all {len(plan.ranks)} ranks together",
        soft_wrap=True,
    )
    table = Table("ranks", "layers", "KV heads", "copies", "access", header_style="bold")
    for name in ("I/O bytes", "I/Os a request", "batch size", "bytes a rank"):
        table.add_column(name, justify="right")
    for group in alike(plan.ranks):
        one = group[0]
        table.add_row(
            f"{len(group)}: {numbers([rank.shard.rank for rank in group])}",
            str(len(one.shard.layers)),
            "latent" if model.latent else str(len(one.shard.heads)),
            str(one.copies),
            "block" if layout.by_block else "layer",
            *map(str, (one.io_nbytes, one.ios_per_request, one.batch_size, one.nbytes)),
        )
    out.print(table)
    if kvbench.knows(layout):
        theirs = kvbench.Figures.of(model, layout)
        out.print(f"KVBench: I/O {theirs.io_size}, batch size {theirs.batch_size}, total {theirs.total_buffer_size} bytes")
    for text in plan.differences():
        out.print(f"  differs: {escape(text)}", soft_wrap=True)
    for text in plan.notes():
        out.print(f"note: {escape(text)}", soft_wrap=True)
    if parameters is not None:
        rank = plan.fullest.shard.rank
        out.print(f"\nas nixlbench would move rank {rank}'s part:\n{escape(kvbench.command(parameters))}", soft_wrap=True)


def plan_csv(plans: Iterable[tuple[str | None, Plan]]) -> str:
    """Write a row for each rank of each plan."""
    rows = []
    for config, plan in plans:
        whole = plan.as_dict()
        common = {name: whole[name] for name in whole if not isinstance(whole[name], list | dict) and name != "nbytes"}
        rows += [{"config_file": config} | common | rank.as_dict() for rank in plan.ranks]
    return write_csv(rows)


def write_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows that have the same columns."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def print_kvcache(out: Console, plans: Iterable[Plan]) -> None:
    """Print KVBench's table of sizes with the right figures, and what a token and a request take."""
    table = Table(header_style="bold")
    for name in ("Model", "ISL", "Num Requests", "Batch Size", "IO Size", "TP", "PP", "Page Size", "Access"):
        table.add_column(name, justify="left" if name in ("Model", "Access") else "right")
    for name in ("dtype", "KV / token", "KV / request", "Copies"):
        table.add_column(name, justify="right")
    differences: dict[str, None] = {}
    for plan in plans:
        layout, fullest = plan.layout, plan.fullest
        table.add_row(
            escape(plan.model.name),
            str(layout.isl),
            str(layout.num_requests),
            str(fullest.batch_size),
            kvbench.size_text(fullest.io_nbytes),
            str(layout.tp),
            str(layout.pp),
            str(layout.page_size),
            "block" if layout.by_block else "layer",
            layout.kv_dtype,
            kvbench.size_text(plan.geometry.token_nbytes),
            kvbench.size_text(plan.tokens_nbytes // layout.num_requests),
            str(plan.copies),
        )
        differences |= dict.fromkeys(plan.differences())
    out.print(table)
    out.print("KB, MB, GB are units of 1024, as KVBench has them; batch and I/O size are those of one rank, the fullest")
    for text in differences:
        out.print(f"KVBench differs: {escape(text)}", soft_wrap=True)


def kvcache_row(plan: Plan) -> dict[str, Any]:
    """Return what programs get of a line of sizes."""
    layout, fullest = plan.layout, plan.fullest
    return {
        "model": plan.model.name,
        "isl": layout.isl,
        "num_requests": layout.num_requests,
        "batch_size": fullest.batch_size,
        "io_nbytes": fullest.io_nbytes,
        "tp": layout.tp,
        "pp": layout.pp,
        "page_size": layout.page_size,
        "access": "block" if layout.by_block else "layer",
        "dtype": layout.kv_dtype,
        "token_nbytes": plan.geometry.token_nbytes,
        "request_nbytes": plan.tokens_nbytes // layout.num_requests,
        "copies": plan.copies,
    }


def kvbench_row(name: str, layout: Layout, figures: kvbench.Figures) -> dict[str, Any]:
    """Return KVBench's line of sizes as programs get it."""
    return {
        "model": name,
        "isl": layout.isl,
        "num_requests": layout.num_requests,
        "batch_size": figures.batch_size,
        "io_nbytes": figures.io_size,
        "tp": layout.tp,
        "pp": layout.pp,
        "page_size": layout.page_size,
        "access": layout.access,
    }


def alike(ranks: Iterable[RankPlan]) -> list[list[RankPlan]]:
    """Put ranks that move as much in as many pieces together, in the order of their first."""
    groups: dict[tuple[int, int, int], list[RankPlan]] = {}
    for rank in ranks:
        groups.setdefault((len(rank.shard.layers), rank.io_nbytes, rank.batch_size), []).append(rank)
    return list(groups.values())


def numbers(values: Sequence[int]) -> str:
    """Write ascending numbers shortly: 0-7, 56-63."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def print_profile(out: Console, result: dict[str, Any]) -> None:
    """Print what a plan's transfers took."""
    out.print(
        f"[bold]{escape(result['model'])}[/]: rank {result['rank']} to rank {result['decode_rank']}, {result['nbytes']} bytes in "
        f"{result['ranges']} ranges of {result['range_nbytes']} bytes on average, {result['memory']}; every byte checked",
        soft_wrap=True,
    )
    table = Table("operation", "mode", "route", header_style="bold")
    for name in ("latency ms, median", "quartiles", "least", "most", "GB/s", "µs an I/O"):
        table.add_column(name, justify="right")
    for case in result["cases"]:
        table.add_row(
            case["op"],
            case["mode"],
            case["route"],
            f"{case['median_seconds'] * 1e3:.3f}",
            f"{case['q1_seconds'] * 1e3:.3f}-{case['q3_seconds'] * 1e3:.3f}",
            f"{case['min_seconds'] * 1e3:.3f}",
            f"{case['max_seconds'] * 1e3:.3f}",
            f"{case['gb_per_second']:.3f}",
            f"{case['seconds_per_io'] * 1e6:.2f}",
        )
    out.print(table)


def print_traffic(out: Console, result: dict[str, Any], *, senders: bool = False) -> None:
    """Print what the patterns of a matrix took."""
    checked = "every byte checked" if result["verified"] else "bytes not checked"
    out.print(f"{result['ranks']} ranks, {result['memory']}, by {result['route']}; {checked}", soft_wrap=True)
    if result["kind"] == "single":
        table = Table(header_style="bold")
        for name in ("Iters", "Total time (s)", "Avg latency/iter (s)", "Total size (GB)", "Num Senders", "Mean BW (GB/s)"):
            table.add_column(name, justify="right")
        table.add_row(
            str(result["iters"]),
            f"{result['total_seconds']:.6f}",
            f"{result['seconds_per_iter']:.6f}",
            f"{result['size_gb']:.6f}",
            str(result["num_senders"]),
            f"{result['mean_bw']:.3f}",
        )
        out.print(table)
        if senders:
            _print_senders(out, [(None, result["senders"])])
        return
    table = Table("Pattern", header_style="bold")
    for name in (
        "Transfer size (GB)",
        "Latency (ms)",
        "range",
        "Isolated Latency (ms)",
        "/ isolated",
        "Num Senders",
        "Mean BW (GB/s)",
    ):
        table.add_column(name, justify="right")
    iterations = result["iterations_results"]
    for number, pattern in enumerate(result["patterns"]):
        rows = [iteration[number] for iteration in iterations]
        if rows[0]["latency"] is None:
            table.add_row(pattern["matrix_file"], "0", "-", "-", "-", "-", "0", "-")
            continue
        latencies = [row["latency"] for row in rows]
        median, alone = statistics.median(latencies), rows[0]["isolated_latency"]
        table.add_row(
            escape(pattern["matrix_file"]),
            f"{rows[0]['size']:.6f}",
            f"{median:.3f}",
            f"{min(latencies):.3f}-{max(latencies):.3f}",
            "-" if alone is None else f"{alone:.3f}",
            "-" if not alone else f"{median / alone:.2f}",
            str(rows[0]["num_senders"]),
            f"{statistics.median(row['mean_bw'] for row in rows):.3f}",
        )
    out.print(table)
    out.print(f"medians of {len(iterations)} iterations of the whole sequence")
    if senders:
        _print_senders(out, [(number, row["senders"]) for number, row in enumerate(iterations[-1])])


def _print_senders(out: Console, patterns: Iterable[tuple[int | None, list[dict[str, Any]]]]) -> None:
    table = Table("pattern", "rank", "bytes", "latency (ms)", "GB/s", header_style="bold")
    for number, rows in patterns:
        for row in rows:
            cells = (row["rank"], row["nbytes"], f"{row['seconds'] * 1e3:.3f}", f"{row['gb_per_second']:.3f}")
            table.add_row("" if number is None else str(number), *map(str, cells))
    out.print(table)

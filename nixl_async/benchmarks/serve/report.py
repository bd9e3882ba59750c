"""What a run has measured: a table for people, rows and timelines of a result file, CSV, Parquet."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nixl_async.benchmarks.kv.reports import console
from nixl_async.benchmarks.options import Format
from nixl_async.benchmarks.results import Figures, Results, Row, Span, Timeline, condensed
from nixl_async.benchmarks.serve.metrics import Record, Round, exposed, itls, quantiles, ttfts
from nixl_async.benchmarks.serve.options import Classes, Configuration, Options, Served
from nixl_async.benchmarks.tables import write_rows

Measured = Mapping[Configuration, Sequence[Round]]
TIERS = ("dram", "nvme", "objects")
TOKENS_DRAWN = 6
"""Of a timeline's answer: more would leave no room for what comes before."""
_GIGA = 1e9

COLUMNS = (
    "schedule",
    "classes",
    "backend",
    "route",
    "served",
    "failed",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_p50_ms",
    "itl_p99_ms",
    "exposed_p50_ms",
    "exposed_p99_ms",
    "goodput",
    "attainment",
    "requests_per_second",
    "hit_rate_dram",
    "hit_rate_nvme",
    "hit_rate_objects",
    "kv_gb",
    "moved_gb",
    "tier_read_gb",
    "tier_written_gb",
    "cpu_seconds",
)
"""The figures of a configuration."""


def figures(options: Options, chosen: Configuration, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return a configuration's figures: quantiles of all rounds' requests together, else medians of the rounds."""
    row: dict[str, Any] = {
        "schedule": chosen.schedule.value,
        "classes": chosen.classes.value,
        "backend": chosen.backend,
        "route": route(rounds),
        "served": sum(len(one.done) for one in rounds),
        "failed": sum(len(one.records) - len(one.done) for one in rounds),
    }
    for name, values in (("ttft", ttfts(rounds)), ("itl", itls(rounds)), ("exposed", exposed(rounds))):
        for share, value in zip(("p50", "p99"), quantiles(values), strict=True):
            row[f"{name}_{share}_ms"] = None if value is None else value * 1e3
    row |= {name: statistics.median(one.values) for name, one in _of_rounds(options, rounds).items()}
    return row


def _of_rounds(options: Options, rounds: Sequence[Round]) -> dict[str, Figures]:
    slo = options.slo_ttft_ms / 1e3, options.slo_itl_ms / 1e3
    found = {
        "goodput": Figures("requests/s", tuple(one.goodput(*slo) for one in rounds)),
        "attainment": Figures("", tuple(one.attainment(*slo) for one in rounds)),
        "requests_per_second": Figures(
            "requests/s", tuple(len(one.done) / one.seconds if one.done else 0.0 for one in rounds)
        ),
    }
    rates = [one.hit_rates() for one in rounds]
    for tier, used in zip(TIERS, (options.dram_mib > 0, bool(options.nvme), bool(options.objects)), strict=True):
        if used:
            found[f"hit_rate_{tier}"] = Figures("", tuple(one.get(tier, 0.0) for one in rates))
    found["kv_gb"] = Figures("GB", tuple(one.kv_nbytes / _GIGA for one in rounds))
    found["moved_gb"] = Figures("GB", tuple(sum(_to_peers(one).values()) / _GIGA for one in rounds))
    for name, which in (("tier_read_gb", 0), ("tier_written_gb", 1)):
        moved = (sum(pair[which] for pair in one.tier_nbytes.values()) / _GIGA for one in rounds)
        found[name] = Figures("GB", tuple(moved))
    # What writing and comparing pages takes is in it, too.
    found["cpu_seconds"] = Figures("s", tuple(one.cpu_seconds for one in rounds), more_is_better=False)
    return found


def route(rounds: Sequence[Round]) -> str:
    """Name the backends that moved bytes to peers, who moved the most first."""
    total: dict[str, int] = {}
    for one in rounds:
        for name, nbytes in _to_peers(one).items():
            total[name] = total.get(name, 0) + nbytes
    return "+".join(sorted(total, key=lambda name: -total[name]))


def _to_peers(turn: Round) -> dict[str, int]:
    return {name: nbytes for name, nbytes in turn.routes.items() if name not in _LOCAL}


_LOCAL = frozenset({"memory", "posix", "directory", "s3", "azure", "gcs", "staging"})

# For people.


def print_table(options: Options, served: Served, measured: Measured, out: Console) -> None:
    """Print a row for each configuration, and what they have been measured with."""
    rows = {chosen: figures(options, chosen, rounds) for chosen, rounds in measured.items()}
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", title=_title(options, served), title_justify="left")
    tiers = [name for name in TIERS if any(f"hit_rate_{name}" in row for row in rows.values())]
    table.add_column("Configuration")
    heads = ["Served", "TTFT ms\np50 / p99", "ITL ms\np50 / p99", "Exposed ms\np50 / p99", "Goodput\n1/s", "In\nSLO", "KV\nGB"]
    if tiers:
        heads += [f"Hits\n{' / '.join(tiers)}", "Tiers GB\nout / in"]
    for head in heads:
        table.add_column(head, justify="right")
    for chosen, row in rows.items():
        label = f"{chosen.label} ({row['route']})" if row["route"] not in ("", chosen.backend) else chosen.label
        cells = [label, f"{row['served']}" + (f", {row['failed']} failed" if row["failed"] else "")]
        cells += [_pair(row[f"{name}_p50_ms"], row[f"{name}_p99_ms"]) for name in ("ttft", "itl", "exposed")]
        cells += [f"{row['goodput']:.2f}", f"{row['attainment']:.0%}", f"{row['kv_gb']:.3f}"]
        if tiers:
            cells.append(" / ".join(f"{row[f'hit_rate_{name}']:.0%}" for name in tiers))
            cells.append(f"{row['tier_read_gb']:.3f} / {row['tier_written_gb']:.3f}")
        table.add_row(*map(escape, cells))
    out.print(table)
    for line in _compared(list(rows.values())):
        out.print(escape(line), soft_wrap=True)


def _pair(p50: float | None, p99: float | None) -> str:
    return "-" if p50 is None or p99 is None else f"{p50:.1f} / {p99:.1f}"


def _title(options: Options, served: Served) -> str:
    token = served.geometry.token_nbytes
    arrivals = f"trace {Path(options.trace).name}" if options.trace else f"Poisson {options.rate:g}/s"
    lines = [
        f"{served.model.name}, {served.model.layers} layers, {token} bytes a token; {options.prefill} prefill, {options.decode}"
        f" decode; {arrivals}, {options.requests} requests, {options.rounds} rounds",
        f"compute simulated: {options.tflops:g} TFLOP/s, {options.memory_bandwidth:g} GB/s, {options.speed:g} times that speed;"
        f" SLO: TTFT {options.slo_ttft_ms:g} ms, ITL {options.slo_itl_ms:g} ms; every byte moved and checked",
    ]
    return escape("\n".join(lines))


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what streaming layers makes of it, for each backend that was measured both ways."""
    found = []
    for whole in rows:
        for layers in rows:
            same = all(whole[name] == layers[name] for name in ("backend", "classes"))
            if same and (whole["schedule"], layers["schedule"]) == ("whole", "layers"):
                hidden, ttft = (_ratio(layers[name], whole[name]) for name in ("exposed_p50_ms", "ttft_p50_ms"))
                if hidden and ttft:
                    classes = " with classes" if whole["classes"] == Classes.ON.value else ""
                    found.append(
                        f"{whole['backend']}{classes}: by layers, exposed p50 is {hidden:.2f} times and TTFT p50 {ttft:.2f} times"
                        " what they are whole"
                    )
    return found


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first and second else None


# For programs.


def results(
    options: Options, served: Served, measured: Measured, command: Sequence[str], system: Mapping[str, Any], started: str
) -> Results:
    """Return the result file: rows `ttft`, `itl`, `exposed`, `requests` of each configuration, and one request's timeline."""
    rows: list[Row] = []
    timelines = []
    parameters = {**options.changed(), "model": served.model.name}
    page = served.geometry.token_nbytes // served.geometry.layers * options.page_size
    for chosen, rounds in measured.items():
        common: dict[str, Any] = {
            "contender": chosen.label,
            "block_nbytes": page,
            "batch_nbytes": 0,
            "scheme": f"{options.prefill}P{options.decode}D",
            "route": route(rounds),
            "src": "DRAM",
            "dst": "DRAM",
            "parameters": parameters,
        }
        for op, values in (("ttft", ttfts), ("itl", itls), ("exposed", exposed)):
            series = tuple(condensed(found) for one in rounds if (found := values([one])))
            if series:
                rows.append(Row(op=op, latencies=series, **common))
        rows.append(Row(op="requests", figures=_of_rounds(options, rounds), **common))
        done = [one for one in rounds[-1].done if not one.request.batch] or rounds[-1].done
        if done:
            typical = sorted(done, key=lambda one: one.ttft)[len(done) // 2]
            timelines.append(timeline(f"{chosen.label}: a request of median TTFT, {typical.request.prompt} tokens", typical))
    return Results(tuple(command), dict(system), tuple(rows), tuple(timelines), started)


def timeline(title: str, record: Record) -> Timeline:
    """Draw one request, from its coming: what it waited for, the tier, each layer computed and moved, and the first tokens."""
    zero = record.came
    said, told = record.said, record.told
    spans = [Span("waiting", "for memory and its turn", 0.0, max(0.0, said["turn"] - zero))]
    if said["tiers"]:
        spans.append(Span("tiers", f"{len(said['tiers'])} blocks", said["turn"] - zero, said["loaded"] - zero))
    before = said["loaded"]
    for layer, end in enumerate(said["layers"]):
        spans.append(Span("prefill", str(layer), before - zero, end - zero))
        before = max(before, end)
    whole = max(said["layers"])
    streamed = min(told["arrived"]) < whole
    for layer, (ready, end) in enumerate(zip(said["layers"], told["arrived"], strict=True)):
        start = ready if streamed else whole
        spans.append(Span("transfer", str(layer), min(start, end) - zero, end - zero))
    tokens = record.tokens[: TOKENS_DRAWN + 1]
    spans += [
        Span("decode", f"token {number}", start - zero, end - zero)
        for number, (start, end) in enumerate(itertools.pairwise(tokens), 2)
    ]
    return Timeline(title, tuple(spans))


def write(
    options: Options, served: Served, measured: Measured, command: Sequence[str], system: Mapping[str, Any], started: str
) -> None:
    """Print the table, or write the form that is asked for."""
    match options.format:
        case Format.TEXT:
            sys.stderr.flush()
            print_table(options, served, measured, console())
            if options.output:
                with open(options.output, "w") as file:
                    print_table(options, served, measured, Console(file=file, width=250, highlight=False))
        case Format.JSON:
            made = results(options, served, measured, command, system, started)
            if options.output:
                made.write(options.output)
            else:
                print(json.dumps(made.as_dict(), allow_nan=False), flush=True)
        case _:
            rows = [figures(options, chosen, rounds) for chosen, rounds in measured.items()]
            columns = [name for name in COLUMNS if any(name in row for row in rows)]
            write_rows(options.format, options.output, columns, rows, system)

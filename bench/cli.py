"""The command line: one command for each part of the result, and `all`."""

from __future__ import annotations

import enum
import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bench import system
from bench.commands import COMMANDS, Command, Suite
from bench.gpu.cli import app as gpu
from bench.process import WorkerError
from bench.record.command import results
from bench.report import Row, show, to_json
from bench.served import JUICEFS, NGINX
from bench.session import DEFAULT, SAME_HOST, TCP, UCX_TCP, Settings, WrongBytes, judged
from bench.suites import files, tiers

app = typer.Typer(help="Measure nixl_async, its peers and the machine's limits in alternating turns.", no_args_is_help=True)

WIDTH_WITHOUT_TERMINAL = 200


class Format(enum.Enum):
    """How results are printed."""

    TABLE = "table"
    JSON = "json"


class Only(enum.Enum):
    """Which paths between the two processes, which servers or which ways to a file take part."""

    ALL = "all"
    SAME_HOST = "samehost"
    TCP = "tcp"
    NGINX = NGINX
    JUICEFS = JUICEFS
    DIRECT = files.DIRECT
    CACHE = files.CACHE
    DRAM = tiers.DRAM

    def wants(self, path: str) -> bool:
        """Whether a suite for the path called `path` runs."""
        if self is Only.TCP:
            return path in (TCP.name, UCX_TCP.name, DEFAULT.name)
        return self is Only.ALL or path == (SAME_HOST.name if self is Only.SAME_HOST else self.value)


NixlPython = Annotated[
    str | None,
    typer.Option("--nixl-python", envvar="NIXL_ASYNC_NIXL_PYTHON", help="Interpreter of an environment with NIXL's wheel."),
]
MooncakePython = Annotated[
    str | None,
    typer.Option(
        "--mooncake-python", envvar="NIXL_ASYNC_MOONCAKE_PYTHON", help="Interpreter of an environment with Mooncake's wheel."
    ),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="A table, or one JSON object a line (the first is the machine).")
]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that everything works; promises are not judged.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Samples of each contender.")]
Mebibytes = Annotated[int, typer.Option("--mib", min=1, help="Bytes that a throughput sample moves, in MiB.")]
Pages = Annotated[
    list[int] | None, typer.Option("--page", help="Sizes of pages, objects or blocks, bytes (default: the table's).")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if a promise is not met.")]


Paths = Annotated[Only, typer.Option("--path", help="Measure only one path, one server, or one way to a file.")]


@dataclass
class _Options:
    settings: Settings
    only: Only
    format: Format
    strict: bool


def _end(number: int, frame: object) -> None:
    # As Ctrl-C does: servers end, and what they kept in memory goes.
    raise SystemExit(128 + number)


def _run(options: _Options, commands: dict[str, Command]) -> None:
    signal.signal(signal.SIGTERM, _end)
    out, err = Console(), Console(stderr=True, soft_wrap=True)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(width=WIDTH_WITHOUT_TERMINAL)
    settings = options.settings
    settings.warn = lambda text: err.print(f"[yellow]{escape(text)}[/]")
    header = system.describe({"nixl": settings.nixl_python, "mooncake": settings.mooncake_python})
    as_json = options.format is Format.JSON
    if as_json:
        print(to_json({"system": header}), flush=True)
    else:
        out.print("\n".join(f"[dim]{key}: {value}[/]" for key, value in header.items()), soft_wrap=True)
    missed, failed = 0, 0
    for name, command in commands.items():
        rows = []
        for path, suite in command.suites:
            if not options.only.wants(path):
                continue
            try:
                for row in _measure(suite, settings, err, quiet=as_json):
                    rows.append(row)
                    missed += row.met is False
                    if as_json:
                        print(to_json(row.as_dict()), flush=True)
            except (WorkerError, WrongBytes) as error:
                failed += 1
                err.print(f"[bold red]{name}, {path}: failed:[/] {escape(str(error))}")
        if not as_json and rows:
            show(out, command.title, rows)
    if missed and not as_json:
        out.print(f"[bold red]{missed} rows miss a target[/]")
    if failed or (missed and options.strict):
        raise typer.Exit(1)


def _measure(suite: Suite, settings: Settings, err: Console, *, quiet: bool) -> Iterator[Row]:
    spinner = err.status("starting") if err.is_terminal else None
    settings.progress = (lambda text: spinner.update(escape(text))) if spinner else (lambda text: None)
    with spinner or nullcontext():
        for row in judged(suite(settings), settings):
            if spinner is None and not quiet:
                err.print(f"[dim]{escape(str(row.case))}: {row.ours.median:.4g} {row.unit}[/]")
            yield row


def _command(name: str, help_text: str, commands: dict[str, Command], usual_mib: int = 256) -> None:
    def command(
        nixl_python: NixlPython = None,
        mooncake_python: MooncakePython = None,
        output: FormatOption = Format.TABLE,
        path: Paths = Only.ALL,
        page: Pages = None,
        quick: Quick = False,
        rounds: Rounds = 7,
        mib: Mebibytes = usual_mib,
        strict: Strict = False,
    ) -> None:
        settings = Settings(nbytes=mib << 20, rounds=rounds, nixl_python=nixl_python, mooncake_python=mooncake_python)
        if quick:
            settings = settings.made_quick()
        if page:
            settings.pages = settings.sizes = tuple(page)
        _run(_Options(settings, path, output, strict), commands)

    app.command(name, help=help_text)(command)


for _name, _command_help in {
    "throughput": "Bytes per second of many pages in random order, same host and TCP.",
    "slices": "30,000 head slices of 1 to 4 KiB, TP 4 to TP 2, beside as many bytes in one piece.",
    "layers": "80 and 32 layers pushed and pulled while they are computed: what is not hidden.",
    "latency": "One 4 KiB page: call to awaited completion.",
    "notification": "4 KiB write + notification + answering notification.",
    "stall": "Loop stall on both sides while 1 GiB moves.",
    "idle": "CPU of an agent with 8 peers and 100 pending waits.",
    "busy-peer": "A pull from a peer that spins in pure Python.",
    "many": "10,000 small transfers at once.",
    "membership": "1,000 agents through each store, 64 regions and 8 updates each; an agent of 100,000 regions.",
    "compat": "The drop-in for NIXL's Python API beside NIXL, asked by one program.",
    "descriptors": "Nanoseconds per descriptor; prepared transfers.",
    "planner": "Nanoseconds per head slice of a planned request.",
    "qos": "Shares of three traffic classes; 1 MiB urgent transfers beside 1 GiB of bulk.",
    "failover": "Milliseconds from the cut of a route to the next transfer by another one.",
    "verify": "Transfers compared end to end by checksums, beside those that are not.",
    "tracing": "OpenTelemetry spans of transfers, recorded or not sampled, beside none.",
    "scheduler": "Microseconds per transfer with 1,000 to 100,000 at once; nanoseconds per page.",
    "s3-get": "Objects of 64 KiB to 64 MiB out of an S3 server.",
    "s3-put": "Objects of 1 to 64 MiB into an S3 server, payload signed and not.",
    "s3-many": "Thousands of objects of 64 KiB in one transfer: speed, loop and memory.",
    "azure": "Blobs of 8 MiB out of Azurite and into it.",
    "files": "Blocks of 16 KiB to 1 MiB of a file, past the page cache and through it.",
    "tiers": "Blocks of 64 KiB by their keys, in memory and in files; contains. 100,000 of them: --mib 6250.",
}.items():
    _command(_name, _command_help, {_name: COMMANDS[_name]}, usual_mib=COMMANDS[_name].mib)
_command("all", "Every command, one after the other.", COMMANDS)
app.command("results")(results)
app.add_typer(gpu, name="gpu")

"""The command line, `nixl-async`: demo, doctor, bench, self-test, backends, top, dump, trace, run-as-nixl, version."""

from __future__ import annotations

import asyncio
import enum
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, NoReturn, TypeVar

import typer

T = TypeVar("T")
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130
UNREAD = 128 + signal.SIGPIPE
IN_PROCESS = "memory"


class ModelName(enum.StrEnum):
    """The model shapes that the demo knows."""

    LLAMA_8B = "llama-3.1-8b"
    LLAMA_70B = "llama-3.1-70b"
    DEEPSEEK_R1 = "deepseek-r1"
    QWEN3_235B = "qwen3-235b"


class Format(enum.StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


class Report(enum.StrEnum):
    """How the doctor's report is printed."""

    TEXT = "text"
    JSON = "json"


class Versus(enum.StrEnum):
    """What the demo can be compared with."""

    NIXL = "nixl"


def _fail(text: str, code: int = 1) -> typer.Exit:
    typer.echo(f"nixl-async: {text}", err=True)
    return typer.Exit(code)


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine; Ctrl-C and SIGTERM cancel it, and end the program when it has cleaned up."""

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        typer.echo("nixl-async: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def demo(
    model: Annotated[ModelName, typer.Option(help="Whose KV cache shape is moved.")] = ModelName.LLAMA_8B,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the request (default: 2048).")] = 2048,
    page_size: Annotated[int, typer.Option(min=1, max=4096, help="Tokens in a page.")] = 16,
    layers_per_push: Annotated[int, typer.Option(min=1, help="Layers that are computed, and go, together.")] = 1,
    compute_ms: Annotated[
        float, typer.Option(min=0.0, max=10_000.0, help="Simulated compute of a layer, milliseconds.")
    ] = 10.0,
    backend: Annotated[str | None, typer.Option(help="Move by this backend only (default: the best there is).")] = None,
    versus: Annotated[Versus | None, typer.Option(help="Do the same job with this library too.")] = None,
    nixl_python: Annotated[
        str | None,
        typer.Option(
            envvar="NIXL_ASYNC_NIXL_PYTHON", help="Interpreter of an environment with NIXL's wheel, for --versus nixl."
        ),
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="A table, or one JSON object.")] = Format.TABLE,
) -> None:
    """Push a real paged KV cache from a prefill into a decode process, layer by layer, and check every byte."""
    from nixl_async.demo.job import Job
    from nixl_async.demo.report import Progress, print_result
    from nixl_async.demo.run import DemoFailed, check_memory, run_job
    from nixl_async.demo.versus import check_python, ratios, run_nixl
    from nixl_async.errors import ConfigurationError, NixlError

    job = Job(model.value, tokens, page_size, layers_per_push, compute_ms / 1e3)
    if layers_per_push > job.shape.layers:
        raise _fail(f"--layers-per-push is {layers_per_push}; {model.value} has {job.shape.layers} layers", 2)
    try:
        check_memory(job)
        backends = None if backend is None else [_known(backend)]
        if versus is not None:
            if nixl_python is None:
                raise ConfigurationError(
                    "--versus nixl needs --nixl-python: the interpreter of an environment with NIXL's wheel"
                )
            check_python(nixl_python)
    except ConfigurationError as error:
        raise _fail(str(error), 2) from None

    async def work() -> dict[str, Any]:
        with Progress(job, "nixl_async") as progress:
            result = await run_job(job, backends, progress.take)
        if versus is not None and nixl_python is not None:
            with Progress(job, "NIXL") as progress:
                theirs = await run_nixl(job, nixl_python, progress.take)
            result["versus"] = {"nixl": theirs, "ratios": ratios(result, theirs)}
        return result

    try:
        result = _run(work)
    except DemoFailed as error:
        raise _fail(str(error)) from None
    except NixlError as error:
        raise _fail(str(error)) from None
    if output is Format.JSON:
        print(json.dumps(result))
    else:
        print_result(result)


def _known(name: str) -> str:
    from nixl_async.backend import load_backend
    from nixl_async.errors import ConfigurationError

    load_backend(name)
    if name == IN_PROCESS:
        raise ConfigurationError(f"backend {name!r} does not reach other processes; the demo has two")
    return name


def _print_version(asked: bool) -> None:
    from nixl_async import __version__

    if asked:
        print(f"nixl-async {__version__}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Move LLM inference data between processes, machines and memories."""


@app.command()
def version() -> None:
    """Print the versions of the library and of what it runs on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from nixl_async import __version__

    print(f"nixl-async {__version__}")
    for name in ("numpy", "ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13", "uvloop"):
        try:
            print(f"{name} {installed(name)}")
        except PackageNotFoundError:
            continue
    print(f"python {sys.version.split()[0]}")


@app.command()
def backends() -> None:
    """List the backends, whether each can be used here, and its limits."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nixl_async.backend import BUILT_IN, load_backend
    from nixl_async.errors import NixlError

    table = Table("backend", "usable", "rank", "ops at once", "op of at most")
    for name in BUILT_IN:
        try:
            found = load_backend(name)
        except NixlError as error:
            table.add_row(name, escape(f"no: {error}"), "", "", "")
            continue
        limits = found.limits
        table.add_row(name, "yes", str(found.rank), str(limits.max_ops), f"{limits.max_op_nbytes >> 10} KiB")
    console = Console()
    console.print(table) if console.is_terminal or "COLUMNS" in os.environ else Console(width=160).print(table)


@app.command("self-test")
def self_test() -> None:
    """Move a small KV cache by every backend that can be tried here, and check every byte."""
    from nixl_async.demo.selftest import try_backends

    async def work() -> int:
        passed = failed = 0
        async for name, works, text in try_backends():
            print(f"{name}: {text}" if works is None else f"{name}: {'ok' if works else 'FAILED'}, {text}")
            passed += works is True
            failed += works is False
        return failed or not passed

    if _run(work):
        raise typer.Exit(1)


@app.command()
def doctor(
    test: Annotated[bool, typer.Option("--test/--no-test", help="Run the self-test.")] = True,
    seconds: Annotated[float, typer.Option(min=0.1, max=600.0, help="Seconds of the self-test.")] = 10.0,
    directory: Annotated[
        str | None, typer.Option(help="Where files are tried, a directory of the NVMe to be used (default: a temporary one).")
    ] = None,
    output: Annotated[Report, typer.Option("--format", help="Text, or one JSON object.")] = Report.TEXT,
) -> None:
    """Say what this machine offers, which way bytes will go and why, and what would make them faster; 1 if something is broken."""
    from rich.console import Console

    from nixl_async.doctor import examine
    from nixl_async.errors import ConfigurationError

    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)
    progress = Console(stderr=True)
    try:
        with progress.status("examining") as status:
            told = _run(lambda: examine(seconds=seconds if test else 0.0, directory=directory, progress=status.update))
    except ConfigurationError as error:
        raise _fail(str(error), 2) from None
    if output is Report.JSON:
        print(json.dumps(told.as_dict()))
    else:
        from nixl_async.doctor.text import print_report

        print_report(console, told)
    if not told.healthy:
        raise typer.Exit(1)


@app.command("run-as-nixl", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run_as_nixl(context: typer.Context) -> None:
    """Run a command, as `run-as-nixl -- COMMAND`; to it, and to all that it starts, `import nixl` means this library."""
    from nixl_async.compat import path

    if not context.args:
        raise _fail("run-as-nixl needs a command: nixl-async run-as-nixl -- python server.py", 2)
    given = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": path() + (os.pathsep + given if given else "")}
    try:
        # The command takes this process's place: signals and the exit status are its own.
        os.execvpe(context.args[0], context.args, environment)
    except OSError as error:
        raise _fail(
            f"{context.args[0]!r} cannot be run: {error.strerror}", 127 if error.errno == errno.ENOENT else 126
        ) from None


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def bench(context: typer.Context) -> None:
    """Plan and run benchmarks, compare their results and draw them; `bench --help` lists the commands."""
    # Loaded here: nobody else pays for it.
    from nixl_async.benchmarks.cli import app as benchmarks

    benchmarks(context.args, prog_name="nixl-async bench")


Socket = Annotated[str, typer.Argument(help="The socket that the process opened: inspection.serve(agent, path=…).")]
trace = typer.Typer(help="Record what a running process moves.", no_args_is_help=True)
app.add_typer(trace, name="trace")


@app.command()
def top(
    socket: Socket,
    seconds: Annotated[float, typer.Option(min=0.1, max=60.0, help="Seconds between two looks.")] = 1.0,
    rounds: Annotated[int | None, typer.Option(min=1, help="Look so often, and end (default: until interrupted).")] = None,
) -> None:
    """Show a process's peers, routes, rates, queues and oldest transfers, live."""
    from rich.console import Console

    from nixl_async.errors import ConfigurationError
    from nixl_async.top import watch

    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=160)
    stop = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        # An exception that is raised while an object is being freed is lost: the first interruption is remembered instead.
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        watch(socket, seconds, rounds, console, stop)
    except ConfigurationError as error:
        raise _fail(str(error)) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.is_set():
        raise typer.Exit(INTERRUPTED)


@app.command()
def dump(
    socket: Socket,
    limit: Annotated[int, typer.Option(min=0, help="So many transfers and peers at most.")] = 1000,
) -> None:
    """Print what a process's agents are doing, each live transfer with its history, as JSON."""
    from nixl_async.errors import ConfigurationError
    from nixl_async.inspection import ask

    try:
        print(json.dumps(ask(socket, {"do": "dump", "limit": limit}), indent=2))
    except ConfigurationError as error:
        raise _fail(str(error)) from None


@trace.command()
def record(
    socket: Socket,
    output: Annotated[str, typer.Option("--output", "-o", help="The file to be written.")] = "trace.json",
    seconds: Annotated[float, typer.Option(min=0.01, max=600.0, help="For how long.")] = 5.0,
) -> None:
    """Write what a process does for some seconds as a trace for https://ui.perfetto.dev: queues, ops, layers and streams."""
    from pathlib import Path

    from nixl_async.errors import ConfigurationError
    from nixl_async.inspection import ask
    from nixl_async.timeline import write

    try:
        told = ask(socket, {"do": "record", "seconds": seconds}, timeout=seconds + 30)
        write(Path(output), told["events"])
    except (ConfigurationError, OSError) as error:
        raise _fail(str(error)) from None
    dropped = f"; {told['dropped']} older ones were dropped" if told["dropped"] else ""
    print(f"{output}: {len(told['events'])} events{dropped}")


class _Output(io.TextIOWrapper):
    """Standard output that ends the program quietly when nobody reads it any more, as SIGPIPE ends others.

    The signal itself would end it for sockets that break, too.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._end()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._end()

    def _end(self) -> NoReturn:
        # What is still written while the program ends has to go somewhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        raise SystemExit(UNREAD)


def main() -> None:
    """Run the command line."""
    given = sys.stdout
    if isinstance(given, io.TextIOWrapper):
        options = {"encoding": given.encoding, "errors": given.errors, "line_buffering": given.line_buffering}
        sys.stdout = _Output(given.detach(), **options)  # type: ignore[arg-type]
    try:
        app()
    finally:
        if given is not None:
            # Here, and not when the interpreter ends, which would complain.
            sys.stdout.flush()


if __name__ == "__main__":
    main()

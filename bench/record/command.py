"""The command `python -m bench results`: measure everything in one run, and make the document of its files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import environments, system
from bench.process import ROOT
from bench.record import files
from bench.record.files import Part
from bench.record.losses import losses, misses
from bench.record.machine import available_nbytes
from bench.record.plan import MINUTES, PARTS, Planned, plan
from bench.record.render import document, summary
from bench.record.run import Recorder, Screen
from bench.session import Settings
from nixl_async.benchmarks.results import ResultsError

OUTPUT = Path("bench/results")
REPORT = "RESULTS.md"
FAILED, WRONG, INTERRUPTED = 1, 2, 130
REFRESHES = 2
"""A second: the screen has little of the CPU that is measured."""
TESTS_NIXL = ROOT / ".nixl-env" / "bin" / "python"
TESTS_SERVERS = ROOT / ".servers" / "node_modules"
"""What `.ci/test` makes is used, where nothing else is told."""


def results(
    output: Annotated[Path, typer.Option("--output", help="Directory of the files, one for each part.")] = OUTPUT,
    report: Annotated[
        Path | None,
        typer.Option("--report", help=f"The document (default: bench/{REPORT}, or {REPORT} in another --output)."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="PART", help="Measure this part only; may be repeated: " + ", ".join(PARTS) + "."),
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=1.0, help="How long it may take, about: sizes follow.")] = MINUTES,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Rounds of the suites (default: what --minutes allows).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that everything works; needs another --output.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep parts that are there, whole, of this machine and this code.")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="Measure nothing: make the document of the files again.")] = False,
    nixl_python: Annotated[
        str | None,
        typer.Option(
            "--nixl-python",
            envvar="NIXL_ASYNC_NIXL_PYTHON",
            help="Interpreter of an environment with NIXL's wheel (default: it is made).",
        ),
    ] = None,
    mooncake_python: Annotated[
        str | None,
        typer.Option("--mooncake-python", envvar="NIXL_ASYNC_MOONCAKE_PYTHON", help="The same with Mooncake's."),
    ] = None,
    environments_directory: Annotated[
        Path, typer.Option("--environments", help="Where peers' environments are, or are made if they are not there.")
    ] = Path(".peers"),
    install: Annotated[
        bool, typer.Option(help="Make environments that are not there; without, those peers are absent.")
    ] = True,
) -> None:
    """Measure everything in one run, the sweep beside NIXL and every suite; write JSON and the document of it."""
    err = Console(stderr=True, soft_wrap=True)
    default = output.resolve() == (ROOT / OUTPUT).resolve()
    if unknown := [name for name in only or () if name not in PARTS]:
        raise _fail(err, f"--only {unknown[0]}: there is no such part; there are {', '.join(PARTS)}", WRONG)
    if quick and default and not render:
        raise _fail(err, f"--quick would put figures that mean nothing into {OUTPUT}: give another --output", WRONG)
    path = report or (ROOT / "bench" / REPORT if default else output / REPORT)
    if not path.absolute().parent.is_dir() and path.absolute().parent != output.absolute():
        raise _fail(err, f"--report is {path}; its directory does not exist", WRONG)
    try:
        if render:
            _render(err, output, path)
            return
        output.mkdir(parents=True, exist_ok=True)
    except (ResultsError, OSError) as error:
        raise _fail(err, str(error), WRONG) from None
    found, absent = _interpreters(err, nixl_python, mooncake_python, environments_directory, install=install)
    base = Settings(nixl_python=found.get("nixl"), mooncake_python=found.get("mooncake"), quick=quick)
    planned = plan(only or PARTS, base, minutes, rounds, available_nbytes())
    header = system.describe({name: found.get(name) for name in environments.PACKAGES})
    if absent:
        header["absent"] = absent
    with _screen(err, planned) as screen:
        recorder = Recorder(output, header, _command(), found.get("nixl", ""), screen, quick=quick)
        if resume:
            planned = [one for one in planned if not _kept(recorder, one, screen)]
        _announce(err, planned)
        code = _measure(recorder, planned, err)
    try:
        _render(err, output, path)
    except ResultsError as error:
        raise _fail(err, str(error), code or FAILED) from None
    if code:
        raise typer.Exit(code)


def _measure(recorder: Recorder, planned: Sequence[Planned], err: Console) -> int:
    """Measure; return the exit status."""
    if TESTS_SERVERS.is_dir():
        os.environ.setdefault("NIXL_ASYNC_NODE_MODULES", str(TESTS_SERVERS))
    before = signal.signal(signal.SIGTERM, _end)
    try:
        done = recorder.run(planned)
    except KeyboardInterrupt:
        err.print("[yellow]interrupted; what was measured is written, --resume goes on from there[/]")
        return INTERRUPTED
    except SystemExit as error:
        return int(error.code or 0)
    except ResultsError as error:
        raise _fail(err, str(error), FAILED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    return FAILED if any(not part.about.complete for part in done) else 0


def _end(number: int, frame: object) -> None:
    # As Ctrl-C does: processes end, and what was measured is written.
    raise SystemExit(128 + number)


def _fail(err: Console, text: str, code: int) -> typer.Exit:
    err.print(f"[bold red]{escape(text)}[/]")
    return typer.Exit(code)


def _command() -> tuple[str, ...]:
    """Return what was run, without the interpreters and directories of this machine."""
    kept, skipped = [], False
    for one in sys.argv[1:]:
        places = ("--nixl-python", "--mooncake-python", "--environments", "--output", "--report")
        if not skipped and not one.startswith(places):
            kept.append(one)
        skipped = one in places
    return "python", "-m", "bench", *kept


def _interpreters(
    err: Console, nixl: str | None, mooncake: str | None, directory: Path, *, install: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the peers' interpreters by name, made if need be, and of those that are not to be had why."""
    found, absent = {name: given for name, given in (("nixl", nixl), ("mooncake", mooncake)) if given}, {}
    if "nixl" not in found and TESTS_NIXL.exists():
        found["nixl"] = str(TESTS_NIXL)
    for name in environments.PACKAGES:
        if name in found:
            if shutil.which(found[name]) is None:
                raise _fail(err, f"--{name}-python {found[name]} cannot be run", WRONG)
            continue
        try:
            if not (directory / name / "made-of").is_file():
                if not install:
                    absent[name] = "it has no environment here, and --no-install makes none"
                    continue
                err.print(f"[dim]making an environment with {name}, {directory / name}[/]")
            found[name] = str(environments.make(directory.resolve(), name))
        except (subprocess.CalledProcessError, OSError) as error:
            absent[name] = f"its environment cannot be made: {type(error).__name__}"
            err.print(f"[yellow]{name} is absent: {escape(str(error))}[/]")
    return found, absent


# What people see.


def _kept(recorder: Recorder, planned: Planned, screen: Screen) -> bool:
    kept = recorder.keep(planned)
    if kept:
        screen.kept(planned)
    return kept


def _announce(err: Console, planned: Sequence[Planned]) -> None:
    seconds = sum(one.seconds for one in planned)
    if not planned:
        err.print("every part is there already")
        return
    end = datetime.now() + timedelta(seconds=seconds)
    each = ", ".join(f"{one.name} {_minutes(one.seconds)}" for one in planned)
    err.print(f"{_parts(len(planned))}, about {_minutes(seconds)}, until {end:%H:%M}: {each}")


def _parts(count: int) -> str:
    return "1 part" if count == 1 else f"{count} parts"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


@contextmanager
def _screen(err: Console, planned: Sequence[Planned]) -> Iterator[Screen]:
    """Show how a run goes on standard error: with a bar on a terminal, else a line as each part begins and ends."""

    def warn(text: str) -> None:
        err.print(f"[yellow]{escape(text)}[/]")

    def begin(one: Planned) -> None:
        if not err.is_terminal:
            err.print(f"[dim]{one.name}: about {_minutes(one.seconds)}[/]")

    def end(one: Planned, part: Part) -> None:
        lost = len(losses([part])) + len(misses([part]))
        state = "" if part.about.complete else f"[bold red]{part.about.state}[/], "
        err.print(f"{one.name}: {state}{part.about.seconds:.0f} s, {lost} rows lost or under a target")
        for text in part.about.failures:
            err.print(f"[bold red]{escape(text)}[/]")

    def kept(one: Planned) -> None:
        err.print(f"[dim]{one.name}: kept[/]")

    screen = Screen(warn=warn, begin=begin, end=end, kept=kept)
    if not err.is_terminal:
        yield screen
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("of about {task.fields[whole]}; {task.description}"),
    )
    with Progress(*columns, console=err, refresh_per_second=REFRESHES) as progress:
        total = sum(one.seconds for one in planned)
        task = progress.add_task("starting", total=total, whole=_minutes(total))
        passed, begun = 0.0, time.monotonic()
        under_way: Planned | None = None

        def doing(text: str) -> None:
            within = 0.0 if under_way is None else min(time.monotonic() - begun, under_way.seconds)
            name = "" if under_way is None else f"{under_way.name}: "
            progress.update(task, completed=passed + within, description=escape(name + text))

        def begin_shown(one: Planned) -> None:
            nonlocal under_way, begun
            under_way, begun = one, time.monotonic()
            doing("starting")

        def pass_by(one: Planned) -> None:
            nonlocal passed, under_way
            passed, under_way = passed + one.seconds, None
            doing("")

        def end_shown(one: Planned, part: Part) -> None:
            pass_by(one)
            end(one, part)

        def kept_shown(one: Planned) -> None:
            pass_by(one)
            kept(one)

        screen.doing, screen.begin, screen.end, screen.kept = doing, begin_shown, end_shown, kept_shown
        yield screen


def _render(err: Console, output: Path, path: Path) -> None:
    """Make the document of what is there.

    Raises:
        ResultsError: there is nothing, or something that is no part of a run.
    """
    parts = files.read_all(output, PARTS)
    if not parts:
        raise ResultsError(f"{output} has no part of a run; python -m bench results writes them")
    try:
        path.write_text(document(parts))
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error.strerror}") from None
    for what, found, target in summary(parts):
        err.print(escape(f"{what}: {found} {target}".rstrip()))
    lost, missed = len(losses(parts)), len(misses(parts))
    err.print(f"{path}: {_parts(len(parts))}, {lost} rows in which a peer is better, {missed} targets missed")

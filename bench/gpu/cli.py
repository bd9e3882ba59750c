"""The command line of the GPU benches: one command for each part, `all`, and `collect` for what `run.sh` has gathered."""

from __future__ import annotations

import ctypes
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bench import process, system
from bench.gpu import suites
from bench.process import WorkerError
from bench.report import Row, show, to_json
from bench.session import Settings, WrongBytes, judged

app = typer.Typer(help="Measure what a GPU takes part in; needs a CUDA device and cupy.", no_args_is_help=True)

WIDTH = 200
COMMAND_SECONDS = 60.0
NO_DEVICE = 3
"""Exit status where there is no CUDA device."""

Suite = Callable[[Settings], Iterator[Row]]
COMMANDS: dict[str, tuple[str, str, Suite]] = {
    "pages": ("VRAM of two processes, pages in random order", "VRAM to and from another process's VRAM.", suites.pages),
    "peer-host": ("VRAM and another process's host memory", "VRAM to and from a peer's host memory.", suites.peer_host),
    "host": ("VRAM and host memory of one process", "VRAM to and from pinned and pageable memory.", suites.host),
    "gather": ("Gather and scatter within one process", "Pages in random order into one block, and back.", suites.gather),
    "overlap": ("Layers sent beside compute", "80 layers sent as a stream of matrix products reaches them.", suites.overlap),
    "wake": (
        "From stream to loop and back",
        "How soon the loop follows a stream, and a stream a transfer.",
        suites.wake,
    ),
}
USUAL_MIB = {"host": 256, "peer-host": 256}

NixlPython = Annotated[
    str | None,
    typer.Option("--nixl-python", envvar="NIXL_ASYNC_NIXL_PYTHON", help="Interpreter of an environment with NIXL's wheel."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Directory to write COMMAND.json into.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that everything works; promises are not judged.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Samples of each contender.")]
Mebibytes = Annotated[int | None, typer.Option("--mib", min=1, help="Bytes that a sample moves, in MiB.")]
Pages = Annotated[list[int] | None, typer.Option("--page", help="Sizes of pages, bytes (default: 4 KiB to 1 MiB).")]


def why_not() -> str:
    """Tell why nothing can be measured here; empty if it can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the CUDA driver has no device"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"cupy cannot be imported ({error})"
    return ""


def describe_device() -> dict[str, str]:
    """Describe the device and what drives it."""
    import cupy

    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    return {
        "gpu": properties["name"].decode(),
        "gpu memory": f"{properties['totalGlobalMem'] >> 20} MiB",
        "driver, runtime": f"{runtime.driverGetVersion()}, {runtime.runtimeGetVersion()}",
        "cupy": cupy.__version__,
    }


def _console() -> Console:
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def _run(names: list[str], settings: Settings, mib: int | None, out: Path | None) -> None:
    console, err = _console(), Console(stderr=True, soft_wrap=True)
    if why := why_not():
        err.print(f"[bold red]nothing is measured:[/] {escape(why)}; the GPU benches need a CUDA device and cupy")
        raise typer.Exit(NO_DEVICE)
    settings.warn = lambda text: err.print(f"[yellow]{escape(text)}[/]")
    # A contender that says nothing must not take the time of the others.
    process.COMMAND_SECONDS = COMMAND_SECONDS
    header = system.describe({"nixl": settings.nixl_python}) | describe_device()
    console.print("\n".join(f"[dim]{key}: {value}[/]" for key, value in header.items()), soft_wrap=True)
    failures = []
    for name in names:
        title, _, suite = COMMANDS[name]
        if not settings.quick:
            settings.nbytes = (mib or USUAL_MIB.get(name, 1024)) << 20
        rows: list[Row] = []
        part: dict[str, Any] = {"system": header, "rows": [], "failures": [], "complete": False}
        try:
            for row in judged(suite(settings), settings):
                rows.append(row)
                part["rows"].append(row.as_dict())
                _write(part, name, out)
                err.print(f"[dim]{escape(name)} {escape(str(row.case))}: {row.ours.median:.4g} {row.unit}[/]")
        except (WorkerError, WrongBytes) as error:
            part["failures"].append(f"{name}: {error}")
            failures.append(name)
            err.print(f"[bold red]{name}: failed:[/] {escape(str(error))}")
        if rows:
            show(console, title, rows)
        part["complete"] = True
        _write(part, name, out)
    if failures:
        raise typer.Exit(1)


def _write(part: dict[str, Any], name: str, out: Path | None) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(to_json(part))


def _command(name: str, help_text: str, names: list[str]) -> None:
    def command(
        nixl_python: NixlPython = None,
        out: Out = None,
        page: Pages = None,
        quick: Quick = False,
        rounds: Rounds = 7,
        mib: Mebibytes = None,
    ) -> None:
        settings = Settings(rounds=rounds, nixl_python=nixl_python)
        if quick:
            settings = settings.made_quick()
        if page:
            settings.pages = tuple(page)
        _run(names, settings, mib, out)

    app.command(name, help=help_text)(command)


for _name in COMMANDS:
    _command(_name, COMMANDS[_name][1], [_name])
_command("all", "Every command, one after the other.", list(COMMANDS))


@app.command()
def collect(
    parts: Annotated[Path, typer.Argument(help="Directory with COMMAND.json files and perhaps tests.xml.")],
    target: Annotated[Path, typer.Argument(help="The one JSON file to write.")],
) -> None:
    """Put what several commands and the tests have written into one file, and print all tables."""
    found: dict[str, Any] = {"system": {}, "tests": _tests(parts / "tests.xml"), "rows": [], "failures": [], "missing": []}
    console = _console()
    tables = []
    for name, (title, _, _) in COMMANDS.items():
        path = parts / f"{name}.json"
        if not path.exists():
            found["missing"].append(name)
            continue
        part = json.loads(path.read_text())
        found["system"] |= part["system"]
        found["rows"] += part["rows"]
        found["failures"] += part["failures"] + ([] if part["complete"] else [f"{name}: it did not come to its end"])
        tables.append((title, [Row.from_dict(row) for row in part["rows"]]))
    target.write_text(to_json(found))
    console.print("\n".join(f"{key}: {value}" for key, value in found["system"].items()), soft_wrap=True)
    console.print(_said(found["tests"]), soft_wrap=True)
    for title, rows in tables:
        if rows:
            show(console, title, rows)
    for failure in found["failures"]:
        console.print(f"[bold red]failed:[/] {escape(failure)}")
    if found["missing"]:
        console.print(f"[bold red]not measured:[/] {', '.join(found['missing'])}")
    if found["failures"] or found["missing"]:
        raise typer.Exit(1)


def _tests(path: Path) -> dict[str, Any]:
    """Read what pytest has written."""
    if not path.exists():
        return {}
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    wrong = [case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None]
    why = Counter(one.get("message", "") for one in suite.iter("skipped"))
    return counts | {"failed": [f"{case.get('classname')}.{case.get('name')}" for case in wrong], "why skipped": dict(why)}


def _said(tests: dict[str, Any]) -> str:
    if not tests:
        return "tests: none ran"
    why = ", ".join(f"{reason} ({count})" for reason, count in tests["why skipped"].items())
    bad = f"; failed: {', '.join(tests['failed'])}" if tests["failed"] else ""
    return (
        f"tests: {tests['tests']}, {len(tests['failed'])} failed, {tests['skipped']} skipped{': ' + why if why else ''}{bad}"
    )

"""The table of environment variables has all that are read, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from nixl_async.compat import central_tcpstore, settings
from tests.agents import ROOT

PAGE = (ROOT / "nixl_async/docs/reference/environment.md").read_text()
SITE = ROOT / "nixl_async/docs"
SOURCES = [
    path for folder in ("nixl_async", "backends") for path in (ROOT / folder).rglob("*.py") if not path.is_relative_to(SITE)
]
NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Za-z0-9]+)*")
READERS = ("setting", "switch", "number", "_first", "_number", "getenv")
ENVIRONMENTS = ("environ", "environment")
NOT_READ = {
    "LD_LIBRARY_PATH": "passed on to programs, as PYTHONPATH is",
    "PATH": "where programs are looked for",
    "PYTHONPATH": "passed on to processes",
    "HOME": "where NIXL's own file is",
    "KUBERNETES_SERVICE_HOST": "whether this is a pod, for the doctor's facts",
    "CUDA_VISIBLE_DEVICES": "CUDA's own, for the doctor's facts",
    "PYTORCH_CUDA_ALLOC_CONF": "torch's own, for the doctor's findings",
    "DIST_EXTRA_CONFIG": "setuptools' own, set while a wheel is built",
    "SLURM": "the name of a launcher",
    "RLIMIT_MEMLOCK": "a limit, no variable",
    "RLIMIT_NOFILE": "a limit, no variable",
}


def _named(path: Path) -> Iterator[str]:
    """Yield what a source file reads from an environment, or names as a variable."""
    text = path.read_text()
    if not re.search("environ|envvar|_VARIABLE|setting|switch|number|_first|getenv", text):
        return
    for node in ast.walk(ast.parse(text)):
        found: list[ast.expr] = []
        match node:
            case ast.Call(func=ast.Attribute(value=where, attr="get" | "pop" | "setdefault"), args=[first, *_]):
                found = [first] if _is_environment(where) else []
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=args) if name in READERS:
                found = list(args)
            case ast.Subscript(value=where, slice=key):
                found = [key] if _is_environment(where) else []
            case ast.Compare(left=left, comparators=[where]):
                found = [left] if _is_environment(where) else []
            case ast.Assign(targets=[target], value=value):
                names = [one.id for one in ast.walk(target) if isinstance(one, ast.Name)]
                found = [one for one in ast.walk(value) if isinstance(one, ast.expr)] if _are_variables(names) else []
        yield from (one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str))
        if isinstance(node, ast.keyword) and node.arg == "envvar":
            assert isinstance(node.value, ast.Constant)
            yield node.value.value


def _is_environment(where: ast.expr) -> bool:
    return getattr(where, "attr", getattr(where, "id", "")) in ENVIRONMENTS


def _are_variables(names: list[str]) -> bool:
    # Launchers are looked for by the second and third entry of each of `_SOURCES`.
    return bool(names) and all(name.endswith("_VARIABLE") or name == "_SOURCES" for name in names)


def _read() -> set[str]:
    return {name for path in SOURCES for name in _named(path) if NAME.fullmatch(name)}


def test_every_variable_that_is_read_is_in_the_table() -> None:
    named = set(re.findall(r"`([A-Za-z0-9_]+)`", PAGE))
    read = _read()
    assert {"NIXL_ASYNC_TOKEN", "NIXL_TELEMETRY_DIR", "SLURM_PROCID", "NIXL_ASYNC_BENCH_OBJ_SECRET_KEY", "COLUMNS"} <= read
    assert read - named - set(NOT_READ) == set()


def test_every_variable_of_the_table_is_read() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    text = "\n".join(path.read_text() for path in SOURCES)
    assert len(named) > 40
    assert {name for name in named if f'"{name}"' not in text and f'"{name.removeprefix("UCX_")}"' not in text} == set()


def test_what_is_set_for_ucx_is_in_the_table() -> None:
    tree = ast.parse((ROOT / "backends/ucx.py").read_text())
    set_for = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").endswith("CONFIGURATION"):
            set_for |= ast.literal_eval(node.value)
    assert set_for
    for name, value in set_for.items():
        assert re.search(rf"\| `UCX_{name}` \| `{re.escape(value)}`", PAGE), name


def test_the_defaults_are_those_of_the_code() -> None:
    for name, value in (
        (central_tcpstore.WAIT_VARIABLE, central_tcpstore.WAIT_MS),
        (central_tcpstore.CALL_VARIABLE, central_tcpstore.CALL_MS),
    ):
        assert re.search(rf"\| `{name}` \|.*\| {value} \|", PAGE), name
    assert f"`{settings.FILE_VARIABLE}`" in PAGE

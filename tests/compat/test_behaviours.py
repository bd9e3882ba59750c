"""What NIXL's callers rely on, asked of the drop-in and of NIXL itself by the same file; and what the drop-in adds to it."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nixl_async.compat
from nixl_async.testing.servers import Server
from tests.agents import ROOT

HERE = Path(__file__).parent
NIXL_PYTHON = os.environ.get("NIXL_ASYNC_NIXL_PYTHON", str(ROOT / ".nixl-env/bin/python"))
OBJECTS = "objects_are_written_read_and_asked_for"
needs_nixl = pytest.mark.skipif(
    not Path(NIXL_PYTHON).exists(), reason=f"no interpreter with NIXL's wheel at {NIXL_PYTHON}; .ci/test makes one"
)


def names(file: str) -> list[str]:
    tree = ast.parse((HERE / file).read_text())
    return [
        one.name
        for one in tree.body
        if isinstance(one, ast.FunctionDef) and one.decorator_list and "behaviour" in ast.unparse(one)
    ]


def run(file: str, *chosen: str, python: str = sys.executable, fds: tuple[int, ...] = (), **variables: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [python, str(HERE / file), *chosen]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, env=environment, pass_fds=fds)
    assert ran.returncode == 0, ran.stderr
    results: dict[str, str] = json.loads(ran.stdout)
    return results


def dropin(file: str, *chosen: str, fds: tuple[int, ...] = (), **variables: str) -> dict[str, str]:
    return run(file, *chosen, fds=fds, PYTHONPATH=nixl_async.compat.path(), **variables)


@pytest.fixture(scope="module")
def ours() -> dict[str, str]:
    return dropin("behaviours.py")


@pytest.fixture(scope="module")
def stock() -> Callable[[str], str]:
    """Ask NIXL itself, in several runs: its threads spin, and each run must have time enough where others use the cores too."""
    told: dict[int, dict[str, str]] = {}

    def ask(name: str) -> str:
        first = ASKED.index(name) % RUNS
        if first not in told:
            chosen = ASKED[first::RUNS]
            # A run that fails is not tried again for each of them.
            told[first] = dict.fromkeys(chosen, "the run failed; the first that asked has its error")
            told[first] = run("behaviours.py", *chosen, python=NIXL_PYTHON)
        return told[first][name]

    return ask


ASKED = names("behaviours.py")
RUNS = 3


@pytest.fixture(scope="module")
def own() -> dict[str, str]:
    return dropin("dropin.py")


@pytest.fixture(scope="module")
def beside() -> dict[str, str]:
    return dropin("dropin.py", *BESIDE, NIXL_PYTHON=NIXL_PYTHON)


BESIDE = [
    "bytes_and_notifications_go_both_ways_between_processes",
    "a_peer_that_dies_and_comes_back",
    "serialised_lists_are_read_by_stock_nixl_and_the_other_way",
]


@pytest.mark.parametrize("name", ASKED)
def test_the_drop_in(name: str, ours: dict[str, str]) -> None:
    assert not ours[name], ours[name]


@needs_nixl
@pytest.mark.nixl
@pytest.mark.parametrize("name", ASKED)
def test_nixl_itself(name: str, stock: Callable[[str], str]) -> None:
    wrong = stock(name)
    assert not wrong, wrong


@pytest.mark.parametrize("name", [name for name in names("dropin.py") if name != OBJECTS and name != BESIDE[2]])
def test_what_is_the_drop_ins_own(name: str, own: dict[str, str]) -> None:
    assert not own[name], own[name]


@needs_nixl
@pytest.mark.nixl
@pytest.mark.parametrize("name", BESIDE)
def test_with_a_stock_agent_in_another_process(name: str, beside: dict[str, str]) -> None:
    assert not beside[name], beside[name]


def objects(plugin: str, params: dict[str, str]) -> None:
    (result,) = dropin("dropin.py", OBJECTS, COMPAT_STORE=json.dumps([plugin, params])).values()
    assert not result, result


def test_objects_of_s3(seaweed: Server) -> None:
    scheme, _, endpoint = seaweed.endpoint.partition("://")
    params = {
        "bucket": seaweed.bucket,
        "endpoint_override": endpoint,
        "scheme": scheme,
        "access_key": seaweed.key_id,
        "secret_key": seaweed.secret,
        "region": seaweed.region,
        "num_threads": "4",
    }
    objects("OBJ", params)


def test_objects_of_azure(azure_server: Server) -> None:
    objects("AZURE_BLOB", {"container_name": "bench", "connection_string": azure_server.connection_string})


# The command.


@pytest.fixture
def command() -> list[str]:
    return [sys.executable, "-m", "nixl_async", "run-as-nixl", "--"]


def test_the_command_and_what_it_starts_import_the_drop_in(command: list[str]) -> None:
    inner = (
        "import nixl, nixl._bindings, nixl._utils, nixl.logging, nixl_cu12._api, nixl_cu13; print(nixl.nixl_agent.__module__)"
    )
    code = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode + 3)"
    ran = subprocess.run(
        [*command, sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )
    assert ran.returncode == 3, ran.stderr
    assert ran.stdout.strip() == "nixl_async.compat.api"


async def test_the_command_gets_signals_itself(command: list[str]) -> None:
    code = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\nprint('ready', flush=True)\nsignal.pause()"
    )
    process = await asyncio.create_subprocess_exec(
        *command, sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 9


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["/no/such/command"], 127), ([str(ROOT / "README.md")], 126)])
def test_a_command_that_cannot_be_run(command: list[str], arguments: list[str], status: int) -> None:
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert ran.returncode == status
    assert "nixl-async: " in ran.stderr

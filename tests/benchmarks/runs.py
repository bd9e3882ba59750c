"""Runs of `nixl-async bench transfer` for tests: the conductor on the test's own loop, or the whole command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from typer.testing import CliRunner, Result

from nixl_async.benchmarks.transfer.conductor import Conductor, Step, Watcher
from nixl_async.benchmarks.transfer.contenders import contenders
from nixl_async.benchmarks.transfer.control import Contender, ControlServer, Launcher
from nixl_async.benchmarks.transfer.options import Options, make
from nixl_async.cli import app
from tests.agents import ROOT

TINY: dict[str, Any] = {
    "start_block_size": 4096,
    "max_block_size": 4096,
    "start_batch_size": 4,
    "max_batch_size": 4,
    "num_iter": 8,
    "warmup_iter": 2,
    "rounds": 2,
    "raw": False,
}


async def steps(players: Sequence[Contender] | None = None, warnings: list[str] | None = None, **given: Any) -> list[Step]:
    """Run a tiny sweep on processes of this machine; return its steps."""
    async with conducting(make(TINY | given), players, warnings) as conductor:
        return [step async for step in conductor.steps()]


@contextlib.asynccontextmanager
async def conducting(
    options: Options, players: Sequence[Contender] | None = None, warnings: list[str] | None = None
) -> AsyncIterator[Conductor]:
    """Start processes of this machine."""
    server = ControlServer()
    address = await server.open()
    launchers = [Launcher(address, server.secret)] * options.world
    watcher = Watcher(warn=(warnings if warnings is not None else []).append)
    everyone = contenders(options) if players is None else players
    async with Conductor(options, everyone, server, launchers, watcher) as conductor:
        yield conductor


def arguments(**given: Any) -> list[str]:
    """Write options as the command line has them."""
    written = []
    for name, value in (TINY | given).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            written.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            written += [f"--{flag}", str(value)]
    return written


PROGRAM = [sys.executable, "-m", "nixl_async", "bench", "transfer"]


def environment(**more: str) -> dict[str, str]:
    """Return the variables of a run: nothing of a launcher that the tests may run under."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    for name in ("RANK", "WORLD_SIZE", "NIXL_ASYNC_NIXL_PYTHON", "NIXL_ASYNC_MOONCAKE_PYTHON", "NIXL_ASYNC_TOKEN"):
        kept.pop(name, None)
    return kept | {"COLUMNS": "300"} | more


def refused(*extra: str, **more: str) -> Result:
    """Run the command in this process, as it is when it refuses what it is told, or only tells about itself."""
    # What is not to be there is None.
    variables = dict.fromkeys(os.environ) | environment(**more)
    return CliRunner().invoke(app, ["bench", "transfer", *extra], env=variables)


def command(*extra: str, timeout: float = 110.0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the whole command."""
    return subprocess.run(
        [*PROGRAM, *extra], capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, env=environment(**more)
    )

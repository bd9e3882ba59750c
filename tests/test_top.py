"""The view of a process, in a terminal and as the command prints it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nixl_async import inspection
from nixl_async.top import render, size
from tests.agents import ROOT, known, two_agents


def shown(told: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    try:
        console.print(render(told, before))
        return console.export_text()
    finally:
        console.file.close()


async def test_rates_are_between_two_looks() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(1 << 20, np.uint8), name="mine")
        await b.register(np.zeros(1 << 20, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        await a.transfer(mine, peer.region("theirs"))
        first = {"time": 100.0, "pid": 1, "agents": [a.dump(5)]}
        for _ in range(4):
            await a.transfer(mine, peer.region("theirs"))
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held = a.submit(mine, peer.region("theirs"), after=never)
        text = shown({"time": 102.0, "pid": 1, "agents": [a.dump(5)]}, first)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
    (row,) = (line.split() for line in text.splitlines() if " tx " in line)
    assert [word for word in row if word != "│"] == ["b", "tcp", "tx", "normal", "2.0", "MiB", "2.0", "5.0", "MiB"]
    assert "connected" in text
    assert "stream" in text
    assert "0.0 " in shown(first)


def test_names_are_shown_as_they_are() -> None:
    agent = {
        "agent": "[red]a[/red]",
        "regions": 0,
        "counts": dict.fromkeys(("live", "draining", "done", "failed", "cancelled", "retries", "failovers"), 0),
        "unread_notifications": 0,
        "moved": [],
        "queues": [],
        "peers": [{"name": "[b]", "suspect": True, "backends": ["tcp"], "down": {"tcp": "reset"}, "regions": 2}],
        "transfers": [],
        "omitted": {"transfers": 0},
    }
    text = shown({"time": 0.0, "pid": 1, "agents": [agent]})
    assert "[red]a[/red]" in text
    assert "[b]" in text
    assert "suspect" in text
    assert "tcp down" in text


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1.5 * (1 << 30), 1 << 60)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 GiB",
        "1024.0 PiB",
    ]


async def command(*arguments: str) -> tuple[int, str, str]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nixl_async", *arguments, cwd=ROOT, stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_commands_ask_a_running_process(tmp_path: Path) -> None:
    path, trace = str(tmp_path / "agents"), tmp_path / "trace.json"
    async with two_agents(backends=["tcp"]) as (a, _, _), inspection.serve(a, path=path):
        code, out, _ = await command("top", path, "--rounds", "2", "--seconds", "0.1")
        assert code == 0
        assert "connected" in out
        assert out.endswith("\n")
        code, out, _ = await command("dump", path, "--limit", "3")
        assert code == 0
        assert json.loads(out)["agents"][0]["agent"] == "a"
        code, out, _ = await command("trace", "record", path, "--seconds", "0.1", "-o", str(trace))
        assert code == 0
        assert "events" in out
        assert json.loads(trace.read_text())["traceEvents"]
    for arguments in (["top", path], ["dump", path], ["trace", "record", path]):
        code, _, err = await command(*arguments)
        assert code == 1
        assert "inspection.serve" in err


async def test_in_a_terminal_it_goes_on_until_it_is_interrupted(tmp_path: Path) -> None:
    path = str(tmp_path / "agents")
    async with two_agents(backends=["tcp"]) as (a, _, _), inspection.serve(a, path=path):
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nixl_async", "top", path, "--seconds", "0.1"),
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"},
        )
        os.close(theirs)
        loop = asyncio.get_running_loop()
        seen = b""
        try:
            async with asyncio.timeout(60):
                while seen.count(b"connected") < 3:
                    seen += await loop.run_in_executor(None, os.read, ours, 65536)
                process.send_signal(signal.SIGINT)
                while True:
                    try:
                        more = await loop.run_in_executor(None, os.read, ours, 65536)
                    except OSError:
                        break
                    seen += more
                assert await process.wait() == 130
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(ours)
        # The screen that was there before is back.
        assert b"\x1b[?1049h" in seen
        assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")

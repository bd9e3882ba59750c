"""Ranks as processes: start them, pass on what they tell each other, and leave none behind.

A rank (`python -m nixl_async.benchmarks.kv.worker`) gets its job as the first line of standard input and says JSON lines. When
standard input ends, it leaves: so does what outlives the program that started it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nixl_async.demo.run import LINE_NBYTES, Side, end, require_memory

REASON_SECONDS = 1.0
PROCESS_NBYTES = 60 << 20
"""What an interpreter with the library takes, roughly."""
# -P: a checkout in the working directory must not take the place of the package that is running.
PROGRAM = ("-P", "-m", "nixl_async.benchmarks.kv.worker")
PACKAGE_PARENT = Path(__file__).resolve().parents[3]


class RanksFailed(RuntimeError):
    """Say why a job of several ranks did not come to its end."""


@dataclass(eq=False)
class _Rank(Side):
    number: int = 0


@dataclass(eq=False)
class _Ranks:
    ranks: list[_Rank] = field(default_factory=list)
    gathered: dict[str, dict[int, Any]] = field(default_factory=dict)
    on_event: Callable[[int, dict[str, Any]], None] = lambda rank, message: None

    async def follow(self, rank: _Rank) -> None:
        while (message := await rank.receive()) is not None:
            match message.get("event"):
                case "result":
                    rank.result = message
                case "error":
                    rank.error = f"{rank.role}: {message['text']}"
                case "gather":
                    await self._gather(rank.number, message["key"], message["of"], message["value"])
                case _:
                    self.on_event(rank.number, message)
        await rank.process.wait()
        if rank.process.returncode or not rank.result:
            raise RanksFailed(rank.ending())

    async def _gather(self, number: int, key: str, of: list[int], value: Any) -> None:
        values = self.gathered.setdefault(key, {})
        values[number] = value
        if len(values) == len(of):
            del self.gathered[key]
            for other in of:
                await self.ranks[other].send({"key": key, "values": values})

    def reasons(self) -> list[str]:
        killed = [rank.ending() for rank in self.ranks if (rank.process.returncode or 0) < 0]
        said = [rank.error for rank in self.ranks if rank.error]
        return killed + said or [rank.ending() for rank in self.ranks if rank.process.returncode]


def check_memory(needed: int, ranks: int, advice: str) -> None:
    """Refuse a job that does not fit into memory.

    Raises:
        ConfigurationError: `needed` bytes and `ranks` processes are more than is available.
    """
    require_memory(needed + ranks * PROCESS_NBYTES, f"{ranks} processes need", advice)


async def start(program: Sequence[str]) -> asyncio.subprocess.Process:
    """Start a process of this interpreter and this package, which is told and says lines of at most `LINE_NBYTES`."""
    path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        stdin=pipe,
        stdout=pipe,
        env=os.environ | {"PYTHONPATH": path},
        limit=LINE_NBYTES,
        # Ctrl-C is for the program that started them, which ends them.
        process_group=0,
    )


async def run_ranks(
    setups: Sequence[dict[str, Any]], on_event: Callable[[int, dict[str, Any]], None] = lambda rank, message: None
) -> list[dict[str, Any]]:
    """Run a process for each of `setups`, and return each one's result; `on_event(rank, message)` hears what else they say.

    However this ends, cancellation included, no process is left.

    Raises:
        RanksFailed: a process died or reported an error.
    """
    job = _Ranks(on_event=on_event)
    try:
        for number, setup in enumerate(setups):
            process = await start(PROGRAM)
            job.ranks.append(_Rank(f"rank {number}", process, number=number))
            on_event(number, {"event": "started", "pid": process.pid})
            await job.ranks[-1].send({"rank": number, "world": len(setups), **setup})
        followers = [asyncio.create_task(job.follow(rank)) for rank in job.ranks]
        try:
            _, pending = await asyncio.wait(followers, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                # One failed: the others may have something to say about it.
                await asyncio.wait(pending, timeout=REASON_SECONDS)
        finally:
            for follower in followers:
                follower.cancel()
            await asyncio.wait(followers)
        results = [rank.result for rank in job.ranks if rank.result]
        if len(results) < len(setups) or any(rank.error or rank.process.returncode for rank in job.ranks):
            raise RanksFailed("; ".join(job.reasons()) or "a rank said nothing")
        return results
    except (BrokenPipeError, ConnectionResetError):
        raise RanksFailed("; ".join(job.reasons()) or "a rank ended before it had its job") from None
    finally:
        await end(job.ranks)

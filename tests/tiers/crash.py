"""A process that stores blocks in a directory and says which are acknowledged, to be killed at any moment; and who kills it.

`Victim` starts a process that imports everything once and forks a child for each life, so that hundreds of kills take seconds.
Block number n has the key `key_of(n)` and the bytes `content_of(n)`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nixl_async import Agent
from nixl_async.tiers import DRAM, Files, Tiers
from tests.agents import ROOT

BLOCK = 16384
MOST = 16
LIFE = 1_000_000
PROGRAM = "from tests.tiers.crash import main; main()"


def key_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def content_of(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return bytes that differ everywhere from those of other numbers."""
    words = np.arange(BLOCK // 8, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words ^= np.uint64(number * 0xD1342543DE82EF95 % (1 << 64))
    return words.view(np.uint8)


def stores(path: Path | str, n_blocks: int, memory: bool) -> list[Any]:
    files = Files(path, n_blocks * BLOCK, segment_nbytes=64 * BLOCK)
    return [DRAM(64 * BLOCK), files] if memory else [files]


@dataclass(eq=False)
class Victim:
    """The process that forks; its child is in its life number `life`."""

    process: asyncio.subprocess.Process
    life: int = 0

    async def live_and_die(self, setup: dict[str, Any], seconds: float) -> list[int]:
        """Let a child live for so long, kill it, and return the numbers of the blocks acknowledged as durable."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {**setup, "seconds": seconds}
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        acknowledged: list[int] = []
        async with asyncio.timeout(60):
            while (line := await self.process.stdout.readline()) != b"dead\n":
                assert line, "the process that forks ended"
                # The last line may have been cut by the kill.
                assert not line.startswith(b"wrong"), line
                acknowledged += json.loads(line)
        return acknowledged


@asynccontextmanager
async def victim() -> AsyncIterator[Victim]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdin=pipe, stdout=pipe, cwd=ROOT)
    try:
        yield Victim(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


def main() -> None:
    """Fork a child for each line of standard input, kill it when its time is over, and say so."""
    for line in sys.stdin:
        setup = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.run(_live(setup))
                status = 0
            finally:
                os._exit(status)
        time.sleep(setup["seconds"])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.write(1, b"dead\n")


def _say(what: bytes) -> None:
    # One write of a short line reaches a pipe whole or not at all.
    os.write(1, what + b"\n")


async def _live(setup: dict[str, Any]) -> None:
    chance = random.Random(setup["life"])
    memory = np.zeros((2 * MOST, BLOCK), np.uint8)
    async with Agent("victim", backends=["memory", "posix"]) as agent:
        region = await agent.register(memory)
        tiers_of = stores(setup["path"], setup["n_blocks"], setup["memory"])
        async with Tiers(agent, tiers_of, block_nbytes=BLOCK) as tiers:
            at = setup["life"] * LIFE
            while True:
                numbers = list(range(at, at + chance.randint(1, MOST)))
                at += len(numbers)
                for row, number in enumerate(numbers):
                    memory[row] = content_of(number)
                keys = [key_of(number) for number in numbers]
                stored = await tiers.put(keys, region.pages(range(len(keys)), BLOCK), durable=setup["durable"])
                _say(json.dumps([number for number, one in zip(numbers, stored, strict=True) if one]).encode())
                some = [chance.randrange(setup["life"] * LIFE, at) for _ in range(MOST)]
                got = await tiers.get([key_of(n) for n in some], region.pages(range(MOST, 2 * MOST), BLOCK))
                for row, (number, one) in enumerate(zip(some, got, strict=True)):
                    if one and not np.array_equal(memory[MOST + row], content_of(number)):
                        _say(b"wrong bytes in block %d" % number)

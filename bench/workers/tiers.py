"""Blocks put into a tier by their keys and got again, through a buffer of `CALL_BLOCKS` blocks: a call for each filling of it.

Block i of a filling is in page `order[i]` of the buffer. So the blocks may be more than half of the memory, or a quarter.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.pattern import allocate_aligned, blank, count_wrong, fill, page_order
from bench.worker import Common, serve_async
from nixl_async import Agent
from nixl_async.tiers import DRAM, Files, Tiers

CALL_BLOCKS = 4096
ASKED_AT_ONCE = 4096
MOST_SPARE = 2048
SEED = 11


class Filled(Common):
    """The buffer, the calls that a turn consists of, and whether their bytes are right."""

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.agent: Agent
        self.region: Any = None
        self.buffer = np.zeros(0, np.uint8)
        self.block_nbytes = self.n_blocks = self.call_blocks = 0
        self.order = np.zeros(0, np.int64)
        self.checksums = True

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Open the agent; register the buffer."""
        self.buffer, self.checksums = allocate_aligned(nbytes), options.get("checksums", True)
        self.agent = await Agent("bench", backends=["memory", "posix"]).__aenter__()
        self.region = await self.agent.register(self.buffer)

    async def aim(self, tier: str, directory: str, block_nbytes: int, n_blocks: int, direct: bool) -> None:
        """Open the tier, `dram` or `files` in `directory`, with room for `n_blocks` blocks."""
        await self.stack.aclose()
        self.block_nbytes, self.n_blocks, self.call_blocks = block_nbytes, n_blocks, min(n_blocks, CALL_BLOCKS)
        self.order = page_order(self.call_blocks, SEED)
        await self.enter(tier, Path(directory), direct)

    async def enter(self, tier: str, directory: Path, direct: bool) -> None:
        """Open the contender's own place for blocks."""
        raise NotImplementedError

    def ready(self, salt: int) -> None:
        """Prepare, outside of the timing, for blocks of `salt`, which have not been there before."""

    async def put_call(self, start: int, count: int, durable: bool) -> None:
        """Put blocks `start` to `start + count` from the buffer."""
        raise NotImplementedError

    async def get_call(self, start: int, count: int) -> None:
        """Get them into the buffer."""
        raise NotImplementedError

    async def put(self, salt: int, durable: bool) -> dict[str, float]:
        """Put every block once; only the calls are timed."""
        self.ready(salt)
        spent = _Spent()
        for start, count in self._calls():
            fill(self.buffer, salt + start)
            await spent.on(self.put_call(start, count, durable))
        return spent.as_dict()

    async def get(self, salt: int) -> dict[str, float]:
        """Get every block once, and count those with wrong bytes."""
        spent = _Spent()
        wrong = 0
        for start, count in self._calls():
            blank(self.buffer, salt + start)
            await spent.on(self.get_call(start, count))
            # The page that a block was put from is the page it is got into.
            wrong += count_wrong(self.buffer, np.arange(count), self.block_nbytes, salt + start, scattered=True)
        return spent.as_dict() | {"wrong": wrong}

    def settle(self, directory: str) -> None:
        """Have what was written reach the device, so that it does not disturb the next turn."""
        for path in sorted(Path(directory).rglob("segment-*")):
            fd = os.open(path, os.O_RDONLY)
            os.fdatasync(fd)
            os.close(fd)

    def _calls(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.n_blocks, self.call_blocks):
            yield start, min(self.call_blocks, self.n_blocks - start)

    @property
    def call_nbytes(self) -> int:
        """The bytes of a call's blocks."""
        return self.call_blocks * self.block_nbytes

    def memory(self, count: int) -> Any:
        """Describe the pages of a call's blocks."""
        return self.region.pages(self.order[self.order < count], self.block_nbytes)

    async def aclose(self) -> None:
        """Leave in order."""
        await self.stack.aclose()
        await self.agent.aclose()


class _Spent:
    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    async def on(self, call: Awaitable[None]) -> None:
        cpu, start = time.process_time(), time.perf_counter()
        await call
        self.seconds += time.perf_counter() - start
        self.cpu += time.process_time() - cpu

    def as_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu": self.cpu}


class Tiered(Filled):
    """One `Tiers` with one tier."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers: Tiers
        self.keys: list[bytes] = []

    async def enter(self, tier: str, directory: Path, direct: bool) -> None:
        """Open the tier. A call's blocks fill a file."""
        nbytes = self.n_blocks * self.block_nbytes
        # Slots are reserved ahead of need: without some to spare, a turn's last blocks would evict its first.
        more = min(MOST_SPARE, self.n_blocks // 8) * self.block_nbytes
        kept = (
            DRAM(nbytes) if tier == "dram" else Files(directory, nbytes + more, direct=direct, segment_nbytes=self.call_nbytes)
        )
        tiers = Tiers(self.agent, [kept], block_nbytes=self.block_nbytes, checksum=self.checksums, verify=self.checksums)
        self.tiers = await self.stack.enter_async_context(tiers)

    def ready(self, salt: int) -> None:
        """Make the keys: new ones, so that what is there must go."""
        self.keys = [hashlib.sha256(b"%d %d" % (salt, number)).digest() for number in range(self.n_blocks)]

    async def put_call(self, start: int, count: int, durable: bool) -> None:
        """Call `put`."""
        outcomes = await self.tiers.put(self.keys[start : start + count], self.memory(count), durable=durable)
        if not all(outcomes):
            raise RuntimeError(f"not put: {next(one for one in outcomes if not one)}")

    async def get_call(self, start: int, count: int) -> None:
        """Call `get`."""
        outcomes = await self.tiers.get(self.keys[start : start + count], self.memory(count))
        if not all(outcomes):
            raise RuntimeError(f"not got: {next(one for one in outcomes if not one)}")

    def contains(self) -> dict[str, float]:
        """Ask about every key that is there, and as many that are not."""
        absent = [hashlib.sha256(key).digest() for key in self.keys]
        seconds = 0.0
        for keys, expected in ((self.keys, True), (absent, False)):
            for at in range(0, len(keys), ASKED_AT_ONCE):
                # Copies: a key that was just computed has not been hashed for the dict yet.
                part = [bytes(bytearray(key)) for key in keys[at : at + ASKED_AT_ONCE]]
                start = time.perf_counter()
                found = self.tiers.contains(part)
                seconds += time.perf_counter() - start
                if found.count(expected) != len(part):
                    raise RuntimeError(f"{len(part) - found.count(expected)} of {len(part)} answers are wrong")
        return {"seconds": seconds, "keys": 2 * len(self.keys)}


async def main(worker: Filled) -> None:
    """Answer the bench's commands."""
    try:
        await serve_async(worker)
    finally:
        await worker.aclose()


if __name__ == "__main__":
    asyncio.run(main(Tiered()))

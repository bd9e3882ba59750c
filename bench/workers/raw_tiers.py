"""What a tier is measured against: `agent.transfer` of the same pages to and from memory, or files of the same layout."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np

from bench.pattern import allocate_aligned
from bench.workers.tiers import Filled, main


class Bare(Filled):
    """The tier's place for blocks and one transfer for each call; `fdatasync` where it is to be durable."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Any] = []

    async def enter(self, tier: str, directory: Path, direct: bool) -> None:
        """Register as much memory, or open as many files, as the tier would."""
        self.rooms = []
        if tier == "dram":
            whole = await self.agent.register(allocate_aligned(self.n_blocks * self.block_nbytes))
            self.stack.push_async_callback(whole.aclose)
            self.rooms.append(whole)
            return
        os.makedirs(directory, exist_ok=True)
        for start, count in self._calls():
            path = directory / f"segment-{start // self.call_blocks:06}"
            os.close(os.open(path, os.O_RDWR | os.O_CREAT))
            file = await self.agent.file(path, "r+", nbytes=count * self.block_nbytes, direct=direct or None)
            self.stack.push_async_callback(file.aclose)
            self.rooms.append(file)

    def _places(self, start: int, count: int) -> Any:
        if len(self.rooms) == 1:
            return self.rooms[0].pages(np.arange(start, start + count), self.block_nbytes)
        return self.rooms[start // self.call_blocks].pages(np.arange(count), self.block_nbytes)

    async def put_call(self, start: int, count: int, durable: bool) -> None:
        """Transfer, and sync the file."""
        await self.agent.transfer(self.memory(count), self._places(start, count))
        if durable:
            fd = self.rooms[start // self.call_blocks].fd
            await asyncio.get_running_loop().run_in_executor(None, os.fdatasync, fd)

    async def get_call(self, start: int, count: int) -> None:
        """Transfer."""
        await self.agent.transfer(self._places(start, count), self.memory(count))


if __name__ == "__main__":
    asyncio.run(main(Bare()))

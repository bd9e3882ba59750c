"""nixl_async within one process: a device's memory, and the host's, pinned or not."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from bench.gpu.memory import Buffer, allocate
from bench.pattern import page_order
from bench.worker import Common, serve_made
from bench.workers.ours import TOKEN
from nixl_async import Agent, MemoryRegion

WHOLE = 0
"""A size of pages: all bytes are one."""


class Local(Common):
    """One agent with the memories of `options["memories"]`: a name and a kind each."""

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Open the agent and register everything."""
        self.nbytes = nbytes
        self.agent = await Agent(role, token=TOKEN).__aenter__()
        self.memories: dict[str, Buffer] = {name: allocate(kind, nbytes) for name, kind in options["memories"].items()}
        self.regions: dict[str, MemoryRegion] = {
            name: await self.agent.register(memory.array, name=name) for name, memory in self.memories.items()
        }

    def ready(self, src: str, dst: str, page_nbytes: int, scattered: bool, seed: int) -> None:
        """Say what moves: pages of `src` in order to random places of `dst` (`scattered`), or random ones of `src` in order."""
        self.page_nbytes = page_nbytes or self.nbytes
        self.order, self.scattered = page_order(self.nbytes // self.page_nbytes, seed), scattered
        self.src, self.dst, self.seed = src, dst, seed
        self.memories[src].fill(seed)
        straight, shuffled = np.arange(len(self.order), dtype=np.int32), self.order.astype(np.int32)
        self.tables = (straight, shuffled) if scattered else (shuffled, straight)

    def _sides(self) -> Any:
        return [
            self.regions[name].pages(table, self.page_nbytes)
            for name, table in zip((self.src, self.dst), self.tables, strict=True)
        ]

    def explain(self) -> dict[str, Any]:
        """Return by what the next move goes, or why by nothing."""
        explained = self.agent.explain(*self._sides())
        return {"route": explained.route, "how": explained.how, "refusals": explained.refusals}

    async def move(self, turn: int) -> float:
        """Move once, timed from page indices to the completed await; return seconds, negative if a byte is wrong."""
        self.memories[self.dst].blank(turn)
        start = time.perf_counter()
        await self.agent.transfer(*self._sides())
        seconds = time.perf_counter() - start
        target = self.memories[self.dst]
        return -seconds if target.count_wrong(self.order, self.page_nbytes, self.seed, scattered=self.scattered) else seconds

    async def aclose(self) -> None:
        """Leave in order."""
        if hasattr(self, "agent"):
            await self.agent.aclose()


if __name__ == "__main__":
    asyncio.run(serve_made(Local))

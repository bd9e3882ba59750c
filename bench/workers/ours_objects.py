"""nixl_async on objects: one transfer of many, between their store and one registered buffer."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np

from bench.loops import TimedSelector, Watch
from bench.worker import serve_made
from bench.workers.stored import Stored
from nixl_async import Agent

LOOP = "BENCH_LOOP"
"""Which event loop: `watched`, `uvloop`, or the standard library's."""


class OursObjects(Stored):
    """One agent and one store."""

    def __init__(self, selector: TimedSelector | None) -> None:
        super().__init__()
        self.selector = selector
        self.agent: Agent | None = None

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Open the agent and the store; register the buffer."""
        self.allocate(nbytes)
        self.agent = await Agent("bench", backends=["memory", options["backend"]]).__aenter__()
        self.region = await self.agent.register(self.whole, name="kv")
        self.store = await self.agent.store(options["url"], **options["store"])

    def prepare(self) -> None:
        """Name the objects; choosing them by number belongs to the timed part."""
        self.objects = self.store.objects(self.where["keys"], self.page_nbytes)
        self.indices = np.arange(len(self.order))

    async def move(self) -> dict[str, float]:
        """Move every object once."""
        with self.timed():
            await self._transfer()
        return self.measured

    async def _transfer(self) -> None:
        assert self.agent is not None
        near, far = self.region.pages(self.indices, self.page_nbytes), self.objects.select(self.order)
        await (self.agent.transfer(near, far) if self.write else self.agent.transfer(far, near))

    async def move_watched(self) -> list[float]:
        """Move every object once; return the CPU seconds of each iteration of the loop meanwhile."""
        if self.selector is None:
            raise RuntimeError(f"start this worker with {LOOP}=watched in its environment")
        watch = Watch(self.selector)
        watch.start(ticker=False)
        await asyncio.sleep(0)
        await self._transfer()
        return (await watch.stop())["cpu"]

    async def aclose(self) -> None:
        """Leave in order."""
        if self.agent is not None:
            await self.agent.aclose()


def _run(loop: str) -> None:
    if loop == "watched":
        timed = TimedSelector()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(timed)) as runner:
            runner.run(serve_made(lambda: OursObjects(timed)))
    elif loop == "uvloop":
        import uvloop

        uvloop.run(serve_made(lambda: OursObjects(None)))
    else:
        asyncio.run(serve_made(lambda: OursObjects(None)))


if __name__ == "__main__":
    _run(os.environ.get(LOOP, ""))

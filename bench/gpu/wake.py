"""How soon the loop goes on when a stream has come to a point, and a stream when a transfer has ended; microseconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from bench.gpu.memory import HostBuffer, cupy, kernel, synchronize
from bench.worker import Common, serve_made
from bench.workers.ours import TOKEN
from nixl_async import Agent

NBYTES = 4096
LIMIT_CYCLES = 2_000_000_000
"""A stream that nobody lets go goes on after about a second."""
SETTLE_SECONDS = 0.001
FLAG = 32
"""The word that the stream writes, some way from the one that it waits for."""


class Wake(Common):
    """One agent; a kernel holds the stream until the host writes a word."""

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Open the agent, and load the kernels, which must not happen while a stream stands still."""
        self.agent = await Agent(role, token=TOKEN).__aenter__()
        self.src = await self.agent.register(np.zeros(NBYTES, np.uint8))
        self.dst = await self.agent.register(np.ones(NBYTES, np.uint8))
        self.words = HostBuffer(NBYTES, pinned=True)
        self.gate = self.words.array.view(np.uint32)
        self.stream = cupy().cuda.Stream(non_blocking=True)
        self.value = 0
        self._hold()
        self._release()
        self._tell(1)
        synchronize()

    def _hold(self) -> None:
        self.value += 1
        arguments = (np.uint64(self.words.address), np.uint32(self.value), np.int64(LIMIT_CYCLES))
        with self.stream:
            kernel("hold")((1,), (1,), arguments)

    def _release(self) -> float:
        begun = time.perf_counter()
        self.gate[0] = self.value
        return begun

    def _tell(self, value: int) -> None:
        with self.stream:
            kernel("tell")((1,), (1,), (np.uint64(self.words.address + 4 * FLAG), np.uint32(value)))

    async def after(self, how: str, count: int) -> list[float]:
        """Time from the word to the host that has seen the stream end: `ours`, `thread` (a thread that waits), `spin`.

        `loop` has no stream in it: the same transfer waits for a future, which shows what else is in ours.
        """
        ways: dict[str, Callable[[Any], Awaitable[Any]]] = {"ours": self._ours, "thread": self._thread, "spin": self._spin}
        seconds = []
        if how == "loop":
            return [await self._after_a_future() for _ in range(count)]
        for _ in range(count):
            self._hold()
            event = self.stream.record(cupy().cuda.Event(disable_timing=True))
            waiting = asyncio.ensure_future(ways[how](event)) if how != "spin" else None
            await asyncio.sleep(SETTLE_SECONDS)
            begun = self._release()
            await (waiting if waiting is not None else self._spin(event))
            seconds.append(time.perf_counter() - begun)
        return seconds

    async def _ours(self, event: Any) -> None:
        await self.agent.transfer(self.src, self.dst, after=event)

    async def _after_a_future(self) -> float:
        before = asyncio.get_running_loop().create_future()
        transfer = self.agent.submit(self.src, self.dst, after=before)
        await asyncio.sleep(SETTLE_SECONDS)
        begun = time.perf_counter()
        before.set_result(None)
        await transfer
        return time.perf_counter() - begun

    async def _thread(self, event: Any) -> None:
        await asyncio.to_thread(event.synchronize)

    async def _spin(self, event: Any) -> None:
        while not event.done:
            pass

    async def wait_on(self, count: int) -> list[float]:
        """Time from the end of a transfer that a stream waits for to what the stream then does, as the host sees it."""
        seconds, loop = [], asyncio.get_running_loop()
        flag = self.gate[FLAG : FLAG + 1]
        for i in range(count):
            before = loop.create_future()
            transfer = self.agent.submit(self.src, self.dst, after=before)
            transfer.wait_on(self.stream)
            self._tell(i + 2)
            await asyncio.sleep(SETTLE_SECONDS)
            if flag[0] == i + 2:
                raise RuntimeError("the stream did not wait for the transfer")
            before.set_result(None)
            await transfer
            ended = time.perf_counter()
            while flag[0] != i + 2:
                pass
            seconds.append(time.perf_counter() - ended)
        return seconds

    async def aclose(self) -> None:
        """Leave in order."""
        if hasattr(self, "agent"):
            await self.agent.aclose()


if __name__ == "__main__":
    asyncio.run(serve_made(Wake))

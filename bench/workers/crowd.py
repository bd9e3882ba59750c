"""Agents by the hundred: those of a crowd share a process, and one by itself finds and connects to all of them."""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import numpy as np

from bench.loops import TimedSelector, Watch
from bench.worker import Common, serve_async
from nixl_async import Agent, MembershipEvent, MemoryRegion

TOKEN = "bench"
AT_ONCE = 16
REGION_NBYTES = 64
TCP_INFO_NBYTES = 208
_BYTES_SENT = struct.Struct("<200xQ")
_BYTES_RECEIVED = struct.Struct("<128xQ")


class Crowd(Common):
    """Some agents that are served and published, or one that looks for them."""

    def __init__(self, selector: TimedSelector) -> None:
        self.selector = selector
        self.agents: list[Agent] = []
        self.seeker: Agent
        self.regions: list[MemoryRegion] = []
        self.memory = np.zeros((0, REGION_NBYTES), np.uint8)
        self.collecting = [0.0, 0.0]
        gc.callbacks.append(self._collected)

    def load(self, url: str) -> None:
        """Load what a store needs beforehand: torch takes seconds and a hundred megabytes."""
        if url.startswith("tcpstore:"):
            importlib.import_module("torch.distributed")

    async def open(self, names: list[str], url: str | None, regions: int, updates: int, backends: list[str]) -> float:
        """Open, serve and publish agents; each registers `regions` small regions. Return the seconds that took."""
        began = time.monotonic()
        self.memory = np.zeros((regions + updates, REGION_NBYTES), np.uint8)

        async def one(name: str) -> Agent:
            agent = Agent(name, token=TOKEN, backends=backends, discovery=url)
            await agent.__aenter__()
            for number in range(regions):
                await agent.register(self.memory[number], name=f"block-{number}")
            await agent.serve("127.0.0.1", 0)
            return agent

        self.agents = await _in_groups(one(name) for name in names)
        return time.monotonic() - began

    async def update(self, updates: int) -> None:
        """Have each agent register so many regions more, all of them by turns."""
        for number in range(updates):
            await _in_groups(agent.register(self.memory[-1 - number], name=f"update-{number}") for agent in self.agents)

    # The one by itself.

    async def seek(self, name: str, url: str | None, backends: list[str]) -> None:
        """Open the agent that finds the others, or has very many regions."""
        self.seeker = Agent(name, token=TOKEN, backends=backends, discovery=url)
        await self.seeker.__aenter__()

    async def serve(self) -> tuple[str, int]:
        """Serve that agent; return its address."""
        return await self.seeker.serve("127.0.0.1", 0)

    async def know(self, count: int) -> dict[str, float]:
        """Wait until the store has told of so many agents."""
        agent = self.seeker
        began, events = time.monotonic(), agent.membership()
        while len(agent.discovered) < count:
            await anext(events)
        return {"seconds": time.monotonic() - began, "rss": _rss()}

    async def connect(self, names: list[str]) -> dict[str, Any]:
        """Connect by name, sixteen at a time; return how long each took."""
        agent = self.seeker

        async def one(name: str) -> float:
            began = time.monotonic()
            await agent.peer(name)
            return time.monotonic() - began

        before, began = _rss(), time.monotonic()
        each = await _in_groups(one(name) for name in names)
        return {"each": each, "seconds": time.monotonic() - began, "rss": (before, _rss())}

    async def more(self, count: int) -> dict[str, float]:
        """Register regions one by one; return the bytes that each took to each peer."""
        agent = self.seeker
        memory, before = np.zeros((count, REGION_NBYTES), np.uint8), self._traffic(_BYTES_SENT)
        for number in range(count):
            await agent.register(memory[number], name=f"more-{len(self.regions):06d}-{number:03d}")
            # Each alone: what is registered at once travels together.
            await asyncio.sleep(0.02)
        after = 0
        while after != (now := self._traffic(_BYTES_SENT)):
            after = now
            await asyncio.sleep(0.1)
        return {"nbytes": (after - before) / count / max(1, len(agent.peers))}

    async def hear(self, regions: int, updates: int = 0) -> dict[str, float]:
        """Wait until each peer has so many regions; return the seconds since it was asked and the bytes that came.

        Meanwhile have the crowd in this process make so many updates.
        """
        agent, updating = self.seeker, asyncio.ensure_future(self.update(updates))
        began, before, events = time.monotonic(), self._traffic(_BYTES_RECEIVED), agent.membership()
        behind = {name for name, peer in agent.peers.items() if len(peer.regions) < regions}
        while behind:
            event: MembershipEvent = await anext(events)
            if event.peer in behind and len(agent.peers[event.peer].regions) >= regions:
                behind.discard(event.peer)
        await updating
        return {"seconds": time.monotonic() - began, "nbytes": self._traffic(_BYTES_RECEIVED) - before}

    def _traffic(self, field: struct.Struct) -> int:
        peers = self.seeker.peers.values()
        return sum(_tcp_info(peer.link.socket, field) for peer in peers if peer.link is not None)

    # A large table of regions.

    async def register(self, count: int) -> dict[str, float]:
        """Register so many regions."""
        agent = self.seeker
        begin = len(self.regions)
        memory = np.zeros((count, REGION_NBYTES), np.uint8)

        async def work() -> None:
            for number in range(count):
                self.regions.append(await agent.register(memory[number], name=f"block-{begin + number}"))

        return await self._watched(work)

    async def join(self, host: str, port: int) -> dict[str, float]:
        """Connect to an agent of many regions."""
        return await self._watched(lambda: self.seeker.connect((host, port)))

    async def move(self, peer: str, count: int) -> dict[str, float]:
        """Copy out of regions of a peer by their names, far apart in its table, one after the other."""
        agent = self.seeker
        here = await agent.register(np.zeros(REGION_NBYTES, np.uint8))
        found = agent.peers[peer]
        names = list(found.regions)[:: max(1, len(found.regions) // count)]

        async def work() -> None:
            for number, name in enumerate(names):
                await agent.transfer(found.region(name), here)
                if number % AT_ONCE == 0:
                    await asyncio.sleep(0)

        result = await self._watched(work)
        return result | {"count": len(names)}

    async def deregister(self, count: int) -> dict[str, float]:
        """Deregister as many of the regions, one after the other."""

        async def work() -> None:
            for _ in range(count):
                await self.regions.pop().aclose()

        return await self._watched(work)

    async def _watched(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> dict[str, float]:
        watch, before = Watch(self.selector), _rss()
        self.collecting[1] = 0.0
        watch.start(ticker=False)
        began = time.monotonic()
        await work()
        seconds, longest = time.monotonic() - began, max((await watch.stop())["cpu"])
        return {"seconds": seconds, "longest": longest, "collecting": self.collecting[1], "rss": _rss() - before}

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        now = time.thread_time()
        if phase == "start":
            self.collecting[0] = now
        else:
            self.collecting[1] = max(self.collecting[1], now - self.collecting[0])


async def _in_groups(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async with room:
            return await coroutine

    return await asyncio.gather(*(one(coroutine) for coroutine in work))


def _rss() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _tcp_info(sock: Any, field: struct.Struct) -> int:
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_NBYTES)
    return int(field.unpack_from(info)[0])


if __name__ == "__main__":
    _selector = TimedSelector()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_selector)) as _runner:
        _runner.run(serve_async(Crowd(_selector)))

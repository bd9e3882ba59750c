"""nixl_async, used as its README shows: awaits on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import planner
from bench.descriptors import measure
from bench.loops import TimedSelector, Watch
from bench.slices import DST_TP, HEADS, KV, PAGE_TOKENS, PAIR, SRC_TP
from bench.worker import reset_rss_peak, rss_peak, serve_made
from bench.workers.mover import Mover
from nixl_async import Agent
from nixl_async.geometry import KVGeometry, Sharding
from nixl_async.planner import plan_pairs

if TYPE_CHECKING:
    from nixl_async import Descriptor

TOKEN = "bench"
WATCHED = "BENCH_WATCHED_LOOP"


class Ours(Mover):
    """One agent, or several."""

    def __init__(self, selector: TimedSelector | None) -> None:
        super().__init__()
        self.selector = selector
        self.extra: list[Agent] = []
        self.waiting: list[asyncio.Task[Any]] = []

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, Any]:
        """Open the agent, register the buffer and listen."""
        self.allocate(nbytes)
        self.agent = Agent(role, backends=options.get("backends"), token=TOKEN)
        await self.agent.__aenter__()
        self.region = await self.agent.register(self.buffer, name="kv")
        host, port = await self.agent.serve("127.0.0.1", 0)
        return {"name": role, "host": host, "port": port}

    async def connect(self, peer: dict[str, Any]) -> None:
        """Connect to the target."""
        self.peer = await self.agent.connect((peer["host"], peer["port"]))
        self.remote = self.peer.region("kv")

    async def accept(self, peer: dict[str, Any]) -> None:
        """Wait until the initiator is known."""
        self.peer = await self.agent.wait_peer(peer["name"])
        self.remote = self.peer.region("kv")

    def prepare(self) -> None:
        """Take the block tables, 32-bit as engines have them; making descriptors of them belongs to the timed part."""
        self.indices = np.arange(len(self.order), dtype=np.int32)
        self.table = self.order.astype(np.int32)

    def _sides(self) -> tuple[Descriptor, Descriptor]:
        near = self.region.pages(self.indices, self.page_nbytes)
        far = self.remote.pages(self.table, self.page_nbytes)
        return (near, far) if self.write else (far, near)

    async def move(self, verify: str | None = None) -> dict[str, Any]:
        """Move every page once, and compare both sides by `verify`; timed from page indices to the completed await."""
        cpu, start = time.process_time(), time.perf_counter()
        result = await self.agent.transfer(*self._sides(), verify=verify)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu": time.process_time() - cpu, "route": result.route}

    def prepare_slices(self) -> None:
        """Plan which ranks talk, as two engines do when they meet; what is made of block tables belongs to the timed part."""
        request = self.request
        geometry = KVGeometry(request.layers, HEADS, request.slice_nbytes * SRC_TP // HEADS, 1, KV)
        sides = (Sharding(tp, page_tokens=PAGE_TOKENS) for tp in (SRC_TP, DST_TP))
        self.pair = next(p for p in plan_pairs(geometry, *sides) if (p.src.rank, p.dst.rank) == PAIR)
        near = self.region[0 : request.pool_nbytes(self.near_tp)], request.table(self.near_tp)
        far = self.remote[0 : request.pool_nbytes(self.far_tp)], request.table(self.far_tp)
        self.places = (*near, *far) if self.write else (*far, *near)

    async def move_slices(self, whole: bool) -> dict[str, Any]:
        """Move the request's slices once, or as many bytes in one range; timed from block tables to the completed await."""
        nbytes = self.request.count * self.request.slice_nbytes
        cpu, start = time.process_time(), time.perf_counter()
        if whole:
            near, far = self.region[0:nbytes], self.remote[0:nbytes]
            result = await self.agent.transfer(*((near, far) if self.write else (far, near)))
        else:
            result = await self.agent.transfer(*self.pair.pages(*self.places, self.request.tokens))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu": time.process_time() - cpu, "route": result.route}

    async def latency(self, nbytes: int, count: int, prepared: bool) -> list[float]:
        """Write `nbytes` bytes `count` times, one awaited after the other."""
        seconds = []
        if prepared:
            ready = await self.agent.prepare(self.region[0:nbytes], self.remote[0:nbytes])
            for _ in range(count):
                start = time.perf_counter()
                await ready.transfer()
                seconds.append(time.perf_counter() - start)
        else:
            for _ in range(count):
                start = time.perf_counter()
                await self.agent.transfer(self.region[0:nbytes], self.remote[0:nbytes])
                seconds.append(time.perf_counter() - start)
        return seconds

    async def respond(self, count: int) -> None:
        """Answer `count` notifications."""
        answered = 0
        async for notification in self.agent.notifications(prefix=b"go"):
            await self.agent.notify(notification.peer, b"ack")
            answered += 1
            if answered == count:
                break

    async def round_trips(self, nbytes: int, count: int) -> list[float]:
        """Write, notify, and wait for the answer, `count` times."""
        seconds = []
        ready = await self.agent.prepare(self.region[0:nbytes], self.remote[0:nbytes])
        answers = self.agent.notifications(prefix=b"ack")
        for _ in range(count):
            start = time.perf_counter()
            await ready.transfer(notify=b"go")
            await anext(answers)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _watch(self, ticker: bool) -> Watch:
        if self.selector is None:
            raise RuntimeError(f"start this worker with {WATCHED}=1 in its environment")
        watch = Watch(self.selector)
        watch.start(ticker=ticker)
        return watch

    async def move_watched(self, ticker: bool) -> dict[str, list[float]]:
        """Move every page once while this loop is watched."""
        watch = self._watch(ticker)
        await asyncio.sleep(0)
        await self.move()
        result = await watch.stop()
        await self.agent.notify(self.peer, b"end")
        return result

    async def be_watched(self, ticker: bool) -> dict[str, list[float]]:
        """Watch this loop until the initiator's run has ended."""
        watch = self._watch(ticker)
        await anext(self.agent.notifications(prefix=b"end"))
        return await watch.stop()

    async def many(self, count: int, nbytes: int) -> dict[str, Any]:
        """Keep `count` writes of `nbytes` bytes in flight at once."""
        before = reset_rss_peak()
        start = time.perf_counter()
        transfers = [
            self.agent.submit(self.region[place : place + nbytes], self.remote[place : place + nbytes])
            for place in range(0, count * nbytes, nbytes)
        ]
        for transfer in transfers:
            await transfer
        return {"seconds": time.perf_counter() - start, "rss_growth": rss_peak() - before}

    async def prepare_again(self, count: int) -> dict[str, list[float]]:
        """Time the preparation of all pages, and what sending them again spends before it returns to the caller."""
        first, again = [], []
        for _ in range(count):
            start = time.perf_counter()
            ready = await self.agent.prepare(*self._sides())
            first.append(time.perf_counter() - start)
            await ready.transfer()
            start = time.perf_counter()
            transfer = ready.submit()
            again.append(time.perf_counter() - start)
            await transfer
        return {"first": first, "again": again}

    def descriptors(self, n_pages: int, repeats: int) -> dict[str, list[float]]:
        """Time the steps that turn page indices into a plan; seconds for all pages."""
        return measure(n_pages, repeats)

    def planner(self, case: str, n_slices: int, repeats: int) -> dict[str, list[float]]:
        """Time what turns block tables into head slices; nanoseconds for each slice."""
        return planner.measure(case, n_slices, repeats)

    async def spokes(self, hub: dict[str, Any], count: int) -> None:
        """Open `count` more agents, each with a region, and connect them to the hub."""
        for i in range(count):
            agent = await Agent(f"spoke-{i}", token=TOKEN).__aenter__()
            await agent.register(self.buffer, name="kv")
            await agent.connect((hub["host"], hub["port"]))
            self.extra.append(agent)

    async def pend(self, count: int) -> int:
        """Start `count` waits for notifications that nobody sends, and return how many peers there are."""
        for i in range(count):
            waits = self.agent.notifications(prefix=b"never-%d" % i)
            self.waiting.append(asyncio.get_running_loop().create_task(_next(waits)))
        await asyncio.sleep(0)
        return len(self.agent.peers)

    async def aclose(self) -> None:
        """Leave in order."""
        for task in self.waiting:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for agent in self.extra:
            await agent.aclose()
        if hasattr(self, "agent"):
            await self.agent.aclose()


async def _next(notifications: Any) -> None:
    await anext(notifications)


if __name__ == "__main__":
    if os.environ.get(WATCHED):
        timed = TimedSelector()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(timed)) as runner:
            runner.run(serve_made(lambda: Ours(timed)))
    else:
        asyncio.run(serve_made(lambda: Ours(None)))

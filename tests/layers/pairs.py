"""Two agents with a request's layers between them: bytes of the producer, memory of the consumer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from nixl_async import Agent, LayerPlan, MemoryRegion, Peer, load_backend
from nixl_async.testing import FaultyBackend, assert_same, pattern
from tests.agents import TOKEN, connect

LAYER_NBYTES = 4096


@dataclass(eq=False)
class Request:
    """`producer` has the bytes `source` of `count` layers, `consumer` has room for them in `target`."""

    producer: Agent
    consumer: Agent
    faulty: FaultyBackend
    """The backend of the one who copies."""
    source: np.ndarray
    target: np.ndarray
    count: int
    near: MemoryRegion
    peer: Peer
    """The other one, as the one who copies sees it."""

    def plan(self, request: str = "r", push: bool = True) -> LayerPlan:
        """Layer i is the i-th part of the regions."""
        theirs = self.peer.region("kv")
        src, dst = (self.near, theirs) if push else (theirs, self.near)
        cuts = [slice(at, at + LAYER_NBYTES) for at in range(0, self.count * LAYER_NBYTES, LAYER_NBYTES)]
        return LayerPlan(request, [(src[cut], dst[cut]) for cut in cuts])

    def check(self, *layers: int) -> None:
        """Compare layers, by default all."""
        for layer in layers or range(self.count):
            cut = slice(layer * LAYER_NBYTES, (layer + 1) * LAYER_NBYTES)
            assert_same(self.target[cut], self.source[cut])

    def empty(self, *layers: int) -> bool:
        """Tell whether nothing of layers has arrived."""
        return not any(self.target[layer * LAYER_NBYTES : (layer + 1) * LAYER_NBYTES].any() for layer in layers)


@asynccontextmanager
async def request_between(count: int = 6, *, push: bool = True, backend: str = "memory") -> AsyncIterator[Request]:
    """Connect a producer "p" and a consumer "c"; whoever copies can be held up."""
    faulty = FaultyBackend(load_backend(backend))
    source, target = pattern(count * LAYER_NBYTES, 5), np.zeros(count * LAYER_NBYTES, np.uint8)
    ours, theirs = ([faulty], [backend]) if push else ([backend], [faulty])
    async with Agent("p", token=TOKEN, backends=ours) as producer, Agent("c", token=TOKEN, backends=theirs) as consumer:
        kept, room = await producer.register(source, name="kv"), await consumer.register(target, name="kv")
        mover, other = (producer, consumer) if push else (consumer, producer)
        peer = await connect(mover, other)
        yield Request(producer, consumer, faulty, source, target, count, kept if push else room, peer)


async def turns(n: int = 20) -> None:
    """Let everything that is ready run: the loop goes round `n` times."""
    for _ in range(n):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go round until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)

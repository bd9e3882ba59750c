"""What backends are told of peers and of their regions: real agents over real sockets."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nixl_async import Agent, BackendError, ConfigurationError
from nixl_async.backends.memory import MemoryBackend
from nixl_async.memory import RemoteRegion
from tests.agents import TOKEN, connect


class Keeping(MemoryBackend):
    """Notes what it is told to forget, and whether an op still used it."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: list[tuple[str, int]] = []

    async def forget(self, region: RemoteRegion) -> None:
        await asyncio.sleep(0)
        self.forgotten.append((region.name, region._holders))
        if region.name == "second":
            raise BackendError("it cannot be closed", backend=self.name)


async def test_backends_let_go_of_a_region_before_its_owner_does() -> None:
    keeping = Keeping()
    async with Agent("a", token=TOKEN, backends=[keeping]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
        first = await b.register(np.zeros(8, np.uint8), name="first")
        second = await b.register(np.zeros(8, np.uint8), name="second")
        peer = await connect(a, b)
        gate = asyncio.get_running_loop().create_future()
        waits = a.submit(peer.region("first"), await a.register(np.zeros(8, np.uint8)), after=gate)
        closing = asyncio.create_task(first.aclose())
        await anext(a.membership())
        assert keeping.forgotten == []
        gate.set_result(None)
        await closing
        assert waits.done()
        assert keeping.forgotten == [("first", 0)]
        # One that fails keeps nobody waiting.
        await second.aclose()
        assert keeping.forgotten == [("first", 0), ("second", 0)]


async def test_a_peer_that_a_backend_does_not_reach_says_why() -> None:
    mine, theirs = ["memory", "tcp"], ["memory"]
    async with Agent("a", token=TOKEN, backends=mine) as a, Agent("b", token=TOKEN, backends=theirs) as b:
        peer = await connect(a, b)
        assert peer.backends == {"memory"}
        assert peer.refusals == {"tcp": "peer 'b' has no such backend"}
        tcp = next(backend for backend in a._membership.backends if backend.name == "tcp")
        with pytest.raises(ConfigurationError, match="'tcp' was never connected to 'b'"):
            await a._membership.reconnect(tcp, "b")

"""Waiting for peers, and what is told of them: real agents over real sockets."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nixl_async import Agent, ClosedError
from tests.agents import TOKEN, connect, known


async def test_waiting_for_a_peer() -> None:
    async with Agent("a", token=TOKEN) as a:
        waits = [asyncio.create_task(a.wait_peer("b")) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        async with Agent("b", token=TOKEN) as b:
            await b.connect(await a.serve())
            assert (await waits[1]) is (await waits[2]) is a.peers["b"]
    with pytest.raises(ClosedError):
        await a.wait_peer("c")


async def test_who_waits_for_a_peer_hears_that_the_agent_closed() -> None:
    async with Agent("a", token=TOKEN) as a:
        wait = asyncio.create_task(a.wait_peer("b"))
        await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await wait


async def test_events_tell_the_whole_story() -> None:
    async with Agent("a", token=TOKEN) as a:
        events = a.membership()
        async with Agent("b", token=TOKEN) as b:
            await connect(a, b)
            async with await b.register(np.zeros(8, np.uint8), name="kv"):
                await known(a, a.peers["b"], "kv")
        told = [await anext(events) for _ in range(4)]
        assert [(event.kind, event.peer) for event in told] == [
            ("joined", "b"),
            ("regions", "b"),
            ("regions", "b"),
            ("left", "b"),
        ]
        assert "left" in told[-1].reason
    with pytest.raises(StopAsyncIteration):
        await anext(events)

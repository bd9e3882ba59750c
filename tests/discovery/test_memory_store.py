"""Agents of one process on loops of their own."""

from __future__ import annotations

import asyncio
import threading

from nixl_async import Agent
from tests.agents import TOKEN

PATIENCE_SECONDS = 20.0


async def test_agents_on_two_loops_find_each_other() -> None:
    url = "memory://two-loops"
    done = threading.Event()

    async def other() -> None:
        async with Agent("b", token=TOKEN, backends=["memory"], discovery=url) as b, asyncio.timeout(PATIENCE_SECONDS):
            await b.serve()
            peer = await b.wait_peer("a")
            while peer.connected:
                await anext(b.membership())

    def run() -> None:
        asyncio.run(other())
        done.set()

    async with Agent("a", token=TOKEN, backends=["memory"], discovery=url) as a, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        thread = threading.Thread(target=run)
        thread.start()
        assert (await a.peer("b")).name == "b"
        assert (await anext(events)).kind == "discovered"
        assert (await anext(events)).kind == "joined"
    await asyncio.to_thread(thread.join)
    assert done.is_set()

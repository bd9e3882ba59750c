"""Peers join once, however they come, and one at a time by each name: real agents over real sockets."""

from __future__ import annotations

import asyncio

from nixl_async import Agent
from tests.agents import TOKEN, two_agents


async def test_both_dial_at_once_and_keep_one_connection() -> None:
    for _ in range(10):
        async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
            at_a, at_b = await a.serve(), await b.serve()
            seen_by_a, seen_by_b = await asyncio.gather(a.connect(at_b), b.connect(at_a))
            assert (seen_by_a.name, seen_by_b.name) == ("b", "a")
            await a.notify("b", b"one")
            await b.notify("a", b"two")
            async with asyncio.timeout(10):
                assert (await anext(b.notifications())).payload == b"one"
                assert (await anext(a.notifications())).payload == b"two"
            assert (a.statistics().peers, b.statistics().peers) == (1, 1)


async def test_connecting_twice_gives_the_same_peer() -> None:
    async with two_agents() as (a, b, peer):
        assert b.address is not None
        assert await a.connect(b.address) is peer
        assert await a.connect(f"{b.address[0]}:{b.address[1]}") is peer
        assert await a.peer("b") is peer


async def test_who_comes_by_one_name_comes_one_at_a_time() -> None:
    async with Agent("a", token=TOKEN, backends=["memory"]) as a:
        joining, at_once = a._membership._joining, [0]

        async def come(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            async with joining._alone("b"):
                at_once[0] += 1
                for _ in range(3):
                    assert at_once == [1]
                    await asyncio.sleep(0)
                at_once[0] -= 1

        tasks = [asyncio.create_task(come(turns)) for turns in range(12)]
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.exception() for task in tasks if not task.cancelled()] == [None] * 11
        assert joining._turns == {}

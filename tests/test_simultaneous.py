"""Agents that dial each other at once keep one of two connections, and lose no notification by the other."""

from __future__ import annotations

import asyncio

from nixl_async import Agent
from tests.agents import TOKEN

ROUNDS = 20
COUNT = 30
PATIENCE_SECONDS = 20.0


async def send(agent: Agent, address: tuple[str, int], peer: str, turns: int) -> None:
    """Connect after some turns of the loop, and send from the first moment on, one notification a turn."""
    for _ in range(turns):
        await asyncio.sleep(0)
    await agent.connect(address)
    for i in range(COUNT):
        await agent.notify(peer, b"%d" % i)
        await asyncio.sleep(0)


async def receive(agent: Agent) -> list[bytes]:
    async with agent.notifications() as arriving:
        return [(await anext(arriving)).payload for _ in range(COUNT)]


async def test_no_notification_is_lost_when_both_dial_at_once() -> None:
    for round_ in range(ROUNDS):
        async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
            addresses = [await agent.serve("127.0.0.1", 0) for agent in (a, b)]
            async with asyncio.timeout(PATIENCE_SECONDS):
                *_, at_a, at_b = await asyncio.gather(
                    send(a, addresses[1], "b", round_), send(b, addresses[0], "a", round_ * 7 % 20), receive(a), receive(b)
                )
            assert at_a == at_b == [b"%d" % i for i in range(COUNT)]

"""Every loop, many agents, many transfers."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import AsyncExitStack

import numpy as np

from nixl_async import Agent
from nixl_async.testing import assert_same, pattern
from tests.agents import TOKEN, agent_process, two_agents
from tests.loops import every_loop

NBYTES = 8 << 20


@every_loop
async def test_the_main_flows() -> None:
    async with two_agents() as (a, b, peer):
        mine, theirs = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
        here = await a.register(mine)
        events = a.membership()
        await b.register(theirs, name="theirs")
        assert (await anext(events)).kind == "regions"
        arrivals = b.notifications(prefix=b"layer")
        order = np.random.default_rng(1).permutation(NBYTES // 4096)
        result = await a.transfer(here.pages(order, 4096), peer.region("theirs").pages(order, 4096), notify=b"layer 0")
        assert result.nbytes == NBYTES
        assert (await anext(arrivals)).payload == b"layer 0"
        assert_same(theirs, mine)
        transfer = a.submit(peer.region("theirs"), here)
        transfer.cancel()
        await asyncio.wait([asyncio.ensure_future(_swallow(transfer))])
        await a.disconnect(peer)
        assert (await anext(events)).kind == "left"


@every_loop
async def test_another_process_by_every_route() -> None:
    async with agent_process("far", nbytes=NBYTES, seed=1) as far:
        for route in ("samehost", "tcp", "ucx"):
            async with Agent("near", token=TOKEN, backends=[route]) as near:
                got = np.zeros(NBYTES, np.uint8)
                here = await near.register(got)
                remote = (await near.connect(far.address)).region("memory")
                assert (await near.transfer(remote, here)).route == route
                assert_same(got, pattern(NBYTES, 1))


async def test_a_hundred_agents_in_one_process() -> None:
    async with AsyncExitStack() as stack:
        backends = ["memory", "samehost"]
        hub = await stack.enter_async_context(Agent("hub", token=TOKEN, backends=backends))
        memory = np.zeros((100, 4096), np.uint8)
        await hub.register(memory, name="kv")
        address = await hub.serve()

        async def spoke(number: int) -> None:
            agent = await stack.enter_async_context(Agent(f"spoke-{number}", token=TOKEN, backends=backends))
            here = await agent.register(pattern(4096, number))
            remote = (await agent.connect(address)).region("kv")
            await agent.transfer(here, remote.pages([number], 4096), notify=b"%d" % number)

        await asyncio.gather(*(spoke(number) for number in range(100)))
        notes = hub.notifications()
        assert {int((await anext(notes)).payload) for _ in range(100)} == set(range(100))
        assert len(hub.peers) == 100
        for number in range(100):
            assert_same(memory[number], pattern(4096, number))


async def test_a_thousand_transfers_at_once() -> None:
    async with agent_process("far", nbytes=4_096_000, seed=1) as far:
        for route in ("samehost", "tcp", "ucx"):
            async with Agent("near", token=TOKEN, backends=[route]) as near:
                got = np.zeros(4_096_000, np.uint8)
                here = await near.register(got)
                remote = (await near.connect(far.address)).region("memory")
                order = np.random.default_rng(2).permutation(1000).tolist()
                await asyncio.gather(
                    *(near.transfer(remote.pages([n], 4096), here.pages([n], 4096)) for n in order[:500]),
                    *(near.submit(remote.pages([n], 4096), here.pages([n], 4096)) for n in order[500:]),
                )
                assert_same(got, pattern(4_096_000, 1))
                counts = near.statistics()
                assert (counts.done, counts.live_transfers, counts.regions) == (1000, 0, 1)
                assert counts.nbytes == {route: 4_096_000}


async def test_busy_loops_do_not_starve_notifications() -> None:
    async with two_agents() as (a, b, peer):
        arrivals = b.notifications()
        for number in range(2000):
            await a.notify(peer, b"%d" % number)
        assert [int((await anext(arrivals)).payload) for _ in range(2000)] == list(range(2000))


async def _swallow(transfer: object) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await transfer  # type: ignore[misc]

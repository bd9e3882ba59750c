"""Every loop, many agents, many transfers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from contextlib import AsyncExitStack

import numpy as np
import pytest

from nixl_async import Agent, NotFoundError
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


async def test_an_agent_of_very_many_regions() -> None:
    count, backends = 10_000, ["memory", "tcp"]
    memory = np.zeros((count, 64), np.uint8)
    memory[:, 0], memory[:, 1] = np.arange(count) % 251, np.arange(count) // 251
    async with Agent("near", token=TOKEN, backends=backends) as near, Agent("far", token=TOKEN, backends=backends) as far:
        regions = [await far.register(memory[number]) for number in range(count)]
        assert [regions[0].name, regions[-1].name] == ["region-1", f"region-{count}"]
        peer = await near.connect(await far.serve())
        got = np.zeros(64, np.uint8)
        here = await near.register(got)
        for number in range(0, count, 500):
            await near.transfer(peer.region(f"region-{number + 1}"), here, backend="tcp")
            assert (got[0], got[1]) == (number % 251, number // 251)
        for number in range(0, count, 500):
            await regions[number].aclose()
        assert len(peer.regions) == count - 20
        with pytest.raises(NotFoundError, match="and 9960 more"):
            peer.region("another")
        # The lowest name that is free.
        assert (await far.register(memory[0])).name == "region-1"


async def test_one_more_region_costs_as_many_bytes_however_many_there_are() -> None:
    def told() -> int:
        assert link is not None
        info = link.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
        return int.from_bytes(info[200:208], "little")

    memory = np.zeros((4100, 8), np.uint8)
    async with two_agents(backends=["memory"]) as (_, far, peer):
        link, costs = far.peers["a"].link, []
        for number in range(4100):
            before = told()
            await far.register(memory[number], name=f"block-{number:05d}")
            if number in (63, 4099):
                while f"block-{number:05d}" not in peer.regions:
                    await asyncio.sleep(0)
                costs.append(told() - before)
            elif number in (62, 4098):
                while f"block-{number:05d}" not in peer.regions:
                    await asyncio.sleep(0)
        # The number of the change grows by a digit or two, and addresses differ.
        assert abs(costs[1] - costs[0]) <= 16
        assert 100 < costs[0] < 300


async def test_busy_loops_do_not_starve_notifications() -> None:
    async with two_agents() as (a, b, peer):
        arrivals = b.notifications()
        for number in range(2000):
            await a.notify(peer, b"%d" % number)
        assert [int((await anext(arrivals)).payload) for _ in range(2000)] == list(range(2000))


async def _swallow(transfer: object) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await transfer  # type: ignore[misc]

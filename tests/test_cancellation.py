"""Promise 2 through the whole agent: when an await ends, however it ends, nothing moves any more."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nixl_async import Agent, MemoryRegion, Quarantined, TransferError, TransferState, load_backend
from nixl_async.testing import Canary, FaultyBackend, assert_same, cancel_after, cancel_at_await, pattern
from tests.agents import TOKEN, agent_process, connect, known, two_agents

ROUTES = ["memory", "samehost", "tcp", "ucx"]
LARGE = 24 << 20


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    return str(request.param)


@pytest.mark.parametrize("put", [True, False], ids=["put", "get"])
async def test_cancel_a_transfer_at_every_await(route: str, put: bool) -> None:
    async with two_agents(backends=[route]) as (a, b, peer):
        mine, theirs = pattern(LARGE, 1), pattern(LARGE, 2)
        here, there = await a.register(mine), await b.register(theirs, name="theirs")
        await known(a, peer, "theirs")
        sides = (here, peer.region("theirs")) if put else (peer.region("theirs"), here)
        for at in range(12):
            reached = await cancel_at_await(a.transfer(*sides), at, times=1 + at % 3)
            await Canary(theirs if put else mine, mine if put else theirs).watch()
            assert a.statistics().live_transfers == 0
            if not reached:
                break
        mine[:], theirs[:] = pattern(LARGE, 3), pattern(LARGE, 4)
        await a.transfer(*sides)
        assert_same(theirs, mine)
        assert there.name == "theirs"


async def test_timeout_in_the_middle_of_a_transfer(route: str) -> None:
    async with two_agents(backends=[route]) as (a, b, peer):
        mine, theirs = pattern(LARGE, 1), pattern(LARGE, 2)
        here = await a.register(mine)
        await b.register(theirs, name="theirs")
        await known(a, peer, "theirs")

        async def on_and_on() -> None:
            while True:
                await a.transfer(here, peer.region("theirs"))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(on_and_on(), 0.01)
        await Canary(theirs, mine).watch()


async def test_cancelling_one_of_many_leaves_the_others(route: str) -> None:
    async with two_agents(backends=[route]) as (a, b, peer):
        mine, theirs = pattern(LARGE, 1), np.zeros(LARGE, np.uint8)
        here = await a.register(mine)
        await b.register(theirs, name="theirs")
        await known(a, peer, "theirs")
        remote, size = peer.region("theirs"), LARGE // 8
        transfers = [a.submit(here[i * size : (i + 1) * size], remote[i * size : (i + 1) * size]) for i in range(8)]
        transfers[3].cancel()
        ended = await asyncio.gather(*(_outcome(transfer) for transfer in transfers))
        assert ended.count("done") >= 7
        for i, outcome in enumerate(ended):
            if outcome == "done":
                assert_same(theirs[i * size : (i + 1) * size], mine[i * size : (i + 1) * size])


async def test_a_task_group_that_fails_takes_its_transfers_with_it() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine, theirs = pattern(LARGE, 1), np.zeros(LARGE, np.uint8)
        here = await a.register(mine)
        await b.register(theirs, name="theirs")
        await known(a, peer, "theirs")

        async def fail() -> None:
            raise ValueError("on purpose")

        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(a.transfer(here, peer.region("theirs")))
                group.create_task(fail())

        with pytest.raises(ExceptionGroup):
            await together()
        await Canary(theirs, mine).watch()


async def test_a_transfer_in_another_process_is_cancelled_quietly() -> None:
    async with agent_process("far", nbytes=LARGE) as far, Agent("near", token=TOKEN, backends=["tcp"]) as near:
        mine = pattern(LARGE, 5)
        here = await near.register(mine)
        remote = (await near.connect(far.address)).region("memory")
        for step in range(4):
            await cancel_after(near.transfer(here, remote), 0.002 * step)
            before = (await far.order("digest"))["digest"]
            mine[:] = 0
            assert (await far.order("digest"))["digest"] == before
            mine[:] = pattern(LARGE, 5)


@pytest.mark.parametrize("what", ["connect", "register", "prepare", "notify", "deregister"])
async def test_whatever_is_cancelled_leaves_the_agent_usable(what: str) -> None:
    async with Agent("b", token=TOKEN) as b:
        theirs = np.zeros(4096, np.uint8)
        await b.register(theirs, name="theirs")
        host, port = await b.serve()
        for at in range(10):
            async with Agent("a", token=TOKEN) as a:
                here = await a.register(pattern(4096, at))
                if what != "connect":
                    await connect(a, b)

                acts = {
                    "connect": lambda a=a: a.connect((host, port)),
                    "register": lambda a=a: a.register(np.zeros(100, np.uint8), name="more"),
                    "prepare": lambda a=a, here=here: a.prepare(here, a.peers["b"].region("theirs")),
                    "notify": lambda a=a: a.notify("b", b"x"),
                    "deregister": lambda here=here: here.aclose(),
                }
                reached = await cancel_at_await(acts[what](), at)
                peer = await connect(a, b)
                again = await a.register(pattern(4096, at + 1))
                await a.transfer(again, peer.region("theirs"))
                assert_same(theirs, pattern(4096, at + 1))
            if not reached:
                break


async def test_draining_is_waited_for() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(4096, 1)), await a.register(np.zeros(4096, np.uint8))
        with faulty.hang(stubborn=True) as gate:
            transfer = a.submit(src, dst)
            await gate.reached()
            transfer.cancel()
            assert transfer.state is TransferState.DRAINING
            waiter = asyncio.ensure_future(_outcome(transfer))
            await asyncio.sleep(0)
            assert not waiter.done()
            gate.release()
            assert await waiter == "cancelled"


@pytest.mark.parametrize("by", ["cancel", "timeout"])
async def test_quarantine_goes_before_a_cancellation_which_the_task_still_knows_of(by: str) -> None:
    faulty = FaultyBackend(load_backend("memory"))
    faulty.limits = type(faulty.limits)(drain_seconds=0.05)
    seen = []

    async def send(agent: Agent, src: MemoryRegion, dst: MemoryRegion) -> None:
        try:
            async with asyncio.timeout(0.05 if by == "timeout" else None):
                await agent.transfer(src, dst)
        except TransferError as error:
            task = asyncio.current_task()
            assert task is not None
            seen.append((type(error), task.cancelling()))

    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(4096, 1)), await a.register(np.zeros(4096, np.uint8))
        with faulty.hang(stubborn=True) as gate:
            sending = asyncio.create_task(send(a, src, dst))
            await gate.reached()
            if by == "cancel":
                sending.cancel()
            await sending
    # A timeout takes its own cancellation back.
    assert seen == [(Quarantined, 1 if by == "cancel" else 0)]


async def test_what_never_drains_is_quarantined() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    faulty.limits = type(faulty.limits)(drain_seconds=0.05)
    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(4096, 1)), await a.register(np.zeros(4096, np.uint8), name="victim")
        with faulty.hang(stubborn=True) as gate:
            transfer = a.submit(src, dst)
            await gate.reached()
            transfer.cancel()
            with pytest.raises(Quarantined, match="victim"):
                await transfer
            with pytest.raises(Exception, match="quarantined"):
                await a.transfer(src, dst)


async def _outcome(transfer: object) -> str:
    try:
        await transfer  # type: ignore[misc]
    except asyncio.CancelledError:
        return "cancelled"
    return "done"

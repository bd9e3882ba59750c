"""The agent end to end, in one process and between two."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection

import numpy as np
import pytest

from nixl_async import (
    Agent,
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    DescriptorError,
    LayerPlan,
    NoRoute,
    Peer,
    PeerLost,
    RegistrationError,
    TrafficClass,
    TransferState,
    load_backend,
)
from nixl_async.testing import FaultyBackend

NBYTES = 1 << 22
BACKENDS = [["memory"], ["samehost"]]


class Pair:
    """Two connected agents in one process, each with one region called kv."""

    def __init__(self, a: Agent, b: Agent) -> None:
        self.a, self.b = a, b
        rng = np.random.default_rng(1)
        self.source = rng.integers(0, 255, NBYTES, dtype=np.uint8)
        self.target = np.zeros(NBYTES, np.uint8)
        self.peer: Peer

    async def open(self) -> Pair:
        self.kv = await self.a.register(self.source, name="kv")
        self.far = await self.b.register(self.target, name="kv")
        self.peer = await self.a.connect(await self.b.serve())
        await self.b.wait_peer(self.a.name)
        self.remote = self.peer.region("kv")
        return self


@pytest.fixture(params=BACKENDS, ids=lambda names: "+".join(names))
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    names = request.param
    async with Agent("a", backends=names, token="t") as a, Agent("b", backends=names, token="t") as b:
        yield await Pair(a, b).open()


@pytest.mark.parametrize("page", [1, 1000, 4096, 65536])
async def test_pages_arrive_where_they_belong_both_ways(pair: Pair, page: int) -> None:
    rng = np.random.default_rng(page)
    n = min(NBYTES // page, 5000)
    mine, theirs = rng.permutation(n), rng.permutation(n)
    result = await pair.a.transfer(pair.kv.pages(mine, page), pair.remote.pages(theirs, page))
    assert result.nbytes == n * page
    source, target = (x[: n * page].reshape(n, page) for x in (pair.source, pair.target))
    assert (target[theirs] == source[mine]).all()
    pair.source[:] = 0
    await pair.a.transfer(pair.remote.pages(theirs, page), pair.kv.pages(mine, page))
    assert (target[theirs] == source[mine]).all()
    assert source[mine].any()


async def test_unequal_pages_pair_byte_by_byte(pair: Pair) -> None:
    order = np.random.default_rng(2).permutation(64)
    await pair.a.transfer(pair.kv.pages(order, 4096), pair.remote[0 : 64 * 4096])
    assert (pair.target[: 64 * 4096].reshape(64, 4096) == pair.source[: 64 * 4096].reshape(64, 4096)[order]).all()


async def test_a_notification_arrives_after_the_bytes(pair: Pair) -> None:
    arrivals = pair.b.notifications(prefix=b"layer")
    for step in range(50):
        pair.source[:4096] = step
        await pair.a.transfer(pair.kv[0:4096], pair.remote[0:4096], notify=b"layer%d" % step)
        seen = await anext(arrivals)
        assert (seen.peer, seen.payload) == ("a", b"layer%d" % step)
        assert (pair.target[:4096] == step).all()


async def test_parts_are_told_as_they_finish(pair: Pair) -> None:
    parts = [pair.kv[i * 1000 : (i + 1) * 1000] for i in range(20)]
    transfer = pair.a.submit(parts, pair.remote[0:20000])
    assert sorted([part.index async for part in transfer.parts()]) == list(range(20))
    assert (await transfer).nbytes == 20000 == transfer.nbytes_done
    assert (await transfer).route == pair.a.explain(pair.kv, pair.remote).route
    assert transfer.state is TransferState.DONE


async def test_a_prepared_transfer_sends_the_bytes_of_the_moment(pair: Pair) -> None:
    prepared = await pair.a.prepare(pair.kv[0:1000], pair.remote[5:1005])
    for value in range(5):
        pair.source[:1000] = value
        await prepared.transfer()
        assert (pair.target[5:1005] == value).all()


async def test_cancelling_leaves_nothing_moving(pair: Pair) -> None:
    for after in range(12):
        task = asyncio.create_task(pair.a.transfer(pair.kv, pair.remote))
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        pair.target[:] = 99
        for _ in range(20):
            await asyncio.sleep(0)
        assert (pair.target == 99).all()
    assert pair.a.statistics().live_transfers == 0


async def test_timeout_surfaces_as_timeout(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            # One alone may be over before it gives way to the loop.
            await asyncio.gather(*(pair.a.transfer(pair.kv, pair.remote) for _ in range(2)))
    assert (await pair.a.transfer(pair.kv, pair.remote)).nbytes == NBYTES


# Debug mode keeps a traceback for each of the tasks, which would hold the loop for longer than a test may.
@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_ten_thousand_at_once(pair: Pair) -> None:
    jobs = [pair.a.transfer(pair.kv[i * 64 : i * 64 + 64], pair.remote[i * 64 : i * 64 + 64]) for i in range(10000)]
    await asyncio.gather(*jobs)
    assert (pair.target[:640000] == pair.source[:640000]).all()


async def test_regions_come_and_go(pair: Pair) -> None:
    events = pair.a.membership()
    late = await pair.b.register(bytearray(100), name="late")
    assert (await anext(events)).kind == "regions"
    region = pair.peer.region("late")
    await late.aclose()
    with pytest.raises(ClosedError):
        await pair.a.transfer(pair.kv[0:100], region)
    assert "late" not in pair.peer.regions


async def test_a_peer_that_leaves_fails_what_is_sent_to_it(pair: Pair) -> None:
    events = pair.a.membership()
    await pair.b.disconnect("a")
    assert (await anext(events)).kind == "left"
    with pytest.raises(PeerLost):
        await pair.a.transfer(pair.kv, pair.remote)


async def test_bad_input_is_refused(pair: Pair) -> None:
    for bad in (
        lambda: pair.kv.pages([-1], 10),
        lambda: pair.kv.pages([NBYTES // 4096], 4096),
        lambda: pair.kv.pages([1], 0),
        lambda: pair.kv[0 : NBYTES + 1],
        lambda: pair.kv.ranges([NBYTES - 1], [2]),
        lambda: pair.kv.ranges([0, 1], [1, 2, 3]),
        lambda: pair.kv.pages([1 << 62], 1 << 40),
    ):
        with pytest.raises(DescriptorError):
            bad()
    with pytest.raises(TypeError):
        pair.kv.pages([1.5], 10)
    with pytest.raises(DescriptorError):
        await pair.a.transfer(pair.kv[0:10], pair.remote[0:11])
    with pytest.raises(NoRoute):
        await pair.a.transfer(pair.remote, pair.remote)
    with pytest.raises(ConfigurationError):
        await pair.a.transfer(pair.kv, pair.remote, backend="nonesuch")
    with pytest.raises(ConfigurationError):
        await pair.a.register(bytearray(1), name="kv")
    with pytest.raises(RegistrationError):
        await pair.a.register(bytearray())
    with pytest.raises(RegistrationError):
        await pair.a.register(np.zeros((10, 10))[:, 1])
    with pytest.raises(PeerLost):
        await pair.a.notify("nobody", b"")
    readonly = await pair.a.register(b"constant")
    await pair.a.transfer(readonly, pair.remote[0:8])
    with pytest.raises(DescriptorError, match="read-only"):
        await pair.a.transfer(pair.remote[0:8], readonly)


async def test_a_wrong_token_is_refused() -> None:
    async with Agent("a", backends=["memory"], token="x") as a, Agent("b", backends=["memory"], token="y") as b:
        address = await b.serve()
        with pytest.raises(AuthenticationError):
            await a.connect(address)
        assert not b.peers


async def test_without_a_token_peers_are_refused_unless_told() -> None:
    async with Agent("a", backends=["memory"]) as a:
        with pytest.raises(ConfigurationError, match="token"):
            await a.serve()


def _target(connection: Connection) -> None:
    async def run() -> None:
        async with Agent("target", backends=["samehost"], token="t") as agent:
            memory = np.zeros(NBYTES, np.uint8)
            await agent.register(memory, name="kv")
            connection.send((await agent.serve(), os.getpid()))
            async for event in agent.membership():
                if event.kind != "joined":
                    break

    asyncio.run(run())


@pytest.fixture
async def other_process() -> AsyncIterator[tuple[tuple[str, int], int]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_target, args=(theirs,))
    process.start()
    try:
        yield await asyncio.to_thread(ours.recv)
    finally:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        ours.close()
        theirs.close()


async def test_a_killed_peer_is_lost_within_a_second(other_process: tuple[tuple[str, int], int]) -> None:
    address, pid = other_process
    async with Agent("a", backends=["samehost"], token="t") as agent:
        region = await agent.register(np.ones(NBYTES, np.uint8))
        peer = await agent.connect(address)
        await agent.transfer(region, peer.region("kv"))
        events = agent.membership()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(1):
            assert (await anext(events)).kind == "lost"
        with pytest.raises(PeerLost):
            await agent.transfer(region, peer.region("kv"))


async def test_the_bytes_cross_processes(other_process: tuple[tuple[str, int], int]) -> None:
    address, _ = other_process
    async with Agent("a", backends=["samehost"], token="t") as agent:
        sent = np.random.default_rng(3).integers(0, 255, NBYTES, dtype=np.uint8)
        back = np.zeros(NBYTES, np.uint8)
        source, sink = await agent.register(sent), await agent.register(back)
        remote = (await agent.connect(address)).region("kv")
        order = np.random.default_rng(4).permutation(NBYTES // 4096)
        await agent.transfer(source, remote.pages(order, 4096))
        await agent.transfer(remote.pages(order, 4096), sink)
        assert (sent == back).all()
        assert not np.shares_memory(sent, back)


async def test_how_urgent_a_transfer_is() -> None:
    async with Agent("urgent", backends=["memory"], shares={"bulk": 2}) as agent:
        near, far = await agent.register(bytearray(1 << 20)), await agent.register(bytearray(1 << 20))
        due = asyncio.get_running_loop().time() - 1
        await agent.transfer(near, far, traffic_class="latency", deadline=due, after=asyncio.sleep(0))
        prepared = await agent.prepare(near, far)
        await prepared.submit(traffic_class=TrafficClass.BULK)
        counts = agent.statistics().classes
        assert (counts["latency"].done, counts["latency"].late, counts["latency"].nbytes) == (1, 1, 1 << 20)
        assert (counts["bulk"].done, counts["bulk"].late, counts["normal"].done) == (1, 0, 0)


async def test_wrong_urgency_is_refused() -> None:
    async with Agent("urgent", backends=["memory"]) as agent:
        near, far = await agent.register(bytearray(64)), await agent.register(bytearray(64))
        with pytest.raises(ConfigurationError, match="traffic_class is 'fast'; it must be one of 'latency', 'normal', 'bulk'"):
            await agent.transfer(near, far, traffic_class="fast")
        with pytest.raises(ConfigurationError, match="deadline is nan; give seconds of the loop's clock"):
            agent.submit(near, far, deadline=float("nan"))
    with pytest.raises(ConfigurationError, match="a class of shares is 'fast'"):
        Agent("urgent", shares={"fast": 1})
    with pytest.raises(ConfigurationError, match="is 0; shares are positive numbers"):
        Agent("urgent", shares={"bulk": 0})


# Draining.


async def test_a_long_transfer_ends_whole_before_an_agent_has_drained() -> None:
    faulty = FaultyBackend(load_backend("tcp"))
    async with Agent("a", token="t", backends=[faulty]) as a, Agent("b", token="t", backends=["tcp"]) as b:
        pair = await Pair(a, b).open()
        with faulty.hang() as gate:
            transfer = a.submit(pair.kv, pair.remote)
            await gate.reached()
            draining = asyncio.create_task(a.drain())
            # A cancelled wait leaves the agent as it is, and the transfer under way.
            given_up = asyncio.create_task(a.drain())
            await asyncio.sleep(0)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            with pytest.raises(ClosedError, match="drains"):
                await a.serve()
            assert not transfer.done()
            assert not draining.done()
            gate.release()
            await draining
            assert transfer.done()
        assert (await transfer).nbytes == NBYTES
        assert (pair.target == pair.source).all()
        # What comes later is sent all the same.
        pair.source[:10] = 7
        await a.transfer(pair.kv[:10], pair.remote[:10])
        assert pair.target[:10].tolist() == [7] * 10


@pytest.mark.parametrize("what", ["push", "incoming", "lease", "notification", "waiting"])
async def test_draining_waits_for_what_is_under_way(pair: Pair, what: str) -> None:
    a = pair.a
    end: Callable[[], Awaitable[object]]
    async with AsyncExitStack() as stack:
        match what:
            case "push":
                push = await stack.enter_async_context(a.push("b", LayerPlan("r", [(pair.kv, pair.remote)])))
                incoming = await stack.enter_async_context(pair.b.incoming("r"))

                async def end() -> None:
                    push.ready(0)
                    assert [layer async for layer in incoming.layers()] == [0]
                    await stack.aclose()

            case "incoming":
                await stack.enter_async_context(a.incoming("r"))
                end = stack.aclose
            case "lease":
                block = await a.register(np.zeros(10, np.uint8), offered=False)
                end = (await block.lease("b", seconds=60)).revoke
            case "notification":
                sending = asyncio.create_task(_fill(a))
                inbox = pair.b.notifications()
                while not a._membership.busy:
                    await asyncio.sleep(0)

                async def end() -> None:
                    while (await anext(inbox)).payload != b"last":
                        pass
                    await sending

            case _:
                point: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                transfer = a.submit(pair.kv, pair.remote, after=point)

                async def end() -> None:
                    point.set_result(None)
                    await transfer

        draining = asyncio.create_task(a.drain())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not draining.done()
        await asyncio.gather(end(), draining)


async def _fill(agent: Agent) -> None:
    """Send a peer more than it takes unread."""
    for _ in range(40):
        await agent.notify("b", bytes(1 << 20))
    await agent.notify("b", b"last")


async def test_closing_ends_the_wait_of_who_drains() -> None:
    async with Agent("a", token="t", backends=["memory"]) as a, Agent("b", token="t", backends=["memory"]) as b:
        pair = await Pair(a, b).open()
        point: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transfer = a.submit(pair.kv, pair.remote, after=point)
        lease = await (await a.register(np.zeros(10, np.uint8), offered=False)).lease("b", seconds=60)
        draining = asyncio.create_task(a.drain())
        await asyncio.sleep(0)
        await a.aclose()
        with pytest.raises(ClosedError):
            await draining
        assert transfer.cancelled()
        assert lease.is_quiet
        with pytest.raises(ClosedError):
            await a.drain()

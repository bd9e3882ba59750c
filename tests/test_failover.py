"""Routes that die under transfers: the callers do not notice, and nothing of an attempt that was given up lands later."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, BackendError, PeerLost, Quarantined, fences, load_backend
from nixl_async.backend import PeerInfo
from nixl_async.backends.samehost import SameHostBackend
from nixl_async.backends.tcp import TCPBackend
from nixl_async.testing import assert_same, pattern
from nixl_async.testing.faults import reset_connections
from nixl_async.testing.network import Network, network
from tests.agents import TOKEN, AgentProcess, agent_process, known, two_agents

NBYTES = 4 << 20
SECONDS = 20


class Distant(TCPBackend):
    """Reaches its peers through a piece of network."""

    network: Network

    def __init__(self) -> None:
        super().__init__(streams=2)
        self.port = 0
        self.refused = False

    async def connect(self, peer: PeerInfo) -> None:
        if self.refused:
            raise BackendError("the network is cut", backend=self.name, peer=peer.name)
        value = json.loads(peer.description)
        self.port = value["at"][0][1]
        if hasattr(self, "network"):
            self.network.to_port, self.port = self.port, self.network.port
            value["at"] = [["127.0.0.1", self.port]]
        await super().connect(replace(peer, description=json.dumps(value).encode()))


class Restricted(SameHostBackend):
    """Copies until the kernel refuses."""

    def __init__(self) -> None:
        super().__init__(way="direct")
        self.refused = False

    def _again(self, *arguments: Any) -> int:
        return -errno.EPERM if self.refused else super()._again(*arguments)

    def _direct(self, *arguments: Any) -> int:
        return -errno.EPERM if self.refused else super()._direct(*arguments)

    def _probe(self, pid: int, peer: str, *arguments: Any, **options: Any) -> None:
        if self.refused:
            self._raise(-errno.EPERM, "read from", pid, peer)
        super()._probe(pid, peer, *arguments, **options)


@asynccontextmanager
async def far_away(backends: list[str]) -> AsyncIterator[tuple[Agent, AgentProcess, Distant, Network]]:
    """A peer in a process of its own, tcp through a network first, then `backends`; `pattern(NBYTES, 1)` is its memory."""
    tcp = Distant()
    others = [load_backend(name) for name in backends]
    async with (
        network(0) as between,
        agent_process("far", nbytes=NBYTES, backends=["tcp", *backends]) as far,
        Agent("near", token=TOKEN, backends=[tcp, *others]) as near,
    ):
        tcp.network = between
        await near.connect(far.address)
        yield near, far, tcp, between


def digest(seed: int) -> str:
    return hashlib.sha256(pattern(NBYTES, seed).tobytes()).hexdigest()


# What is given up does not land later.


@pytest.mark.parametrize("page", [NBYTES // 4, 4096], ids=["large", "small"])
async def test_what_the_network_delivers_late_does_not_overwrite_what_is_newer(page: int) -> None:
    async with far_away(["samehost"]) as (near, far, _, between):
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here, there = await near.register(mine), near.peers["far"].region("memory")
        between.hold()
        if page < NBYTES // 4:
            # The express connection's.
            transfers = [near.submit(here[0:page], there[0:page])]
            moving = asyncio.ensure_future(near.transfer(here[0:page], there[0:page]))
        else:
            transfers = [near.submit(here[at : at + page], there[at : at + page]) for at in range(0, NBYTES, page)]
            moving = asyncio.ensure_future(asyncio.sleep(0))
        await between.holds(2 * page)
        between.reset_clients()
        async with asyncio.timeout(SECONDS):
            results = await asyncio.gather(*transfers)
            await moving
        assert {result.route for result in results} <= {"samehost", "tcp"}
        # They have ended: the memory is the caller's again.
        mine[:] = await asyncio.to_thread(pattern, NBYTES, 3)
        await near.transfer(here, there)
        assert (await far.order("digest"))["digest"] == digest(3)
        await between.release()
        assert between.refused >= 2 * page
        assert between.delivered == 0
        assert (await far.order("digest"))["digest"] == digest(3)
        assert near.statistics().routes_lost >= 1


async def test_what_lies_in_a_stopped_peers_socket_is_waited_for() -> None:
    async with far_away(["samehost"]) as (near, far, tcp, _):
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here, there = await near.register(mine), near.peers["far"].region("memory")
        far.stop()
        try:
            transfer = near.submit(here, there)
            while not transfer._record.ops:
                await asyncio.sleep(0)
            tcp.refused = True
            reset_connections(tcp.port)
            done, _ = await asyncio.wait([asyncio.ensure_future(transfer.watch())], timeout=0.3)
            # It could go by samehost, which needs no thread of the peer's: but the peer has not said that it is quiet.
            assert not done
        finally:
            far.resume()
        async with asyncio.timeout(SECONDS):
            result = await transfer
        assert result.route == "samehost"
        mine[:] = await asyncio.to_thread(pattern, NBYTES, 3)
        await near.transfer(here, there)
        for _ in range(3):
            assert (await far.order("digest"))["digest"] == digest(3)


@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
async def test_what_the_peer_does_not_confirm_is_quarantined(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    monkeypatch.setattr(fences, "FENCE_SECONDS", 0.1)
    async with far_away(["samehost"]) as (near, far, tcp, _):
        nbytes = 4096 if small else NBYTES
        here = await near.register(np.ones(NBYTES, np.uint8), name="mine")
        there = near.peers["far"].region("memory")
        far.stop()
        try:
            call = asyncio.ensure_future(near.transfer(here[0:nbytes], there[0:nbytes]))
            while not (near.statistics().live_transfers or near._dispatcher._begun):
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            tcp.refused = True
            reset_connections(tcp.port)
            with pytest.raises(Quarantined, match="may still be written there") as raised:
                async with asyncio.timeout(SECONDS):
                    await call
            # On this side nothing moves.
            assert not raised.value.local
            assert not here.quarantined
        finally:
            far.resume()
        await near.transfer(there, here)


async def test_a_cancelled_put_that_is_cut_off_is_fenced_too() -> None:
    async with far_away([]) as (near, far, _, between):
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here, there = await near.register(mine), near.peers["far"].region("memory")
        between.hold()
        transfer = near.submit(here, there)
        # On both connections: one of which nothing had been sent would be kept, and hold what comes next.
        await between.holds(NBYTES)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(SECONDS):
                await transfer
        mine[:] = await asyncio.to_thread(pattern, NBYTES, 3)
        async with asyncio.timeout(SECONDS):
            await near.transfer(here, there)
        await between.release()
        assert between.delivered == 0
        assert (await far.order("digest"))["digest"] == digest(3)


async def test_a_put_by_an_endpoint_that_failed_is_fenced() -> None:
    pytest.importorskip("ucxx")
    from nixl_async.backends.ucx import UCXBackend
    from nixl_async.native import lib

    ucx = UCXBackend()
    async with (
        agent_process("far", nbytes=NBYTES, backends=["ucx"]) as far,
        Agent("near", token=TOKEN, backends=[ucx]) as near,
    ):
        there = (await near.connect(far.address)).region("memory")
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here = await near.register(mine)
        for seed in range(3, 9):
            transfer = near.submit(here, there)
            while not transfer._record.ops:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            lib.nx_ucx_fail(ucx._peers["far"].pointer)
            async with asyncio.timeout(SECONDS):
                await transfer
            mine[:] = await asyncio.to_thread(pattern, NBYTES, seed)
            async with asyncio.timeout(SECONDS):
                await near.transfer(here, there)
            for _ in range(2):
                assert (await far.order("digest"))["digest"] == digest(seed)


# The callers do not notice.


async def test_only_what_was_on_a_connection_that_broke_is_repeated() -> None:
    tcp = Distant()
    async with two_agents(backends=["tcp"]) as (_, b, _), Agent("c", token=TOKEN, backends=[tcp]) as c:
        assert b.address is not None
        theirs = np.zeros(64 << 20, np.uint8)
        await b.register(theirs, name="theirs")
        peer = await c.connect(b.address)
        mine = await asyncio.to_thread(pattern, 64 << 20, 1)
        here = await c.register(mine)
        transfer = c.submit(here, peer.region("theirs"))
        streams = tcp._peers["b"].streams
        assert len(streams) == 2
        while not all(stream.nbytes for stream in streams):
            await asyncio.sleep(0)
        _drop_first(tcp)
        async with asyncio.timeout(SECONDS):
            result = await transfer
        await asyncio.to_thread(assert_same, theirs, mine)
        # Each connection has two of the four ops that are in flight.
        assert 0 < c.statistics().retries <= 3
        assert result.attempts == 8 + c.statistics().retries
        assert len(tcp._peers["b"].streams) == 2


def _drop_first(tcp: Distant) -> None:
    from nixl_async.native import lib

    lib.nx_tcp_drop(tcp._peers["b"].streams[0].pointer)


@pytest.mark.parametrize("put", [True, False], ids=["put", "get"])
async def test_the_next_route_takes_over_and_the_first_comes_back(put: bool, caplog: pytest.LogCaptureFixture) -> None:
    first = Restricted()
    async with (
        agent_process("far", nbytes=NBYTES, backends=["samehost", "tcp"]) as far,
        Agent("near", token=TOKEN, backends=[first, "tcp"]) as near,
    ):
        there = (await near.connect(far.address)).region("memory")
        mine = await asyncio.to_thread(pattern, NBYTES, 2)
        here = await near.register(mine)
        sides = (here, there) if put else (there, here)
        prepared, small = await near.prepare(*sides), await near.prepare(*[side[0:4096] for side in sides])
        assert prepared.routes == ("samehost", "tcp")
        first.refused = True
        with caplog.at_level(logging.INFO, "nixl_async.agent"):
            assert (await small.transfer()).route == "tcp"
            for result in [await prepared.transfer(), *await asyncio.gather(*(prepared.submit() for _ in range(4)))]:
                assert result.route == "tcp"
                assert result.attempts == 1
            explained = near.explain(*sides)
            assert (explained.route, explained.routes) == ("tcp", ("tcp", "samehost"))
            assert "may not be traced" in explained.outages["samehost"] or "ptrace_scope" in explained.outages["samehost"]
            assert "samehost: down: " in str(explained)
            assert "tried again" in str(explained)
            first.refused = False
            async with asyncio.timeout(SECONDS):
                while near.explain(*sides).outages:
                    await asyncio.sleep(0.005)
        assert (await prepared.transfer()).route == "samehost"
        assert near.statistics().routes_lost == 1
        assert near.statistics().failovers == 1
        told = [record.message for record in caplog.records if "route samehost" in record.message]
        assert told[0].startswith("route samehost to peer far is down: ")
        assert sum("stays down" in message for message in told) <= 1
        assert told[-1] == "route samehost to peer far is back"
        if put:
            assert (await far.order("digest"))["digest"] == digest(2)
        else:
            assert_same(mine, pattern(NBYTES, 1))


async def test_a_single_route_is_waited_for() -> None:
    async with far_away([]) as (near, far, tcp, _):
        here = await near.register(await asyncio.to_thread(pattern, NBYTES, 2))
        there = near.peers["far"].region("memory")
        tcp.refused = True
        assert reset_connections(tcp.port)
        while not near.explain(here, there).outages:
            await asyncio.sleep(0)
        transfer = near.submit(here, there)
        hurried = near.submit(here, there, deadline=asyncio.get_running_loop().time() + 0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await near.transfer(here, there)
        with pytest.raises(PeerLost, match="all routes to peer 'far' are down"):
            async with asyncio.timeout(SECONDS):
                await hurried
        assert not transfer.done()
        tcp.refused = False
        async with asyncio.timeout(SECONDS):
            await transfer
        assert (await far.order("digest"))["digest"] == digest(2)
        assert near.statistics().live_transfers == 0


async def test_what_waits_for_a_route_hears_that_its_peer_has_died() -> None:
    async with far_away([]) as (near, far, tcp, _):
        here = await near.register(np.ones(NBYTES, np.uint8))
        there = near.peers["far"].region("memory")
        tcp.refused = True
        assert reset_connections(tcp.port)
        while not near.explain(here, there).outages:
            await asyncio.sleep(0)
        transfer = near.submit(here, there)
        far.kill()
        with pytest.raises(PeerLost, match="'far'"):
            async with asyncio.timeout(5):
                await transfer
        assert "far" not in near.peers


async def test_parts_that_were_told_of_are_not_taken_back() -> None:
    tcp = Distant()
    async with two_agents(backends=["tcp"]) as (_, b, _), Agent("c", token=TOKEN, backends=[tcp]) as c:
        assert b.address is not None
        theirs = np.zeros(64 << 20, np.uint8)
        await b.register(theirs, name="theirs")
        peer = await c.connect(b.address)
        await known(c, peer, "theirs")
        mine = await asyncio.to_thread(pattern, 64 << 20, 1)
        here, n = await c.register(mine), 64
        cuts = [slice(at, at + len(mine) // n) for at in range(0, len(mine), len(mine) // n)]
        transfer = c.submit([here[cut] for cut in cuts], [peer.region("theirs")[cut] for cut in cuts])
        seen: list[int] = []
        async with asyncio.timeout(SECONDS):
            async for part in transfer.parts():
                if not seen:
                    _drop_first(tcp)
                seen.append(part.index)
                # What is told of is there, and stays.
                assert np.array_equal(theirs[cuts[part.index]], mine[cuts[part.index]])
        assert sorted(seen) == list(range(n))
        assert c.statistics().routes_lost == 1

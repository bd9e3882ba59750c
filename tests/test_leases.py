"""Leases as their owner sees them: when they end, when the memory is quiet, and what is said when it is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from nixl_async import (
    AccessError,
    Agent,
    ClosedError,
    ConfigurationError,
    Lease,
    LeaseEnded,
    MemoryRegion,
    NoRoute,
    PeerLost,
    Quarantined,
    RemoteRegion,
)
from nixl_async.liveness import Liveness
from nixl_async.testing import Canary, assert_same, pattern
from tests.agents import TOKEN, AgentProcess, agent_process, connect, two_agents
from tests.loops import every_loop

ROUTES = ["samehost", "tcp", "ucx"]
ALONE = ["samehost", "ucx"]
"""Those by which the peer moves the bytes."""
SIZE = 8 << 20
PROMPT_SECONDS = 3.0
PATIENCE_SECONDS = 30.0


@asynccontextmanager
async def lent(
    *backends: str, seconds: float = 0.5, drain_seconds: float = 10.0, liveness: Liveness | None = None
) -> AsyncIterator[tuple[Agent, AgentProcess, MemoryRegion, np.ndarray, Lease]]:
    """Open "near", whose "kv" is leased to "far", a process."""
    async with (
        agent_process("far", nbytes=SIZE, backends=list(backends) or None) as far,
        Agent("near", token=TOKEN, backends=list(backends) or None, liveness=liveness) as near,
    ):
        memory = np.zeros(SIZE, np.uint8)
        region = await near.register(memory, name="kv", offered=False)
        host, port = await near.serve()
        await far.order("connect", host=host, port=port)
        await near.wait_peer("far")
        lease = await region.lease("far", seconds, drain_seconds=drain_seconds)
        yield near, far, region, memory, lease


async def ended(lease: Lease) -> None:
    """Wait until a lease has ended, quiet or not."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while lease.active:
            await asyncio.sleep(0.01)


async def moving(memory: np.ndarray) -> None:
    """Wait until the peer writes."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            memory[-1] = 0
            await asyncio.sleep(0.005)
            if memory[-1]:
                return


# Granting.


@pytest.mark.parametrize("route", ROUTES)
async def test_a_peer_uses_what_it_is_lent_until_that_is_revoked(route: str) -> None:
    async with lent(route) as (near, far, region, memory, lease):
        assert (lease.peer, lease.backends, lease.region, lease.active) == ("far", (route,), region, True)
        assert near.leases == [lease]
        assert (await far.order("transfer", put=True, peer="near", region="kv"))["route"] == route
        await asyncio.to_thread(assert_same, memory, pattern(SIZE, 1))
        await lease.revoke()
        assert lease.is_quiet
        assert (lease.expired, lease.remaining, near.leases) == (False, 0.0, [])
        canary = Canary(memory)
        answer = await far.order("transfer", put=True, peer="near", region="kv")
        # Where this side refuses the key, it need not wait until the peer has heard of it.
        assert answer["error"] in ("NotFoundError", "AccessError")
        await canary.watch()
        await lease.revoke()


async def test_memory_that_is_not_offered_is_told_to_nobody() -> None:
    async with two_agents() as (a, b, peer):
        hidden = await b.register(bytearray(100), name="hidden", offered=False)
        await b.register(bytearray(100), name="shown")
        with pytest.raises(ConfigurationError, match="hidden"):
            b.metadata([hidden])
        assert b"hidden" not in b.metadata()
        async with Agent("c", token=TOKEN) as c:
            assert set((await connect(c, b)).regions) == {"shown"}
        assert "hidden" not in peer.regions
        await hidden.aclose()
        assert a.leases == []


async def test_what_is_lent_to_one_peer_is_not_lent_to_another() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer), Agent("c", token=TOKEN, backends=["tcp"]) as c:
        memory = np.zeros(4096, np.uint8)
        region = await b.register(memory, name="kv", offered=False)
        seen_by_c = await connect(c, b)
        async with await region.lease("a", 5.0):
            mine = peer.region("kv")
            assert "kv" not in seen_by_c.regions
            stolen = RemoteRegion("b", b.incarnation, "kv", mine.address, mine.nbytes, keys=dict(mine.keys))
            canary = Canary(memory)
            with pytest.raises(AccessError, match="no such region for us"):
                await c.transfer(await c.register(pattern(4096, 1)), stolen)
            canary.check()
            await a.transfer(await a.register(pattern(4096, 2)), mine)
            assert_same(memory, pattern(4096, 2))


async def test_a_life_that_follows_cannot_use_the_key_of_the_one_before() -> None:
    async with Agent("b", token=TOKEN, backends=["tcp"]) as b:
        memory = np.zeros(4096, np.uint8)
        region = await b.register(memory, name="kv", offered=False)
        async with Agent("a", token=TOKEN, backends=["tcp"]) as a:
            peer = await connect(a, b)
            lease = await region.lease("a", 5.0)
            old = peer.region("kv")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await lease.quiet()
        assert "left" in lease.ended or "gave it back" in lease.ended
        async with Agent("a", token=TOKEN, backends=["tcp"]) as a:
            await connect(a, b)
            again = RemoteRegion("b", b.incarnation, "kv", old.address, old.nbytes, keys=dict(old.keys))
            canary = Canary(memory)
            with pytest.raises(AccessError):
                await a.transfer(await a.register(pattern(4096, 1)), again)
            canary.check()


async def test_memory_lent_to_be_read_is_not_written() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        region = await b.register(pattern(4096, 1), name="kv", offered=False)
        async with await region.lease("a", 5.0, writable=False) as lease:
            far, got = peer.region("kv"), np.zeros(4096, np.uint8)
            here = await a.register(got)
            await a.transfer(far, here)
            assert_same(got, pattern(4096, 1))
            assert not lease.writable
            far.readonly = False
            with pytest.raises(AccessError, match="read-only"):
                await a.transfer(here, far)


async def test_by_which_backends() -> None:
    async with two_agents(backends=["samehost", "tcp", "ucx"]) as (a, b, peer):
        region = await b.register(bytearray(4096), name="kv", offered=False)
        # The first that reaches it, and the one that can refuse it.
        async with await region.lease("a", 5.0) as lease:
            assert lease.backends == ("samehost", "tcp")
        async with await region.lease(b.peers["a"], 5.0, backends=["tcp"]) as lease:
            here = await a.register(pattern(4096, 1))
            assert (await a.transfer(here, peer.region("kv"))).route == "tcp"
            assert "not leased to us" in a.explain(here, peer.region("kv")).refusals["samehost"]
            with pytest.raises(NoRoute, match="not leased to us"):
                await a.transfer(here, peer.region("kv"), backend="ucx")
        with pytest.raises(NoRoute, match="by s3; by samehost, tcp, ucx it can"):
            await region.lease("a", 5.0, backends=["s3"])
        with pytest.raises(ConfigurationError, match="list of names"):
            await region.lease("a", 5.0, backends="tcp")


@pytest.mark.parametrize("seconds", [0, 0.05, -1, float("nan"), float("inf"), True, "1"])
async def test_seconds_that_are_none(seconds: object) -> None:
    async with two_agents(backends=["tcp"]) as (_, b, _):
        region = await b.register(bytearray(100), offered=False)
        with pytest.raises(ConfigurationError, match="seconds"):
            await region.lease("a", seconds)  # type: ignore[arg-type]


async def test_leases_that_are_refused() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        with pytest.raises(ConfigurationError, match="offered=False"):
            await (await b.register(bytearray(100), name="shown")).lease("a", 1.0)
        region = await b.register(bytearray(100), name="kv", offered=False)
        with pytest.raises(PeerLost, match="nobody"):
            await region.lease("nobody", 1.0)
        async with await region.lease("a", 1.0):
            with pytest.raises(ConfigurationError, match="already"):
                await region.lease("a", 1.0)
        await a.disconnect(peer)
        with pytest.raises(PeerLost):
            await region.lease("a", 1.0)
        await region.aclose()
        with pytest.raises(ClosedError, match="deregistered"):
            await region.lease("a", 1.0)


# Renewal and expiry.


@pytest.mark.parametrize("route", ["samehost", "tcp"])
async def test_it_lives_for_as_long_as_its_peer_does(route: str) -> None:
    async with lent(route, seconds=0.3) as (_, far, _, _, lease):
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            assert "error" not in await far.order("transfer", put=True, peer="near", region="kv")
            assert 0 < lease.remaining <= 0.3
            await asyncio.sleep(0.05)
        assert lease.active


@pytest.mark.parametrize("route", ROUTES)
async def test_a_peer_that_is_stuck_in_python_loses_it_and_says_so_later(route: str) -> None:
    async with lent(route, seconds=0.3) as (_, far, region, memory, lease):
        await far.send("spin", seconds=1.5)
        assert await far.answer() == {"spinning": True}
        await ended(lease)
        assert lease.expired
        assert "did not renew it" in lease.ended
        async with asyncio.timeout(PATIENCE_SECONDS):
            await lease.quiet()
        # Where this side refuses the key it need not wait for the peer.
        canary = Canary(memory)
        assert await far.answer() == {"spun": True}
        assert (await far.order("transfer", put=True, peer="near", region="kv"))["error"] == "NotFoundError"
        await canary.watch()
        assert not region.quarantined


@every_loop
async def test_an_owner_may_be_held_up_for_half_of_it() -> None:
    async with lent("tcp", seconds=1.5) as (_, far, _, _, lease):
        for _ in range(3):
            time.sleep(0.75)  # noqa: ASYNC251 - it is what the test is about
            await asyncio.sleep(0.5)
            assert lease.active
        assert (await far.order("held", peer="near"))["held"] == ["kv"]


async def test_one_frame_renews_all_leases_of_a_peer() -> None:
    async with two_agents(backends=["tcp"]) as (_, b, peer):
        regions = [await b.register(bytearray(4096), offered=False) for _ in range(200)]
        leases = await asyncio.gather(*(region.lease("a", 0.6) for region in regions))
        assert peer.link is not None
        sent, send = [], peer.link.send

        def watched(frame: bytes) -> None:
            sent.append(frame)
            send(frame)

        peer.link.send = watched  # type: ignore[method-assign]
        await asyncio.sleep(2.0)
        assert all(lease.active for lease in leases)
        assert 5 <= len(sent) <= 20
        assert {frame[4] for frame in sent} == {22}
        await asyncio.gather(*(lease.revoke() for lease in leases))
        assert (b.leases, dict(peer.regions)) == ([], {})


# Quiet.


@pytest.mark.parametrize("route", ROUTES)
async def test_after_it_was_revoked_no_byte_moves(route: str) -> None:
    async with lent(route) as (_, far, region, memory, lease):
        for _ in range(5):
            await far.order("flood", peer="near", region="kv")
            await moving(memory)
            await lease.revoke()
            await Canary(memory).watch()
            answer = await far.order("flooded")
            assert answer["error"] in ("LeaseEnded", "AccessError")
            lease = await region.lease("far", 0.5)
        await lease.revoke()


@pytest.mark.parametrize("route", ALONE)
async def test_a_stopped_peer_is_not_quiet_until_it_goes_on(route: str) -> None:
    async with lent(route, drain_seconds=0.3) as (_, far, region, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        far.stop()
        try:
            with pytest.raises(Quarantined, match=f"'kv'.*'far'.*{route}.*has not said that it stopped"):
                await lease.revoke()
            assert (lease.active, lease.is_quiet, region.quarantined) == (False, False, True)
            with pytest.raises(ClosedError, match="quarantined: 'far'"):
                region.check_usable()
            with pytest.raises(Quarantined):
                await region.aclose()
        finally:
            far.resume()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await lease.quiet()
        await Canary(memory).watch()
        assert (lease.is_quiet, region.quarantined) == (True, False)
        assert (await far.order("flooded"))["error"] == "LeaseEnded"
        await lease.revoke()
        await region.aclose()


async def test_a_stopped_peer_is_cut_off_where_this_side_can() -> None:
    async with lent("tcp") as (_, far, region, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        far.stop()
        try:
            async with asyncio.timeout(PROMPT_SECONDS):
                await lease.revoke()
            canary = Canary(memory)
        finally:
            far.resume()
        assert (await far.order("flooded"))["error"] in ("LeaseEnded", "AccessError", "PeerLost")
        await canary.watch()
        assert not region.quarantined


@pytest.mark.parametrize("route", ["samehost", "tcp"])
async def test_a_killed_peer_is_quiet_at_once(route: str) -> None:
    async with lent(route) as (_, far, _, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        far.kill()
        async with asyncio.timeout(PROMPT_SECONDS):
            await lease.quiet()
        await Canary(memory).watch()
        assert not lease.active


async def test_a_killed_peer_that_used_ucx_is_not_known_to_be_quiet() -> None:
    async with lent("ucx", drain_seconds=0.2) as (near, far, region, _, lease):
        far.kill()
        await ended(lease)
        with pytest.raises(Quarantined, match="ucx"):
            await lease.revoke()
        assert region.quarantined
        with pytest.raises(ConfigurationError, match="reason"):
            lease.fenced("")
        lease.fenced("the test has waited for the process")
        await lease.quiet()
        assert not region.quarantined
        assert near.leases == []


async def test_a_stopped_peer_that_is_killed_is_quiet() -> None:
    async with lent("samehost", drain_seconds=0.1) as (_, far, region, _, lease):
        far.stop()
        with pytest.raises(Quarantined, match="it may be alive"):
            await lease.revoke()
        far.kill()
        async with asyncio.timeout(PROMPT_SECONDS):
            await lease.quiet()
        assert not region.quarantined


async def test_a_peer_that_was_given_up_comes_back_and_says_that_it_is_quiet() -> None:
    liveness = Liveness(suspect_seconds=0.2, lost_seconds=0.3, stopped_seconds=0.5)
    async with lent("samehost", seconds=5.0, drain_seconds=0.2, liveness=liveness) as (near, far, region, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        far.stop()
        try:
            await ended(lease)
            assert "lost" in lease.ended
            with pytest.raises(Quarantined):
                await lease.revoke()
        finally:
            far.resume()
        assert (await far.order("flooded"))["error"] in ("PeerLost", "LeaseEnded")
        assert region.quarantined
        assert near.address is not None
        await far.order("connect", host=near.address[0], port=near.address[1])
        async with asyncio.timeout(PATIENCE_SECONDS):
            await lease.quiet()
        await Canary(memory).watch()
        async with await region.lease("far", 1.0):
            assert (await far.order("transfer", put=True, peer="near", region="kv"))["route"] == "samehost"


@pytest.mark.parametrize("route", ROUTES)
async def test_a_peer_that_leaves_gives_it_back(route: str) -> None:
    async with lent(route, seconds=5.0) as (_, far, _, _, lease):
        await far.send("leave")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await lease.quiet()
        assert "left" in lease.ended or "gave it back" in lease.ended
        await far.process.wait()


# Calls that end early, and closing.


async def test_a_revocation_goes_on_when_its_caller_is_cancelled() -> None:
    async with lent("samehost") as (_, far, _, memory, lease):
        far.stop()
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await lease.revoke()
            assert not lease.active
        finally:
            far.resume()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await lease.quiet()
        await Canary(memory).watch()


async def test_a_grant_that_is_cancelled_is_taken_back() -> None:
    async with lent("samehost") as (near, far, region, memory, lease):
        await lease.revoke()
        far.stop()
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await region.lease("far", 0.5)
            (left,) = near.leases
            assert "was not taken" in left.ended
        finally:
            far.resume()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await left.quiet()
        assert (await far.order("held", peer="near"))["held"] == []
        await Canary(memory).watch()


async def test_closing_a_region_ends_its_leases() -> None:
    async with lent("samehost") as (near, far, region, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        await region.aclose()
        assert lease.is_quiet
        await Canary(memory).watch()
        assert "deregistered" in lease.ended
        assert (await far.order("flooded"))["error"] == "LeaseEnded"
        assert near.statistics().regions == 0


async def test_parting_from_a_peer_ends_its_leases() -> None:
    async with lent("samehost") as (near, far, _, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        await near.disconnect("far")
        assert lease.is_quiet
        await Canary(memory).watch()
        assert (await far.order("flooded"))["error"] in ("LeaseEnded", "PeerLost")


async def test_closing_the_agent_ends_its_leases() -> None:
    async with lent("samehost", "tcp") as (near, far, _, memory, lease):
        await far.order("flood", peer="near", region="kv")
        await moving(memory)
        await near.aclose()
        assert lease.is_quiet
        await Canary(memory).watch()
        assert (await far.order("flooded"))["error"] in ("LeaseEnded", "PeerLost", "AccessError")


async def test_an_agent_that_closes_keeps_memory_that_is_not_quiet() -> None:
    async with lent("samehost", drain_seconds=0.1) as (near, far, region, _, lease):
        far.stop()
        try:
            await near.aclose()
            assert region.quarantined
            assert region.owner is not None
            with pytest.raises(ClosedError, match="do not reuse"):
                await lease.quiet()
            with pytest.raises(Quarantined):
                await lease.revoke()
        finally:
            far.resume()


async def test_a_lease_as_a_block() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        region = await b.register(bytearray(4096), name="kv", offered=False)
        async with await region.lease("a", 1.0) as lease:
            far: RemoteRegion = peer.region("kv")
            assert "left" in repr(lease)
        with pytest.raises(LeaseEnded, match="'kv' of peer 'b'"):
            await a.transfer(await a.register(bytearray(4096)), far)
        assert "revoked" in repr(lease)

"""What is known of peers' regions as they come, go, and are given their names again: real agents over real sockets."""

from __future__ import annotations

import asyncio

import numpy as np

from tests.agents import known, two_agents


async def test_a_name_that_is_taken_again_at_once_is_another_region() -> None:
    async with two_agents(backends=["memory"]) as (a, b, peer):
        old = await b.register(np.zeros(4096, np.uint8), name="kv")
        await known(a, peer, "kv")
        remote = peer.region("kv")
        # As a transfer that is under way does.
        remote.hold()
        closing = asyncio.ensure_future(old.aclose())
        while not old.closed or "kv" in b._membership.regions:
            await asyncio.sleep(0)
        new = await b.register(np.zeros(4096, np.uint8), name="kv")
        events = a.membership()
        async with asyncio.timeout(10):
            while peer.regions.get("kv") in (None, remote):
                await anext(events)
        assert peer.region("kv").address == new.address
        assert remote.withdrawn
        await asyncio.wait([closing], timeout=0.05)
        assert not closing.done()
        remote.release()
        async with asyncio.timeout(10):
            await closing
        assert peer.region("kv").address == new.address


async def test_a_name_that_is_given_away_again_at_once_means_the_new_region() -> None:
    async with two_agents(backends=["memory"]) as (a, b, peer):
        first = await b.register(np.zeros(8, np.uint8), name="kv")
        await known(a, peer, "kv")
        closing = asyncio.create_task(first.aclose())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second = await b.register(np.zeros(16, np.uint8), name="kv")
        await closing
        await b.notify("a", b"after")
        await anext(a.notifications())
        assert (peer.region("kv").address, peer.region("kv").nbytes) == (second.address, 16)


async def test_old_metadata_brings_nothing_back_that_was_withdrawn() -> None:
    async with two_agents(backends=["memory"]) as (a, b, peer):
        kept = await b.register(np.zeros(8, np.uint8), name="kept")
        gone = await b.register(np.zeros(8, np.uint8), name="gone")
        await known(a, peer, "gone")
        old = b.metadata()
        await gone.aclose()
        assert set(peer.regions) == {"kept"}
        for blob in (old, b.metadata([kept, gone])):
            assert await a.add_peer(blob) is peer
            assert set(peer.regions) == {"kept"}
        # What is new in it is there at once, though its own message has not been read yet.
        await b.register(np.zeros(8, np.uint8), name="fresh")
        await a.add_peer(b.metadata())
        assert set(peer.regions) == {"kept", "fresh"}
        fresh = peer.region("fresh")
        await a.wait_peer("b")
        await b.notify("a", b"after")
        await anext(a.notifications())
        assert peer.region("fresh") is fresh

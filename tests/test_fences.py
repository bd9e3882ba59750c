"""Fences between real agents: confirmed, refused, too late, or never."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from nixl_async import Agent, PeerLost, TransferError, fences
from tests.agents import TOKEN, agent_process, two_agents


async def test_a_fence_is_confirmed_or_says_why_not() -> None:
    async with two_agents(backends=["tcp", "samehost"]) as (a, b, _):
        members = a._membership
        await members.fence("tcp", "b", b"123456")
        with pytest.raises(TransferError, match=r"does not confirm that it is quiet: .* names no connection: b'x'"):
            await members.fence("tcp", "b", b"x")
        with pytest.raises(TransferError, match="'samehost' cannot fence off"):
            await members.fence("samehost", "b", b"1")
        with pytest.raises(TransferError, match="no backend 'ucx'"):
            await members.fence("ucx", "b", b"1")
        with pytest.raises(PeerLost, match="no peer is called 'z'"):
            await members.fence("tcp", "z", b"1")
        # The other side's transfers go on meanwhile.
        assert set(b.peers) == {"a"}


async def test_a_fence_ends_with_the_peer() -> None:
    async with agent_process("far", backends=["tcp"]) as far, Agent("near", token=TOKEN, backends=["tcp"]) as near:
        await near.connect(far.address)
        far.stop()
        asking = asyncio.create_task(near._membership.fence("tcp", "far", b"1"))
        await asyncio.sleep(0)
        far.kill()
        with pytest.raises(PeerLost):
            async with asyncio.timeout(10):
                await asking


async def test_a_peer_that_is_silent_confirms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fences, "FENCE_SECONDS", 0.05)
    async with agent_process("far", backends=["tcp"]) as far, Agent("near", token=TOKEN, backends=["tcp"]) as near:
        await near.connect(far.address)
        far.stop()
        try:
            with pytest.raises(TransferError, match="did not confirm within 0.05 s") as raised:
                await near._membership.fence("tcp", "far", b"1")
            assert not isinstance(raised.value, PeerLost)
        finally:
            far.resume()


async def test_a_fence_while_parting_is_answered() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        parting = asyncio.create_task(a.disconnect("b"))
        await asyncio.sleep(0)
        # The link is there until both are quiet; after that nothing is.
        with contextlib.suppress(PeerLost):
            await a._membership.fence("tcp", "b", b"1")
        await parting
        assert not peer.connected
        events = b.membership()
        while b.peers:
            await anext(events)

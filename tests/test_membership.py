"""Who comes and who goes: real agents over real sockets."""

from __future__ import annotations

import pytest

from nixl_async import Agent, ConfigurationError, PeerLost
from tests.agents import TOKEN, connect, two_agents


async def test_agents_of_one_name_refuse_each_other() -> None:
    async with Agent("same", token=TOKEN) as a, Agent("same", token=TOKEN) as b:
        with pytest.raises((ConfigurationError, PeerLost, PermissionError), match="same"):
            await a.connect(await b.serve())


async def test_an_agent_is_served_once() -> None:
    async with Agent("a", token=TOKEN) as a:
        await a.serve()
        with pytest.raises(ConfigurationError, match="served at"):
            await a.serve()


async def test_an_address_that_is_taken_is_refused() -> None:
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        host, port = await a.serve()
        with pytest.raises(ConfigurationError, match=str(port)):
            await b.serve(host, port)


async def test_disconnecting_is_told_to_both_and_can_be_undone() -> None:
    async with two_agents() as (a, b, peer):
        left = b.membership()
        await a.disconnect(peer)
        assert not peer.connected
        assert (await anext(left)).kind == "left"
        with pytest.raises(PeerLost):
            await a.disconnect(peer)
        again = await connect(a, b)
        assert again is not peer
        assert again.connected


async def test_a_blob_of_another_life_is_refused() -> None:
    async with Agent("a", token=TOKEN) as a:
        async with Agent("b", token=TOKEN) as b:
            host, port = await b.serve()
            old = b.metadata()
        async with Agent("b", token=TOKEN) as b:
            await b.serve(host, port)
            with pytest.raises(PeerLost, match="fetch the metadata again"):
                await a.add_peer(old)
            assert (await a.add_peer(b.metadata())).incarnation == b.incarnation


async def test_ones_own_metadata_is_refused() -> None:
    async with Agent("a", token=TOKEN) as a:
        await a.serve()
        with pytest.raises(ConfigurationError, match="own"):
            await a.add_peer(a.metadata())

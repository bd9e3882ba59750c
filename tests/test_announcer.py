"""What peers are told of an agent's regions, and when: real agents over real sockets."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nixl_async import Agent, DescriptorError
from nixl_async.peers import decode_announcement
from tests.agents import TOKEN, known


async def test_what_is_registered_while_a_peer_joins_is_not_lost() -> None:
    for _ in range(20):
        async with Agent("a", token=TOKEN, backends=["memory"]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
            address = await b.serve()
            joining = asyncio.create_task(a.connect(address))
            names = []
            while not joining.done():
                names.append((await b.register(np.zeros(8, np.uint8))).name)
                await asyncio.sleep(0)
            for name in names:
                await known(a, joining.result(), name)


async def test_very_many_regions_are_told_in_pieces_that_hold_nobody_up() -> None:
    count, memory = 5000, np.zeros((5002, 8), np.uint8)
    async with Agent("a", token=TOKEN, backends=["memory"]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
        regions = [await b.register(memory[number], name=f"r{number}") for number in range(count)]
        joining = asyncio.create_task(a.connect(await b.serve()))
        while not any(link.told for link in b._membership._links):
            await asyncio.sleep(0)
        # What happens before all is told comes in its place.
        withdrawing = asyncio.create_task(regions[-1].aclose())
        await b.register(memory[count], name="late")
        assert not joining.done()
        noting = asyncio.create_task(b.notify("a", b"early")) if "a" in b.peers else None
        peer = await joining
        await withdrawing
        await known(a, peer, "late")
        assert len(peer.regions) == count
        assert "r4999" not in peer.regions
        if noting is not None:
            await noting
            assert (await anext(a.notifications())).payload == b"early"
        assert peer.at(regions[3000].address, 8).region is peer.region("r3000")
        await regions[3000].aclose()
        await b.register(memory[count + 1], name="last")
        await known(a, peer, "last")
        assert peer.at(memory[count + 1].ctypes.data, 8).region is peer.region("last")
        with pytest.raises(DescriptorError):
            peer.at(memory[3000].ctypes.data, 8)
        blob = b.metadata()
        assert {region.name for region in decode_announcement(blob).regions} == set(peer.regions)
        async with Agent("c", token=TOKEN, backends=["memory"]) as c:
            assert len((await c.add_peer(blob)).regions) == count
            # It has as many to tell as it is told.
            for number in range(count):
                await c.register(memory[number])
            await c.disconnect("b")
            assert len((await c.connect(b.address)).regions) == count
            async with asyncio.timeout(10):
                assert len((await b.wait_peer("c")).regions) == count


async def test_what_is_advertised_is_what_the_metadata_says() -> None:
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        _, port = await b.serve("0.0.0.0", advertise="localhost")
        assert b.address == ("localhost", port)
        assert (await a.add_peer(b.metadata())).name == "b"

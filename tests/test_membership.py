"""Who comes, who goes, who dials whom: real agents over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import numpy as np
import pytest

from nixl_async import (
    Agent,
    BackendError,
    ClosedError,
    ConfigurationError,
    DescriptorError,
    PeerLost,
    TransferError,
    membership,
)
from nixl_async.backends.memory import MemoryBackend
from nixl_async.memory import RemoteRegion
from nixl_async.peers import decode_announcement
from tests.agents import TOKEN, agent_process, connect, known, two_agents


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


async def test_both_dial_at_once_and_keep_one_connection() -> None:
    for _ in range(10):
        async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
            at_a, at_b = await a.serve(), await b.serve()
            seen_by_a, seen_by_b = await asyncio.gather(a.connect(at_b), b.connect(at_a))
            assert (seen_by_a.name, seen_by_b.name) == ("b", "a")
            await a.notify("b", b"one")
            await b.notify("a", b"two")
            async with asyncio.timeout(10):
                assert (await anext(b.notifications())).payload == b"one"
                assert (await anext(a.notifications())).payload == b"two"
            assert (a.statistics().peers, b.statistics().peers) == (1, 1)


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


async def test_connecting_twice_gives_the_same_peer() -> None:
    async with two_agents() as (a, b, peer):
        assert b.address is not None
        assert await a.connect(b.address) is peer
        assert await a.connect(f"{b.address[0]}:{b.address[1]}") is peer
        assert await a.peer("b") is peer


async def test_names_and_addresses_of_both_families() -> None:
    hosts = ["localhost", "127.0.0.1", *(["::1"] if _has_ipv6() else [])]
    for host in hosts:
        async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
            _, port = await b.serve(host)
            text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            assert (await a.connect(text)).name == "b"


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


async def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    async with Agent("a", token=TOKEN) as a:
        with pytest.raises(PeerLost, match=str(port)):
            await a.connect(("127.0.0.1", port))
        with pytest.raises(PeerLost):
            await a.connect("name-that-does-not-exist.invalid:7000")


async def test_what_is_advertised_is_what_the_metadata_says() -> None:
    async with Agent("a", token=TOKEN) as a, Agent("b", token=TOKEN) as b:
        _, port = await b.serve("0.0.0.0", advertise="localhost")
        assert b.address == ("localhost", port)
        assert (await a.add_peer(b.metadata())).name == "b"


async def test_waiting_for_a_peer() -> None:
    async with Agent("a", token=TOKEN) as a:
        waits = [asyncio.create_task(a.wait_peer("b")) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        async with Agent("b", token=TOKEN) as b:
            await b.connect(await a.serve())
            assert (await waits[1]) is (await waits[2]) is a.peers["b"]
    with pytest.raises(ClosedError):
        await a.wait_peer("c")


async def test_who_waits_for_a_peer_hears_that_the_agent_closed() -> None:
    async with Agent("a", token=TOKEN) as a:
        wait = asyncio.create_task(a.wait_peer("b"))
        await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        await wait


async def test_events_tell_the_whole_story() -> None:
    async with Agent("a", token=TOKEN) as a:
        events = a.membership()
        async with Agent("b", token=TOKEN) as b:
            await connect(a, b)
            async with await b.register(np.zeros(8, np.uint8), name="kv"):
                await known(a, a.peers["b"], "kv")
        told = [await anext(events) for _ in range(4)]
        assert [(event.kind, event.peer) for event in told] == [
            ("joined", "b"),
            ("regions", "b"),
            ("regions", "b"),
            ("left", "b"),
        ]
        assert "left" in told[-1].reason
    with pytest.raises(StopAsyncIteration):
        await anext(events)


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


class Keeping(MemoryBackend):
    """Notes what it is told to forget, and whether an op still used it."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten: list[tuple[str, int]] = []

    async def forget(self, region: RemoteRegion) -> None:
        await asyncio.sleep(0)
        self.forgotten.append((region.name, region._holders))
        if region.name == "second":
            raise BackendError("it cannot be closed", backend=self.name)


async def test_backends_let_go_of_a_region_before_its_owner_does() -> None:
    keeping = Keeping()
    async with Agent("a", token=TOKEN, backends=[keeping]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
        first = await b.register(np.zeros(8, np.uint8), name="first")
        second = await b.register(np.zeros(8, np.uint8), name="second")
        peer = await connect(a, b)
        gate = asyncio.get_running_loop().create_future()
        waits = a.submit(peer.region("first"), await a.register(np.zeros(8, np.uint8)), after=gate)
        closing = asyncio.create_task(first.aclose())
        await anext(a.membership())
        assert keeping.forgotten == []
        gate.set_result(None)
        await closing
        assert waits.done()
        assert keeping.forgotten == [("first", 0)]
        # One that fails keeps nobody waiting.
        await second.aclose()
        assert keeping.forgotten == [("first", 0), ("second", 0)]


async def test_who_comes_by_one_name_comes_one_at_a_time() -> None:
    async with Agent("a", token=TOKEN, backends=["memory"]) as a:
        members, at_once = a._membership, [0]

        async def come(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            async with members._alone("b"):
                at_once[0] += 1
                for _ in range(3):
                    assert at_once == [1]
                    await asyncio.sleep(0)
                at_once[0] -= 1

        tasks = [asyncio.create_task(come(turns)) for turns in range(12)]
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.exception() for task in tasks if not task.cancelled()] == [None] * 11
        assert members._joining == {}


# Fences.


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
    monkeypatch.setattr(membership, "FENCE_SECONDS", 0.05)
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

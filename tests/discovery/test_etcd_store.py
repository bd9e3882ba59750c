"""Discovery through an etcd that is killed, away for longer than the leases, and started again, with what it knew and without."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from nixl_async import Agent, ConfigurationError, MembershipEvent
from nixl_async.discovery.etcd_client import Etcd
from nixl_async.discovery.etcd_store import MAX_METADATA_NBYTES, EtcdStore
from nixl_async.discovery.store import StoreURL
from nixl_async.peers import MembershipEvents, decode_announcement
from tests.agents import TOKEN, agent_process
from tests.compat.etcd_server import INSTALL, EtcdServer, program
from tests.discovery.conftest import etcd_url
from tests.discovery.events import until

PATIENCE_SECONDS = 40.0
LEASE_SECONDS = 2


def agent(name: str, url: str) -> Agent:
    return Agent(name, token=TOKEN, backends=["memory"], discovery=url)


@contextlib.asynccontextmanager
async def mortal_etcd(directory: Path) -> AsyncIterator[EtcdServer]:
    if program() is None:
        pytest.skip(f"etcd is not installed: {INSTALL}")
    server = EtcdServer(directory / "first")
    await asyncio.to_thread(server.start)
    try:
        yield server
    finally:
        await asyncio.to_thread(server.stop)


def told(events: MembershipEvents) -> list[MembershipEvent]:
    """Return what was told and not yet asked for."""
    return [events._queue.get_nowait() for _ in range(events._queue.qsize())]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("forgets", [False, True], ids=["it-remembers", "it-forgets"])
async def test_an_outage_longer_than_the_leases_drops_nobody(tmp_path: Path, forgets: bool) -> None:
    async with mortal_etcd(tmp_path) as server, asyncio.timeout(PATIENCE_SECONDS):
        url = f"{etcd_url(server)}/outage?ttl={LEASE_SECONDS}"
        async with agent("a", url) as a, agent("b", url) as b:
            for one in (a, b):
                await one.serve()
            theirs = await b.register(np.arange(4096, dtype=np.uint8), name="kv")
            mine = await a.register(np.zeros(4096, np.uint8))
            peer = await a.peer("b")
            await b.wait_peer("a")
            events = a.membership()
            await asyncio.to_thread(server.stop)
            end = asyncio.get_running_loop().time() + 2.5 * LEASE_SECONDS
            while asyncio.get_running_loop().time() < end:
                await a.transfer(peer.region("kv"), mine)
                await asyncio.sleep(0.1)
            # What it said last holds: who was parted from is found again while it is away.
            await a.disconnect("b")
            peer = await a.peer("b")
            async with agent("c", url) as c:
                await c.serve()
                assert c.discovered == {}
                waiting = asyncio.create_task(c.peer("b"))
                if forgets:
                    server._directory = tmp_path / "second"
                await asyncio.to_thread(server.start)
                await waiting
                await until(events, "discovered", "c")
                while c.discovered.keys() != {"a", "b"}:
                    await asyncio.sleep(0.05)
                # A while later everything is where it was, and who is connected stayed so.
                await asyncio.sleep(LEASE_SECONDS * 1.5)
                entries, _ = await Etcd(server.url).entries(b"/outage.entries/")
                assert sorted(entries) == [b"/outage.entries/a", b"/outage.entries/b", b"/outage.entries/c"]
                assert a.peers["b"] is peer
                await a.transfer(peer.region("kv"), mine)
            assert not [one for one in told(events) if one.kind in ("lost", "withdrawn") and one.peer == "b"]
            await theirs.aclose()


@pytest.mark.slow
async def test_who_dies_while_etcd_is_away_is_withdrawn(tmp_path: Path) -> None:
    async with mortal_etcd(tmp_path) as server, asyncio.timeout(PATIENCE_SECONDS):
        url = f"{etcd_url(server)}?ttl={LEASE_SECONDS}"
        async with agent("a", url) as a:
            events = a.membership()
            async with agent_process("b", discovery=url, backends=["tcp"]) as process:
                await until(events, "discovered", "b")
                await asyncio.to_thread(server.stop)
                process.kill()
            server._directory = tmp_path / "second"
            await asyncio.to_thread(server.start)
            await until(events, "withdrawn", "b")


async def test_who_was_stopped_for_longer_than_its_lease_is_published_again(etcd: EtcdServer) -> None:
    url = f"{etcd_url(etcd)}/stopped?ttl={LEASE_SECONDS}"
    async with agent("a", url) as a, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        async with agent_process("b", discovery=url, backends=["tcp"]) as process:
            await until(events, "discovered", "b")
            incarnation = a.discovered["b"].incarnation
            process.stop()
            await until(events, "withdrawn", "b")
            process.resume()
            await until(events, "discovered", "b")
            assert a.discovered["b"].incarnation == incarnation
            assert (await a.peer("b")).incarnation == incarnation


async def test_an_entry_that_is_deleted_is_put_again(etcd: EtcdServer) -> None:
    url = f"{etcd_url(etcd)}/deleted"
    async with agent("a", url) as a, agent("b", url) as b, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        await b.serve()
        await until(events, "discovered", "b")
        await Etcd(etcd.url).delete_prefix(b"/deleted")
        await until(events, "withdrawn", "b")
        await until(events, "discovered", "b")


async def test_the_metadata_follows_the_regions(etcd: EtcdServer) -> None:
    key = b"/regions/a/metadata"
    client = Etcd(etcd.url)
    async with asyncio.timeout(PATIENCE_SECONDS):
        _, revision = await client.get(key)
        async with agent("a", f"{etcd_url(etcd)}/regions") as a:
            await a.serve()
            async with contextlib.aclosing(client.watch(key, revision + 1)) as events:
                await anext(events)
                assert (await client.get(b"/regions/a/"))[0] == b""
                regions = [await a.register(np.zeros(64, np.uint8), name=f"r{i}") for i in range(20)]
                writes = 0
                async for event in events:
                    writes += 1
                    found = decode_announcement(event.value or b"")
                    if len(found.regions) == 20:
                        break
                # Not one for each.
                assert writes < 10
                assert found.control == a.address
                await regions[3].aclose()
                found = decode_announcement((await anext(events)).value or b"")
                assert "r3" not in {region.name for region in found.regions}
        assert (await client.entries(b"/regions"))[0] == {}


async def test_metadata_too_large_for_etcd_is_not_written(etcd: EtcdServer) -> None:
    store = EtcdStore(StoreURL.parse(f"{etcd_url(etcd)}/large"))
    with pytest.raises(ConfigurationError, match="at most"):
        await store.put_metadata("a", bytes(MAX_METADATA_NBYTES + 1))
    await store.put_metadata("a", bytes(MAX_METADATA_NBYTES))
    await store.aclose()


async def test_an_etcd_that_was_never_there_keeps_nobody_from_opening(caplog: pytest.LogCaptureFixture) -> None:
    async with agent("a", "etcd://me:secret@127.0.0.1:1") as a, asyncio.timeout(PATIENCE_SECONDS):
        peer = await a.serve()
        assert peer == a.address
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await a.peer("b")
    assert "cannot be watched" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]
    assert "cannot be watched" in caplog.text
    assert "secret" not in caplog.text

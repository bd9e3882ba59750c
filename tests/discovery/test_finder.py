"""Agents that find each other by name, through every kind of store."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import numpy as np
import pytest

from nixl_async import Agent, AuthenticationError, ClosedError, ConfigurationError, Discovered, Peer, PeerLost
from nixl_async.discovery import open_store
from nixl_async.membership import Membership
from tests.agents import TOKEN, agent_process
from tests.discovery.events import until

PATIENCE_SECONDS = 20.0


def agent(name: str, url: str | None, token: str = TOKEN) -> Agent:
    return Agent(name, token=token, backends=["memory"], discovery=url)


async def test_a_peer_is_found_by_its_name_and_withdrawn_when_it_closes(url: str) -> None:
    async with agent("a", url) as a, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        async with agent("b", url) as b:
            region = await b.register(np.arange(64, dtype=np.uint8), name="kv")
            waiting = asyncio.create_task(a.peer("b"))
            await b.serve()
            peer = await waiting
            assert peer.region("kv").nbytes == region.nbytes
            assert a.peers == {"b": peer}
            await until(events, "discovered", "b")
            assert a.discovered["b"] == Discovered("b", b.incarnation, b.address or ("", 0))
            assert "a" not in b.discovered
            mine = await a.register(np.zeros(64, np.uint8))
            await a.transfer(peer.region("kv"), mine)
        await until(events, "withdrawn", "b")
        assert a.discovered == {}


async def test_who_drains_is_found_by_nobody_new_and_stays_with_those_who_are_connected(url: str) -> None:
    async with agent("a", url) as a, agent("b", url) as b, agent("c", url) as c, asyncio.timeout(PATIENCE_SECONDS):
        events, events_of_c = a.membership(), c.membership()
        region = await b.register(np.arange(64, dtype=np.uint8), name="kv")
        host, port = await b.serve()
        peer = await a.peer("b")
        await until(events_of_c, "discovered", "b")
        await b.drain()
        await b.drain()
        assert "draining" in repr(b)
        await until(events, "withdrawn", "b")
        await until(events_of_c, "withdrawn", "b")
        async with agent("d", url) as d:
            assert "b" not in d.discovered
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await d.peer("b")
        with pytest.raises(PeerLost, match="cannot connect"):
            await c.connect(f"{host}:{port}")
        with pytest.raises(ClosedError, match="drains"):
            await b.serve()
        # Those who are connected go on, both ways; and it finds others still.
        got = np.zeros(64, np.uint8)
        mine = await a.register(got, name="mine")
        await a.transfer(peer.region("kv"), mine, notify=b"read")
        assert (await anext(b.notifications())).payload == b"read"
        assert got.tolist() == list(range(64))
        await b.transfer(region[:8], b.peers["a"].region("mine")[56:])
        await c.serve()
        assert (await b.peer("c")).name == "c"


async def test_who_drains_while_its_store_is_away_is_withdrawn_by_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nixl_async.discovery.roster.CLOSE_SECONDS", 0.1)
    url = f"file://{tmp_path}/agents?ttl=2"
    async with agent("a", url) as a, agent("b", url) as b, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        await b.serve()
        await until(events, "discovered", "b")
        with monkeypatch.context() as away:

            async def no_answer(self: object, name: str) -> None:
                await asyncio.get_running_loop().create_future()

            away.setattr("nixl_async.discovery.file_store.FileStore.remove", no_answer)
            await b.drain()
        await until(events, "withdrawn", "b")


async def test_one_connection_however_many_ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dials = []
    connect = Membership.connect

    async def counted(self: Membership, *arguments: object, **more: object) -> Peer:
        dials.append(arguments)
        return await connect(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Membership, "connect", counted)
    async with agent("a", url) as a, agent("b", url) as b, asyncio.timeout(PATIENCE_SECONDS):
        asking = [asyncio.create_task(a.peer("b")) for _ in range(50)]
        await asyncio.sleep(0)
        asking.pop().cancel()
        await b.serve()
        found = await asyncio.gather(*asking)
        assert len({id(one) for one in found}) == 1
        assert len(dials) == 1
        assert b.statistics().peers == 1
        assert await a.peer("b") is found[0]


async def test_both_ask_for_each_other_at_once(url: str) -> None:
    async with agent("a", url) as a, agent("b", url) as b, asyncio.timeout(PATIENCE_SECONDS):
        await a.serve()
        await b.serve()
        for _ in range(5):
            at_a, at_b = await asyncio.gather(a.peer("b"), b.peer("a"))
            assert (at_a.incarnation, at_b.incarnation) == (b.incarnation, a.incarnation)
            await a.notify("b", b"one")
            assert (await anext(b.notifications())).payload == b"one"
            await a.disconnect("b")


async def test_a_wait_that_is_cut_short_says_what_for(url: str) -> None:
    async with agent("a", url) as a, agent("other", url) as other, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        await other.serve()
        await until(events, "discovered", "other")
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.2):
                await a.peer("decode-3")
        (note,) = caught.value.__cause__.__notes__  # type: ignore[union-attr]
        assert "decode-3" in note
        assert "other" in note
        with pytest.raises(ConfigurationError, match="itself"):
            await a.peer("a")


async def test_a_restarted_peer_is_another_under_the_same_name(url: str) -> None:
    async with agent("a", url) as a, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        found = []
        for _ in range(3):
            async with agent("b", url) as b:
                await b.serve()
                found.append(await a.peer("b"))
            assert not found[-1].connected
            await until(events, "withdrawn", "b")
        assert len({one.incarnation for one in found}) == 3


def _shared(url: str) -> bool:
    return not url.startswith("memory")


async def test_a_new_life_replaces_one_that_hangs(url: str) -> None:
    if not _shared(url):
        pytest.skip("one process")
    async with agent("a", url) as a, asyncio.timeout(PATIENCE_SECONDS + 30):
        events = a.membership()
        async with agent_process("b", discovery=url, backends=["tcp"]) as old:
            first = await a.peer("b")
            old.stop()
            async with agent_process("b", discovery=url, backends=["tcp"]):
                # Nobody asks again: the store says that it is another.
                await until(events, "joined", "b", after=("joined", "b"))
                second = await a.peer("b")
                assert first.incarnation != second.incarnation
                assert not first.connected
                assert second.connected


async def test_an_agent_that_dies_vanishes_and_is_found_again(url: str) -> None:
    if not _shared(url):
        pytest.skip("one process")
    async with agent("a", url) as a, asyncio.timeout(PATIENCE_SECONDS + 30):
        events = a.membership()
        async with agent_process("b", discovery=url, backends=["tcp"]) as process:
            first = await a.peer("b")
            process.kill()
            await until(events, "lost", "b")
            waiting = asyncio.create_task(a.peer("b"))
            if not url.startswith("tcpstore"):
                await until(events, "withdrawn", "b")
        async with agent_process("b", discovery=url, backends=["tcp"]):
            second = await waiting
        assert first.incarnation != second.incarnation


async def test_what_is_wrong_with_a_peer_is_said(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with agent("a", url) as a, asyncio.timeout(PATIENCE_SECONDS):
        events = a.membership()
        async with agent("b", url, token="another") as b:
            await b.serve()
            with pytest.raises(AuthenticationError, match="'b' at 127"):
                await a.peer("b")
        async with agent("b", None) as b:
            host, port = await b.serve()
            store = open_store(url)
            moved = Discovered("moved", "1" * 16, (host, port))
            await store.put("moved", moved.encode())
            for name, value in {
                "no-json": b"{",
                "no-object": b"[]",
                "no-name": b'{"incarnation": "1", "address": ["h", 1]}',
                "theft": moved.encode(),
                "no-port": b'{"name": "no-port", "incarnation": "1", "address": ["h", 0]}',
                "large": b'{"name": "large", "x": "' + b"x" * 5000 + b'"}',
            }.items():
                await store.put(name, value)
            await store.put("last", Discovered("last", "1", ("127.0.0.1", port)).encode())
            await until(events, "discovered", "last")
            assert a.discovered.keys() <= {"moved", "last", "b"}
            for name in ("no-json", "no-object", "no-name", "theft", "no-port", "large"):
                assert f"the entry of '{name}'" in caplog.text
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.5):
                    await a.peer("moved")
            assert "agent 'b' answers" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]
            assert a.peers == {}
            await store.aclose()


async def test_without_discovery_only_connected_peers_are_found() -> None:
    async with agent("a", None) as a, agent("b", None) as b:
        with pytest.raises(PeerLost, match="connected are: none"):
            await a.peer("b")
        peer = await a.connect(await b.serve())
        assert await a.peer("b") is peer
        assert a.discovered == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("etcd", "no URL"),
        ("zookeeper://host", "unknown scheme"),
        ("etcd://", "names no server"),
        ("etcd://host:port", "no URL of an etcd server"),
        ("etcd://host?ttl=1", "ttl"),
        ("etcd://host?ttl=soon", "ttl"),
        ("etcd://host?lease=1", "unknown option 'lease'"),
        ("etcd://host?stock=maybe", "stock"),
        ("etcds://host?ca=/nowhere", "cannot be read"),
        ("file://host/x", "file:///directory"),
        ("file:///", "file:///directory"),
        ("memory://", "memory://name"),
        ("tcpstore://host", "tcpstore://host:port"),
    ],
)
def test_urls_that_are_refused(wrong: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        agent("a", wrong)


def test_a_password_is_never_shown() -> None:
    for url in ("etcd://me:secret@host:port/x", "etcd://me:secret@host?ttl=0", "zoo://me:secret@host", "me:secret@host"):
        with pytest.raises(ConfigurationError) as caught:
            agent("a", url)
        assert "secret" not in str(caught.value)


async def test_agents_of_one_name_are_noticed(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with agent("a", url) as a, agent("a", url) as other, agent("b", url) as b, asyncio.timeout(PATIENCE_SECONDS):
        events = b.membership()
        await a.serve()
        await until(events, "discovered", "a")
        await other.serve()
        await until(events, "discovered", "a")
        assert b.discovered["a"].incarnation == other.incarnation
        while "names must be unique" not in caplog.text:
            await asyncio.sleep(0.01)
        # The one that was pushed out is published again when the other goes.
        await other.aclose()
        while b.discovered.get("a") != Discovered("a", a.incarnation, a.address or ("", 0)):
            await anext(events)


async def test_served_at_every_address(tmp_path: Path, etcd: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    address = str(etcd.url).replace("http", "etcd")  # type: ignore[attr-defined]
    async with agent("a", address) as a, agent("b", address) as b, asyncio.timeout(PATIENCE_SECONDS):
        await b.serve("0.0.0.0", 0)
        assert (await a.peer("b")).name == "b"
        assert a.discovered["b"].address[0] == "127.0.0.1"
    async with agent("a", f"file://{tmp_path}") as a:
        with pytest.raises(ConfigurationError, match="advertise"):
            await a.serve("0.0.0.0", 0)
        assert a.address is None
        assert (await a.serve("0.0.0.0", 0, advertise="localhost"))[0] == "localhost"

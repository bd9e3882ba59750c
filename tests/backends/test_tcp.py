"""The tcp backend: its port answers nobody who does not know the token, and nothing outside registered regions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct

import numpy as np
import pytest

from nixl_async import AccessError, Agent, BackendError, ConfigurationError, DescriptorError
from nixl_async.backend import Host, PeerInfo
from nixl_async.backends import tcp
from nixl_async.backends.tcp import TCPBackend
from nixl_async.testing import Canary, assert_same, pattern
from tests.agents import TOKEN, agent_process, connect, known, two_agents


async def _opened(name: str = "a") -> TCPBackend:
    backend = TCPBackend()
    await backend.open(Host(name, "1", asyncio.get_running_loop()))
    await backend.listen("127.0.0.1")
    return backend


@pytest.mark.parametrize(
    "change",
    [{"token": "zz"}, {"token": "00"}, {"at": 5}, {"at": [["127.0.0.1", 0]]}, {"at": [["not an address", 5]]}, {"at": []}],
)
async def test_descriptions_that_are_refused(change: dict[str, object]) -> None:
    backend = await _opened()
    try:
        broken = json.dumps(json.loads(backend.describe_to("a", "1")) | change).encode()
        with pytest.raises(BackendError):
            await backend.connect(PeerInfo("b", "1", broken, "127.0.0.1"))
    finally:
        await backend.aclose()


async def test_a_wrong_token_is_refused() -> None:
    backend = await _opened()
    try:
        value = json.loads(backend.describe_to("a", "1"))
        value["token"] = "00" * (len(value["token"]) // 2)
        with pytest.raises(BackendError, match="does not take us"):
            await backend.connect(PeerInfo("b", "1", json.dumps(value).encode(), "127.0.0.1"))
    finally:
        await backend.aclose()


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", b"nixltcp1" + b"\x00" * 200, b"\xff" * 5000])
async def test_whatever_a_stranger_sends_it_is_closed_and_nothing_moves(data: bytes) -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        memory = pattern(1 << 16, 1)
        await b.register(memory, name="kv")
        await known(a, peer, "kv")
        canary = Canary(memory)
        (_, port), *_ = json.loads(b._backends["tcp"].describe())["at"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(15):
            assert await reader.read() == b""
        writer.close()
        canary.check()
        got = np.zeros(1 << 16, np.uint8)
        await a.transfer(peer.region("kv"), await a.register(got))
        assert_same(got, memory)


async def test_keys_and_bounds_are_checked_by_the_side_that_owns_the_memory() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        memory = pattern(8192, 1)
        there = await b.register(memory, name="kv")
        await b.register(b"x" * 8192, name="constant")
        await known(a, peer, "constant")
        here = await a.register(pattern(8192, 2))
        canary = Canary(memory)
        remote = peer.region("kv")
        remote.nbytes *= 2
        with pytest.raises(AccessError):
            await a.transfer(here, remote[8192:16384])
        remote.nbytes //= 2
        key, remote.keys["tcp"] = remote.keys["tcp"], struct.pack("<Q", 12345)
        with pytest.raises(AccessError):
            await a.transfer(here, remote)
        remote.keys["tcp"] = key
        constant = peer.region("constant")
        with pytest.raises(DescriptorError, match="read-only"):
            await a.transfer(here, constant)
        constant.readonly = False
        with pytest.raises(AccessError):
            await a.transfer(here, constant)
        canary.check()
        await a.transfer(here, remote)
        assert_same(memory, pattern(8192, 2))
        assert there.name == "kv"


async def test_a_peer_that_left_is_let_in_no_more() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        memory = np.zeros(4096, np.uint8)
        await b.register(memory, name="kv")
        await known(a, peer, "kv")
        # What it was told when it came, which it keeps.
        description = b._backends["tcp"].describe_to("a", a.incarnation)
        assert description == b._backends["tcp"].describe_to("a", a.incarnation)
        kept = peer.region("kv")
        await a.disconnect("b")
        backend = TCPBackend()
        await backend.open(Host("a", a.incarnation, asyncio.get_running_loop()))
        try:
            # Until b has seen the end of the control connection it is let in.
            with pytest.raises(BackendError, match="does not take us"):
                async with asyncio.timeout(10):
                    while True:
                        await backend.connect(PeerInfo("b", b.incarnation, description, "127.0.0.1"))
                        await asyncio.sleep(0.01)
        finally:
            await backend.aclose()
        again = await a.connect(b.address or "")
        assert json.loads(b._backends["tcp"].describe_to("a", a.incarnation)) != json.loads(description)
        await a.transfer(await a.register(pattern(4096, 1)), again.region("kv"))
        assert_same(memory, pattern(4096, 1))
        assert kept.withdrawn


async def test_a_fence_without_a_mark_closes_what_one_life_of_one_peer_has_opened_and_nothing_else() -> None:
    async with (
        two_agents(backends=["tcp"]) as (a, b, _),
        Agent("c", token=TOKEN, backends=["tcp"]) as c,
    ):
        await connect(c, b)
        here, there = await a.register(np.ones(64, np.uint8)), await b.register(np.zeros(64, np.uint8), name="kv")
        await known(a, a.peers["b"], "kv")
        tcp = b._backends["tcp"]
        await tcp.fence(PeerInfo("a", "another life", b""), b"")
        await tcp.fence(PeerInfo("", "", b""), b"")
        await a.transfer(here, a.peers["b"].region("kv"))
        assert a.statistics().routes_lost == 0
        await tcp.fence(PeerInfo("a", a.incarnation, b""), b"")
        async with asyncio.timeout(10):
            while a.statistics().routes_lost == 0:
                await asyncio.sleep(0)
            # It is let in again with what it was told.
            await a.transfer(here, a.peers["b"].region("kv"))
        assert c.statistics().routes_lost == b.statistics().routes_lost == 0
        await there.aclose()


async def test_the_published_metadata_lets_nobody_in() -> None:
    async with two_agents(backends=["tcp"]) as (_, b, _):
        assert "token" not in json.loads(b._backends["tcp"].describe())


async def test_many_segments_of_all_sizes() -> None:
    random = np.random.default_rng(1)
    async with agent_process("far", nbytes=32 << 20, seed=1) as far, Agent("near", token=TOKEN, backends=["tcp"]) as near:
        got = np.zeros(32 << 20, np.uint8)
        here, remote = await near.register(got), (await near.connect(far.address)).region("memory")
        cuts = np.unique(np.concatenate(([0, 32 << 20], random.integers(0, 32 << 20, 5000))))
        order = random.permutation(len(cuts) - 1)
        starts, lengths = cuts[:-1][order], np.diff(cuts)[order]
        result = await near.transfer(remote.ranges(starts, lengths), here.ranges(starts, lengths))
        assert result.nbytes == 32 << 20
        assert_same(got, await asyncio.to_thread(pattern, 32 << 20, 1))


async def test_peers_that_part_at_once_leave_no_connection() -> None:
    """Each end closes bulk streams on native threads and its express one on this thread, in the same instant."""
    for _ in range(50):
        a, b = await _opened("a"), await _opened("b")
        for one, other in ((a, b), (b, a)):
            name = "b" if other is b else "a"
            await one.connect(PeerInfo(name, "1", other.describe_to("a" if name == "b" else "b", "1"), "127.0.0.1"))
        await asyncio.gather(a.disconnect("b"), b.disconnect("a"))
        await asyncio.gather(a.aclose(), b.aclose())


async def test_a_lone_large_transfer_takes_all_streams() -> None:
    size = 24 << 20
    source, target = pattern(size, 3), np.zeros(size, np.uint8)
    async with (
        Agent("a", token=TOKEN, backends=[TCPBackend(streams=6)]) as a,
        Agent("b", token=TOKEN, backends=[TCPBackend(streams=6)]) as b,
    ):
        await b.register(target, name="kv")
        near = await a.register(source)
        peer = await connect(a, b)
        transfer = a.submit(near[0 : 12 << 20], peer.region("kv")[0 : 12 << 20])
        await asyncio.sleep(0)
        assert len(transfer._record.ops) == 6
        await transfer
        await a.transfer(near[12 << 20 :], peer.region("kv")[12 << 20 :])
    assert_same(target, source)


@pytest.mark.parametrize("get", [True, False])
async def test_a_copy_larger_than_the_socket_takes_is_carried_on_while_it_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, get: bool
) -> None:
    monkeypatch.setattr(tcp, "SPIN_MOST_NS", 10**11)
    monkeypatch.setattr(tcp, "SPIN_NS", 10**11)
    nbytes = TCPBackend.limits.inline_nbytes
    source, target = pattern(nbytes, 4), np.zeros(nbytes, np.uint8)
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        await b.register(source if get else target, name="kv")
        await known(a, peer, "kv")
        near = await a.register(target if get else source)
        far = peer.region("kv")
        await a.transfer(*((far, near) if get else (near, far)))
        assert a.statistics().inline == 1
    assert_same(target, source)


@pytest.mark.parametrize("nbytes", [4096, 2 * tcp.LARGE_NBYTES])
async def test_copies_at_once_of_which_none_is_answered_soon_are_no_failures(
    monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    # As with a peer that is far away: each answer comes after the look for it.
    monkeypatch.setattr(tcp, "SPIN_MOST_NS", 0)
    source, target = pattern(20 * nbytes, 5), np.zeros(20 * nbytes, np.uint8)
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        await b.register(target, name="kv")
        await known(a, peer, "kv")
        near, far = await a.register(source), peer.region("kv")
        for first in (0, 10):
            places = [slice(n * nbytes, (n + 1) * nbytes) for n in range(first, first + 10)]
            await asyncio.gather(*(a.transfer(near[place], far[place]) for place in places))
        found = a.statistics()
        assert (found.done, found.failed, found.retries, found.failovers, found.routes_lost) == (20, 0, 0, 0, 0)
    assert_same(target, source)


async def test_what_is_large_goes_to_the_threads_where_looks_are_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "SPIN_MOST_NS", 10**11)
    monkeypatch.setattr(tcp, "SPIN_NS", 10**11)
    nbytes = 2 * tcp.LARGE_NBYTES
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        await b.register(np.zeros(nbytes, np.uint8), name="kv")
        await known(a, peer, "kv")
        near, far, backend = await a.register(pattern(nbytes, 6)), peer.region("kv"), a._backends["tcp"]
        backend._peers["b"].misses[True] = tcp.SPIN_MISSES
        for _ in range(tcp.SPIN_AGAIN - tcp.SPIN_MISSES):
            await a.transfer(near, far)
        assert a.statistics().inline == 0
        # One is tried again, is worth it, and so are those after it.
        await a.transfer(near, far)
        await a.transfer(near, far)
        assert a.statistics().inline == 2


async def test_silent_connections_keep_nobody_out_and_end_soon() -> None:
    a, b = await _opened("a"), await _opened("b")
    silent = []
    try:
        (_, port), *_ = json.loads(b.describe())["at"]
        for _ in range(400):
            silent.append(await asyncio.open_connection("127.0.0.1", port))
            await asyncio.sleep(0)
        async with asyncio.timeout(1):
            await a.connect(PeerInfo("b", "1", b.describe_to("a", "1"), "127.0.0.1"))
        began = asyncio.get_running_loop().time()
        async with asyncio.timeout(10):
            # The first gave way, the last had their two seconds.
            assert await silent[0][0].read() == b""
            assert asyncio.get_running_loop().time() - began < 1
            assert await asyncio.gather(*(reader.read() for reader, _ in silent)) == [b""] * 400
    finally:
        for _, writer in silent:
            writer.close()
        await asyncio.gather(a.aclose(), b.aclose())


async def test_one_that_says_little_by_little_has_no_more_time() -> None:
    backend = await _opened()
    try:
        (_, port), *_ = json.loads(backend.describe())["at"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ended = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(10):
            for byte in b"nixltcp1" + bytes(24):
                writer.write(bytes([byte]))
                await asyncio.wait([ended], timeout=0.3)
                if ended.done():
                    break
        assert ended.done()
        assert await ended == b""
        writer.close()
    finally:
        await backend.aclose()


# Ports.


def _port(agent: Agent) -> int:
    ((_, port),) = json.loads(agent._backends["tcp"].describe())["at"]
    return int(port)


async def test_agents_of_a_host_share_a_range_of_ports_and_a_fixed_port_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _free_run(3)
    for _ in range(2):
        async with (
            Agent("a", token=TOKEN, backends=[TCPBackend(ports=f"{first}-{first + 2}")]) as a,
            Agent("b", token=TOKEN, backends=[TCPBackend(ports=f"{first}-{first + 2}")]) as b,
        ):
            peer = await connect(a, b)
            memory, got = pattern(1 << 20, 1), np.zeros(1 << 20, np.uint8)
            await b.register(memory, name="kv")
            await known(a, peer, "kv")
            mine = await a.register(got)
            assert (await a.transfer(peer.region("kv"), mine)).route == "tcp"
            assert_same(got, memory)
            assert sorted((_port(a), _port(b))) == [first, first + 1]
            monkeypatch.setenv("NIXL_ASYNC_TCP_PORTS", f"{first + 2}")
            async with Agent("c", token=TOKEN, backends=["tcp"]) as c:
                await c.serve()
                assert _port(c) == first + 2
                async with Agent("d", token=TOKEN, backends=["tcp"]) as d:
                    with pytest.raises(ConfigurationError, match=f"port {first + 2} is taken; .*NIXL_ASYNC_TCP_PORTS"):
                        await d.serve()
                async with Agent("e", token=TOKEN, backends=[TCPBackend(ports=f"{first}-{first + 2}")]) as e:
                    with pytest.raises(ConfigurationError, match=f"all ports {first}-{first + 2} are taken"):
                        await e.connect(c.address or "")


def _free_run(n: int) -> int:
    """Return the first of `n` ports in a row that nobody uses, below those of the servers for tests and the kernel's own."""
    for first in range(3000 + os.getpid() % 300 * 10, 7000 - n):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + n):
                sock = stack.enter_context(socket.socket())
                sock.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


@pytest.mark.parametrize(
    "ports", ["", "0", 70000, "7199-7100", "7100-", "-7100", "http", "7100-7199-7200", "7100, 7101", -1, True]
)
def test_ports_that_are_none_are_refused(ports: str | int) -> None:
    with pytest.raises(ConfigurationError, match="ports is"):
        TCPBackend(ports=ports)


def test_ports_of_the_environment_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIXL_ASYNC_TCP_PORTS", "99999")
    with pytest.raises(ConfigurationError, match="NIXL_ASYNC_TCP_PORTS is '99999'; ports are 1 to 65535"):
        TCPBackend()


async def test_a_port_that_may_not_be_used_is_said_at_once() -> None:
    async with Agent("a", token=TOKEN, backends=[TCPBackend(ports="7100-7199")]) as a:
        with pytest.raises(ConfigurationError, match=r"cannot listen at 203\.0\.113\.77, port 7100"):
            await a.serve("203.0.113.77")

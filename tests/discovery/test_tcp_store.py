"""A TCPStore that is killed and started anew without what was in it, and writers that die halfway."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent
from nixl_async.discovery import open_store, tcp_store
from nixl_async.discovery.tcp_store import TCPStoreStore
from nixl_async.errors import BackendError
from tests.agents import TOKEN
from tests.discovery.events import until
from tests.discovery.tcp_server import TCPServer
from tests.discovery.test_store import value_of

PATIENCE_SECONDS = 40.0


def store(server: TCPServer, prefix: str) -> TCPStoreStore:
    opened = open_store(f"tcpstore://127.0.0.1:{server.port}/{prefix}")
    assert isinstance(opened, TCPStoreStore)
    return opened


@pytest.mark.slow
async def test_a_restart_drops_nobody(tcp: TCPServer) -> None:
    server = TCPServer()
    await asyncio.to_thread(server.start)
    url = f"tcpstore://127.0.0.1:{server.port}"
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            async with (
                Agent("a", token=TOKEN, backends=["memory"], discovery=url) as a,
                Agent("b", token=TOKEN, backends=["memory"], discovery=url) as b,
            ):
                await a.serve()
                await b.serve()
                await b.register(np.zeros(64, np.uint8), name="kv")
                mine = await a.register(np.zeros(64, np.uint8))
                peer = await a.peer("b")
                events = a.membership()
                await asyncio.to_thread(server.stop)
                await a.transfer(peer.region("kv"), mine)
                await asyncio.to_thread(server.start)
                async with Agent("c", token=TOKEN, backends=["memory"], discovery=url) as c:
                    await c.serve()
                    assert (await c.peer("b")).name == "b"
                    await until(events, "discovered", "c")
                assert a.peers["b"] is peer
                assert b.discovered.keys() >= {"a"}
    finally:
        await asyncio.to_thread(server.stop)


async def test_a_writer_that_died_between_two_steps_holds_nobody_up(tcp: TCPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_store, "CHECK_SECONDS", 0.1)
    ours, theirs = store(tcp, "hole"), store(tcp, "hole")
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(theirs.watch()) as seen:
        await anext(seen)
        # It takes a number and writes nothing.
        await ours._calls.run(lambda client: ours._head(client, 1))
        await ours.put("a", b"1")
        assert await value_of(seen, "a") == b"1"
        async with contextlib.aclosing(ours.watch()) as others:
            assert (await anext(others)).values == {"a": b"1"}
    await ours.aclose()
    await theirs.aclose()


async def test_many_such_writers_hold_nobody_up_one_after_the_other(tcp: TCPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_store, "CHECK_SECONDS", 0.1)
    ours, theirs = store(tcp, "holes"), store(tcp, "holes")
    checks: list[int] = []
    check = theirs._check
    monkeypatch.setattr(theirs, "_check", lambda client, at: (checks.append(at), check(client, at)))
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(theirs.watch()) as seen:
        await anext(seen)

        def take_and_write(client: Any) -> None:
            for _ in range(40):
                number = ours._head(client, 1)
                client.set(ours._key(ours._head(client, 1)), f'["a", "{number}"]')

        await ours._calls.run(take_and_write)
        while await value_of(seen, "a") != b"79":
            pass
        # The first finds that they are late, the second fills all of them.
        assert len(set(checks)) == 1
    await ours.aclose()
    await theirs.aclose()


async def test_noise_in_the_log_is_passed_over(tcp: TCPServer) -> None:
    ours = store(tcp, "noise")
    async with asyncio.timeout(PATIENCE_SECONDS), contextlib.aclosing(ours.watch()) as seen:
        await anext(seen)
        for noise in (b"\xff", b"[1, 2]", b"{", b"[" * 5000, b'["a"]', b'[["a"], "b"]'):
            await ours._calls.run(lambda client, noise=noise: client.set(ours._key(ours._head(client, 1)), noise))
        await ours.put("a", b"1")
        assert await value_of(seen, "a") == b"1"
    await ours.aclose()


async def test_nobody_there() -> None:
    pytest.importorskip("torch.distributed")
    nobody = open_store("tcpstore://127.0.0.1:1")
    with pytest.raises(BackendError, match="127.0.0.1:1"):
        await nobody.put("a", b"1")
    with contextlib.suppress(BackendError):
        await nobody.aclose()

"""A TCPStore asked by our client and by torch's; killed and started anew; and servers that are none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest

from nixl_async.discovery.c10d_client import C10dStore
from nixl_async.errors import BackendError
from nixl_async.testing.servers import free_ports
from tests.discovery.tcp_server import TCPServer, has_torch

PATIENCE_SECONDS = 20.0
SILENCE = b"silence"


@pytest.fixture(scope="module")
def server() -> Iterator[TCPServer]:
    if not has_torch():
        pytest.skip("torch is not installed")
    server = TCPServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def store(server: TCPServer) -> AsyncIterator[C10dStore]:
    store = C10dStore("127.0.0.1", server.port)
    yield store
    await store.aclose()


async def test_keys_are_those_of_torchs_clients(server: TCPServer, store: C10dStore) -> None:
    from torch.distributed import TCPStore

    binary = bytes(range(256)) * 4096
    theirs = await asyncio.to_thread(TCPStore, "127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    await store.set("ours", binary)
    assert await asyncio.to_thread(theirs.get, "ours") == binary
    await asyncio.to_thread(theirs.set, "theirs/a", "text")
    assert await store.get("theirs/a") == b"text"
    assert await store.get("nothing") is None
    assert await store.delete("ours")
    assert not await store.delete("ours")
    assert not await asyncio.to_thread(theirs.check, ["ours"])


async def test_calls_at_once_get_each_its_answer(store: C10dStore) -> None:
    async with asyncio.TaskGroup() as group:
        for i in range(50):
            group.create_task(store.set(f"key {i}", b"%d" % i))
    assert await asyncio.gather(*(store.get(f"key {i}") for i in range(50))) == [b"%d" % i for i in range(50)]


async def test_a_call_that_is_cancelled_spoils_no_other(store: C10dStore) -> None:
    await store.set("big", bytes(8 << 20))
    await store.set("small", b"1")
    for turns in range(1, 30, 3):
        call = asyncio.ensure_future(store.get("big"))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        assert await store.get("small") == b"1"


async def test_a_key_is_waited_for(server: TCPServer, store: C10dStore) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        waiting = asyncio.ensure_future(store.appearing("late"))
        await store.set("another", b"0")
        assert not waiting.done()
        await store.set("late", b"1")
        assert await waiting == b"1"
        assert await store.appearing("late") == b"1"
        # An empty value is none.
        waiting = asyncio.ensure_future(store.appearing("empty"))
        await store.set("empty", b"")
        assert await store.get("empty") is None
        await store.set("empty", b"2")
        assert await waiting == b"2"


async def test_it_outlives_a_restart_of_the_server(server: TCPServer, store: C10dStore) -> None:
    idle = C10dStore("127.0.0.1", server.port)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await idle.connect()
        await store.set("before", b"0")
        waiting = asyncio.ensure_future(store.appearing("after"))
        await asyncio.sleep(0)
        await asyncio.to_thread(server.stop)
        with pytest.raises(BackendError, match=f"127.0.0.1:{server.port} cannot be used"):
            await store.get("before")
        await asyncio.to_thread(server.start)
        assert await store.get("before") is None
        # Its connection ended while nobody used it.
        await idle.set("after", b"1")
        assert await waiting == b"1"
        await idle.aclose()


async def test_what_is_no_tcpstore() -> None:
    with pytest.raises(BackendError, match="cannot be used"):
        await C10dStore("127.0.0.1", free_ports(1)[0]).connect()
    wrong = asyncio.Queue[bytes]()
    ended = asyncio.Queue[None]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The client parts first, or after the answer.
        if (said := await wrong.get()) is SILENCE:
            await reader.read()
        writer.write(said)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        ended.put_nowait(None)

    async with asyncio.timeout(PATIENCE_SECONDS), await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        store = C10dStore("127.0.0.1", server.sockets[0].getsockname()[1], call_seconds=0.5)
        for said in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", SILENCE):
            wrong.put_nowait(said)
            with pytest.raises(BackendError, match="within 0.5 s" if said is SILENCE else "cannot be used"):
                await store.get("x")
            await ended.get()

"""The piece of network: it relays, holds back, forgets one end, and delivers late or finds the door closed."""

from __future__ import annotations

import asyncio

import pytest

from nixl_async.testing.network import network
from tests.sockets import listening

SECONDS = 10


async def test_it_relays_both_ways_and_ends_with_either_side() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async with listening(echo) as port, network(port) as between, asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", between.port)
        writer.write(bytes(100_000))
        assert await reader.readexactly(100_000) == bytes(100_000)
        assert (between.delivered, between.refused, between.held_nbytes) == (0, 0, 0)
        writer.close()


async def test_what_is_held_back_comes_late_though_the_client_was_reset() -> None:
    taken, got = bytearray(), asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            taken.extend(data)
            got.set()

    async with listening(take) as port, network(port) as between, asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", between.port)
        writer.write(b"first")
        await got.wait()
        between.hold()
        writer.write(b"second")
        await between.holds(6)
        assert taken == b"first"
        between.reset_clients()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        got.clear()
        await between.release()
        await got.wait()
        assert taken == b"firstsecond"
        assert (between.delivered, between.refused) == (6, 0)
        writer.close()


async def test_what_comes_to_a_closed_door_is_refused() -> None:
    got, leave = asyncio.Event(), asyncio.Event()

    async def go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(5)
        got.set()
        await leave.wait()

    async with listening(go) as port, network(port) as between, asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", between.port)
        writer.write(b"first")
        await got.wait()
        between.hold()
        writer.write(b"second")
        await between.holds(6)
        leave.set()
        assert await reader.read() == b""
        await between.release()
        assert (between.delivered, between.refused) == (0, 6)
        writer.close()

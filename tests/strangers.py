"""A hand-made agent, for tests that attack real ones: it speaks the protocol byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nixl_async import AuthenticationError
from nixl_async.wire import FrameReader, FrameType, Greeting, Handshake, encode_frame


class Stranger:
    """Speaks the protocol byte by byte, as an attacker would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = FrameReader(1 << 20)
        self._ready: list[tuple[FrameType, bytes]] = []

    async def frame(self) -> tuple[FrameType, bytes]:
        """Return the next frame; `EOFError` when the connection has ended."""
        while not self._ready:
            try:
                data = await self.reader.read(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError
            self._ready += list(self._frames.feed(data))
        return self._ready.pop(0)

    async def ended(self) -> list[tuple[FrameType, bytes]]:
        """Read to the end; return what came."""
        found = []
        async with asyncio.timeout(10):
            with contextlib.suppress(EOFError):
                while True:
                    found.append(await self.frame())
        return found

    async def authenticate(self, name: str, token: bytes, incarnation: str = "1") -> None:
        """Shake hands as the side that connects."""
        own = Greeting.create(name, incarnation)
        handshake = Handshake(own, token, connecting=True)
        self.writer.write(own.encode())
        kind, payload = await self.frame()
        assert kind is FrameType.HELLO, payload
        handshake.greeted(payload)
        self.writer.write(encode_frame(FrameType.PROOF, handshake.proof()))
        kind, payload = await self.frame()
        if kind is not FrameType.PROOF:
            raise AuthenticationError(payload.decode())
        handshake.verify(payload)


@asynccontextmanager
async def stranger(address: tuple[str, int]) -> AsyncIterator[Stranger]:
    """Connect to an agent with nothing in hand."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

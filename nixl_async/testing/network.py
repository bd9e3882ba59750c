"""A piece of network between two processes that holds bytes back, forgets one end of its connections, and delivers late."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

HOST = "127.0.0.1"
_READ_NBYTES = 1 << 20
_RESET = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Wire:
    """One connection through the network: what the client sent and the server has not got, and whether each side has ended."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    waiting: list[bytes] = field(default_factory=list)
    held: bool = False
    ended: bool = False
    refused: bool = False


class Network:
    """Relays connections to `to_port` of the loopback address; `port` is where clients connect.

    Of the bytes that were held back, `delivered` counts those that went to a server, `refused` those that found it closed.
    """

    def __init__(self, to_port: int) -> None:
        self.to_port = to_port
        self.port = self.delivered = self.refused = 0
        self._wires: list[_Wire] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    @property
    def held_nbytes(self) -> int:
        """The bytes that are held back."""
        return sum(len(data) for wire in self._wires if wire.held for data in wire.waiting)

    def hold(self) -> None:
        """Hold back what clients send from here on, on the connections that there are."""
        for wire in self._wires:
            wire.held = True

    async def holds(self, nbytes: int) -> None:
        """Wait until that many bytes are held back."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.held_nbytes >= nbytes)

    def reset_clients(self) -> None:
        """Reset the clients' ends of the connections that there are; the servers hear nothing of it before `release`."""
        for wire in self._wires:
            if not wire.client.transport.is_closing():
                wire.client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                wire.client.transport.abort()

    async def release(self) -> None:
        """Deliver what is held back; return when all of it has gone one way or the other."""
        async with self._changed:
            wires = [wire for wire in self._wires if wire.held]
            for wire in wires:
                wire.held = False
            self._changed.notify_all()
            await self._changed.wait_for(lambda: not any(wire.waiting for wire in wires))

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back, server = await asyncio.open_connection(HOST, self.to_port)
        except OSError:
            writer.transport.abort()
            return
        wire = _Wire(writer, server)
        self._wires.append(wire)
        tasks = [asyncio.create_task(self._take(reader, wire)), asyncio.create_task(self._answer(back, wire))]
        try:
            await self._deliver(wire)
        finally:
            # Before anything is waited for: this may be cancelled here once more.
            for one in tasks:
                one.cancel()
            server.transport.abort()
            writer.transport.abort()
            self._wires.remove(wire)
            await asyncio.wait(tasks)
            await asyncio.gather(server.wait_closed(), writer.wait_closed(), return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, wire: _Wire) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_READ_NBYTES):
                async with self._changed:
                    wire.waiting.append(data)
                    self._changed.notify_all()
        async with self._changed:
            wire.ended = True
            self._changed.notify_all()

    async def _deliver(self, wire: _Wire) -> None:
        late = False
        while True:
            async with self._changed:
                while wire.held or not (wire.waiting or wire.ended):
                    late |= wire.held
                    await self._changed.wait()
            if not wire.waiting:
                return
            data = wire.waiting[0]
            with contextlib.suppress(OSError):
                if not wire.refused:
                    wire.server.write(data)
                    await wire.server.drain()
            self.delivered += len(data) if late and not wire.refused else 0
            self.refused += len(data) if late and wire.refused else 0
            async with self._changed:
                del wire.waiting[0]
                self._changed.notify_all()

    async def _answer(self, reader: asyncio.StreamReader, wire: _Wire) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_READ_NBYTES):
                if not wire.client.transport.is_closing():
                    wire.client.write(data)
                    await wire.client.drain()
        wire.refused = True
        wire.client.transport.abort()


@asynccontextmanager
async def network(to_port: int) -> AsyncIterator[Network]:
    """Open a network to a port of the loopback address; its connections end with the block."""
    found = Network(to_port)
    server = await asyncio.start_server(found._connected, HOST, 0)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()
        # What was accepted just before gets its task a step or two later.
        for _ in range(3):
            await asyncio.sleep(0)
        while found._tasks:
            for task in found._tasks:
                task.cancel()
            await asyncio.wait(found._tasks)
        await server.wait_closed()

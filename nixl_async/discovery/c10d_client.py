"""A client of torch's c10d TCPStore by its wire protocol, without torch (QueryType in its TCPStoreBackend.hpp).

A call that fails is tried once more on a new connection: the server may have been started anew meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TypeVar

from nixl_async.errors import BackendError

T = TypeVar("T")
MAX_VALUE_NBYTES = 1 << 30
AGAIN_SECONDS = (0.1, 2.0)
"""How long to wait before a lost wait is begun again: at first, and at most."""
_MAGIC = 0x3C85F7CE
# Whole numbers are in the server's byte order, as torch's clients have it.
_U32, _U64, _I64 = struct.Struct("=I"), struct.Struct("=Q"), struct.Struct("=q")
_NONCE = 0x6E69786C
_READY = b"\0"


class _Query(IntEnum):
    VALIDATE = 0
    SET = 1
    GET = 3
    CHECK = 5
    WAIT = 6
    DELETE_KEY = 8
    PING = 13


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def tell(self, query: _Query, body: bytes = b"") -> None:
        self.writer.write(bytes([query]) + body)
        await self.writer.drain()

    async def number(self, kind: struct.Struct) -> int:
        return int(kind.unpack(await self.reader.readexactly(kind.size))[0])

    async def ping(self) -> None:
        """Return when all that was told before has been done."""
        await self.tell(_Query.PING, _U32.pack(_NONCE))
        if (echoed := await self.number(_U32)) != _NONCE:
            raise OSError(f"it answers {_NONCE:#x} by {echoed:#x}")

    async def get(self, key: bytes) -> bytes | None:
        await self.tell(_Query.CHECK, _U64.pack(1) + key)
        if await self.reader.readexactly(1) != _READY:
            return None
        await self.tell(_Query.GET, key)
        nbytes = await self.number(_U64)
        if nbytes > MAX_VALUE_NBYTES:
            raise OSError(f"a value of {nbytes} bytes; at most {MAX_VALUE_NBYTES} are read")
        # Empty where it was deleted in between.
        return await self.reader.readexactly(nbytes) or None

    async def wait(self, key: bytes) -> None:
        await self.tell(_Query.WAIT, _U64.pack(1) + key)
        await self.reader.readexactly(1)


class C10dStore:
    """One server. Empty values are none: the protocol does not tell them from keys that are not there.

    The first connection may take `connect_seconds`; each call, with a connection of its own if need be, `call_seconds`.
    """

    def __init__(self, host: str, port: int, *, connect_seconds: float = 30.0, call_seconds: float = 5.0) -> None:
        self._server = host, port
        self._connect_seconds, self._call_seconds = connect_seconds, call_seconds
        self._calling = asyncio.Lock()
        self._kept: _Connection | None = None

    async def aclose(self) -> None:
        """End the connection that is kept."""
        if (kept := self._drop()) is not None:
            with contextlib.suppress(OSError):
                await kept.writer.wait_closed()

    def _drop(self) -> _Connection | None:
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.writer.close()
        return kept

    async def connect(self) -> None:
        """Connect, which the first call would do otherwise.

        Raises:
            BackendError: nobody answers there, or it is no TCPStore.
        """
        async with self._calling:
            if self._kept is None:
                self._kept = await self._translated(self._connected(), self._connect_seconds)

    async def set(self, key: str, value: bytes) -> None:
        """Set a key; return when it is set.

        Raises:
            BackendError: the store cannot be reached.
        """

        async def work(connection: _Connection) -> None:
            await connection.tell(_Query.SET, _key(key) + _U64.pack(len(value)) + value)
            await connection.ping()

        await self._call(work)

    async def get(self, key: str) -> bytes | None:
        """Return a key's value; `None` where there is none.

        Raises:
            BackendError: the store cannot be reached.
        """
        return await self._call(lambda connection: connection.get(_key(key)))

    async def delete(self, key: str) -> bool:
        """Delete a key; return whether there was one.

        Raises:
            BackendError: the store cannot be reached.
        """

        async def work(connection: _Connection) -> bool:
            await connection.tell(_Query.DELETE_KEY, _key(key))
            return await connection.number(_I64) > 0

        return await self._call(work)

    async def appearing(self, key: str) -> bytes:
        """Wait for as long as it takes, through restarts of the server too, until a key has a value; return that."""
        again, most = AGAIN_SECONDS
        while True:
            connection: _Connection | None = None
            try:
                # Of its own: what waits hears of nothing else.
                connection = await self._translated(self._connected(), self._call_seconds)
                again = AGAIN_SECONDS[0]
                while True:
                    await connection.wait(_key(key))
                    if (value := await connection.get(_key(key))) is not None:
                        return value
                    # Deleted again; or empty, and then nothing makes it wait.
                    await asyncio.sleep(AGAIN_SECONDS[0])
            except (OSError, EOFError, BackendError):
                await asyncio.sleep(again)
                again = min(2 * again, most)
            finally:
                if connection is not None:
                    connection.writer.close()

    async def _connected(self) -> _Connection:
        connection = _Connection(*await asyncio.open_connection(*self._server))
        try:
            await connection.tell(_Query.VALIDATE, _U32.pack(_MAGIC))
            await connection.ping()
        except BaseException:
            connection.writer.close()
            raise
        return connection

    async def _call(self, work: Callable[[_Connection], Awaitable[T]]) -> T:
        async def attempts() -> T:
            if self._kept is not None:
                try:
                    return await self._attempt(self._kept, work)
                except (OSError, EOFError):
                    # It ended while nobody used it.
                    pass
            self._kept = connection = await self._connected()
            return await self._attempt(connection, work)

        async with self._calling:
            return await self._translated(attempts(), self._call_seconds)

    async def _attempt(self, connection: _Connection, work: Callable[[_Connection], Awaitable[T]]) -> T:
        try:
            return await work(connection)
        except BaseException:
            # What comes next on it would be taken for another call's answer.
            self._drop()
            raise

    async def _translated(self, work: Awaitable[T], seconds: float) -> T:
        host, port = self._server
        try:
            async with asyncio.timeout(seconds):
                return await work
        except TimeoutError as error:
            raise BackendError(
                f"the TCPStore at {host}:{port} does not answer within {seconds:g} s", backend="tcpstore"
            ) from error
        except (OSError, EOFError) as error:
            raise BackendError(f"the TCPStore at {host}:{port} cannot be used: {error}", backend="tcpstore") from error


def _key(key: str) -> bytes:
    # As torch's clients write them.
    text = f"/{key}".encode()
    return _U64.pack(len(text)) + text

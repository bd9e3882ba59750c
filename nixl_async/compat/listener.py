"""The exchange of metadata over TCP that NIXL's agents have: `send`, `fetch` and `invalidate`, by address and port.

A frame is a u64 byte count, the text `NIXLCOMM:`, and a verb: `LOAD` and metadata, `SEND` (the answer is a LOAD), `INVL` and a name
(src/core/nixl_listener.cpp of ai-dynamo/nixl). It is not authenticated, there as here: an agent listens only when it is told to.
Calls return at once; what goes wrong is logged.
"""

from __future__ import annotations

import asyncio
import struct
from functools import partial

from nixl_async.compat.background import Background
from nixl_async.compat.core import Core
from nixl_async.compat.engine import ENGINE
from nixl_async.compat.log import get_logger
from nixl_async.errors import NixlError

logger = get_logger(__name__)

DEFAULT_COMM_PORT = 8888
MAX_FRAME_NBYTES = 1 << 30
CONNECT_SECONDS = 1.0
BACKEND_SECONDS = 2.0
"""How long a message waits for a backend that is made after the agent: programs listen from its first moment."""
_PREFIX = b"NIXLCOMM:"
_U64 = struct.Struct("<Q")
_VERB_NBYTES = 4


class Listener:
    """One agent's end of it. Its coroutines and callbacks run on the engine's loop."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._server: asyncio.Server | None = None
        self._writers: dict[tuple[str, int], asyncio.StreamWriter] = {}
        self._accepted: set[asyncio.StreamWriter] = set()
        self._background = Background(core.name, "metadata is not exchanged")
        # What goes to one address goes in the order of the calls.
        self._sending: dict[tuple[str, int], asyncio.Lock] = {}

    async def open(self, port: int | None) -> None:
        """Listen at a port (0: any that is free), or with None at none; and end with the agent.

        Raises:
            OSError: the port is taken.
        """
        if port is not None:
            self._server = await asyncio.start_server(self._accept, "0.0.0.0", port)
        self._core.on_close.append(self._aclose)

    @property
    def port(self) -> int | None:
        """The port that it listens at."""
        return None if self._server is None else int(self._server.sockets[0].getsockname()[1])

    async def _aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._background.aclose()
        for writer in [*self._writers.values(), *self._accepted]:
            writer.close()

    # For any thread.

    def send_soon(self, host: str, port: int, metadata: bytes) -> None:
        """Send metadata."""
        self._soon(host, port, b"LOAD" + metadata)

    def fetch_soon(self, host: str, port: int) -> None:
        """Ask for metadata, which is loaded when it comes."""
        self._soon(host, port, b"SEND")

    def invalidate_soon(self, host: str, port: int) -> None:
        """Ask to forget this agent."""
        self._soon(host, port, b"INVL" + self._core.name.encode())

    def _soon(self, host: str, port: int, message: bytes) -> None:
        ENGINE.call(self._background.spawn, partial(self._deliver, (host, port or DEFAULT_COMM_PORT), message))

    # Inside.

    async def _deliver(self, address: tuple[str, int], message: bytes) -> None:
        async with self._sending.setdefault(address, asyncio.Lock()):
            writer = self._writers.get(address)
            if writer is None or writer.is_closing():
                async with asyncio.timeout(CONNECT_SECONDS):
                    reader, writer = await asyncio.open_connection(*address)
                self._writers[address] = writer
                self._background.spawn(partial(self._serve, reader, writer))
            await _write(writer, message)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted.add(writer)
        self._background.spawn(partial(self._serve, reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (nbytes,) = _U64.unpack(await reader.readexactly(_U64.size))
                if not len(_PREFIX) + _VERB_NBYTES <= nbytes <= MAX_FRAME_NBYTES:
                    raise OSError(f"a frame of {nbytes} bytes; at most {MAX_FRAME_NBYTES} are read")
                frame = await reader.readexactly(nbytes)
                if not frame.startswith(_PREFIX):
                    raise OSError(f"a frame begins with {frame[:9]!r}, not {_PREFIX!r}")
                verb, body = frame[len(_PREFIX) :][:_VERB_NBYTES], frame[len(_PREFIX) + _VERB_NBYTES :]
                await self._obey(writer, verb, body)
        except asyncio.IncompleteReadError:
            return
        finally:
            self._accepted.discard(writer)
            writer.close()

    async def _obey(self, writer: asyncio.StreamWriter, verb: bytes, body: bytes) -> None:
        try:
            await self._core.reachable(BACKEND_SECONDS)
            if verb == b"LOAD":
                await self._core.load_soon(body)
            elif verb == b"SEND":
                await _write(writer, b"LOAD" + self._core.write_metadata(None))
            elif verb == b"INVL":
                await self._core.forget_soon(body.decode(errors="replace"))
            else:
                raise OSError(f"verb {verb!r} is none of LOAD, SEND, INVL")
        except NixlError as error:
            # The connection is for other messages too.
            logger.error(
                "agent %s: %s of metadata: %s %s", self._core.name, verb.decode(), error, getattr(error, "__notes__", "")
            )


async def _write(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(_U64.pack(len(_PREFIX) + len(message)) + _PREFIX + message)
    await writer.drain()

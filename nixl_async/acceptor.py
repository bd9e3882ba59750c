"""The listening side of control connections: takes strangers in, a bounded number at a time, and turns the rest away.

Whoever fills the room is who gives way: when one connection too many is on its way to authenticate, the oldest of the source
that has the most of them ends, those first that have said nothing. An honest peer needs a few round trips.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nixl_async.errors import ConfigurationError, NixlError, ProtocolError
from nixl_async.link import Link
from nixl_async.security import TLS, ConnectionLimits
from nixl_async.wire import FrameType, encode_frame

logger = logging.getLogger("nixl_async.acceptor")

BACKLOG = 4096
ACCEPT_SECONDS = 0.0005
"""How long connections are taken in before the loop goes on with other things."""
PAUSE_SECONDS = 0.1
"""How long none are taken in when the process has no more file descriptors."""
REPORT_SECONDS = 5.0
"""How often at most it is logged that connections come to nothing."""
MAX_SOURCES = 4096
SHUTDOWN_SECONDS = 1.0
TLS_RECORD = b"\x16\x03"
_RESET = struct.pack("ii", 1, 0)
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(slots=True, eq=False)
class _Stranger:
    source: str
    link: Link
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class _Allowance:
    """What a source may still ask for: connections, as of a time."""

    left: float
    at: float = field(default_factory=time.monotonic)

    def take(self, limits: ConnectionLimits) -> bool:
        now = time.monotonic()
        self.left = min(limits.burst, self.left + (now - self.at) * limits.per_second)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Acceptor:
    """Accepts control connections at an address.

    `make(deadline)` makes the link of a connection; `drop(link)` lets go of one that was never connected; `count()` tells how many
    links there are. Whoever owns the links calls `settled` when one has authenticated or ended.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        tls: TLS | None,
        make: Callable[[float], Link],
        drop: Callable[[Link], None],
        count: Callable[[], int],
    ) -> None:
        self.limits = limits
        self.turned_away = 0
        """How many connections were closed for want of room, so far."""
        self._tls, self._make, self._drop, self._count = tls, make, drop, count
        self._listeners: list[socket.socket] = []
        self._strangers: dict[Link, _Stranger] = {}
        self._sources: dict[str, dict[Link, None]] = {}
        self._allowances: OrderedDict[str, _Allowance] = OrderedDict()
        self._paused: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._unreported, self._report_after = 0, 0.0

    @property
    def half_open(self) -> int:
        """How many connections have not authenticated yet."""
        return len(self._strangers)

    async def open(self, host: str, port: int) -> tuple[str, int]:
        """Listen at `host`, all of its addresses at the same port; return the first address.

        Raises:
            ConfigurationError: the address cannot be used, or TLS has no certificate to be served with.
        """
        if self._tls is not None:
            self._tls.server_context()
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                sock = socket.socket(family, kind, protocol)
                self._listeners.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((address[0], port, *address[2:]))
                sock.setblocking(False)
                sock.listen(BACKLOG)
                port = sock.getsockname()[1]
        except OSError as error:
            self._close_listeners()
            raise ConfigurationError(f"cannot serve at {host}:{port}: {error}") from error
        self._watch()
        at = self._listeners[0].getsockname()
        return str(at[0]), int(at[1])

    def close(self) -> None:
        """Accept nothing more, and end what has not authenticated."""
        self._unwatch()
        if self._paused is not None:
            self._paused.cancel()
        self._close_listeners()
        for stranger in list(self._strangers.values()):
            self._turn_away(stranger)

    async def wait_closed(self) -> None:
        """Wait until nothing of it is left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def settled(self, link: Link, error: Exception | None = None) -> None:
        """Take note that a link has authenticated, or has ended; `error` says why if it came to nothing."""
        stranger = self._strangers.pop(link, None)
        if stranger is None:
            return
        links = self._sources[stranger.source]
        del links[link]
        if not links:
            del self._sources[stranger.source]
        if link.authenticated:
            # Only what comes to nothing counts: many peers may be behind one address.
            allowance = self._allowances.get(stranger.source)
            if allowance is not None:
                allowance.left += 1
        else:
            self._report(stranger.source, error)

    # Inside.

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        self._paused = None
        for sock in self._listeners:
            loop.add_reader(sock.fileno(), self._accept, sock)

    def _unwatch(self) -> None:
        loop = asyncio.get_running_loop()
        for sock in self._listeners:
            loop.remove_reader(sock.fileno())

    def _close_listeners(self) -> None:
        for sock in self._listeners:
            sock.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        until = time.monotonic() + ACCEPT_SECONDS
        while time.monotonic() < until:
            try:
                sock, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    logger.warning("a connection could not be accepted: %s", error)
                    return
                # It stays in the backlog, and the listening socket readable: without a pause this would spin.
                logger.warning("no connections are accepted for %g s: %s", PAUSE_SECONDS, error)
                self._unwatch()
                self._make_room()
                self._paused = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._watch)
                return
            self._take(sock, _source(address))

    def _take(self, sock: socket.socket, source: str) -> None:
        allowance = self._allowances.get(source)
        if allowance is None:
            allowance = self._allowances[source] = _Allowance(float(self.limits.burst))
            if len(self._allowances) > MAX_SOURCES:
                self._allowances.popitem(last=False)
        if not allowance.take(self.limits) or self._count() - len(self._strangers) >= self.limits.connections:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()
            self.turned_away += 1
            self._report(source, None)
            return
        if len(self._strangers) >= min(self.limits.half_open, self.limits.connections):
            self._make_room()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.limits.handshake_seconds
        link = self._make(deadline)
        stranger = self._strangers[link] = _Stranger(source, link)
        self._sources.setdefault(source, {})[link] = None
        stranger.task = loop.create_task(self._begin(sock, link, deadline))
        self._tasks.add(stranger.task)
        stranger.task.add_done_callback(partial(self._begun, stranger, sock))

    async def _begin(self, sock: socket.socket, link: Link, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        if self._tls is None:
            await loop.connect_accepted_socket(lambda: link, sock)
            return
        async with asyncio.timeout_at(deadline):
            # A TLS connection costs a quarter of a mebibyte: not for those that say nothing, or something else.
            await _readable(sock)
            if not TLS_RECORD.startswith(sock.recv(len(TLS_RECORD), socket.MSG_PEEK) or b"none"):
                sock.send(encode_frame(FrameType.REFUSED, b"this agent speaks TLS only: give both agents tls="))
                raise ProtocolError("it does not speak TLS")
            await loop.connect_accepted_socket(
                lambda: link,
                sock,
                ssl=self._tls.server_context(),
                ssl_handshake_timeout=self.limits.handshake_seconds,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )

    def _begun(self, stranger: _Stranger, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None and not task.cancelled():
            return
        if error is not None and not isinstance(error, OSError | NixlError):
            logger.error("a connection could not be taken in", exc_info=error)
        sock.close()
        self.settled(stranger.link, error if isinstance(error, Exception) else None)
        self._drop(stranger.link)

    def _make_room(self) -> None:
        """End the oldest connection of the source that has the most."""
        if not self._sources:
            return
        links = max(self._sources.values(), key=len)
        link = next((link for link in links if not link.greeted), next(iter(links)))
        self.turned_away += 1
        self._turn_away(self._strangers[link])

    def _turn_away(self, stranger: _Stranger) -> None:
        link = stranger.link
        if link.socket is not None:
            link.abort()
        elif stranger.task is not None:
            stranger.task.cancel()
        self.settled(link)

    def _report(self, source: str, error: Exception | None) -> None:
        now = time.monotonic()
        self._unreported += 1
        if now < self._report_after:
            return
        self._report_after = now + REPORT_SECONDS
        logger.warning(
            "%d connections came to nothing, the last from %s: %s",
            self._unreported,
            source,
            "it was turned away for want of room" if error is None else str(error)[:200],
        )
        self._unreported = 0


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    number = sock.fileno()
    loop.add_reader(number, _resolve, readable)
    try:
        await readable
    finally:
        loop.remove_reader(number)


def _source(address: Any) -> str:
    """Return what a connection counts for: its IPv4 address, or the /64 that its IPv6 address is in."""
    if not isinstance(address, tuple) or ":" not in address[0]:
        return str(address[0]) if isinstance(address, tuple) else "this host"
    found = ipaddress.IPv6Address(address[0].partition("%")[0])
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))

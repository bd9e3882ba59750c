"""One control connection to a peer: an asyncio protocol around `nixl_async.wire`.

The kernel watches the connection (TCP keepalive and user timeout): the death of the peer's process shows at once, a
silent network within three seconds, and a peer that is merely busy or stopped stays connected. No timer of ours runs
while a link is idle.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from typing import Any, Protocol, cast

from nixl_async.errors import AuthenticationError, ClosedError, ConfigurationError, NixlError, PeerLost, ProtocolError
from nixl_async.notifications import CREDIT_NBYTES, MAX_NOTIFICATION_NBYTES, OVERHEAD_NBYTES, WINDOW_NBYTES
from nixl_async.wire import MAX_FRAME_NBYTES, FrameReader, FrameType, Greeting, Handshake, encode_frame

logger = logging.getLogger("nixl_async.link")

HANDSHAKE_SECONDS = 10.0
SILENCE_SECONDS = 3
_U64 = struct.Struct("<Q")


class LinkOwner(Protocol):
    """What a link reports to: the agent's membership."""

    def link_authenticated(self, link: Link) -> None:
        """Take note that the other side proved that it knows the token; its metadata follows."""

    def link_frame(self, link: Link, kind: FrameType, payload: bytes) -> None:
        """Take a frame of an authenticated link."""

    def link_closed(self, link: Link, error: Exception | None) -> None:
        """Take note that the connection ended; `error` is None after an orderly leave."""


class Link(asyncio.Protocol):
    """A connection to one peer, from the first byte to the last."""

    def __init__(self, owner: LinkOwner, greeting: Greeting, token: bytes | None, *, connecting: bool) -> None:
        self.connecting = connecting
        self.joined: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        """Resolved with the peer when it has joined; fails when the link does not get so far."""
        self.joined.add_done_callback(_consume)
        self.leaving = False
        self.superseded = False
        self.told = False
        """Whether our metadata was sent: from then on the other side must hear of every change to it."""
        self.closed = False
        self._owner = owner
        self._handshake = Handshake(greeting, token, connecting=connecting)
        self.authenticated = False
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held: deque[tuple[FrameType, bytes]] | None = None
        # Notifications sent and not yet consumed by the peer, in bytes, and who waits for room.
        self._outstanding = self._consumed = 0
        self._room: deque[asyncio.Future[None]] = deque()

    @property
    def other(self) -> Greeting:
        """Who the other side is; known after its greeting."""
        assert self._handshake.other is not None
        return self._handshake.other

    @property
    def host(self) -> str | None:
        """The address the other side is reached at."""
        address = self._transport.get_extra_info("peername") if self._transport else None
        return None if not address else str(address[0])

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        self._transport = cast("asyncio.Transport", transport)
        _watch(self._transport.get_extra_info("socket"))
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._too_slow)
        if self.connecting:
            self._transport.write(self._handshake.own.encode())

    def data_received(self, data: bytes) -> None:
        """Take bytes from the network."""
        try:
            for kind, payload in self._reader.feed(data):
                self._frame(kind, payload)
                if self.closed or self._error is not None:
                    return
        except NixlError as error:
            self.fail(error)

    def eof_received(self) -> bool:
        """Close our half too."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end once."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        error = self._error
        if error is None and not self.leaving:
            name = self._handshake.other.name if self._handshake.other else "the other side"
            error = PeerLost(f"{name!r} closed the connection" if exc is None else f"connection to {name!r} broke: {exc}")
        if not self.joined.done():
            self.joined.set_exception(error or ClosedError("the connection was closed"))
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_exception(error or ClosedError("the peer left"))
        if not self.authenticated and not self.connecting and not self.leaving:
            logger.warning("a connection from %s came to nothing: %s", self.host, error)
        self._owner.link_closed(self, error)

    # For the owner.

    def send(self, frame: bytes) -> None:
        """Send a frame; dropped when the connection has ended (its end is reported on its own)."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def hold(self) -> None:
        """Keep incoming frames back until `unhold`."""
        if self._held is None:
            self._held = deque()
            if self._transport is not None:
                self._transport.pause_reading()

    def unhold(self) -> None:
        """Deliver what was kept back."""
        held, self._held = self._held, None
        while held and not self.closed:
            self._deliver(*held.popleft())
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """End the connection after what was sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once, whatever is still to be sent."""
        self.leaving = True
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: Exception) -> None:
        """End the connection because of `error`, telling the other side why."""
        if self._error is not None or self.closed:
            return
        self._error = error
        if isinstance(error, NixlError) and not isinstance(error, PeerLost):
            self.send(encode_frame(FrameType.REFUSED, str(error).encode()[:1024]))
        self.close()

    def notify_nowait(self, payload: bytes) -> bool:
        """Send a notification if the peer's window has room; return whether it was sent."""
        nbytes = len(payload) + OVERHEAD_NBYTES
        if self._room or self._full(nbytes):
            return False
        self._outstanding += nbytes
        self.send(encode_frame(FrameType.NOTIFY, payload))
        return True

    async def notify(self, payload: bytes) -> None:
        """Send a notification, waiting while the peer's window is full; order is kept.

        Raises:
            PeerLost: the connection ended before it was sent.
        """
        if len(payload) > MAX_NOTIFICATION_NBYTES:
            raise ConfigurationError(
                f"a notification of {len(payload)} bytes is too large; at most {MAX_NOTIFICATION_NBYTES} are allowed:"
                " move large data with a transfer"
            )
        nbytes = len(payload) + OVERHEAD_NBYTES
        first = True
        while self._full(nbytes) or (first and self._room):
            if self.closed:
                break
            waiter = asyncio.get_running_loop().create_future()
            if first:
                self._room.append(waiter)
            else:
                self._room.appendleft(waiter)
            first = False
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._room:
                    self._room.remove(waiter)
                else:
                    self._wake_next()
                raise
        if self.closed:
            raise PeerLost("the peer is gone; the notification was not sent")
        self._outstanding += nbytes
        self.send(encode_frame(FrameType.NOTIFY, payload))
        self._wake_next()

    def _full(self, nbytes: int) -> bool:
        # What the peer has consumed and not told of yet is below CREDIT_NBYTES: a payload larger than the window may go then.
        return self._outstanding >= CREDIT_NBYTES and self._outstanding + nbytes > WINDOW_NBYTES

    def consumed(self, nbytes: int) -> None:
        """Take note that `nbytes` bytes of the peer's notifications were consumed; the peer is told of many at once."""
        self._consumed += nbytes
        if self._consumed >= CREDIT_NBYTES:
            self.send(encode_frame(FrameType.CREDIT, _U64.pack(self._consumed)))
            self._consumed = 0

    # Inside.

    def _frame(self, kind: FrameType, payload: bytes) -> None:
        if kind is FrameType.REFUSED:
            text = payload.decode(errors="replace")
            raise (ProtocolError if self.authenticated else AuthenticationError)(f"the other side refused: {text}")
        if self.authenticated:
            self._deliver(kind, payload)
        elif kind is FrameType.HELLO and self._handshake.other is None:
            self._handshake.greeted(payload)
            if not self.connecting:
                self.send(self._handshake.own.encode())
            # The connecting side proves first: a stranger learns nothing but our name.
            if self.connecting:
                self.send(encode_frame(FrameType.PROOF, self._handshake.proof()))
        elif kind is FrameType.PROOF and self._handshake.other is not None:
            self._handshake.verify(payload)
            if not self.connecting:
                self.send(encode_frame(FrameType.PROOF, self._handshake.proof()))
            self.authenticated = True
            self._reader.limit = MAX_FRAME_NBYTES
            if self._timer is not None:
                self._timer.cancel()
            self._owner.link_authenticated(self)
        else:
            raise ProtocolError(f"unexpected {kind.name} before authentication")

    def _deliver(self, kind: FrameType, payload: bytes) -> None:
        if self._held is not None:
            self._held.append((kind, payload))
        elif kind is FrameType.CREDIT:
            if len(payload) != _U64.size:
                raise ProtocolError(f"a CREDIT frame has {len(payload)} bytes; it must have {_U64.size}")
            self._outstanding = max(0, self._outstanding - _U64.unpack(payload)[0])
            self._wake_next()
        else:
            self._owner.link_frame(self, kind, payload)

    def _wake_next(self) -> None:
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _too_slow(self) -> None:
        self.fail(ProtocolError(f"the handshake took longer than {HANDSHAKE_SECONDS:g} s"))


def _watch(sock: Any) -> None:
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_SECONDS - 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)


def _consume(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()

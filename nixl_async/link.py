"""One control connection to a peer: an asyncio protocol around `nixl_async.wire`.

The kernel tells at once that the peer's process has ended. Whether a peer that says nothing is stopped or out of reach
`nixl_async.liveness` finds out, for all links together.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import struct
from collections import deque
from typing import Any, Protocol, cast

from nixl_async.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    InternalError,
    NixlError,
    PeerLost,
    ProtocolError,
)
from nixl_async.liveness import Liveness, Pulse, Vigil, reset_on_close, watch
from nixl_async.notifications import CREDIT_NBYTES, MAX_NOTIFICATION_NBYTES, OVERHEAD_NBYTES, WINDOW_NBYTES
from nixl_async.security import ConnectionLimits, Credentials
from nixl_async.wire import MAX_FRAME_NBYTES, FrameReader, FrameType, Greeting, Handshake, encode_frame

logger = logging.getLogger("nixl_async.link")

CLOSE_SECONDS = 1.0
"""How long a connection that is given up may take to send what is queued, the reason included."""
MAX_UNSENT_NBYTES = MAX_FRAME_NBYTES + (64 << 20)
"""What may wait to be sent to a peer that does not read."""
HIGH_WATER_NBYTES = 16 << 10
"""What the transport takes of that before the rest is kept here."""
MAX_UNREAD_NBYTES = 4 * WINDOW_NBYTES + MAX_NOTIFICATION_NBYTES
"""What a peer may have sent that nobody here has consumed: more than its window allows in any case."""
MAX_KEPT_NBYTES = 64 << 20
"""What may be kept of a peer that has begun to tell its regions, until it has told all."""
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")
_U64 = struct.Struct("<Q")


class LinkOwner(Protocol):
    """What a link reports to: the agent's membership."""

    def link_authenticated(self, link: Link) -> None:
        """Take note that the other side proved who it is; its metadata follows."""

    def link_frame(self, link: Link, kind: FrameType, payload: bytes) -> None:
        """Take a frame of an authenticated link."""

    def link_closed(self, link: Link, error: Exception | None) -> None:
        """Take note that the connection ended; `error` is None after an orderly leave."""

    def link_suspect(self, link: Link, reason: str) -> None:
        """Take note that the other side says nothing."""

    def link_recovered(self, link: Link) -> None:
        """Take note that it does again."""


class Link(asyncio.Protocol):
    """A connection to one peer, from the first byte to the last."""

    def __init__(
        self,
        owner: LinkOwner,
        greeting: Greeting,
        credentials: Credentials,
        *,
        connecting: bool,
        pulse: Pulse | None = None,
        deadline: float | None = None,
        expected: str | None = None,
    ) -> None:
        """Make a link that is not connected yet.

        `deadline`: when the handshake must be over, by the loop's clock. `expected`: the name that the other side must have.
        """
        loop = asyncio.get_running_loop()
        self.connecting = connecting
        self.joined: asyncio.Future[Any] = loop.create_future()
        """Resolved with the peer when it has joined; fails when the link does not get so far."""
        self.joined.add_done_callback(_consume)
        self.leaving = False
        self.superseded = False
        self.told = False
        """Whether our metadata was sent: from then on the other side must hear of every change to it."""
        self.announced = False
        """Whether all of the other side's metadata has come."""
        self.our_loss = self.their_loss = 0
        """After which loss of the other side by us, and of us by it, the two tell each other of themselves; see `rejoining`."""
        self.closed = False
        self.trace = b""
        """The trace context of the notification that comes next."""
        self.turned_away = False
        """Whether the other side closed the connection before saying anything: it may have too many of them at present."""
        self.vigil = Vigil(pulse.liveness if pulse is not None else Liveness())
        self.heard = False
        self._pulse = pulse
        self._owner = owner
        self._credentials = credentials
        self._expected = expected
        self._deadline = loop.time() + ConnectionLimits().handshake_seconds if deadline is None else deadline
        self._handshake = Handshake(greeting, credentials.secrets if credentials.has_token else None, connecting=connecting)
        self.authenticated = False
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._held: deque[tuple[FrameType, bytes]] | None = None
        self._kept: deque[tuple[FrameType, bytes]] = deque()
        self._kept_nbytes = 0
        # Frames that wait to be sent with others, and whoever waits until the transport takes more.
        self._posted: list[bytes] = []
        # What the transport has no room for. It keeps each write apart, and from Python 3.12 on counts them all at each one.
        self._backlog = bytearray()
        self._full_pipe: asyncio.Future[None] | None = None
        # Notifications sent and not yet consumed by the peer, in bytes, and who waits for room.
        self._outstanding = self._consumed = 0
        self._room: deque[asyncio.Future[None]] = deque()
        self._unread = 0
        self._probes: dict[bytes, asyncio.Future[bool]] = {}
        self._next_probe = 0

    @property
    def other(self) -> Greeting:
        """Who the other side is; known after its greeting."""
        assert self._handshake.other is not None
        return self._handshake.other

    @property
    def greeted(self) -> bool:
        """Whether the other side has said a name."""
        return self._handshake.other is not None

    @property
    def names_proved(self) -> bool:
        """Whether the other side's name is proved by its credentials, and not only claimed by one who knows a shared token."""
        return self._credentials.binds_names(connecting=self.connecting)

    @property
    def socket(self) -> Any:
        """The connection's socket, `None` when there is none."""
        return self._transport.get_extra_info("socket") if self._transport is not None else None

    @property
    def host(self) -> str | None:
        """The address the other side is reached at."""
        address = self._transport.get_extra_info("peername") if self._transport else None
        return None if not address else str(address[0])

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_NBYTES)
        watch(self.socket, self.vigil.limits)
        self._timer = asyncio.get_running_loop().call_at(self._deadline, self._too_slow)
        if self.connecting:
            self._transport.write(self._handshake.own.encode())

    def data_received(self, data: bytes) -> None:
        """Take bytes from the network."""
        self.heard = True
        try:
            if not self.greeted and data[:2] in _TLS_RECORDS:
                raise ProtocolError("the other side speaks TLS and this one does not: give both agents tls=…")
            for kind, payload in self._reader.feed(data):
                self._frame(kind, payload)
                if self.closed or self._error is not None:
                    return
        except NixlError as error:
            self.fail(error)
        except Exception as error:
            logger.exception("a frame from %s could not be handled", self.host)
            self.fail(InternalError(f"a frame could not be handled: {type(error).__name__}"))

    def eof_received(self) -> bool:
        """Close our half too."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end once."""
        if self.closed:
            return
        self.closed = True
        self.resume_writing()
        if self._timer is not None:
            self._timer.cancel()
        if self._pulse is not None:
            self._pulse.discard(self)
        error = self._error
        if error is None and not self.leaving:
            name = self._handshake.other.name if self._handshake.other else "the other side"
            text = f"{name!r} closed the connection" if exc is None else f"connection to {name!r} broke: {exc}"
            if isinstance(exc, ssl.SSLError) and not self.authenticated:
                error = AuthenticationError(f"one side does not believe the other's certificate, or it shows none: {exc}")
            else:
                self.turned_away = not self.greeted
                error = PeerLost(text, retryable=not self.authenticated)
        if not self.joined.done():
            self.joined.set_exception(error or ClosedError("the connection was closed"))
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_exception(error or ClosedError("the peer left"))
        for probe in self._probes.values():
            if not probe.done():
                probe.set_result(False)
        self._owner.link_closed(self, error)

    def pause_writing(self) -> None:
        """Take note that the transport holds much that was not sent."""
        self._full_pipe = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """Take note that it takes more."""
        if self._full_pipe is not None and not self._full_pipe.done():
            self._full_pipe.set_result(None)
        self._full_pipe = None
        if self._backlog and self._transport is not None and not self._transport.is_closing():
            backlog, self._backlog = self._backlog, bytearray()
            self._transport.write(bytes(backlog))

    # For the owner.

    def send(self, frame: bytes) -> None:
        """Send a frame; dropped when the connection has ended (its end is reported on its own)."""
        if self._posted:
            posted, self._posted = self._posted, []
            frame = b"".join([*posted, frame])
        if self._transport is not None and not self._transport.is_closing():
            if self._full_pipe is None:
                self._transport.write(frame)
            else:
                self._backlog += frame
            if len(self._backlog) > MAX_UNSENT_NBYTES:
                self.give_up(f"it has left {MAX_UNSENT_NBYTES} bytes unread")

    def post(self, frame: bytes) -> None:
        """Let a frame go with the next one that is sent, before it; `flush` sends it at the latest."""
        self._posted.append(frame)

    def flush(self) -> None:
        """Send what was posted."""
        if self._posted:
            self.send(b"")

    async def room(self) -> None:
        """Wait while the other side is behind in reading, or until the connection ends."""
        while self._full_pipe is not None and not self.closed:
            await asyncio.shield(self._full_pipe)

    def keep(self, kind: FrameType, payload: bytes) -> None:
        """Set a frame aside that `unhold`, which comes later, delivers first.

        Raises:
            ProtocolError: that is too much.
        """
        self._kept.append((kind, payload))
        if kind is FrameType.NOTIFY:
            # It is counted when it is delivered.
            self._unread -= len(payload) + OVERHEAD_NBYTES
        self._kept_nbytes += len(payload) + OVERHEAD_NBYTES
        if self._kept_nbytes > MAX_KEPT_NBYTES:
            raise ProtocolError(f"{self._kept_nbytes} bytes came before all of the metadata; at most {MAX_KEPT_NBYTES} may")

    def hold(self) -> None:
        """Keep incoming frames back until `unhold`."""
        if self._held is None:
            self._held, self._kept = self._kept, deque()
            self._kept_nbytes = 0
            if self._transport is not None and not self._transport.is_closing():
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
            if self._backlog and not self._transport.is_closing():
                self._transport.write(bytes(self._backlog))
                self._backlog.clear()
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
            self.send(encode_frame(FrameType.REFUSED, str(error).encode(errors="replace")[:1024]))
        self.close()
        if self._transport is not None and self._transport.get_write_buffer_size():
            # To one that does not read, closing would take for ever.
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    # For the pulse.

    def ping(self) -> None:
        """Ask the other side to say something."""
        self.send(encode_frame(FrameType.PING))

    def doubt(self, reason: str) -> None:
        """Report that the other side says nothing."""
        self._owner.link_suspect(self, reason)

    def believe(self) -> None:
        """Report that it does again."""
        self._owner.link_recovered(self)

    def give_up(self, reason: str) -> None:
        """End the connection at once: the peer is out of reach."""
        if self._error is None and not self.closed:
            self._error = PeerLost(f"peer {self.other.name!r} is lost: {reason}", peer=self.other.name)
        if self._transport is not None:
            reset_on_close(self.socket)
            self._transport.abort()

    async def answers(self, seconds: float) -> bool:
        """Tell whether the other side's program answers within `seconds`."""
        if self.closed:
            return False
        self._next_probe += 1
        mark = _U64.pack(self._next_probe)
        probe: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._probes[mark] = probe
        self.send(encode_frame(FrameType.PING, mark))
        try:
            async with asyncio.timeout(seconds):
                return await probe
        except TimeoutError:
            return False
        finally:
            del self._probes[mark]

    # Notifications.

    def notify_nowait(self, payload: bytes, trace: bytes = b"") -> bool:
        """Send a notification if the peer's window has room; return whether it was sent."""
        nbytes = len(payload) + OVERHEAD_NBYTES
        if self._room or self._full(nbytes) or self.superseded:
            return False
        self._outstanding += nbytes
        self.send(_notification(payload, trace))
        return True

    async def notify(self, payload: bytes, trace: bytes = b"") -> None:
        """Send a notification, waiting while the peer's window is full; order is kept.

        `trace` is the trace context that it belongs to; only for a peer that announced that it knows them.

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
            if self.closed or self.superseded:
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
        if self.closed or self.superseded:
            raise PeerLost("the peer is gone; the notification was not sent")
        self._outstanding += nbytes
        self.send(_notification(payload, trace))
        self._wake_next()

    def _full(self, nbytes: int) -> bool:
        # What the peer has consumed and not told of yet is below CREDIT_NBYTES: a payload larger than the window may go then.
        return self._outstanding >= CREDIT_NBYTES and self._outstanding + nbytes > WINDOW_NBYTES

    def consumed(self, nbytes: int) -> None:
        """Take note that `nbytes` bytes of the peer's notifications were consumed; the peer is told of many at once."""
        self._unread = max(0, self._unread - nbytes)
        self._consumed += nbytes
        if self._consumed >= CREDIT_NBYTES:
            self.send(encode_frame(FrameType.CREDIT, _U64.pack(self._consumed)))
            self._consumed = 0

    # Inside.

    def _frame(self, kind: FrameType, payload: bytes) -> None:
        if kind is FrameType.REFUSED:
            text = payload.decode(errors="replace")
            raise (ProtocolError if self.joined.done() else AuthenticationError)(f"the other side refused: {text}")
        if self.authenticated:
            self._deliver(kind, payload)
        elif kind is FrameType.HELLO and self._handshake.other is None:
            self._handshake.greeted(payload)
            self._check_name()
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
            if self._pulse is not None:
                self._pulse.add(self)
            self._owner.link_authenticated(self)
        else:
            raise ProtocolError(f"unexpected {kind.name} before authentication")

    def _deliver(self, kind: FrameType, payload: bytes) -> None:
        if kind is FrameType.PING:
            self.send(encode_frame(FrameType.PONG, payload))
        elif kind is FrameType.PONG:
            probe = self._probes.get(payload)
            if probe is not None and not probe.done():
                probe.set_result(True)
        elif self._held is not None:
            self._held.append((kind, payload))
        elif kind is FrameType.CREDIT:
            if len(payload) != _U64.size:
                raise ProtocolError(f"a CREDIT frame has {len(payload)} bytes; it must have {_U64.size}")
            self._outstanding = max(0, self._outstanding - _U64.unpack(payload)[0])
            self._wake_next()
        else:
            if kind is FrameType.NOTIFY:
                self._unread += len(payload) + OVERHEAD_NBYTES
                if self._unread > MAX_UNREAD_NBYTES:
                    raise ProtocolError(f"{self._unread} bytes of notifications are unread; the sender disregards its window")
            self._owner.link_frame(self, kind, payload)

    def _check_name(self) -> None:
        name, tls = self.other.name, self._credentials.tls
        if tls is not None and (self.connecting or tls.mutual):
            assert self._transport is not None
            tls.check_name(self._transport.get_extra_info("peercert"), name)
        if self._expected is not None and name != self._expected:
            raise PeerLost(f"agent {name!r} answers where {self._expected!r} is expected", peer=self._expected, retryable=True)

    def _wake_next(self) -> None:
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _too_slow(self) -> None:
        if self.connecting:
            # Whoever was dialled does not answer, as one that cannot be dialled does not.
            name = repr(self._expected) if self._expected is not None else "the agent"
            why = f"{name} did not finish the handshake in time: it is stopped, overloaded, or no agent"
            self.fail(PeerLost(why, peer=self._expected, retryable=True))
        else:
            self.fail(ProtocolError("the handshake took too long"))


def _notification(payload: bytes, trace: bytes) -> bytes:
    frame = encode_frame(FrameType.NOTIFY, payload)
    return encode_frame(FrameType.CONTEXT, trace) + frame if trace else frame


def _consume(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()

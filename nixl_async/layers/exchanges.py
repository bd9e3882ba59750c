"""The messages by which two agents agree on layers: who wants to push or pull, what has arrived, who gives up, who is quiet.

They travel as notifications that begin with `PREFIX`, followed by JSON, and no consumer of notifications sees them. An exchange is
opened by one side (who pushes, or who pulls), under a number of its own:

    open    → k: "push" or "pull", r: the request, n: how many layers; have: what the puller has already; window: whether the pusher
              has one
    take    ← the other side takes part; have: what has arrived already, confirmed: what of it has been used
    refuse  ← it does not; why
    layers    l: pushed, they are in place; offered, they may be read
    confirm   l: used by the consumer; a window of unconfirmed layers is the back-pressure
    done      the puller has read everything
    end       why: the sender takes part no longer, and moves nothing any more; where the other side moves bytes, it answers
    quiet     that it does so no longer either

Every message has x, the exchange's number, and m, whether the sender opened it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from nixl_async.errors import Aborted, ClosedError, ConfigurationError, NixlError, PeerLost
from nixl_async.layers.plan import MAX_LAYERS, check_request
from nixl_async.transfer import TrafficClass

if TYPE_CHECKING:
    from nixl_async.descriptors import Places
    from nixl_async.handle import PreparedTransfer, Transfer
    from nixl_async.membership import Membership
    from nixl_async.notifications import Notification
    from nixl_async.observers import Observers
    from nixl_async.streams import Streams

logger = logging.getLogger("nixl_async.layers")

PREFIX = b"\x00nixl_async.layers\x00"
MAX_WAITING = 65536
"""How many exchanges may wait for somebody here to take part; more are refused."""
MAX_REMEMBERED = 4096
"""How many ended requests are remembered, to answer who comes too late."""


class Sender(Protocol):
    """What the layers need of an agent."""

    async def prepare(self, src: Places, dst: Places, *, backend: str | None = None, once: bool = False) -> PreparedTransfer:
        """See `Agent.prepare`."""

    def submit(
        self,
        src: PreparedTransfer,
        *,
        notify: bytes | None = None,
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        after: object = None,
        verify: str | bool | None = None,
    ) -> Transfer:
        """See `Agent.submit`."""


class End(Protocol):
    """One side of an exchange."""

    def take(self, kind: str, message: dict[str, Any]) -> None:
        """Act on a message of the other side."""

    def lost(self, error: NixlError) -> None:
        """Take note that the other side, or this agent, is gone."""


class Door(End, Protocol):
    """A side that waits for the other one to open an exchange for `request`; where `peer` is None, any may."""

    kind: str
    request: str

    @property
    def peer(self) -> str | None:
        """Who may open it."""

    def accept(self, peer: str, number: int, message: dict[str, Any]) -> str | None:
        """Take part and return None, or return why not."""


class Exchanges:
    """The pushes and pulls of one agent, by peer and number."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        membership: Membership,
        streams: Streams,
        sender: Sender,
        observers: Observers,
    ) -> None:
        self.loop = loop
        self._observers = observers
        self.sender = sender
        self.streams = streams
        self._membership = membership
        self._ends: dict[tuple[str, bool, int], End] = {}
        self._doors: dict[tuple[str, str], list[Door]] = {}
        # What peers opened and nobody here has taken: (kind, request) to (peer, number) to the message.
        self._waiting: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
        self._over: dict[tuple[str, str], tuple[str | None, str]] = {}
        self._next = 0
        self._outgoing: dict[str, deque[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._idle = asyncio.Event()
        membership.inbox.intercept(PREFIX, self._received)

    def close(self) -> None:
        """End every exchange."""
        self._closed = True
        for end in list(self._ends.values()):
            end.lost(ClosedError("the agent closes"))
        for doors in self._doors.values():
            for door in list(doors):
                door.lost(ClosedError("the agent closes"))
        for task in self._tasks:
            task.cancel()
        self._tell_idle()

    @property
    def busy(self) -> bool:
        """Whether somebody here takes part in an exchange, waits for one, or messages are still to be sent."""
        return not self._closed and bool(self._ends or self._doors or self._outgoing)

    async def idle(self) -> None:
        """Wait until nobody does, or everything was ended."""
        while self.busy:
            self._idle.clear()
            await self._idle.wait()

    def _tell_idle(self) -> None:
        if not self.busy:
            self._idle.set()

    def note(self, kind: str, request: str, layers: Iterable[int]) -> None:
        """Tell whoever listens that layers are ready, have landed at the peer or have arrived."""
        if self._observers.noted is not None:
            for layer in layers:
                self._observers.noted(kind, request, layer)

    def check_peer(self, name: str) -> None:
        """Raise unless the peer is connected and knows layers.

        Raises:
            ClosedError: the agent is closed.
            PeerLost: it is not connected.
            ConfigurationError: it is a stock NIXL agent.
        """
        if self._closed:
            raise ClosedError("the agent is closed")
        if self._membership.get(name).link is None:
            raise ConfigurationError(
                f"peer {name!r} is a stock NIXL agent, which knows no layers: use `transfer` with `notify`"
            )

    # Opening and taking part.

    def begin(self, peer: str, end: End) -> int:
        """Give a new exchange its number."""
        self._next += 1
        self._ends[peer, True, self._next] = end
        return self._next

    def adopt(self, peer: str, number: int, end: End) -> None:
        """Let `end` take part in an exchange that the peer opened."""
        self._ends[peer, False, number] = end

    def forget(self, peer: str, number: int, *, mine: bool) -> None:
        """Take part in an exchange no longer."""
        self._ends.pop((peer, mine, number), None)
        self._tell_idle()

    def open_door(self, door: Door) -> None:
        """Wait for somebody to open an exchange, or take one that waits already."""
        if self._closed:
            raise ClosedError("the agent is closed")
        key = door.kind, door.request
        self._over.pop(key, None)
        self._doors.setdefault(key, []).append(door)
        waiting = self._waiting.get(key, {})
        for peer, number in list(waiting):
            if door.peer in (None, peer):
                self._enter(door, peer, number, waiting.pop((peer, number)))
        if not waiting:
            self._waiting.pop(key, None)

    def close_door(self, door: Door, why: str) -> None:
        """Wait no longer; `why` is told to who comes later, empty if the request is complete."""
        key = door.kind, door.request
        doors = self._doors.get(key, [])
        if door in doors:
            doors.remove(door)
        if not doors:
            self._doors.pop(key, None)
            self._tell_idle()
        self._over.pop(key, None)
        self._over[key] = door.peer, why
        if len(self._over) > MAX_REMEMBERED:
            del self._over[next(iter(self._over))]

    # Messages.

    def post(self, peer: str, kind: str, number: int, *, mine: bool, **fields: Any) -> None:
        """Send a message; one to a peer that is gone is dropped. Order is kept."""
        payload = encode(kind, number, mine=mine, **fields)
        queue = self._outgoing.get(peer)
        if queue is not None:
            queue.append(payload)
        elif peer in self._membership.peers and not self._send(peer, kind, payload) and not self._closed:
            self._outgoing[peer] = deque([payload])
            task = self.loop.create_task(self._drain(peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _send(self, peer: str, kind: str, payload: bytes) -> bool:
        trace = self._observers.trace
        return self._membership.notify_nowait(peer, payload, b"" if trace is None or kind != "open" else trace(None))

    async def _drain(self, peer: str) -> None:
        queue = self._outgoing[peer]
        try:
            while queue:
                await self._membership.notify(peer, queue[0])
                queue.popleft()
        except NixlError as error:
            logger.info("messages to %s are dropped: %s", peer, error)
        finally:
            del self._outgoing[peer]
            self._tell_idle()

    def _received(self, notification: Notification) -> None:
        peer = notification.peer
        try:
            message = json.loads(notification.payload[len(PREFIX) :])
            kind, number, mine = message["t"], message["x"], message["m"]
            if not isinstance(kind, str) or not isinstance(number, int) or not isinstance(mine, bool):
                raise TypeError(f"{kind!r}, {number!r}, {mine!r}")
            if kind == "open":
                message["trace"] = notification.trace
                self._opened(peer, number, message)
                return
            end = self._ends.get((peer, not mine, number))
            if end is not None:
                end.take(kind, message)
            elif kind == "done":
                for waiting in self._waiting.values():
                    if (peer, number) in waiting:
                        waiting[peer, number]["done"] = True
            elif kind == "end":
                self._drop_waiting(lambda who, x: (who, x) == (peer, number))
                self.post(peer, "quiet", number, mine=not mine)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("peer %s sent a malformed message about layers: %r", peer, error)

    def _opened(self, peer: str, number: int, message: dict[str, Any]) -> None:
        kind, request, count = message["k"], check_request(message["r"]), message["n"]
        if kind not in ("push", "pull") or type(count) is not int or not 1 <= count <= MAX_LAYERS:
            raise ValueError(f"kind {kind!r}, {count!r} layers")
        if self._closed:
            self.post(peer, "refuse", number, mine=False, why="the agent closes")
            return
        key = kind, request
        for door in self._doors.get(key, []):
            if door.peer in (None, peer):
                self._enter(door, peer, number, message)
                return
        over = self._over.get(key)
        if over is not None and over[0] in (None, peer):
            if over[1] or kind == "pull":
                self.post(peer, "refuse", number, mine=False, why=over[1] or "the offer is over")
            else:
                everything = list(range(count))
                self.post(peer, "take", number, mine=False, have=everything, confirmed=everything)
            return
        if sum(map(len, self._waiting.values())) >= MAX_WAITING:
            self.post(peer, "refuse", number, mine=False, why=f"{MAX_WAITING} exchanges wait here already")
            return
        self._waiting.setdefault(key, {})[peer, number] = message

    def _enter(self, door: Door, peer: str, number: int, message: dict[str, Any]) -> None:
        why = door.accept(peer, number, message)
        if why is not None:
            self.post(peer, "refuse", number, mine=False, why=why)

    # What the agent reports.

    def peer_gone(self, peer: str, error: PeerLost) -> None:
        """End every exchange with a peer."""
        self._drop_waiting(lambda who, x: who == peer)
        for key in [key for key in self._ends if key[0] == peer]:
            if (end := self._ends.pop(key, None)) is not None:
                end.lost(PeerLost(str(error), peer=peer))
        for door in [door for doors in self._doors.values() for door in doors if door.peer == peer]:
            door.lost(PeerLost(str(error), peer=peer))
        self._tell_idle()

    def _drop_waiting(self, gone: Callable[[str, int], bool]) -> None:
        for key, waiting in list(self._waiting.items()):
            for peer, number in [one for one in waiting if gone(*one)]:
                del waiting[peer, number]
            if not waiting:
                del self._waiting[key]


def encode(kind: str, number: int, *, mine: bool, **fields: Any) -> bytes:
    """Return a message as it travels."""
    return PREFIX + json.dumps({"t": kind, "x": number, "m": mine, **fields}, separators=(",", ":")).encode()


def numbers(message: dict[str, Any], field: str, count: int) -> list[int]:
    """Return a list of layers out of a message.

    Raises:
        ValueError, TypeError: it holds something else.
    """
    found = message.get(field, [])
    if not isinstance(found, list) or not all(type(one) is int and 0 <= one < count for one in found):
        raise ValueError(f"{field}={str(found)[:80]} with {count} layers")
    return found


def gave_up(peer: str, request: str, message: dict[str, Any]) -> Aborted:
    """Return the error for a message in which the other side gives up or refuses."""
    return Aborted(f"peer {peer!r} gave up request {request!r}: {str(message.get('why', ''))[:1024]}", peer=peer)


def reason(error: BaseException) -> str:
    """Return what the other side is told of an error."""
    return f"{type(error).__name__}: {error}"[:1024]

"""Notifications on the receiving side: a bounded inbox with any number of independent consumers.

Every consumer whose filter matches gets each notification, in the order its peer sent them. One that no consumer wants waits
in the backlog for the first that does. A notification counts against its sender's window until every consumer it was given to
has taken it, so that a slow consumer makes senders wait: nothing is dropped.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nixl_async.errors import ClosedError

WINDOW_NBYTES = 32 << 20
"""What one sender may have sent and not yet seen consumed, in bytes; a larger payload travels alone."""
CREDIT_NBYTES = WINDOW_NBYTES // 8
"""How much must have been consumed before the sender is told: a small notification costs no answer."""
OVERHEAD_NBYTES = 64
"""What an empty notification counts for."""
MAX_NOTIFICATION_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Notification:
    """A message from a peer: the sender's name and the bytes it gave; `trace` is for `nixl_async.tracing`."""

    peer: str
    payload: bytes
    trace: bytes = field(default=b"", compare=False, repr=False)


@dataclass(slots=True, eq=False)
class _Message:
    sequence: int
    notification: Notification
    pending: int = 0
    taken: bool = False


@dataclass(slots=True, eq=False)
class _Queue:
    peer: str | None
    prefix: bytes
    messages: deque[_Message] = field(default_factory=deque)
    waiters: deque[asyncio.Future[None]] = field(default_factory=deque)
    closed: bool = False

    def wants(self, notification: Notification) -> bool:
        return (self.peer is None or self.peer == notification.peer) and notification.payload.startswith(self.prefix)

    def wake(self) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


class Inbox:
    """Holds what peers sent until it is consumed. `consumed(peer, nbytes)` is called to reopen the sender's window."""

    def __init__(self, consumed: Callable[[str, int], None]) -> None:
        self._consumed = consumed
        self._queues: list[_Queue] = []
        self._backlog: list[_Message] = []
        self._sequence = itertools.count()
        self._intercepts: list[tuple[bytes, Callable[[Notification], None]]] = []
        self.closed = False
        self.received = self.received_nbytes = 0

    @property
    def unread(self) -> int:
        """How many notifications wait for a consumer, in the backlog or in consumers' queues."""
        waiting = {message.sequence for queue in self._queues for message in queue.messages}
        return len(self._backlog) + len(waiting)

    def deliver(self, notification: Notification) -> None:
        """Hand a notification to every consumer that wants it, or keep it for the first that will."""
        self.received += 1
        self.received_nbytes += len(notification.payload)
        for prefix, take in self._intercepts:
            if notification.payload.startswith(prefix):
                self._consumed(notification.peer, len(notification.payload) + OVERHEAD_NBYTES)
                take(notification)
                return
        message = _Message(next(self._sequence), notification)
        for queue in self._queues:
            if queue.wants(notification):
                message.pending += 1
                queue.messages.append(message)
                queue.wake()
        if message.pending == 0:
            self._backlog.append(message)

    def intercept(self, prefix: bytes, take: Callable[[Notification], None]) -> None:
        """Give every notification that begins with `prefix` to `take`, and to no consumer; it counts as consumed at once."""
        self._intercepts.append((prefix, take))

    def subscribe(self, peer: str | None, prefix: bytes) -> Subscription:
        """Add a consumer; it takes over what the backlog holds for it."""
        if self.closed:
            raise ClosedError("the agent is closed; it receives no notifications")
        queue = _Queue(peer, prefix)
        kept = []
        for message in self._backlog:
            if queue.wants(message.notification):
                message.pending = 1
                queue.messages.append(message)
            else:
                kept.append(message)
        self._backlog = kept
        self._queues.append(queue)
        return Subscription(self, queue)

    def close(self) -> None:
        """End every consumer's iteration."""
        self.closed = True
        for queue in list(self._queues):
            self._close_queue(queue)

    def _take(self, queue: _Queue) -> Notification:
        message = queue.messages.popleft()
        message.taken = True
        self._settle(message)
        if queue.messages:
            queue.wake()
        return message.notification

    def _settle(self, message: _Message) -> None:
        message.pending -= 1
        if message.pending == 0:
            if message.taken:
                self._consumed(message.notification.peer, len(message.notification.payload) + OVERHEAD_NBYTES)
            else:
                bisect.insort(self._backlog, message, key=lambda kept: kept.sequence)

    def _close_queue(self, queue: _Queue) -> None:
        if queue.closed:
            return
        queue.closed = True
        self._queues.remove(queue)
        while queue.messages:
            self._settle(queue.messages.popleft())
        while queue.waiters:
            queue.wake()


class Subscription:
    """One consumer of notifications: an async iterator, open from its creation until `close`, the agent's end or its own.

    What it received and nobody took goes back to the backlog when it is closed or dropped.
    """

    def __init__(self, inbox: Inbox, queue: _Queue) -> None:
        self._inbox = inbox
        self._queue = queue
        self._finalizer = weakref.finalize(self, inbox._close_queue, queue)
        self._finalizer.atexit = False

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Notification:
        queue = self._queue
        while not queue.messages:
            if queue.closed:
                raise StopAsyncIteration
            waiter = asyncio.get_running_loop().create_future()
            queue.waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and queue.messages:
                    queue.wake()
                raise
        return self._inbox._take(queue)

    def close(self) -> None:
        """Stop consuming. Idempotent."""
        self._finalizer()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

"""What a caller holds: the awaitable `Transfer`, and `PreparedTransfer`, which is sent again and again."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nixl_async.errors import TransferError
from nixl_async.transfer import TrafficClass, TransferRecord, TransferResult, TransferState

if TYPE_CHECKING:
    from nixl_async.agent import Agent
    from nixl_async.backend import Backend, Op
    from nixl_async.descriptors import Places, Plan
    from nixl_async.dispatch import Dispatcher


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a transfer that is settled: its position among the descriptors or objects, its bytes, why it failed if it did."""

    index: int
    nbytes: int
    error: TransferError | None = None


class Transfer:
    """A transfer on its way: await it any number of times, cancel it, watch its progress.

    When an await returns or raises, `CancelledError` included, no byte of either side moves any more on its account.
    Cancelling a task that awaits it cancels the transfer (`asyncio.shield` prevents that). The await then raises `CancelledError`
    once everything is quiet, or `Quarantined` if it never is, as with a peer that is stopped: the caller must hear of that. A loop
    that catches `TransferError` and goes on asks `asyncio.current_task().cancelling()`, or it outlives its cancellation.
    """

    __slots__ = (
        "__weakref__",
        "_after",
        "_dispatcher",
        "_done",
        "_errors",
        "_left",
        "_on_end",
        "_ready",
        "_record",
        "_reported",
        "_waiters",
        "_watchers",
        "notify",
    )

    def __init__(self, dispatcher: Dispatcher, record: TransferRecord, notify: bytes | None) -> None:
        self._dispatcher = dispatcher
        self._record = record
        self.notify: bytes | None = notify
        self._done = False
        # Ten thousand of these may live at once: what most of them need not is made when it is needed.
        self._waiters: list[asyncio.Future[None]] | None = None
        self._watchers: list[asyncio.Future[None]] | None = None
        self._errors: dict[int, TransferError] | None = None
        self._after: asyncio.Future[Any] | None = None
        self._on_end: list[Callable[[], object]] | None = None
        self._reported = 0
        ends = record.plan.part_ends
        self._left: list[int] | None = None
        self._ready: list[int] | None = None
        if len(ends) > 1:
            self._left = [end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)]
            self._ready = [index for index, nbytes in enumerate(self._left) if nbytes == 0]

    def __repr__(self) -> str:
        record = self._record
        route = record.routes[0] if record.routes else "?"
        return f"<Transfer {record.id} {record.state.name} {record.nbytes_done}/{record.plan.nbytes} bytes by {route}>"

    @property
    def id(self) -> int:
        """The transfer's number within its agent."""
        return self._record.id

    @property
    def state(self) -> TransferState:
        """Where the transfer is in its life."""
        return self._record.state

    @property
    def nbytes(self) -> int:
        """The bytes it moves in all."""
        return self._record.plan.nbytes

    @property
    def nbytes_done(self) -> int:
        """The bytes known to be in place."""
        return max(self._record.nbytes_done, self._reported)

    @property
    def history(self) -> list[tuple[float, str, str, str]]:
        """The state changes so far, as `(loop time in seconds, old, event, new)`; bounded."""
        return list(self._record.history)

    def done(self) -> bool:
        """Return whether the transfer is final and its notification, if any, is on its way."""
        return self._done

    def cancelled(self) -> bool:
        """Return whether the transfer ended by cancellation."""
        return self._done and self.state is TransferState.CANCELLED

    def cancel(self) -> bool:
        """Ask for cancellation; return False if the outcome is decided already. Await the transfer to know it is quiet."""
        if self.state not in (TransferState.QUEUED, TransferState.ACTIVE):
            return False
        self._dispatcher.cancel(self._record.id)
        return True

    def exception(self) -> BaseException | None:
        """Return why a finished transfer failed, `None` if it succeeded.

        Raises:
            asyncio.InvalidStateError: it is not finished.
            asyncio.CancelledError: it was cancelled.
        """
        self._check_done()
        if self.state is TransferState.CANCELLED:
            raise asyncio.CancelledError
        return self._record.error

    def result(self) -> TransferResult:
        """Return the summary of a finished transfer, or raise its error.

        Raises:
            asyncio.InvalidStateError: it is not finished.
            asyncio.CancelledError: it was cancelled.
            TransferError: it failed.
        """
        error = self.exception()
        if error is not None:
            raise error
        return self._record.result()

    def __await__(self) -> Generator[object, None, TransferResult]:
        return self._wait().__await__()

    async def watch(self) -> TransferResult:
        """Wait for the end as an await does, without cancelling the transfer when this wait is cancelled.

        Raises:
            asyncio.CancelledError: the transfer was cancelled.
            TransferError: it failed.
        """
        while not self._done:
            await self._end()
        return self.result()

    def wait_on(self, stream: object) -> None:
        """Let all work that is put on a compute stream from here on wait until the transfer is final; blocks nobody else.

        `stream` is a CUDA stream (cupy, torch, `__cuda_stream__`) or a `CPUStream`. A transfer that fails or is cancelled lets
        the stream go on too: await it to know. The event loop must keep running meanwhile: on its thread, do not synchronise with
        the stream, do not launch a kernel for the first time (loading it waits for all streams of the device, unless
        CUDA_MODULE_LOADING=EAGER), and do not put hundreds of entries on the stream: one that stands still takes a limited number,
        and the driver then blocks whoever puts more.

        Raises:
            TypeError: `stream` is no stream.
            MissingDependency: it is a CUDA stream, and there is no CUDA driver.
            BackendError: the driver cannot let it wait.
        """
        if self._done:
            return
        release = self._dispatcher.streams.hold(stream)
        if self._on_end is None:
            self._on_end = []
        self._on_end.append(release)

    def add_done_callback(self, callback: Callable[[Transfer], object]) -> None:
        """Call `callback(transfer)` when it is final; soon, if it is already."""
        if self._done:
            self._dispatcher.loop.call_soon(callback, self)
            return
        if self._on_end is None:
            self._on_end = []
        self._on_end.append(partial(callback, self))

    async def parts(self) -> AsyncIterator[Part]:
        """Yield each part once as soon as its last byte is in place, or, with objects, as soon as it failed.

        A part is one descriptor given as `src`; with objects on a side (of `dst`, if on both), each of its objects or ranges.

        Raises:
            TransferError: the transfer failed as a whole; the parts yielded before are settled.
        """
        given = 0
        sizes = self._record.plan.part_ends
        while given < len(sizes):
            ready = self._ready
            if ready is None:
                ready = [0] if self.nbytes_done == self.nbytes or (self._errors and 0 in self._errors) else []
            while given < len(ready):
                index = ready[given]
                given += 1
                error = self._errors.get(index) if self._errors else None
                yield Part(index, sizes[index] - (sizes[index - 1] if index else 0), error)
            if given < len(sizes):
                if self._done:
                    self.result()
                if self._watchers is None:
                    self._watchers = []
                await self._wake_up(self._watchers)

    async def _wait(self) -> TransferResult:
        cancelled: asyncio.CancelledError | None = None
        while not self._done:
            try:
                await self._end()
            except asyncio.CancelledError as error:
                # Kept until the hardware is quiet: the caller may reuse its memory when this raises.
                cancelled = error
                self.cancel()
        if cancelled is not None and not isinstance(self._record.error, TransferError):
            raise cancelled
        return self.result()

    async def _end(self) -> None:
        """Wait until the transfer is resolved."""
        if self._waiters is None:
            self._waiters = []
        await self._wake_up(self._waiters)

    async def _wake_up(self, waiters: list[asyncio.Future[None]]) -> None:
        waiter = self._dispatcher.loop.create_future()
        waiters.append(waiter)
        try:
            await waiter
        finally:
            if not waiter.done():
                waiters.remove(waiter)

    def _check_done(self) -> None:
        if not self._done:
            raise asyncio.InvalidStateError(f"transfer {self.id} is {self.state.name}")

    def _progress(self, start: int, nbytes: int, error: TransferError | None = None) -> None:
        """Count `nbytes` bytes from `start` on as in place, or as failed."""
        if error is None:
            self._reported += nbytes
        elif self._errors is None:
            self._errors = {}
        if self._left is None or self._ready is None:
            if error is not None and self._errors is not None:
                self._errors[0] = error
            self._tell_watchers()
            return
        ends = self._record.plan.part_ends
        stop = start + nbytes
        for index in range(bisect_right(ends, start), min(bisect_left(ends, stop) + 1, len(ends))):
            first = ends[index - 1] if index else 0
            moved = min(stop, ends[index]) - max(start, first)
            self._left[index] -= moved
            if moved and error is not None and self._errors is not None:
                self._errors[index] = error
            if moved and self._left[index] == 0:
                self._ready.append(index)
        self._tell_watchers()

    def _resolve(self) -> None:
        self._done = True
        if self._on_end is not None:
            ended, self._on_end = self._on_end, None
            for callback in ended:
                callback()
        self._tell_watchers()
        if self._waiters is not None:
            waiters, self._waiters = self._waiters, None
            _wake_all(waiters)

    def _tell_watchers(self) -> None:
        if self._watchers is not None:
            watchers, self._watchers = self._watchers, None
            _wake_all(watchers)


def _wake_all(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


class PreparedTransfer:
    """A checked, paired, coalesced and routed transfer that can be sent any number of times, one at a time or many at once.

    Made by `agent.prepare`. Sending it again costs no work per descriptor. It uses the bytes as they are when it is sent.
    """

    __slots__ = ("_agent", "_regions", "at_once", "pieces", "places", "plan", "routes")

    def __init__(
        self,
        agent: Agent,
        plan: Plan,
        pieces: Sequence[Plan],
        routes: tuple[str, ...],
        places: tuple[Places, Places] | None = None,
    ) -> None:
        self._agent = agent
        self.places: tuple[Places, Places] | None = places
        self.plan: Plan = plan
        self._regions = plan.src.regions + plan.dst.regions
        self.pieces: Sequence[Plan] = pieces
        self.routes: tuple[str, ...] = routes
        self.at_once: tuple[Backend, Op] | None = None
        """Who copies it, and what, if it is copied by the call that asks for it."""

    @property
    def nbytes(self) -> int:
        """The bytes each sending moves."""
        return self.plan.nbytes

    def check_usable(self) -> None:
        """Raise unless every region that it touches can still be used."""
        for region in self._regions:
            region.check_usable()

    async def transfer(
        self,
        *,
        notify: bytes | None = None,
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        after: object = None,
        verify: str | bool | None = None,
    ) -> TransferResult:
        """Send it and wait until every byte is in place; see `Agent.transfer`."""
        ordinary = priority == 0 and deadline is None and traffic_class is TrafficClass.NORMAL
        if ordinary and after is None and notify is None and verify is None:
            begun = self._agent._begin(self)
            if begun is not None:
                return begun if isinstance(begun, TransferResult) else await begun
        return await self._agent.transfer(
            self,
            notify=notify,
            priority=priority,
            traffic_class=traffic_class,
            deadline=deadline,
            after=after,
            verify=verify,
        )

    def submit(
        self,
        *,
        notify: bytes | None = None,
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        after: object = None,
        verify: str | bool | None = None,
    ) -> Transfer:
        """Send it without waiting; see `Agent.submit`."""
        return self._agent.submit(
            self,
            notify=notify,
            priority=priority,
            traffic_class=traffic_class,
            deadline=deadline,
            after=after,
            verify=verify,
        )

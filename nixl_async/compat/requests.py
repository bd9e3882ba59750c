"""One transfer request: prepared once, posted any number of times, asked for its state.

What the calling thread can copy by itself in a moment it copies in `post`, natively where it has been done before; the rest goes to
the engine's loop, and is waited for a moment. A caller who asks again and again is put to sleep between its questions, so that the
loop gets the interpreter.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nixl_async.backend import Backend, Op
from nixl_async.compat import polled
from nixl_async.compat.engine import ENGINE, Bell
from nixl_async.compat.enums import nixl_status_t
from nixl_async.compat.errors import (
    nixlNotFoundError,
    nixlNotPostedError,
    nixlRepostActiveError,
    nixlUnknownError,
    refusal,
    translate,
)
from nixl_async.compat.log import get_logger
from nixl_async.compat.polled import ACTIVE, COPYING, DONE, FAILED, HERE, NEW, Gate, Target
from nixl_async.compat.ranges import compact
from nixl_async.descriptors import Plan, Side
from nixl_async.errors import NixlError
from nixl_async.handle import PreparedTransfer, Transfer

if TYPE_CHECKING:
    from nixl_async.compat.lane import Lane
    from nixl_async.descriptors import Array

logger = get_logger(__name__)

SUCCESS, IN_PROGRESS = nixl_status_t.NIXL_SUCCESS, nixl_status_t.NIXL_IN_PROG
AT_ONCE_NBYTES = 16 << 20
"""What the calling thread copies itself, as NIXL does; it would wait for it anyway."""
ON_LOOP_NBYTES = 512 << 10
"""The same for a thread that runs an event loop: a twentieth of a millisecond's work."""
AT_ONCE_SEGMENTS = 1024
"""Segments up to which a transfer is posted natively."""
THREAD_SAFE = frozenset({"memory", "samehost", "posix"})
"""Our backends whose `copy_now` any thread may call."""
TASK_NBYTES = 64 << 10
"""Up to this size a transfer that goes to the loop may be made at once there."""
LINGER_NBYTES = 256 << 10
LINGER_SECONDS = 200e-6
"""How long `post` waits for a transfer of up to `LINGER_NBYTES` that the loop makes."""
ASK_NS = 50_000
"""Questions that come faster than this after one another are of a caller who spins."""
NAP_SECONDS = 100e-6
QUIET_SECONDS = 5.0
"""How long a release waits until a cancelled transfer moves no byte any more."""


class Owner(Protocol):
    """The agent that a request belongs to."""

    name: str
    remotes: dict[str, Any]
    gate: Gate

    @property
    def exports(self) -> bool:
        """Whether each transfer is told of to others, who must be told by `completed`."""

    def spins(self, now: int) -> bool:
        """Tell whether somebody asks for many transfers without a pause."""

    def deliver(self, sender: str, payload: bytes) -> None:
        """Take a notification."""

    def notify_soon(self, lane: Lane, remote: Any, payload: bytes) -> None:
        """Send a notification."""

    def completed(self, request: Request) -> None:
        """Take note of a transfer that is done."""

    def failed(self, error: NixlError) -> None:
        """Count an error."""


@dataclass(slots=True, eq=False)
class Way:
    """What natively made requests of a side have in common."""

    core: Owner
    lane: Lane
    regions: tuple[Any, ...]
    remote: Any = None
    agent: str = ""
    """Whose places they are, as the caller named it."""


class Request(polled.Request):
    """A transfer between one lane's registered places; made by `prepared_request`, or natively of two sides with ways."""

    core: Owner = None  # type: ignore[assignment]
    lane: Lane = None  # type: ignore[assignment]
    remote: Any = None
    error: BaseException | None = None
    _prepared: PreparedTransfer | None = None
    _posted_ns = 0
    _asked_ns = 0
    _transfer: Transfer | asyncio.Task[Any] | None = None
    _bell: Bell | None = None
    _regions: tuple[Any, ...] | None = None
    _op: Op | None = None
    _copier: Backend | None = None

    def adopt(self) -> None:
        """Make of what is native what the rest needs."""
        if self._regions is not None:
            return
        if self.core is None:
            way: Way = self.far.way
            self.core, self.lane, self.remote = way.core, way.lane, way.remote
        prepared = self.prepared
        plan = prepared.plan
        if len(prepared.pieces) == 1 and plan.nbytes <= AT_ONCE_NBYTES:
            copier = self.lane.backends.get(prepared.routes[0])
            if copier is not None and copier.name in THREAD_SAFE:
                peer = plan.dst.peer or plan.src.peer
                self._copier, self._op = copier, Op(0, plan, peer, plan.dst.peer is not None)
        self._regions = tuple(dict.fromkeys((*plan.src.regions, *plan.dst.regions)))

    @property
    def prepared(self) -> PreparedTransfer:
        """The transfer as the library takes it."""
        if self._prepared is None:
            near: Way = self.near.way
            far: Way = self.far.way
            here, there, lengths, index, far_index = (np.frombuffer(column, np.int64) for column in self.columns())
            ours, theirs = _side(near, here, index), _side(far, there, far_index)
            src, dst = (ours, theirs) if self.put else (theirs, ours)
            plan = Plan(src, dst, lengths, self.nbytes, (self.nbytes,))
            try:
                self._prepared = far.lane.agent.prepare_plan(plan)
            except NixlError as error:
                raise translate(error) from error
        return self._prepared

    # Posting.

    def post(self, notify: bytes) -> nixl_status_t:
        """Move the bytes, now or from now on."""
        if self.state in (ACTIVE, COPYING):
            raise refusal(nixlRepostActiveError, "the transfer is under way; wait for its end before posting it again")
        self.adopt()
        epoch = self.core.gate.epoch
        self._check()
        if notify:
            self.notify = notify
        self.began_ns = time.monotonic_ns()
        self.error = None
        try:
            if self._copy_now():
                self._arm(epoch)
                return self.done_at_once()
        except NixlError as error:
            self._fail(error)
            raise self.error from error  # type: ignore[misc]
        self.state = ACTIVE
        if self._bell is None:
            self._bell = Bell()
        self._asked_ns = 0
        ENGINE.call(self._start)
        if self.nbytes <= LINGER_NBYTES:
            self._bell.wait(LINGER_SECONDS)
        self._posted_ns = time.monotonic_ns()
        return self._answer()

    def done_at_once(self) -> nixl_status_t:
        """Take note that the calling thread has moved the bytes; send the notification."""
        self.adopt()
        self.ended_ns = self._posted_ns = time.monotonic_ns()
        self.state = DONE
        if self.core.exports:
            self.core.completed(self)
        if self.notify:
            self.core.notify_soon(self.lane, self.remote, self.notify)
        return SUCCESS

    def _check(self) -> None:
        if self.remote is not None and self.core.remotes.get(self.remote.name) is not self.remote:
            raise refusal(
                nixlNotFoundError,
                f"agent {self.remote.name!r} was removed after the transfer was made; add it and make another",
            )
        try:
            for region in self._regions or ():
                region.check_usable()
        except NixlError as error:
            raise translate(error) from error

    def _copy_now(self) -> bool:
        if self._copier is None or self._op is None:
            return False
        if self._op.plan.nbytes > ON_LOOP_NBYTES and asyncio._get_running_loop() is not None:
            return False
        gate = self.core.gate
        if not gate.enter():
            return False
        try:
            return self._copier.copy_now(self._op) is True
        finally:
            gate.leave()

    def _arm(self, epoch: int) -> None:
        """Let it be posted natively until something changes."""
        plan = self.prepared.plan
        if self.core.exports or not 0 < len(plan.lengths) <= AT_ONCE_SEGMENTS:
            return
        target = find_target(self.lane, self.prepared.routes[0], self.remote)
        if target is not None:
            here, there = (plan.src, plan.dst) if self.put else (plan.dst, plan.src)
            self.arm(self.core.gate, target, epoch, here.addresses, there.addresses, plan.lengths)

    def _start(self) -> None:
        if self.state != ACTIVE:
            return
        # To ourselves it is delivered here; the library would send it too, but has nobody to send it to where no peer is.
        notify = self.notify if self.notify and self.remote is not None else None
        try:
            if self.nbytes <= TASK_NBYTES:
                task = asyncio.get_running_loop().create_task(self.lane.agent.transfer(self.prepared, notify=notify))
                self._transfer = task
                task.add_done_callback(self._ended)
            else:
                transfer = self.lane.agent.submit(self.prepared, notify=notify)
                self._transfer = transfer
                transfer.add_done_callback(self._ended)
        except Exception as error:
            self._fail(error)

    def _ended(self, ended: Transfer | asyncio.Task[Any]) -> None:
        self._transfer = None
        try:
            error = ended.exception()
        except asyncio.CancelledError as cancelled:
            error = cancelled
        if error is not None:
            self._fail(error)
            return
        self.ended_ns = time.monotonic_ns()
        if self.notify and self.remote is None:
            self.core.deliver(self.core.name, self.notify)
        self.state = DONE
        if self.core.exports:
            self.core.completed(self)
        self._ring()

    def _fail(self, error: BaseException) -> None:
        self.ended_ns = time.monotonic_ns()
        made = translate(error)
        if not isinstance(made, NixlError):
            made = refusal(nixlUnknownError, f"{type(error).__name__}: {error}")
            made.__cause__ = error
        self.error = made
        # Memory may be quarantined: whoever uses the same is to look again.
        self.core.gate.bump()
        self.core.failed(made)
        self.state = FAILED
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    # Asking.

    def check(self) -> nixl_status_t:
        """Return the state of the last posting, or raise its error."""
        state = self.state
        if state == DONE:
            return SUCCESS
        if state == NEW:
            raise refusal(nixlNotPostedError, "the transfer was not posted yet")
        if state == COPYING:
            return IN_PROGRESS
        if self.remote is not None and self.core.remotes.get(self.remote.name) is not self.remote:
            raise refusal(nixlNotFoundError, f"agent {self.remote.name!r} was removed while the transfer was under way")
        if state == ACTIVE and self._bell is not None:
            now = time.perf_counter_ns()
            if now - self._asked_ns < ASK_NS or self.core.spins(now):
                self._bell.wait(NAP_SECONDS)
                now = time.perf_counter_ns()
            self._asked_ns = now
        return self._answer()

    def _answer(self) -> nixl_status_t:
        if self.error is not None:
            # The same object each time would collect the tracebacks of all who ask.
            raise _again(self.error)
        return SUCCESS if self.state == DONE else IN_PROGRESS

    def times(self) -> tuple[int, int, int]:
        """Return when the last posting began (microseconds since 1970), how long it took, and how long the transfer did."""
        if self.state == NEW:
            raise refusal(nixlNotPostedError, "the transfer was not posted yet")
        now = time.monotonic_ns()
        ended = now if self.state in (ACTIVE, COPYING) else self.ended_ns
        # Posted natively, it was done when the post was.
        posted = self._posted_ns if self._posted_ns >= self.began_ns else ended
        start = time.time_ns() - (now - self.began_ns)
        post = max(1, (posted - self.began_ns) // 1000)
        return start // 1000, post, max(post, (ended - self.began_ns) // 1000)

    # Ending.

    def release(self) -> None:
        """Cancel what is under way, and return when no byte moves any more; on the loop's own thread, without waiting."""
        if self.state == COPYING:
            self.core.gate.close()
            self.core.gate.open()
        if self.state != ACTIVE:
            return
        if ENGINE.inside():
            self._cancel()
            return
        ENGINE.call(self._cancel)
        end = time.monotonic() + QUIET_SECONDS
        while self.state == ACTIVE and self._bell is not None:
            self._bell.wait(0.01)
            if time.monotonic() > end:
                raise refusal(
                    nixlRepostActiveError, f"the transfer is not quiet {QUIET_SECONDS:g} s after it was cancelled; try again"
                )

    def cancel(self) -> None:
        """Cancel what is under way, on the loop."""
        if self.state == ACTIVE:
            self._cancel()

    def _cancel(self) -> None:
        if self._transfer is not None:
            self._transfer.cancel()
        elif self.state == ACTIVE:
            # It was posted and the loop has not begun with it.
            self._fail(asyncio.CancelledError())


def prepared_request(
    core: Owner, lane: Lane, put: bool, prepared: PreparedTransfer, remote: Any, notify: bytes, n_descs: int
) -> Request:
    """Make a request of what is prepared."""
    request = Request()
    request.core, request.lane, request.remote = core, lane, remote
    request._prepared = prepared
    request.put, request.nbytes, request.n_descs = put, prepared.plan.nbytes, n_descs
    request.notify = notify or None
    return request


def _side(way: Way, addresses: Array, index: Array) -> Side:
    if len(way.regions) == 1:
        return Side(way.regions, addresses)
    # Only those that are used may have been deregistered since.
    found = compact(way.regions, index)
    return Side(found.regions, addresses, found.index)


def find_target(lane: Lane, route: str, remote: Any) -> Target | None:
    """Return the process that our backend `route` copies to or from on the caller's thread; `None` where it does not."""
    if remote is None:
        return HERE if route == "memory" else None
    if route not in remote.targets:
        remote.targets[route] = lane.target(route, remote.name)
    found: Target | None = remote.targets[route]
    return found


def _again(error: BaseException) -> BaseException:
    made = type(error)(*error.args)
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    made.__cause__ = error.__cause__
    return made

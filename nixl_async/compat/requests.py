"""One transfer request: prepared once, posted any number of times, asked for its state.

What the calling thread can copy by itself in a moment it copies in `post`; the rest goes to the engine's loop, and is waited for
a moment. A caller who asks again and again is put to sleep between its questions, so that the loop gets the interpreter.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

from nixl_async.backend import Backend, Op
from nixl_async.compat.engine import ENGINE, Bell
from nixl_async.compat.enums import nixl_status_t, nixl_xfer_op_t
from nixl_async.compat.errors import (
    nixlNotFoundError,
    nixlNotPostedError,
    nixlRepostActiveError,
    nixlUnknownError,
    refusal,
    translate,
)
from nixl_async.compat.log import get_logger
from nixl_async.errors import NixlError
from nixl_async.handle import PreparedTransfer, Transfer

if TYPE_CHECKING:
    from nixl_async.compat.lane import Lane

logger = get_logger(__name__)

DONE, ACTIVE = nixl_status_t.NIXL_SUCCESS, nixl_status_t.NIXL_IN_PROG
AT_ONCE_NBYTES = 16 << 20
"""What the calling thread copies itself, as NIXL does; it would wait for it anyway."""
ON_LOOP_NBYTES = 512 << 10
"""The same for a thread that runs an event loop: a twentieth of a millisecond's work."""
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

    def begin(self) -> bool:
        """Count one who copies; False while registrations change."""

    def end(self) -> None:
        """Count one who copies less."""

    def spins(self, now: int) -> bool:
        """Tell whether somebody asks for many transfers without a pause."""

    def deliver(self, sender: str, payload: bytes) -> None:
        """Take a notification."""

    def notify_soon(self, lane: Lane, remote: Any, payload: bytes) -> None:
        """Send a notification."""


class Request:
    """A transfer between one lane's registered places."""

    def __init__(
        self, core: Owner, lane: Lane, op: nixl_xfer_op_t, prepared: PreparedTransfer, remote: Any, notify: bytes, n_descs: int
    ) -> None:
        self.core, self.lane, self.op, self.remote, self.notify = core, lane, op, remote, notify
        self.prepared = prepared
        self.n_descs = n_descs
        self.status: nixl_status_t | None = None
        self.error: BaseException | None = None
        self.started_us = 0
        self._began_ns = self._posted_ns = self._ended_ns = 0
        self._transfer: Transfer | asyncio.Task[Any] | None = None
        self._asked_ns = 0
        self._bell: Bell | None = None
        plan = prepared.plan
        self._regions = tuple(dict.fromkeys((*plan.src.regions, *plan.dst.regions)))
        self._op: Op | None = None
        self._copier: Backend | None = None
        if len(prepared.pieces) == 1 and plan.nbytes <= AT_ONCE_NBYTES:
            copier = lane.backends.get(prepared.routes[0])
            if copier is not None and copier.name in THREAD_SAFE:
                peer = plan.dst.peer or plan.src.peer
                self._copier, self._op = copier, Op(0, plan, peer, plan.dst.peer is not None)

    @property
    def nbytes(self) -> int:
        """The bytes that it moves."""
        return self.prepared.plan.nbytes

    # Posting.

    def post(self, notify: bytes) -> nixl_status_t:
        """Move the bytes, now or from now on."""
        if self.status is ACTIVE:
            raise refusal(nixlRepostActiveError, "the transfer is under way; wait for its end before posting it again")
        self._check()
        if notify:
            self.notify = notify
        self._began_ns = time.perf_counter_ns()
        self.error = None
        try:
            if self._copy_now():
                self._ended_ns = self._posted_ns = time.perf_counter_ns()
                self.status = DONE
                if self.notify:
                    self.core.notify_soon(self.lane, self.remote, self.notify)
                return DONE
        except NixlError as error:
            self._fail(error)
            raise self.error from error  # type: ignore[misc]
        self.status = ACTIVE
        if self._bell is None:
            self._bell = Bell()
        self._asked_ns = 0
        ENGINE.call(self._start)
        if self.nbytes <= LINGER_NBYTES:
            self._bell.wait(LINGER_SECONDS)
        self._posted_ns = time.perf_counter_ns()
        return self._answer()

    def _check(self) -> None:
        if self.remote is not None and self.core.remotes.get(self.remote.name) is not self.remote:
            raise refusal(
                nixlNotFoundError,
                f"agent {self.remote.name!r} was removed after the transfer was made; add it and make another",
            )
        try:
            for region in self._regions:
                region.check_usable()
        except NixlError as error:
            raise translate(error) from error

    def _copy_now(self) -> bool:
        if self._copier is None or self._op is None:
            return False
        if self._op.plan.nbytes > ON_LOOP_NBYTES and asyncio._get_running_loop() is not None:
            return False
        if not self.core.begin():
            return False
        try:
            return self._copier.copy_now(self._op) is True
        finally:
            self.core.end()

    def _start(self) -> None:
        if self.status is not ACTIVE:
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
        self._ended_ns = time.perf_counter_ns()
        if self.notify and self.remote is None:
            self.core.deliver(self.core.name, self.notify)
        self.status = DONE
        self._ring()

    def _fail(self, error: BaseException) -> None:
        self._ended_ns = time.perf_counter_ns()
        made = translate(error)
        if not isinstance(made, NixlError):
            made = refusal(nixlUnknownError, f"{type(error).__name__}: {error}")
            made.__cause__ = error
        self.error = made
        self.status = nixl_status_t.NIXL_ERR_UNKNOWN
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    # Asking.

    def check(self) -> nixl_status_t:
        """Return the state of the last posting, or raise its error."""
        status = self.status
        if status is DONE:
            return status
        if status is None:
            raise refusal(nixlNotPostedError, "the transfer was not posted yet")
        if self.remote is not None and self.core.remotes.get(self.remote.name) is not self.remote:
            raise refusal(nixlNotFoundError, f"agent {self.remote.name!r} was removed while the transfer was under way")
        if status is ACTIVE and self._bell is not None:
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
        return DONE if self.status is DONE else ACTIVE

    def times(self) -> tuple[int, int, int]:
        """Return when the last posting began (microseconds since 1970), how long it took, and how long the transfer did."""
        if self.status is None:
            raise refusal(nixlNotPostedError, "the transfer was not posted yet")
        now = time.perf_counter_ns()
        ended = self._ended_ns if self.status is not ACTIVE else now
        start = time.time_ns() - (now - self._began_ns)
        post = max(1, (self._posted_ns - self._began_ns) // 1000)
        return start // 1000, post, max(post, (ended - self._began_ns) // 1000)

    # Ending.

    def release(self) -> None:
        """Cancel what is under way, and return when no byte moves any more; on the loop's own thread, without waiting."""
        if self.status is not ACTIVE:
            return
        if ENGINE.inside():
            self._cancel()
            return
        ENGINE.call(self._cancel)
        end = time.monotonic() + QUIET_SECONDS
        while self.status is ACTIVE and self._bell is not None:
            self._bell.wait(0.01)
            if time.monotonic() > end:
                raise refusal(
                    nixlRepostActiveError, f"the transfer is not quiet {QUIET_SECONDS:g} s after it was cancelled; try again"
                )

    def _cancel(self) -> None:
        if self._transfer is not None:
            self._transfer.cancel()
        elif self.status is ACTIVE:
            # It was posted and the loop has not begun with it.
            self._fail(asyncio.CancelledError())


def _again(error: BaseException) -> BaseException:
    made = type(error)(*error.args)
    for note in getattr(error, "__notes__", ()):
        made.add_note(note)
    made.__cause__ = error.__cause__
    return made

"""The life of a transfer: its states, the one table of what may follow what, and the record that obeys it.

Rule 1: every state change goes through `TransferRecord.move`. Rule 2: nothing here knows a clock, a loop or a backend.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nixl_async.descriptors import Plan
from nixl_async.errors import InvalidTransition

logger = logging.getLogger("nixl_async.transfer")


class TransferState(enum.Enum):
    """Where a transfer is in its life."""

    # Members are equal when identical; enum's own hash is Python code, and each move looks two of them up.
    __hash__: Callable[[object], int] = object.__hash__  # type: ignore[assignment]

    QUEUED = "queued"
    """Accepted; nothing started; waiting for room."""
    ACTIVE = "active"
    """Work has begun; ops start as room allows."""
    DRAINING = "draining"
    """The outcome is decided; no further op starts; waiting until the hardware is quiet."""
    DONE = "done"
    """Every byte is in place."""
    FAILED = "failed"
    """An error decided the outcome; the destination's content is undefined."""
    CANCELLED = "cancelled"
    """The caller cancelled; the destination's content is undefined."""

    @property
    def final(self) -> bool:
        """Whether nothing can follow."""
        return not TRANSITIONS[self]


class TransferEvent(enum.Enum):
    """What can happen to a transfer."""

    __hash__: Callable[[object], int] = object.__hash__  # type: ignore[assignment]

    ADMIT = "admit"
    REFUSE = "refuse"
    CANCEL = "cancel"
    COMPLETE = "complete"
    ABORT = "abort"
    DRAIN = "drain"
    DRAIN_CANCELLED = "drain_cancelled"


TRANSITIONS: dict[TransferState, dict[TransferEvent, TransferState]] = {
    TransferState.QUEUED: {
        TransferEvent.ADMIT: TransferState.ACTIVE,
        TransferEvent.REFUSE: TransferState.FAILED,
        TransferEvent.CANCEL: TransferState.CANCELLED,
    },
    TransferState.ACTIVE: {
        TransferEvent.COMPLETE: TransferState.DONE,
        TransferEvent.ABORT: TransferState.DRAINING,
        TransferEvent.CANCEL: TransferState.DRAINING,
    },
    TransferState.DRAINING: {
        TransferEvent.DRAIN: TransferState.FAILED,
        TransferEvent.DRAIN_CANCELLED: TransferState.CANCELLED,
    },
    TransferState.DONE: {},
    TransferState.FAILED: {},
    TransferState.CANCELLED: {},
}
_ARROWS = {
    old: {event: (new, (old.name, event.value, new.name)) for event, new in arrows.items()}
    for old, arrows in TRANSITIONS.items()
}


class TrafficClass(enum.Enum):
    """What a transfer's bytes are for; each class has its share of every backend while it has work."""

    __hash__: Callable[[object], int] = object.__hash__  # type: ignore[assignment]

    LATENCY = "latency"
    """Somebody waits for it: a token, a request's first pages."""
    NORMAL = "normal"
    BULK = "bulk"
    """Nobody waits for it: offload, backup, prefetch."""


def mermaid() -> str:
    """Render the transition table as a Mermaid state diagram; the README holds exactly this text."""
    lines = ["stateDiagram-v2", "    [*] --> QUEUED"]
    for state, arrows in TRANSITIONS.items():
        lines += [f"    {state.name} --> {target.name}: {event.value}" for event, target in arrows.items()]
        if not arrows:
            lines.append(f"    {state.name} --> [*]")
    return "\n".join(lines)


class TransferResult(NamedTuple):
    """What a finished transfer tells: bytes moved, seconds from submission to completion, of which queued, and the route.

    `attempts` counts the ops that were started for it, retries included; `route` is the backend that moved the last bytes.
    """

    nbytes: int
    seconds: float
    queued_seconds: float
    attempts: int
    route: str


@dataclass(slots=True, eq=False)
class TransferRecord:
    """Everything the scheduler keeps about one transfer.

    `routes` are the backends still to be tried, the current one first; `pieces` is the plan cut to that one's limits, of which
    `taken` pieces and `taken_nbytes` bytes have been given to it; `again` holds what must be sent another time or was cut finer,
    as (first byte, plan), the next one last. `ops` are the ids of those in flight, one for each of its pieces; `solo` keeps the
    transfer out of batches, so that a failure can be told to be its own; `waits_in` is the queue's. `retries` counts those since
    bytes of it arrived last, `resent` everything that was sent again, `tried` lists the routes that failed. `stranded` is why what
    is left has no route at present. `check` says how both sides are to be compared once the bytes are there, if they are. `history`
    has three moves at most.
    """

    id: int
    plan: Plan
    pieces: Sequence[Plan]
    routes: tuple[str, ...]
    peer: str | None
    put: bool
    priority: int = 0
    deadline: float | None = None
    traffic_class: TrafficClass = TrafficClass.NORMAL
    submitted: float = 0.0
    started: float | None = None
    finished: float | None = None
    state: TransferState = TransferState.QUEUED
    error: BaseException | None = None
    attempts: int = 0
    retries: int = 0
    resent: int = 0
    tried: tuple[str, ...] = ()
    stranded: BaseException | None = None
    ops: tuple[int, ...] = ()
    nbytes_done: int = 0
    taken: int = 0
    taken_nbytes: int = 0
    again: list[tuple[int, Plan]] | None = None
    solo: bool = False
    check: Any = None
    waits_in: Any = None
    cancel_requested: bool = False
    history: tuple[tuple[float, str, str, str], ...] = ()

    @property
    def n_left(self) -> int:
        """How many pieces have not been given to a backend."""
        return len(self.pieces) - self.taken + len(self.again or ())

    @property
    def nbytes_left(self) -> int:
        """The bytes of those pieces."""
        return sum(piece.nbytes for piece in self.pieces[self.taken :]) + sum(piece.nbytes for _, piece in self.again or ())

    def peek(self) -> Plan | None:
        """Return the next piece to be given to a backend, `None` if there is none left."""
        if self.again:
            return self.again[-1][1]
        return self.pieces[self.taken] if self.taken < len(self.pieces) else None

    def take(self) -> tuple[int, Plan]:
        """Take the next piece, as (first byte, plan)."""
        if self.again:
            return self.again.pop()
        first, piece = self.taken_nbytes, self.pieces[self.taken]
        self.taken += 1
        self.taken_nbytes += piece.nbytes
        return first, piece

    def cut(self, max_nbytes: int, max_segments: int) -> None:
        """Cut the next piece into pieces of at most `max_nbytes` bytes and `max_segments` segments."""
        piece = self.peek()
        if piece is None or piece.nbytes <= max_nbytes:
            return
        first, piece = self.take()
        end = first + piece.nbytes
        again = [] if self.again is None else self.again
        for finer in reversed(list(piece.split(max_nbytes, max_segments))):
            end -= finer.nbytes
            again.append((end, finer))
        self.again = again

    def drop_unsent(self) -> list[tuple[int, Plan]]:
        """Take all that is left, in order."""
        left = []
        while self.peek() is not None:
            left.append(self.take())
        return left

    def move(self, event: TransferEvent, now: float) -> TransferState:
        """Apply `event`; append `(now, old, event, new)` to the history.

        Raises:
            InvalidTransition: the state does not allow the event; nothing changed.
        """
        arrow = _ARROWS[self.state].get(event)
        if arrow is None:
            raise InvalidTransition(
                f"transfer {self.id} is {self.state.name}, which does not allow {event.value!r}; history: {list(self.history)}"
            )
        self.state, names = arrow
        self.history = (*self.history, (now, *names))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("transfer %d: %s -> %s (%s)", self.id, names[0], names[2], names[1])
        return self.state

    def result(self) -> TransferResult:
        """Return the summary of a transfer that is DONE; `seconds` and `queued_seconds` on the caller's clock."""
        finished = self.submitted if self.finished is None else self.finished
        started = finished if self.started is None else self.started
        return TransferResult(
            self.plan.nbytes, finished - self.submitted, started - self.submitted, self.attempts, self.routes[0]
        )

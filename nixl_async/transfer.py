"""The life of a transfer: its states, the one table of what may follow what, and the record that obeys it.

Rule 1: every state change goes through `TransferRecord.move`. Rule 2: nothing here knows a clock, a loop or a backend.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nixl_async.descriptors import Plan
from nixl_async.errors import InvalidTransition

logger = logging.getLogger("nixl_async.transfer")

HISTORY_LENGTH = 64


class TransferState(enum.Enum):
    """Where a transfer is in its life."""

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

    `routes` are the backends still to be tried, the current one first; `pieces` is the plan cut to that one's limits.
    `unsent` are pieces not yet given to a backend, as (first byte, plan); `in_flight` counts started ops; `solo` keeps
    the transfer out of batches, so that a failure can be told to be its own.
    """

    id: int
    plan: Plan
    pieces: Sequence[Plan]
    routes: tuple[str, ...]
    peer: str | None
    put: bool
    priority: int = 0
    deadline: float | None = None
    submitted: float = 0.0
    started: float | None = None
    finished: float | None = None
    state: TransferState = TransferState.QUEUED
    error: BaseException | None = None
    attempts: int = 0
    retries: int = 0
    in_flight: int = 0
    nbytes_done: int = 0
    unsent: deque[tuple[int, Plan]] = field(default_factory=deque)
    solo: bool = False
    cancel_requested: bool = False
    history: deque[tuple[float, str, str, str]] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))

    def move(self, event: TransferEvent, now: float) -> TransferState:
        """Apply `event`; append `(now, old, event, new)` to the history.

        Raises:
            InvalidTransition: the state does not allow the event; nothing changed.
        """
        old = self.state
        target = TRANSITIONS[old].get(event)
        if target is None:
            raise InvalidTransition(
                f"transfer {self.id} is {old.name}, which does not allow {event.value!r}; history: {list(self.history)}"
            )
        self.state = target
        self.history.append((now, old.name, event.value, target.name))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("transfer %d: %s -> %s (%s)", self.id, old.name, target.name, event.value)
        return target

    def result(self) -> TransferResult:
        """Return the summary of a transfer that is DONE; `seconds` and `queued_seconds` on the caller's clock."""
        finished = self.submitted if self.finished is None else self.finished
        started = finished if self.started is None else self.started
        return TransferResult(
            self.plan.nbytes, finished - self.submitted, started - self.submitted, self.attempts, self.routes[0]
        )

"""Who is told what an agent's transfers do: metrics, traces, recordings, logs. Where nobody listens, each step costs one test.

An observer is an object with any of the methods that `EVENTS` names. They are called on the loop, in the middle of the work: they
must be quick and must not wait. What one raises is logged, and the transfer goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("nixl_async.observers")

EVENTS = ("submitted", "reached", "started", "ended", "finished", "resolved", "copied", "noted", "closed")
"""What an observer may be told:

- `submitted(record)`: a transfer was handed to the scheduler, in the caller's context;
- `reached(record)`: what it was to wait for (`after=`) is reached;
- `started(backend, op)`, `ended(backend, op, error)`: an op was given to a backend, and ended;
- `finished(record)`: the transfer is final; its notification is not sent yet;
- `resolved(record)`: its notification is on its way; whoever awaits it goes on;
- `copied(plan, peer, route, traffic_class, seconds)`: a small transfer was copied at once, without the scheduler;
- `noted(kind, name, number)`: a layer of a push or pull: `kind` is ready, landed or arrived, `name` the request;
- `closed()`: the agent has closed; nothing more will be told.
"""

Callback = Callable[..., None]


class Observers:
    """The observers of one agent. Each event is an attribute: None while nobody listens, else what is to be called.

    `trace(subject)` returns the trace context that goes with a notification, as bytes: of a transfer's record, of a plan that was
    copied at once, or (None) of the caller.
    """

    __slots__ = ("_all", "_trusted", *EVENTS, "trace")

    submitted: Callback | None
    reached: Callback | None
    started: Callback | None
    ended: Callback | None
    finished: Callback | None
    resolved: Callback | None
    copied: Callback | None
    noted: Callback | None
    closed: Callback | None
    trace: Callable[[object], bytes] | None

    def __init__(self) -> None:
        self._all: list[object] = []
        self._trusted: list[object] = []
        self.trace = None
        self._connect()

    def add(self, observer: object, *, trusted: bool = False) -> None:
        """Tell `observer` from here on, after those that are there; `trusted`: it never raises."""
        self._all.append(observer)
        if trusted:
            self._trusted.append(observer)
        self._connect()

    def remove(self, observer: object) -> None:
        """Tell it nothing more. Idempotent."""
        if observer in self._all:
            self._all.remove(observer)
            self._trusted = [one for one in self._trusted if one is not observer]
            self._connect()

    def _connect(self) -> None:
        for event in EVENTS:
            found: list[Callback] = []
            for one in self._all:
                callback = getattr(one, event, None)
                if callback is not None:
                    found.append(callback if one in self._trusted else _guarded(callback))
            setattr(self, event, _all_of(found) if len(found) > 1 else found[0] if found else None)


def _guarded(callback: Callback) -> Callback:
    def call(*arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            logger.exception("an observer failed; what it is told of goes on")

    return call


def _all_of(callbacks: list[Callback]) -> Callback:
    def call(*arguments: Any) -> None:
        for callback in callbacks:
            callback(*arguments)

    return call

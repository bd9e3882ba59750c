"""Which routes to which peers are down, since when and why. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Outage:
    """A route that lost its peer, which may be there by other routes: `since` and `again_at` in seconds of the scheduler's clock.

    `again_at` is when it is tried again; `None` while it is being tried.
    """

    backend: str
    peer: str
    reason: str
    since: float
    again_at: float | None = None


class Outages:
    """The routes that are down, by backend and peer. False if there are none.

    `era` counts the outages that have begun; an op that began in an earlier era than an outage of its route tells nothing of it.
    """

    def __init__(self) -> None:
        self.era = 0
        self._down: dict[tuple[str, str], Outage] = {}
        self._began: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._down)

    def begin(self, backend: str, peer: str, reason: str, now: float, era: int | None = None) -> Outage | None:
        """Take note that a route is down; `None` if that is known, or was before its op, of the era `era`, ended."""
        key = backend, peer
        if key in self._down or (era is not None and era < self._began.get(key, 0)):
            return None
        self.era += 1
        self._began[key] = self.era
        outage = self._down[key] = Outage(backend, peer, reason, now)
        return outage

    def end(self, backend: str, peer: str) -> bool:
        """Take note that a route can be used again; return whether it was down."""
        return self._down.pop((backend, peer), None) is not None

    def forget(self, peer: str) -> None:
        """Forget a peer that is gone."""
        for routes in (self._down, self._began):
            for key in [key for key in routes if key[1] == peer]:
                del routes[key]

    def first_up(self, routes: Iterable[str], peer: str | None) -> str | None:
        """Return the first of `routes` to a peer that is not down, `None` if all are."""
        if peer is None:
            return next(iter(routes), None)
        return next((backend for backend in routes if (backend, peer) not in self._down), None)

    def all(self) -> list[Outage]:
        """Return every outage. Any thread may call it."""
        return list(self._down.values())

    def of(self, peer: str | None) -> dict[str, Outage]:
        """Return the outages of the routes to a peer, by backend."""
        return {backend: outage for (backend, name), outage in self._down.items() if name == peer}

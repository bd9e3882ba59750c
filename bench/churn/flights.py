"""Everything that a member has begun and that must come to an end: with a limit, and a watch over what outlasts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from bench.churn.telling import say, waits_at

MOST_AT_ONCE_SECONDS = 0.5


class GivenUp(TimeoutError):
    """The drill gave a transfer up on purpose."""


@dataclass(eq=False)
class _Flight:
    what: str
    peer: str
    began: float
    task: asyncio.Task[Any] | None
    told: bool = False


class Flights:
    """Waits for things, `limit` seconds for each; reports as a hang what has not ended after `hang_limit`."""

    def __init__(self, limit: float, hang_limit: float) -> None:
        self._limit, self._hang_limit = limit, hang_limit
        # In seconds that this process was awake for: what it slept through while it was stopped is nobody's fault.
        self._awake, self._last = 0.0, time.monotonic()
        self._flights: set[_Flight] = set()

    async def within(self, what: str, peer: str, work: Awaitable[Any], given_up: float | None = None) -> Any:
        """Wait for something that has to do with a peer.

        Raises:
            TimeoutError: it took longer than the limit.
            GivenUp: it took longer than `given_up`.
        """
        flight = _Flight(what, peer, self._awake, asyncio.current_task())
        self._flights.add(flight)
        try:
            async with asyncio.timeout(self._limit if given_up is None else given_up):
                return await work
        except TimeoutError as error:
            if given_up is not None:
                raise GivenUp from error
            raise
        finally:
            self._flights.discard(flight)

    def tick(self, now: float) -> None:
        """Look for what hangs; to be called several times a second."""
        self._awake += min(now - self._last, MOST_AT_ONCE_SECONDS)
        self._last = now
        for flight in self._flights:
            seconds = self._awake - flight.began
            if seconds > self._hang_limit and not flight.told:
                flight.told = True
                say(hang=flight.what, peer=flight.peer, seconds=seconds, at=now, stack=waits_at(flight.task))

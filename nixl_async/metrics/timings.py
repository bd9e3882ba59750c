"""How long transfers take and wait, and how late the event loop is: counted into buckets, on the loop, while somebody asks."""

from __future__ import annotations

import asyncio
import weakref
from bisect import bisect_left
from typing import TYPE_CHECKING, ClassVar, TypeAlias
from weakref import WeakKeyDictionary

from nixl_async.descriptors import Plan
from nixl_async.metrics.families import BUCKETS_US
from nixl_async.transfer import TrafficClass, TransferRecord, TransferState

if TYPE_CHECKING:
    from nixl_async.agent import Agent

TICK_SECONDS = 0.1
"""How often the loop's lateness is taken."""
Key: TypeAlias = tuple[str, TrafficClass]


class Histogram:
    """Counts of microseconds by bucket, not cumulative; the last one has what is above every bound."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_US) + 1)
        self.total = 0.0

    def add(self, microseconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BUCKETS_US, microseconds)] += 1
        self.total += microseconds

    def __add__(self, other: Histogram) -> Histogram:
        both = Histogram()
        both.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        both.total = self.total + other.total
        return both


class Timings:
    """An observer of one agent that fills histograms; from `start` to `stop` it also takes the loop's lateness.

    `served` is what each backend has moved for peers, as of the last tick. `of` returns those of an agent, which all who ask share.
    """

    _all: ClassVar[WeakKeyDictionary[Agent, Timings]] = WeakKeyDictionary()

    @classmethod
    def of(cls, agent: Agent) -> Timings:
        """Return the timings of an agent."""
        return cls._all.setdefault(agent, cls(agent))

    def __init__(self, agent: Agent) -> None:
        self.waits: dict[Key, Histogram] = {}
        # From submission to the turn, and to the end, of what the scheduler had; and what was copied at once, where both are one.
        self._posts: dict[Key, Histogram] = {}
        self._transfers: dict[Key, Histogram] = {}
        self._inline: dict[Key, Histogram] = {}
        self.stalls = Histogram()
        self.served: dict[str, tuple[int, int]] = {}
        self._agent_ref = weakref.ref(agent)
        self._timer: asyncio.TimerHandle | None = None
        self._users = 0

    def start(self) -> None:
        """Begin, on the agent's loop; each call needs a `stop`."""
        self._users += 1
        if self._users == 1:
            agent = self._agent_ref()
            if agent is not None:
                agent._observers.add(self, trusted=True)
            self._read_served()
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(TICK_SECONDS, self._tick, loop, loop.time() + TICK_SECONDS)

    def stop(self) -> None:
        """End when everyone who called `start` has called this."""
        self._users -= 1
        if self._users == 0:
            agent = self._agent_ref()
            if agent is not None:
                agent._observers.remove(self)
            self._read_served()
            if self._timer is not None:
                self._timer.cancel()

    def transfers(self) -> dict[Key, Histogram]:
        """Return how long the transfers that are done took."""
        return _together(self._transfers, self._inline)

    def posts(self) -> dict[Key, Histogram]:
        """Return how long they took until it was their turn; what was copied at once, until its end."""
        return _together(self._posts, self._inline)

    # Observer.

    def finished(self, record: TransferRecord) -> None:
        """Count a transfer that is DONE, and how long any waited."""
        key = record.routes[0], record.traffic_class
        finished = record.submitted if record.finished is None else record.finished
        if record.state is TransferState.DONE:
            histogram = self._transfers.get(key)
            if histogram is None:
                histogram = self._transfers[key] = Histogram()
                self._posts[key] = Histogram()
            histogram.add((finished - record.submitted) * 1e6)
            started = finished if record.started is None else record.started
            self._posts[key].add((started - record.submitted) * 1e6)
        if record.started is not None:
            histogram = self.waits.get(key)
            if histogram is None:
                histogram = self.waits[key] = Histogram()
            histogram.add((record.started - record.submitted) * 1e6)

    def copied(self, plan: Plan, peer: str | None, route: str, traffic_class: TrafficClass, seconds: float) -> None:
        """Count a transfer that was copied at once."""
        histogram = self._inline.get((route, traffic_class))
        if histogram is None:
            histogram = self._inline[route, traffic_class] = Histogram()
        # As `Histogram.add`, written out: this runs once for each small transfer.
        microseconds = seconds * 1e6
        histogram.counts[bisect_left(BUCKETS_US, microseconds)] += 1
        histogram.total += microseconds

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self.stalls.add((now - due) * 1e6)
        self._read_served()
        self._timer = loop.call_later(TICK_SECONDS, self._tick, loop, now + TICK_SECONDS)

    def _read_served(self) -> None:
        # Here and not where it is asked for: that is another thread, and a backend may be closing.
        agent = self._agent_ref()
        for name, backend in () if agent is None else agent._backends.items():
            served = backend.served()
            if served is not None:
                self.served[name] = served


def _together(one: dict[Key, Histogram], other: dict[Key, Histogram]) -> dict[Key, Histogram]:
    nothing = Histogram()
    return {key: one.get(key, nothing) + other.get(key, nothing) for key in [*one, *(key for key in other if key not in one)]}

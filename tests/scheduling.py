"""What the tests of the scheduler share: transfers made by number, and a stand-in for the agent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from nixl_async.backend import Limits, Op
from nixl_async.descriptors import MemoryKind, Region, make_plan
from nixl_async.memory import Buffer, MemoryRegion, RemoteRegion
from nixl_async.scheduler import Action, Finish, Scheduler, Start, Stop, Verify
from nixl_async.transfer import TrafficClass, TransferRecord

SPACE = 32
FAR = 1 << (SPACE - 1)
"""Transfer n reads from address n << SPACE on, and writes from FAR bytes behind that."""


async def _closed(region: MemoryRegion) -> None:
    pass


def region_at(address: int, nbytes: int, peer: str | None) -> Region:
    if peer is None:
        return MemoryRegion("local", Buffer(address, nbytes, MemoryKind.DRAM, 0, False, None), _closed)
    return RemoteRegion(peer, "life", "remote", address, nbytes)


def make_record(
    number: int,
    limits: dict[str, Limits],
    *,
    nbytes: int = 100,
    peer: str | None = "p",
    put: bool = True,
    routes: tuple[str, ...] | None = None,
    priority: int = 0,
    deadline: float | None = None,
    traffic_class: TrafficClass = TrafficClass.NORMAL,
    page_nbytes: int = 0,
    order: Iterable[int] = (),
    check: object = None,
) -> TransferRecord:
    """Make a transfer of `nbytes` bytes in a row, or, with `page_nbytes`, of source pages in `order` to ascending ones."""
    base = (number + 1) << SPACE
    pages = list(order)
    span = (len(pages) * page_nbytes if page_nbytes else nbytes) or 1
    src = region_at(base, span, None if put else peer)
    dst = region_at(base + FAR, span, peer if put else None)
    if page_nbytes:
        plan = make_plan(src.pages(pages, page_nbytes), dst.pages(range(len(pages)), page_nbytes))
    else:
        plan = make_plan(src[0:nbytes], dst[0:nbytes])
    routes = tuple(limits) if routes is None else routes
    limit = limits[routes[0]]
    pieces = list(plan.split(limit.max_op_nbytes, limit.max_op_segments)) if plan.nbytes else []
    return TransferRecord(number, plan, pieces, routes, peer, put, priority, deadline, traffic_class, check=check)


class Bench:
    """A scheduler, what it started and what it finished; time is what `now` says."""

    def __init__(self, shares: Mapping[TrafficClass, float] | None = None, **limits: Limits) -> None:
        self.limits = limits or {"wire": Limits()}
        self.scheduler = Scheduler(self.limits, shares)
        self.now = 0.0
        # Checking looks at every transfer; tests with thousands turn it off.
        self.checked = True
        self.running: dict[int, tuple[str, Op]] = {}
        self.started: list[tuple[str, Op]] = []
        self.stopped: list[int] = []
        self.verifying: dict[int, TransferRecord] = {}
        self.finished: list[TransferRecord] = []
        self._numbers = itertools.count(1)

    def submit(self, *, start: bool = True, hold: bool = False, **wanted: Any) -> TransferRecord:
        record = make_record(next(self._numbers), self.limits, **wanted)
        self.take(self.scheduler.submit(record, self.now, start=start, hold=hold))
        return record

    def take(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            match action:
                case Start(backend, op):
                    self.running[op.id] = (backend, op)
                    self.started.append((backend, op))
                case Stop(op_id):
                    self.stopped.append(op_id)
                case Verify(op_id, record):
                    self.verifying[op_id] = record
                case Finish(record):
                    self.finished.append(record)
        if self.checked:
            self.scheduler.check()
        return actions

    def done(self, op_id: int | None = None) -> list[Action]:
        chosen = next(iter(self.running)) if op_id is None else op_id
        del self.running[chosen]
        return self.take(self.scheduler.op_done(chosen, self.now))

    def fail(self, error: BaseException, op_id: int | None = None) -> list[Action]:
        chosen = next(iter(self.running)) if op_id is None else op_id
        del self.running[chosen]
        return self.take(self.scheduler.op_failed(chosen, error, self.now))

    def verified(self, error: BaseException | None = None, op_id: int | None = None) -> list[Action]:
        chosen = next(iter(self.verifying)) if op_id is None else op_id
        del self.verifying[chosen]
        return self.take(self.scheduler.verified(chosen, error, self.now))

    def cancel(self, record: TransferRecord) -> list[Action]:
        return self.take(self.scheduler.cancel(record.id, self.now))

    def tick(self, now: float) -> list[Action]:
        self.now = now
        return self.take(self.scheduler.tick(now))

    def order(self) -> list[list[int]]:
        """Return which transfers each op that was started carries."""
        return [[part[0] for part in op.parts] for _, op in self.started]

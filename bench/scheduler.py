"""The scheduler alone, without backends or a loop: seconds for each transfer that waits, and for each page that it carries."""

from __future__ import annotations

import gc
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.backend import Limits
from nixl_async.descriptors import MemoryKind, make_plan
from nixl_async.memory import Buffer, MemoryRegion, RemoteRegion
from nixl_async.scheduler import Scheduler, Start
from nixl_async.transfer import TransferRecord

if TYPE_CHECKING:
    from nixl_async.scheduler import Action

NBYTES = 4096
LIMITS = Limits(max_ops=4, max_op_nbytes=16 << 20)
_SPACE = 1 << 33


async def _closed(region: MemoryRegion) -> None:
    """Nothing was registered anywhere."""


def _regions() -> tuple[MemoryRegion, RemoteRegion]:
    # Nobody touches the memory: only addresses are worked with.
    near = MemoryRegion("near", Buffer(1 << 40, _SPACE, MemoryKind.DRAM, 0, False, None), _closed)
    return near, RemoteRegion("peer", "life", "far", 1 << 41, _SPACE)


def transfers(count: int, repeats: int) -> list[float]:
    """Submit `count` transfers of one page, start them and end them; seconds for each."""
    near, far = _regions()
    plan = make_plan(near[0:NBYTES], far[0:NBYTES])
    seconds = []
    for _ in range(repeats):
        records = [TransferRecord(n, plan, (plan,), ("wire",), "peer", True) for n in range(count)]
        scheduler = Scheduler({"wire": LIMITS})
        gc.collect()
        start = time.perf_counter()
        for record in records:
            scheduler.submit(record, 0.0, start=False)
        _play(scheduler, scheduler.dispatch(0.0))
        seconds.append((time.perf_counter() - start) / count)
    return seconds


def pages(count: int, repeats: int) -> dict[str, list[float]]:
    """Cut one transfer of `count` pages in random order to a backend's limits, and carry it through; seconds for each page."""
    near, far = _regions()
    plan = make_plan(near.pages(np.random.default_rng(1).permutation(count), NBYTES), far.pages(np.arange(count), NBYTES))
    cut, scheduled = [], []
    for _ in range(repeats):
        scheduler = Scheduler({"wire": LIMITS})
        start = time.perf_counter()
        pieces = tuple(plan.split(LIMITS.max_op_nbytes, LIMITS.max_op_segments))
        between = time.perf_counter()
        _play(scheduler, scheduler.submit(TransferRecord(1, plan, pieces, ("wire",), "peer", True), 0.0))
        cut.append((between - start) / count)
        scheduled.append((time.perf_counter() - between) / count)
    return {"cut": cut, "scheduled": scheduled}


def _play(scheduler: Scheduler, actions: list[Action]) -> None:
    """End every op at once, in order."""
    waiting = deque(actions)
    while waiting:
        action = waiting.popleft()
        if isinstance(action, Start):
            waiting += scheduler.op_done(action.op.id, 0.0)
    if scheduler.live():
        raise AssertionError("transfers were forgotten")

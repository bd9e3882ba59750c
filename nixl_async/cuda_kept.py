"""What devices are told of prepared plans, kept in their memory while the plans live: sending one again is one launch."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from nixl_async.arena import Stretches
from nixl_async.cuda import entered
from nixl_async.cuda_lane import Described, Lane
from nixl_async.cuda_lanes import Lanes
from nixl_async.descriptors import Plan
from nixl_async.errors import BackendError

KEPT_NBYTES = 32 << 20
"""How much memory of each device is lent to plans: two million pages. It is taken when the first plan is prepared."""
MIN_SEGMENTS = 256
"""Plans of fewer segments are described as they are launched: it takes a few microseconds."""
ALIGNMENT = 256

T = TypeVar("T")
Take = Callable[[int], int | None]
"""Finds so many bytes of a device's memory, if they are there."""


@dataclass(frozen=True, slots=True)
class Kept(Generic[T]):
    """What a device knows of a plan, and what its backend keeps beside."""

    described: Described
    beside: T


class KeptPlans(Generic[T]):
    """The plans that devices know, of one backend."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._plans: weakref.WeakKeyDictionary[Plan, Kept[T]] = weakref.WeakKeyDictionary()
        self._blocks: dict[int, tuple[int, Stretches]] = {}
        # Plans are collected on any thread, at any moment.
        self._left: deque[tuple[int, int, int]] = deque()

    async def keep(self, plan: Plan, device: int, describe: Callable[[Lane, Take], tuple[Described | None, T]]) -> None:
        """Let `describe` tell a device of a plan, on the launching thread; what it returns beside goes with what `find` returns."""
        if len(plan.lengths) < MIN_SEGMENTS or plan in self._plans:
            return
        work = self._lanes.call(self._keep, plan, device, describe)
        try:
            kept = await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise
        if kept is not None:
            self._plans[plan] = kept

    def find(self, plan: Plan) -> Kept[T] | None:
        """Return what a device knows of a plan."""
        return self._plans.get(plan)

    async def aclose(self) -> None:
        """Give the devices' memory back; nothing is under way."""
        self._plans.clear()
        if self._blocks:
            await self._lanes.call(self._free)

    def _keep(self, plan: Plan, device: int, describe: Callable[[Lane, Take], tuple[Described | None, T]]) -> Kept[T] | None:
        taken: list[tuple[int, int]] = []

        def take(nbytes: int) -> int | None:
            rounded = -(-nbytes // ALIGNMENT) * ALIGNMENT
            base, stretches = self._blocks[device]
            if (at := stretches.take(rounded)) is None:
                return None
            taken.append((at, rounded))
            return base + at

        with self._lanes.lane(device) as lane:
            if device not in self._blocks:
                try:
                    self._blocks[device] = lane.allocate(KEPT_NBYTES), Stretches(KEPT_NBYTES)
                except BackendError:
                    # The device is full: plans are described each time.
                    self._blocks[device] = 0, Stretches(0)
            while self._left:
                where, at, nbytes = self._left.popleft()
                self._blocks[where][1].give(at, nbytes)
            described = None
            try:
                described, beside = describe(lane, take)
            finally:
                if described is None:
                    for at, nbytes in taken:
                        self._blocks[device][1].give(at, nbytes)
        if described is None:
            return None
        for at, nbytes in taken:
            weakref.finalize(plan, self._left.append, (device, at, nbytes)).atexit = False
        return Kept(described, beside)

    def _free(self) -> None:
        for device, (base, _) in self._blocks.items():
            if base:
                with entered(device) as driver:
                    driver.cuMemFree_v2(base)
        self._blocks.clear()

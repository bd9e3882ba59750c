"""A block of memory that is lent in stretches."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from nixl_async.errors import BackendError
from nixl_async.memory import MemoryRegion

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGE_NBYTES = 4096
"""What is lent begins at a multiple of this, for direct I/O."""


class Stretches:
    """What of `nbytes` bytes is free, first fit; neighbours that are given back become one."""

    def __init__(self, nbytes: int) -> None:
        # Offset and bytes, in order.
        self._free = [(0, nbytes)]

    def take(self, nbytes: int) -> int | None:
        """Take `nbytes` bytes in one piece; return their offset, or `None` if no free stretch is that long."""
        position = next((i for i, (_, free) in enumerate(self._free) if free >= nbytes), None)
        if position is None:
            return None
        at, free = self._free.pop(position)
        if free > nbytes:
            self._free.insert(position, (at + nbytes, free - nbytes))
        return at

    def give(self, at: int, nbytes: int) -> None:
        """Give back what was taken."""
        insort(self._free, (at, nbytes))
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged


class Arena:
    """Lends stretches of a region's memory, first come, first served: a large request is not overtaken by small ones."""

    def __init__(self, region: MemoryRegion) -> None:
        self.region = region
        self.lent_nbytes = self.peak_nbytes = 0
        self._stretches = Stretches(region.nbytes)
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()

    @asynccontextmanager
    async def lend(self, nbytes: int) -> AsyncIterator[int]:
        """Wait for `nbytes` bytes in one piece; yield their address."""
        nbytes = -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
        at = await self._take(nbytes)
        try:
            yield self.region.address + at
        finally:
            self._give(at, nbytes)

    async def _take(self, nbytes: int) -> int:
        if nbytes > self.region.nbytes:
            raise BackendError(f"{nbytes} bytes do not fit the {self.region.nbytes} of staging", backend="staging")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waits = (nbytes, future)
        self._waiting.append(waits)
        self._serve()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():
                self._give(future.result(), nbytes)
            else:
                # Those behind may be smaller.
                self._waiting.remove(waits)
                self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting:
            nbytes, future = self._waiting[0]
            if future.cancelled():
                # Its task takes it out of the queue when it runs.
                return
            at = self._stretches.take(nbytes)
            if at is None:
                return
            self.lent_nbytes += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self.lent_nbytes)
            self._waiting.popleft()
            future.set_result(at)

    def _give(self, at: int, nbytes: int) -> None:
        self.lent_nbytes -= nbytes
        self._stretches.give(at, nbytes)
        self._serve()

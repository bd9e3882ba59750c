"""The slots of a directory that this process may write: reserved some at a time, and ahead of need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.backend import quiesce
from nixl_async.errors import NixlError
from nixl_async.tiers.groups import NOTHING
from nixl_async.tiers.index import Index
from nixl_async.tiers.slots import SlotTable

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

RESERVED_AT_ONCE = 1024
AHEAD, AHEAD_SHARE = 64, 9
"""Writes of at least so many blocks have slots reserved for the next, if these are at most this fraction of the tier."""


class Reservations:
    """Reserves slots of `index` on the thread of `writer`; calls `evicted(n, change)` when `n` blocks lost theirs to it.

    `ttl`: who goes first, as of `SlotTable.oldest`. `durable`: as of `Index.reserve`.
    """

    def __init__(
        self,
        index: Index,
        table: SlotTable,
        writer: ThreadPoolExecutor,
        evicted: Callable[[int, int], None],
        *,
        ttl: float | None,
        durable: bool,
    ) -> None:
        self._index, self._table, self._writer, self._evicted = index, table, writer, evicted
        self._ttl, self._durable = ttl, durable
        self._reserved = NOTHING
        self._turn = asyncio.Lock()
        self._ahead: asyncio.Task[None] | None = None

    @property
    def slots(self) -> Array:
        """The slots that are reserved and not taken."""
        return self._reserved[:, 0]

    async def take(self, n: int) -> Array:
        """Take up to `n` reserved slots with their generations, one at least, in order.

        Raises:
            OutOfSpace: not one slot can be had.
        """
        async with self._turn:
            while not len(self._reserved):
                await self._reserve(n)
            # The lowest first, so that what is written together lies together.
            taken, self._reserved = self._reserved[:n], self._reserved[n:]
        if not len(self._reserved) and self._ahead is None and n >= AHEAD and n * AHEAD_SHARE <= self._index.n_slots:
            self._ahead = asyncio.create_task(self._reserve_ahead(n))
        return taken

    def give(self, reserved: Array) -> None:
        """Give back what was taken and not written."""
        if len(reserved):
            together = np.concatenate((self._reserved, reserved))
            self._reserved = together[np.argsort(together[:, 0])]

    async def settled(self) -> None:
        """Wait until nothing is being reserved ahead."""
        if self._ahead is not None:
            await asyncio.wait([self._ahead])

    async def _reserve_ahead(self, n: int) -> None:
        try:
            async with self._turn:
                if not len(self._reserved):
                    # If there is no room, the next write meets that again, and says so.
                    with suppress(NixlError):
                        await self._reserve(n)
        finally:
            self._ahead = None

    async def _reserve(self, n: int) -> None:
        wanted = max(1, min(max(n, RESERVED_AT_ONCE), max(n, self._index.n_slots // 16), self._index.n_slots))

        def reserve() -> tuple[Array, Array, int]:
            return self._index.reserve(wanted, lambda: self._table.oldest(wanted, self._ttl), self._durable)

        reserving = asyncio.get_running_loop().run_in_executor(self._writer, reserve)
        try:
            got, taken, change = await quiesce(reserving)
        except asyncio.CancelledError:
            if not reserving.cancelled() and reserving.exception() is None:
                self._done(*reserving.result())
            raise
        self._done(got, taken, change)

    def _done(self, got: Array, taken: Array, change: int) -> None:
        if len(taken):
            # All are from blocks, or none is.
            self._table.forget_taken(got[:, 0], got[:, 1])
        self._evicted(len(taken), change)
        self.give(got)

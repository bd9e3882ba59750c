"""The tier of memory: one registered arena cut into slots, a dict, and the least recently used first to go.

A slot that is being read or written, or waits to be written to the tier below, is pinned, and pinned slots are never taken.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict

from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context, Slots
from nixl_async.tiers.options import DRAM, Counters, TierStatistics


class MemoryTier:
    """Blocks in memory of this process."""

    def __init__(self, context: Context, options: DRAM) -> None:
        self.name = options.name
        self.n_slots = options.nbytes // context.block_nbytes
        self.counters = Counters()
        self._context, self._ttl = context, options.ttl
        self._slot_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * self.n_slots
        self._stored = [0.0] * self.n_slots
        self._pins = [0] * self.n_slots
        self._free = list(range(self.n_slots - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """The slots with a block and without a pin, the least recently used first."""
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()
        self._slots: Slots

    async def open(self) -> None:
        """Allocate and register the arena."""
        self._slots = await Slots.make(self._context, self.n_slots, self._context.block_nbytes)

    @property
    def known(self) -> Container[bytes]:
        """The keys that are here."""
        return self._slot_of if self._ttl is None else _Young(self, self._ttl)

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def n_obtainable(self) -> int:
        """How many slots could be taken at once."""
        return len(self._free) + len(self._idle)

    def blocks(self, slots: Sequence[int]) -> Blocks:
        """Return slots as blocks of memory."""
        return self._slots.blocks(slots)

    # Taking slots, filling them, giving them back.

    async def take(self, n: int) -> list[int]:
        """Take `n` slots, `n_slots` at most, evicting what was used least recently; waits while others are pinned, in turn."""
        async with self._turn:
            while self.n_obtainable < n:
                self._room.clear()
                await self._room.wait()
            return self._take(n)

    def take_now(self, n: int) -> list[int]:
        """Take up to `n` slots that can be had without waiting, none if others wait."""
        return [] if self._turn.locked() else self._take(min(n, self.n_obtainable))

    def _take(self, n: int) -> list[int]:
        for _ in range(n - len(self._free)):
            slot, _ = self._idle.popitem(last=False)
            self._empty(slot)
            self._free.append(slot)
            self.counters.evictions += 1
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return taken

    def _empty(self, slot: int) -> None:
        key = self._key_of[slot]
        self._key_of[slot] = None
        if key is not None and self._slot_of.get(key) == slot:
            del self._slot_of[key]

    def give(self, slots: Iterable[int]) -> None:
        """Give back slots that were taken and not filled."""
        self._free.extend(slots)
        self._room.set()

    def fill(self, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        """Make known blocks whose bytes are in slots that were taken; the slots are pinned once."""
        now = time.time()
        for key, slot in zip(keys, slots, strict=True):
            other = self._slot_of.get(key)
            if other is not None:
                # Another call was faster, or its time is over. The bytes are the same; this one is the younger.
                self._empty(other)
                if self._pins[other] == 0:
                    del self._idle[other]
                    self._free.append(other)
            self._slot_of[key] = slot
            self._key_of[slot] = key
            self._stored[slot] = now
            self._pins[slot] = 1

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Return the slots of keys that are known, each pinned once more."""
        found = []
        for key in keys:
            slot = self._slot_of[key]
            if self._pins[slot] == 0:
                del self._idle[slot]
            self._pins[slot] += 1
            found.append(slot)
        return found

    def unpin(self, slots: Iterable[int]) -> None:
        """Take back one pin of each slot; those without any are the most recently used."""
        for slot in slots:
            self._pins[slot] -= 1
            if self._pins[slot] == 0:
                if self._key_of[slot] is None:
                    self._free.append(slot)
                else:
                    self._idle[slot] = None
        self._room.set()

    def delete(self, keys: Sequence[bytes]) -> None:
        """Forget blocks; those that are not there are no error."""
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is not None:
                self._empty(slot)
                if self._pins[slot] == 0:
                    del self._idle[slot]
                    self._free.append(slot)
        self._room.set()

    def sweep(self) -> None:
        """Forget what has outlived its time to live."""
        if self._ttl is not None:
            limit = time.time() - self._ttl
            old = [key for key, slot in self._slot_of.items() if self._stored[slot] < limit]
            self.counters.evictions += len(old)
            self.delete(old)

    def stored(self, key: bytes) -> float:
        """Return when a known block was stored."""
        return self._stored[self._slot_of[key]]

    def statistics(self) -> TierStatistics:
        """Return the counters."""
        return TierStatistics(self.name, len(self), self.n_slots, **asdict(self.counters))

    async def aclose(self) -> None:
        """Deregister the arena."""
        await self._slots.aclose()


class _Young:
    def __init__(self, tier: MemoryTier, ttl: float) -> None:
        self._tier, self._limit = tier, time.time() - ttl
        self._slot_of = tier._slot_of

    def __contains__(self, key: object) -> bool:
        return key in self._slot_of and self._tier.stored(key) >= self._limit

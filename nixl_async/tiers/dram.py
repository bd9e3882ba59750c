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
        """The key of each slot that is filled, and pinned or idle; that of another slot means nothing."""
        self._stored = [0.0] * self.n_slots
        self._pins = [0] * self.n_slots
        self._free = list(range(self.n_slots - 1, -1, -1))
        self._idle: OrderedDict[int, bytes] = OrderedDict()
        """The slots with a block and without a pin, and their keys, the least recently used first."""
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

    def keys(self) -> Iterable[bytes]:
        """The keys that are here, those that outlived their time among them."""
        return self._slot_of.keys()

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
        free = self._free
        if len(free) < n:
            pop, slot_of = self._idle.popitem, self._slot_of
            evicted = [pop(last=False) for _ in range(n - len(free))]
            for _, key in evicted:
                del slot_of[key]
            free += [slot for slot, _ in evicted]
            self.counters.evictions += len(evicted)
        taken = free[len(free) - n :]
        del free[len(free) - n :]
        return taken

    def give(self, slots: Iterable[int]) -> None:
        """Give back slots that were taken and not filled."""
        self._free.extend(slots)
        self._room.set()

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Return the places of the keys that are not known."""
        known = self.known
        return [at for at, key in enumerate(keys) if key not in known]

    def fill(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[int]:
        """Make known blocks whose bytes are in slots that were taken, each key once; return where they are, pinned once more.

        What another call brought meanwhile stays where it is, which may be on its way down; the bytes are the same, and the slot
        that was taken for it is given back.
        """
        slot_of, key_of, pins = self._slot_of, self._key_of, self._pins
        places = list(slots)
        if not slot_of.keys().isdisjoint(keys):
            known = self.known
            for at, key in enumerate(keys):
                if key in known:
                    places[at] = self.pin([key])[0]
                    self.give([slots[at]])
                else:
                    self._forget([key])
        for key, slot, place in zip(keys, slots, places, strict=True):
            if slot == place:
                slot_of[key] = slot
                key_of[slot] = key
                pins[slot] = 1
        if self._ttl is not None:
            now, stored = time.time(), self._stored
            for slot in places:
                stored[slot] = now
        return places

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Return the slots of keys that are known, each pinned once more."""
        slot_of, pins, idle = self._slot_of, self._pins, self._idle
        slots = [slot_of[key] for key in keys]
        for slot in slots:
            if not pins[slot]:
                del idle[slot]
            pins[slot] += 1
        return slots

    def unpin(self, slots: Iterable[int]) -> None:
        """Take back one pin of each slot; those without any are the most recently used."""
        pins, key_of, idle = self._pins, self._key_of, self._idle
        for slot in slots:
            left = pins[slot] = pins[slot] - 1
            if not left:
                key = key_of[slot]
                if key is None:
                    self._free.append(slot)
                else:
                    idle[slot] = key
        self._room.set()

    def delete(self, keys: Sequence[bytes]) -> None:
        """Forget blocks; those that are not there are no error."""
        self._forget(keys)
        self._room.set()

    def _forget(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            slot = self._slot_of.pop(key, None)
            if slot is not None:
                self._key_of[slot] = None
                if self._pins[slot] == 0:
                    del self._idle[slot]
                    self._free.append(slot)

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

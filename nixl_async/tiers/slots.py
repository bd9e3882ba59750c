"""What a process knows of a directory's index: which block is in which slot, as a dict and arrays, so that asking costs no SQL."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.tiers.groups import FULL, Row, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array


class SlotTable:
    """The slots of a directory. Changed on the loop only; `oldest` reads it from a thread, where an old value does no harm."""

    def __init__(self, n_slots: int) -> None:
        self.slot_of: dict[bytes, int] = {}
        self.keys: list[bytes | None] = [None] * n_slots
        self.generation = np.zeros(n_slots, np.int64)
        self.full = np.zeros(n_slots, np.bool_)
        self.checksum = np.zeros(n_slots, np.uint64)
        self.kind = np.zeros(n_slots, np.uint8)
        self.stored = np.zeros(n_slots, np.float64)
        self.used = np.zeros(n_slots, np.float64)
        self.pins = np.zeros(n_slots, np.int32)
        self._touched = np.zeros(n_slots, np.bool_)
        self._doubles: dict[bytes, set[int]] = {}
        """Other slots that have a key's block too."""

    def load(self, rows: Iterable[Row]) -> None:
        """Take in rows of the index, in order of their changes."""
        for row in rows:
            if row.slot >= len(self.keys):
                continue
            if row.generation < self.generation[row.slot]:
                continue
            if row.state != FULL or row.key is None:
                if self.full[row.slot] and self.generation[row.slot] == row.generation:
                    # Within a generation a slot is reserved before it is full: the row was read before that.
                    continue
                self.forget(row.slot)
                self.generation[row.slot] = row.generation
                continue
            if self.full[row.slot] and self.generation[row.slot] == row.generation:
                self.used[row.slot] = max(self.used[row.slot], row.used)
                continue
            self._fill(row.slot, row.generation, row.key, row.checksum & 0xFFFFFFFFFFFFFFFF, row.kind, row.stored, row.used)

    def find(self, keys: Sequence[bytes], ttl: float | None) -> Array:
        """Return the slot of each key, -1 where there is none or its block has outlived `ttl` seconds."""
        get = self.slot_of.get
        slots = np.array([get(key, -1) for key in keys], np.int64)
        if ttl is not None:
            slots[self.stored[slots] + ttl < time.time()] = -1
        return slots

    def store(self, blocks: Stored) -> None:
        """Take in blocks that this process has stored."""
        slots, generations, keys = blocks.slots, blocks.generations, blocks.keys
        checksums, stored = blocks.checksums, blocks.stored
        new = ~(self.full[slots] & (self.generation[slots] >= generations))
        if not new.all():
            # Learnt from the index already.
            keep = np.flatnonzero(new)
            keys = [keys[at] for at in keep.tolist()]
            slots, generations, checksums, stored = slots[keep], generations[keep], checksums[keep], stored[keep]
        places = slots.tolist()
        if any(map(self.keys.__getitem__, places)):
            for slot in places:
                if self.keys[slot] is not None:
                    self.forget(slot)
        self.generation[slots] = generations
        self.checksum[slots] = checksums
        self.kind[slots] = blocks.kind
        self.stored[slots] = self.used[slots] = stored
        self.full[slots] = True
        own, slot_of = self.keys, self.slot_of
        for slot, key in zip(places, keys, strict=True):
            own[slot] = key
            if key in slot_of:
                self._choose(slot, key)
            else:
                slot_of[key] = slot

    def _fill(self, slot: int, generation: int, key: bytes, checksum: int, kind: int, stored: float, used: float) -> None:
        self.forget(slot)
        self.generation[slot] = generation
        self.checksum[slot] = checksum
        self.kind[slot] = kind
        self.stored[slot] = stored
        self.full[slot] = True
        self.keys[slot] = key
        self.used[slot] = used
        self._choose(slot, key)

    def _choose(self, slot: int, key: bytes) -> None:
        """Let a key have this slot, or the one it has already, if that is younger."""
        other = self.slot_of.get(key)
        if other is not None:
            # Two processes stored it at the same time, or the older one is too old: that slot is the first to be used again.
            older = slot if self.stored[slot] < self.stored[other] else other
            self.used[older] = 0.0
            self._doubles.setdefault(key, set()).add(older)
            if older == slot:
                return
        self.slot_of[key] = slot

    def forget(self, slot: int) -> None:
        """Take a slot's block out."""
        key = self.keys[slot]
        if key is not None:
            self._unlink(slot, key)
        self.keys[slot] = None
        self.full[slot] = False
        self._touched[slot] = False

    def _unlink(self, slot: int, key: bytes) -> None:
        if self.slot_of.get(key) == slot:
            del self.slot_of[key]
        doubles = self._doubles.get(key)
        if doubles is not None:
            doubles.discard(slot)
            if not doubles:
                del self._doubles[key]

    def all_of(self, keys: Iterable[bytes]) -> list[int]:
        """Return every slot that has the block of one of these keys."""
        found = [self.slot_of[key] for key in keys if key in self.slot_of]
        return found + [slot for key in keys for slot in self._doubles.get(key, ())]

    def forget_taken(self, slots: Array, generations: Array) -> None:
        """Take out the blocks of slots that are reserved for others, which began `generations`."""
        keys, slot_of, doubles = self.keys, self.slot_of, self._doubles
        for slot in slots.tolist():
            key = keys[slot]
            if key is not None:
                if doubles or slot_of.get(key) != slot:
                    self._unlink(slot, key)
                else:
                    del slot_of[key]
            keys[slot] = None
        self.full[slots] = False
        self._touched[slots] = False
        self.generation[slots] = generations

    def pin(self, slots: Array) -> None:
        """Keep slots, in ascending order, from being taken, until they are unpinned as often."""
        self._count(slots, 1)

    def unpin(self, slots: Array) -> None:
        """Take back `pin`."""
        self._count(slots, -1)

    def _count(self, slots: Array, by: int) -> None:
        if (slots[1:] != slots[:-1]).all():
            self.pins[slots] += by
        else:
            np.add.at(self.pins, slots, by)

    def touch(self, slots: Array) -> None:
        """Note that slots are used."""
        self.used[slots] = time.time()
        self._touched[slots] = True

    def take_touched(self) -> tuple[Array, NDArray[np.float64]]:
        """Return (slot, generation) of what was used since this was last called, and the times."""
        slots = np.flatnonzero(self._touched)
        self._touched[slots] = False
        return np.stack((slots, self.generation[slots]), axis=1), self.used[slots]

    def oldest(self, n: int, ttl: float | None) -> Array:
        """Return `n` slots, (slot, generation), that nobody reads: those too old first, then the least recently used."""
        candidates = np.flatnonzero(self.full & (self.pins == 0))
        used = self.used[candidates]
        if ttl is not None:
            used = np.where(self.stored[candidates] + ttl < time.time(), 0.0, used)
        if len(candidates) > n:
            # Of those used at the same time the first in the file, so that what is taken together lies together.
            limit = np.partition(used, n - 1)[n - 1]
            older, same = np.flatnonzero(used < limit), np.flatnonzero(used == limit)
            chosen = np.concatenate((older, same[: n - len(older)]))
            candidates, used = candidates[chosen], used[chosen]
        found = candidates[np.argsort(used, kind="stable")]
        return np.stack((found, self.generation[found]), axis=1)

    def young(self, ttl: float) -> Container[bytes]:
        """Return the keys of the blocks that have not outlived `ttl` seconds, for `in`."""
        return _Young(self, ttl)

    def expired(self, ttl: float) -> NDArray[np.int64]:
        """Return the slots whose blocks have outlived `ttl` seconds."""
        return np.flatnonzero(self.full & (self.stored + ttl < time.time()))


class _Young:
    def __init__(self, table: SlotTable, ttl: float) -> None:
        self._table, self._limit = table, time.time() - ttl

    def __contains__(self, key: object) -> bool:
        slot = self._table.slot_of.get(key)  # type: ignore[call-overload]
        return slot is not None and bool(self._table.stored[slot] >= self._limit)

"""How blocks go through the tiers, some hundred at a time: into the first, down by queues, up from the first that has them.

`Cascade` moves one chunk of a call; `Tiers` cuts calls into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from nixl_async.errors import NixlError, TransferError
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context, Slots
from nixl_async.tiers.dram import MemoryTier
from nixl_async.tiers.options import MISS, Outcome
from nixl_async.tiers.tier import MISSING, LowerTier
from nixl_async.tiers.writeback import Entry, WriteBack

ATTEMPTS = 3
WORKERS = 2
"""Batches that are written into one tier at once."""


class Cascade:
    """The tiers of one `Tiers`: `memory` is the first or None, `lower` the others. `batch` blocks go down at a time."""

    def __init__(
        self,
        context: Context,
        memory: MemoryTier | None,
        lower: Sequence[LowerTier],
        *,
        promote: bool,
        queue_blocks: int,
        batch: int,
    ) -> None:
        self._context, self.memory, self.lower = context, memory, list(lower)
        self._promote = promote
        self._staging: Slots | None = None
        self.batch = batch
        self.queues: list[WriteBack | None] = []
        for at in range(len(lower)):
            above = lower[at - 1].capacity if at else None if memory is None else memory.n_slots
            # What waits must not be more than the tier above keeps, or it would be evicted before its turn.
            room = queue_blocks if above is None else max(1, min(queue_blocks, above // (4 if at else 2)))
            self.queues.append(None if memory is None and not at else self._queue(at, room))

    def _queue(self, at: int, capacity: int) -> WriteBack:
        async def write(entries: list[Entry]) -> dict[bytes, NixlError]:
            return await self._write_down(at, entries)

        return WriteBack(self.lower[at].name, write, self._release, capacity=capacity, batch=self.batch, n_workers=WORKERS)

    async def open(self) -> None:
        """Allocate the memory through which blocks pass that are not in memory."""
        if self.lower and (len(self.lower) > 1 or self.memory is None):
            self._staging = await Slots.make(self._context, self.batch * (WORKERS + 2), self._context.block_nbytes)

    async def aclose(self) -> None:
        """Release that memory."""
        if self._staging is not None:
            await self._staging.aclose()

    def _release(self, entries: Sequence[Entry]) -> None:
        if self.memory is not None:
            self.memory.unpin([slot for _, slot in entries if slot is not None])

    # Down.

    async def put(self, keys: Sequence[bytes], blocks: Blocks, *, durable: bool) -> list[Outcome]:
        """Put one chunk; `keys` may have some twice."""
        unique = list(keys)
        if len(set(keys)) < len(keys):
            first: dict[bytes, int] = {}
            for at, key in enumerate(keys):
                first.setdefault(key, at)
            unique = list(first)
            blocks = blocks.take(list(first.values()))
        if self.memory is not None:
            found = await self._put_memory(self.memory, unique, blocks, durable)
        elif self._context.reaches(blocks):
            found = await self._put_lower(unique, blocks, durable)
        else:
            found = await self._put_staged(unique, blocks, durable)
        if len(unique) == len(keys):
            return found
        by_key = dict(zip(unique, found, strict=True))
        return [by_key[key] for key in keys]

    async def _put_memory(self, memory: MemoryTier, keys: list[bytes], blocks: Blocks, durable: bool) -> list[Outcome]:
        try:
            slots = await self._fill_memory(memory, keys, blocks)
        except TransferError as error:
            memory.counters.errors += len(keys)
            return [Outcome(error=error)] * len(keys)
        done = Outcome(memory.name, ok=True)
        if not self.lower:
            memory.unpin(slots)
            return [done] * len(keys)
        entries: list[Entry] = list(zip(keys, slots, strict=True))
        if durable:
            try:
                found = await self._put_lower(keys, memory.blocks(slots), True)
            finally:
                self._release(entries)
            return [one if one else Outcome(memory.name, one.error) for one in found]
        known = self.lower[0].known
        self._release([entry for entry in entries if entry[0] in known])
        queue = self.queues[0]
        assert queue is not None
        await queue.put([entry for entry in entries if entry[0] not in known])
        return [done] * len(keys)

    async def _fill_memory(self, memory: MemoryTier, keys: list[bytes], blocks: Blocks) -> list[int]:
        """Bring blocks into memory; return their slots, pinned. What is there already is not copied."""
        for attempt in range(ATTEMPTS):
            new = list(range(len(keys))) if attempt == ATTEMPTS - 1 else memory.missing(keys)
            taken = await memory.take(len(new)) if new else []
            if len(new) == len(keys):
                break
            fresh, known = set(new), memory.known
            if all(at in fresh or key in known for at, key in enumerate(keys)):
                break
            # Some were evicted to make room for the others; nothing may be pinned while waiting for room.
            memory.give(taken)
        old = [] if len(new) == len(keys) else [at for at in range(len(keys)) if at not in fresh]
        held = memory.pin([keys[at] for at in old])
        if new:
            mine = keys if not old else [keys[at] for at in new]
            try:
                source = blocks.take(new) if old else blocks
                await self._context.copy(source, memory.blocks(taken), put=True)
            except BaseException:
                memory.give(taken)
                memory.unpin(held)
                raise
            taken = memory.fill(mine, taken)
            memory.counters.written += len(new)
            memory.counters.nbytes_written += len(new) * self._context.block_nbytes
        if not old:
            return taken
        slots = [-1] * len(keys)
        for places, found in ((old, held), (new, taken)):
            for at, slot in zip(places, found, strict=True):
                slots[at] = slot
        return slots

    async def _put_staged(self, keys: list[bytes], blocks: Blocks, durable: bool) -> list[Outcome]:
        """Put blocks that tiers cannot take where they are: a peer's, or those in a GPU's memory."""
        assert self._staging is not None
        slots = await self._staging.take(len(keys))
        try:
            staged = self._staging.blocks(slots)
            await self._context.copy(blocks, staged, put=True)
            return await self._put_lower(keys, staged, durable)
        except TransferError as error:
            return [Outcome(error=error)] * len(keys)
        finally:
            self._staging.give(slots)

    async def _put_lower(self, keys: list[bytes], blocks: Blocks, durable: bool) -> list[Outcome]:
        """Write into the first lower tier that takes each block, and queue it for the next."""
        found = [MISS] * len(keys)
        left = list(range(len(keys)))
        for at, tier in enumerate(self.lower):
            whole = len(left) == len(keys)
            mine = keys if whole else [keys[one] for one in left]
            failures = await tier.write(mine, blocks if whole else blocks.take(left), durable=durable)
            good = Outcome(tier.name, ok=True)
            if whole and at + 1 == len(self.lower) and not any(failures):
                return [good] * len(keys)
            failed = []
            for one, error in zip(left, failures, strict=True):
                found[one] = good if error is None else Outcome(error=error)
                if error is not None:
                    failed.append(one)
            if at + 1 < len(self.lower):
                await self._pass_on(at + 1, [(keys[one], None) for one in left if found[one].ok])
            left = failed
            if not left:
                break
        return found

    async def _pass_on(self, at: int, entries: list[Entry]) -> None:
        queue, known = self.queues[at], self.lower[at].known
        assert queue is not None
        self._release([entry for entry in entries if entry[0] in known])
        await queue.put([entry for entry in entries if entry[0] not in known])

    async def _write_down(self, at: int, entries: list[Entry]) -> dict[bytes, NixlError]:
        """Write queued blocks into tier `at`: out of memory, or of a tier above; then queue them for the next.

        What the tier does not take is queued for the next all the same.
        """
        tier, memory = self.lower[at], self.memory
        held: dict[bytes, int] = {key: slot for key, slot in entries if slot is not None}
        failed: dict[bytes, NixlError] = {}
        try:
            known = tier.known
            wanted = [key for key, _ in entries if key not in known]
            if memory is not None:
                more = [key for key in wanted if key not in held and key in memory.known]
                held.update(zip(more, memory.pin(more), strict=True))
                mine = [key for key in wanted if key in held]
                if mine:
                    failures = await tier.write(mine, memory.blocks([held[key] for key in mine]), durable=False)
                    failed.update((key, error) for key, error in zip(mine, failures, strict=True) if error is not None)
            rest = [key for key in wanted if key not in held]
            if rest:
                failed |= await self._write_from_above(at, rest)
            if at + 1 < len(self.lower):
                on: list[Entry] = [(key, held.pop(key, None) if key in failed else None) for key, _ in entries]
                await self._pass_on(at + 1, on)
        finally:
            if memory is not None:
                memory.unpin(held.values())
        return failed

    async def _write_from_above(self, at: int, keys: list[bytes]) -> dict[bytes, NixlError]:
        assert self._staging is not None
        failed: dict[bytes, NixlError] = {}
        slots = await self._staging.take(len(keys))
        try:
            left, rooms = keys, slots
            for above in reversed(self.lower[:at]):
                staged = self._staging.blocks(rooms)
                failures = await above.read(left, staged)
                good = [one for one, error in enumerate(failures) if error is None]
                mine = [left[one] for one in good]
                written = await self.lower[at].write(mine, staged.take(good), durable=False)
                failed.update((key, error) for key, error in zip(mine, written, strict=True) if error is not None)
                bad = [one for one, error in enumerate(failures) if error is not None]
                failed.update((left[one], error) for one in bad if (error := failures[one]) not in (None, MISSING))
                left, rooms = [left[one] for one in bad], [rooms[one] for one in bad]
                if not left:
                    break
            queue = self.queues[at]
            if queue is not None:
                # Evicted before their turn came: nothing can be done, and nothing is wrong.
                queue.dropped += sum(key not in failed for key in left)
        finally:
            self._staging.give(slots)
        return failed

    # Up.

    async def get(self, keys: Sequence[bytes], blocks: Blocks) -> list[Outcome]:
        """Get one chunk from the first tier that has each block."""
        found = [MISS] * len(keys)
        left = list(range(len(keys)))
        if self.memory is not None:
            left = await self._get_memory(self.memory, keys, blocks, found)
        for at, tier in enumerate(self.lower):
            if not left:
                break
            try:
                here = await tier.find(keys if len(left) == len(keys) else [keys[one] for one in left])
            except TransferError as error:
                tier.counters.errors += 1
                for one in left:
                    found[one] = Outcome(error=error)
                continue
            mine = left if all(here) else [one for one, is_here in zip(left, here, strict=True) if is_here]
            if mine:
                await self._get_lower(at, keys, blocks, mine, found)
                left = [one for one in left if not found[one].ok and not (found[one].tier and found[one].error)]
        return found

    async def _get_memory(self, memory: MemoryTier, keys: Sequence[bytes], blocks: Blocks, found: list[Outcome]) -> list[int]:
        known = memory.known
        mine = [at for at, key in enumerate(keys) if key in known]
        if not mine:
            return list(range(len(keys)))
        slots = memory.pin([keys[at] for at in mine])
        try:
            target = blocks if len(mine) == len(keys) else blocks.take(mine)
            await self._context.copy(memory.blocks(slots), target, put=False)
            outcome = Outcome(memory.name, ok=True)
            memory.counters.hits += len(mine)
            memory.counters.nbytes_read += len(mine) * self._context.block_nbytes
        except TransferError as error:
            outcome = Outcome(memory.name, error)
            memory.counters.errors += len(mine)
        finally:
            memory.unpin(slots)
        for at in mine:
            found[at] = outcome
        return [] if len(mine) == len(keys) else [at for at, key in enumerate(keys) if found[at] is MISS]

    async def _get_lower(self, at: int, keys: Sequence[bytes], blocks: Blocks, which: list[int], found: list[Outcome]) -> None:
        """Get from tier `at`: through memory, where the blocks stay, as far as there is room; the rest directly or staged."""
        memory = self.memory
        if memory is not None and self._promote:
            slots = memory.take_now(len(which))
            if slots:
                await self._get_through_memory(memory, slots, at, keys, blocks, which[: len(slots)], found)
                which = which[len(slots) :]
        if not which:
            return
        whole = len(which) == len(keys)
        mine, target = (list(keys), blocks) if whole else ([keys[one] for one in which], blocks.take(which))
        if self._context.reaches(target):
            good = self._settle(at, which, await self.lower[at].read(mine, target), found)
            if at and good and memory is None and self._promote:
                chosen = target.take([which.index(one) for one in good] if len(good) < len(which) else range(len(which)))
                failures = await self.lower[0].write([keys[one] for one in good], chosen, durable=False)
                self.lower[0].counters.promoted += sum(error is None for error in failures)
            return
        # Not all of these tiers have staging memory of their own: those with DRAM only above one tier wait for its room.
        if self._staging is not None:
            slots = await self._staging.take(len(which))
            try:
                await self._bounce(self._staging.blocks(slots), at, mine, target, which, found)
            finally:
                self._staging.give(slots)
        elif memory is not None:
            slots = await memory.take(len(which))
            try:
                await self._bounce(memory.blocks(slots), at, mine, target, which, found)
            finally:
                memory.give(slots)

    async def _bounce(
        self, staged: Blocks, at: int, mine: list[bytes], target: Blocks, which: list[int], found: list[Outcome]
    ) -> list[int]:
        """Read into `staged` and copy what is good to `target`; return which of `which` are good, by their places in it."""
        good = set(self._settle(at, which, await self.lower[at].read(mine, staged), found))
        places = [place for place, one in enumerate(which) if one in good]
        if places:
            try:
                await self._context.copy(staged.take(places), target.take(places), put=False)
            except TransferError as error:
                for place in places:
                    found[which[place]] = Outcome(self.lower[at].name, error)
        return places

    async def _get_through_memory(
        self,
        memory: MemoryTier,
        slots: list[int],
        at: int,
        keys: Sequence[bytes],
        blocks: Blocks,
        which: list[int],
        found: list[Outcome],
    ) -> None:
        mine = [keys[one] for one in which]
        try:
            places = await self._bounce(memory.blocks(slots), at, mine, blocks.take(which), which, found)
        except BaseException:
            memory.give(slots)
            raise
        unique = {mine[place]: slots[place] for place in places}
        kept = set(unique.values())
        memory.give([slot for slot in slots if slot not in kept])
        slots = memory.fill(list(unique), list(unique.values()))
        memory.counters.promoted += len(unique)
        entries: list[Entry] = list(zip(unique, slots, strict=True))
        queue = self.queues[0]
        if at and queue is not None:
            known = self.lower[0].known
            self._release([entry for entry in entries if entry[0] in known])
            fresh = [entry for entry in entries if entry[0] not in known]
            self.lower[0].counters.promoted += len(fresh)
            queue.put_now(fresh)
        else:
            self._release(entries)

    def _settle(self, at: int, which: list[int], failures: Sequence[NixlError | None], found: list[Outcome]) -> list[int]:
        """Note what reading from tier `at` came to; return those that are good."""
        tier = self.lower[at]
        right = Outcome(tier.name, ok=True)
        if len(which) == len(found) and not any(failures) and found.count(MISS) == len(found):
            found[:] = [right] * len(found)
            tier.counters.hits += len(found)
            return which
        good = []
        for one, error in zip(which, failures, strict=True):
            if error is None:
                before = found[one].error
                found[one] = right if before is None else Outcome(tier.name, before, ok=True)
                good.append(one)
            elif error is not MISSING:
                found[one] = Outcome(error=error)
        tier.counters.hits += len(good)
        return good

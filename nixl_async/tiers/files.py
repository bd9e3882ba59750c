"""The tier of a directory: large segment files cut into slots, and an index that the processes which use it share.

Writing: slots are reserved some at a time; the bytes are moved by one transfer of many pages, then, if durability is asked for,
fdatasync; then the blocks are made known in one transaction. Reading: one transfer, the checksums, and a look whether a slot was
taken from under the reader meanwhile. See `index.py` for why nothing wrong can be served.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.backend import quiesce
from nixl_async.errors import IntegrityError, NixlError
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import NONE
from nixl_async.tiers.context import Context, heard
from nixl_async.tiers.groups import NOTHING, Row, Stored
from nixl_async.tiers.index import Index
from nixl_async.tiers.moves import CheckedMoves
from nixl_async.tiers.options import Files
from nixl_async.tiers.reservations import Reservations
from nixl_async.tiers.segments import Segments
from nixl_async.tiers.slots import SlotTable
from nixl_async.tiers.tier import MISSING, Failures, LowerTier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array

logger = logging.getLogger("nixl_async.tiers")

T = TypeVar("T")
APPLIED_AT_ONCE = 256
"""Rows of the index that are taken in before the loop is given to others: about half a millisecond."""
TOUCH_SECONDS = 5.0


class FileTier(LowerTier):
    """Blocks in `options.path`, in a subdirectory for their size."""

    def __init__(self, context: Context, options: Files) -> None:
        super().__init__()
        self.name = options.name
        self._context, self._options = context, options
        directory = os.path.join(os.fspath(options.path), f"{context.block_nbytes}-byte-blocks")
        self._index = Index(directory, context.block_nbytes, options.nbytes, options.segment_nbytes)
        # One connection each: who asks what changed does not wait for a commit to reach the device.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nixl-tiers-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="nixl-tiers-read")
        self._looking = threading.Lock()
        self._table = SlotTable(0)
        self._change = 0
        self._reservations: Reservations
        self._segments = Segments(context, self._index, direct=options.direct)
        self._moves = CheckedMoves(context, self._segments, cached=not options.direct)
        self._refreshing: asyncio.Task[None] | None = None
        self._waiting: list[tuple[Stored | None, bool, asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._last_touch = time.monotonic()

    @property
    def known(self) -> Container[bytes]:
        """The keys of the directory."""
        if self._options.ttl is None:
            return self._table.slot_of
        return self._table.young(self._options.ttl)

    def keys(self) -> Iterable[bytes]:
        """The keys that the directory had when it was last looked into."""
        return self._table.slot_of.keys()

    def __len__(self) -> int:
        return len(self._table.slot_of)

    async def open(self) -> None:
        """Open the directory, verify its index, load it."""

        def load() -> tuple[SlotTable, int]:
            rows, change = self._index.open()
            table = SlotTable(self._index.n_slots)
            table.load(rows)
            return table, change

        try:
            self._table, self._change = await self._on(self._writer, load)
        except BaseException:
            self._writer.shutdown()
            self._reader.shutdown()
            raise
        self.capacity = self._index.n_slots
        unsummed = self._context.kind == NONE
        self._reservations = Reservations(
            self._index, self._table, self._writer, self._evicted, ttl=self._options.ttl, durable=unsummed
        )
        if self._index.replaced:
            logger.warning(
                "the index of %s was damaged; the tier begins empty, the old index is %s",
                self._index.directory,
                self._index.replaced,
            )

    async def _on(self, thread: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
        return await quiesce(asyncio.get_running_loop().run_in_executor(thread, work, *arguments))

    # What is there.

    async def find(self, keys: Sequence[bytes]) -> list[bool]:
        """Look into the dict, and for what is not in it, into the index."""
        known = self.known
        found = [key in known for key in keys]
        if not all(found):
            await self.refresh()
            found = [key in known for key in keys]
        return found

    async def refresh(self) -> None:
        """Take in what other processes changed. Calls at the same time share one look, which begins after each of them."""
        running = self._refreshing
        if running is not None:
            # It may have looked before this call.
            await asyncio.wait([running])
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
            self._refreshing.add_done_callback(heard)
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        if self._peek() is None:
            await self._apply(await self._on(self._reader, self._look))

    async def _apply(self, rows: list[Row]) -> None:
        for at in range(0, len(rows), APPLIED_AT_ONCE):
            if at:
                await asyncio.sleep(0)
            self._table.load(rows[at : at + APPLIED_AT_ONCE])
        if rows:
            self._change = max(self._change, rows[-1].change)

    def _own_change(self, change: int) -> None:
        """Note a change that is this process's and taken in already; unless others' are missing before it."""
        if change == self._change + 1:
            self._change = change

    def _evicted(self, n: int, change: int) -> None:
        self.counters.evictions += n
        if change:
            self._own_change(change)

    # Reading.

    async def read(self, keys: Sequence[bytes], blocks: Blocks) -> Failures:
        """Read by one transfer, in the order of the file; if that fails, one by one, to know which fail."""
        table = self._table
        slots = table.find(keys, self._options.ttl)
        which = np.flatnonzero(slots >= 0)
        if not len(which):
            return [MISSING] * len(keys)
        mine, target = list(keys), blocks
        if len(which) < len(keys) or (slots[1:] < slots[:-1]).any():
            which = which[np.argsort(slots[which], kind="stable")]
            slots, target = slots[which], blocks.take(which)
            mine = [keys[at] for at in which.tolist()]
        generations, sums, kinds = table.generation[slots], table.checksum[slots], table.kind[slots]
        table.pin(slots)
        try:
            errors, good, rows = await self._moves.read(mine, slots, target, sums, kinds, self._look, self._peek)
            await self._apply(rows)
        finally:
            table.unpin(slots)
        right = good & table.full[slots] & (table.generation[slots] == generations)
        n_read = int(np.count_nonzero(right))
        if n_read == len(keys) and not any(errors):
            failures: Failures = [None] * len(keys)
        else:
            failures, n_read = await self._settle(keys, which, slots, generations, errors, good)
        self.counters.nbytes_read += n_read * self._context.block_nbytes
        table.touch(slots[right])
        self._touch_later()
        return failures

    def _look(self) -> list[Row]:
        """Ask the index, on any thread, what changed since what is taken in."""
        with self._looking:
            return self._index.changes(self._change)

    def _peek(self) -> list[Row] | None:
        """As `_look`, on the loop; `None` if that is not enough."""
        return [] if self._index.glance() == self._change else None

    async def _settle(
        self, keys: Sequence[bytes], which: Array, slots: Array, generations: Array, errors: Failures, good: NDArray[np.bool_]
    ) -> tuple[Failures, int]:
        """Tell what became of each key, and how many were read; drop what is damaged."""
        failures: Failures = [MISSING] * len(keys)
        table = self._table
        still = table.full[slots] & (table.generation[slots] == generations)
        bad, n_read = [], 0
        for at, slot, generation, error, right, same in zip(
            which.tolist(), slots.tolist(), generations.tolist(), errors, good.tolist(), still.tolist(), strict=True
        ):
            if error is not None:
                failures[at] = error
                self.counters.errors += 1
            elif same and not right:
                failures[at] = IntegrityError(
                    f"the block {keys[at].hex()} in slot {slot} of {self._index.directory} does not have its checksum",
                    backend="tiers",
                )
                bad.append((slot, generation))
            elif same:
                failures[at] = None
                n_read += 1
        if bad:
            self.counters.corrupt += len(bad)
            await self._drop(*np.array(bad, np.int64).T)
        return failures, n_read

    # Writing.

    async def write(self, keys: Sequence[bytes], blocks: Blocks, *, durable: bool) -> Failures:
        """Reserve, move and sum up, sync, make known. What is there already is not written again."""
        failures: Failures = [None] * len(keys)
        table = self._table
        known = self.known
        new: dict[bytes, int] = {}
        for at, key in enumerate(keys):
            if key not in known and key not in new:
                new[key] = at
        if durable and len(new) < len(keys):
            old = {at: key for at, key in enumerate(keys) if key not in new and key in table.slot_of}
            try:
                # They may have been stored without durability, and a commit with it covers those before.
                await self._segments.sync(np.array([table.slot_of[key] for key in old.values()], np.int64))
                await self._commit(None, True)
            except NixlError as error:
                _spread(failures, keys, dict.fromkeys(old, error))
        todo = list(new.values())
        while todo:
            try:
                reserved = await self._reservations.take(len(todo))
            except NixlError as error:
                self.counters.errors += len(todo)
                return _spread(failures, keys, dict.fromkeys(todo, error))
            part, todo = todo[: len(reserved)], todo[len(reserved) :]
            errors = await self._write_part(part, keys, blocks, reserved, durable)
            _spread(failures, keys, errors)
        return failures

    async def _write_part(
        self, part: list[int], keys: Sequence[bytes], blocks: Blocks, reserved: Array, durable: bool
    ) -> dict[int, NixlError]:
        slots = reserved[:, 0]
        whole = len(part) == len(keys)
        mine, source = (list(keys), blocks) if whole else ([keys[at] for at in part], blocks.take(part))
        kind = self._context.kind
        errors: dict[int, NixlError] = {}
        held = reserved
        try:
            moved, sums = await self._moves.write(mine, slots, source)
            if any(moved):
                errors = {part[at]: error for at, error in enumerate(moved) if error is not None}
                good = np.array([error is None for error in moved])
                self._reservations.give(reserved[~good])
                held, sums = reserved[good], sums[good]
                mine = [key for key, error in zip(mine, moved, strict=True) if error is None]
            if mine:
                if durable:
                    await self._segments.sync(slots)
                # From here on the slots are the commit's, whatever becomes of this task.
                ready, held = held, NOTHING
                stored = Stored(ready[:, 0], ready[:, 1], mine, sums, np.full(len(mine), time.time()), kind)
                await self._commit(stored, durable)
                self.counters.written += len(mine)
                self.counters.nbytes_written += len(mine) * self._context.block_nbytes
        except NixlError as error:
            errors |= {at: error for at in part if at not in errors}
        finally:
            self._reservations.give(held)
        self.counters.errors += len(errors)
        return errors

    async def _commit(self, blocks: Stored | None, durable: bool) -> None:
        """Make blocks known; commits asked for at the same time share a transaction. It happens even if this is cancelled."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(heard)
        self._waiting.append((blocks, durable, done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        await asyncio.shield(done)

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                blocks = Stored.joined([part for part, _, _ in batch if part is not None])
                try:
                    change = await self._on(self._writer, self._index.store, blocks, any(durable for _, durable, _ in batch))
                except NixlError as error:
                    self._reservations.give(np.stack((blocks.slots, blocks.generations), axis=1))
                    for _, _, done in batch:
                        done.set_exception(error)
                    continue
                for at in range(0, len(blocks), APPLIED_AT_ONCE):
                    if at:
                        await asyncio.sleep(0)
                    self._table.store(blocks.part(at, at + APPLIED_AT_ONCE))
                self._own_change(change)
                for _, _, done in batch:
                    done.set_result(None)
        finally:
            self._committing = None

    # Forgetting.

    async def _drop(self, slots: Array, generations: Array | None = None) -> None:
        given = self._table.generation[slots] if generations is None else generations
        await self._on(self._writer, self._index.drop, np.stack((slots, given), axis=1))
        await self.refresh()

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget blocks; those that are not there are no error."""
        await self.refresh()
        slots = self._table.all_of(set(keys))
        if slots:
            await self._drop(np.array(slots, np.int64))

    async def sweep(self) -> None:
        """Forget what has outlived its time to live."""
        if self._options.ttl is None:
            return
        slots = self._table.expired(self._options.ttl)
        if len(slots):
            self.counters.evictions += len(slots)
            await self._drop(slots)

    def _touch_later(self) -> None:
        """Tell the other processes now and then what this one reads, so that they do not evict it."""
        now = time.monotonic()
        if now - self._last_touch > TOUCH_SECONDS:
            self._last_touch = now
            blocks, used = self._table.take_touched()
            if len(blocks):
                touching = asyncio.get_running_loop().run_in_executor(self._writer, self._index.touch, blocks, used)
                touching.add_done_callback(heard)

    async def aclose(self) -> None:
        """Finish the commits, note what was used, give reserved slots back, close the files."""
        await self._reservations.settled()
        await self._segments.synced()
        while self._committing is not None:
            await asyncio.wait([self._committing])
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        blocks, used = self._table.take_touched()

        def close() -> None:
            try:
                if len(blocks):
                    self._index.touch(blocks, used)
            finally:
                self._index.close(self._reservations.slots)

        try:
            await self._on(self._writer, close)
        finally:
            await self._segments.aclose()
            self._writer.shutdown()
            self._reader.shutdown()


def _spread(failures: Failures, keys: Sequence[bytes], errors: Mapping[int, NixlError]) -> Failures:
    """Enter errors, by position, for all places where their keys are."""
    if errors:
        by_key = {keys[at]: error for at, error in errors.items()}
        for at, key in enumerate(keys):
            if key in by_key:
                failures[at] = by_key[key]
    return failures

"""The tier of a directory: large segment files cut into slots, and an index that the processes which use it share.

Writing: slots are reserved some at a time; the bytes are moved by one transfer of many pages, then, if durability is asked for,
fdatasync; then the blocks are made known in one transaction. Reading: one transfer, the checksums, and a look whether a slot was
taken from under the reader meanwhile. See `index.py` for why nothing wrong can be served.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.backend import quiesce
from nixl_async.descriptors import Descriptor
from nixl_async.errors import IntegrityError, NixlError, TransferError
from nixl_async.files import os_error
from nixl_async.storage import FileRegion
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import NONE
from nixl_async.tiers.context import Context, heard, together
from nixl_async.tiers.index import Index, Row, Stored
from nixl_async.tiers.options import Files
from nixl_async.tiers.slots import SlotTable
from nixl_async.tiers.tier import MISSING, Failures, LowerTier

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

logger = logging.getLogger("nixl_async.tiers")

T = TypeVar("T")
RESERVED_AT_ONCE = 1024
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
        self._table = SlotTable(0)
        self._change = 0
        self._segments: dict[int, asyncio.Task[FileRegion]] = {}
        self._reserved: list[tuple[int, int]] = []
        self._reserving = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._waiting: list[tuple[list[Stored], list[int], bool, asyncio.Future[None]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._unsynced: list[tuple[set[int], asyncio.Future[None]]] = []
        self._syncing: asyncio.Task[None] | None = None
        self._putting = asyncio.Lock()
        self._last_touch = time.monotonic()

    @property
    def known(self) -> Container[bytes]:
        """The keys of the directory."""
        if self._options.ttl is None:
            return self._table.slot_of
        return self._table.young(self._options.ttl)

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
        rows = await self._on(self._reader, self._index.changes, self._change)
        await self._apply(rows)

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

    # Reading.

    async def read(self, keys: Sequence[bytes], blocks: Blocks) -> Failures:
        """Read by one transfer, in the order of the file; if that fails, one by one, to know which fail."""
        table = self._table
        failures: Failures = [MISSING] * len(keys)
        known = self.known
        present = [at for at, key in enumerate(keys) if key in known]
        if not present:
            return failures
        slots = np.array([table.slot_of[keys[at]] for at in present], np.int64)
        order = np.argsort(slots, kind="stable")
        slots, which = slots[order], np.array(present, np.int64)[order]
        mine = [keys[at] for at in which.tolist()]
        target = blocks.take(which)
        generations, sums, kinds = table.generation[slots], table.checksum[slots], table.kind[slots]
        np.add.at(table.pins, slots, 1)
        try:
            errors = await self._move(slots, target, put=False)
            good, _ = await together(self._context.verified(mine, target, sums, kinds, errors), self.refresh())
        finally:
            np.subtract.at(table.pins, slots, 1)
        still = table.full[slots] & (table.generation[slots] == generations)
        bad = []
        n_read = 0
        for at, slot, generation, error, right, same in zip(
            which.tolist(), slots.tolist(), generations.tolist(), errors, good.tolist(), still.tolist(), strict=True
        ):
            if error is not None:
                failures[at] = error
                self.counters.errors += 1
            elif not same:
                failures[at] = MISSING
            elif not right:
                failures[at] = IntegrityError(
                    f"the block {keys[at].hex()} in slot {slot} of {self._index.directory} does not have its checksum",
                    backend="tiers",
                )
                bad.append((slot, generation))
            else:
                failures[at] = None
                n_read += 1
        self.counters.nbytes_read += n_read * self._context.block_nbytes
        if n_read:
            table.touch(slots[still & good])
        if bad:
            self.counters.corrupt += len(bad)
            await self._drop(bad)
        self._touch_later()
        return failures

    async def _move(self, slots: Array, blocks: Blocks, *, put: bool) -> Failures:
        """Move between slots in ascending order and memory."""
        try:
            places = await self._places(slots)
            memory = blocks.descriptor()
            if not put:
                await self._context.agent.transfer(places, memory)
            elif self._options.direct:
                await self._context.agent.transfer(memory, places)
            else:
                # Writers into the page cache of one file exclude each other, and spin while they wait.
                async with self._putting:
                    await self._context.agent.transfer(memory, places)
        except TransferError as error:
            if len(slots) == 1:
                return [error]
        else:
            return [None] * len(slots)
        found: Failures = []
        for at in range(len(slots)):
            found += await self._move(slots[at : at + 1], blocks.take([at]), put=put)
        return found

    async def _places(self, slots: Array) -> list[Descriptor]:
        numbers = slots // self._index.segment_slots
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        found = []
        for part in np.split(slots, cuts):
            number = int(part[0]) // self._index.segment_slots
            region = await self._segment(number)
            found.append(region.pages(part - number * self._index.segment_slots, self._context.block_nbytes))
        return found

    async def _segment(self, number: int) -> FileRegion:
        opening = self._segments.get(number)
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception() is not None)):
            opening = self._segments[number] = asyncio.create_task(self._open_segment(number))
            opening.add_done_callback(heard)
        return await asyncio.shield(opening)

    async def _open_segment(self, number: int) -> FileRegion:
        path = self._index.segment_path(number)
        first = number * self._index.segment_slots
        nbytes = min(self._index.segment_slots, self._index.n_slots - first) * self._context.block_nbytes

        def make() -> None:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))

        try:
            await self._context.on_thread(make)
        except OSError as error:
            raise os_error(error, f"making {path!r}", backend="tiers") from error
        return await self._context.agent.file(path, "r+", nbytes=nbytes, direct=self._options.direct or None)

    # Writing.

    async def write(self, keys: Sequence[bytes], blocks: Blocks, *, durable: bool) -> Failures:
        """Reserve, move and sum up, sync, make known. What is there already is not written again."""
        failures: Failures = [None] * len(keys)
        table = self._table
        known = self.known
        new: dict[bytes, int] = {}
        for at, key in enumerate(keys):
            if key not in known:
                new.setdefault(key, at)
        if durable and len(new) < len(keys):
            old = {at: key for at, key in enumerate(keys) if key not in new and key in table.slot_of}
            try:
                # They may have been stored without durability, and a commit with it covers those before.
                await self._sync({table.slot_of[key] // self._index.segment_slots for key in old.values()})
                await self._commit([], [], True)
            except NixlError as error:
                _spread(failures, keys, dict.fromkeys(old, error))
        todo = list(new.values())
        while todo:
            try:
                reserved = await self._take(len(todo))
            except NixlError as error:
                self.counters.errors += len(todo)
                return _spread(failures, keys, dict.fromkeys(todo, error))
            part, todo = todo[: len(reserved)], todo[len(reserved) :]
            errors = await self._write_part(part, keys, blocks, reserved, durable)
            _spread(failures, keys, errors)
        return failures

    async def _write_part(
        self, part: list[int], keys: Sequence[bytes], blocks: Blocks, reserved: list[tuple[int, int]], durable: bool
    ) -> dict[int, NixlError]:
        reserved.sort()
        slots = np.array([slot for slot, _ in reserved], np.int64)
        mine = [keys[at] for at in part]
        source = blocks.take(part)
        kind = self._context.kind
        errors: dict[int, NixlError] = {}
        given_up = False
        try:
            moved, sums = await together(self._move(slots, source, put=True), self._context.checksums(kind, mine, source))
            good = [at for at, error in enumerate(moved) if error is None]
            errors = {part[at]: error for at, error in enumerate(moved) if error is not None}
            if durable and good:
                await self._sync(set((slots // self._index.segment_slots).tolist()))
            now = time.time()
            signed = sums.view(np.int64).tolist()
            stored = [Stored(reserved[at][0], mine[at], signed[at], kind, now) for at in good]
            self._reserved += [reserved[at] for at in range(len(part)) if moved[at] is not None]
            given_up = True
            # From here on the slots are the commit's, whatever becomes of this task.
            await self._commit(stored, [reserved[at][1] for at in good], durable)
            self.counters.written += len(good)
            self.counters.nbytes_written += len(good) * self._context.block_nbytes
        except NixlError as error:
            errors |= {at: error for at in part if at not in errors}
        finally:
            if not given_up:
                self._reserved += reserved
        self.counters.errors += len(errors)
        return errors

    async def _take(self, n: int) -> list[tuple[int, int]]:
        """Take up to `n` reserved slots, one at least."""
        async with self._reserving:
            while not self._reserved:
                await self._reserve(n)
            # The lowest first, so that what is written together lies together.
            taken = self._reserved[:n]
            del self._reserved[:n]
            return taken

    async def _reserve(self, n: int) -> None:
        wanted = max(1, min(max(n, RESERVED_AT_ONCE), max(n, self._index.n_slots // 16), self._index.n_slots))
        table, ttl, unsummed = self._table, self._options.ttl, self._context.kind == NONE

        def reserve() -> tuple[list[tuple[int, int]], list[int], int]:
            return self._index.reserve(wanted, lambda: table.oldest(wanted, ttl), unsummed)

        reserving = asyncio.get_running_loop().run_in_executor(self._writer, reserve)
        try:
            got, taken, change = await quiesce(reserving)
        except asyncio.CancelledError:
            if not reserving.cancelled() and reserving.exception() is None:
                self._reserve_done(*reserving.result())
            raise
        self._reserve_done(got, taken, change)

    def _reserve_done(self, got: list[tuple[int, int]], taken: list[int], change: int) -> None:
        if taken:
            generations = dict(got)
            self._table.forget_taken(taken, [generations[slot] for slot in taken])
        self.counters.evictions += len(taken)
        if change:
            self._own_change(change)
        self._reserved = sorted([*self._reserved, *got])

    async def _sync(self, numbers: set[int]) -> None:
        """Have segments reach the device; who asks while that goes on shares the next turn."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(heard)
        self._unsynced.append((numbers, done))
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_all())
        await asyncio.shield(done)

    async def _sync_all(self) -> None:
        try:
            while self._unsynced:
                batch, self._unsynced = self._unsynced, []
                try:
                    await self._sync_segments(set().union(*(numbers for numbers, _ in batch)))
                except NixlError as error:
                    for _, done in batch:
                        done.set_exception(error)
                    continue
                for _, done in batch:
                    done.set_result(None)
        finally:
            self._syncing = None

    async def _sync_segments(self, numbers: set[int]) -> None:
        regions = [await self._segment(number) for number in sorted(numbers)]

        def sync() -> None:
            for region in regions:
                os.fdatasync(region.fd)

        try:
            await self._context.on_thread(sync)
        except OSError as error:
            raise os_error(error, f"syncing segments of {self._index.directory}", backend="tiers") from error

    async def _commit(self, blocks: list[Stored], generations: list[int], durable: bool) -> None:
        """Make blocks known; commits asked for at the same time share a transaction. It happens even if this is cancelled."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(heard)
        self._waiting.append((blocks, generations, durable, done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        await asyncio.shield(done)

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                blocks = [block for part, _, _, _ in batch for block in part]
                generations = [generation for _, part, _, _ in batch for generation in part]
                try:
                    change = await self._on(
                        self._writer, self._index.store, blocks, any(durable for _, _, durable, _ in batch)
                    )
                except NixlError as error:
                    self._reserved += list(zip([block.slot for block in blocks], generations, strict=True))
                    for _, _, _, done in batch:
                        done.set_exception(error)
                    continue
                for at in range(0, len(blocks), APPLIED_AT_ONCE):
                    self._table.store(blocks[at : at + APPLIED_AT_ONCE], generations[at : at + APPLIED_AT_ONCE])
                    if at:
                        await asyncio.sleep(0)
                self._own_change(change)
                for _, _, _, done in batch:
                    done.set_result(None)
        finally:
            self._committing = None

    # Forgetting.

    async def _drop(self, blocks: list[tuple[int, int]]) -> None:
        await self._on(self._writer, self._index.drop, blocks)
        await self.refresh()

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget blocks; those that are not there are no error."""
        await self.refresh()
        slots = [self._table.slot_of[key] for key in keys if key in self._table.slot_of]
        if slots:
            await self._drop([(slot, int(self._table.generation[slot])) for slot in slots])

    async def sweep(self) -> None:
        """Forget what has outlived its time to live."""
        if self._options.ttl is None:
            return
        slots = self._table.expired(self._options.ttl)
        if len(slots):
            self.counters.evictions += len(slots)
            await self._drop(list(zip(slots.tolist(), self._table.generation[slots].tolist(), strict=True)))

    def _touch_later(self) -> None:
        """Tell the other processes now and then what this one reads, so that they do not evict it."""
        now = time.monotonic()
        if now - self._last_touch > TOUCH_SECONDS:
            self._last_touch = now
            touched = self._table.take_touched()
            if touched:
                touching = asyncio.get_running_loop().run_in_executor(self._writer, self._index.touch, touched)
                touching.add_done_callback(heard)

    async def aclose(self) -> None:
        """Finish the commits, note what was used, give reserved slots back, close the files."""
        while (running := self._syncing or self._committing) is not None:
            await asyncio.wait([running])
        if self._refreshing is not None:
            await asyncio.wait([self._refreshing])
        touched = self._table.take_touched()

        def close() -> None:
            try:
                if touched:
                    self._index.touch(touched)
            finally:
                self._index.close([slot for slot, _ in self._reserved])

        try:
            await self._on(self._writer, close)
        finally:
            for opening in self._segments.values():
                await asyncio.wait([opening])
                if not opening.cancelled() and opening.exception() is None:
                    await opening.result().aclose()
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

"""The segment files of a directory: opened when they are first used, moved to and from, synced in shared turns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.descriptors import Descriptor
from nixl_async.errors import NixlError, TransferError
from nixl_async.files import os_error
from nixl_async.storage import FileRegion
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context, heard
from nixl_async.tiers.index import Index
from nixl_async.tiers.tier import Failures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array


class Segments:
    """The segments of the directory of `index`; `direct` goes past the page cache."""

    def __init__(self, context: Context, index: Index, *, direct: bool) -> None:
        self._context, self._index, self._direct = context, index, direct
        self._opened: dict[int, asyncio.Task[FileRegion]] = {}
        self._putting = asyncio.Lock()
        self._unsynced: list[tuple[set[int], asyncio.Future[None]]] = []
        self._syncing: asyncio.Task[None] | None = None

    async def move(self, slots: Array, blocks: Blocks, *, put: bool) -> Failures:
        """Move between slots in ascending order and memory; if that fails, one by one, to know which fail."""
        try:
            places = await self._places(slots)
            memory = blocks.descriptor()
            if not put:
                await self._context.transfer(places, memory, put=False)
            elif self._direct:
                await self._context.transfer(memory, places, put=True)
            else:
                # Writers into the page cache of one file exclude each other, and spin while they wait.
                async with self._putting:
                    await self._context.transfer(memory, places, put=True)
        except TransferError as error:
            if len(slots) == 1:
                return [error]
        else:
            return [None] * len(slots)
        found: Failures = []
        for at in range(len(slots)):
            found += await self.move(slots[at : at + 1], blocks.take([at]), put=put)
        return found

    async def sync(self, slots: Array) -> None:
        """Have slots' segments reach the device; who asks while that goes on shares the next turn."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(heard)
        self._unsynced.append((set((slots // self._index.segment_slots).tolist()), done))
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._sync_all())
        await asyncio.shield(done)

    async def aclose(self) -> None:
        """Close the files; nothing may be moved any more."""
        for opening in self._opened.values():
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().aclose()

    async def synced(self) -> None:
        """Wait until nothing is being synced."""
        while self._syncing is not None:
            await asyncio.wait([self._syncing])

    @asynccontextmanager
    async def files(self, slots: Array) -> AsyncIterator[tuple[NDArray[np.int32], Array]]:
        """Say where slots in ascending order are, as file descriptors and offsets; they stay open for the length of the block."""
        of_each = slots // self._index.segment_slots
        numbers, which = of_each[:1], np.zeros(len(slots), np.int64)
        if of_each[0] != of_each[-1]:
            numbers, which = np.unique(of_each, return_inverse=True)
        regions = [await self._segment(number) for number in numbers.tolist()]
        for region in regions:
            region.hold()
        try:
            fds = np.array([region.fd for region in regions], np.int32)[which]
            yield fds, slots % self._index.segment_slots * self._context.block_nbytes
        finally:
            for region in regions:
                region.release()

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
        opening = self._opened.get(number)
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception() is not None)):
            opening = self._opened[number] = asyncio.create_task(self._open_segment(number))
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
        return await self._context.agent.file(path, "r+", nbytes=nbytes, direct=self._direct or None)

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
            await self._context.on_device_thread(sync)
        except OSError as error:
            raise os_error(error, f"syncing segments of {self._index.directory}", backend="tiers") from error

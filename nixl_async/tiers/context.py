"""What the tiers share: the agent, the block size, threads for blocking work, and memory to pass blocks through."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nixl_async.backend import quiesce
from nixl_async.fileio import FileEngine, SummedBlocks
from nixl_async.memory import MemoryRegion
from nixl_async.native import ffi
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import CRC64NVME, NONE, checksum_blocks
from nixl_async.transfer import TrafficClass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.agent import Agent
    from nixl_async.descriptors import Array, Places

T = TypeVar("T")
U = TypeVar("U")
N_THREADS = 2
MOST_LANES = 4
LANE_NBYTES = 2 << 20
"""What is worth one more thread that copies."""


class Context:
    """What every tier of one `Tiers` uses. `checksum=False` writes blocks without one, `verify=False` checks none.

    `put_class` and `get_class` are the traffic classes of the agent's transfers for each.
    """

    def __init__(
        self,
        agent: Agent,
        block_nbytes: int,
        *,
        checksum: bool = True,
        verify: bool = True,
        put_class: TrafficClass = TrafficClass.NORMAL,
        get_class: TrafficClass = TrafficClass.NORMAL,
    ) -> None:
        self.agent = agent
        self._put_class, self._get_class = put_class, get_class
        self.block_nbytes = block_nbytes
        self.kind = CRC64NVME if checksum else NONE
        self.verify = verify
        self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix=f"nixl-tiers-{agent.name}")
        # They have nothing to do with io_uring: what is not in memory is the agent's.
        self._lanes = FileEngine(f"nixl-tiers-{agent.name}", max(2, min(MOST_LANES, os.cpu_count() or 1)), "threads")
        self._device = ThreadPoolExecutor(1, thread_name_prefix=f"nixl-tiers-device-{agent.name}")

    def reaches(self, blocks: Blocks) -> bool:
        """Whether lower tiers take blocks where they are: what this process can read, and a GPU's where nothing is summed up."""
        unsummed = self.kind == NONE and not self.verify
        return blocks.readable or (unsummed and blocks.region.peer is None)

    async def on_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work on a thread; wait for its end even when cancelled, since it uses the caller's memory."""
        return await quiesce(asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments))

    async def checksums(self, kind: int, keys: Sequence[bytes], blocks: Blocks) -> NDArray[np.uint64]:
        """Return the checksum of each block, zeros for kind NONE."""
        if kind == NONE:
            return np.zeros(len(keys), np.uint64)
        return await self.on_thread(checksum_blocks, keys, blocks)

    async def verified(
        self,
        keys: Sequence[bytes],
        blocks: Blocks,
        sums: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        errors: Sequence[object],
    ) -> NDArray[np.bool_]:
        """Tell which blocks have the checksum they should have; those without one pass, those with an error are not looked at."""
        good, _ = await self.verified_then(keys, blocks, sums, kinds, errors, lambda: None)
        return good

    async def verified_then(
        self,
        keys: Sequence[bytes],
        blocks: Blocks,
        sums: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        errors: Sequence[object],
        then: Callable[[], T],
    ) -> tuple[NDArray[np.bool_], T]:
        """As `verified`, and return what `then()` returned, which ran on the same thread after the checks."""
        here = np.array([error is None for error in errors], np.bool_)

        def work() -> tuple[NDArray[np.bool_], T]:
            return self._check(keys, blocks, sums, kinds, here), then()

        return await self.on_thread(work)

    async def summed(self, blocks: SummedBlocks, turn: Any = None) -> None:
        """Read blocks out of the page cache, or with a `turn` write them into it, and sum them up; `blocks.moved` tells which."""
        # Those that write would only wait for each other.
        ways = 1 if turn is not None else len(blocks.fds) * self.block_nbytes // LANE_NBYTES
        await self._lanes.summed(ffi.NULL if turn is None else turn, blocks, ways)

    async def transfer(self, src: Places, dst: Places, *, put: bool) -> None:
        """Have the agent move bytes, in the traffic class of puts or of gets."""
        await self.agent.transfer(src, dst, traffic_class=self._put_class if put else self._get_class)

    async def copy(self, source: Blocks, target: Blocks, *, put: bool) -> None:
        """Copy blocks from memory to memory: at once where both are this process's, else by the agent, which also tells errors."""
        pieces = None
        if source.readable and target.readable and not target.region.readonly:
            pieces = _pieces(source, target)
        if pieces is None:
            await self.transfer(source.descriptor(), target.descriptor(), put=put)
            return
        source.region.check_usable()
        target.region.check_usable()
        source.region.hold()
        target.region.hold()
        try:
            await self._lanes.copy(*pieces, len(source) * self.block_nbytes // LANE_NBYTES)
        finally:
            source.region.release()
            target.region.release()

    def _check(
        self,
        keys: Sequence[bytes],
        blocks: Blocks,
        sums: NDArray[np.uint64],
        kinds: NDArray[np.uint8],
        here: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        good = np.ones(len(keys), np.bool_)
        if not self.verify:
            return good
        # Of no version of ours, or damaged: not bytes to hand out.
        good[(kinds != NONE) & (kinds != CRC64NVME) & here] = False
        which = np.flatnonzero((kinds == CRC64NVME) & here)
        if len(which) == len(keys):
            good[:] = checksum_blocks(keys, blocks) == sums
        elif len(which):
            good[which] = checksum_blocks([keys[at] for at in which.tolist()], blocks.take(which)) == sums[which]
        return good

    async def on_device_thread(self, work: Callable[[], None]) -> None:
        """Run what waits for a device, on a thread of its own: the others are for what needs a processor."""
        await quiesce(asyncio.get_running_loop().run_in_executor(self._device, work))

    def close(self) -> None:
        """End the threads; nothing may run on them."""
        self._lanes.close()
        self._threads.shutdown()
        self._device.shutdown()


def _pieces(source: Blocks, target: Blocks) -> tuple[Array, Array, Array] | None:
    """Return where to, where from and how much, for each piece of both; `None` if they are cut in different ways."""
    at, to = source.addresses(), target.addresses()
    cut = source if at.shape[1] > 1 else target
    lengths = cut.lengths
    if at.shape[1] == 1:
        at = at + (np.cumsum(lengths, axis=1) - lengths)
    elif to.shape[1] == 1:
        to = to + (np.cumsum(lengths, axis=1) - lengths)
    elif not np.array_equal(source.lengths, target.lengths):
        return None
    return np.ascontiguousarray(to).ravel(), np.ascontiguousarray(at).ravel(), np.ascontiguousarray(lengths).ravel()


async def together(first: Coroutine[Any, Any, T], second: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Await both; when this raises, both have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            a, b = group.create_task(first), group.create_task(second)
    except BaseExceptionGroup as errors:
        raise bare(errors) from None
    return a.result(), b.result()


def bare(error: BaseException) -> BaseException:
    """Return the first error of a group that is no group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def heard(future: asyncio.Future[Any]) -> None:
    """Take note of a future's error, as a callback, so that it is not reported as lost when all who waited were cancelled."""
    if not future.cancelled():
        future.exception()


def allocate(nbytes: int) -> mmap.mmap:
    """Return memory of our own, in huge pages where the system has them."""
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError, ValueError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Slots:
    """Registered memory cut into equal slots that are taken and given back; takers wait in turn."""

    def __init__(self, region: MemoryRegion, slot_nbytes: int) -> None:
        self.region = region
        self.slot_nbytes = slot_nbytes
        self.n_slots = region.nbytes // slot_nbytes
        self._free = list(range(self.n_slots - 1, -1, -1))
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    @classmethod
    async def make(cls, context: Context, n_slots: int, slot_nbytes: int) -> Slots:
        """Allocate and register."""
        return cls(await context.agent.register(allocate(n_slots * slot_nbytes)), slot_nbytes)

    def blocks(self, slots: Sequence[int]) -> Blocks:
        """Return slots as blocks."""
        offsets = np.asarray(slots, np.int64).reshape(-1, 1) * self.slot_nbytes
        return Blocks(self.region, offsets, np.full(offsets.shape, self.slot_nbytes, np.int64), self.slot_nbytes)

    async def take(self, n: int) -> list[int]:
        """Take `n` slots, `n_slots` at most; waits for them, in turn."""
        async with self._turn:
            while len(self._free) < n:
                self._given.clear()
                await self._given.wait()
            taken = self._free[-n:]
            del self._free[-n:]
            return taken

    def give(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        self._free.extend(slots)
        self._given.set()

    async def aclose(self) -> None:
        """Deregister the memory."""
        await self.region.aclose()

"""The block store that callers hold: batches of keys over an ordered list of tiers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from nixl_async.backend import quiesce
from nixl_async.dispatch import read_class
from nixl_async.errors import ClosedError, ConfigurationError, NixlError, TransferError
from nixl_async.tiers.blocks import Blocks, Memory
from nixl_async.tiers.cascade import Cascade
from nixl_async.tiers.context import Context, bare
from nixl_async.tiers.dram import MemoryTier
from nixl_async.tiers.files import FileTier
from nixl_async.tiers.keys import check_keys
from nixl_async.tiers.objects import ObjectTier
from nixl_async.tiers.options import DRAM, MISS, Files, Outcome, TierOptions, TiersStatistics, check_options
from nixl_async.tiers.tier import LowerTier
from nixl_async.transfer import TrafficClass

if TYPE_CHECKING:
    from collections.abc import Container

    from nixl_async.agent import Agent

CHUNK_NBYTES = 32 << 20
CHUNK_BLOCKS = 512
"""Blocks that are worked on in one go: as many as cost the loop less than a millisecond."""
CHUNKS_AT_ONCE = 3
DURABLE_CHUNKS_AT_ONCE = 8
"""Those that wait for the device share its turns, if there are enough of them."""
BATCH_NBYTES = 8 << 20
BATCH_BLOCKS = 128
QUEUE_NBYTES = 256 << 20
CHECKED_AT_ONCE = 4096
_OK = attrgetter("ok")
LOOKED_UP_AT_ONCE = 64


class Tiers:
    """Keeps blocks of `block_nbytes` bytes under content-addressed keys, in memory, in files and in object stores.

    `tiers` are `DRAM`, `Files` and `Objects`, the fastest first. A put block is in the first tier when the call returns, and goes
    down to the others through queues of `queue_nbytes` each; when a queue is full, puts wait. A got block comes from the first
    tier that has it and, with `promote`, goes up again. `checksum` gives blocks that leave memory a checksum, and `verify` checks
    it on each get. A block that a tier no longer has, or has damaged, is a miss or another tier's: never wrong bytes.
    `traffic_class` is that of the agent's transfers for blocks, `put_class` (default: the same) of those by which blocks are put
    and go down: "bulk" keeps offload out of the way of what requests wait for. What this process's own threads copy, from memory to
    memory and through the page cache, is no transfer and has no class.

    Use it as `async with Tiers(agent, [DRAM(...), Files(...)], block_nbytes=65536) as tiers:`. Leaving the block waits until the
    queues are empty; if it raised, what is queued is dropped. All calls are cancellable: the caller's memory is quiet afterwards.

    Raises:
        ConfigurationError: the tiers or sizes cannot work.
    """

    def __init__(
        self,
        agent: Agent,
        tiers: Sequence[TierOptions],
        *,
        block_nbytes: int,
        checksum: bool = True,
        verify: bool = True,
        promote: bool = True,
        queue_nbytes: int = QUEUE_NBYTES,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        put_class: TrafficClass | str | None = None,
    ) -> None:
        self._options = list(tiers)
        check_options(self._options, block_nbytes)
        self.block_nbytes = block_nbytes
        get_class = read_class("traffic_class", traffic_class)
        self._context = partial(
            Context,
            agent,
            block_nbytes,
            checksum=checksum,
            verify=verify,
            put_class=get_class if put_class is None else read_class("put_class", put_class),
            get_class=get_class,
        )
        self._moving = {"promote": promote, "queue_blocks": max(1, queue_nbytes // block_nbytes)}
        self._batch = max(1, min(BATCH_BLOCKS, BATCH_NBYTES // block_nbytes))
        self._chunk = max(1, min(CHUNK_BLOCKS, CHUNK_NBYTES // block_nbytes))
        self._cascade: Cascade
        self._stack = AsyncExitStack()
        self._state = "new"
        self._calls = 0
        self._idle = asyncio.Event()
        self._swept = time.monotonic()
        self._hits = self._misses = self._puts = 0

    def __repr__(self) -> str:
        names = ", ".join(tier.name for tier in self._options)
        return f"<Tiers {names} {self._state}: blocks of {self.block_nbytes} bytes>"

    # Opening and closing.

    async def __aenter__(self) -> Tiers:
        if self._state != "new":
            raise ClosedError(f"{self!r}; make a new one")
        self._state = "opening"
        try:
            await self._open()
        except BaseException:
            self._state = "closed"
            await self._stack.aclose()
            raise
        self._state = "open"
        return self

    async def _open(self) -> None:
        context = self._context()
        self._stack.callback(context.close)
        memory: MemoryTier | None = None
        lower: list[LowerTier] = []
        for options in self._options:
            opened: MemoryTier | FileTier | ObjectTier
            if isinstance(options, DRAM):
                opened = memory = MemoryTier(context, options)
            else:
                opened = FileTier(context, options) if isinstance(options, Files) else ObjectTier(context, options)
                lower.append(opened)
            await opened.open()
            self._stack.push_async_callback(opened.aclose)
        if memory is not None:
            # Several chunks are in hand at once, and each takes room for all of its blocks.
            self._chunk = max(1, min(self._chunk, memory.n_slots // (CHUNKS_AT_ONCE + 1)))
            self._batch = min(self._batch, max(1, memory.n_slots // 2))
        for tier in lower[:-1]:
            if tier.capacity is not None:
                # With the queue, less than the tier holds: nothing is evicted before it has gone down.
                self._chunk = max(1, min(self._chunk, tier.capacity // 8))
                self._batch = max(1, min(self._batch, tier.capacity // 16))
        self._cascade = Cascade(context, memory, lower, batch=self._batch, **self._moving)  # type: ignore[arg-type]
        await self._cascade.open()
        self._stack.push_async_callback(self._cascade.aclose)

    async def __aexit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        await self.aclose(flush=kind is None)

    async def aclose(self, *, flush: bool = True) -> None:
        """Write what is queued, or drop it, and release everything. Idempotent.

        Cancelling it drops what is still queued.
        """
        if self._state != "open":
            return
        self._state = "closing"
        try:
            while self._calls:
                self._idle.clear()
                await self._idle.wait()
            if flush:
                for queue in self._cascade.queues:
                    if queue is not None:
                        await queue.drain()
        finally:
            await quiesce(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        for queue in self._cascade.queues:
            if queue is not None:
                await queue.aclose()
        try:
            await self._stack.aclose()
        finally:
            self._state = "closed"

    # Calls.

    async def put(self, keys: Sequence[bytes], memory: Memory, *, durable: bool = False) -> list[Outcome]:
        """Store a block under each key: `await tiers.put(keys, region.pages(indices, block_nbytes))`; return each key's outcome.

        A key that is there is not stored again: keys stand for contents. `durable`: return when the blocks are in a tier that
        survives, with their bytes and the index on the device. Without it, the end of this process can lose what is only in
        memory, and the end of the machine what is in files. The memory may be a peer's or a GPU's.

        Raises:
            DescriptorError: the memory is not a block for each key, or a key is not 1 to 255 bytes.
            ConfigurationError: `durable` is asked for and there is only DRAM.
            ClosedError: the store or the memory is closed.
        """
        if durable and all(isinstance(tier, DRAM) for tier in self._options):
            raise ConfigurationError("durable=True needs a tier of Files or Objects; there is only DRAM")
        with _Call(self):
            given, blocks = await self._check(keys, memory)
            found = await self._in_chunks(given, blocks, lambda k, b: self._cascade.put(k, b, durable=durable), durable)
            self._puts += len(given)
            await self._sweep_now_and_then()
        return found

    async def get(self, keys: Sequence[bytes], memory: Memory) -> list[Outcome]:
        """Read the block of each key into memory; return each key's outcome, true where the block is there.

        The memory of a key that is missed is undefined.

        Raises:
            DescriptorError, ClosedError: as `put`.
        """
        with _Call(self):
            given, blocks = await self._check(keys, memory)
            found = await self._in_chunks(given, blocks, self._cascade.get)
            hits = sum(map(_OK, found))
            self._hits += hits
            self._misses += len(found) - hits
        return found

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Tell of each key whether a tier has it, as far as this process knows: no I/O, a fraction of a microsecond a key.

        What other processes stored is known after `get`, `prefix` or `refresh`. Ask about some thousands at
        once: it holds the loop.
        """
        self._check_open()
        known = self._known()
        if len(known) == 1:
            (a,) = known
            return [key in a for key in keys]
        if len(known) == 2:
            a, b = known
            return [key in a or key in b for key in keys]
        return [any(key in one for one in known) for key in keys]

    async def prefix(self, keys: Sequence[bytes]) -> int:
        """Return how many of the first keys are there, up to the first that no tier has: the longest prefix that can be got.

        What this process does not know of, it looks up in the shared index, and asks the object store about.
        """
        with _Call(self):
            at = 0
            while True:
                at = await self._known_prefix(keys, at)
                if at == len(keys):
                    return at
                window = list(keys[at : at + LOOKED_UP_AT_ONCE])
                check_keys(window)
                if keys[at] in await self._look_up(window):
                    return at

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Tell of each key whether a tier has it, as `prefix` finds out: what this process does not know of is looked up.

        Raises:
            DescriptorError: a key is not 1 to 255 bytes.
        """
        found: list[bool] = []
        with _Call(self):
            given = list(keys)
            for at in range(0, len(given), CHECKED_AT_ONCE):
                window = given[at : at + CHECKED_AT_ONCE]
                check_keys(window)
                missing = await self._look_up(window)
                found += [key not in missing for key in window]
        return found

    def keys(self) -> set[bytes]:
        """Return the keys of all blocks that this process knows of, those that outlived their time among them: no I/O.

        It holds the loop for about 50 ns a block.
        """
        self._check_open()
        first = [] if self._cascade.memory is None else [self._cascade.memory.keys()]
        return set().union(*first, *(tier.keys() for tier in self._cascade.lower))

    async def _look_up(self, keys: Sequence[bytes]) -> set[bytes]:
        """Return those of the keys that no tier has, after asking the tiers about what is not known."""
        known = self._known()
        unknown = [key for key in keys if not any(key in one for one in known)]
        for tier in self._cascade.lower:
            if not unknown:
                break
            try:
                here = await tier.find(unknown)
            except TransferError:
                tier.counters.errors += 1
                continue
            unknown = [key for key, is_here in zip(unknown, here, strict=True) if not is_here]
        return set(unknown)

    async def _known_prefix(self, keys: Sequence[bytes], at: int) -> int:
        while at < len(keys):
            here = self.contains(keys[at : at + CHECKED_AT_ONCE])
            if not all(here):
                return at + here.index(False)
            at += len(here)
            await asyncio.sleep(0)
        return at

    async def refresh(self) -> None:
        """Learn what other processes stored in and evicted from the directories; `contains` knows it afterwards."""
        with _Call(self):
            for tier in self._cascade.lower:
                if isinstance(tier, FileTier):
                    await tier.refresh()

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget blocks in all tiers; those that are not there are no error. Waits for those that are on their way down.

        Raises:
            TransferError: a tier failed.
        """
        with _Call(self):
            given = list(keys)
            check_keys(given)
            for queue in self._cascade.queues:
                if queue is not None and any(key in queue for key in given):
                    await queue.drain()
            if self._cascade.memory is not None:
                self._cascade.memory.delete(given)
            for tier in self._cascade.lower:
                await tier.delete(given)

    async def flush(self) -> dict[bytes, NixlError]:
        """Wait until what is queued is written; return the keys that a lower tier did not take since the last call, and why.

        Such a block is still in the tiers that took it, until they evict it.
        """
        with _Call(self):
            failed: dict[bytes, NixlError] = {}
            for queue in self._cascade.queues:
                if queue is not None:
                    await queue.drain()
                    failed |= queue.take_failures()
        return failed

    async def sweep(self) -> None:
        """Forget what has outlived its time to live; puts do it too, now and then."""
        with _Call(self):
            await self._sweep()

    async def _sweep(self) -> None:
        if self._cascade.memory is not None:
            self._cascade.memory.sweep()
        for tier in self._cascade.lower:
            await tier.sweep()

    async def _sweep_now_and_then(self) -> None:
        limits = [tier.ttl for tier in self._options if tier.ttl is not None]
        now = time.monotonic()
        if limits and now - self._swept > min(limits) / 4:
            self._swept = now
            try:
                await self._sweep()
            except TransferError as error:
                # The put is done; what is too old is not served, and the next sweep tries again.
                self._cascade.lower[-1].counters.errors += 1
                del error

    def statistics(self) -> TiersStatistics:
        """Return the counters."""
        self._check_open()
        cascade = self._cascade
        found = [] if cascade.memory is None else [cascade.memory.statistics()]
        for tier, queue in zip(cascade.lower, cascade.queues, strict=True):
            queued, dropped = (0, 0) if queue is None else (len(queue), queue.dropped)
            found.append(tier.statistics(queued=queued, dropped=dropped))
        return TiersStatistics(tuple(found), self._hits, self._misses, self._puts)

    def _known(self) -> list[Container[bytes]]:
        cascade = self._cascade
        first = [] if cascade.memory is None else [cascade.memory.known]
        return [*first, *(tier.known for tier in cascade.lower)]

    def _check_open(self) -> None:
        if self._state != "open":
            hint = "use it inside `async with`" if self._state in ("new", "opening") else "make a new one"
            raise ClosedError(f"{self!r}; {hint}")

    async def _check(self, keys: Sequence[bytes], memory: Memory) -> tuple[list[bytes], Blocks]:
        if isinstance(keys, bytes | str):
            check_keys(keys)
        given = list(keys)
        for at in range(0, len(given), CHECKED_AT_ONCE):
            if at:
                await asyncio.sleep(0)
            check_keys(given[at : at + CHECKED_AT_ONCE])
        return given, Blocks.of(memory, len(given), self.block_nbytes)

    async def _in_chunks(
        self,
        keys: list[bytes],
        blocks: Blocks,
        work: Callable[[list[bytes], Blocks], Awaitable[list[Outcome]]],
        durable: bool = False,
    ) -> list[Outcome]:
        if not keys:
            return []
        # Checksums are taken of the memory when no transfer holds it.
        blocks.region.hold()
        try:
            return await self._in_held_chunks(keys, blocks, work, durable)
        finally:
            blocks.region.release()

    async def _in_held_chunks(
        self,
        keys: list[bytes],
        blocks: Blocks,
        work: Callable[[list[bytes], Blocks], Awaitable[list[Outcome]]],
        durable: bool,
    ) -> list[Outcome]:
        step = self._chunk if blocks.readable else min(self._chunk, self._batch)
        if len(keys) <= step:
            return await work(keys, blocks)
        found = [MISS] * len(keys)
        starts: Iterator[int] = iter(range(0, len(keys), step))

        async def worker() -> None:
            for start in starts:
                stop = min(start + step, len(keys))
                found[start:stop] = await work(keys[start:stop], blocks.part(start, stop))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(DURABLE_CHUNKS_AT_ONCE if durable else CHUNKS_AT_ONCE):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise bare(errors) from None
        return found


class _Call:
    """Counts the calls in hand; closing waits for them."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    def __enter__(self) -> None:
        self._tiers._check_open()
        self._tiers._calls += 1

    def __exit__(self, *exc: object) -> None:
        self._tiers._calls -= 1
        self._tiers._idle.set()

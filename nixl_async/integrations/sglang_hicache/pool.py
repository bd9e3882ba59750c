"""One host pool of SGLang's in tiers: how its pages get in and out.

Each part of the pages has tiers of its own. A pool that does not tell where its pages lie gives and takes copies of them, which go
through a `Bounce`. Nothing here imports SGLang.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import mmap
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nixl_async import NixlError
from nixl_async.integrations.sglang_hicache.pages import HASH_NBYTES, Pages, Part, bytes_of
from nixl_async.tiers import Objects, Outcome, Tiers, TiersStatistics

if TYPE_CHECKING:
    from nixl_async import Agent, Descriptor, MemoryRegion
    from nixl_async.integrations.sglang_hicache.config import HiCacheOptions

    Run = Callable[[Coroutine[Any, Any, list[Outcome]]], list[Outcome]]

logger = logging.getLogger("nixl_async.sglang_hicache")

MOST_BOUNCED_PAGES = 128
"""What SGLang asks for at once (STORAGE_BATCH_SIZE of mem_cache/hicache_storage.py)."""
DELETED_AT_ONCE = 4096


class Bounce:
    """Registered memory for some pages; who holds `turn` uses it."""

    def __init__(self, page_nbytes: int, nbytes: int) -> None:
        self.n_pages = max(1, min(MOST_BOUNCED_PAGES, nbytes // page_nbytes))
        self.memory = mmap.mmap(-1, self.n_pages * page_nbytes)
        self.rows = torch.frombuffer(self.memory, dtype=torch.uint8).view(self.n_pages, page_nbytes)
        self.turn = threading.Lock()
        self.region: MemoryRegion | None = None

    def blocks(self, n: int) -> Descriptor:
        """Describe the first `n` pages."""
        assert self.region is not None
        return self.region.pages(np.arange(n), self.rows.shape[1])


class PoolStore(Pages):
    """The pages of one host pool in tiers.

    `move`, `put_values` and `get_values` are called on the callers' threads and have the loop move bytes by `run`, which they are
    given; coroutines are for the loop.

    Raises:
        ConfigurationError: the pool neither tells where its pages lie nor gives copies of them.
    """

    def __init__(self, pool: Any, name: str, names: Sequence[str], options: HiCacheOptions, *, zero_copy: bool) -> None:
        super().__init__(pool, name, names, zero_copy=zero_copy)
        self._options = options
        self._bounces: tuple[Bounce, Bounce] | None = None

    # Opening and closing, on the loop.

    async def open(self, agent: Agent, page_nbytes: int) -> None:
        """Register the memory and open the tiers: of each tier's bytes the share that this pool has in `page_nbytes`, all pools'.

        Raises:
            ConfigurationError, TransferError: a tier cannot be opened.
        """
        options = self._options
        try:
            for part in self.parts:
                if part.buffer is not None:
                    part.region = await agent.register(part.buffer)
                else:
                    self._bounces = (
                        Bounce(part.block_nbytes, options.bounce_nbytes),
                        Bounce(part.block_nbytes, options.bounce_nbytes),
                    )
                    for bounce in self._bounces:
                        bounce.region = await agent.register(bounce.memory)
                share = part.page_nbytes / page_nbytes
                # Summing up a GPU's pages would bring them here first.
                bypass = options.gds and self.on_device
                tiers = Tiers(
                    agent,
                    options.tiers_for(part.name, share),
                    block_nbytes=part.block_nbytes,
                    checksum=options.checksum and not bypass,
                    verify=options.verify and not bypass,
                    promote=options.promote,
                    queue_nbytes=max(1, int(options.queue_nbytes * share)),
                )
                part.tiers = await tiers.__aenter__()
        except BaseException:
            await self.aclose(flush=False)
            raise
        logger.info("opened %r", self)

    async def aclose(self, *, flush: bool = True) -> None:
        """Write what is queued, or drop it; close the tiers and deregister the memory. Idempotent.

        What cannot be written within the `timeout` of the options is dropped.
        """
        for part in self.parts:
            tiers, part.tiers = part.tiers, None
            if tiers is not None:
                try:
                    async with asyncio.timeout(self._options.timeout):
                        await tiers.aclose(flush=flush)
                except TimeoutError:
                    logger.warning("%s: what could not be written within %g s is dropped", part.name, self._options.timeout)
            region, part.region = part.region, None
            if region is not None:
                await region.aclose()
        bounces, self._bounces = self._bounces, None
        for bounce in bounces or ():
            if bounce.region is not None:
                await bounce.region.aclose()

    # Moving pages.

    def move(self, run: Run, hashes: Sequence[bytes], indices: torch.Tensor, *, put: bool) -> list[Outcome]:
        """Store pages of the pool, or read them into it: `indices` are `page_size` of its slots for each; return outcomes.

        What a page that is missed had is undefined.
        """
        if self.logical:
            return [Outcome(self.name, ok=True)] * len(hashes)
        if self.zero_copied:
            return run(self.moving(hashes, indices, put=put))
        starts = indices[:: self.page_size].tolist()
        if put:
            return self._bounce_in(run, hashes, lambda at: self.pool.get_data_page(starts[at], flat=True))
        return self._bounce_out(run, hashes, lambda at, page: self.pool.set_from_flat_data_page(starts[at], page))

    def moving(self, hashes: Sequence[bytes], indices: torch.Tensor, *, put: bool) -> Coroutine[Any, Any, list[Outcome]]:
        """Return what `move` has the loop do, for pools that are `zero_copied`."""
        addresses, _ = self.ranges(indices, len(hashes))
        moves = [(part.opened, part.keys(hashes), part.blocks(addresses)) for part in self.parts]
        return self._moving(moves, len(hashes), put=put)

    async def _moving(self, moves: Sequence[tuple[Tiers, list[bytes], Descriptor]], n: int, *, put: bool) -> list[Outcome]:
        durable = self._options.durable
        works = [tiers.put(keys, blocks, durable=durable) if put else tiers.get(keys, blocks) for tiers, keys, blocks in moves]
        found = await together(works) if len(works) > 1 else [await works[0]]
        if len(found) == 1 and len(found[0]) == n:
            return found[0]
        # A page is as good as the worst of its blocks.
        rows = [[part[at * len(part) // n : (at + 1) * len(part) // n] for part in found] for at in range(n)]
        return [min(itertools.chain.from_iterable(row), key=bool) for row in rows]

    def put_values(self, run: Run, hashes: Sequence[bytes], values: Sequence[torch.Tensor]) -> list[Outcome]:
        """Store tensors of a page's bytes each; for pools that are not `zero_copied`."""
        return self._bounce_in(run, hashes, values.__getitem__)

    def get_values(self, run: Run, hashes: Sequence[bytes], targets: Sequence[torch.Tensor]) -> list[Outcome]:
        """Read pages into tensors of a page's bytes each; for pools that are not `zero_copied`."""
        (part,) = self.parts
        for target in targets:
            if target.numel() * target.element_size() != part.block_nbytes:
                raise ValueError(
                    f"a page of {self.name} is {part.block_nbytes} bytes, but a target is {target.numel()} {target.dtype}"
                )

        def take(at: int, page: torch.Tensor) -> None:
            target = targets[at]
            target.copy_(bytes_of(page).view(target.dtype).view(target.shape))

        return self._bounce_out(run, hashes, take)

    def new_value(self) -> torch.Tensor:
        """Return a flat tensor for a page; for pools that are not `zero_copied`."""
        assert self.dtype is not None
        (part,) = self.parts
        return torch.empty(part.block_nbytes, dtype=torch.uint8).view(self.dtype)

    def _bounce_in(self, run: Run, hashes: Sequence[bytes], give: Callable[[int], torch.Tensor]) -> list[Outcome]:
        assert self._bounces is not None
        (part,), bounce = self.parts, self._bounces[0]
        found: list[Outcome] = []
        with bounce.turn:
            for start in range(0, len(hashes), bounce.n_pages):
                some = hashes[start : start + bounce.n_pages]
                for at in range(len(some)):
                    page = bytes_of(give(start + at))
                    if page.numel() != part.block_nbytes:
                        raise ValueError(f"a page of {self.name} is {part.block_nbytes} bytes, but {page.numel()} are given")
                    bounce.rows[at].copy_(page)
                found += run(part.opened.put(part.keys(some), bounce.blocks(len(some)), durable=self._options.durable))
        return found

    def _bounce_out(self, run: Run, hashes: Sequence[bytes], take: Callable[[int, torch.Tensor], object]) -> list[Outcome]:
        assert self._bounces is not None
        assert self.dtype is not None
        (part,), bounce = self.parts, self._bounces[1]
        found: list[Outcome] = []
        with bounce.turn:
            for start in range(0, len(hashes), bounce.n_pages):
                some = hashes[start : start + bounce.n_pages]
                got = run(part.opened.get(part.keys(some), bounce.blocks(len(some))))
                for at, outcome in enumerate(got):
                    if outcome:
                        take(start + at, bounce.rows[at].view(self.dtype))
                found += got
        return found

    # What is there, on the loop.

    async def prefix(self, hashes: Sequence[bytes]) -> int:
        """Return how many of the first pages are there."""
        if self.logical:
            return len(hashes)
        n = len(hashes)
        for part in self.parts:
            n = min(n, await part.opened.prefix(part.keys(hashes[:n])) // len(part.salts))
        return n

    async def exists(self, hashes: Sequence[bytes]) -> list[bool]:
        """Tell of each page whether it is there."""
        here = np.ones(len(hashes), np.bool_)
        for part in self.parts:
            which = np.flatnonzero(here)
            found = await part.opened.exists(part.keys([hashes[at] for at in which.tolist()]))
            here[which] = np.reshape(found, (len(which), len(part.salts))).all(axis=1)
        return here.tolist()

    async def flush(self) -> list[NixlError]:
        """Wait until what is queued is written; return the errors of what was not."""
        return [error for part in self.parts for error in (await part.opened.flush()).values()]

    async def clear(self, agent: Agent) -> None:
        """Delete this pool's pages, as this rank and model has them, from all tiers; what other hosts stored in objects too."""
        for part in self.parts:
            await part.opened.refresh()
            await self._delete(part, part.opened)
            for tier in self._options.tiers_for(part.name, 1.0):
                if isinstance(tier, Objects):
                    listed = replace(tier, listing=True, nbytes=None)
                    async with Tiers(agent, [listed], block_nbytes=part.block_nbytes) as found:
                        await self._delete(part, found)

    async def _delete(self, part: Part, tiers: Tiers) -> None:
        salts = set(part.salts)
        known = tiers.keys()
        mine = [key for key in known if key[HASH_NBYTES:] in salts]
        for start in range(0, len(mine), DELETED_AT_ONCE):
            await tiers.delete(mine[start : start + DELETED_AT_ONCE])

    def statistics(self) -> dict[str, TiersStatistics]:
        """Return the counters of each part's tiers."""
        return {part.name: part.opened.statistics() for part in self.parts}


async def together(works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await all; when this raises, all have ended."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    return [task.result() for task in tasks]

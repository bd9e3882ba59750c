"""Chunks of KV cache under names, in a store or in tiers: what the L2 adapter and the storage plug-in have in common.

Nothing of LMCache is imported here. A chunk is a name and bytes of this process; all work is bounded in time, and after repeated
failures it is refused at once for a while, so that a store that is down costs requests nothing but their hits.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nixl_async import (
    Agent,
    BackendError,
    ConflictError,
    DescriptorError,
    IntegrityError,
    MemoryRegion,
    NixlError,
    NotFoundError,
    OutOfSpace,
)
from nixl_async.backend import SCHEMES
from nixl_async.integrations.lmcache.keepers import InTiers, Placed, Result, Whole, host_view
from nixl_async.integrations.lmcache.loop import Call, LoopThread
from nixl_async.integrations.lmcache.options import ChunkOptions
from nixl_async.tiers import Files, Objects

if TYPE_CHECKING:
    from collections.abc import Coroutine

logger = logging.getLogger(__name__)

SLICE_NBYTES = 256 << 20
SLICE_CHUNKS = 256
SLICES_AT_ONCE = 4
_NOT_THE_STORE = (NotFoundError, ConflictError, IntegrityError, OutOfSpace, DescriptorError)
"""Failures that say nothing about whether the store can be reached."""
_numbers = itertools.count(1)
Work = Callable[[list[str], list[Placed]], Awaitable[list[Result]]]
"""What is done with the chunks of some names, and the places of their bytes."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's name, and where its bytes are, or shall be, in this process."""

    name: str
    address: int
    nbytes: int


class Breaker:
    """Refuses work for `seconds` after `failures` failures in a row; then lets one attempt in every `seconds` through."""

    def __init__(self, failures: int, seconds: float) -> None:
        self._allowed, self._seconds = failures, seconds
        self.failures = 0
        self._next = 0.0

    @property
    def closed(self) -> bool:
        """Whether work goes through."""
        return self.failures < self._allowed

    def allows(self) -> bool:
        """Tell whether this attempt may be made."""
        if self.closed:
            return True
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True

    def tell(self, errors: Iterable[BaseException | None]) -> None:
        """Count the outcome of an attempt: a failure if no part of it shows that the store is there."""
        errors = list(errors)
        if any(error is None or isinstance(error, _NOT_THE_STORE) for error in errors):
            self.failures = 0
        elif errors:
            self.failures += 1
            self._next = time.monotonic() + self._seconds


class Chunks:
    """Puts, gets, finds and deletes chunks on a loop and an agent of its own; callers are on other threads.

    `arena` is (address, bytes) of memory that most chunks are in: it is registered once. The coroutines are to be given to
    `submit`; each ends only when no byte of the caller's memory moves any more on its account.

    Raises:
        NixlError: the store or the tiers cannot be opened.
    """

    def __init__(self, options: ChunkOptions, name: str, arena: tuple[int, int] | None = None) -> None:
        self.options = options
        self.name = f"{name}-{os.getpid()}-{next(_numbers)}"
        self.breaker = Breaker(options.failures, options.retry_seconds)
        self._given_arena = arena
        self._arena: MemoryRegion | None = None
        self._agent = Agent(self.name, backends=_backends(options), authenticate=False)
        self._keeper: Whole | InTiers
        self._put_room: asyncio.Semaphore
        self._get_room: asyncio.Semaphore
        self._tasks: set[asyncio.Task[Any]] = set()
        self.thread = LoopThread(self.name)
        try:
            self.thread.submit(self._open()).result()
        except BaseException:
            self.thread.stop()
            raise

    async def _open(self) -> None:
        # Apart: a request waits for what is read, nobody for what is stored.
        self._put_room, self._get_room = asyncio.Semaphore(SLICES_AT_ONCE), asyncio.Semaphore(SLICES_AT_ONCE)
        await self._agent.__aenter__()
        try:
            if self._given_arena is not None:
                self._arena = await self._agent.register(host_view(*self._given_arena), name="l1")
            if self.options.url:
                self._keeper = Whole(self._agent, await self._agent.store(self.options.url, **self.options.options))
            else:
                self._keeper = InTiers(self._agent, self.options)
            await self._keeper.open()
        except BaseException:
            await self._agent.aclose()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Call[Any]:
        """Start one of the coroutines below, or one made of them, on the loop; see `LoopThread.submit`."""
        try:
            return self.thread.submit(self._tracked(coroutine))
        except NixlError:
            coroutine.close()
            raise

    async def _tracked(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)

    def close(self, *, wait: bool = False) -> None:
        """Cancel what is under way (`wait`: give it `close_seconds` first), write what is queued, release everything. Idempotent.

        When it returns, no byte of any caller's memory moves any more, and every call has ended.
        """
        self.thread.stop(self._close(wait))

    async def _close(self, wait: bool) -> None:
        try:
            # Those that were submitted just before the close have to start to be told.
            await asyncio.sleep(0)
            if wait and self._tasks:
                await asyncio.wait(self._tasks, timeout=self.options.close_seconds)
            for task in self._tasks:
                task.cancel()
            while self._tasks:
                await asyncio.wait(self._tasks)
                await asyncio.sleep(0)
            try:
                async with asyncio.timeout(self.options.close_seconds):
                    await self._keeper.aclose()
            except TimeoutError:
                logger.warning("%s: closed after %g s with blocks unwritten", self.name, self.options.close_seconds)
            except NixlError as error:
                logger.warning("%s: %s", self.name, error)
        finally:
            await self._agent.aclose()

    # The coroutines.

    async def find(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        """Return the bytes of each chunk that is there, `None` for each that is not, or could not be asked about in time.

        `sizes` are those that each chunk may have; a store at a URL needs none.
        """
        if not names or not self.breaker.allows():
            return [None] * len(names)
        try:
            async with asyncio.timeout(self.options.lookup_seconds):
                found = await self._keeper.find(names, sizes)
        except (TimeoutError, NixlError) as error:
            self.breaker.tell([error])
            logger.warning("%s: looking up %d chunks in %s failed: %s", self.name, len(names), self.options, _text(error))
            return [None] * len(names)
        self.breaker.tell([None])
        return found

    async def put(self, chunks: Sequence[Chunk]) -> list[Result]:
        """Store chunks that are not there yet. Return of each whether it was stored (False: it was there), or its error."""
        first: dict[str, int] = {}
        for at, chunk in enumerate(chunks):
            first.setdefault(chunk.name, at)
        stored = await self._in_slices([chunks[at] for at in first.values()], self._keeper.put, self._put_room)
        by_name = dict(zip(first, stored, strict=True))
        results: list[Result] = []
        for at, chunk in enumerate(chunks):
            result = by_name[chunk.name]
            again = result is True and at != first[chunk.name]
            results.append(False if again else result)
        return results

    async def get(self, chunks: Sequence[Chunk]) -> list[Result]:
        """Read chunks of exactly these sizes into memory. Return True for each that is in place, or its error."""
        return await self._in_slices(chunks, self._keeper.get, self._get_room)

    async def delete(self, names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[int | None]:
        """Delete chunks; return the bytes of each that was there.

        Raises:
            NixlError: it failed, or took too long.
        """
        if not self.breaker.allows():
            raise self._left_alone()
        try:
            async with asyncio.timeout(self.options.transfer_seconds):
                found = await self._keeper.delete(names, sizes)
        except TimeoutError:
            late = f"deleting {len(names)} chunks from {self.options} took more than {self.options.transfer_seconds:g} s"
            error = BackendError(late)
            self.breaker.tell([error])
            raise error from None
        except NixlError as failed:
            self.breaker.tell([failed])
            raise
        self.breaker.tell([None])
        return found

    async def listing(self, prefix: str = "") -> AsyncGenerator[tuple[str, int], None]:
        """Iterate over the names and sizes of a store's chunks, in order of names.

        Raises:
            NixlError: the store failed. Tiers cannot tell names: they keep hashes.
        """
        if not isinstance(self._keeper, Whole):
            raise BackendError(f"{self.options} keep no names; only a url can be listed")
        async for name, nbytes in self._keeper.listing(prefix):
            yield name, nbytes

    def usage(self) -> tuple[int, int] | None:
        """Return the bytes in the last tier and its capacity (0: none), `None` for a store at a URL; on the loop."""
        return self._keeper.usage()

    async def status(self) -> dict[str, Any]:
        """Return counters for people."""
        return {"kept_in": str(self.options), "calls": len(self._tasks), **self._keeper.status()}

    # Underneath.

    async def _in_slices(self, chunks: Sequence[Chunk], work: Work, room: asyncio.Semaphore) -> list[Result]:
        results: list[Result] = [_refusal(chunk) or False for chunk in chunks]
        which = [at for at, refusal in enumerate(results) if not refusal]
        good = [chunks[at] for at in which]

        async def one(start: int, stop: int) -> None:
            async with room:
                found = await self._bounded(good[start:stop], work)
            for at, result in zip(which[start:stop], found, strict=True):
                results[at] = result

        async with asyncio.TaskGroup() as group:
            for start, stop in _slices(good):
                group.create_task(one(start, stop))
        return results

    def _left_alone(self) -> BackendError:
        return BackendError(f"{self.options} failed {self.breaker.failures} times in a row; it is left alone for a while")

    async def _bounded(self, chunks: Sequence[Chunk], work: Work) -> list[Result]:
        if not self.breaker.allows():
            return [self._left_alone()] * len(chunks)
        results: list[Result]
        async with contextlib.AsyncExitStack() as stack:
            try:
                placed = await self._place(chunks, stack)
            except NixlError as refused:
                return [refused] * len(chunks)
            try:
                async with asyncio.timeout(self.options.transfer_seconds):
                    results = await work([chunk.name for chunk in chunks], placed)
            except TimeoutError:
                late = f"{self.options}: {len(chunks)} chunks took more than {self.options.transfer_seconds:g} s"
                results = [BackendError(late)] * len(chunks)
            except NixlError as failed:
                results = [failed] * len(chunks)
        self.breaker.tell(result if isinstance(result, NixlError) else None for result in results)
        return results

    async def _place(self, chunks: Sequence[Chunk], stack: contextlib.AsyncExitStack) -> list[Placed]:
        """Find the region of each chunk's bytes; register for a while what is not in the arena."""
        placed = []
        arena = self._arena
        for chunk in chunks:
            if arena is not None and 0 <= (offset := chunk.address - arena.address) <= arena.nbytes - chunk.nbytes:
                placed.append(Placed(arena, offset, chunk.nbytes))
                continue
            region = await self._agent.register(host_view(chunk.address, chunk.nbytes))
            stack.push_async_callback(region.aclose)
            placed.append(Placed(region, 0, chunk.nbytes))
        return placed


def _refusal(chunk: Chunk) -> DescriptorError | None:
    if chunk.nbytes > 0 and chunk.address > 0:
        return None
    return DescriptorError(
        f"chunk {chunk.name!r} has {chunk.nbytes} bytes at {chunk.address:#x} of this process; it must have some"
    )


def _slices(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start = nbytes = 0
    for at, chunk in enumerate(chunks):
        if at > start and (nbytes + chunk.nbytes > SLICE_NBYTES or at - start == SLICE_CHUNKS):
            found.append((start, at))
            start, nbytes = at, 0
        nbytes += chunk.nbytes
    if chunks:
        found.append((start, len(chunks)))
    return found


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _backends(options: ChunkOptions) -> list[str]:
    """Return what the agent needs, and nothing else: no transports, no devices."""
    urls = [options.url] if options.url else [tier.url for tier in options.tiers if isinstance(tier, Objects)]
    names = [SCHEMES[scheme] for url in urls if (scheme := urlsplit(url).scheme) in SCHEMES]
    if any(isinstance(tier, Files) for tier in options.tiers):
        names.append("posix")
    return list(dict.fromkeys(["memory", *names]))

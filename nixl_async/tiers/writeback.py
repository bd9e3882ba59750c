"""The queue of blocks on their way to one tier: bounded, so that who puts waits when the tier is slower; no task while idle."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence

from nixl_async.errors import InternalError, NixlError
from nixl_async.tiers.context import heard

logger = logging.getLogger("nixl_async.tiers")

FAILURES_KEPT = 10_000
Entry = tuple[bytes, int | None]
"""A key, and the memory slot that is pinned for it (`None`: the block is in the tier above, if it still is)."""


class WriteBack:
    """Writes what is `put` into it by calling `write(entries)`, `batch` at a time, in `n_workers` tasks.

    `write` returns each key that failed, with its error, and releases what the entries hold, also when it raises.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[list[Entry]], Awaitable[dict[bytes, NixlError]]],
        release: Callable[[Sequence[Entry]], None],
        *,
        capacity: int,
        batch: int,
        n_workers: int,
    ) -> None:
        self._name = name
        self._write, self._release = write, release
        self._capacity, self._batch, self._n_workers = capacity, batch, n_workers
        self._entries: deque[Entry] = deque()
        self._queued: set[bytes] = set()
        self._workers: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()
        self._closed = False
        self.dropped = 0
        self.failures: OrderedDict[bytes, NixlError] = OrderedDict()
        """The last keys that could not be written, until `take_failures` returns them."""

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, key: bytes) -> bool:
        return key in self._queued

    async def put(self, entries: Sequence[Entry]) -> None:
        """Queue blocks, in turn; waits while the queue is full. If cancelled, what was not queued yet is released."""
        at = 0
        try:
            async with self._turn:
                while at < len(entries):
                    while len(self._queued) >= self._capacity:
                        self._room.clear()
                        await self._room.wait()
                    stop = min(len(entries), at + self._capacity - len(self._queued))
                    part, at = entries[at:stop], stop
                    self._add(part)
        finally:
            if at < len(entries):
                self.dropped += len(entries) - at
                self._release(entries[at:])

    def put_now(self, entries: Sequence[Entry]) -> None:
        """Queue what there is room for, and release the rest."""
        room = 0 if self._turn.locked() else max(0, self._capacity - len(self._queued))
        self._add(entries[:room])
        self._release(entries[room:])

    def _add(self, entries: Sequence[Entry]) -> None:
        if self._closed:
            self._release(entries)
            return
        for entry in entries:
            if entry[0] in self._queued:
                self._release([entry])
            else:
                self._queued.add(entry[0])
                self._entries.append(entry)
        while self._entries and len(self._workers) < min(self._n_workers, -(-len(self._entries) // self._batch)):
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(heard)

    async def _work(self) -> None:
        try:
            while self._entries:
                part = [self._entries.popleft() for _ in range(min(self._batch, len(self._entries)))]
                try:
                    failed = await self._write(part)
                except NixlError as error:
                    failed = {key: error for key, _ in part}
                except Exception as error:
                    logger.exception("writing to tier %r", self._name)
                    fault = InternalError(f"writing to tier {self._name!r}: {error!r}")
                    failed = {key: fault for key, _ in part}
                finally:
                    self._queued.difference_update(key for key, _ in part)
                    self._room.set()
                if failed:
                    self._note(failed)
        finally:
            worker = asyncio.current_task()
            assert worker is not None
            self._workers.discard(worker)

    def _note(self, failed: dict[bytes, NixlError]) -> None:
        self.dropped += len(failed)
        logger.warning("%d blocks could not be written to tier %r: %s", len(failed), self._name, next(iter(failed.values())))
        self.failures.update(failed)
        while len(self.failures) > FAILURES_KEPT:
            self.failures.popitem(last=False)

    async def drain(self) -> None:
        """Wait until all that is queued is written."""
        while self._workers:
            await asyncio.wait(set(self._workers))

    def take_failures(self) -> dict[bytes, NixlError]:
        """Return the keys that failed since this was last called, 10,000 at most."""
        failed = dict(self.failures)
        self.failures.clear()
        return failed

    async def aclose(self) -> None:
        """Drop what waits, stop what is being written, wait for its end."""
        self._closed = True
        dropped = list(self._entries)
        self._entries.clear()
        self._queued.difference_update(key for key, _ in dropped)
        self.dropped += len(dropped)
        self._release(dropped)
        for worker in self._workers:
            worker.cancel()
        if self._workers:
            await asyncio.wait(set(self._workers))

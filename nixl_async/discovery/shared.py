"""One watch of a store for all agents of a process: a fleet of a thousand is then told of each agent once, not a thousand times."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

from nixl_async.discovery.store import FAILURES, DiscoveryStore, Seen, StoreURL
from nixl_async.errors import BackendError

CLOSE_SECONDS = 2.0
_Key: TypeAlias = tuple[asyncio.AbstractEventLoop, object]
_feeds: dict[_Key, _Feed] = {}


class SharedStore(DiscoveryStore):
    """A store as `make` returns it, but its watch is that of all whose URL is the same, on the same loop."""

    def __init__(self, make: Callable[[], DiscoveryStore], url: StoreURL) -> None:
        self._own, self._make = make(), make
        self.lease_seconds, self.holds_metadata, self.server = (
            self._own.lease_seconds,
            self._own.holds_metadata,
            self._own.server,
        )
        self._url = (url.scheme, url.hosts, url.path, tuple(sorted(url.options.items())), url.user, url.password)
        self._feed: _Feed | None = None

    async def put(self, name: str, value: bytes) -> None:
        """Publish a value under a lease of this object's own."""
        await self._own.put(name, value)

    async def keep(self) -> None:
        """Renew the lease."""
        await self._own.keep()

    async def remove(self, name: str) -> None:
        """Take back what this object has put."""
        await self._own.remove(name)

    async def put_metadata(self, name: str, blob: bytes) -> None:
        """Publish a whole metadata blob."""
        await self._own.put_metadata(name, blob)

    def watch_metadata(self, name: str) -> AsyncGenerator[bytes | None, None]:
        """Yield the blob of one agent, then what it becomes."""
        return self._own.watch_metadata(name)

    def hurry(self) -> None:
        """Take note that somebody waits."""
        if self._feed is not None:
            self._feed.store.hurry()

    async def watch(self) -> AsyncGenerator[Seen, None]:
        """Yield all there is, then each change, as the watch that all share sees it."""
        key: _Key = (asyncio.get_running_loop(), self._url)
        feed = _feeds.get(key)
        if feed is None:
            feed = _feeds[key] = _Feed(key, self._make())
        self._feed = feed
        queue: asyncio.Queue[Seen | Exception] = asyncio.Queue()
        feed.listeners[queue] = None
        try:
            if feed.values is not None:
                yield Seen(dict(feed.values), whole=True)
            while True:
                seen = await queue.get()
                if isinstance(seen, Exception):
                    raise seen
                yield seen
        finally:
            self._feed = None
            await feed.leave(queue)

    async def aclose(self) -> None:
        """Let go of what this object holds; the watch goes on for the others."""
        await self._own.aclose()


class _Feed:
    """A watch, what it has seen so far, and who listens."""

    def __init__(self, key: _Key, store: DiscoveryStore) -> None:
        self.store = store
        self.values: dict[str, bytes | None] | None = None
        self.listeners: dict[asyncio.Queue[Seen | Exception], None] = {}
        self._key = key
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def leave(self, queue: asyncio.Queue[Seen | Exception]) -> None:
        """Listen no more; the last one ends the watch."""
        self.listeners.pop(queue, None)
        if not self.listeners:
            self._retire()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _retire(self) -> None:
        if _feeds.get(self._key) is self:
            del _feeds[self._key]

    async def _run(self) -> None:
        try:
            try:
                async with contextlib.aclosing(self.store.watch()) as watching:
                    async for seen in watching:
                        self._tell(seen)
                raise BackendError("the watch has ended")
            finally:
                # Whoever begins anew gets another one.
                self._retire()
                with contextlib.suppress(*FAILURES):
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await self.store.aclose()
        except Exception as error:
            text = str(error) or type(error).__name__
            for queue in self.listeners:
                queue.put_nowait(BackendError(text) if isinstance(error, FAILURES) else error)

    def _tell(self, seen: Seen) -> None:
        if self.values is None or seen.whole:
            self.values = {}
        for name, value in seen.values.items():
            if value is None:
                self.values.pop(name, None)
            else:
                self.values[name] = value
        for queue in self.listeners:
            queue.put_nowait(seen)

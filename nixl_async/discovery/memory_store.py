"""`memory://name`: agents of one process, whichever loop each runs on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from nixl_async.discovery.store import DiscoveryStore, Seen, StoreURL
from nixl_async.errors import ConfigurationError


@dataclass(eq=False)
class _Shelf:
    """The entries under one name, each with who put it; and the watches to tell."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    values: dict[str, tuple[bytes, object]] = field(default_factory=dict)
    watches: dict[asyncio.Queue[Seen], asyncio.AbstractEventLoop] = field(default_factory=dict)

    def tell(self, seen: Seen) -> None:
        for queue, loop in self.watches.items():
            # A loop that has closed without ending its watch misses nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, seen)


_shelves: dict[str, _Shelf] = {}
_shelves_lock = threading.Lock()


class MemoryStore(DiscoveryStore):
    """Entries in this process; they stay until they are removed or their store object is closed.

    Raises:
        ConfigurationError: the URL has no name.
    """

    lease_seconds = 0.0

    def __init__(self, url: StoreURL) -> None:
        url.check_options()
        if len(url.hosts) != 1 or url.path.strip("/"):
            raise ConfigurationError(f"{url} is not of the form memory://name")
        with _shelves_lock:
            self._shelf = _shelves.setdefault(url.hosts[0], _Shelf())
        self._names: set[str] = set()

    async def put(self, name: str, value: bytes) -> None:
        """Publish a value."""
        self._names.add(name)
        with self._shelf.lock:
            self._shelf.values[name] = (value, self)
            self._shelf.tell(Seen({name: value}))

    async def keep(self) -> None:
        """Wait for ever: nothing here is lost."""
        await asyncio.get_running_loop().create_future()

    async def remove(self, name: str) -> None:
        """Take back what this object has put."""
        self._names.discard(name)
        with self._shelf.lock:
            if self._shelf.values.get(name, (b"", None))[1] is self:
                del self._shelf.values[name]
                self._shelf.tell(Seen({name: None}))

    async def watch(self) -> AsyncGenerator[Seen, None]:
        """Yield all there is, then each change."""
        queue: asyncio.Queue[Seen] = asyncio.Queue()
        with self._shelf.lock:
            whole = Seen({name: value for name, (value, _) in self._shelf.values.items()}, whole=True)
            self._shelf.watches[queue] = asyncio.get_running_loop()
        try:
            yield whole
            while True:
                yield await queue.get()
        finally:
            with self._shelf.lock:
                del self._shelf.watches[queue]

    async def aclose(self) -> None:
        """Take back all that this object has put."""
        for name in list(self._names):
            await self.remove(name)

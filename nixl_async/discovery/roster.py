"""The agents that a store knows, as last seen, and this agent's own entry in it. A store that is away changes nothing here."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from nixl_async.discovery.store import FAILURES, DiscoveryStore, Seen
from nixl_async.errors import ConfigurationError, ProtocolError

logger = logging.getLogger("nixl_async.discovery")

MAX_ENTRY_NBYTES = 4096
MAX_ENTRIES = 100_000
AGAIN_SECONDS = (0.1, 2.0)
"""How long to wait before a store is asked again that did not answer: at first, and at most."""
OPEN_SECONDS = 2.0
"""How long opening and publishing wait for the store; after that they go on behind the caller's back."""
CLOSE_SECONDS = 2.0
METADATA_NBYTES_A_SECOND = 256 << 10
"""At most so much of it an agent whose regions change on and on writes to the store."""
GRACE_SECONDS = 5.0
"""How much longer than a lease an entry may be missing after an outage, before its agent counts as withdrawn."""
MAX_NAME_NBYTES = 255
MAX_INCARNATION_NBYTES = 64
MAX_HOST_NBYTES = 255


@dataclass(frozen=True, slots=True)
class Discovered:
    """An agent that a discovery store knows: its name, the id of its life, the host and port it is served at."""

    name: str
    incarnation: str
    address: tuple[str, int]

    def encode(self) -> bytes:
        """Return the value that is published."""
        record = {"version": 1, "name": self.name, "incarnation": self.incarnation, "address": self.address}
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def decode(cls, name: str, value: bytes) -> Discovered:
        """Read what is published under a name.

        Raises:
            ProtocolError: it is malformed, too large, or another agent's.
        """
        if len(value) > MAX_ENTRY_NBYTES:
            raise ProtocolError(f"it has {len(value)} bytes; at most {MAX_ENTRY_NBYTES} are read")
        try:
            record = json.loads(value)
        except (ValueError, RecursionError):
            raise ProtocolError("it is no JSON") from None
        if not isinstance(record, dict):
            raise ProtocolError("it is no JSON object")
        incarnation, address = record.get("incarnation"), record.get("address")
        if record.get("name") != name:
            raise ProtocolError("it is the entry of another name")
        if not 0 < len(name.encode(errors="replace")) <= MAX_NAME_NBYTES:
            raise ProtocolError(f"a name has 1 to {MAX_NAME_NBYTES} bytes")
        if not isinstance(incarnation, str) or not 0 < len(incarnation) <= MAX_INCARNATION_NBYTES:
            raise ProtocolError("it has no incarnation")
        match address:
            case [str(host), int(port)] if 0 < len(host) <= MAX_HOST_NBYTES and 0 < port < 65536 and host.isprintable():
                return cls(name, incarnation, (host, port))
        raise ProtocolError("it has no address")


class Roster:
    """Keeps what a store says, and this agent's entry in the store, through outages of the store.

    `changed(kind, name)` is called with `discovered` for an agent that appears or is another than before, and with
    `withdrawn` for one that is gone.
    """

    def __init__(
        self, store: DiscoveryStore, title: str, name: str, incarnation: str, changed: Callable[[str, str], None]
    ) -> None:
        self.known: dict[str, Discovered] = {}
        self.trouble = ""
        """Why the store cannot be watched, empty while it can."""
        self._store, self._title, self._name, self._incarnation = store, title, name, incarnation
        self._changed = changed
        self._own: Discovered | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing: list[asyncio.Task[None]] = []
        self._seen_once = asyncio.Event()
        self._published = asyncio.Event()
        self._unpublished = asyncio.Event()
        self._missing: dict[str, asyncio.TimerHandle] = {}
        self._full = self._contested = False
        self._metadata: Callable[[], Coroutine[Any, Any, bytes | None]] | None = None
        self._stale = asyncio.Event()
        self._closing = False

    async def open(self) -> None:
        """Begin to watch; return when all that is published is known, or `OPEN_SECONDS` later."""
        self._spawn(self._watch())
        await _patiently(self._seen_once)

    async def publish(self, address: tuple[str, int], metadata: Callable[[], Coroutine[Any, Any, bytes | None]]) -> None:
        """Publish this agent, and keep it published; return when it is, or `OPEN_SECONDS` later.

        `metadata` returns its whole blob, for a store that holds such; `None` if there is none to publish.
        """
        self._own, self._metadata = Discovered(self._name, self._incarnation, address), metadata
        self._publishing.append(self._spawn(self._keep(self._own)))
        if self._store.holds_metadata:
            self._stale.set()
            self._publishing.append(self._spawn(self._keep_metadata()))
        await _patiently(self._published)

    def stale(self) -> None:
        """Take note that this agent's metadata has changed."""
        self._stale.set()

    async def withdraw(self) -> None:
        """Take this agent's entry back, and go on watching; a store that does not answer is left to find out by the lease."""
        if self._own is None:
            return
        self._own = None
        for task in self._publishing:
            task.cancel()
        await asyncio.gather(*self._publishing, return_exceptions=True)
        await self._farewell(self._store.remove(self._name))

    async def aclose(self) -> None:
        """Withdraw this agent and stop watching; a store that does not answer is left to find out by the lease."""
        self._closing = True
        for handle in self._missing.values():
            handle.cancel()
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._farewell(self._leave())

    # Inside.

    async def _leave(self) -> None:
        if self._own is not None:
            await self._store.remove(self._name)
        await self._store.aclose()

    async def _farewell(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await work
        except (*FAILURES, TimeoutError) as error:
            logger.warning("agent %s: not withdrawn from %s: %s", self._name, self._title, error or "no answer")

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("agent %s: discovery through %s ends", self._name, self._title, exc_info=error)

    async def _watch(self) -> None:
        again = AGAIN_SECONDS[0]
        while True:
            try:
                async with contextlib.aclosing(self._store.watch()) as batches:
                    async for seen in batches:
                        again = AGAIN_SECONDS[0]
                        if self.trouble:
                            logger.info("agent %s: %s answers again", self._name, self._title)
                            self.trouble = ""
                        self._take(seen)
                        self._seen_once.set()
            except FAILURES as error:
                if not self.trouble:
                    logger.warning(
                        "agent %s: %s cannot be watched, what it said last goes on to hold: %s", self._name, self._title, error
                    )
                self.trouble = str(error) or type(error).__name__
            await asyncio.sleep(again)
            again = min(2 * again, AGAIN_SECONDS[1])

    def _take(self, seen: Seen) -> None:
        for name, value in seen.values.items():
            if value is None:
                self._gone(name)
            else:
                self._there(name, value)
        if seen.whole:
            # What is missing after an outage may be about to be put again.
            for name in self.known.keys() - seen.values.keys() - self._missing.keys():
                seconds = self._store.lease_seconds + GRACE_SECONDS
                self._missing[name] = asyncio.get_running_loop().call_later(seconds, self._gone, name)
            if self._own is not None and self._name not in seen.values:
                self._unpublished.set()

    def _there(self, name: str, value: bytes) -> None:
        try:
            entry = Discovered.decode(name, value)
        except ProtocolError as error:
            logger.warning("agent %s: the entry of %.80r in %s is ignored: %s", self._name, name, self._title, error)
            return
        if (handle := self._missing.pop(name, None)) is not None:
            handle.cancel()
        if name == self._name:
            self._contest(entry)
            return
        if name not in self.known and len(self.known) >= MAX_ENTRIES:
            if not self._full:
                self._full = True
                logger.warning(
                    "agent %s: %s has more than %d agents; others are ignored", self._name, self._title, MAX_ENTRIES
                )
            return
        if self.known.get(name) != entry:
            self.known[name] = entry
            self._changed("discovered", name)

    def _gone(self, name: str) -> None:
        if (handle := self._missing.pop(name, None)) is not None:
            handle.cancel()
        if name == self._name:
            self._contested = False
            self._unpublished.set()
        elif self.known.pop(name, None) is not None:
            self._changed("withdrawn", name)

    def _contest(self, entry: Discovered) -> None:
        self._contested = self._own is not None and entry.incarnation != self._incarnation
        if self._contested:
            # The newer one wins; two that both insisted would go on for ever.
            logger.warning(
                "agent %s: another agent has published itself under this name in %s, at %s:%d; names must be unique",
                self._name,
                self._title,
                *entry.address,
            )

    async def _keep(self, own: Discovered) -> None:
        """Keep this agent's entry in the store."""
        again, warned = AGAIN_SECONDS[0], False
        while True:
            try:
                self._unpublished.clear()
                if not self._contested:
                    await self._store.put(self._name, own.encode())
                    if self._published.is_set():
                        logger.info("agent %s: published in %s again", self._name, self._title)
                        self._stale.set()
                    self._published.set()
                again, warned = AGAIN_SECONDS[0], False
                await _first(self._store.keep(), self._unpublished.wait())
            except FAILURES as error:
                if not warned:
                    logger.warning("agent %s: not published in %s yet: %s", self._name, self._title, error)
                    warned = True
            await asyncio.sleep(again)
            again = min(2 * again, AGAIN_SECONDS[1])

    async def _keep_metadata(self) -> None:
        again, warned, pause = AGAIN_SECONDS[0], False, 0.0
        while True:
            await self._stale.wait()
            # Regions are registered one after the other; each need not be a request, and not all of a large blob.
            await asyncio.sleep(max(again, pause))
            self._stale.clear()
            assert self._metadata is not None
            try:
                if (blob := await self._metadata()) is not None and not self._contested:
                    await self._store.put_metadata(self._name, blob)
                    pause = len(blob) / METADATA_NBYTES_A_SECOND
                again, warned = AGAIN_SECONDS[0], False
            except ConfigurationError as error:
                if not warned:
                    logger.warning("agent %s: stock NIXL agents do not find it in %s: %s", self._name, self._title, error)
                    warned = True
            except FAILURES as error:
                logger.info("agent %s: its metadata in %s is not what it should be yet: %s", self._name, self._title, error)
                again = min(2 * again, AGAIN_SECONDS[1])
                self._stale.set()


async def _patiently(event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(OPEN_SECONDS):
            await event.wait()


async def _first(*work: Coroutine[Any, Any, Any]) -> None:
    """Do several things until one ends, and raise what that one raises."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()

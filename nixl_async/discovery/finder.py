"""Peers by name: who is asked for is looked up, dialled once however many ask, and dialled again when it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from dataclasses import dataclass, field
from typing import Any

from nixl_async.discovery.roster import AGAIN_SECONDS, Discovered, Roster
from nixl_async.discovery.store import FAILURES, DiscoveryStore
from nixl_async.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    NixlError,
    PeerLost,
    ProtocolError,
)
from nixl_async.membership import Membership
from nixl_async.metadata import decode
from nixl_async.peers import Peer, decode_announcement

logger = logging.getLogger("nixl_async.discovery")

DIAL_SECONDS = 10.0
"""How long a dial may take before it is given up and begun again."""
TELL_SECONDS = 10.0
"""After this long a search that has found nothing says so in the log."""
TOKEN_RECORD = "NIXL_ASYNC_TOKEN"
"""The record by which an agent of the drop-in for NIXL's API says, to whoever has its metadata, what to connect with."""
MAX_REGIONS = 16384
"""An agent with more publishes no whole metadata: it would not fit."""
_LISTED = 20


@dataclass(eq=False)
class _Search:
    """One name that somebody waits for."""

    name: str
    wanted: int = 0
    trouble: str = ""
    """What came of the last dial."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[Peer | None] | None = None


class Finder:
    """Finds peers through a discovery store, and publishes this agent in it.

    `stock`: whether agents of NIXL's own, which prove nothing, are taken from the store.
    """

    def __init__(
        self, store: DiscoveryStore, title: str, membership: Membership, name: str, incarnation: str, *, stock: bool
    ) -> None:
        self._store, self._title, self._membership, self._name = store, title, membership, name
        self._stock = stock and store.holds_metadata
        self._roster = Roster(store, title, name, incarnation, self._changed)
        self._searches: dict[str, _Search] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        # Agents whose whole metadata is followed: stock ones, from the first time they are asked for.
        self._followed: dict[str, asyncio.Task[None]] = {}
        self._blobs: dict[str, bytes] = {}

    @property
    def known(self) -> dict[str, Discovered]:
        """The agents that the store has, or had when it could be reached last."""
        return dict(self._roster.known)

    async def open(self) -> None:
        """Begin to watch the store."""
        await self._roster.open()

    async def publish(self, address: tuple[str, int]) -> None:
        """Publish this agent as served at `address`; return when it is, or soon if the store is away."""
        await self._roster.publish(address, self._blob)

    async def withdraw(self) -> None:
        """Take back what was published; peers are found as before."""
        await self._roster.withdraw()

    async def reachable(self, host: str) -> str | None:
        """Return the address of this host that leads to the store, if `host` stands for every address; else `None`.

        Raises:
            ConfigurationError: which address others reach cannot be told.
        """
        try:
            if not ipaddress.ip_address(host).is_unspecified:
                return None
        except ValueError:
            return None
        if self._store.server is None:
            raise ConfigurationError(
                f"the agent is served at every address ({host}) and {self._title} does not tell which one others reach:"
                " pass advertise=… to serve"
            )
        loop = asyncio.get_running_loop()
        try:
            (family, *_, target), *_ = await loop.getaddrinfo(*self._store.server, type=socket.SOCK_DGRAM)
            with socket.socket(family, socket.SOCK_DGRAM) as route:
                # No packet goes: the kernel only chooses the way.
                route.connect(target)
                return str(route.getsockname()[0])
        except OSError as error:
            raise ConfigurationError(f"no way to {self._title}: {error}; pass advertise=… to serve") from error

    def regions_changed(self) -> None:
        """Take note that this agent has other regions than before."""
        self._roster.stale()

    async def peer(self, name: str) -> Peer:
        """Return the connected peer of that name; wait until there is one."""
        if name == self._name:
            raise ConfigurationError(f"{name!r} is this agent itself; ask for another")
        if (peer := self._membership.peers.get(name)) is not None:
            return peer
        search = self._searches.get(name)
        if search is None or search.task is None or search.task.done():
            search = self._searches[name] = _Search(name)
            search.task = self._spawn(self._search(search))
        search.wanted += 1
        arrival = asyncio.ensure_future(self._membership.wait_peer(name))
        arrival.add_done_callback(_consume)
        told = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell, search)
        try:
            # Whichever side dials.
            done, _ = await asyncio.wait({arrival, search.task}, return_when=asyncio.FIRST_COMPLETED)
            if search.task in done and not search.task.cancelled() and (found := search.task.result()) is not None:
                return found
            return await arrival
        except asyncio.CancelledError as error:
            error.add_note(self._state_of(search))
            raise
        finally:
            told.cancel()
            arrival.cancel()
            search.wanted -= 1
            if not search.wanted:
                search.wake.set()

    async def aclose(self) -> None:
        """Withdraw this agent, stop watching, and give up every search with `ClosedError`."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._roster.aclose()

    # Inside.

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, NixlError):
            logger.error("agent %s: a search fails", self._name, exc_info=error)

    def _tell(self, search: _Search) -> None:
        logger.warning("agent %s %s", self._name, self._state_of(search))

    def _state_of(self, search: _Search) -> str:
        names = sorted(self._roster.known)
        listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        trouble = search.trouble or (
            f"it is published at {':'.join(map(str, entry.address))}"
            if (entry := self._roster.known.get(search.name)) is not None
            else f"nobody of that name is published; there are: {listed or 'none'}"
        )
        if self._store.holds_metadata and not self._stock and search.name not in self._roster.known:
            trouble += "; a stock NIXL agent is taken only where the URL says stock=allow"
        away = f" ({self._title} cannot be watched: {self._roster.trouble})" if self._roster.trouble else ""
        return f"waits for peer {search.name!r}: {trouble}{away}"

    def _changed(self, kind: str, name: str) -> None:
        self._membership.tell(kind, name)
        if (search := self._searches.get(name)) is not None:
            search.wake.set()
        peer, entry = self._membership.peers.get(name), self._roster.known.get(name)
        if kind == "discovered" and peer is not None and entry is not None and peer.incarnation != entry.incarnation:
            self._spawn(self._replace(entry))

    async def _replace(self, entry: Discovered) -> None:
        """Connect to the new life of a connected peer; that parts from the old one. If it cannot be reached, nothing changes."""
        try:
            await self._dial(entry)
        except NixlError as error:
            logger.info("agent %s: the new %s is not reached yet: %s", self._name, entry.name, error)

    async def _search(self, search: _Search) -> Peer | None:
        again = AGAIN_SECONDS[0]
        try:
            while search.wanted:
                search.wake.clear()
                if (peer := self._membership.peers.get(search.name)) is not None:
                    return peer
                entry = self._roster.known.get(search.name)
                if entry is not None:
                    try:
                        return await self._dial(entry)
                    except (PeerLost, ProtocolError) as error:
                        search.trouble = str(error)
                elif self._stock:
                    self._follow(search.name)
                    if (peer := await self._load(search)) is not None:
                        return peer
                self._store.hurry()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(again if entry is not None or search.name in self._blobs else None):
                        await search.wake.wait()
                        again = AGAIN_SECONDS[0]
                again = min(2 * again, AGAIN_SECONDS[1])
            return None
        except asyncio.CancelledError:
            raise ClosedError("the agent is closed") from None
        finally:
            if self._searches.get(search.name) is search:
                del self._searches[search.name]
            if (followed := self._followed.get(search.name)) is not None and not self._is_stock(search.name):
                followed.cancel()

    async def _dial(self, entry: Discovered, token: bytes | None = None) -> Peer:
        where = f"{entry.address[0]}:{entry.address[1]}"
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                return await self._membership.connect(*entry.address, token, name=entry.name)
        except TimeoutError:
            raise PeerLost(f"{entry.name!r} does not answer at {where}", peer=entry.name, retryable=True) from None
        except AuthenticationError as error:
            raise AuthenticationError(f"peer {entry.name!r} at {where}: {error}") from error

    # Whole metadata, of this agent for stock ones and of those for this one.

    async def _blob(self) -> bytes | None:
        regions = [region for region in self._membership.regions.values() if region.offered]
        if len(regions) > MAX_REGIONS:
            raise ConfigurationError(f"it has {len(regions)} regions; the metadata of at most {MAX_REGIONS} is published")
        return await asyncio.to_thread(self._membership.metadata, regions)

    def _follow(self, name: str) -> None:
        if name not in self._followed:
            task = self._followed[name] = self._spawn(self._follow_metadata(name))

            def ended(_: object) -> None:
                del self._followed[name]
                self._blobs.pop(name, None)

            task.add_done_callback(ended)

    async def _follow_metadata(self, name: str) -> None:
        """Follow the metadata of one agent for as long as it is wanted or connected."""
        again = AGAIN_SECONDS[0]
        while name in self._searches or self._is_stock(name):
            try:
                async with contextlib.aclosing(self._store.watch_metadata(name)) as blobs:
                    async for blob in blobs:
                        again = AGAIN_SECONDS[0]
                        await self._take(name, blob)
                        if name not in self._searches and not self._is_stock(name):
                            break
            except FAILURES as error:
                logger.info("agent %s: the metadata of %s cannot be watched: %s", self._name, name, error)
            await asyncio.sleep(again)
            again = min(2 * again, AGAIN_SECONDS[1])

    def _is_stock(self, name: str) -> bool:
        peer = self._membership.peers.get(name)
        return peer is not None and peer.link is None

    async def _take(self, name: str, blob: bytes | None) -> None:
        if blob is None:
            self._blobs.pop(name, None)
            if self._is_stock(name):
                # With NIXL's agents the deletion of the key is the whole farewell.
                with contextlib.suppress(PeerLost):
                    await self._membership.disconnect(name)
        else:
            self._blobs[name] = blob
            if self._is_stock(name):
                with contextlib.suppress(NixlError):
                    await self._load_blob(name, blob)
        if (search := self._searches.get(name)) is not None:
            search.wake.set()

    async def _load(self, search: _Search) -> Peer | None:
        blob = self._blobs.get(search.name)
        if blob is None:
            return None
        try:
            return await self._load_blob(search.name, blob)
        except (PeerLost, ProtocolError) as error:
            search.trouble = str(error)
            return None

    async def _load_blob(self, name: str, blob: bytes) -> Peer:
        try:
            announcement = decode_announcement(blob)
            if announcement.name != name:
                raise ProtocolError(f"it is of another agent, {announcement.name!r}")
            if not announcement.stock and announcement.control is None:
                raise ProtocolError("it has no address to connect to")
            token = decode(blob).connections.get(TOKEN_RECORD)
        except ProtocolError as error:
            logger.warning("agent %s: the metadata of %r in %s is ignored: %s", self._name, name, self._title, error)
            self._blobs.pop(name, None)
            raise
        if announcement.control is not None:
            return await self._dial(Discovered(name, announcement.incarnation, announcement.control), token)
        return await self._membership.add_peer(blob)


def _consume(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()

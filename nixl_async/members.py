"""Who is there: peers from joining to leaving, and whoever waits for one, or listens to what happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from nixl_async.errors import ClosedError, PeerLost
from nixl_async.link import Link
from nixl_async.peers import Announcement, MembershipEvent, MembershipEvents, Peer
from nixl_async.questions import Questions
from nixl_async.rejoining import Losses
from nixl_async.routes import Routes
from nixl_async.superseding import Superseding


class Members:
    """Keeps the peers of one agent.

    `happened(kind)` is told of every event, `joined(peer)` of one that has joined, or goes on by another connection;
    `lost(peer, error)` must fail the transfers with one that is gone, and `quiet(name)` wait until none of them moves bytes.
    """

    def __init__(
        self,
        routes: Routes,
        questions: Questions,
        superseding: Superseding,
        happened: Callable[[str], None],
        joined: Callable[[Peer], None],
        lost: Callable[[Peer, PeerLost], None],
        quiet: Callable[[str], Awaitable[None]],
    ) -> None:
        self.peers: dict[str, Peer] = {}
        self.parting: dict[str, Peer] = {}
        """Peers that we part from, as long as transfers with them become quiet."""
        self.going: dict[str, asyncio.Future[None]] = {}
        """Peers that backends have not let go of: one that comes back waits, lest what is still written for it comes after what it
        does."""
        self.losses = Losses()
        """Peers that were given up before."""
        self.closing = False
        self._routes, self._questions, self._superseding = routes, questions, superseding
        self._happened, self._joined, self._lost, self._quiet = happened, joined, lost, quiet
        self._listeners: list[asyncio.Queue[MembershipEvent | None]] = []
        self._arrivals: dict[str, list[asyncio.Future[Peer]]] = {}
        self._snapshot: Mapping[str, Peer] | None = None

    def get(self, name: str) -> Peer:
        """Return the connected peer called `name`."""
        try:
            return self.peers[name]
        except KeyError:
            known = ", ".join(sorted(self.peers)) or "none"
            raise PeerLost(f"no peer is called {name!r}; connected are: {known}", peer=name) from None

    def find(self, name: str) -> Peer:
        """Return a peer, one that we part from included."""
        return self.parting.get(name) or self.get(name)

    def snapshot(self) -> Mapping[str, Peer]:
        """Return the connected peers by name, as they are now; the same object until one comes or goes."""
        if self._snapshot is None:
            self._snapshot = MappingProxyType(dict(self.peers))
        return self._snapshot

    async def wait(self, name: str) -> Peer:
        """Wait until a peer called `name` has joined."""
        if (peer := self.peers.get(name)) is not None:
            return peer
        future: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()
        waiting = self._arrivals.setdefault(name, [])
        waiting.append(future)
        try:
            return await future
        finally:
            if future in waiting:
                waiting.remove(future)

    def events(self) -> MembershipEvents:
        """Listen to what happens to peers from here on."""
        return MembershipEvents(self._listeners)

    def emit(self, kind: str, name: str, reason: str = "") -> None:
        """Tell whoever listens what happens to a peer."""
        self._happened(kind)
        for listener in self._listeners:
            listener.put_nowait(MembershipEvent(kind, name, reason))

    def admit(self, peer: Peer, announcement: Announcement) -> None:
        """Take in a peer that the backends are connected to."""
        peer.revision = announcement.revision if announcement.revision is not None else -1
        self.peers[peer.name] = peer
        self._snapshot = None
        self.emit("joined", peer.name)
        self._joined(peer)
        for future in self._arrivals.pop(peer.name, []):
            if not future.done():
                future.set_result(peer)

    def relink(self, known: Peer, link: Link) -> None:
        """Let a peer go on by another connection."""
        known.link = link
        self._superseding.settled(known)
        self._joined(known)

    async def drop(self, peer: Peer, error: PeerLost, kind: str, *, alone: bool = True) -> None:
        """Forget a peer: fail its transfers, wait until they are quiet, tell the backends and whoever listens.

        `alone`: that life of it may not know that it is over.
        """
        if self.peers.get(peer.name) is not peer:
            return
        del self.peers[peer.name]
        self._snapshot = None
        if alone and peer.link is not None:
            self.losses.add(peer.name, peer.incarnation)
        peer.gone = str(error)
        self._superseding.settled(peer)
        for region in peer.regions.values():
            region.withdrawn, region.peer_gone = peer.gone, True
        if kind == "left":
            self.parting[peer.name] = peer
        elif peer.link is not None:
            # What is lost confirms nothing any more.
            self._questions.end(peer.link)
        going = self.going[peer.name] = asyncio.get_running_loop().create_future()
        try:
            self._lost(peer, error)
            self.emit(kind, peer.name, peer.gone)
            await self._quiet(peer.name)
            await self._routes.disconnect(peer)
        finally:
            self.parting.pop(peer.name, None)
            if self.going.get(peer.name) is going:
                del self.going[peer.name]
            going.set_result(None)

    async def gone(self, name: str) -> None:
        """Wait until backends have let go of a peer that was forgotten."""
        while (going := self.going.get(name)) is not None:
            await asyncio.shield(going)

    def end_arrivals(self) -> None:
        """Tell whoever waits for a peer that none comes any more."""
        for waiting in self._arrivals.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(ClosedError("the agent is closed"))

    def end_events(self) -> None:
        """Tell whoever listens that nothing happens any more."""
        for listener in self._listeners:
            listener.put_nowait(None)

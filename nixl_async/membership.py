"""Who is there: links, peers, their regions, and what happens when they come, change, leave or die.

Owns every control connection of an agent. It moves no data: it tells the backends which peers exist, and the agent which
transfers a lost peer takes with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from nixl_async.acceptor import Acceptor
from nixl_async.announcer import Announcer
from nixl_async.backend import Backend
from nixl_async.connector import Connector
from nixl_async.counters import Counters
from nixl_async.errors import ClosedError, ConfigurationError, PeerLost, ProtocolError
from nixl_async.fences import Fences
from nixl_async.joining import Joining
from nixl_async.leased import LeasedRegion
from nixl_async.leases import LEASE_FRAMES, Leases
from nixl_async.link import Link
from nixl_async.liveness import Liveness, Pulse
from nixl_async.members import Members
from nixl_async.memory import MemoryRegion
from nixl_async.notifications import Inbox, Notification
from nixl_async.peer_regions import PeerRegions
from nixl_async.peers import PIECE_PREFIX, MembershipEvents, Peer, decode_announcement, read_announcement
from nixl_async.questions import Questions
from nixl_async.routes import Routes
from nixl_async.security import ConnectionLimits, Credentials
from nixl_async.superseding import SUPERSEDED_SECONDS, Superseding
from nixl_async.wire import FrameType, Greeting, decode_json, encode_json

logger = logging.getLogger("nixl_async.membership")

LAST_WORDS_SECONDS = 0.1
"""How long a control connection may go on after its peer's process has ended: a child of that process may hold it open."""
LEAVE_SECONDS = 5.0
"""How long a leaving agent waits for a peer to confirm that it is quiet."""


class FrameTaker(Protocol):
    """What takes the frames about checksums; see `verification`."""

    def link_frame(self, link: Link, peer: Peer, kind: FrameType, payload: bytes) -> None:
        """Act on a VERIFY or VERIFIED frame."""

    def link_closed(self, link: Link) -> None:
        """Take note of a link's end."""


class Membership:
    """Keeps the peers of one agent.

    `peer_gone(peer, error)` must fail the transfers with that peer, `peer_quiet(peer)` wait until none of them moves bytes.
    `route_lost(backend, peer, reason)` is told of a backend that has lost a peer whose control connection lives.
    """

    def __init__(
        self,
        name: str,
        incarnation: str,
        credentials: Credentials,
        *,
        peer_gone: Callable[[str, PeerLost], None],
        peer_quiet: Callable[[str], Awaitable[None]],
        liveness: Liveness | None = None,
        limits: ConnectionLimits | None = None,
        route_lost: Callable[[str, str, str], None] = lambda backend, peer, reason: None,
    ) -> None:
        self.inbox = Inbox(self._consumed)
        self.counters = Counters()
        self.backends: list[Backend] = []
        self.address: tuple[str, int] | None = None
        self.verifier: FrameTaker | None = None
        self._name, self._incarnation, self._credentials = name, incarnation, credentials
        self._limits = limits or ConnectionLimits()
        self._pulse = Pulse(liveness or Liveness())
        self._peer_gone, self._route_lost = peer_gone, route_lost
        self._server: Acceptor | None = None
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refusing = False
        # Notifications that wait to be sent; set when there are none left.
        self._notifying = 0
        self._notified = asyncio.Event()

        def backends() -> list[Backend]:
            return self.backends

        self._questions = Questions()
        self._superseding = Superseding()
        self._routes = Routes(backends, self._links)
        self._members = Members(
            self._routes,
            self._questions,
            self._superseding,
            self.counters.happened,
            self._peer_joined,
            self._peer_lost,
            peer_quiet,
        )
        self.peers = self._members.peers
        self.leases = Leases(backends, self.get, self._spawn, self._leased_changed, self._let_go)
        self._announcer = Announcer(
            name, incarnation, lambda: self.address, backends, self._links, self._questions, self._spawn
        )
        self.regions = self._announcer.regions
        self._peer_regions = PeerRegions(self._routes, self._regions_changed, self._spawn)
        self._fences = Fences(backends, self._members.find, self._questions, self._superseding)
        self._connector = Connector(
            self._limits,
            credentials,
            lambda credentials, expected: self._link(credentials, connecting=True, expected=expected),
            self._links.discard,
            self._routes.listen,
        )
        self._joining = Joining(
            name,
            self._limits.handshake_seconds,
            self._members,
            self._routes,
            self._announcer,
            self._questions,
            self._superseding,
            self._spawn,
        )

    # Coming.

    async def serve(self, host: str, port: int, advertise: str | None) -> tuple[str, int]:
        """Accept control connections; return the address that peers connect to."""
        if self._server is not None:
            raise ConfigurationError(f"this agent is served at {self.address}; an agent is served once")
        await self._routes.listen(host)
        acceptor = Acceptor(
            self._limits,
            self._credentials.tls,
            lambda deadline: self._link(self._credentials, connecting=False, deadline=deadline),
            self._links.discard,
            lambda: len(self._links),
        )
        found = await acceptor.open(host, port)
        if self._refusing:
            acceptor.close()
            raise ClosedError(f"agent {self._name!r} drains: nobody joins it any more")
        self._server = acceptor
        self.address = (advertise or found[0], found[1])
        return self.address

    async def connect(self, host: str, port: int, token: bytes | None = None, *, name: str | None = None) -> Peer:
        """Connect to a served agent and wait until both sides know each other's regions.

        `token` is that agent's, if not ours; `name` the one that it must have.
        """
        return await self._connector.connect(host, port, token, name=name)

    async def add_peer(self, blob: bytes, token: bytes | None = None) -> Peer:
        """Load a metadata blob that came out of band; connect to the agent it names."""
        announcement = await read_announcement(blob)
        if announcement.name == self._name:
            raise ConfigurationError(f"the metadata is this agent's own ({self._name!r}); load a peer's")
        known = self.peers.get(announcement.name)
        if known is not None and known.incarnation == announcement.incarnation:
            self._peer_regions.load(known, announcement)
            return known
        if announcement.control is not None:
            peer = await self.connect(*announcement.control, token, name=announcement.name)
            if (peer.name, peer.incarnation) != (announcement.name, announcement.incarnation):
                raise PeerLost(
                    f"{announcement.control[0]}:{announcement.control[1]} is agent {peer.name!r} ({peer.incarnation}) and not the"
                    f" {announcement.name!r} ({announcement.incarnation}) of the metadata: fetch the metadata again",
                    peer=announcement.name,
                )
            return peer
        if not announcement.stock:
            raise ConfigurationError(
                f"agent {announcement.name!r} is not served: call `await agent.serve(host, port)` there before `agent.metadata()`"
            )
        if known is not None:
            await self._members.drop(
                known, PeerLost(f"peer {known.name!r} was replaced by a new incarnation", peer=known.name), "lost"
            )
        regions = {region.name: region for region in announcement.regions}
        peer = Peer(announcement.name, announcement.incarnation, regions)
        await self._routes.connect(peer, announcement, None)
        if not peer.backends:
            raise PeerLost(f"no backend reaches {peer.name!r}: {peer.refusals}", peer=peer.name)
        self._members.admit(peer, announcement)
        return peer

    async def wait_peer(self, name: str) -> Peer:
        """Wait until a peer called `name` has joined."""
        return await self._members.wait(name)

    def metadata(self, regions: Iterable[MemoryRegion] | None = None) -> bytes:
        """Return the blob that other agents, stock NIXL's among them, load."""
        return self._announcer.metadata(regions)

    def events(self) -> MembershipEvents:
        """Listen to what happens to peers from here on."""
        return self._members.events()

    def tell(self, kind: str, name: str) -> None:
        """Tell whoever listens what a discovery store says of an agent."""
        self._members.emit(kind, name)

    # Changing.

    def publish(self, region: MemoryRegion) -> None:
        """Tell a region to everyone who was sent the metadata, peers that are still joining included."""
        self.counters.registered(region.nbytes)
        self._announcer.publish(region)

    async def withdraw(self, region: MemoryRegion) -> None:
        """Take a region back: wait until everyone who was told of it says that none of their transfers touches it."""
        if self.regions.get(region.name) is region:
            self.counters.deregistered(region.nbytes)
        await self._announcer.withdraw(region)

    def offered(self, peer: Peer, name: str, address: int) -> MemoryRegion | None:
        """Return the region of that name and address if a peer may use it still, else `None`."""
        for region in self._announcer.find(name, address):
            if region.offered or self.leases.lends(region, peer):
                return region
        return None

    async def current_link(self, peer: Peer) -> Link:
        """Return a peer's control connection; wait for the other one if it is being replaced.

        Raises:
            PeerLost: the peer is gone, or has none.
        """
        return await self._superseding.current_link(peer)

    async def notify(self, name: str, payload: bytes, trace: bytes = b"") -> None:
        """Send a notification, with the trace context that it belongs to; see `Agent.notify`."""
        if name == self._name:
            self.counters.notified(len(payload))
            self.inbox.deliver(Notification(name, payload, trace))
            return
        peer = self.get(name)
        self._notifying += 1
        try:
            await self._notify(peer, payload, trace)
        finally:
            self._notifying -= 1
            if not self._notifying:
                self._notified.set()

    async def _notify(self, peer: Peer, payload: bytes, trace: bytes) -> None:
        while (link := peer.link) is not None:
            if not link.superseded:
                try:
                    await link.notify(payload, trace if peer.traces else b"")
                    self.counters.notified(len(payload))
                    return
                except PeerLost:
                    if not link.superseded:
                        raise
            # It was not sent: it goes by the link that takes this one's place.
            await self._superseding.replaced(peer, link)
        for backend in self.backends:
            if backend.name in peer.backends:
                await backend.send_notification(peer.name, payload)
                self.counters.notified(len(payload))
                return

    def notify_nowait(self, name: str, payload: bytes, trace: bytes = b"") -> bool:
        """Send a notification if that needs no waiting; return whether it was sent."""
        if name == self._name:
            self.counters.notified(len(payload))
            self.inbox.deliver(Notification(name, payload, trace))
            return True
        peer = self.peers.get(name)
        if peer is None or peer.link is None or not peer.link.notify_nowait(payload, trace if peer.traces else b""):
            return False
        self.counters.notified(len(payload))
        return True

    def snapshot(self) -> Mapping[str, Peer]:
        """Return the connected peers by name, as they are now; the same object until one comes or goes."""
        return self._members.snapshot()

    def get(self, name: str) -> Peer:
        """Return the connected peer called `name`."""
        return self._members.get(name)

    # Going.

    def refuse(self) -> None:
        """Take nobody in any more; those who are there, or have proved who they are, stay."""
        self._refusing = True
        if self._server is not None:
            self._server.close()

    @property
    def busy(self) -> bool:
        """Whether memory is leased to peers, or notifications wait to be sent."""
        return bool(self._notifying or self.leases.all())

    async def idle(self) -> None:
        """Wait until all leases have ended and are quiet, and no notification waits to be sent."""
        await self.leases.idle()
        while self._notifying:
            self._notified.clear()
            await self._notified.wait()

    async def disconnect(self, name: str) -> None:
        """Part from a peer: its transfers with us fail, it confirms that it is quiet, and the link closes."""
        peer = self.get(name)
        await self._part(peer)

    async def aclose(self) -> None:
        """Leave every peer and close every connection."""
        self._members.closing = True
        if self._server is not None:
            self._server.close()
        await self.leases.end_every()
        known = [peer.link for peer in self.peers.values()]
        # Who has our metadata may count us as a peer already, though we have not got so far.
        others = [link for link in self._links if link.told and link not in known]
        await asyncio.gather(*map(self._part, list(self.peers.values())), *map(self._say_leave, others))
        for link in list(self._links):
            link.abort()
        self.leases.close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._members.end_arrivals()
        if self._server is not None:
            await self._server.wait_closed()
        self.inbox.close()
        self._members.end_events()

    def backend_lost(self, backend: str, name: str, reason: str) -> None:
        """Take note that a backend lost its connection to a peer."""
        peer = self.peers.get(name)
        if peer is None:
            return
        error = PeerLost(f"peer {name!r} is lost: {reason}", peer=name, backend=backend)
        if peer.link is None:
            self._spawn(self._members.drop(peer, error, "lost"))
        elif backend == "samehost":
            # Its process has ended. What it said before comes first: a peer that leaves says so, then exits.
            asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, peer.link.fail, error)
        else:
            # A peer that leaves closes its backends first: what matters is what its control connection says.
            self._route_lost(backend, name, reason)

    async def reconnect(self, backend: Backend, name: str) -> None:
        """Let a backend connect again to a peer that it has lost.

        Raises:
            PeerLost: there is no such peer.
            NixlError: the backend does not reach it.
        """
        await self._routes.reconnect(backend, self.get(name))

    async def fence(self, backend: str, name: str, mark: bytes) -> None:
        """Have a peer's backend fence off ops that were given up; see `Host.fence`."""
        await self._fences.fence(backend, name, mark)

    # LinkOwner

    def link_authenticated(self, link: Link) -> None:
        """Take note that a link's other side has proved who it is; see `LinkOwner`."""
        if self._server is not None:
            self._server.settled(link)
        name = link.other.name
        if name == self._name:
            raise ConfigurationError(f"both agents are called {name!r}; names must be unique")
        self._joining.greet(link)

    def link_frame(self, link: Link, kind: FrameType, payload: bytes) -> None:
        """Act on a frame of an authenticated link; see `LinkOwner`."""
        if kind is FrameType.METADATA:
            if link.leaving or self._peer_regions.gathers(link):
                # We have chosen the other of two connections, and this crossed with our saying so.
                return
            announcement = decode_announcement(payload)
            if (announcement.name, announcement.incarnation) != (link.other.name, link.other.incarnation):
                raise ProtocolError(f"{link.other.name!r} sent the metadata of {announcement.name!r}")
            regions = {region.name: region for region in announcement.regions}
            if announcement.more:
                self._peer_regions.begin(link, announcement, regions)
                return
            self._joining.announced(link, announcement, regions)
            return
        if kind is FrameType.REJOIN:
            self._joining.take_rejoin(link, payload)
            return
        if kind is FrameType.SUPERSEDED:
            link.superseded = link.leaving = True
            link.close()
            return
        if kind is FrameType.REGIONS and payload.startswith(PIECE_PREFIX):
            if (told := self._peer_regions.gather(link, payload)) is not None:
                self._joining.announced(link, *told)
            return
        if kind is FrameType.FENCED and self._joining.confirming(link):
            value = decode_json(payload, id=int)
            self._questions.answer(link, value["id"], str(value.get("error", "")))
            return
        if self._peer_regions.gathers(link) or (self._joining.confirming(link) and link.announced):
            link.keep(kind, payload)
            return
        peer = self.peers.get(link.other.name)
        if peer is None and kind in (FrameType.FENCE, FrameType.FENCED):
            peer = self._members.parting.get(link.other.name)
            if peer is None and link.leaving:
                # The backends have parted from it, which is more than it asks for.
                if kind is FrameType.FENCE:
                    link.send(encode_json(FrameType.FENCED, {"id": decode_json(payload, id=int)["id"]}))
                return
        if peer is None and kind in LEASE_FRAMES and link.told:
            # It crossed with our parting.
            return
        if peer is None:
            raise ProtocolError(f"unexpected {kind.name} before METADATA")
        match kind:
            case FrameType.NOTIFY:
                trace, link.trace = link.trace, b""
                self.inbox.deliver(Notification(peer.name, payload, trace))
            case FrameType.CONTEXT:
                link.trace = payload
            case FrameType.REGIONS:
                self._peer_regions.add(peer, payload)
            case FrameType.WITHDRAW:
                self._peer_regions.withdraw(link, peer, payload)
            case FrameType.WITHDRAWN:
                self._questions.answer(link, decode_json(payload, id=int)["id"])
            case FrameType.LEAVE:
                self._spawn(self._left(link, peer, decode_json(payload, id=int)["id"]))
            case FrameType.LEFT:
                self._questions.answer(link, decode_json(payload, id=int)["id"])
            case FrameType.FENCE:
                value = decode_json(payload, id=int, backend=str, mark=str)
                self._spawn(self._fences.confirm(link, peer, value["backend"], value["mark"], value["id"]))
            case FrameType.FENCED:
                value = decode_json(payload, id=int)
                self._questions.answer(link, value["id"], str(value.get("error", "")))
            case kind if kind in LEASE_FRAMES:
                self.leases.frame(peer, link, kind, payload)
            case FrameType.VERIFY | FrameType.VERIFIED if self.verifier is not None:
                self.verifier.link_frame(link, peer, kind, payload)
            case _:
                raise ProtocolError(f"unexpected {kind.name}")

    def link_closed(self, link: Link, error: Exception | None) -> None:
        """Take note of a link's end; see `LinkOwner`."""
        self._links.discard(link)
        self._announcer.link_closed(link)
        self._peer_regions.link_closed(link)
        self._joining.link_closed(link)
        if self._server is not None:
            self._server.settled(link, error)
        self._questions.end(link)
        if self.verifier is not None:
            self.verifier.link_closed(link)
        peer = self.peers.get(link.other.name) if link.authenticated else None
        if link.told and (peer is None or peer.incarnation != link.other.incarnation) and not self._members.closing:
            self._spawn(self._routes.dismiss(link.other.name, link.other.incarnation))
        if peer is None or peer.link is not link:
            return
        if link.superseded:
            asyncio.get_running_loop().call_later(SUPERSEDED_SECONDS, self._unless_replaced, peer, link)
            return
        lost = error if isinstance(error, PeerLost) else PeerLost(str(error or "the peer left"), peer=peer.name)
        lost.peer = peer.name
        self._spawn(self._members.drop(peer, lost, "lost"))

    def link_suspect(self, link: Link, reason: str) -> None:
        """Take note that a peer says nothing; see `LinkOwner`."""
        self._emit_of(link, "suspect", reason)

    def link_recovered(self, link: Link) -> None:
        """Take note that it does again; see `LinkOwner`."""
        self._emit_of(link, "recovered", "")

    # Inside.

    def _emit_of(self, link: Link, kind: str, reason: str) -> None:
        peer = self.peers.get(link.other.name)
        if peer is not None and peer.link is link:
            self._members.emit(kind, peer.name, reason)

    def _link(
        self, credentials: Credentials, *, connecting: bool, deadline: float | None = None, expected: str | None = None
    ) -> Link:
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + self._limits.handshake_seconds
        link = Link(
            self,
            Greeting.create(self._name, self._incarnation),
            credentials,
            connecting=connecting,
            pulse=self._pulse,
            deadline=deadline,
            expected=expected,
        )
        self._links.add(link)
        return link

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a membership task failed", exc_info=error)

    def _consumed(self, name: str, nbytes: int) -> None:
        peer = self.peers.get(name)
        if peer is not None and peer.link is not None:
            peer.link.consumed(nbytes)

    def _unless_replaced(self, peer: Peer, link: Link) -> None:
        if peer.link is link:
            self._spawn(
                self._members.drop(peer, PeerLost(f"the connection to {peer.name!r} was not replaced", peer=peer.name), "lost")
            )

    def _peer_joined(self, peer: Peer) -> None:
        self.leases.joined(peer)

    def _peer_lost(self, peer: Peer, error: PeerLost) -> None:
        self._peer_gone(peer.name, error)
        self.leases.lost(peer)

    def _regions_changed(self, name: str) -> None:
        self._members.emit("regions", name)

    def _leased_changed(self, name: str) -> None:
        if name in self.peers:
            self._regions_changed(name)

    def _let_go(self, region: LeasedRegion) -> None:
        peer = self.peers.get(region.peer or "")
        if peer is not None and peer.incarnation == region.incarnation:
            self._spawn(self._routes.forget(peer, region))

    async def _left(self, link: Link, peer: Peer, number: int) -> None:
        link.leaving = True
        await self._members.drop(peer, PeerLost(f"peer {peer.name!r} left", peer=peer.name), "left", alone=False)
        link.send(encode_json(FrameType.LEFT, {"id": number}))

    async def _part(self, peer: Peer) -> None:
        link = peer.link
        await self.leases.part(peer)
        await self._members.drop(peer, PeerLost(f"this agent disconnected from peer {peer.name!r}", peer=peer.name), "left")
        if link is not None:
            await self._say_leave(link)

    async def _say_leave(self, link: Link) -> None:
        if link.closed:
            return
        link.leaving = True
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._questions.ask(link, FrameType.LEAVE)
        except TimeoutError:
            logger.warning("peer %s did not confirm within %g s that it is quiet", link.other.name, LEAVE_SECONDS)
        link.close()

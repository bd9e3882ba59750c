"""Who is there: links, peers, their regions, and what happens when they come, change, leave or die.

Owns every control connection of an agent. It moves no data: it tells the backends which peers exist, and the agent which
transfers a lost peer takes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from nixl_async.acceptor import SHUTDOWN_SECONDS, Acceptor
from nixl_async.backend import Backend, PeerInfo
from nixl_async.counters import Counters
from nixl_async.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    NixlError,
    PeerLost,
    ProtocolError,
    TransferError,
)
from nixl_async.leased import LeasedRegion
from nixl_async.leases import LEASE_FRAMES, Leases
from nixl_async.link import Link
from nixl_async.liveness import Liveness, Pulse
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.notifications import Inbox, Notification
from nixl_async.peers import (
    PIECE_REGIONS,
    Announcement,
    MembershipEvent,
    MembershipEvents,
    Peer,
    check_revision,
    decode_announcement,
    describe_region,
    encode_announcement,
    pieces,
    read_announcement,
    read_regions,
    region_record,
)
from nixl_async.rejoining import Losses
from nixl_async.security import ConnectionLimits, Credentials
from nixl_async.wire import FrameType, Greeting, decode_json, encode_frame, encode_json

logger = logging.getLogger("nixl_async.membership")

LAST_WORDS_SECONDS = 0.1
"""How long a control connection may go on after its peer's process has ended: a child of that process may hold it open."""
FENCE_SECONDS = 3.0
"""How long a peer may take to confirm that nothing is written for ops that were given up: with the second that a cancelled op has
to end by itself that is less than backends' `drain_seconds`."""
LEAVE_SECONDS = 5.0
"""How long a leaving agent waits for a peer to confirm that it is quiet."""
MAX_PEER_REGIONS = 1 << 20
LINKS_AT_ONCE = 32
"""To so many connections something is sent before the loop goes on with other things."""
PROBE_SECONDS = 1.0
"""How long a connected peer has to show that it is alive when somebody else claims its name without proving it."""
_PIECE = b'{"piece":'
TURNED_AWAY_RETRIES = 5
TURNED_AWAY_SECONDS = 0.02
"""An agent under attack closes connections for want of room: then others are tried, after this time, twice that, and so on."""


class FrameTaker(Protocol):
    """What takes the frames about checksums; see `verification`."""

    def link_frame(self, link: Link, peer: Peer, kind: FrameType, payload: bytes) -> None:
        """Act on a VERIFY or VERIFIED frame."""

    def link_closed(self, link: Link) -> None:
        """Take note of a link's end."""


@dataclass(slots=True, eq=False)
class _Turns:
    """Who comes by one name, one at a time: `users` waits or has its turn."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


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
        self.peers: dict[str, Peer] = {}
        self.inbox = Inbox(self._consumed)
        self.counters = Counters()
        self.backends: list[Backend] = []
        self.regions: dict[str, MemoryRegion] = {}
        self.address: tuple[str, int] | None = None
        self.leases = Leases(lambda: self.backends, self.get, self._spawn, self._leased_changed, self._let_go)
        self.verifier: FrameTaker | None = None
        self._withdrawing: dict[MemoryRegion, None] = {}
        self._name, self._incarnation, self._credentials = name, incarnation, credentials
        self._limits = limits or ConnectionLimits()
        self._pulse = Pulse(liveness or Liveness())
        self._peer_gone, self._peer_quiet, self._route_lost = peer_gone, peer_quiet, route_lost
        self._server: Acceptor | None = None
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listeners: list[asyncio.Queue[MembershipEvent | None]] = []
        self._joining: dict[str, _Turns] = {}
        self._arrivals: dict[str, list[asyncio.Future[Peer]]] = {}
        # Who waits for a link in the place of one that was superseded, by the peer.
        self._replacements: dict[str, list[asyncio.Future[None]]] = {}
        # Answers awaited from peers to what we ask: `None` when the link ends first, else why that failed, or "".
        self._answers: dict[tuple[Link, int], asyncio.Future[str | None]] = {}
        self._next_id = 0
        # Peers that we part from, as long as transfers with them become quiet.
        self._parting: dict[str, Peer] = {}
        # Peers that backends have not let go of: who comes back waits, lest what is still written for him comes after what he does.
        self._going: dict[str, asyncio.Future[None]] = {}
        # Peers that were given up before, and what they were asked to confirm.
        self._losses = Losses()
        self._rejoins: dict[Link, asyncio.Future[str | None]] = {}
        # Connections of peers that had given us up, by the life of the peer; those where that is still being seen to.
        self._returned: dict[tuple[str, str], list[Link]] = {}
        self._rejoining: set[Link] = set()
        # How many changes of our regions peers were told; who has news that were posted and not sent.
        self._revision = 0
        self._news: dict[Link, None] = {}
        # Peers that tell their regions in pieces, and what they have told.
        self._gathering: dict[Link, tuple[Announcement, dict[str, RemoteRegion]]] = {}
        self._snapshot: Mapping[str, Peer] | None = None
        self._closing = False

    # Coming.

    async def serve(self, host: str, port: int, advertise: str | None) -> tuple[str, int]:
        """Accept control connections; return the address that peers connect to."""
        if self._server is not None:
            raise ConfigurationError(f"this agent is served at {self.address}; an agent is served once")
        for backend in self.backends:
            await backend.listen(host)
        acceptor = Acceptor(
            self._limits,
            self._credentials.tls,
            lambda deadline: self._link(self._credentials, connecting=False, deadline=deadline),
            self._links.discard,
            lambda: len(self._links),
        )
        found = await acceptor.open(host, port)
        self._server = acceptor
        self.address = (advertise or found[0], found[1])
        return self.address

    async def connect(self, host: str, port: int, token: bytes | None = None, *, name: str | None = None) -> Peer:
        """Connect to a served agent and wait until both sides know each other's regions.

        `token` is that agent's, if not ours; `name` the one that it must have.
        """
        credentials = self._credentials if token is None else Credentials(token, self._credentials.tls)
        for attempt in itertools.count():
            try:
                sock = await _dial(host, port)
            except OSError as error:
                if not isinstance(error, ConnectionResetError) or attempt == TURNED_AWAY_RETRIES:
                    raise PeerLost(f"cannot connect to {host}:{port}: {error}", retryable=True) from error
            else:
                link = self._link(credentials, connecting=True, expected=name)
                try:
                    return await self._connect(link, sock, host)
                except PeerLost:
                    if not link.turned_away or attempt == TURNED_AWAY_RETRIES:
                        raise
            await asyncio.sleep(TURNED_AWAY_SECONDS * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    async def _connect(self, link: Link, sock: socket.socket, host: str) -> Peer:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {}
        try:
            # What we tell the peer of our backends must be where it can reach them: the interface that led to it.
            for backend in self.backends:
                await backend.listen(sock.getsockname()[0])
            if self._credentials.tls is not None:
                context = self._credentials.tls.client_context()
                options = {
                    "ssl": context,
                    "server_hostname": host if context.check_hostname else "",
                    "ssl_handshake_timeout": self._limits.handshake_seconds,
                    "ssl_shutdown_timeout": SHUTDOWN_SECONDS,
                }
            await loop.create_connection(lambda: link, sock=sock, **options)
        except BaseException as error:
            self._links.discard(link)
            sock.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                raise AuthenticationError(
                    f"the certificate of whoever answers at {host} is not believed: {error.verify_message}"
                ) from error
            if isinstance(error, ssl.SSLError):
                raise ProtocolError(f"TLS fails with whoever answers at {host}: {error}") from error
            if isinstance(error, OSError) and not isinstance(error, NixlError):
                link.turned_away = isinstance(error, ConnectionError) and not isinstance(error, TimeoutError)
                raise PeerLost(f"the connection to {host} ended before it was set up: {error}", retryable=True) from error
            raise
        try:
            peer: Peer = await asyncio.shield(link.joined)
        except asyncio.CancelledError:
            link.close()
            raise
        return peer

    async def add_peer(self, blob: bytes, token: bytes | None = None) -> Peer:
        """Load a metadata blob that came out of band; connect to the agent it names."""
        announcement = await read_announcement(blob)
        if announcement.name == self._name:
            raise ConfigurationError(f"the metadata is this agent's own ({self._name!r}); load a peer's")
        known = self.peers.get(announcement.name)
        if known is not None and known.incarnation == announcement.incarnation:
            self._add_regions(known, announcement)
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
            await self._drop(
                known, PeerLost(f"peer {known.name!r} was replaced by a new incarnation", peer=known.name), "lost"
            )
        regions = {region.name: region for region in announcement.regions}
        peer = Peer(announcement.name, announcement.incarnation, regions)
        await self._connect_backends(peer, announcement, None)
        if not peer.backends:
            raise PeerLost(f"no backend reaches {peer.name!r}: {peer.refusals}", peer=peer.name)
        self._admit(peer, announcement)
        return peer

    async def wait_peer(self, name: str) -> Peer:
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

    def metadata(self, regions: Iterable[MemoryRegion] | None = None) -> bytes:
        """Return the blob that other agents, stock NIXL's among them, load."""
        chosen = list(self.regions.values()) if regions is None else list(regions)
        if regions is not None and (unoffered := [region.name for region in chosen if not region.offered]):
            raise ConfigurationError(f"the regions {unoffered} are not offered to every peer; lease them instead")
        told = [region for region in chosen if region.record]
        return encode_announcement(self._name, self._incarnation, self.address, self.backends, told, self._revision)

    def events(self) -> MembershipEvents:
        """Listen to what happens to peers from here on."""
        return MembershipEvents(self._listeners)

    def tell(self, kind: str, name: str) -> None:
        """Tell whoever listens what a discovery store says of an agent."""
        self._emit(kind, name)

    # Changing.

    def publish(self, region: MemoryRegion) -> None:
        """Tell a region to everyone who was sent the metadata, peers that are still joining included."""
        self.regions[region.name] = region
        self.counters.registered(region.nbytes)
        if not region.offered:
            return
        region.record = region_record(region)
        self._revision += 1
        frame = encode_frame(FrameType.REGIONS, b'{"added":[%b],"revision":%d}' % (region.record, self._revision))
        self._post(frame)

    async def withdraw(self, region: MemoryRegion) -> None:
        """Take a region back: wait until everyone who was told of it says that none of their transfers touches it."""
        if self.regions.get(region.name) is region:
            del self.regions[region.name]
            self.counters.deregistered(region.nbytes)
        if region.offered:
            region.record = b""
            self._revision += 1
            self._next_id += 1
            frame = encode_json(FrameType.WITHDRAW, {"id": self._next_id, "name": region.name, "revision": self._revision})
            answers: list[asyncio.Future[str | None]] = []
            for link in self._post(frame):
                answers.append(asyncio.get_running_loop().create_future())
                self._answers[link, self._next_id] = answers[-1]
            self._withdrawing[region] = None
            try:
                await asyncio.gather(*answers)
            finally:
                del self._withdrawing[region]
        if not region.quarantined:
            # A peer may have asked for its checksums meanwhile.
            await region.wait_unused()

    def offered(self, peer: Peer, name: str, address: int) -> MemoryRegion | None:
        """Return the region of that name and address if a peer may use it still, else `None`."""
        found = self.regions.get(name)
        for region in self._withdrawing if found is None or found.address != address else (found,):
            if (region.name, region.address) == (name, address) and (region.offered or self.leases.lends(region, peer)):
                return region
        return None

    async def current_link(self, peer: Peer) -> Link:
        """Return a peer's control connection; wait for the other one if it is being replaced.

        Raises:
            PeerLost: the peer is gone, or has none.
        """
        while (link := peer.link) is not None:
            if not link.superseded:
                return link
            await self._replaced(peer, link)
        raise PeerLost(f"peer {peer.name!r} has no control connection", peer=peer.name)

    async def notify(self, name: str, payload: bytes, trace: bytes = b"") -> None:
        """Send a notification, with the trace context that it belongs to; see `Agent.notify`."""
        if name == self._name:
            self.counters.notified(len(payload))
            self.inbox.deliver(Notification(name, payload, trace))
            return
        peer = self.get(name)
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
            await self._replaced(peer, link)
        for backend in self.backends:
            if backend.name in peer.backends:
                await backend.send_notification(name, payload)
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
        if self._snapshot is None:
            self._snapshot = MappingProxyType(dict(self.peers))
        return self._snapshot

    def get(self, name: str) -> Peer:
        """Return the connected peer called `name`."""
        try:
            return self.peers[name]
        except KeyError:
            known = ", ".join(sorted(self.peers)) or "none"
            raise PeerLost(f"no peer is called {name!r}; connected are: {known}", peer=name) from None

    # Going.

    async def disconnect(self, name: str) -> None:
        """Part from a peer: its transfers with us fail, it confirms that it is quiet, and the link closes."""
        peer = self.get(name)
        await self._part(peer)

    async def aclose(self) -> None:
        """Leave every peer and close every connection."""
        self._closing = True
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
        for waiting in self._arrivals.values():
            for future in waiting:
                if not future.done():
                    future.set_exception(ClosedError("the agent is closed"))
        if self._server is not None:
            await self._server.wait_closed()
        self.inbox.close()
        for listener in self._listeners:
            listener.put_nowait(None)

    def backend_lost(self, backend: str, name: str, reason: str) -> None:
        """Take note that a backend lost its connection to a peer."""
        peer = self.peers.get(name)
        if peer is None:
            return
        error = PeerLost(f"peer {name!r} is lost: {reason}", peer=name, backend=backend)
        if peer.link is None:
            self._spawn(self._drop(peer, error, "lost"))
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
        info = self.get(name).infos.get(backend.name)
        if info is None:
            raise ConfigurationError(f"backend {backend.name!r} was never connected to {name!r}")
        await backend.connect(info)

    async def fence(self, backend: str, name: str, mark: bytes) -> None:
        """Have a peer's backend fence off ops that were given up; see `Host.fence`."""
        peer = self._parting.get(name) or self.get(name)
        try:
            async with asyncio.timeout(FENCE_SECONDS):
                while (link := peer.link) is not None:
                    error = await self._ask(link, FrameType.FENCE, backend=backend, mark=mark.hex())
                    if error == "":
                        return
                    if error is not None:
                        raise TransferError(f"peer {name!r} does not confirm that it is quiet: {error}", peer=name)
                    if not link.superseded:
                        break
                    await self._replaced(peer, link)
        except TimeoutError:
            raise TransferError(
                f"peer {name!r} did not confirm within {FENCE_SECONDS:g} s that it is quiet", backend=backend, peer=name
            ) from None
        raise PeerLost(peer.gone or f"the control connection to {name!r} ended", backend=backend, peer=name)

    # LinkOwner

    def link_authenticated(self, link: Link) -> None:
        """Take note that a link's other side has proved who it is; see `LinkOwner`."""
        if self._server is not None:
            self._server.settled(link)
        name = link.other.name
        if name == self._name:
            raise ConfigurationError(f"both agents are called {name!r}; names must be unique")
        known = self.peers.get(name)
        if link.connecting and known is not None and known.link is not None and known.incarnation == link.other.incarnation:
            self._yield_to(link, known)
            return
        if known is not None and known.incarnation != link.other.incarnation:
            # It uses our backends once it is told of them: by then nothing of its life before may be written any more.
            link.hold()
            self._spawn(self._replace(known, link))
            return
        if name in self._going:
            # What it is told to reach us by must not be taken back with what its life before was told.
            link.hold()
            self._spawn(self._tell_later(link, self._going[name]))
            return
        self._tell(link)

    def link_frame(self, link: Link, kind: FrameType, payload: bytes) -> None:
        """Act on a frame of an authenticated link; see `LinkOwner`."""
        if kind is FrameType.METADATA:
            if link.leaving or link in self._gathering:
                # We have chosen the other of two connections, and this crossed with our saying so.
                return
            announcement = decode_announcement(payload)
            if (announcement.name, announcement.incarnation) != (link.other.name, link.other.incarnation):
                raise ProtocolError(f"{link.other.name!r} sent the metadata of {announcement.name!r}")
            regions = {region.name: region for region in announcement.regions}
            if announcement.more:
                self._gathering[link] = announcement, regions
                return
            self._announced(link, announcement, regions)
            return
        if kind is FrameType.REJOIN:
            self._take_rejoin(link, payload)
            return
        if kind is FrameType.SUPERSEDED:
            link.superseded = link.leaving = True
            link.close()
            return
        if kind is FrameType.REGIONS and payload.startswith(_PIECE):
            self._gather(link, payload)
            return
        if kind is FrameType.FENCED and link in self._rejoins:
            value = decode_json(payload, id=int)
            self._answer(link, value["id"], str(value.get("error", "")))
            return
        if link in self._gathering or (link in self._rejoins and link.announced):
            link.keep(kind, payload)
            return
        peer = self.peers.get(link.other.name)
        if peer is None and kind in (FrameType.FENCE, FrameType.FENCED):
            peer = self._parting.get(link.other.name)
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
                value = decode_json(payload, added=list)
                if len(peer.regions) + len(value["added"]) > MAX_PEER_REGIONS:
                    raise ProtocolError(f"{peer.name!r} has more than {MAX_PEER_REGIONS} regions")
                for region in read_regions(peer.name, peer.incarnation, value["added"]):
                    known = peer.regions.get(region.name)
                    if known is None or describe_region(known) != describe_region(region):
                        peer.add(region)
                peer.revision = max(peer.revision, check_revision(value.get("revision", 0)))
                self._emit("regions", peer.name)
            case FrameType.WITHDRAW:
                value = decode_json(payload, id=int, name=str)
                peer.revision = max(peer.revision, check_revision(value.get("revision", 0)))
                # At once: the name may be given to another region in the next frame.
                self._spawn(self._withdrawn(link, peer, peer.take(value["name"]), value["id"]))
            case FrameType.WITHDRAWN:
                self._answer(link, decode_json(payload, id=int)["id"])
            case FrameType.LEAVE:
                self._spawn(self._left(link, peer, decode_json(payload, id=int)["id"]))
            case FrameType.LEFT:
                self._answer(link, decode_json(payload, id=int)["id"])
            case FrameType.FENCE:
                value = decode_json(payload, id=int, backend=str, mark=str)
                self._spawn(self._fenced(link, peer, value["backend"], value["mark"], value["id"]))
            case FrameType.FENCED:
                value = decode_json(payload, id=int)
                self._answer(link, value["id"], str(value.get("error", "")))
            case kind if kind in LEASE_FRAMES:
                self.leases.frame(peer, link, kind, payload)
            case FrameType.VERIFY | FrameType.VERIFIED if self.verifier is not None:
                self.verifier.link_frame(link, peer, kind, payload)
            case _:
                raise ProtocolError(f"unexpected {kind.name}")

    def link_closed(self, link: Link, error: Exception | None) -> None:
        """Take note of a link's end; see `LinkOwner`."""
        self._links.discard(link)
        self._news.pop(link, None)
        self._gathering.pop(link, None)
        self._rejoins.pop(link, None)
        if link.their_loss:
            who = link.other.name, link.other.incarnation
            self._returned[who].remove(link)
            if not self._returned[who]:
                del self._returned[who]
        if self._server is not None:
            self._server.settled(link, error)
        for key in [key for key in self._answers if key[0] is link]:
            self._answer(*key, None)
        if self.verifier is not None:
            self.verifier.link_closed(link)
        peer = self.peers.get(link.other.name) if link.authenticated else None
        if link.told and (peer is None or peer.incarnation != link.other.incarnation) and not self._closing:
            self._spawn(self._dismiss(link.other.name, link.other.incarnation))
        if peer is None or peer.link is not link:
            return
        if link.superseded:
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._unless_replaced, peer, link)
            return
        lost = error if isinstance(error, PeerLost) else PeerLost(str(error or "the peer left"), peer=peer.name)
        lost.peer = peer.name
        self._spawn(self._drop(peer, lost, "lost"))

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
            self._emit(kind, peer.name, reason)

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

    def _emit(self, kind: str, name: str, reason: str = "") -> None:
        self.counters.happened(kind)
        for listener in self._listeners:
            listener.put_nowait(MembershipEvent(kind, name, reason))

    def _yield_to(self, link: Link, known: Peer) -> None:
        if not link.joined.done():
            link.joined.set_result(known)
        self._supersede(link)
        try:
            link.unhold()
        except NixlError as error:
            link.fail(error)

    def _supersede(self, link: Link) -> None:
        link.leaving = True
        link.send(encode_frame(FrameType.SUPERSEDED))
        # The other side closes it when it has read that: what it has sent before is still to be read here.
        asyncio.get_running_loop().call_later(LEAVE_SECONDS, link.close)

    async def _replaced(self, peer: Peer, link: Link) -> None:
        """Wait until another link has taken the place of one that was superseded."""
        while peer.link is link:
            if peer.gone:
                raise PeerLost(peer.gone, peer=peer.name)
            future = asyncio.get_running_loop().create_future()
            self._replacements.setdefault(peer.name, []).append(future)
            await future

    def _tell_replaced(self, peer: Peer) -> None:
        for future in self._replacements.pop(peer.name, []):
            if not future.done():
                future.set_result(None)

    def _unless_replaced(self, peer: Peer, link: Link) -> None:
        if peer.link is link:
            self._spawn(
                self._drop(peer, PeerLost(f"the connection to {peer.name!r} was not replaced", peer=peer.name), "lost")
            )

    def _leased_changed(self, name: str) -> None:
        if name in self.peers:
            self._emit("regions", name)

    def _let_go(self, region: LeasedRegion) -> None:
        peer = self.peers.get(region.peer or "")
        if peer is not None and peer.incarnation == region.incarnation:
            self._spawn(self._forget(peer, region))

    def _tell(self, link: Link) -> None:
        regions = [region for region in self.regions.values() if region.record]
        more = len(regions) > PIECE_REGIONS
        mine = self._name, self._incarnation, self.address, self.backends
        to = link.other.name, link.other.incarnation
        link.our_loss = self._losses.number(*to)
        if link.our_loss:
            self._ask_rejoin(link)
        blob = encode_announcement(*mine, regions, self._revision, more=more, to=to)
        link.send(encode_frame(FrameType.METADATA, blob))
        link.told = True
        if more:
            self._spawn(self._tell_more(link, regions))

    async def _tell_more(self, link: Link, regions: list[MemoryRegion]) -> None:
        """Send many regions a piece at a time. What is registered meanwhile is told besides; what is gone is left out."""
        waiting = pieces(region.record for region in regions if region.record)
        piece: bytes | None = next(waiting)
        while piece is not None and not (link.closed or link.superseded):
            after = next(waiting, None)
            link.send(encode_frame(FrameType.REGIONS, b'%b%b,"last":%b}' % (_PIECE, piece, b"false" if after else b"true")))
            piece = after
            await asyncio.sleep(0)
            await link.room()

    def _gather(self, link: Link, payload: bytes) -> None:
        """Take a piece of a peer's regions; with the last the peer joins."""
        if link.leaving:
            return
        if link not in self._gathering:
            raise ProtocolError("a piece of metadata comes after its end")
        announcement, regions = self._gathering[link]
        value = decode_json(payload, piece=list, last=bool)
        for region in read_regions(announcement.name, announcement.incarnation, value["piece"]):
            regions[region.name] = region
        if len(regions) > MAX_PEER_REGIONS:
            raise ProtocolError(f"{announcement.name!r} has more than {MAX_PEER_REGIONS} regions")
        if value["last"]:
            del self._gathering[link]
            self._announced(link, announcement, regions)

    def _announced(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        link.announced = True
        if link not in self._rejoins or self._rejoins[link].done():
            # Else the confirmation is still to be read; what comes before it is kept.
            link.hold()
        self._spawn(self._join(link, announcement, regions))

    # Joining again.

    def _ask_rejoin(self, link: Link) -> None:
        """Tell a peer that it was given up before, and ask it to see to it that nothing from then is written any more."""
        asked = self._rejoins[link] = self._question(link, FrameType.REJOIN, number=link.our_loss)
        seconds = self._limits.handshake_seconds
        why = (
            f"peer {link.other.name!r} did not confirm within {seconds:g} s that nothing of the connections before is written"
        )
        late = PeerLost(why, peer=link.other.name, retryable=True)
        timer = asyncio.get_running_loop().call_later(seconds, link.fail, late)
        asked.add_done_callback(lambda _: timer.cancel())

    async def _confirmed(self, link: Link) -> bool:
        """Wait for what `_ask_rejoin` asked for; return whether a peer may join."""
        error = await self._rejoins[link]
        if self._rejoins.pop(link, None) is None or error is None:
            return False
        link.hold()
        if error:
            name = link.other.name
            why = f"peer {name!r} cannot confirm that nothing of the connections before is written: {error}"
            link.fail(PeerLost(why, peer=name, retryable=True))
        return not error

    def _take_rejoin(self, link: Link, payload: bytes) -> None:
        value = decode_json(payload, id=int, number=int)
        if link.announced or link.their_loss:
            raise ProtocolError("REJOIN comes twice, or after METADATA")
        if not 0 < value["number"] < 1 << 63:
            raise ProtocolError(f"the number of a REJOIN is {value['number']}; it must be above 0")
        link.their_loss = value["number"]
        self._returned.setdefault((link.other.name, link.other.incarnation), []).append(link)
        self._rejoining.add(link)
        self._spawn(self._rejoined(link, value["id"]))

    def _siblings(self, link: Link) -> list[Link]:
        """Return the other connections of the same life of a peer that come after it had given us up."""
        return [one for one in self._returned.get((link.other.name, link.other.incarnation), ()) if one is not link]

    async def _rejoined(self, link: Link, number: int) -> None:
        """Part from a peer that had given us up: what it has sent on the connections of that time is not written after this."""
        answer: dict[str, Any] = {"id": number}
        name, incarnation = link.other.name, link.other.incarnation
        try:
            async with self._alone(name):
                if not any(one.their_loss >= link.their_loss for one in self._siblings(link) if one not in self._rejoining):
                    known = self.peers.get(name)
                    if known is not None and not await self._give_way(known, link):
                        return
                    await self._gone(name)
                    for backend in self.backends:
                        if backend.remote:
                            # A peer that never joined here may have connected to our backends.
                            await backend.fence(PeerInfo(name, incarnation, b"", link.host), b"")
        except NixlError as error:
            answer["error"] = str(error) or type(error).__name__
        finally:
            self._rejoining.discard(link)
        link.send(encode_json(FrameType.FENCED, answer))

    def _post(self, frame: bytes) -> list[Link]:
        """Let a frame go to everyone who was sent the metadata, before whatever else they are sent; return who that is."""
        links = [link for link in self._links if link.told]
        if links and not self._news:
            asyncio.get_running_loop().call_soon(self._send_news)
        for link in links:
            link.post(frame)
            self._news[link] = None
        return links

    def _send_news(self) -> None:
        """Send what was posted to some connections, and go on with the others in the loop's next round."""
        for link in list(itertools.islice(self._news, LINKS_AT_ONCE)):
            del self._news[link]
            link.flush()
        if self._news:
            asyncio.get_running_loop().call_soon(self._send_news)

    async def _tell_later(self, link: Link, dropped: asyncio.Future[None]) -> None:
        await asyncio.shield(dropped)
        if not link.closed and not self._closing:
            self._tell(link)
            link.unhold()

    async def _replace(self, known: Peer, link: Link) -> None:
        if await self._give_way(known, link) and not link.closed and not self._closing:
            self._tell(link)
            link.unhold()

    async def _give_way(self, known: Peer, link: Link) -> bool:
        """Forget a peer for another incarnation of it, or another attempt of it; return whether that is right."""
        # Whoever knows a shared token can claim any name: not that of one who is there.
        if not link.names_proved and known.link is not None and await known.link.answers(PROBE_SECONDS):
            link.fail(AuthenticationError(f"the name {known.name!r} belongs to an agent that is connected and alive"))
            return False
        why = (
            "was replaced by a new incarnation"
            if known.incarnation != link.other.incarnation
            else "had given this agent up, and connects again"
        )
        await self._drop(known, PeerLost(f"peer {known.name!r} {why}", peer=known.name), "lost", alone=False)
        if known.link is not None:
            known.link.abort()
        # It may have been on its way out already.
        await self._gone(known.name)
        return True

    async def _gone(self, name: str) -> None:
        """Wait until backends have let go of a peer that was forgotten."""
        while (going := self._going.get(name)) is not None:
            await asyncio.shield(going)

    async def _join(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        if link.closed or (link in self._rejoins and not await self._confirmed(link)):
            return
        async with self._alone(announcement.name):
            await self._join_alone(link, announcement, regions)

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """Let one at a time come by a name: two connections of one peer must not both find it absent."""
        turns = self._joining.setdefault(name, _Turns())
        turns.users += 1
        try:
            async with turns.lock:
                yield
        finally:
            turns.users -= 1
            if not turns.users:
                del self._joining[name]

    async def _join_alone(self, link: Link, announcement: Announcement, regions: dict[str, RemoteRegion]) -> None:
        who = announcement.name, announcement.incarnation
        if link.our_loss != self._losses.number(*who) or any(one.their_loss > link.their_loss for one in self._siblings(link)):
            # One side has lost the other since they told each other of themselves here.
            link.fail(PeerLost(f"peer {announcement.name!r} was lost while it joined", peer=announcement.name, retryable=True))
            return
        known = self.peers.get(announcement.name)
        if known is not None and known.incarnation == announcement.incarnation and known.link is not None:
            # Both sides dialled at once: both keep the link that the agent with the smaller name began.
            old = known.link
            self._hear_again(known, announcement)
            if not old.closed and self._initiator(old) < self._initiator(link):
                self._yield_to(link, known)
                return
            known.link = link
            self._tell_replaced(known)
            self.leases.joined(known)
            self._supersede(old)
            link.joined.set_result(known) if not link.joined.done() else None
            link.unhold()
            return
        if known is not None and not await self._give_way(known, link):
            return
        await self._gone(announcement.name)
        peer = Peer(announcement.name, announcement.incarnation, regions, link=link, checksums=announcement.checksums)
        peer.traces = announcement.traces
        try:
            await self._connect_backends(peer, announcement, link.host)
        except NixlError as error:
            link.fail(error)
        if link.closed or self._closing:
            await self._disconnect_backends(peer)
            self._losses.add(peer.name, peer.incarnation)
            link.close()
            return
        self._admit(peer, announcement)
        link.joined.set_result(peer) if not link.joined.done() else None
        try:
            link.unhold()
        except NixlError as error:
            link.fail(error)

    @staticmethod
    def _hear_again(known: Peer, announcement: Announcement) -> None:
        """Take note of how a peer's backends are reached as it tells of them last: what let us in before may not do so any more."""
        for backend, info in known.infos.items():
            known.infos[backend] = replace(info, description=announcement.descriptions.get(backend, info.description))

    def _initiator(self, link: Link) -> str:
        return self._name if link.connecting else link.other.name

    async def _connect_backends(self, peer: Peer, announcement: Announcement, host: str | None) -> None:
        for backend in self.backends:
            if not backend.remote:
                continue
            description = announcement.descriptions.get(backend.name)
            if description is None:
                peer.refusals[backend.name] = f"peer {peer.name!r} has no such backend"
                continue
            peer.infos[backend.name] = PeerInfo(peer.name, peer.incarnation, description, host)
            try:
                await backend.connect(peer.infos[backend.name])
            except NixlError as error:
                peer.refusals[backend.name] = str(error)
            else:
                peer.backends.add(backend.name)

    async def _disconnect_backends(self, peer: Peer) -> None:
        for backend in self.backends:
            if backend.name in peer.backends:
                try:
                    await backend.disconnect(peer.name)
                except NixlError as error:
                    logger.warning("backend %s failed to part from %s: %s", backend.name, peer.name, error)
        await self._dismiss(peer.name, peer.incarnation)

    async def _dismiss(self, name: str, incarnation: str) -> None:
        """Take back what a peer was told that lets it reach our backends, unless it has another connection."""
        who = name, incarnation
        if any(link.told and not link.closed and (link.other.name, link.other.incarnation) == who for link in self._links):
            return
        for backend in self.backends:
            if backend.remote:
                await backend.dismiss(name, incarnation)

    def _admit(self, peer: Peer, announcement: Announcement) -> None:
        peer.revision = announcement.revision if announcement.revision is not None else -1
        self.peers[peer.name] = peer
        self._snapshot = None
        self._emit("joined", peer.name)
        self.leases.joined(peer)
        for future in self._arrivals.pop(peer.name, []):
            if not future.done():
                future.set_result(peer)

    def _add_regions(self, peer: Peer, announcement: Announcement) -> None:
        if announcement.revision is not None and announcement.revision <= peer.revision:
            # The peer has told all of it; what is not there any more it has withdrawn since.
            return
        added = [region for region in announcement.regions if region.name not in peer.regions]
        for region in added:
            peer.add(region)
        if added:
            self._emit("regions", peer.name)

    async def _ask(self, link: Link, kind: FrameType, **fields: str) -> str | None:
        """Send a question and wait for its answer, or for the link's end, which is `None`."""
        return await self._question(link, kind, **fields)

    def _question(self, link: Link, kind: FrameType, **fields: str | int) -> asyncio.Future[str | None]:
        self._next_id += 1
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._answers[link, self._next_id] = future
        link.send(encode_json(kind, {"id": self._next_id, **fields}))
        if link.closed:
            self._answer(link, self._next_id, None)
        return future

    def _answer(self, link: Link, number: int, answer: str | None = "") -> None:
        future = self._answers.pop((link, number), None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def _fenced(self, link: Link, peer: Peer, name: str, mark: str, number: int) -> None:
        backend = next((one for one in self.backends if one.name == name), None)
        answer: dict[str, Any] = {"id": number}
        try:
            if backend is None or name not in peer.infos:
                raise ConfigurationError(f"it has no backend {name!r} for {peer.name!r}")
            await backend.fence(peer.infos[name], bytes.fromhex(mark))
        except (NixlError, ValueError) as error:
            answer["error"] = str(error) or type(error).__name__
        link.send(encode_json(FrameType.FENCED, answer))

    async def _withdrawn(self, link: Link, peer: Peer, region: RemoteRegion | None, number: int) -> None:
        if region is not None:
            region.withdrawn = "its owner deregistered it"
            self._emit("regions", peer.name)
            await region.wait_unused()
            await self._forget(peer, region)
        link.send(encode_json(FrameType.WITHDRAWN, {"id": number}))

    async def _forget(self, peer: Peer, region: RemoteRegion) -> None:
        for backend in self.backends:
            if backend.name in peer.backends:
                try:
                    await backend.forget(region)
                except NixlError as error:
                    logger.warning("backend %s failed to let go of %r: %s", backend.name, region, error)

    async def _left(self, link: Link, peer: Peer, number: int) -> None:
        link.leaving = True
        await self._drop(peer, PeerLost(f"peer {peer.name!r} left", peer=peer.name), "left", alone=False)
        link.send(encode_json(FrameType.LEFT, {"id": number}))

    async def _part(self, peer: Peer) -> None:
        link = peer.link
        await self.leases.part(peer)
        await self._drop(peer, PeerLost(f"this agent disconnected from peer {peer.name!r}", peer=peer.name), "left")
        if link is not None:
            await self._say_leave(link)

    async def _say_leave(self, link: Link) -> None:
        if link.closed:
            return
        link.leaving = True
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._ask(link, FrameType.LEAVE)
        except TimeoutError:
            logger.warning("peer %s did not confirm within %g s that it is quiet", link.other.name, LEAVE_SECONDS)
        link.close()

    async def _drop(self, peer: Peer, error: PeerLost, kind: str, *, alone: bool = True) -> None:
        """Forget a peer: fail its transfers, wait until they are quiet, tell the backends and whoever listens.

        `alone`: that life of it may not know that it is over.
        """
        if self.peers.get(peer.name) is not peer:
            return
        del self.peers[peer.name]
        self._snapshot = None
        if alone and peer.link is not None:
            self._losses.add(peer.name, peer.incarnation)
        peer.gone = str(error)
        self._tell_replaced(peer)
        for region in peer.regions.values():
            region.withdrawn, region.peer_gone = peer.gone, True
        if kind == "left":
            self._parting[peer.name] = peer
        else:
            # What is lost confirms nothing any more.
            for key in [key for key in self._answers if key[0] is peer.link]:
                self._answer(*key, None)
        going = self._going[peer.name] = asyncio.get_running_loop().create_future()
        try:
            self._peer_gone(peer.name, error)
            self.leases.lost(peer)
            self._emit(kind, peer.name, peer.gone)
            await self._peer_quiet(peer.name)
            await self._disconnect_backends(peer)
        finally:
            self._parting.pop(peer.name, None)
            if self._going.get(peer.name) is going:
                del self._going[peer.name]
            going.set_result(None)


async def _dial(host: str, port: int) -> socket.socket:
    """Return a socket connected to the first of the host's addresses that answers."""
    loop = asyncio.get_running_loop()
    failure = OSError(f"{host!r} has no address")
    for family, kind, protocol, _, address in await _addresses(host, port):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


async def _addresses(host: str, port: int) -> list[tuple[int, int, int, str, Any]]:
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        return [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    return list(await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM))

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
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from nixl_async.acceptor import SHUTDOWN_SECONDS, Acceptor
from nixl_async.backend import Backend, PeerInfo
from nixl_async.errors import (
    AuthenticationError,
    ClosedError,
    ConfigurationError,
    NixlError,
    PeerLost,
    ProtocolError,
)
from nixl_async.link import Link
from nixl_async.liveness import Liveness, Pulse
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.notifications import Inbox, Notification
from nixl_async.peers import (
    Announcement,
    MembershipEvent,
    MembershipEvents,
    Peer,
    decode_announcement,
    describe_regions,
    encode_announcement,
    read_regions,
)
from nixl_async.security import ConnectionLimits, Credentials
from nixl_async.wire import FrameType, Greeting, decode_json, encode_frame, encode_json

logger = logging.getLogger("nixl_async.membership")

LAST_WORDS_SECONDS = 0.1
"""How long a control connection may go on after its peer's process has ended: a child of that process may hold it open."""
LEAVE_SECONDS = 5.0
"""How long a leaving agent waits for a peer to confirm that it is quiet."""
MAX_PEER_REGIONS = 1 << 20
PROBE_SECONDS = 1.0
"""How long a connected peer has to show that it is alive when somebody else claims its name without proving it."""
TURNED_AWAY_RETRIES = 5
TURNED_AWAY_SECONDS = 0.02
"""An agent under attack closes connections for want of room: then others are tried, after this time, twice that, and so on."""


class Membership:
    """Keeps the peers of one agent.

    `peer_gone(peer, error)` must fail the transfers with that peer, `peer_quiet(peer)` wait until none of them moves bytes.
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
    ) -> None:
        self.peers: dict[str, Peer] = {}
        self.inbox = Inbox(self._consumed)
        self.backends: list[Backend] = []
        self.regions: dict[str, MemoryRegion] = {}
        self.address: tuple[str, int] | None = None
        self._name, self._incarnation, self._credentials = name, incarnation, credentials
        self._limits = limits or ConnectionLimits()
        self._pulse = Pulse(liveness or Liveness())
        self._peer_gone, self._peer_quiet = peer_gone, peer_quiet
        self._server: Acceptor | None = None
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listeners: list[asyncio.Queue[MembershipEvent | None]] = []
        self._joining: dict[str, asyncio.Lock] = {}
        self._arrivals: dict[str, list[asyncio.Future[Peer]]] = {}
        # Who waits for a link in the place of one that was superseded, by the peer.
        self._replacements: dict[str, list[asyncio.Future[None]]] = {}
        # Answers awaited from peers: (peer, id) of a WITHDRAW, (peer, -1) of a LEAVE.
        self._answers: dict[tuple[Link, int], asyncio.Future[None]] = {}
        self._next_id = 0
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
        announcement = decode_announcement(blob)
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
        peer = Peer(announcement.name, announcement.incarnation)
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
        chosen = self.regions.values() if regions is None else regions
        return encode_announcement(self._name, self._incarnation, self.address, self.backends, chosen)

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
        frame = encode_json(FrameType.REGIONS, {"added": describe_regions([region])})
        for link in self._links:
            if link.told:
                link.send(frame)

    async def withdraw(self, region: MemoryRegion) -> None:
        """Take a region back: wait until everyone who was told of it says that none of their transfers touches it."""
        self.regions.pop(region.name, None)
        links = [link for link in self._links if link.told]
        await asyncio.gather(*(self._ask(link, FrameType.WITHDRAW, name=region.name) for link in links))

    async def notify(self, name: str, payload: bytes) -> None:
        """Send a notification; see `Agent.notify`."""
        if name == self._name:
            self.inbox.deliver(Notification(name, payload))
            return
        peer = self.get(name)
        while (link := peer.link) is not None:
            if not link.superseded:
                try:
                    await link.notify(payload)
                    return
                except PeerLost:
                    if not link.superseded:
                        raise
            # It was not sent: it goes by the link that takes this one's place.
            await self._replaced(peer, link)
        for backend in self.backends:
            if backend.name in peer.backends:
                await backend.send_notification(name, payload)
                return

    def notify_nowait(self, name: str, payload: bytes) -> bool:
        """Send a notification if that needs no waiting; return whether it was sent."""
        if name == self._name:
            self.inbox.deliver(Notification(name, payload))
            return True
        peer = self.peers.get(name)
        return peer is not None and peer.link is not None and peer.link.notify_nowait(payload)

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
        known = [peer.link for peer in self.peers.values()]
        # Who has our metadata may count us as a peer already, though we have not got so far.
        others = [link for link in self._links if link.told and link not in known]
        await asyncio.gather(*map(self._part, list(self.peers.values())), *map(self._say_leave, others))
        for link in list(self._links):
            link.abort()
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
            logger.info("backend %s lost peer %s: %s", backend, name, reason)

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
        if known is not None and known.incarnation != link.other.incarnation and not link.names_proved:
            link.hold()
            self._spawn(self._replace(known, link))
            return
        self._tell(link)

    def link_frame(self, link: Link, kind: FrameType, payload: bytes) -> None:
        """Act on a frame of an authenticated link; see `LinkOwner`."""
        if kind is FrameType.METADATA:
            if link.leaving:
                # We have chosen the other of two connections, and this crossed with our saying so.
                return
            announcement = decode_announcement(payload)
            if (announcement.name, announcement.incarnation) != (link.other.name, link.other.incarnation):
                raise ProtocolError(f"{link.other.name!r} sent the metadata of {announcement.name!r}")
            link.hold()
            self._spawn(self._join(link, announcement))
            return
        if kind is FrameType.SUPERSEDED:
            link.superseded = link.leaving = True
            link.close()
            return
        peer = self.peers.get(link.other.name)
        if peer is None:
            raise ProtocolError(f"unexpected {kind.name} before METADATA")
        match kind:
            case FrameType.NOTIFY:
                self.inbox.deliver(Notification(peer.name, payload))
            case FrameType.REGIONS:
                value = decode_json(payload, added=list)
                if len(peer.regions) + len(value["added"]) > MAX_PEER_REGIONS:
                    raise ProtocolError(f"{peer.name!r} has more than {MAX_PEER_REGIONS} regions")
                for region in read_regions(peer.name, peer.incarnation, value["added"]):
                    peer.regions[region.name] = region
                self._emit("regions", peer.name)
            case FrameType.WITHDRAW:
                value = decode_json(payload, id=int, name=str)
                self._spawn(self._withdrawn(link, peer, value["name"], value["id"]))
            case FrameType.WITHDRAWN:
                self._answer(link, decode_json(payload, id=int)["id"])
            case FrameType.LEAVE:
                self._spawn(self._left(link, peer, decode_json(payload, id=int)["id"]))
            case FrameType.LEFT:
                self._answer(link, decode_json(payload, id=int)["id"])
            case _:
                raise ProtocolError(f"unexpected {kind.name}")

    def link_closed(self, link: Link, error: Exception | None) -> None:
        """Take note of a link's end; see `LinkOwner`."""
        self._links.discard(link)
        if self._server is not None:
            self._server.settled(link, error)
        for key in [key for key in self._answers if key[0] is link]:
            self._answer(*key)
        peer = self.peers.get(link.other.name) if link.authenticated else None
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

    def _tell(self, link: Link) -> None:
        link.send(encode_frame(FrameType.METADATA, self.metadata()))
        link.told = True

    async def _replace(self, known: Peer, link: Link) -> None:
        if await self._give_way(known, link) and not link.closed and not self._closing:
            self._tell(link)
            link.unhold()

    async def _give_way(self, known: Peer, link: Link) -> bool:
        """Forget a peer for another incarnation of it; return whether that is right."""
        # Whoever knows a shared token can claim any name: not that of one who is there.
        if not link.names_proved and known.link is not None and await known.link.answers(PROBE_SECONDS):
            link.fail(AuthenticationError(f"the name {known.name!r} belongs to an agent that is connected and alive"))
            return False
        await self._drop(known, PeerLost(f"peer {known.name!r} was replaced by a new incarnation", peer=known.name), "lost")
        if known.link is not None:
            known.link.abort()
        return True

    async def _join(self, link: Link, announcement: Announcement) -> None:
        # One at a time for each name: two connections of one peer must not both find it absent.
        lock = self._joining.setdefault(announcement.name, asyncio.Lock())
        async with lock:
            await self._join_alone(link, announcement)
        if not lock.locked():
            self._joining.pop(announcement.name, None)

    async def _join_alone(self, link: Link, announcement: Announcement) -> None:
        known = self.peers.get(announcement.name)
        if known is not None and known.incarnation == announcement.incarnation and known.link is not None:
            # Both sides dialled at once: both keep the link that the agent with the smaller name began.
            old = known.link
            if not old.closed and self._initiator(old) < self._initiator(link):
                self._yield_to(link, known)
                return
            known.link = link
            self._tell_replaced(known)
            self._supersede(old)
            link.joined.set_result(known) if not link.joined.done() else None
            link.unhold()
            return
        if known is not None and not await self._give_way(known, link):
            return
        peer = Peer(announcement.name, announcement.incarnation, link=link)
        try:
            await self._connect_backends(peer, announcement, link.host)
        except NixlError as error:
            link.fail(error)
        if link.closed or self._closing:
            await self._disconnect_backends(peer)
            link.close()
            return
        self._admit(peer, announcement)
        link.joined.set_result(peer) if not link.joined.done() else None
        try:
            link.unhold()
        except NixlError as error:
            link.fail(error)

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
            try:
                await backend.connect(PeerInfo(peer.name, peer.incarnation, description, host))
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

    def _admit(self, peer: Peer, announcement: Announcement) -> None:
        peer.regions.update({region.name: region for region in announcement.regions})
        self.peers[peer.name] = peer
        self._emit("joined", peer.name)
        for future in self._arrivals.pop(peer.name, []):
            if not future.done():
                future.set_result(peer)

    def _add_regions(self, peer: Peer, announcement: Announcement) -> None:
        added = {r.name: r for r in announcement.regions if r.name not in peer.regions}
        if added:
            peer.regions.update(added)
            self._emit("regions", peer.name)

    async def _ask(self, link: Link, kind: FrameType, **fields: str) -> None:
        """Send a question and wait for its answer, or for the link's end."""
        self._next_id += 1
        future = asyncio.get_running_loop().create_future()
        self._answers[link, self._next_id] = future
        link.send(encode_json(kind, {"id": self._next_id, **fields}))
        if link.closed:
            self._answer(link, self._next_id)
        await future

    def _answer(self, link: Link, number: int) -> None:
        future = self._answers.pop((link, number), None)
        if future is not None and not future.done():
            future.set_result(None)

    async def _withdrawn(self, link: Link, peer: Peer, name: str, number: int) -> None:
        region = peer.regions.pop(name, None)
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
        await self._drop(peer, PeerLost(f"peer {peer.name!r} left", peer=peer.name), "left")
        link.send(encode_json(FrameType.LEFT, {"id": number}))

    async def _part(self, peer: Peer) -> None:
        link = peer.link
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

    async def _drop(self, peer: Peer, error: PeerLost, kind: str) -> None:
        """Forget a peer: fail its transfers, wait until they are quiet, tell the backends and whoever listens."""
        if self.peers.get(peer.name) is not peer:
            return
        del self.peers[peer.name]
        peer.gone = str(error)
        self._tell_replaced(peer)
        for region in peer.regions.values():
            region.withdrawn, region.peer_gone = peer.gone, True
        self._peer_gone(peer.name, error)
        self._emit(kind, peer.name, peer.gone)
        await self._peer_quiet(peer.name)
        await self._disconnect_backends(peer)


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

"""The front door: opens backends, registers memory, knows peers, and checks, routes and sends transfers."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from nixl_async.backend import SCHEMES, Backend, Host, StorageBackend, load_backend
from nixl_async.checksums import load
from nixl_async.descriptors import Descriptor, MemoryKind, Places, Plan, Region, make_plan
from nixl_async.discovery import Discovered, Finder, open_finder
from nixl_async.dispatch import Dispatcher, check_payload, read_class, urgency
from nixl_async.dump import MAX_TRANSFERS, dump
from nixl_async.errors import (
    ClosedError,
    ConfigurationError,
    MissingDependency,
    NixlError,
    PeerLost,
    Quarantined,
    RegistrationError,
    TransferError,
)
from nixl_async.handle import PreparedTransfer, Transfer
from nixl_async.layers import Exchanges, LayerCalls
from nixl_async.leases import Lease
from nixl_async.liveness import Liveness
from nixl_async.membership import Membership
from nixl_async.memory import MemoryRegion, open_buffer
from nixl_async.notifications import Notification, Subscription
from nixl_async.observers import Observers
from nixl_async.peers import MembershipEvents, Peer
from nixl_async.queues import read_shares
from nixl_async.routing import Explanation, Router
from nixl_async.scheduler import ClassCount
from nixl_async.security import TLS, ConnectionLimits, Credentials, Token
from nixl_async.stores import StorageCalls, Stores
from nixl_async.transfer import TrafficClass, TransferResult
from nixl_async.verification import Check
from nixl_async.wire import MAX_NAME_NBYTES

logger = logging.getLogger("nixl_async.agent")

DEFAULT_BACKENDS = ("memory", "samehost", "tcp", "ucx", "posix", "directory", "cuda", "cuda_ipc", "gds")
OPTIONAL_BACKENDS = frozenset({"samehost", "ucx", "cuda", "cuda_ipc", "gds"})
"""Of the defaults, those that may be absent: their package or kernel feature is not everywhere."""
LATE_BACKENDS = frozenset({"s3", "azure", "gcs"})
"""What an agent with the default backends adds when it is first asked for: loading their libraries takes a second. They register
no memory, so the regions that are there already need nothing."""

OFF_LOOP_DESCRIPTORS = 65536
"""Plans of more ranges than this, both sides together, are made on a thread: they would hold the loop longer than a millisecond."""
REGISTERED_AT_ONCE = 16
"""After so many registrations the loop goes round."""
TOKEN_VARIABLE = "NIXL_ASYNC_TOKEN"
_UNNAMED = "region-"


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters of an agent since it was opened; bytes by the backend that moved them.

    `classes` has those of each traffic class, without the small copies that were made at once (`inline`). `retries` counts what was
    sent again by the same route after it failed, `failovers` the transfers that moved to another route while they were under way or
    waiting, `routes_lost` how often a route to a peer that was there went down.
    """

    peers: int
    regions: int
    live_transfers: int
    done: int
    failed: int
    cancelled: int
    inline: int
    nbytes: dict[str, int]
    unread_notifications: int
    classes: dict[str, ClassCount]
    retries: int = 0
    failovers: int = 0
    routes_lost: int = 0


class Agent(StorageCalls, LayerCalls):
    """Moves data between registered memory here and at its peers.

    `name` identifies the agent to its peers and must be unique among them. `backends` are names or instances, the preferred
    first; by default every one that is available, in the order of their ranks, which may depend on the peer. `token` is the
    secret that peers prove to each other (default: the environment's NIXL_ASYNC_TOKEN): one for all, which lets its owners claim
    any name that is not connected; or a mapping from peers' names to secrets, or a callable that returns a peer's, so that each
    secret is good for one name. A list of secrets stands for one that is being changed: the first is shown, every one is taken.
    `tls` encrypts control connections and binds names to certificates. Without a token and mutual TLS, `serve` and `connect`
    need `authenticate=False`.
    `liveness` says when a silent peer is suspect and when it is lost, `connection_limits` how many strangers are taken in at once.
    `discovery` is the URL of a store where agents find each other by name, such as "etcd://host:2379" (see `nixl_async.discovery`):
    `serve` publishes this agent there, and `await agent.peer("decode-3")` connects to others.
    `shares` are the weights by which traffic classes that have work share a backend (default: latency 16, normal 4, bulk 1).
    `verify` is what `transfer` and `submit` do where they are not told: None, or a checksum by which each copy is verified.

    Use it as `async with Agent("decode-0") as agent:`. Leaving the block cancels what is in flight, waits until nothing
    moves, parts from the peers and releases everything. One agent belongs to one event loop.
    """

    # Whether backends that are given are tried in the order of their ranks, as the default ones are.
    _by_rank = False

    def __init__(
        self,
        name: str,
        *,
        backends: Sequence[str | Backend] | None = None,
        token: Token | None = None,
        tls: TLS | None = None,
        authenticate: bool = True,
        liveness: Liveness | None = None,
        connection_limits: ConnectionLimits | None = None,
        discovery: str | None = None,
        shares: Mapping[TrafficClass | str, float] | None = None,
        verify: str | None = None,
    ) -> None:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_NBYTES:
            raise ConfigurationError(f"agent name {name!r} must be a string of 1 to {MAX_NAME_NBYTES} bytes")
        self.name = name
        self.incarnation: str = secrets.token_hex(8)
        given = token if token is not None else os.environ.get(TOKEN_VARIABLE)
        self._credentials = Credentials(given, tls)
        if not authenticate:
            self._credentials = Credentials(None, tls)
        self._authenticate = authenticate
        self._wanted = backends
        if verify is not None:
            load(verify)
        self._verify = verify
        self._shares = read_shares({read_class("a class of shares", one): share for one, share in (shares or {}).items()})
        self._observers = Observers()
        self._backends: dict[str, Backend] = {}
        self._unavailable: dict[str, str] = {}
        self._membership = Membership(
            name,
            self.incarnation,
            self._credentials,
            peer_gone=self._peer_gone,
            peer_quiet=self._peer_quiet,
            liveness=liveness,
            limits=connection_limits,
            route_lost=self._route_lost,
        )
        self._finder: Finder | None = None
        if discovery is not None:
            self._finder = open_finder(
                discovery, self._membership, name, self.incarnation, authenticated=self._credentials.authenticates
            )
        self._loop: asyncio.AbstractEventLoop
        ranked = backends is None or self._by_rank
        self._router = Router(self._backends, self._unavailable, self._membership, ranked=ranked)
        self._dispatcher: Dispatcher
        self._planner: ThreadPoolExecutor | None = None
        self._adding = asyncio.Lock()
        # No lower number is free for a region without a name.
        self._unnamed = 1
        self._turn = 0
        self._stores = Stores(self._schemes, self._storage)
        self._files = set()
        self._state = "new"
        self._withdrawal: asyncio.Task[None] | None = None
        """Since `drain`: withdraws from discovery and takes nobody in any more."""

    def __repr__(self) -> str:
        peers, regions = len(self._membership.peers), len(self._membership.regions)
        return f"<Agent {self.name!r} {self._shown_state}: {peers} peers, {regions} regions>"

    @property
    def _shown_state(self) -> str:
        return "draining" if self._withdrawal is not None and self._state == "open" else self._state

    # Opening and closing.

    async def __aenter__(self) -> Agent:
        if self._state != "new":
            raise ClosedError(f"agent {self.name!r} is {self._state}; make a new Agent")
        self._loop = asyncio.get_running_loop()
        self._state = "opening"
        opened: list[Backend] = []
        try:
            # Loading UCX takes half a second: not on the loop.
            for backend in await asyncio.to_thread(self._load_backends):
                try:
                    await backend.open(self._host(backend))
                except MissingDependency as error:
                    if self._wanted is not None:
                        raise
                    self._unavailable[backend.name] = str(error)
                    continue
                opened.append(backend)
        except BaseException:
            for backend in opened:
                await backend.aclose()
            self._state = "closed"
            raise
        if self._wanted is None:
            opened.sort(key=lambda backend: backend.rank)
        self._backends.update({backend.name: backend for backend in opened})
        self._membership.backends = opened
        self._dispatcher = Dispatcher(self.name, self._loop, self._backends, self._membership, self._shares, self._observers)
        self._membership.leases.held.abort = self._dispatcher.abort
        self._exchanges = Exchanges(self._loop, self._membership, self._dispatcher.streams, self, self._observers)
        self._state = "open"
        if self._finder is not None:
            try:
                await self._finder.open()
            except BaseException:
                await self.aclose()
                raise
        return self

    def _host(self, backend: Backend) -> Host:
        return Host(
            self.name,
            self.incarnation,
            self._loop,
            peer_lost=partial(self._membership.backend_lost, backend.name),
            notification=self._stock_notification,
            fence=partial(self._membership.fence, backend.name),
            rank_changed=self._router.rank_changed,
            backends=self._backends,
            preferred=self._router.preferred,
        )

    def _schemes(self) -> Mapping[str, str]:
        """Return which backend serves which URL scheme: those of this agent in their order, then ours that it has not loaded."""
        served: dict[str, str] = {}
        for name, backend in self._backends.items():
            if isinstance(backend, StorageBackend):
                served |= {scheme: name for scheme in backend.schemes if scheme not in served}
        return SCHEMES | served

    async def _storage(self, name: str) -> StorageBackend:
        """Return the backend of that name; add it if this agent has the default ones."""
        self._check_open()
        async with self._adding:
            backend = self._backends.get(name)
            if backend is None and self._wanted is None and name in LATE_BACKENDS:
                backend = await asyncio.to_thread(load_backend, name)
                try:
                    await backend.open(self._host(backend))
                    self._check_open()
                except BaseException:
                    await backend.aclose()
                    raise
                self._backends[name] = backend
                self._membership.backends.append(backend)
                self._dispatcher.add_backend(name, backend)
        if not isinstance(backend, StorageBackend):
            had = ", ".join(self._backends)
            raise ConfigurationError(f"this agent has no backend {name!r}; it has {had}; add it to backends=[…]")
        return backend

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def drain(self) -> None:
        """Withdraw from discovery, let nobody join any more, and return when what is under way has ended: before a restart.

        Who looks this agent up does not find it, and new connections are refused. Connected peers stay connected: they are told
        `withdrawn` where they use the same discovery, and go on to reach what is registered here. Waited for are this agent's
        transfers, its `push`, `pull`, `offer` and `incoming` blocks, notifications that wait for room, and leases until they have
        ended and are quiet; what begins meanwhile too. What peers read and write here by their own transfers, without a lease, is
        known to them alone: let them say by a notification that they are done, before this agent is closed.

        Everything but `serve` works until `aclose`, so that what was begun can be finished. Nothing undoes it. Bound the wait by
        `asyncio.timeout`: cancelling this ends the waiting alone, the agent stays withdrawn, and it may be awaited again.

        Raises:
            ClosedError: the agent is closed, or was closed meanwhile.
        """
        self._check_open()
        if self._withdrawal is None:
            self._withdrawal = self._loop.create_task(self._withdraw())
        await asyncio.shield(self._withdrawal)
        while self._dispatcher.busy or self._exchanges.busy or self._membership.busy:
            await self._dispatcher.idle()
            await self._exchanges.idle()
            await self._membership.idle()
        self._check_open()

    async def _withdraw(self) -> None:
        if self._finder is not None:
            # First: who was told that it is here is let in.
            await self._finder.withdraw()
        self._membership.refuse()

    async def aclose(self) -> None:
        """Cancel what is in flight, wait until nothing moves, part from the peers and release everything. Idempotent."""
        if self._state != "open":
            return
        self._state = "closing"
        if self._withdrawal is not None:
            await self._withdrawal
        if self._finder is not None:
            # Before anything else goes: nobody should be sent here any more.
            await self._finder.aclose()
        self._exchanges.close()
        await self._dispatcher.drain()
        await self._membership.aclose()
        for file in list(self._files):
            try:
                await file.aclose(publish=False)
            except TransferError as error:
                logger.error("agent %s: %s", self.name, error)
        for region in list(self._membership.regions.values()):
            try:
                await region.aclose()
            except Quarantined as error:
                logger.error("agent %s: %s", self.name, error)
        await self._dispatcher.verifier.aclose()
        self._dispatcher.close()
        # What relays between others goes before them.
        opened = [*reversed(self._backends.values())]
        for backend in [*(b for b in opened if b.relays), *(b for b in opened if not b.relays)]:
            await backend.aclose()
        if self._planner is not None:
            self._planner.shutdown(wait=False)
        self._state = "closed"
        if self._observers.closed is not None:
            self._observers.closed()

    def _load_backends(self) -> Iterable[Backend]:
        loaded: dict[str, Backend] = {}
        for wanted in DEFAULT_BACKENDS if self._wanted is None else self._wanted:
            if isinstance(wanted, Backend):
                backend = wanted
            else:
                try:
                    backend = load_backend(wanted)
                except MissingDependency as error:
                    if self._wanted is None and wanted in OPTIONAL_BACKENDS:
                        self._unavailable[wanted] = str(error)
                        continue
                    raise
            if backend.name in loaded:
                raise ConfigurationError(f"backend {backend.name!r} is given twice; an agent has each once")
            loaded[backend.name] = backend
        if not loaded:
            raise ConfigurationError("backends is empty; give at least one, or None for the default")
        if any(isinstance(backend, StorageBackend) or _of_a_device(backend) for backend in loaded.values()):
            # Storage takes memory that others register, and what no single backend joins goes through buffers.
            for name in ("memory", "staging"):
                if name not in loaded:
                    loaded[name] = load_backend(name)
        return loaded.values()

    def _check_open(self) -> None:
        if self._state != "open":
            hint = "use it inside `async with`" if self._state in ("new", "opening") else "make a new Agent"
            raise ClosedError(f"agent {self.name!r} is {self._state}; {hint}")

    # Memory.

    async def register(self, obj: Any, *, name: str | None = None, offered: bool = True) -> MemoryRegion:
        """Register an object's memory and tell the peers; the region keeps the object alive until it is closed.

        With `offered=False` no peer is told: it is for this agent's own transfers, and for peers that `region.lease` lends it to.

        `obj`: a numpy array, bytearray, memoryview, mmap, torch tensor, cupy array, RMM buffer, or anything with the buffer
        protocol, DLPack (CPU or CUDA) or `__cuda_array_interface__`. Read-only memory can be a source only. `name` is what peers
        call the region (default: region-1, region-2, …). Copies of a device's memory wait for no stream of the caller's: what it
        has enqueued there must have ended before a transfer begins.

        Raises:
            RegistrationError: the memory is empty or not C-contiguous, or no backend of this agent takes it.
            ConfigurationError: the name is taken.
        """
        self._check_open()
        regions = self._membership.regions
        if name is None:
            while f"{_UNNAMED}{self._unnamed}" in regions:
                self._unnamed += 1
            name = f"{_UNNAMED}{self._unnamed}"
        if name in regions:
            raise ConfigurationError(f"a region called {name!r} is registered already; choose another name")
        region = MemoryRegion(name, open_buffer(obj), self._unregister)
        region.offered, region.lessor = offered, self._membership.leases
        # Reserved before the first await, so that two tasks cannot take one name.
        regions[name] = region
        refusals = {}
        try:
            for backend in self._backends.values():
                if region.kind not in backend.kinds:
                    takes = ", ".join(sorted(kind.value for kind in backend.kinds))
                    refusals[backend.name] = f"it takes {takes}, not {region.kind.value}"
                    continue
                try:
                    region.keys[backend.name] = await backend.register(region)
                except NixlError as error:
                    refusals[backend.name] = str(error)
            if not region.keys:
                why = "; ".join(f"{name}: {reason}" for name, reason in (self._unavailable | refusals).items())
                raise RegistrationError(f"no backend takes {region!r}: {why}")
        except BaseException:
            del regions[name]
            for taken in region.keys:
                await self._backends[taken].unregister(region)
            raise
        self._membership.publish(region)
        self._regions_changed()
        self._turn = (self._turn + 1) % REGISTERED_AT_ONCE
        if not self._turn:
            # Nothing above may have waited, and whoever registers thousands would keep the loop.
            await asyncio.sleep(0)
        return region

    async def _unregister(self, region: MemoryRegion) -> None:
        await self._membership.withdraw(region)
        if region.name.startswith(_UNNAMED) and (number := region.name.removeprefix(_UNNAMED)).isdecimal():
            self._unnamed = max(1, min(self._unnamed, int(number)))
        self._regions_changed()
        if region.quarantined:
            return
        for name in region.keys:
            await self._backends[name].unregister(region)

    @property
    def leases(self) -> list[Lease]:
        """The leases that this agent has granted which are active, or have ended and are not quiet."""
        return self._membership.leases.all()

    # Peers.

    @property
    def address(self) -> tuple[str, int] | None:
        """Where this agent is served, `None` before `serve`."""
        return self._membership.address

    @property
    def peers(self) -> Mapping[str, Peer]:
        """The connected peers by name, as of this moment: it can be gone through while some come and go."""
        return self._membership.snapshot()

    @property
    def discovered(self) -> dict[str, Discovered]:
        """The agents that the discovery store has, or had when it could be reached last, by name; connected or not."""
        return {} if self._finder is None else self._finder.known

    async def peer(self, name: str) -> Peer:
        """Return the peer called `name`; with `discovery`, connect to it if it is not connected, waiting until it is there.

        However many ask, one connection is made. A peer that is published and does not answer is dialled again, at first after
        0.1 s, at most every 2 s. The wait is bounded by `asyncio.timeout`, whose `TimeoutError` has a cause that says what was
        waited for. A connected peer needs no waiting: `agent.peers[name]` is it, too.

        Raises:
            PeerLost: there is no `discovery`, and none of that name is connected; the message lists those that are.
            AuthenticationError: it has another token.
        """
        if self._finder is None:
            return self._membership.get(name)
        self._check_open()
        self._check_token()
        return await self._finder.peer(name)

    async def wait_peer(self, name: str) -> Peer:
        """Wait until a peer called `name` has joined, and return it."""
        self._check_open()
        return await self._membership.wait_peer(name)

    async def serve(self, host: str = "127.0.0.1", port: int = 0, *, advertise: str | None = None) -> tuple[str, int]:
        """Let peers connect at `host`:`port` (0: any free port); return the address. `advertise` is the host told to peers.

        With `discovery` the agent is published there, and withdrawn when it drains or closes; where the store is away, as soon as
        it is back.

        Raises:
            ConfigurationError: there is no token and `authenticate` is not False, or the address cannot be used.
            ClosedError: the agent is closed, or drains.
        """
        self._check_open()
        self._check_token()
        if self._withdrawal is not None:
            raise ClosedError(f"agent {self.name!r} drains: nobody joins it any more")
        if self._finder is not None and advertise is None:
            advertise = await self._finder.reachable(host)
        address = await self._membership.serve(host, port, advertise)
        if self._finder is not None:
            await self._finder.publish(address)
        return address

    async def connect(self, address: str | tuple[str, int]) -> Peer:
        """Connect to the agent served at "host:port" ("[::1]:port" for IPv6); return when this side knows the peer's regions.

        The peer learns of ours at about the same time; `await peer_agent.wait_peer(name)` there tells when.

        Connecting to an agent that is connected already returns the peer there is.

        Raises:
            PeerLost: nobody answers there, or not within `ConnectionLimits.handshake_seconds` (5), as an agent that is stopped.
            AuthenticationError: the two sides have different tokens.
            ProtocolError: what answers there is no agent, or not one of a version that this one knows.
        """
        self._check_open()
        self._check_token()
        host, port = _split_address(address)
        return await self._membership.connect(host, port)

    def metadata(self, regions: Iterable[MemoryRegion] | None = None) -> bytes:
        """Return what another agent needs to reach this one, for exchange out of band; `regions` limits it to those.

        It is NIXL's own metadata form: a stock NIXL agent loads it if this agent has the ucx backend.
        """
        self._check_open()
        return self._membership.metadata(regions)

    async def add_peer(self, metadata: bytes, *, token: bytes | None = None) -> Peer:
        """Load another agent's metadata, a stock NIXL agent's included, and connect to it.

        Loading it again adds regions that are new in it. `token` is that agent's secret, if it is not this agent's too.

        Raises:
            ProtocolError: the metadata is malformed.
            PeerLost: the agent cannot be reached, or is no longer the one that wrote the metadata.
        """
        self._check_open()
        return await self._membership.add_peer(metadata, token)

    async def disconnect(self, peer: str | Peer) -> None:
        """Part from a peer: transfers with it fail with `PeerLost`; return when both sides are quiet."""
        self._check_open()
        await self._membership.disconnect(peer if isinstance(peer, str) else peer.name)

    def membership(self) -> MembershipEvents:
        """Listen to peers: an async iterator over what happens to them from this call on.

        With `discovery` also over the agents that the store has: `discovered` when one is published or comes back as another
        incarnation, `withdrawn` when it is gone from there. Those that were there before are in `discovered`.
        """
        self._check_open()
        return self._membership.events()

    def _check_token(self) -> None:
        if not self._credentials.authenticates and self._authenticate:
            raise ConfigurationError(
                "peers are authenticated by a token or by mutual TLS: pass token=… to Agent, set NIXL_ASYNC_TOKEN, pass"
                " tls=TLS(certificate=…, key=…, ca=…), or pass authenticate=False to accept anyone who can reach the port"
            )

    # Notifications.

    async def notify(self, peer: str | Peer, payload: bytes) -> None:
        """Send `payload` to a peer; waits while the peer has too much of ours unread. Ordered per peer.

        Raises:
            PeerLost: the peer is not connected.
        """
        self._check_open()
        trace = b"" if self._observers.trace is None else self._observers.trace(None)
        await self._membership.notify(peer if isinstance(peer, str) else peer.name, check_payload(payload), trace)

    def notifications(self, *, peer: str | None = None, prefix: bytes = b"") -> Subscription:
        """Receive notifications: an async iterator, open from this call on, over those of `peer` that start with `prefix`.

        Several consumers are independent: each gets every notification that it asks for. What nobody asks for is kept for the
        first consumer that does; a sender whose notifications are not consumed waits in `notify`.
        """
        self._check_open()
        return self._membership.inbox.subscribe(peer, prefix)

    def _regions_changed(self) -> None:
        if self._finder is not None:
            self._finder.regions_changed()

    def _stock_notification(self, sender: str, payload: bytes) -> None:
        self._membership.inbox.deliver(Notification(sender, payload))

    # Transfers.

    async def transfer(
        self,
        src: Places | PreparedTransfer,
        dst: Places | None = None,
        *,
        notify: bytes | None = None,
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        after: object = None,
        backend: str | None = None,
        verify: str | bool | None = None,
    ) -> TransferResult:
        """Copy every byte of `src` to `dst` and return when all are in place.

        Each side is a region, a descriptor, or a list of them, of this agent or of one peer; the sides need equal byte counts.
        `notify` is sent to the peer after its side is complete. `backend` forces the route.
        `traffic_class` ("latency", "normal", "bulk") has a share of each backend's throughput while others want it too; within a
        class higher `priority` goes first, then the earlier `deadline`, in seconds of the loop's clock: one that cannot be met is
        counted, not failed; but no retry waits beyond it. `after` is what must be reached before bytes are read: a CUDA stream
        (what is on it so far) or event, a `CPUStream` or `CPUEvent`, an awaitable, another `Transfer`, or a list of these.
        `verify` ("crc32c", "xxh3", False, or None: the agent's own) compares checksums of both sides once the bytes are there and
        before `notify` is sent, page by page, each computed off the loop by the process that owns the memory: see `IntegrityError`.
        A page is a range of the side that has more of them; one range alone is compared by the mebibyte. Nobody may write to either
        side meanwhile. Files and objects are read back for it; a device's memory is refused.
        When this raises, `CancelledError` and `TimeoutError` included, no byte moves any more and `dst` is undefined. What does not
        become quiet raises `Quarantined`, in place of `CancelledError` too: see `Transfer`.

        Raises:
            DescriptorError: the sides do not fit together.
            NoRoute: no backend can copy between them.
            ConfigurationError: it cannot be verified: a device's memory, a stock NIXL agent, or an unknown checksum.
            IntegrityError: pages differ after the copy.
            TransferError: the copy failed.
        """
        if isinstance(src, PreparedTransfer):
            self._check_prepared(src)
            prepared = src
        elif isinstance(src, Descriptor) and isinstance(dst, Descriptor) and len(src) + len(dst) <= OFF_LOOP_DESCRIPTORS:
            prepared = self._prepare_now(src, dst, backend, verify is not None or self._verify is not None)
        else:
            prepared = await self.prepare(src, _both(dst), backend=backend, once=True)
        check = None if verify is None and self._verify is None else self._check(prepared, verify)
        return await self._dispatcher.transfer(prepared, notify, urgency(priority, deadline, traffic_class), after, check)

    def _begin(self, prepared: PreparedTransfer) -> TransferResult | Awaitable[TransferResult] | None:
        """Copy an ordinary prepared transfer in this call if it is small, or start it; `None` if it is one for `transfer`."""
        if self._state != "open" or prepared._agent is not self:
            self._check_prepared(prepared)
        prepared.check_usable()
        return None if self._verify is not None else self._dispatcher.begin(prepared)

    def submit(
        self,
        src: Places | PreparedTransfer,
        dst: Places | None = None,
        *,
        notify: bytes | None = None,
        priority: int = 0,
        traffic_class: TrafficClass | str = TrafficClass.NORMAL,
        deadline: float | None = None,
        after: object = None,
        backend: str | None = None,
        verify: str | bool | None = None,
    ) -> Transfer:
        """Start a transfer without waiting for it; otherwise as `transfer`.

        Lists of tens of thousands of pages take milliseconds to check: `await agent.prepare(...)` does that off the loop.
        """
        if not isinstance(src, PreparedTransfer):
            src = self._prepare_now(src, _both(dst), backend, verify is not None or self._verify is not None)
        else:
            self._check_prepared(src)
        check = None if verify is None and self._verify is None else self._check(src, verify)
        return self._dispatcher.submit(src, notify, urgency(priority, deadline, traffic_class), after, check)

    async def prepare(self, src: Places, dst: Places, *, backend: str | None = None, once: bool = False) -> PreparedTransfer:
        """Check, pair, coalesce and route a transfer, to send it many times; large ones are prepared off the loop.

        A device is told of its pages too, which takes longer than sending it: not if it will be sent `once`.
        """
        if _count(src) + _count(dst) <= OFF_LOOP_DESCRIPTORS:
            prepared = self._prepare_now(src, dst, backend, True)
        else:
            prepared = await self._prepare_elsewhere(src, dst, backend)
        if not once:
            await self._dispatcher.make_ready(prepared)
        return prepared

    async def _prepare_elsewhere(self, src: Places, dst: Places, backend: str | None) -> PreparedTransfer:
        self._check_open()
        if self._planner is None:
            self._planner = ThreadPoolExecutor(1, thread_name_prefix=f"nixl-plan-{self.name}")
        return await self._loop.run_in_executor(self._planner, self._prepare_now, src, dst, backend, True)

    def explain(self, src: Places, dst: Places) -> Explanation:
        """Tell which backend would move the bytes, which others could, which are down at present, and why the rest cannot."""
        self._check_open()
        plan = make_plan(src, dst)
        peer = plan.dst.peer or plan.src.peer
        return self._router.explain(plan, outages=self._dispatcher.outages(peer), now=self._loop.time())

    def statistics(self) -> Statistics:
        """Return the agent's counters."""
        return Statistics(
            peers=len(self._membership.peers),
            regions=len(self._membership.regions),
            live_transfers=len(self._dispatcher.transfers),
            nbytes=self._dispatcher.traffic.by_route(),
            unread_notifications=self._membership.inbox.unread,
            classes=self._dispatcher.classes(),
            **self._dispatcher.resent(),
            **self._dispatcher.counts,
        )

    def dump(self, limit: int = MAX_TRANSFERS) -> dict[str, Any]:
        """Return what this agent is doing, as values for JSON: live transfers with their histories, peers, queues, counts.

        At most `limit` transfers, the oldest, and as many peers; `omitted` says how many more there are. Times are seconds ago. A
        thousand transfers hold the loop for some milliseconds.
        """
        told: dict[str, Any] = {"agent": self.name, "incarnation": self.incarnation, "state": self._shown_state}
        return told | (dump(self._dispatcher, self._membership, limit) if self._state in ("open", "closing") else {})

    def _prepare_now(self, src: Places, dst: Places, backend: str | None, keep_places: bool) -> PreparedTransfer:
        self._check_open()
        if backend is not None and backend not in self._backends:
            raise ConfigurationError(f"this agent has no backend {backend!r}; it has {', '.join(self._backends)}")
        prepared = self.prepare_plan(make_plan(src, dst), backend=backend)
        if keep_places:
            # For verifying; lists are the caller's, who may change them.
            prepared.places = (tuple(src) if isinstance(src, list) else src, tuple(dst) if isinstance(dst, list) else dst)
        return prepared

    def prepare_plan(self, plan: Plan, *, backend: str | None = None) -> PreparedTransfer:
        """Route a plan that was made of checked sides, as `prepare` does with places. Any thread may call it.

        Raises:
            NoRoute: no backend can copy between its sides.
        """
        routes = self._router.routes(plan, backend)
        limits = self._backends[routes[0]].limits
        if 0 < plan.nbytes <= limits.max_op_nbytes and len(plan.lengths) <= limits.max_op_segments:
            pieces: tuple[Plan, ...] = (plan,)
        else:
            pieces = tuple(plan.split(limits.max_op_nbytes, limits.max_op_segments)) if plan.nbytes else ()
        return PreparedTransfer(self, plan, pieces, routes)

    def _check(self, prepared: PreparedTransfer, verify: str | bool | None) -> Check | None:
        algorithm = self._verify if verify is None else verify
        if algorithm is None or algorithm is False:
            return None
        return self._dispatcher.verifier.check(prepared.plan, prepared.places, algorithm)

    def _check_prepared(self, prepared: PreparedTransfer) -> None:
        self._check_open()
        if prepared._agent is not self:
            raise ConfigurationError("the transfer was prepared by another agent")
        prepared.check_usable()

    # What the membership reports.

    def _route_lost(self, backend: str, peer: str, reason: str) -> None:
        if self._state == "open":
            self._dispatcher.route_lost(backend, peer, reason)

    def _peer_gone(self, name: str, error: PeerLost) -> None:
        if self._state in ("open", "closing"):
            self._dispatcher.peer_gone(name, error)
            self._exchanges.peer_gone(name, error)

    async def _peer_quiet(self, name: str) -> None:
        await self._dispatcher.peer_quiet(name)


def _both(dst: Places | None) -> Places:
    if dst is None:
        raise TypeError("dst is missing; only a prepared transfer goes without")
    return dst


def _count(places: Places) -> int:
    if isinstance(places, Region):
        return 1
    if isinstance(places, Descriptor):
        return len(places)
    if not isinstance(places, list | tuple):
        # What is no place at all is refused where the plan is made.
        return 0
    return sum(len(place) if isinstance(place, Descriptor) else 1 for place in places)


def _split_address(address: str | tuple[str, int]) -> tuple[str, int]:
    if isinstance(address, tuple) and len(address) == 2 and isinstance(address[0], str) and isinstance(address[1], int):
        if not 0 < address[1] <= 65535:
            raise ConfigurationError(f"port {address[1]} of {address[0]!r} is out of range; give 1 to 65535")
        return address
    if not isinstance(address, str):
        raise ConfigurationError(f"address {address!r} is neither a string host:port nor a pair (host, port)")
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise ConfigurationError(f"address {address!r} is not of the form host:port, such as 10.0.0.5:7000 or [::1]:7000")
    return host.strip("[]"), int(port)


def _of_a_device(backend: Backend) -> bool:
    """Tell whether a backend copies between a device's memory and the host's in this process."""
    return not backend.remote and backend.kinds >= {MemoryKind.DRAM, MemoryKind.VRAM}

"""The front door: registers memory, knows peers, and carries out what the scheduler decides.

The agent is the asyncio shell around the pure scheduler: it turns `Start` into a task that awaits a backend, a task's end
into an event, and `Finish` into a resolved `Transfer`. Small copies that nothing waits for are made at once, without either.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from nixl_async.backend import Backend, Begun, Host, Op, load_backend, quiesce
from nixl_async.descriptors import Descriptor, Places, Plan, Region, make_plan
from nixl_async.errors import (
    BackendError,
    ClosedError,
    ConfigurationError,
    MissingDependency,
    NixlError,
    NoRoute,
    PeerLost,
    Quarantined,
    RegistrationError,
    TransferError,
)
from nixl_async.handle import PreparedTransfer, Transfer
from nixl_async.membership import Membership
from nixl_async.memory import MemoryRegion, open_buffer
from nixl_async.notifications import Notification, Subscription
from nixl_async.peers import MembershipEvents, Peer
from nixl_async.scheduler import Action, Finish, Scheduler, Start, Stop
from nixl_async.transfer import TransferRecord, TransferResult, TransferState
from nixl_async.wire import MAX_NAME_NBYTES

logger = logging.getLogger("nixl_async.agent")

DEFAULT_BACKENDS = ("memory", "samehost", "tcp", "ucx")
OPTIONAL_BACKENDS = frozenset({"samehost", "ucx"})
"""Of the defaults, those that may be absent: their package or kernel feature is not everywhere."""

OFF_LOOP_DESCRIPTORS = 16384
"""Plans of more ranges than this, both sides together, are made on a thread: they would hold the loop longer than a millisecond."""
INLINE_BUDGET_NS = 400_000
"""How long one loop iteration may spend on copies made at once."""
ALWAYS_INLINE_NBYTES = 16 << 10
"""Copies up to this size cost the loop less than queueing them would, unless the last one took `QUEUEING_NS`."""
QUEUEING_NS = 25_000
TOKEN_VARIABLE = "NIXL_ASYNC_TOKEN"


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend would move bytes between two places, and why the others would not."""

    route: str | None
    routes: tuple[str, ...]
    refusals: dict[str, str]
    segments: int
    nbytes: int

    def __str__(self) -> str:
        chosen = f"by {self.route}" if self.route else "no route"
        lines = [f"{self.nbytes} bytes in {self.segments} segments: {chosen}"]
        lines += [f"  {name}: next in line" for name in self.routes[1:]]
        lines += [f"  {name}: no: {why}" for name, why in self.refusals.items()]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters of an agent since it was opened; bytes by the backend that moved them."""

    peers: int
    regions: int
    live_transfers: int
    done: int
    failed: int
    cancelled: int
    inline: int
    nbytes: dict[str, int]
    unread_notifications: int


class Agent:
    """Moves data between registered memory here and at its peers.

    `name` identifies the agent to its peers and must be unique among them. `backends` are names or instances, the preferred
    first; by default every one that is available, cheapest route first. `token` is the secret that peers prove to each other
    (default: the environment's NIXL_ASYNC_TOKEN); without one, `serve` and `connect` need `authenticate=False`.

    Use it as `async with Agent("decode-0") as agent:`. Leaving the block cancels what is in flight, waits until nothing
    moves, parts from the peers and releases everything. One agent belongs to one event loop.
    """

    def __init__(
        self,
        name: str,
        *,
        backends: Sequence[str | Backend] | None = None,
        token: str | bytes | None = None,
        authenticate: bool = True,
    ) -> None:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= MAX_NAME_NBYTES:
            raise ConfigurationError(f"agent name {name!r} must be a string of 1 to {MAX_NAME_NBYTES} bytes")
        self.name = name
        self.incarnation = secrets.token_hex(8)
        given = token if token is not None else os.environ.get(TOKEN_VARIABLE)
        self._token = given.encode() if isinstance(given, str) else given
        if self._token is not None and not self._token:
            raise ConfigurationError("token is empty; give a secret, or authenticate=False to do without")
        if not authenticate:
            self._token = None
        self._authenticate = authenticate
        self._wanted = backends
        self._backends: dict[str, Backend] = {}
        self._unavailable: dict[str, str] = {}
        self._membership = Membership(
            name, self.incarnation, self._token, peer_gone=self._peer_gone, peer_quiet=self._peer_quiet
        )
        self._loop: asyncio.AbstractEventLoop
        self._scheduler: Scheduler
        self._transfers: dict[int, Transfer] = {}
        self._transfer_ids = itertools.count(1)
        self._ops: dict[int, asyncio.Task[None]] = {}
        self._quiet: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._planner: ThreadPoolExecutor | None = None
        self._notifying: set[asyncio.Task[None]] = set()
        # The time that copies made at once took in this loop iteration, and the task that made the first of them.
        self._inline_ns = 0
        self._inline_task: asyncio.Task[Any] | None = None
        self._inline_last_ns = 0
        self._begun: dict[Begun, str | None] = {}
        # The last route found: regions of both sides, the peer's backends then, and the backends that can copy between them.
        self._routed: tuple[tuple[tuple[Region, ...], tuple[Region, ...]], frozenset[str], tuple[str, ...]] | None = None
        self._dispatching = False
        self._state = "new"
        self._counts = {"done": 0, "failed": 0, "cancelled": 0, "inline": 0}
        self._nbytes: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Agent {self.name!r} {self._state}: {len(self._membership.peers)} peers, {len(self._membership.regions)} regions>"

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
                host = Host(
                    self.name,
                    self.incarnation,
                    self._loop,
                    peer_lost=partial(self._membership.backend_lost, backend.name),
                    notification=self._stock_notification,
                )
                try:
                    await backend.open(host)
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
        self._backends = {backend.name: backend for backend in opened}
        self._membership.backends = opened
        self._scheduler = Scheduler({backend.name: backend.limits for backend in opened})
        self._state = "open"
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is in flight, wait until nothing moves, part from the peers and release everything. Idempotent."""
        if self._state != "open":
            return
        self._state = "closing"
        for transfer_id in list(self._transfers):
            self._cancel(transfer_id)
        for begun in self._begun:
            begun.stop()
        while self._transfers:
            await asyncio.gather(*(_settled(transfer) for transfer in list(self._transfers.values())))
        while self._begun:
            await asyncio.wait([begun.future for begun in self._begun])
            await asyncio.sleep(0)
        for task in list(self._notifying):
            task.cancel()
        await self._membership.aclose()
        for region in list(self._membership.regions.values()):
            await region.aclose()
        stuck = [task for task in self._ops.values() if not task.done()]
        if stuck:
            logger.error("agent %s closes with %d quarantined ops; their memory stays registered", self.name, len(stuck))
        for backend in reversed(self._backends.values()):
            await backend.aclose()
        if self._timer is not None:
            self._timer.cancel()
        if self._planner is not None:
            self._planner.shutdown(wait=False)
        self._state = "closed"

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
        return loaded.values()

    def _check_open(self) -> None:
        if self._state != "open":
            hint = "use it inside `async with`" if self._state in ("new", "opening") else "make a new Agent"
            raise ClosedError(f"agent {self.name!r} is {self._state}; {hint}")

    # Memory.

    async def register(self, obj: Any, *, name: str | None = None) -> MemoryRegion:
        """Register an object's memory and tell the peers; the region keeps the object alive until it is closed.

        `obj`: a numpy array, bytearray, memoryview, mmap, torch CPU tensor, or anything with the buffer protocol, DLPack (CPU)
        or `__cuda_array_interface__`. Read-only memory can be a source only. `name` is what peers call the region
        (default: region-1, region-2, …).

        Raises:
            RegistrationError: the memory is empty or not C-contiguous, or no backend of this agent takes it.
            ConfigurationError: the name is taken.
        """
        self._check_open()
        regions = self._membership.regions
        if name is None:
            name = next(free for n in itertools.count(1) if (free := f"region-{n}") not in regions)
        if name in regions:
            raise ConfigurationError(f"a region called {name!r} is registered already; choose another name")
        region = MemoryRegion(name, open_buffer(obj), self._unregister)
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
                raise RegistrationError(f"no backend takes {region!r}: {refusals}")
        except BaseException:
            del regions[name]
            for taken in region.keys:
                await self._backends[taken].unregister(region)
            raise
        self._membership.publish(region)
        return region

    async def _unregister(self, region: MemoryRegion) -> None:
        await self._membership.withdraw(region)
        if region.quarantined:
            return
        for name in region.keys:
            await self._backends[name].unregister(region)

    # Peers.

    @property
    def address(self) -> tuple[str, int] | None:
        """Where this agent is served, `None` before `serve`."""
        return self._membership.address

    @property
    def peers(self) -> dict[str, Peer]:
        """The connected peers by name."""
        return dict(self._membership.peers)

    def peer(self, name: str) -> Peer:
        """Return the connected peer called `name`.

        Raises:
            PeerLost: there is none; the message lists those there are.
        """
        return self._membership.get(name)

    async def wait_peer(self, name: str) -> Peer:
        """Wait until a peer called `name` has joined, and return it."""
        self._check_open()
        return await self._membership.wait_peer(name)

    async def serve(self, host: str = "127.0.0.1", port: int = 0, *, advertise: str | None = None) -> tuple[str, int]:
        """Let peers connect at `host`:`port` (0: any free port); return the address. `advertise` is the host told to peers.

        Raises:
            ConfigurationError: there is no token and `authenticate` is not False, or the address cannot be used.
        """
        self._check_open()
        self._check_token()
        return await self._membership.serve(host, port, advertise)

    async def connect(self, address: str | tuple[str, int]) -> Peer:
        """Connect to the agent served at "host:port" ("[::1]:port" for IPv6); return when this side knows the peer's regions.

        The peer learns of ours at about the same time; `await peer_agent.wait_peer(name)` there tells when.

        Connecting to an agent that is connected already returns the peer there is.

        Raises:
            PeerLost: nobody answers there.
            AuthenticationError: the two sides have different tokens.
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

    async def add_peer(self, metadata: bytes) -> Peer:
        """Load another agent's metadata, a stock NIXL agent's included, and connect to it.

        Loading it again adds regions that are new in it.

        Raises:
            ProtocolError: the metadata is malformed.
            PeerLost: the agent cannot be reached, or is no longer the one that wrote the metadata.
        """
        self._check_open()
        return await self._membership.add_peer(metadata)

    async def disconnect(self, peer: str | Peer) -> None:
        """Part from a peer: transfers with it fail with `PeerLost`; return when both sides are quiet."""
        self._check_open()
        await self._membership.disconnect(peer if isinstance(peer, str) else peer.name)

    def membership(self) -> MembershipEvents:
        """Listen to peers: an async iterator over what happens to them from this call on."""
        self._check_open()
        return self._membership.events()

    def _check_token(self) -> None:
        if self._token is None and self._authenticate:
            raise ConfigurationError(
                "peers are authenticated by a shared token: pass token=… to Agent, set NIXL_ASYNC_TOKEN,"
                " or pass authenticate=False to accept anyone who can reach the port"
            )

    # Notifications.

    async def notify(self, peer: str | Peer, payload: bytes) -> None:
        """Send `payload` to a peer; waits while the peer has too much of ours unread. Ordered per peer.

        Raises:
            PeerLost: the peer is not connected.
        """
        self._check_open()
        await self._membership.notify(peer if isinstance(peer, str) else peer.name, _payload(payload))

    def notifications(self, *, peer: str | None = None, prefix: bytes = b"") -> Subscription:
        """Receive notifications: an async iterator, open from this call on, over those of `peer` that start with `prefix`.

        Several consumers are independent: each gets every notification that it asks for. What nobody asks for is kept for the
        first consumer that does; a sender whose notifications are not consumed waits in `notify`.
        """
        self._check_open()
        return self._membership.inbox.subscribe(peer, prefix)

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
        backend: str | None = None,
    ) -> TransferResult:
        """Copy every byte of `src` to `dst` and return when all are in place.

        Each side is a region, a descriptor, or a list of them, of this agent or of one peer; the sides need equal byte counts.
        `notify` is sent to the peer after its side is complete. Higher `priority` goes first. `backend` forces the route.
        When this raises, `CancelledError` and `TimeoutError` included, no byte moves any more and `dst` is undefined.

        Raises:
            DescriptorError: the sides do not fit together.
            NoRoute: no backend can copy between them.
            TransferError: the copy failed.
        """
        if isinstance(src, PreparedTransfer):
            self._check_prepared(src)
            prepared = src
        elif isinstance(src, Descriptor) and isinstance(dst, Descriptor) and len(src) + len(dst) <= OFF_LOOP_DESCRIPTORS:
            prepared = self._prepare_now(src, dst, backend)
        else:
            prepared = await self.prepare(src, _both(dst), backend=backend)
        return await self._transfer(prepared, notify, priority)

    def submit(
        self,
        src: Places | PreparedTransfer,
        dst: Places | None = None,
        *,
        notify: bytes | None = None,
        priority: int = 0,
        backend: str | None = None,
    ) -> Transfer:
        """Start a transfer without waiting for it; otherwise as `transfer`.

        Lists of tens of thousands of pages take milliseconds to check: `await agent.prepare(...)` does that off the loop.
        """
        if not isinstance(src, PreparedTransfer):
            return self._submit(self._prepare_now(src, _both(dst), backend), notify, priority)
        self._check_prepared(src)
        return self._submit(src, notify, priority)

    async def prepare(self, src: Places, dst: Places, *, backend: str | None = None) -> PreparedTransfer:
        """Check, pair, coalesce and route a transfer once, to send it many times; large ones are prepared off the loop."""
        if _count(src) + _count(dst) <= OFF_LOOP_DESCRIPTORS:
            return self._prepare_now(src, dst, backend)
        self._check_open()
        if self._planner is None:
            self._planner = ThreadPoolExecutor(1, thread_name_prefix=f"nixl-plan-{self.name}")
        return await self._loop.run_in_executor(self._planner, self._prepare_now, src, dst, backend)

    def explain(self, src: Places, dst: Places) -> Explanation:
        """Tell which backend would move the bytes, which others could, and why the rest cannot."""
        self._check_open()
        plan = make_plan(src, dst)
        routes, refusals = self._routes(plan, None)
        return Explanation(routes[0] if routes else None, routes, refusals, len(plan.lengths), plan.nbytes)

    def statistics(self) -> Statistics:
        """Return the agent's counters."""
        return Statistics(
            peers=len(self._membership.peers),
            regions=len(self._membership.regions),
            live_transfers=len(self._transfers),
            nbytes=dict(self._nbytes),
            unread_notifications=self._membership.inbox.unread,
            **self._counts,
        )

    def _routes(self, plan: Plan, forced: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
        refusals = dict(self._unavailable)
        if plan.src.peer is not None and plan.dst.peer is not None:
            both = f"both sides are peers' ({plan.src.peer!r}, {plan.dst.peer!r}); one side must be this agent's"
            return (), dict.fromkeys(self._backends, both)
        name = plan.dst.peer if plan.dst.peer is not None else plan.src.peer
        peer = None if name is None else self._membership.get(name)
        routes: list[str] = []
        for backend in self._backends.values():
            if peer is not None and backend.name not in peer.backends:
                why: str | None = peer.refusals.get(backend.name, "it reaches no peers")
            else:
                why = backend.refusal(plan.src, plan.dst)
            if why is None and forced in (None, backend.name):
                routes.append(backend.name)
            else:
                refusals[backend.name] = why or f"backend={forced!r} was asked for"
        return tuple(routes), refusals

    def _prepare_now(self, src: Places, dst: Places, backend: str | None) -> PreparedTransfer:
        self._check_open()
        if backend is not None and backend not in self._backends:
            raise ConfigurationError(f"this agent has no backend {backend!r}; it has {', '.join(self._backends)}")
        plan = make_plan(src, dst)
        routes = self._route(plan, backend)
        limits = self._backends[routes[0]].limits
        if 0 < plan.nbytes <= limits.max_op_nbytes and len(plan.lengths) <= limits.max_op_segments:
            pieces: tuple[Plan, ...] = (plan,)
        else:
            pieces = tuple(plan.split(limits.max_op_nbytes, limits.max_op_segments)) if plan.nbytes else ()
        return PreparedTransfer(self, plan, pieces, routes)

    def _route(self, plan: Plan, backend: str | None) -> tuple[str, ...]:
        peer = self._membership.peers.get(plan.dst.peer or plan.src.peer or "")
        if backend is None and peer is not None and (plan.src.peer is None or plan.dst.peer is None):
            routed = self._routed
            if routed is not None and routed[0] == (plan.src.regions, plan.dst.regions) and routed[1] == peer.backends:
                return routed[2]
            found = tuple(
                name
                for name, one in self._backends.items()
                if name in peer.backends and one.refusal(plan.src, plan.dst) is None
            )
            if found:
                self._routed = (plan.src.regions, plan.dst.regions), frozenset(peer.backends), found
                return found
        routes, refusals = self._routes(plan, backend)
        if not routes:
            reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
            raise NoRoute(f"no backend can copy from {plan.src.regions[0]!r} to {plan.dst.regions[0]!r}: {reasons}", refusals)
        return routes

    def _check_prepared(self, prepared: PreparedTransfer) -> None:
        self._check_open()
        if prepared._agent is not self:
            raise ConfigurationError("the transfer was prepared by another agent")
        for side in (prepared.plan.src, prepared.plan.dst):
            for region in side.regions:
                region.check_usable()

    async def _transfer(self, prepared: PreparedTransfer, notify: bytes | None, priority: int) -> TransferResult:
        if self._inline_ns >= INLINE_BUDGET_NS and asyncio.current_task() is self._inline_task:
            # A task that only makes small copies would never let the loop run; many tasks that make one each do.
            await asyncio.sleep(0)
            self._check_prepared(prepared)
        result = self._try_inline(prepared)
        if result is None:
            return await self._submit(prepared, notify, priority)
        if isinstance(result, Begun):
            result = await self._finish_begun(prepared, result)
        if notify is not None:
            payload, target = _payload(notify), _target(prepared.plan, self.name)
            if not self._membership.notify_nowait(target, payload):
                await self._membership.notify(target, payload)
        return result

    async def _finish_begun(self, prepared: PreparedTransfer, begun: Begun) -> TransferResult:
        plan, route = prepared.plan, prepared.routes[0]
        started = self._loop.time()
        self._begun[begun] = plan.dst.peer or plan.src.peer
        for side in (plan.src, plan.dst):
            for region in side.regions:
                region.hold()
        ended = "failed"
        try:
            await quiesce(begun.future, begun.stop)
            ended = "done"
        except asyncio.CancelledError:
            ended = "cancelled"
            raise
        finally:
            self._counts[ended] += 1
            del self._begun[begun]
            for side in (plan.src, plan.dst):
                for region in side.regions:
                    region.release()
        self._nbytes[route] = self._nbytes.get(route, 0) + plan.nbytes
        return TransferResult(plan.nbytes, self._loop.time() - started, 0.0, 1, route)

    def _try_inline(self, prepared: PreparedTransfer) -> TransferResult | Begun | None:
        if len(prepared.pieces) != 1:
            return None
        plan, route = prepared.plan, prepared.routes[0]
        backend = self._backends[route]
        if plan.nbytes > backend.limits.inline_nbytes:
            return None
        expensive = plan.nbytes > ALWAYS_INLINE_NBYTES or self._inline_last_ns > QUEUEING_NS
        if expensive and self._inline_ns >= INLINE_BUDGET_NS:
            return None
        peer = plan.dst.peer or plan.src.peer
        if not self._scheduler.idle(route, peer):
            return None
        started = time.perf_counter_ns()
        copied = backend.copy_now(Op(0, plan, peer, plan.dst.peer is not None))
        if copied is False:
            return None
        spent = time.perf_counter_ns() - started
        if self._inline_ns == 0:
            self._inline_task = asyncio.current_task()
            self._loop.call_soon(self._reset_inline)
        self._inline_ns += spent + 10_000
        self._inline_last_ns = spent
        if isinstance(copied, Begun):
            return copied
        self._counts["inline"] += 1
        self._counts["done"] += 1
        self._nbytes[route] = self._nbytes.get(route, 0) + plan.nbytes
        return TransferResult(plan.nbytes, spent * 1e-9, 0.0, 1, route)

    def _reset_inline(self) -> None:
        self._inline_ns = 0
        self._inline_task = None

    def _submit(self, prepared: PreparedTransfer, notify: bytes | None, priority: int) -> Transfer:
        payload = None if notify is None else _payload(notify)
        plan = prepared.plan
        record = TransferRecord(
            next(self._transfer_ids),
            plan,
            prepared.pieces,
            prepared.routes,
            plan.dst.peer or plan.src.peer,
            plan.dst.peer is not None,
            priority,
        )
        transfer = Transfer(self, record, payload)
        self._transfers[record.id] = transfer
        for side in (plan.src, plan.dst):
            for region in side.regions:
                region.hold()
        if actions := self._scheduler.submit(record, self._loop.time(), start=False):
            self._carry_out(actions)
        if not self._dispatching:
            # At the end of the iteration, so that what is submitted together is batched together.
            self._dispatching = True
            self._loop.call_soon(self._dispatch)
        return transfer

    def _dispatch(self) -> None:
        self._dispatching = False
        self._carry_out(self._scheduler.dispatch(self._loop.time()))

    def _cancel(self, transfer_id: int) -> None:
        self._carry_out(self._scheduler.cancel(transfer_id, self._loop.time()))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(name, op):
                    task = self._loop.create_task(self._backends[name].copy(op))
                    self._ops[op.id] = task
                    task.add_done_callback(partial(self._op_ended, name, op))
                case Stop(op_id):
                    if (running := self._ops.get(op_id)) is not None:
                        running.cancel()
                case Finish(record):
                    self._finish(record)
        wakeup = self._scheduler.next_wakeup()
        if wakeup is not None and (self._timer is None or self._timer.cancelled() or self._timer.when() > wakeup):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(wakeup, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._carry_out(self._scheduler.tick(self._loop.time()))

    def _op_ended(self, name: str, op: Op, task: asyncio.Task[None]) -> None:
        del self._ops[op.id]
        now = self._loop.time()
        if task.cancelled():
            error: BaseException | None = BackendError(f"{name}: the op was cancelled", backend=name, peer=op.peer)
        else:
            error = task.exception()
        if error is None:
            self._nbytes[name] = self._nbytes.get(name, 0) + op.nbytes
            for transfer_id, start, nbytes in op.parts:
                if (transfer := self._transfers.get(transfer_id)) is not None:
                    transfer._progress(start, nbytes)
            self._carry_out(self._scheduler.op_done(op.id, now))
        else:
            if not isinstance(error, NixlError):
                wrapped = BackendError(f"{name}: {type(error).__name__}: {error}", backend=name, peer=op.peer)
                wrapped.__cause__ = error
                error = wrapped
            self._carry_out(self._scheduler.op_failed(op.id, error, now))

    def _finish(self, record: TransferRecord) -> None:
        transfer = self._transfers[record.id]
        error = record.error
        if isinstance(error, TransferError):
            error.transfer_id = error.transfer_id or record.id
            error.peer = error.peer or record.peer
            error.history = record.history
        quarantined = isinstance(error, Quarantined)
        for side in (record.plan.src, record.plan.dst):
            for region in side.regions:
                if quarantined and isinstance(region, MemoryRegion):
                    region.quarantined = True
                else:
                    region.release()
        if record.state is TransferState.DONE:
            self._counts["done"] += 1
            if transfer.notify is not None:
                target = _target(record.plan, self.name)
                if not self._membership.notify_nowait(target, transfer.notify):
                    task = self._loop.create_task(self._notify_then_resolve(transfer, target, transfer.notify))
                    self._notifying.add(task)
                    task.add_done_callback(self._notifying.discard)
                    return
        else:
            self._counts["failed" if record.state is TransferState.FAILED else "cancelled"] += 1
        self._resolve(transfer)

    async def _notify_then_resolve(self, transfer: Transfer, target: str, payload: bytes) -> None:
        try:
            await self._membership.notify(target, payload)
        except NixlError as error:
            transfer._record.error = error
        finally:
            self._resolve(transfer)

    def _resolve(self, transfer: Transfer) -> None:
        del self._transfers[transfer.id]
        transfer._resolve()
        self._tell_quiet()

    # What the membership reports.

    def _peer_gone(self, name: str, error: PeerLost) -> None:
        if self._state in ("open", "closing"):
            self._carry_out(self._scheduler.peer_lost(name, error, self._loop.time()))

    async def _peer_quiet(self, name: str) -> None:
        while any(transfer._record.peer == name for transfer in self._transfers.values()):
            waiter = self._loop.create_future()
            self._quiet.append(waiter)
            await waiter

    def _tell_quiet(self) -> None:
        waiting, self._quiet = self._quiet, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


async def _settled(transfer: Transfer) -> None:
    while not transfer.done():
        await transfer._end()


def _both(dst: Places | None) -> Places:
    if dst is None:
        raise TypeError("dst is missing; only a prepared transfer goes without")
    return dst


def _count(places: Places) -> int:
    if isinstance(places, Region):
        return 1
    return len(places) if isinstance(places, Descriptor) else sum(_count(place) for place in places)


def _target(plan: Plan, own: str) -> str:
    return plan.dst.peer or plan.src.peer or own


def _payload(payload: bytes) -> bytes:
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise TypeError(f"a notification is bytes, not {type(payload).__name__}")
    return bytes(payload)


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

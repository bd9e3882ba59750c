"""Carries out what the scheduler decides: the asyncio shell around it.

`Start` becomes a task that awaits a backend, a task's end an event, `Finish` a resolved `Transfer`. Small copies that nothing
waits for are made at once, without the scheduler or a task.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import random
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from nixl_async.backend import Backend, Begun, Op, quiesce
from nixl_async.counters import RX, TX, Traffic, direction
from nixl_async.descriptors import Plan, Region
from nixl_async.errors import BackendError, ConfigurationError, NixlError, PartsFailed, PeerLost, Quarantined, TransferError
from nixl_async.handle import PreparedTransfer, Transfer
from nixl_async.membership import Membership
from nixl_async.memory import MemoryRegion
from nixl_async.observers import Observers
from nixl_async.outages import Outage
from nixl_async.repeating import repeats
from nixl_async.revival import Revival
from nixl_async.scheduler import Action, ClassCount, Finish, Lost, Scheduler, Start, Stop, Verify
from nixl_async.storage import FileRegion
from nixl_async.streams import Streams
from nixl_async.transfer import TrafficClass, TransferRecord, TransferResult, TransferState
from nixl_async.verification import Check, Verifier

logger = logging.getLogger("nixl_async.agent")

INLINE_BUDGET_NS = 400_000
"""How long one loop iteration may spend on copies made at once."""
ALWAYS_INLINE_NBYTES = 16 << 10
"""Copies up to this size cost the loop less than queueing them would, unless the last one took `QUEUEING_NS`."""
QUEUEING_NS = 25_000


class Urgency(NamedTuple):
    """What decides when a transfer's turn comes: see `Agent.transfer`."""

    priority: int = 0
    deadline: float | None = None
    traffic_class: TrafficClass = TrafficClass.NORMAL


ORDINARY = Urgency()


class _Sent(NamedTuple):
    """A small copy that was begun at once, and by which route."""

    begun: Begun
    route: str


def urgency(priority: int, deadline: float | None, traffic_class: TrafficClass | str) -> Urgency:
    """Check what a caller gave.

    Raises:
        ConfigurationError: there is no such class, or the deadline is no time.
    """
    if priority == 0 and deadline is None and traffic_class is TrafficClass.NORMAL:
        return ORDINARY
    traffic_class = read_class("traffic_class", traffic_class)
    if deadline is not None and not (isinstance(deadline, int | float) and math.isfinite(deadline)):
        raise ConfigurationError(
            f"deadline is {deadline!r}; give seconds of the loop's clock, such as loop.time() + 0.5, or None"
        )
    return Urgency(priority, deadline, traffic_class)


def read_class(what: str, given: TrafficClass | str) -> TrafficClass:
    """Return the class of that name.

    Raises:
        ConfigurationError: there is none; the message lists those there are.
    """
    try:
        return TrafficClass(given)
    except ValueError:
        allowed = ", ".join(repr(one.value) for one in TrafficClass)
        raise ConfigurationError(f"{what} is {given!r}; it must be one of {allowed}") from None


class Dispatcher:
    """Runs the transfers of the agent `name` on `loop`; `counts` are the ended ones, `traffic` the bytes by what moved them."""

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        backends: Mapping[str, Backend],
        membership: Membership,
        shares: Mapping[TrafficClass, float] | None = None,
        observers: Observers | None = None,
    ) -> None:
        self._name = name
        self.observers = Observers() if observers is None else observers
        self.loop = loop
        self._backends = backends
        self._membership = membership
        self.streams = Streams(loop)
        self.traffic = Traffic(membership.peers.__contains__)
        self._moved = self.traffic.found
        limits = {name: backend.limits for name, backend in backends.items()}
        self._scheduler = Scheduler(limits, shares, random.random, self.traffic)
        self._revival = Revival(backends, membership, self._route_back)
        self.verifier = Verifier(name, loop, membership, backends)
        self.transfers: dict[int, Transfer] = {}
        self.counts = {"done": 0, "failed": 0, "cancelled": 0, "inline": 0}
        self._transfer_ids = itertools.count(1)
        self._ops: dict[int, asyncio.Task[None]] = {}
        # The ops that have told of parts of theirs.
        self._told: set[int] = set()
        self._quiet: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._notifying: set[asyncio.Task[None]] = set()
        self._dispatching = False
        # The time that copies made at once took in this loop iteration, and the task that made the first of them.
        self._inline_ns = 0
        self._inline_task: asyncio.Task[Any] | None = None
        self._inline_last_ns = 0
        self._begun: dict[Begun, Plan] = {}
        # Quarantined transfers whose ops have not ended: they hold the peer's memory until those do.
        self._unquiet: list[tuple[TransferRecord, list[Region]]] = []

    @property
    def busy(self) -> bool:
        """Whether transfers are under way, or wait."""
        return bool(self.transfers or self._begun)

    async def idle(self) -> None:
        """Wait until no transfer is under way or waits."""
        while self.busy:
            if self._begun:
                await asyncio.wait([begun.future for begun in self._begun])
                await asyncio.sleep(0)
            else:
                await self._next_end()

    async def drain(self) -> None:
        """Cancel what is in flight and wait until nothing moves."""
        for transfer_id in list(self.transfers):
            self.cancel(transfer_id)
        for begun in self._begun:
            begun.stop()
        while self.transfers:
            await asyncio.gather(*(_settled(transfer) for transfer in list(self.transfers.values())))
        while self._begun:
            await asyncio.wait([begun.future for begun in self._begun])
            await asyncio.sleep(0)
        for task in list(self._notifying):
            task.cancel()
        await self._revival.aclose()

    def close(self) -> None:
        """Stop the clock; say what was never quiet."""
        stuck = [task for task in self._ops.values() if not task.done()]
        if stuck:
            logger.error("agent %s closes with %d quarantined ops; their memory stays registered", self._name, len(stuck))
        if self._timer is not None:
            self._timer.cancel()
        self.streams.close()

    async def transfer(
        self, prepared: PreparedTransfer, notify: bytes | None, urgency: Urgency, after: object, check: Check | None = None
    ) -> TransferResult:
        """Copy at once what is small and waits for nothing; submit what is not; see `Agent.transfer`."""
        if after is not None or check is not None:
            return await self.submit(prepared, notify, urgency, after, check)
        if self._inline_ns >= INLINE_BUDGET_NS and asyncio.current_task() is self._inline_task:
            # A task that only makes small copies would never let the loop run; many tasks that make one each do.
            await asyncio.sleep(0)
            prepared.check_usable()
        result = self._try_inline(prepared, urgency)
        if result is None:
            return await self.submit(prepared, notify, urgency, None)
        if isinstance(result, _Sent):
            return await self._finish_sent(prepared, result, urgency, notify)
        if notify is not None:
            await self._notify(prepared.plan, notify)
        return result

    async def _finish_sent(
        self, prepared: PreparedTransfer, sent: _Sent, urgency: Urgency, notify: bytes | None
    ) -> TransferResult:
        """Wait for the end of a copy that has been begun at once, and then tell the peer."""
        try:
            result = await self._finish_begun(prepared, sent, urgency)
        except (BackendError, PeerLost) as error:
            if not repeats(error, len(prepared.routes)):
                raise
            # It is quiet: what is repeated goes the scheduler's way.
            self._inline_failed(prepared, sent.route, error)
            return await self.submit(prepared, notify, urgency, None)
        if notify is not None:
            await self._notify(prepared.plan, notify)
        return result

    async def _notify(self, plan: Plan, notify: bytes) -> None:
        payload, target = check_payload(notify), _target(plan, self._name)
        trace = b"" if self.observers.trace is None else self.observers.trace(plan)
        if not self._membership.notify_nowait(target, payload, trace):
            await self._membership.notify(target, payload, trace)

    async def make_ready(self, prepared: PreparedTransfer) -> None:
        """Let the backend that comes first keep what it can for a transfer that will be sent many times."""
        backend, plan = self._backends[prepared.routes[0]], prepared.plan
        if type(backend).prepare is Backend.prepare:
            return
        # What is not ready is made ready each time.
        with suppress(TransferError):
            for piece in prepared.pieces:
                await backend.prepare(Op(0, piece, plan.dst.peer or plan.src.peer, plan.dst.peer is not None))

    async def _finish_begun(self, prepared: PreparedTransfer, sent: _Sent, urgency: Urgency) -> TransferResult:
        plan, (begun, route) = prepared.plan, sent
        started = self.loop.time()
        self._begun[begun] = plan
        for side in (plan.src, plan.dst):
            for region in side.regions:
                region.hold()
        ended, reason = "failed", None
        try:
            await quiesce(begun.future, begun.stop)
            ended = "done"
        except asyncio.CancelledError:
            if isinstance(error := begun.future.exception(), Quarantined):
                reason = error
                raise error from None
            ended = "cancelled"
            raise
        except (BackendError, PeerLost) as error:
            # What failed because it was stopped says why.
            prepared.check_usable()
            if repeats(error, len(prepared.routes)):
                ended = ""
            raise
        except Quarantined as error:
            reason = error
            raise
        except TransferError:
            prepared.check_usable()
            raise
        finally:
            if ended:
                self.counts[ended] += 1
                if ended == "failed" and (why := sys.exception()) is not None:
                    self._membership.counters.failed(why)
            del self._begun[begun]
            _let_go(plan, reason)
        seconds = self.loop.time() - started
        target = plan.dst.peer
        self._count(plan, route, target or plan.src.peer, target is not None, urgency, seconds)
        return TransferResult(plan.nbytes, seconds, 0.0, 1, route)

    def _count(self, plan: Plan, route: str, peer: str | None, put: bool, urgency: Urgency, seconds: float) -> None:
        """Count what was copied at once."""
        traffic_class, nbytes = urgency.traffic_class, plan.nbytes
        way = TX if put else RX if peer is not None else direction(plan, None)
        moved = self._moved.get((route, peer, traffic_class, way)) or self.traffic.of(route, peer, traffic_class, way)
        moved.nbytes += nbytes
        moved.transfers += 1
        self._scheduler.copied(
            traffic_class, nbytes, late=urgency.deadline is not None and self.loop.time() > urgency.deadline
        )
        copied = self.observers.copied
        if copied is not None:
            copied(plan, peer, route, traffic_class, seconds)

    def _inline_failed(self, prepared: PreparedTransfer, route: str, error: TransferError) -> None:
        peer = prepared.plan.dst.peer or prepared.plan.src.peer
        if isinstance(error, PeerLost) and peer is not None:
            self.route_lost(route, peer, str(error))
        if self._scheduler.outages.first_up(prepared.routes, peer) == route:
            self._scheduler.retries += 1
        else:
            self._scheduler.failovers += 1

    def begin(self, prepared: PreparedTransfer) -> TransferResult | Awaitable[TransferResult] | None:
        """Copy what is small in this call or begin to, else submit it; `None` if `transfer` has to wait for the loop first."""
        if self._inline_ns >= INLINE_BUDGET_NS:
            return None
        result = self._try_inline(prepared, ORDINARY)
        if result is None:
            return self.submit(prepared, None, ORDINARY, None)
        return self._finish_sent(prepared, result, ORDINARY, None) if isinstance(result, _Sent) else result

    def _try_inline(self, prepared: PreparedTransfer, urgency: Urgency) -> TransferResult | _Sent | None:
        found = prepared.at_once
        if found is None:
            if len(prepared.pieces) != 1 or not self._backends[prepared.routes[0]].limits.inline_nbytes:
                return None
            plan = prepared.plan
            op = Op(0, plan, plan.dst.peer or plan.src.peer, plan.dst.peer is not None)
            found = prepared.at_once = self._backends[prepared.routes[0]], op
        backend, op = found
        plan, route, peer = op.plan, prepared.routes[0], op.peer
        nbytes = plan.nbytes
        if nbytes > backend.limits.inline_nbytes:
            return None
        if self._scheduler.outages and self._scheduler.outages.first_up(prepared.routes, peer) != route:
            return None
        expensive = nbytes > ALWAYS_INLINE_NBYTES or self._inline_last_ns > QUEUEING_NS
        if expensive and self._inline_ns >= INLINE_BUDGET_NS:
            return None
        if self.transfers and not self._scheduler.idle(route, peer, urgency.traffic_class):
            return None
        started = time.perf_counter_ns()
        try:
            copied = backend.copy_now(op)
        except (BackendError, PeerLost) as error:
            self._inline_failed(prepared, route, error)
            return None
        if copied is False:
            return None
        spent = time.perf_counter_ns() - started
        if self._inline_ns == 0:
            self._inline_task = asyncio.current_task()
            self.loop.call_soon(self._reset_inline)
        self._inline_ns += spent + 10_000
        self._inline_last_ns = spent
        if copied is not True:
            return _Sent(copied, route)
        self.counts["inline"] += 1
        self.counts["done"] += 1
        self._count(plan, route, peer, op.put, urgency, spent * 1e-9)
        return TransferResult(nbytes, spent * 1e-9, 0.0, 1, route)

    def _reset_inline(self) -> None:
        self._inline_ns = 0
        self._inline_task = None

    def submit(
        self, prepared: PreparedTransfer, notify: bytes | None, urgency: Urgency, after: object, check: Check | None = None
    ) -> Transfer:
        """Hand a transfer to the scheduler, which starts it at the end of this loop iteration, or when `after` is reached."""
        payload = None if notify is None else check_payload(notify)
        reached = None if after is None else self.streams.reached(after)
        plan = prepared.plan
        record = TransferRecord(
            next(self._transfer_ids),
            plan,
            prepared.pieces,
            prepared.routes,
            plan.dst.peer or plan.src.peer,
            plan.dst.peer is not None,
            *urgency,
            check=check,
        )
        transfer = Transfer(self, record, payload)
        if self.observers.submitted is not None:
            self.observers.submitted(record)
        self.transfers[record.id] = transfer
        for side in (plan.src, plan.dst):
            for region in side.regions:
                region.hold()
        if actions := self._scheduler.submit(record, self.loop.time(), start=False, hold=reached is not None):
            self._carry_out(actions)
        if reached is not None:
            transfer._after = reached
            reached.add_done_callback(partial(self._reached, record.id))
            return transfer
        self._dispatch_soon()
        return transfer

    def _reached(self, transfer_id: int, after: asyncio.Future[Any]) -> None:
        """Let a transfer go whose point is reached, or fail it with the reason why the point never will be."""
        error: BaseException | None
        if after.cancelled():
            error = asyncio.CancelledError("it was cancelled")
        else:
            error = after.exception()
        transfer = self.transfers.get(transfer_id)
        if transfer is None:
            return
        transfer._after = None
        if transfer.state is not TransferState.QUEUED:
            return
        now = self.loop.time()
        if error is None:
            if self.observers.reached is not None:
                self.observers.reached(transfer._record)
            self._carry_out(self._scheduler.release(transfer_id, now))
            self._dispatch_soon()
            return
        wrapped = TransferError(f"what transfer {transfer_id} waited for failed: {type(error).__name__}: {error}")
        wrapped.__cause__ = error
        self._carry_out(self._scheduler.refuse(transfer_id, wrapped, now))

    def _dispatch_soon(self) -> None:
        if not self._dispatching:
            # At the end of the iteration, so that what is submitted together is batched together.
            self._dispatching = True
            self.loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        self._carry_out(self._scheduler.dispatch(self.loop.time()))

    def cancel(self, transfer_id: int) -> None:
        """Cancel a transfer; it resolves when its ops are quiet."""
        self._carry_out(self._scheduler.cancel(transfer_id, self.loop.time()))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(name, op):
                    if self._backends[name].reports:
                        op.report = partial(self._part_settled, op)
                    if self.observers.started is not None:
                        self.observers.started(name, op)
                    task = self.loop.create_task(self._backends[name].copy(op))
                    self._ops[op.id] = task
                    task.add_done_callback(partial(self._op_ended, name, op))
                case Stop(op_id):
                    if (running := self._ops.get(op_id)) is not None:
                        running.cancel()
                case Verify(op_id, record):
                    task = self.loop.create_task(self.verifier.verify(record.plan, record.check))
                    self._ops[op_id] = task
                    task.add_done_callback(partial(self._verified, op_id, record))
                case Finish(record):
                    self._finish(record)
                case Lost(outage) if outage.peer in self._membership.peers:
                    self._revival.begin(outage)
                case Lost(outage):
                    # Ops with a peer that is gone end after it. Who comes under its name is no worse for that.
                    self._scheduler.outages.end(outage.backend, outage.peer)
        wakeup = self._scheduler.next_wakeup()
        if wakeup is not None and (self._timer is None or self._timer.cancelled() or self._timer.when() > wakeup):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(wakeup, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._carry_out(self._scheduler.tick(self.loop.time()))

    def _op_ended(self, name: str, op: Op, task: asyncio.Task[None]) -> None:
        del self._ops[op.id]
        now = self.loop.time()
        told = op.id in self._told
        self._told.discard(op.id)
        if task.cancelled():
            error: BaseException | None = BackendError(f"{name}: the op was cancelled", backend=name, peer=op.peer)
        else:
            error = task.exception()
        if self._unquiet:
            self.loop.call_soon(self._release_quiet)
        if self.observers.ended is not None:
            self.observers.ended(name, op, error)
        if error is None:
            if not told:
                self._reported(op, 0, op.nbytes, None)
            self._carry_out(self._scheduler.op_done(op.id, now))
        else:
            if not isinstance(error, NixlError):
                wrapped = BackendError(f"{name}: {type(error).__name__}: {error}", backend=name, peer=op.peer)
                wrapped.__cause__ = error
                error = wrapped
            if isinstance(error, PartsFailed) and (transfer := self.transfers.get(op.parts[0][0])) is not None:
                error.parts = dict(transfer._errors or {})
            # Parts that have been told of cannot be taken back by another attempt.
            self._carry_out(self._scheduler.op_failed(op.id, error, now, final=told))

    def _verified(self, op_id: int, record: TransferRecord, task: asyncio.Task[None]) -> None:
        del self._ops[op_id]
        error: BaseException | None
        if task.cancelled():
            error = BackendError("the comparison was cancelled")
        else:
            error = task.exception()
        if error is not None and not isinstance(error, NixlError):
            wrapped = BackendError(f"the comparison failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        if isinstance(error, TransferError):
            error.backend = error.backend or record.routes[0]
        self._carry_out(self._scheduler.verified(op_id, error, self.loop.time()))

    def _part_settled(self, op: Op, first: int, count: int, error: TransferError | None) -> None:
        self._told.add(op.id)
        self._reported(op, first, count, error)

    def _reported(self, op: Op, first: int, count: int, error: TransferError | None) -> None:
        """Tell the transfers that share an op of the bytes of it that are settled."""
        at = 0
        for transfer_id, start, nbytes in op.parts:
            low, high = max(first, at), min(first + count, at + nbytes)
            if low < high and (transfer := self.transfers.get(transfer_id)) is not None:
                transfer._progress(start + low - at, high - low, error)
            at += nbytes

    def classes(self) -> dict[str, ClassCount]:
        """Return what became of each traffic class's transfers."""
        return {traffic_class.value: count for traffic_class, count in self._scheduler.counts().items()}

    def add_backend(self, name: str, backend: Backend) -> None:
        """Take one more backend."""
        self._scheduler.add_backend(name, backend.limits)

    def _finish(self, record: TransferRecord) -> None:
        transfer = self.transfers[record.id]
        if transfer._after is not None:
            transfer._after.cancel()
        if self.observers.finished is not None:
            self.observers.finished(record)
        error = record.error
        if isinstance(error, TransferError):
            error.transfer_id = error.transfer_id or record.id
            error.peer = error.peer or record.peer
            error.history = record.history
        if kept := _let_go(record.plan, error, quiet=not record.ops):
            self._unquiet.append((record, kept))
        if record.state is TransferState.DONE:
            self.counts["done"] += 1
            if transfer.notify is not None:
                target = _target(record.plan, self._name)
                trace = b"" if self.observers.trace is None else self.observers.trace(record)
                if not self._membership.notify_nowait(target, transfer.notify, trace):
                    task = self.loop.create_task(self._notify_then_resolve(transfer, target, transfer.notify, trace))
                    self._notifying.add(task)
                    task.add_done_callback(self._notifying.discard)
                    return
        else:
            self.counts["failed" if record.state is TransferState.FAILED else "cancelled"] += 1
            if error is not None:
                self._membership.counters.failed(error)
                self._membership.counters.quarantines += isinstance(error, Quarantined)
        self._resolve(transfer)

    async def _notify_then_resolve(self, transfer: Transfer, target: str, payload: bytes, trace: bytes) -> None:
        try:
            await self._membership.notify(target, payload, trace)
        except NixlError as error:
            transfer._record.error = error
        finally:
            self._resolve(transfer)

    def _resolve(self, transfer: Transfer) -> None:
        del self.transfers[transfer.id]
        if self.observers.resolved is not None:
            self.observers.resolved(transfer._record)
        transfer._resolve()
        self._tell_quiet()

    def _release_quiet(self) -> None:
        """Let go of the peers' memory that quarantined transfers used, where their ops have ended after all."""
        for ended in [one for one in self._unquiet if not one[0].ops]:
            self._unquiet.remove(ended)
            for region in ended[1]:
                region.release()

    # What the membership reports.

    def route_lost(self, backend: str, peer: str, reason: str) -> None:
        """Send nothing more by a route until it is back."""
        self._carry_out(self._scheduler.route_lost(backend, peer, reason, self.loop.time()))

    def _route_back(self, backend: str, peer: str) -> None:
        self._carry_out(self._scheduler.route_back(backend, peer, self.loop.time()))

    def outages(self, peer: str | None) -> dict[str, Outage]:
        """Return the routes to a peer that are down."""
        return self._scheduler.outages.of(peer)

    def resent(self) -> dict[str, int]:
        """Return how often something was sent again by the same route, moved to another, and a route was lost."""
        scheduler = self._scheduler
        return {"retries": scheduler.retries, "failovers": scheduler.failovers, "routes_lost": scheduler.outages.era}

    def abort(self, region: Region, error: Callable[[], TransferError]) -> None:
        """Fail every transfer that touches a region, each with an error of its own."""
        for transfer in list(self.transfers.values()):
            plan = transfer._record.plan
            if region in plan.src.regions or region in plan.dst.regions:
                self._carry_out(self._scheduler.abort(transfer.id, error(), self.loop.time()))
        for begun, plan in list(self._begun.items()):
            if region in plan.src.regions or region in plan.dst.regions:
                begun.stop()

    def peer_gone(self, name: str, error: PeerLost) -> None:
        """Fail every transfer with a peer."""
        self._revival.forget(name)
        self._carry_out(self._scheduler.peer_lost(name, error, self.loop.time()))

    async def peer_quiet(self, name: str) -> None:
        """Wait until no transfer with a peer is left."""
        while any(transfer._record.peer == name for transfer in self.transfers.values()):
            await self._next_end()
        await self._revival.quiet(name)

    async def _next_end(self) -> None:
        waiter = self.loop.create_future()
        self._quiet.append(waiter)
        await waiter

    def _tell_quiet(self) -> None:
        waiting, self._quiet = self._quiet, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)


def _let_go(plan: Plan, error: BaseException | None, *, quiet: bool = True) -> list[Region]:
    """Give back the regions of a transfer that has ended, or keep from everybody those that `error` says may not be quiet.

    Return the peer's among those, which are still held, if ops have not ended (`quiet` is False).
    """
    quarantined = error if isinstance(error, Quarantined) and error.local else None
    kept: list[Region] = []
    for side in (plan.src, plan.dst):
        for region in side.regions:
            moves = quarantined is not None and (quarantined.moving is None or region in quarantined.moving)
            if moves and isinstance(region, MemoryRegion | FileRegion):
                region.quarantined = True
            elif moves and not quiet:
                kept.append(region)
            else:
                region.release()
    return kept


async def _settled(transfer: Transfer) -> None:
    while not transfer.done():
        await transfer._end()


def _target(plan: Plan, own: str) -> str:
    return plan.dst.peer or plan.src.peer or own


def check_payload(payload: bytes) -> bytes:
    """Return a notification's payload as bytes."""
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise TypeError(f"a notification is bytes, not {type(payload).__name__}")
    return bytes(payload)

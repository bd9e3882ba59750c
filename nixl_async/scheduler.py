"""Decides what moves when. Pure: events in, actions out; time is an argument; no asyncio, no I/O, no threads.

The agent reports events (`submit`, `op_done`, `op_failed`, `cancel`, `route_lost`, `route_back`, `peer_lost`, `tick`) and carries
out the actions that come back, in order. The scheduler owns admission (ops and bytes in flight per backend and peer), the order
within and between classes and peers, batching of small transfers to one peer, retry with back-off, moving to the next route, and
drain limits.

Nothing is sent again that could still land: an op is reported as failed only when it is quiet, with `Quarantined` if it may never
be, and then its transfers fail. So what is sent again is sent while source and destination belong to the transfer, and nothing of
an earlier attempt comes after the transfer's end.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from nixl_async.backend import Limits, Op
from nixl_async.counters import TX, Traffic, direction
from nixl_async.descriptors import Plan, concatenate
from nixl_async.errors import PeerLost, Quarantined, TransferError
from nixl_async.outages import Outage, Outages
from nixl_async.queues import BackendQueue, ClassQueue, Lane, Part, Peer, leave, read_shares
from nixl_async.repeating import Repeat, repeats
from nixl_async.transfer import TrafficClass, TransferEvent, TransferRecord, TransferState

BACKOFF_SECONDS = 0.01
"""How long the first retry waits on average; each one after it waits twice as long as the one before."""
STRANDED_SECONDS = 5.0
"""How long a transfer waits for a route while all that it could take are down: by then a peer that is gone is known to be lost."""
VERIFY_DRAIN_SECONDS = 5.0
"""How long a comparison that is stopped may still read memory before that is quarantined."""


@dataclass(slots=True)
class Start:
    """Give `op` to `backend`."""

    backend: str
    op: Op


@dataclass(slots=True)
class Stop:
    """Cancel the op; its end is still reported by `op_failed` or `op_done`."""

    op_id: int


@dataclass(slots=True)
class Verify:
    """Compare both sides of a transfer whose bytes are in place, as an op of it; its end is reported by `verified`."""

    op_id: int
    record: TransferRecord


@dataclass(slots=True)
class Finish:
    """Resolve the transfer: its record is final."""

    record: TransferRecord


@dataclass(slots=True)
class Lost:
    """A route is down: find out when it can be used again, and report that by `route_back`."""

    outage: Outage


Action: TypeAlias = Start | Stop | Verify | Finish | Lost


class ClassCount(NamedTuple):
    """What became of a class's transfers: how many are not final, how many are DONE, of those how many after their deadline.

    `nbytes`: the bytes of ops that succeeded, those of transfers that are not DONE included.
    """

    live: int
    done: int
    late: int
    nbytes: int


@dataclass(slots=True)
class _Count:
    live: int = 0
    done: int = 0
    late: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class _Flight:
    op: Op
    backend: BackendQueue
    queue: ClassQueue
    peer: Peer
    parts: list[Part]
    era: int


class Scheduler:
    """Holds every transfer that is not final. `limits` maps backend names to what they want in flight at most.

    `shares`: how many bytes each class gets for each of the others' while all have work; those left out keep the default.
    `chance` returns a number from 0 to 1 by which back-offs are drawn from half to one and a half times their length.
    `retries` counts pieces sent again by the same route, `failovers` transfers that moved to another one while they were waiting;
    `draining` is how many transfers are; `traffic` counts what is moved.

    Raises:
        ConfigurationError: a share is not a positive number.
    """

    def __init__(
        self,
        limits: Mapping[str, Limits],
        shares: Mapping[TrafficClass, float] | None = None,
        chance: Callable[[], float] = lambda: 0.5,
        traffic: Traffic | None = None,
    ) -> None:
        self.retries = self.failovers = self.draining = 0
        self.traffic = Traffic() if traffic is None else traffic
        self.outages = Outages()
        self._chance = chance
        self._shares = read_shares(shares)
        self._backends = {name: BackendQueue(name, limit, self._shares) for name, limit in limits.items()}
        self._records: dict[int, TransferRecord] = {}
        self._by_peer: dict[str | None, dict[int, TransferRecord]] = {}
        self._held: set[int] = set()
        self._flights: dict[int, _Flight] = {}
        self._verifying: dict[int, TransferRecord] = {}
        self._retries: list[tuple[float, int, TransferRecord, int, Plan]] = []
        self._drains: list[tuple[float, int, TransferRecord]] = []
        # Transfers that no route is up for, and until when they wait.
        self._stranded: dict[int, tuple[float, TransferRecord]] = {}
        self._strandings: list[tuple[float, int]] = []
        self._sequence = itertools.count()
        self._op_ids = itertools.count(1)
        self._actions: list[Action] = []
        self._counts = {traffic_class: _Count() for traffic_class in TrafficClass}

    def add_backend(self, name: str, limits: Limits) -> None:
        """Take one more backend."""
        self._backends[name] = BackendQueue(name, limits, self._shares)

    # Events. Each returns the actions that follow, in order.

    def submit(self, record: TransferRecord, now: float, *, start: bool = True, hold: bool = False) -> list[Action]:
        """Accept a QUEUED transfer whose plan has been checked.

        With `start=False` it waits for `dispatch` or another event; with `hold=True` for `release` or `refuse`.
        """
        record.submitted = now
        self._records[record.id] = record
        peers = self._by_peer.get(record.peer)
        if peers is None:
            peers = self._by_peer[record.peer] = {}
        peers[record.id] = record
        self._counts[record.traffic_class].live += 1
        if hold:
            self._held.add(record.id)
        else:
            self._accept(record, now)
            if start and not record.state.final:
                self._dispatch(self._backends[record.routes[0]], now)
        return self._take_actions()

    def release(self, transfer_id: int, now: float) -> list[Action]:
        """Let a held transfer wait for `dispatch` or another event; without effect when its outcome is decided."""
        if transfer_id in self._held:
            self._held.remove(transfer_id)
            self._accept(self._records[transfer_id], now)
        return self._take_actions()

    def refuse(self, transfer_id: int, error: BaseException, now: float) -> list[Action]:
        """Fail a held transfer; without effect when its outcome is decided."""
        if transfer_id in self._held:
            self._decide(self._records[transfer_id], error, now)
        return self._take_actions()

    def dispatch(self, now: float) -> list[Action]:
        """Start as much of what waits as there is room for."""
        for backend in self._backends.values():
            self._dispatch(backend, now)
        return self._take_actions()

    def op_done(self, op_id: int, now: float) -> list[Action]:
        """Take note that every byte of the op is in place."""
        flight = self._land(op_id, now)
        active, complete = TransferState.ACTIVE, TransferEvent.COMPLETE
        for record, _, plan in flight.parts:
            record.nbytes_done += plan.nbytes
            if record.retries:
                record.retries = 0
            if record.state is not active:
                self._drained(record, now)
            elif record.nbytes_done == record.plan.nbytes:
                if record.check is not None:
                    self._verify(record)
                    continue
                record.move(complete, now)
                self._finish(record, now)
        op, traffic_class = flight.op, flight.parts[0][0].traffic_class
        self._counts[traffic_class].nbytes += op.plan.nbytes
        way = TX if op.put else direction(op.plan, op.peer)
        self.traffic.of(flight.backend.name, op.peer, traffic_class, way).nbytes += op.plan.nbytes
        self._dispatch(flight.backend, now)
        return self._take_actions()

    def op_failed(self, op_id: int, error: BaseException, now: float, *, final: bool = False) -> list[Action]:
        """Take note that the op ended without completing and is quiet; retry, move to the next route, or abort.

        `final`: it must not be sent again, by no route. Neither is it after `Quarantined`: it may not be quiet.
        `PeerLost` says that the backend has lost the peer, not that the peer is gone: `peer_lost` tells that.
        """
        flight = self._land(op_id, now)
        if isinstance(error, PeerLost) and flight.op.peer is not None:
            self._route_lost(flight.backend.name, flight.op.peer, str(error), now, flight.era)
        for record, start, plan in flight.parts:
            if record.state is not TransferState.ACTIVE:
                if isinstance(error, Quarantined) and record.state is TransferState.DRAINING:
                    error.__cause__, record.error = error.__cause__ or record.error, error
                self._drained(record, now)
            elif final or isinstance(error, Quarantined):
                self._decide(record, error, now)
            elif len(flight.parts) > 1 and not isinstance(error, PeerLost):
                record.solo = True
                self._requeue(record, [(start, plan)], now)
            else:
                self._piece_failed(record, start, plan, error, flight.backend.name, now)
        self._dispatch(flight.backend, now)
        return self._take_actions()

    def verified(self, op_id: int, error: BaseException | None, now: float) -> list[Action]:
        """Take note that the comparison has ended and is quiet: both sides are equal, or `error`."""
        record = self._verifying.pop(op_id)
        record.ops = ()
        if record.state is not TransferState.ACTIVE:
            self._drained(record, now)
        elif error is not None:
            self._decide(record, error, now)
        else:
            record.move(TransferEvent.COMPLETE, now)
            self._finish(record, now)
        return self._take_actions()

    def cancel(self, transfer_id: int, now: float) -> list[Action]:
        """Cancel a transfer; without effect when its outcome is decided."""
        record = self._records.get(transfer_id)
        if record is not None and record.state in (TransferState.QUEUED, TransferState.ACTIVE):
            record.cancel_requested = True
            self._decide(record, None, now)
        return self._take_actions()

    def route_lost(self, backend: str, peer: str, reason: str, now: float) -> list[Action]:
        """Take note that a backend has lost a peer: what waits for it moves to other routes, what comes takes them first.

        The ops that it has in flight towards the peer end by themselves.
        """
        self._route_lost(backend, peer, reason, now)
        return self._take_actions()

    def route_back(self, backend: str, peer: str, now: float) -> list[Action]:
        """Take note that a backend reaches a peer again."""
        if self.outages.end(backend, peer):
            for _, record in list(self._stranded.values()):
                if record.peer == peer and backend in record.routes:
                    self._requeue(record, [], now)
        return self._take_actions()

    def abort(self, transfer_id: int, error: TransferError, now: float) -> list[Action]:
        """Fail a transfer; without effect when its outcome is decided."""
        record = self._records.get(transfer_id)
        if record is not None and record.state in (TransferState.QUEUED, TransferState.ACTIVE):
            self._decide(record, error, now)
        return self._take_actions()

    def peer_lost(self, peer: str, error: TransferError, now: float) -> list[Action]:
        """Fail every transfer to or from `peer`."""
        self.outages.forget(peer)
        for record in list(self._by_peer.get(peer, {}).values()):
            if record.state in (TransferState.QUEUED, TransferState.ACTIVE):
                self._decide(record, error, now)
        for backend in self._backends.values():
            backend.forget(peer)
        return self._take_actions()

    def tick(self, now: float) -> list[Action]:
        """Do what has become due: retries, and quarantine of what has not become quiet within its limit."""
        while self._retries and self._retries[0][0] <= now:
            _, _, record, start, plan = heapq.heappop(self._retries)
            if record.state is TransferState.ACTIVE:
                self._requeue(record, [(start, plan)], now)
        while self._drains and self._drains[0][0] <= now:
            limit, _, record = heapq.heappop(self._drains)
            if record.state is TransferState.DRAINING and record.id in self._records:
                self._quarantine(record, limit, now)
        while self._strandings and self._strandings[0][0] <= now:
            limit, number = heapq.heappop(self._strandings)
            if number in self._stranded and self._stranded[number][0] == limit:
                record = self._stranded[number][1]
                assert record.stranded is not None
                self._give_up(record, record.stranded, now)
        return self._take_actions()

    def next_wakeup(self) -> float | None:
        """Return when `tick` must be called at the latest, `None` if nothing is due ever."""
        self._drains = self._drop_settled(self._drains)
        while self._strandings and self._stranded.get(self._strandings[0][1], (None,))[0] != self._strandings[0][0]:
            heapq.heappop(self._strandings)
        due = [queue[0][0] for queue in (self._retries, self._drains, self._strandings) if queue]
        return min(due) if due else None

    def copied(self, traffic_class: TrafficClass, nbytes: int, *, late: bool) -> None:
        """Count a transfer that was copied at once, without waiting here."""
        count = self._counts[traffic_class]
        count.done += 1
        count.nbytes += nbytes
        count.late += late

    # Questions.

    def idle(self, backend: str, peer: str | None, traffic_class: TrafficClass = TrafficClass.NORMAL) -> bool:
        """Return whether nothing as urgent waits for `backend` towards `peer`, so that a small copy may be made at once."""
        return self._backends[backend].idle(peer, traffic_class)

    def counts(self) -> dict[TrafficClass, ClassCount]:
        """Return what became of each class's transfers."""
        return {name: ClassCount(one.live, one.done, one.late, one.nbytes) for name, one in self._counts.items()}

    def live(self) -> list[TransferRecord]:
        """Return the transfers that are not final."""
        return list(self._records.values())

    def in_flight(self, backend: str) -> tuple[int, int]:
        """Return the ops and bytes that `backend` has in flight."""
        queue = self._backends[backend]
        return queue.ops, queue.nbytes

    def queues(self) -> list[BackendQueue]:
        """Return what waits for each backend and what it has in flight."""
        return list(self._backends.values())

    # The machine.

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _accept(self, record: TransferRecord, now: float) -> None:
        if record.plan.nbytes:
            if self.outages and self.outages.first_up(record.routes, record.peer) != record.routes[0]:
                self._requeue(record, [], now, began=False)
            else:
                self._backends[record.routes[0]].push(record, now)
            return
        record.started = now
        record.move(TransferEvent.ADMIT, now)
        record.move(TransferEvent.COMPLETE, now)
        self._finish(record, now)

    def _dispatch(self, backend: BackendQueue, now: float) -> None:
        while (turn := backend.next(now)) is not None:
            self._start(backend, turn.lane, backend.take(turn), now)

    def _start(self, backend: BackendQueue, lane: Lane, parts: list[Part], now: float) -> None:
        first = parts[0][0]
        op_id = next(self._op_ids)
        if len(parts) == 1:
            plan = parts[0][2]
        else:
            plan = concatenate([piece for _, _, piece in parts])
        listed = tuple([(record.id, start, piece.nbytes) for record, start, piece in parts])
        op = Op(op_id, plan, first.peer, first.put, listed)
        queued, admit = TransferState.QUEUED, TransferEvent.ADMIT
        for record, _, _ in parts:
            if record.state is queued:
                record.started = now
                record.move(admit, now)
            record.ops = (*record.ops, op_id) if record.ops else (op_id,)
            record.attempts += 1
        self._flights[op_id] = _Flight(op, backend, lane.ring.queue, lane.peer, parts, self.outages.era)
        self._actions.append(Start(backend.name, op))

    def _land(self, op_id: int, now: float) -> _Flight:
        flight = self._flights.pop(op_id)
        flight.backend.land(flight.queue, flight.peer, flight.op.plan.nbytes, now)
        for record, _, _ in flight.parts:
            record.ops = () if len(record.ops) == 1 else _without(record.ops, op_id)
        return flight

    def _route_lost(self, backend: str, peer: str, reason: str, now: float, era: int | None = None) -> None:
        outage = self.outages.begin(backend, peer, reason, now, era)
        if outage is None:
            return
        self._actions.append(Lost(outage))
        for record in list(self._by_peer.get(peer, {}).values()):
            if record.routes[0] == backend and record.waits_in is not None:
                self._requeue(record, [], now)

    def _verify(self, record: TransferRecord) -> None:
        op_id = next(self._op_ids)
        record.ops = (op_id,)
        self._verifying[op_id] = record
        self._actions.append(Verify(op_id, record))

    def _piece_failed(
        self, record: TransferRecord, start: int, plan: Plan, error: BaseException, backend: str, now: float
    ) -> None:
        if backend not in record.tried:
            record.tried = (*record.tried, backend)
        for way in repeats(error, len(record.routes), record.retries):
            match way:
                case Repeat.CONNECTED if isinstance(error, PeerLost):
                    record.retries += 1
                    self._again(record, start, plan, now, error)
                    return
                case Repeat.LATER:
                    delay = BACKOFF_SECONDS * 2**record.retries * (0.5 + self._chance())
                    if record.deadline is not None and now + delay > record.deadline:
                        continue
                    record.retries += 1
                    record.resent += 1
                    self.retries += 1
                    heapq.heappush(self._retries, (now + delay, next(self._sequence), record, start, plan))
                    return
                case Repeat.ELSEWHERE:
                    if record.routes[0] == backend:
                        record.routes = record.routes[1:]
                        self.failovers += 1
                    record.resent += 1
                    self._requeue(record, [(start, plan)], now)
                    return
        self._give_up(record, error, now)

    def _again(self, record: TransferRecord, start: int, plan: Plan, now: float, error: PeerLost) -> None:
        """Send a piece again whose route has lost the peer: by another route, by the same if it is back, or when one is."""
        route = record.routes[0]
        if (
            self.outages.first_up(record.routes, record.peer) is None
            and record.deadline is not None
            and now >= record.deadline
        ):
            self._give_up(record, error, now)
            return
        record.resent += 1
        self._requeue(record, [(start, plan)], now, error=error)
        self.retries += record.routes[0] == route

    def _requeue(
        self,
        record: TransferRecord,
        pieces: list[tuple[int, Plan]],
        now: float,
        *,
        error: PeerLost | None = None,
        began: bool = True,
    ) -> None:
        """Let pieces wait again, in front, for the first route that is up; all that waits is cut to what that one takes."""
        route = self.outages.first_up(record.routes, record.peer) if self.outages else record.routes[0]
        left = [*pieces, *record.drop_unsent()]
        if route is None:
            record.again = left
            record.again.reverse()
            self._strand(record, error, now)
            return
        self._stranded.pop(record.id, None)
        record.stranded = None
        if route != record.routes[0]:
            at = record.routes.index(route)
            record.routes = (route, *record.routes[at + 1 :], *record.routes[:at])
            self.failovers += began
        backend = self._backends[route]
        record.again = list(_cut(left, backend.limits))
        record.again.reverse()
        if record.again:
            backend.push(record, now, front=began)
        self._dispatch(backend, now)

    def _strand(self, record: TransferRecord, error: PeerLost | None, now: float) -> None:
        """Let a transfer wait until a route is up, for a while."""
        leave(record)
        if record.id in self._stranded:
            return
        if error is None:
            outage = self.outages.of(record.peer)[record.routes[0]]
            error = PeerLost(f"all routes to peer {record.peer!r} are down: {outage.reason}", backend=outage.backend)
        limit = now + STRANDED_SECONDS
        if record.deadline is not None:
            limit = max(now, min(limit, record.deadline))
        record.stranded = error
        self._stranded[record.id] = limit, record
        heapq.heappush(self._strandings, (limit, record.id))

    def _give_up(self, record: TransferRecord, error: BaseException, now: float) -> None:
        """Fail a transfer for what its last attempt met."""
        if isinstance(error, TransferError):
            error.resent = record.resent
            error.seconds = now - record.submitted
            error.tried = record.tried
        self._decide(record, error, now)

    def _decide(self, record: TransferRecord, error: BaseException | None, now: float) -> None:
        """Settle the outcome: `error`, or cancelled when it is None; stop what is in flight."""
        record.error = error
        record.drop_unsent()
        leave(record)
        if record.stranded is not None:
            del self._stranded[record.id]
            record.stranded = None
        if record.state is TransferState.QUEUED:
            record.move(TransferEvent.CANCEL if error is None else TransferEvent.REFUSE, now)
            self._finish(record, now)
            return
        record.move(TransferEvent.CANCEL if error is None else TransferEvent.ABORT, now)
        self.draining += 1
        if not record.ops:
            self._drained(record, now)
            return
        limit = 0.0
        for op_id in dict.fromkeys(record.ops):
            if op_id in self._verifying:
                # It may be reading back by the route's backend.
                limit = max(VERIFY_DRAIN_SECONDS, self._backends[record.routes[0]].limits.drain_seconds)
                self._actions.append(Stop(op_id))
                continue
            flight = self._flights[op_id]
            limit = max(limit, flight.backend.limits.drain_seconds)
            if all(part[0].state is TransferState.DRAINING for part in flight.parts):
                self._actions.append(Stop(op_id))
        heapq.heappush(self._drains, (now + limit, next(self._sequence), record))

    def _drained(self, record: TransferRecord, now: float) -> None:
        if record.state is TransferState.DRAINING and not record.ops:
            self.draining -= 1
            record.move(TransferEvent.DRAIN if record.error is not None else TransferEvent.DRAIN_CANCELLED, now)
            self._finish(record, now)

    def _quarantine(self, record: TransferRecord, limit: float, now: float) -> None:
        plan = record.plan
        # Pieces may be on their way by a route that is no longer the first.
        spared = plan.dst.peer is not None and all(
            op in self._flights and self._flights[op].backend.limits.frees_source for op in record.ops
        )
        moving = list(dict.fromkeys((*(() if spared else plan.src.regions), *plan.dst.regions)))
        error = Quarantined(
            f"transfer {record.id} did not become quiet within its drain limit; memory of"
            f" {sorted({region.name for region in moving})} is quarantined: do not reuse or free it",
            transfer_id=record.id,
            backend=record.routes[0],
            peer=record.peer,
            moving=moving,
        )
        error.__cause__ = record.error
        record.error = error
        self.draining -= 1
        record.move(TransferEvent.DRAIN, now)
        self._finish(record, now)

    def _finish(self, record: TransferRecord, now: float) -> None:
        record.finished = now
        if self._records.pop(record.id, None) is not None:
            peers = self._by_peer[record.peer]
            del peers[record.id]
            if not peers:
                del self._by_peer[record.peer]
        if self._held:
            self._held.discard(record.id)
        count = self._counts[record.traffic_class]
        count.live -= 1
        if record.state is TransferState.DONE:
            count.done += 1
            way = TX if record.put else direction(record.plan, record.peer)
            self.traffic.of(record.routes[0], record.peer, record.traffic_class, way).transfers += 1
            if record.deadline is not None and now > record.deadline:
                count.late += 1
        self._actions.append(Finish(record))

    def _drop_settled(self, drains: list[tuple[float, int, TransferRecord]]) -> list[tuple[float, int, TransferRecord]]:
        while drains and drains[0][2].state is not TransferState.DRAINING:
            heapq.heappop(drains)
        return drains

    def check(self) -> None:
        """Assert the invariants that hold between events; for tests and for debugging."""
        ops: dict[int, list[int]] = {}
        for flight in self._flights.values():
            for record, _, _ in flight.parts:
                ops.setdefault(record.id, []).append(flight.op.id)
        for op_id, record in self._verifying.items():
            assert op_id not in self._flights, record
            ops.setdefault(record.id, []).append(op_id)
        for record in self._records.values():
            state = record.state
            assert not state.final, record
            assert sorted(record.ops) == sorted(ops.get(record.id, [])), record
            assert not record.ops or state in (TransferState.ACTIVE, TransferState.DRAINING), record
            assert state is not TransferState.DRAINING or record.ops, record
            waits = state is not TransferState.DRAINING and record.id not in self._held and record.peek() is not None
            assert (record.stranded is not None) == (record.id in self._stranded), record
            if record.stranded is not None:
                assert waits, record
                assert self.outages.first_up(record.routes, record.peer) is None, record
                waits = False
            assert (record.waits_in is not None) == waits, record
            assert self._by_peer[record.peer][record.id] is record
        assert self.draining == sum(record.state is TransferState.DRAINING for record in self._records.values())
        assert sum(map(len, self._by_peer.values())) == len(self._records) == sum(c.live for c in self._counts.values())
        for backend in self._backends.values():
            mine = [flight for flight in self._flights.values() if flight.backend is backend]
            backend.check([(flight.queue, flight.peer, flight.op.nbytes) for flight in mine], self._records.values())


def _without(ops: tuple[int, ...], op_id: int) -> tuple[int, ...]:
    at = ops.index(op_id)
    return ops[:at] + ops[at + 1 :]


def _cut(pieces: Iterable[tuple[int, Plan]], limits: Limits) -> Iterable[tuple[int, Plan]]:
    for first, plan in pieces:
        start = first
        for piece in plan.split(limits.max_op_nbytes, limits.max_op_segments):
            yield start, piece
            start += piece.nbytes

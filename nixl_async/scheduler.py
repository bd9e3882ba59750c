"""Decides what moves when. Pure: events in, actions out; time is an argument; no asyncio, no I/O, no threads.

The agent reports events (`submit`, `op_done`, `op_failed`, `cancel`, `peer_lost`, `tick`) and carries out the actions that
come back, in order. The scheduler owns admission (ops and bytes in flight per backend and peer), the order within and between
classes and peers, batching of small transfers to one peer, retry with back-off, moving to the next route, and drain limits.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from nixl_async.backend import Limits, Op
from nixl_async.descriptors import Plan, concatenate
from nixl_async.errors import BackendError, PeerLost, Quarantined, TransferError
from nixl_async.queues import BackendQueue, ClassQueue, Lane, Part, Peer, leave, read_shares
from nixl_async.transfer import TrafficClass, TransferEvent, TransferRecord, TransferState

MAX_RETRIES = 3
BACKOFF_SECONDS = 0.01


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
class Finish:
    """Resolve the transfer: its record is final."""

    record: TransferRecord


Action: TypeAlias = Start | Stop | Finish


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


class Scheduler:
    """Holds every transfer that is not final. `limits` maps backend names to what they want in flight at most.

    `shares`: how many bytes each class gets for each of the others' while all have work; those left out keep the default.

    Raises:
        ConfigurationError: a share is not a positive number.
    """

    def __init__(self, limits: Mapping[str, Limits], shares: Mapping[TrafficClass, float] | None = None) -> None:
        self._shares = read_shares(shares)
        self._backends = {name: BackendQueue(name, limit, self._shares) for name, limit in limits.items()}
        self._records: dict[int, TransferRecord] = {}
        self._by_peer: dict[str | None, dict[int, TransferRecord]] = {}
        self._held: set[int] = set()
        self._flights: dict[int, _Flight] = {}
        self._retries: list[tuple[float, int, TransferRecord, int, Plan]] = []
        self._drains: list[tuple[float, int, TransferRecord]] = []
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
            if record.state is not active:
                self._drained(record, now)
            elif record.nbytes_done == record.plan.nbytes:
                record.move(complete, now)
                self._finish(record, now)
        self._counts[flight.parts[0][0].traffic_class].nbytes += flight.op.plan.nbytes
        self._dispatch(flight.backend, now)
        return self._take_actions()

    def op_failed(self, op_id: int, error: BaseException, now: float, *, final: bool = False) -> list[Action]:
        """Take note that the op ended without completing and is quiet; retry, move to the next route, or abort.

        `final`: it must not be sent again, by no route.
        """
        flight = self._land(op_id, now)
        for record, start, plan in flight.parts:
            if record.state is not TransferState.ACTIVE:
                self._drained(record, now)
            elif final:
                self._decide(record, error, now)
            elif len(flight.parts) > 1 and not isinstance(error, PeerLost):
                record.solo = True
                self._requeue(record, [(start, plan)], now)
            else:
                self._piece_failed(record, start, plan, error, flight.backend.name, now)
        self._dispatch(flight.backend, now)
        return self._take_actions()

    def cancel(self, transfer_id: int, now: float) -> list[Action]:
        """Cancel a transfer; without effect when its outcome is decided."""
        record = self._records.get(transfer_id)
        if record is not None and record.state in (TransferState.QUEUED, TransferState.ACTIVE):
            record.cancel_requested = True
            self._decide(record, None, now)
        return self._take_actions()

    def peer_lost(self, peer: str, error: TransferError, now: float) -> list[Action]:
        """Fail every transfer to or from `peer`."""
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
        return self._take_actions()

    def next_wakeup(self) -> float | None:
        """Return when `tick` must be called at the latest, `None` if nothing is due ever."""
        self._drains = self._drop_settled(self._drains)
        due = [queue[0][0] for queue in (self._retries, self._drains) if queue]
        return min(due) if due else None

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

    # The machine.

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _accept(self, record: TransferRecord, now: float) -> None:
        if record.plan.nbytes:
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
        self._flights[op_id] = _Flight(op, backend, lane.ring.queue, lane.peer, parts)
        self._actions.append(Start(backend.name, op))

    def _land(self, op_id: int, now: float) -> _Flight:
        flight = self._flights.pop(op_id)
        flight.backend.land(flight.queue, flight.peer, flight.op.plan.nbytes, now)
        for record, _, _ in flight.parts:
            record.ops = () if len(record.ops) == 1 else _without(record.ops, op_id)
        return flight

    def _piece_failed(
        self, record: TransferRecord, start: int, plan: Plan, error: BaseException, backend: str, now: float
    ) -> None:
        if isinstance(error, TransferError) and error.retryable and record.retries < MAX_RETRIES:
            delay = BACKOFF_SECONDS * 2**record.retries
            record.retries += 1
            heapq.heappush(self._retries, (now + delay, next(self._sequence), record, start, plan))
            return
        if len(record.routes) > 1 and isinstance(error, BackendError):
            if record.routes[0] == backend:
                record.routes = record.routes[1:]
            self._requeue(record, [(start, plan)], now)
            return
        self._decide(record, error, now)

    def _requeue(self, record: TransferRecord, pieces: list[tuple[int, Plan]], now: float) -> None:
        """Let pieces wait again, in front; all that waits is cut to what the record's route takes, which may have changed."""
        backend = self._backends[record.routes[0]]
        record.again = list(_cut([*pieces, *record.drop_unsent()], backend.limits))
        record.again.reverse()
        backend.push(record, now, front=True)
        self._dispatch(backend, now)

    def _decide(self, record: TransferRecord, error: BaseException | None, now: float) -> None:
        """Settle the outcome: `error`, or cancelled when it is None; stop what is in flight."""
        record.error = error
        record.drop_unsent()
        leave(record)
        if record.state is TransferState.QUEUED:
            record.move(TransferEvent.CANCEL if error is None else TransferEvent.REFUSE, now)
            self._finish(record, now)
            return
        record.move(TransferEvent.CANCEL if error is None else TransferEvent.ABORT, now)
        if not record.ops:
            self._drained(record, now)
            return
        limit = 0.0
        for op_id in dict.fromkeys(record.ops):
            flight = self._flights[op_id]
            limit = max(limit, flight.backend.limits.drain_seconds)
            if all(part[0].state is TransferState.DRAINING for part in flight.parts):
                self._actions.append(Stop(op_id))
        heapq.heappush(self._drains, (now + limit, next(self._sequence), record))

    def _drained(self, record: TransferRecord, now: float) -> None:
        if record.state is TransferState.DRAINING and not record.ops:
            record.move(TransferEvent.DRAIN if record.error is not None else TransferEvent.DRAIN_CANCELLED, now)
            self._finish(record, now)

    def _quarantine(self, record: TransferRecord, limit: float, now: float) -> None:
        regions = {region.name for side in (record.plan.src, record.plan.dst) for region in side.regions}
        error = Quarantined(
            f"transfer {record.id} did not become quiet within its drain limit; memory of {sorted(regions)} is quarantined:"
            " do not reuse or free it",
            transfer_id=record.id,
            backend=record.routes[0],
            peer=record.peer,
        )
        error.__cause__ = record.error
        record.error = error
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
        for record in self._records.values():
            state = record.state
            assert not state.final, record
            assert sorted(record.ops) == sorted(ops.get(record.id, [])), record
            assert not record.ops or state in (TransferState.ACTIVE, TransferState.DRAINING), record
            assert state is not TransferState.DRAINING or record.ops, record
            waits = state is not TransferState.DRAINING and record.id not in self._held and record.peek() is not None
            assert (record.waits_in is not None) == waits, record
            assert self._by_peer[record.peer][record.id] is record
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

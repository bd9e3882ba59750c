"""Decides what moves when. Pure: events in, actions out; time is an argument; no asyncio, no I/O, no threads.

The agent reports events (`submit`, `op_done`, `op_failed`, `cancel`, `peer_lost`, `tick`) and carries out the actions that
come back, in order. The scheduler owns admission (ops and bytes in flight per backend), the order within and between
peers, batching of small transfers to one peer, retry with back-off, moving to the next route, and drain limits.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from nixl_async.backend import Limits, Op
from nixl_async.descriptors import Plan, concatenate
from nixl_async.errors import BackendError, PeerLost, Quarantined, TransferError
from nixl_async.transfer import TransferEvent, TransferRecord, TransferState

BATCH_NBYTES = 256 << 10
"""Pieces up to this size may share an op with others to the same peer."""
BATCH_PARTS = 128
"""The most transfers that share one op; all of them end in one iteration of the loop."""
_SENDING = frozenset({TransferState.QUEUED, TransferState.ACTIVE})
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


@dataclass(slots=True)
class _Flight:
    op: Op
    backend: str
    parts: list[tuple[TransferRecord, int, Plan]]


@dataclass(slots=True)
class _Usage:
    ops: int = 0
    nbytes: int = 0


@dataclass(slots=True)
class _Lane:
    """The transfers waiting for one backend towards one peer, the most urgent first."""

    queues: dict[tuple[int, float], deque[TransferRecord]] = field(default_factory=dict)
    urgency: list[tuple[int, float]] = field(default_factory=list)
    """The queues' keys, (negative priority, deadline), sorted."""

    def push(self, record: TransferRecord, *, front: bool = False) -> None:
        """Let a transfer wait behind those of its urgency, or in front of them."""
        key = (-record.priority, float("inf") if record.deadline is None else record.deadline)
        queue = self.queues.get(key)
        if queue is None:
            queue = self.queues[key] = deque()
            bisect.insort(self.urgency, key)
        if front:
            queue.appendleft(record)
        else:
            queue.append(record)

    def head(self) -> TransferRecord | None:
        """Return the transfer whose turn it is; forget those that have nothing left to send."""
        while self.urgency:
            queue = self.queues[self.urgency[0]]
            while queue:
                record = queue[0]
                if record.state in _SENDING and record.peek() is not None:
                    return record
                queue.popleft()
            del self.queues[self.urgency.pop(0)]
        return None


class Scheduler:
    """Holds every transfer that is not final. `limits` maps backend names to what they want in flight at most."""

    def __init__(self, limits: dict[str, Limits]) -> None:
        self._limits = limits
        self._usage = {name: _Usage() for name in limits}
        self._lanes: dict[str, dict[str | None, _Lane]] = {name: {} for name in limits}
        self._records: dict[int, TransferRecord] = {}
        self._flights: dict[int, _Flight] = {}
        self._retries: list[tuple[float, int, TransferRecord, int, Plan]] = []
        self._drains: list[tuple[float, int, TransferRecord]] = []
        self._sequence = itertools.count()
        self._op_ids = itertools.count(1)
        self._actions: list[Action] = []

    def add_backend(self, name: str, limits: Limits) -> None:
        """Take one more backend."""
        self._limits[name] = limits
        self._usage[name] = _Usage()
        self._lanes[name] = {}

    # Events. Each returns the actions that follow, in order.

    def submit(self, record: TransferRecord, now: float, *, start: bool = True) -> list[Action]:
        """Accept a QUEUED transfer whose plan has been checked; with `start=False` it waits for `dispatch` or another event."""
        record.submitted = now
        if record.plan.nbytes == 0:
            record.started = now
            record.move(TransferEvent.ADMIT, now)
            record.move(TransferEvent.COMPLETE, now)
            self._finish(record, now)
            return self._take_actions()
        self._records[record.id] = record
        self._queue(record)
        if start:
            self._dispatch(record.routes[0], now)
        return self._take_actions()

    def dispatch(self, now: float) -> list[Action]:
        """Start as much of what waits as there is room for."""
        for backend in self._lanes:
            self._dispatch(backend, now)
        return self._take_actions()

    def op_done(self, op_id: int, now: float) -> list[Action]:
        """Take note that every byte of the op is in place."""
        flight = self._land(op_id)
        for record, _, plan in flight.parts:
            record.in_flight -= 1
            record.nbytes_done += plan.nbytes
            if record.state is TransferState.ACTIVE and record.nbytes_done == record.plan.nbytes:
                record.move(TransferEvent.COMPLETE, now)
                self._finish(record, now)
            else:
                self._drained(record, now)
        self._dispatch(flight.backend, now)
        return self._take_actions()

    def op_failed(self, op_id: int, error: BaseException, now: float, *, final: bool = False) -> list[Action]:
        """Take note that the op ended without completing and is quiet; retry, move to the next route, or abort.

        `final`: it must not be sent again, by no route.
        """
        flight = self._land(op_id)
        for record, start, plan in flight.parts:
            record.in_flight -= 1
            if record.state is not TransferState.ACTIVE:
                self._drained(record, now)
            elif final:
                self._decide(record, error, now)
            elif len(flight.parts) > 1 and not isinstance(error, PeerLost):
                record.solo = True
                self._requeue(record, [(start, plan)], now)
            else:
                self._piece_failed(record, start, plan, error, flight.backend, now)
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
        for record in [r for r in self._records.values() if r.peer == peer]:
            if record.state in (TransferState.QUEUED, TransferState.ACTIVE):
                self._decide(record, error, now)
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

    def idle(self, backend: str, peer: str | None) -> bool:
        """Return whether nothing waits for `backend` towards `peer`, so that a small copy may be made at once."""
        lane = self._lanes[backend].get(peer)
        return lane is None or lane.head() is None

    def live(self) -> list[TransferRecord]:
        """Return the transfers that are not final."""
        return list(self._records.values())

    def in_flight(self, backend: str) -> tuple[int, int]:
        """Return the ops and bytes that `backend` has in flight."""
        usage = self._usage[backend]
        return usage.ops, usage.nbytes

    # The machine.

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def _queue(self, record: TransferRecord, *, front: bool = False) -> None:
        lanes = self._lanes[record.routes[0]]
        lane = lanes.get(record.peer)
        if lane is None:
            lane = lanes[record.peer] = _Lane()
        lane.push(record, front=front)

    def _dispatch(self, backend: str, now: float) -> None:
        limits, usage, lanes = self._limits[backend], self._usage[backend], self._lanes[backend]
        while usage.ops < limits.max_ops and lanes:
            for empty in [peer for peer, lane in lanes.items() if lane.head() is None]:
                del lanes[empty]
            if not lanes:
                return
            peer, lane = min(lanes.items(), key=lambda item: item[1].urgency[0])
            head = lane.head()
            piece = None if head is None else head.peek()
            assert piece is not None
            first = piece.nbytes
            if usage.nbytes and usage.nbytes + first > limits.max_nbytes:
                return
            room = limits.max_nbytes - usage.nbytes if usage.nbytes else max(limits.max_nbytes, first)
            parts = self._gather(lane, limits, room)
            # The lane goes to the end, so that peers of equal urgency take turns.
            lanes[peer] = lanes.pop(peer)
            self._start(backend, parts, now)

    def _gather(self, lane: _Lane, limits: Limits, room: int) -> list[tuple[TransferRecord, int, Plan]]:
        head = lane.head()
        assert head is not None
        start, plan = head.take()
        parts = [(head, start, plan)]
        if head.solo or plan.nbytes > BATCH_NBYTES or not limits.batch:
            return parts
        nbytes, segments = plan.nbytes, len(plan.lengths)
        max_nbytes, max_segments = min(limits.max_op_nbytes, room), limits.max_op_segments
        while len(parts) < BATCH_PARTS and (record := lane.head()) is not None:
            piece = record.peek()
            if piece is None or record.solo or piece.nbytes > BATCH_NBYTES:
                break
            nbytes += piece.nbytes
            segments += len(piece.lengths)
            if nbytes > max_nbytes or segments > max_segments or not _alike(head, record):
                break
            start, piece = record.take()
            parts.append((record, start, piece))
        return parts

    def _start(self, backend: str, parts: list[tuple[TransferRecord, int, Plan]], now: float) -> None:
        first = parts[0][0]
        plan = concatenate([piece for _, _, piece in parts])
        listed = tuple((record.id, start, piece.nbytes) for record, start, piece in parts)
        op = Op(next(self._op_ids), plan, first.peer, first.put, listed)
        for record, _, _ in parts:
            if record.state is TransferState.QUEUED:
                record.started = now
                record.move(TransferEvent.ADMIT, now)
            record.in_flight += 1
            record.attempts += 1
        self._flights[op.id] = _Flight(op, backend, parts)
        usage = self._usage[backend]
        usage.ops += 1
        usage.nbytes += plan.nbytes
        self._actions.append(Start(backend, op))

    def _land(self, op_id: int) -> _Flight:
        flight = self._flights.pop(op_id)
        usage = self._usage[flight.backend]
        usage.ops -= 1
        usage.nbytes -= flight.op.nbytes
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
        record.again = list(_cut([*pieces, *record.drop_unsent()], self._limits[record.routes[0]]))
        record.again.reverse()
        self._queue(record, front=True)
        self._dispatch(record.routes[0], now)

    def _decide(self, record: TransferRecord, error: BaseException | None, now: float) -> None:
        """Settle the outcome: `error`, or cancelled when it is None; stop what is in flight."""
        record.error = error
        record.drop_unsent()
        if record.state is TransferState.QUEUED:
            record.move(TransferEvent.CANCEL if error is None else TransferEvent.REFUSE, now)
            self._finish(record, now)
            return
        record.move(TransferEvent.CANCEL if error is None else TransferEvent.ABORT, now)
        if record.in_flight == 0:
            self._drained(record, now)
            return
        limit = 0.0
        for flight in self._flights.values():
            if any(part[0] is record for part in flight.parts):
                limit = max(limit, self._limits[flight.backend].drain_seconds)
                if all(part[0].state is TransferState.DRAINING for part in flight.parts):
                    self._actions.append(Stop(flight.op.id))
        heapq.heappush(self._drains, (now + limit, next(self._sequence), record))

    def _drained(self, record: TransferRecord, now: float) -> None:
        if record.state is TransferState.DRAINING and record.in_flight == 0:
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
        self._records.pop(record.id, None)
        self._actions.append(Finish(record))

    def _drop_settled(self, drains: list[tuple[float, int, TransferRecord]]) -> list[tuple[float, int, TransferRecord]]:
        while drains and drains[0][2].state is not TransferState.DRAINING:
            heapq.heappop(drains)
        return drains

    def check(self) -> None:
        """Assert the invariants that hold between events; for tests and for debugging."""
        counts: dict[int, int] = {}
        for flight in self._flights.values():
            for record, _, _ in flight.parts:
                counts[record.id] = counts.get(record.id, 0) + 1
        for record in self._records.values():
            assert not record.state.final, record
            assert record.in_flight == counts.get(record.id, 0), record
            assert record.in_flight == 0 or record.state in (TransferState.ACTIVE, TransferState.DRAINING), record
            assert record.state is not TransferState.DRAINING or record.in_flight > 0, record
        for name, usage in self._usage.items():
            mine = [flight.op.nbytes for flight in self._flights.values() if flight.backend == name]
            assert (usage.ops, usage.nbytes) == (len(mine), sum(mine)), (name, usage)
            assert usage.ops <= self._limits[name].max_ops, (name, usage)
            assert usage.nbytes <= self._limits[name].max_nbytes or usage.ops == 1, (name, usage)


def _alike(a: TransferRecord, b: TransferRecord) -> bool:
    """Return whether two transfers of one lane may share an op."""
    if a.put is not b.put:
        return False
    for x, y in ((a.plan.src, b.plan.src), (a.plan.dst, b.plan.dst)):
        one, other = x.regions[0], y.regions[0]
        if one is not other and (one.kind is not other.kind or one.device != other.device):
            return False
    return True


def _cut(pieces: Iterable[tuple[int, Plan]], limits: Limits) -> Iterable[tuple[int, Plan]]:
    for first, plan in pieces:
        start = first
        for piece in plan.split(limits.max_op_nbytes, limits.max_op_segments):
            yield start, piece
            start += piece.nbytes

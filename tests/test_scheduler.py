"""The scheduler alone: what starts when, and what is true whatever happens in whatever order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nixl_async.backend import Limits, Op
from nixl_async.errors import BackendError, PeerLost, Quarantined, TransferError
from nixl_async.queues import BATCH_NBYTES, BATCH_PARTS
from nixl_async.scheduler import BACKOFF_SECONDS, MAX_RETRIES, Action, Finish, Start, Stop
from nixl_async.transfer import TrafficClass, TransferRecord, TransferState
from tests.scheduling import FAR, SPACE, Bench, make_record

ONE = Limits(max_ops=1)


# Admission.


def test_what_is_submitted_without_starting_is_batched_by_the_next_dispatch() -> None:
    bench = Bench()
    for number in range(3):
        assert bench.take(bench.scheduler.submit(make_record(number, bench.limits), 0.0, start=False)) == []
    bench.take(bench.scheduler.dispatch(0.0))
    assert bench.order() == [[0, 1, 2]]
    assert bench.take(bench.scheduler.dispatch(0.0)) == []


def test_nothing_to_move_finishes_without_being_dispatched() -> None:
    bench = Bench()
    bench.take(bench.scheduler.submit(make_record(1, bench.limits, nbytes=0), 0.0, start=False))
    assert [record.id for record in bench.finished] == [1]


def test_a_transfer_starts_at_once_and_finishes_with_its_last_op() -> None:
    bench = Bench(wire=Limits(max_op_nbytes=40))
    record = bench.submit(nbytes=100)
    assert [op.parts for _, op in bench.started] == [((1, 0, 40),), ((1, 40, 40),), ((1, 80, 20),)] or [
        sum(n for _, _, n in op.parts) for _, op in bench.started
    ] == [40, 40, 20]
    bench.now = 2.0
    bench.done()
    bench.done()
    assert record.state is TransferState.ACTIVE
    assert record.nbytes_done == 80
    bench.done()
    assert bench.finished == [record]
    assert record.result() == (100, 2.0, 0.0, 3, "wire")


def test_a_backend_that_wants_no_batches_gets_each_transfer_by_itself() -> None:
    bench = Bench(store=Limits(max_ops=3, batch=False))
    for _ in range(5):
        bench.submit(nbytes=10)
    assert bench.order() == [[1], [2], [3]]
    bench.done()
    bench.done()
    assert bench.order() == [[1], [2], [3], [4], [5]]


def test_an_op_that_has_told_of_its_parts_is_not_sent_again() -> None:
    for error in (BackendError("busy", retryable=True), BackendError("broken")):
        bench = Bench(first=Limits(), second=Limits())
        record = bench.submit(nbytes=100)
        bench.running.clear()
        bench.take(bench.scheduler.op_failed(1, error, 0.0, final=True))
        assert bench.finished == [record]
        assert (record.state, record.error, record.attempts) == (TransferState.FAILED, error, 1)
        assert bench.scheduler.next_wakeup() is None


def test_a_backend_may_come_later() -> None:
    bench = Bench(wire=ONE)
    bench.limits["store"] = Limits(max_ops=2, batch=False)
    bench.scheduler.add_backend("store", bench.limits["store"])
    bench.submit(nbytes=100)
    for _ in range(3):
        bench.submit(nbytes=100, routes=("store",))
    assert [name for name, _ in bench.started] == ["wire", "store", "store"]
    assert bench.scheduler.in_flight("store") == (2, 200)


def test_nothing_to_move_is_done_at_once() -> None:
    bench = Bench()
    record = bench.submit(nbytes=0)
    assert bench.finished == [record]
    assert record.state is TransferState.DONE
    assert not bench.started


def test_ops_in_flight_are_bounded_and_the_rest_waits_its_turn() -> None:
    bench = Bench(wire=Limits(max_ops=3, max_op_nbytes=10))
    bench.submit(nbytes=100)
    assert len(bench.running) == 3
    for _ in range(7):
        bench.done()
        assert len(bench.running) == 3
    assert bench.scheduler.in_flight("wire") == (3, 30)


def test_bytes_in_flight_are_bounded() -> None:
    bench = Bench(wire=Limits(max_ops=100, max_nbytes=1000, max_op_nbytes=400))
    bench.submit(nbytes=4000)
    assert bench.scheduler.in_flight("wire") == (2, 800)


def test_a_batch_keeps_the_bytes_in_flight_bounded_too() -> None:
    bench = Bench(wire=Limits(max_ops=2, max_nbytes=1000, max_op_nbytes=800))
    bench.submit(nbytes=800)
    for _ in range(10):
        bench.submit(nbytes=150)
    bench.cancel(bench.submit(nbytes=100))
    assert bench.scheduler.in_flight("wire")[1] <= 1000
    bench.done()
    assert bench.scheduler.in_flight("wire")[1] <= 1000


def test_an_op_larger_than_the_bound_goes_alone_and_is_not_stuck() -> None:
    bench = Bench(wire=Limits(max_ops=4, max_nbytes=50, max_op_nbytes=80))
    bench.submit(nbytes=160)
    assert bench.scheduler.in_flight("wire") == (1, 80)
    bench.done()
    bench.done()
    assert bench.finished[0].state is TransferState.DONE


def test_backends_have_their_own_room() -> None:
    bench = Bench(a=ONE, b=ONE)
    bench.submit(routes=("a",))
    bench.submit(routes=("b",))
    assert [backend for backend, _ in bench.started] == ["a", "b"]


def test_idle_says_whether_something_as_urgent_waits() -> None:
    bench = Bench(wire=ONE)
    assert bench.scheduler.idle("wire", "p")
    bench.submit()
    waiting = bench.submit()
    assert not bench.scheduler.idle("wire", "p")
    assert not bench.scheduler.idle("wire", "p", TrafficClass.BULK)
    assert bench.scheduler.idle("wire", "p", TrafficClass.LATENCY)
    assert bench.scheduler.idle("wire", "q")
    bench.cancel(waiting)
    assert bench.scheduler.idle("wire", "p")


# Held transfers.


def test_a_held_transfer_waits_until_it_is_released() -> None:
    bench = Bench()
    record = bench.submit(hold=True)
    assert bench.take(bench.scheduler.dispatch(0.0)) == []
    assert record.state is TransferState.QUEUED
    assert bench.scheduler.idle("wire", "p")
    assert bench.take(bench.scheduler.release(record.id, 1.0)) == []
    bench.take(bench.scheduler.dispatch(1.0))
    assert bench.order() == [[record.id]]
    assert bench.take(bench.scheduler.release(record.id, 1.0)) == []
    assert bench.take(bench.scheduler.refuse(record.id, ValueError("late"), 1.0)) == []
    bench.done()
    assert record.state is TransferState.DONE


def test_a_held_transfer_can_be_refused_cancelled_and_lose_its_peer() -> None:
    bench = Bench()
    refused, cancelled, lost, other = (bench.submit(hold=True, peer=peer) for peer in ("p", "p", "p", "q"))
    error, gone = ValueError("the kernel failed"), PeerLost("gone")
    bench.take(bench.scheduler.refuse(refused.id, error, 0.0))
    assert (refused.state, refused.error) == (TransferState.FAILED, error)
    assert [event for _, _, event, _ in refused.history] == ["refuse"]
    bench.cancel(cancelled)
    assert cancelled.state is TransferState.CANCELLED
    bench.take(bench.scheduler.peer_lost("p", gone, 0.0))
    assert (lost.state, lost.error) == (TransferState.FAILED, gone)
    assert bench.finished == [refused, cancelled, lost]
    for record in (refused, cancelled, lost):
        assert bench.take(bench.scheduler.release(record.id, 0.0)) == []
    bench.take(bench.scheduler.release(other.id, 0.0))
    bench.take(bench.scheduler.dispatch(0.0))
    assert bench.order() == [[other.id]]


def test_nothing_to_move_finishes_when_it_is_released() -> None:
    bench = Bench()
    record = bench.submit(nbytes=0, hold=True)
    assert not bench.finished
    bench.take(bench.scheduler.release(record.id, 3.0))
    assert bench.finished == [record]
    assert record.result() == (0, 3.0, 3.0, 0, "wire")


# Statistics.


def test_what_is_done_after_its_deadline_is_counted() -> None:
    bench = Bench(wire=Limits(batch=False))
    bench.submit(deadline=2.0, nbytes=10)
    bench.submit(deadline=5.0, nbytes=20)
    bench.submit(deadline=1.0, traffic_class=TrafficClass.BULK, nbytes=40)
    bench.cancel(bench.submit(deadline=1.0))
    bench.submit()
    bench.now = 3.0
    for _ in range(3):
        bench.done()
    counts = bench.scheduler.counts()
    assert counts[TrafficClass.NORMAL] == (2, 2, 1, 30)
    assert counts[TrafficClass.BULK] == (0, 1, 1, 40)
    assert counts[TrafficClass.LATENCY] == (0, 0, 0, 0)


# Order.


def test_the_urgent_goes_first_then_the_earlier_deadline_then_the_older() -> None:
    bench = Bench(wire=ONE)
    big = BATCH_NBYTES + 1
    bench.submit(nbytes=big)
    late, plain = bench.submit(nbytes=big, deadline=9.0), bench.submit(nbytes=big)
    urgent, soon = bench.submit(nbytes=big, priority=1), bench.submit(nbytes=big, deadline=1.0)
    second = bench.submit(nbytes=big)
    while bench.running:
        bench.done()
    assert bench.order() == [[1], [urgent.id], [soon.id], [late.id], [plain.id], [second.id]]


def test_the_urgent_overtakes_the_rest_of_a_large_transfer() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=BATCH_NBYTES * 2))
    bench.submit(nbytes=BATCH_NBYTES * 6)
    urgent = bench.submit(priority=5)
    bench.done()
    assert bench.order() == [[1], [urgent.id]]


def test_priority_holds_between_peers() -> None:
    bench = Bench(wire=ONE)
    bench.submit(peer="p")
    bench.submit(peer="p")
    urgent = bench.submit(peer="q", priority=1)
    bench.done()
    assert bench.order() == [[1], [urgent.id]]


def test_peers_take_turns() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=100))
    for peer in ("p", "q", "r"):
        bench.submit(peer=peer, nbytes=500)
    while bench.running:
        bench.done()
    peers = [op.peer for _, op in bench.started]
    assert all(set(peers[at : at + 3]) == {"p", "q", "r"} for at in range(1, 11))


# Batching.


def test_small_transfers_to_one_peer_share_an_op() -> None:
    bench = Bench(wire=ONE)
    bench.submit()
    records = [bench.submit(nbytes=n) for n in (10, 20, 30)]
    bench.done()
    assert bench.order() == [[1], [2, 3, 4]]
    _, op = bench.started[1]
    assert op.nbytes == 60
    assert op.parts == ((2, 0, 10), (3, 0, 20), (4, 0, 30))
    bench.done()
    assert [record.state for record in records] == [TransferState.DONE] * 3


def test_what_differs_in_peer_or_direction_does_not_share() -> None:
    bench = Bench(wire=ONE)
    bench.submit()
    bench.submit(peer="q")
    bench.submit(put=False)
    bench.submit(peer=None)
    while bench.running:
        bench.done()
    assert sorted(bench.order()) == [[1], [2], [3], [4]]


def test_a_batch_is_bounded_in_bytes_and_segments_and_transfers() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=100, max_op_segments=3))
    for _ in range(9):
        bench.submit(nbytes=30)
    for _ in range(9):
        bench.submit(nbytes=1)
    while bench.running:
        bench.done()
    assert all(op.nbytes <= 100 and len(op.plan.lengths) <= 3 for _, op in bench.started)
    many = Bench(wire=ONE)
    for _ in range(BATCH_PARTS + 2):
        many.submit(nbytes=1)
    many.done()
    assert len(many.started[1][1].parts) == BATCH_PARTS


def test_large_transfers_do_not_share() -> None:
    bench = Bench(wire=ONE)
    bench.submit()
    bench.submit(nbytes=BATCH_NBYTES + 1)
    bench.submit()
    while bench.running:
        bench.done()
    assert bench.order() == [[1], [2], [3]]


def test_a_failed_batch_is_sent_again_one_by_one_so_that_only_the_guilty_fails() -> None:
    bench = Bench(wire=ONE)
    bench.submit()
    records = [bench.submit() for _ in range(3)]
    bench.done()
    bench.fail(BackendError("one of them is bad"))
    assert not any(record.state.final for record in records)
    bench.done()
    bench.fail(BackendError("this one"))
    bench.done()
    assert sorted(record.state.name for record in records) == ["DONE", "DONE", "FAILED"]


# Failure.


def test_a_retryable_failure_is_sent_again_later_and_later() -> None:
    bench = Bench()
    record = bench.submit()
    for attempt in range(MAX_RETRIES):
        bench.fail(BackendError("busy", retryable=True))
        due = bench.now + BACKOFF_SECONDS * 2**attempt
        assert bench.scheduler.next_wakeup() == pytest.approx(due)
        bench.tick(due - 0.001)
        assert not bench.running
        bench.tick(due)
        assert len(bench.running) == 1
    bench.fail(BackendError("still busy", retryable=True))
    assert bench.finished == [record]
    assert record.state is TransferState.FAILED
    assert str(record.error) == "still busy"
    assert record.attempts == MAX_RETRIES + 1
    assert bench.scheduler.next_wakeup() is None


def test_a_failure_that_is_not_retryable_moves_on_to_the_next_route() -> None:
    bench = Bench(a=Limits(), b=Limits(max_op_nbytes=30))
    record = bench.submit(nbytes=100)
    bench.fail(BackendError("broken"))
    assert {backend for backend, _ in bench.running.values()} == {"b"}
    assert all(op.nbytes <= 30 for _, op in bench.running.values())
    while bench.running:
        bench.done()
    assert record.result().route == "b"


def test_only_a_backends_own_failure_moves_on_a_lost_peer_does_not() -> None:
    bench = Bench(a=Limits(), b=Limits())
    record = bench.submit()
    bench.fail(PeerLost("gone"))
    assert record.state is TransferState.FAILED
    assert not bench.running


def test_what_waits_for_another_try_is_cut_to_the_route_it_moves_on_to() -> None:
    bench = Bench(a=Limits(max_ops=2, max_op_nbytes=100), b=Limits(max_op_nbytes=30))
    record = bench.submit(nbytes=200)
    bench.fail(BackendError("busy", retryable=True))
    bench.fail(BackendError("broken"))
    bench.tick(bench.scheduler.next_wakeup() or 0.0)
    assert all(op.nbytes <= 30 for backend, op in bench.started if backend == "b")
    while bench.running:
        bench.done()
    assert record.state is TransferState.DONE


def test_a_batch_that_fails_after_its_transfer_moved_on_follows_it() -> None:
    limits = Limits(max_ops=2, max_op_nbytes=BATCH_NBYTES)
    bench = Bench(a=limits, b=Limits(max_op_nbytes=100_000))
    blocker, other = bench.submit(routes=("a",)), bench.submit(routes=("a",))
    record = bench.submit(nbytes=BATCH_NBYTES + 100)
    bench.submit(routes=("a", "b"))
    bench.done()
    bench.done()
    alone, shared = [op for _, op in bench.running.values()]
    assert len(shared.parts) == 2
    bench.fail(BackendError("broken"), alone.id)
    while any(backend == "b" for backend, _ in bench.running.values()):
        bench.done(next(number for number, (backend, _) in bench.running.items() if backend == "b"))
    bench.fail(BackendError("broken"), shared.id)
    while bench.running:
        bench.done()
    assert {blocker.state, other.state, record.state} == {TransferState.DONE}
    assert not bench.scheduler.live()


def test_a_lost_peer_fails_its_transfers_and_no_others() -> None:
    bench = Bench(wire=ONE)
    active, queued, other = bench.submit(), bench.submit(), bench.submit(peer="q")
    error = PeerLost("gone")
    bench.take(bench.scheduler.peer_lost("p", error, 0.0))
    assert bench.finished == [queued]
    assert active.state is TransferState.DRAINING
    assert len(bench.stopped) == 1
    bench.fail(BackendError("the op was cancelled"))
    assert active.state is TransferState.FAILED
    assert active.error is error
    bench.done()
    assert other.state is TransferState.DONE


# Cancellation.


def test_what_has_not_started_is_cancelled_at_once() -> None:
    bench = Bench(wire=ONE)
    bench.submit()
    record = bench.submit()
    bench.cancel(record)
    assert bench.finished == [record]
    bench.done()
    assert bench.order() == [[1]]


def test_what_has_started_waits_until_its_ops_are_quiet() -> None:
    bench = Bench(wire=Limits(max_ops=2, max_op_nbytes=10))
    record = bench.submit(nbytes=50)
    first, second = bench.running
    bench.cancel(record)
    assert bench.stopped == [first, second]
    assert record.state is TransferState.DRAINING
    bench.done(first)
    assert not bench.finished
    bench.fail(BackendError("the op was cancelled"), second)
    assert record.state is TransferState.CANCELLED
    assert len(bench.started) == 2


def test_a_shared_op_is_stopped_only_when_nobody_wants_it() -> None:
    bench = Bench(wire=ONE)
    bench.submit()
    one, two = bench.submit(), bench.submit()
    bench.done()
    bench.cancel(one)
    assert not bench.stopped
    bench.cancel(two)
    assert bench.stopped == list(bench.running)
    bench.done()
    assert {one.state, two.state} == {TransferState.CANCELLED}


def test_the_first_outcome_stays() -> None:
    bench = Bench()
    record = bench.submit()
    assert bench.cancel(record)
    assert not bench.cancel(record)
    bench.take(bench.scheduler.peer_lost("p", PeerLost("gone"), 0.0))
    bench.fail(BackendError("the op was cancelled"))
    assert record.state is TransferState.CANCELLED
    assert bench.finished == [record]
    assert not bench.cancel(record)


def test_what_waits_for_another_try_is_cancelled_at_once() -> None:
    bench = Bench()
    record = bench.submit()
    bench.fail(BackendError("busy", retryable=True))
    bench.cancel(record)
    assert bench.finished == [record]
    bench.tick(10.0)
    assert not bench.running


def test_what_never_becomes_quiet_is_quarantined_after_the_drain_limit() -> None:
    bench = Bench(wire=Limits(drain_seconds=3.0))
    record = bench.submit()
    bench.now = 1.0
    bench.cancel(record)
    assert bench.scheduler.next_wakeup() == 4.0
    bench.tick(3.99)
    assert not bench.finished
    bench.tick(4.0)
    assert record.state is TransferState.FAILED
    assert isinstance(record.error, Quarantined)
    assert "local" in str(record.error)
    assert "remote" in str(record.error)
    assert bench.scheduler.in_flight("wire") == (1, 100)
    bench.done()
    assert bench.finished == [record]
    assert bench.scheduler.in_flight("wire") == (0, 0)


def test_a_quarantine_keeps_the_error_that_came_first() -> None:
    bench = Bench()
    record = bench.submit()
    error = PeerLost("gone")
    bench.take(bench.scheduler.peer_lost("p", error, 0.0))
    bench.tick(100.0)
    assert isinstance(record.error, Quarantined)
    assert record.error.__cause__ is error


# Whatever happens.

MACHINE_LIMITS = {
    "fast": Limits(
        max_ops=3, max_nbytes=3000, max_op_nbytes=1200, max_op_segments=12, drain_seconds=1.0, slice_nbytes=300, lanes=2
    ),
    "slow": Limits(2, 700, 500, 5, drain_seconds=2.0, max_peer_ops=1, max_peer_nbytes=600, slice_nbytes=0),
}
PEERS = [None, "p", "q"]
FAILURES = {
    "retryable": lambda: BackendError("busy", retryable=True),
    "broken": lambda: BackendError("broken"),
    "denied": lambda: TransferError("denied"),
    "lost": lambda: PeerLost("lost"),
}


class SchedulerMachine(RuleBasedStateMachine):
    """Plays agent and backends to a scheduler, and keeps count of every byte."""

    @initialize()
    def begin(self) -> None:
        self.bench = Bench(**MACHINE_LIMITS)
        self.records: dict[int, TransferRecord] = {}
        self.covered: dict[int, np.ndarray] = {}
        self.source: dict[int, np.ndarray] = {}
        self.submitted = 0
        self.stops: set[int] = set()
        self.held: set[int] = set()

    # What the scheduler says.

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(backend, op):
                    self.check_start(backend, op)
                case Stop(op_id):
                    assert op_id in self.bench.running
                    assert op_id not in self.stops
                    self.stops.add(op_id)
                    _, op = self.bench.running[op_id]
                    assert all(self.records[n].state is TransferState.DRAINING for n, _, _ in op.parts)
                case Finish(record):
                    self.held.discard(record.id)
                    self.check_finish(record)

    def check_start(self, backend: str, op: Op) -> None:
        limits = MACHINE_LIMITS[backend]
        assert 0 < op.nbytes <= limits.max_op_nbytes
        assert 0 < len(op.plan.lengths) <= limits.max_op_segments
        assert op.nbytes == sum(nbytes for _, _, nbytes in op.parts) == int(op.plan.lengths.sum())
        for number, _, _ in op.parts:
            record = self.records[number]
            assert (record.peer, record.put) == (op.peer, op.put)
            assert backend in record.routes
            assert number not in self.held
            assert record.cancel_requested is False

    def check_finish(self, record: TransferRecord) -> None:
        assert record.state.final
        assert sum(seen is record for seen in self.bench.finished) == 1
        busy = any(number == record.id for _, op in self.bench.running.values() for number, _, _ in op.parts)
        match record.state:
            case TransferState.DONE:
                assert (self.covered[record.id] == 1).all()
                assert record.nbytes_done == record.plan.nbytes
                assert not busy
            case TransferState.CANCELLED:
                assert record.cancel_requested
                assert not busy
            case TransferState.FAILED:
                assert record.error is not None
                assert busy == isinstance(record.error, Quarantined)

    def cover(self, op: Op) -> None:
        plan = op.plan
        for src, dst, nbytes in zip(plan.src.addresses, plan.dst.addresses, plan.lengths, strict=True):
            number = (int(dst) >> SPACE) - 1
            at = int(dst) - ((number + 1) << SPACE) - FAR
            came_from = int(src) - ((number + 1) << SPACE)
            assert np.array_equal(self.source[number][at : at + nbytes], np.arange(came_from, came_from + nbytes))
            self.covered[number][at : at + nbytes] += 1

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.bench.running)), label="op")

    # What may happen.

    @rule(
        peer=st.sampled_from(PEERS),
        put=st.booleans(),
        priority=st.integers(-1, 2),
        deadline=st.none() | st.floats(0, 10),
        traffic_class=st.sampled_from(TrafficClass),
        hold=st.sampled_from([False, False, False, True]),
        page_nbytes=st.sampled_from([1, 7, 64, 400, 1500]),
        order=st.integers(0, 24).flatmap(lambda n: st.permutations(range(n))),
        routes=st.sampled_from([("fast",), ("slow",), ("fast", "slow"), ("slow", "fast")]),
    )
    def submit(self, peer: str | None, put: bool, page_nbytes: int, order: list[int], hold: bool, **wanted: Any) -> None:
        self.submitted += 1
        number = self.submitted
        record = make_record(number, MACHINE_LIMITS, peer=peer, put=put, page_nbytes=page_nbytes, order=order, **wanted)
        self.records[number] = record
        self.covered[number] = np.zeros(len(order) * page_nbytes, np.int64)
        pages = np.arange(len(order) * page_nbytes).reshape(len(order), page_nbytes)
        self.source[number] = pages[order].ravel() if order else pages.ravel()
        if hold:
            self.held.add(number)
        self.take(self.bench.take(self.bench.scheduler.submit(record, self.bench.now, hold=hold)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), error=st.none() | st.just(TransferError("the point it waits for failed")))
    def what_it_waits_for_ends(self, data: st.DataObject, error: TransferError | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)), label="held")
        if error is not None:
            self.take(self.bench.take(self.bench.scheduler.refuse(number, error, self.bench.now)))
            assert self.records[number].error is error
            return
        self.release(number)

    def release(self, number: int) -> None:
        self.held.remove(number)
        self.take(self.bench.take(self.bench.scheduler.release(number, self.bench.now)))
        self.take(self.bench.take(self.bench.scheduler.dispatch(self.bench.now)))

    @precondition(lambda self: self.bench.running)
    @rule(data=st.data())
    def op_done(self, data: st.DataObject) -> None:
        chosen = self.pick(data)
        self.cover(self.bench.running[chosen][1])
        self.take(self.bench.done(chosen))

    @precondition(lambda self: self.bench.running)
    @rule(data=st.data(), kind=st.sampled_from(sorted(FAILURES)))
    def op_failed(self, data: st.DataObject, kind: str) -> None:
        self.take(self.bench.fail(FAILURES[kind](), self.pick(data)))

    @precondition(lambda self: self.stops & set(self.bench.running))
    @rule()
    def a_stopped_op_ends(self) -> None:
        chosen = min(self.stops & set(self.bench.running))
        self.take(self.bench.fail(BackendError("the op was cancelled"), chosen))

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.take(self.bench.cancel(self.records[data.draw(st.sampled_from(sorted(self.records)), label="transfer")]))

    @rule(peer=st.sampled_from(["p", "q"]))
    def peer_lost(self, peer: str) -> None:
        self.take(self.bench.take(self.bench.scheduler.peer_lost(peer, PeerLost("lost"), self.bench.now)))
        assert not any(
            record.peer == peer and record.state in (TransferState.QUEUED, TransferState.ACTIVE)
            for record in self.records.values()
        )

    @rule(seconds=st.sampled_from([0.0, BACKOFF_SECONDS, 0.1, 1.0, 3.0]))
    def tick(self, seconds: float) -> None:
        self.take(self.bench.tick(self.bench.now + seconds))

    # What is always true.

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "bench"):
            return
        for name, limits in MACHINE_LIMITS.items():
            mine = [op for backend, op in self.bench.running.values() if backend == name]
            assert self.bench.scheduler.in_flight(name) == (len(mine), sum(op.nbytes for op in mine))
            assert len(mine) <= limits.max_ops
            assert sum(op.nbytes for op in mine) <= limits.max_nbytes or len(mine) == 1
            for peer in PEERS:
                sizes = [op.nbytes for op in mine if op.peer == peer]
                assert not limits.max_peer_ops or len(sizes) <= limits.max_peer_ops
                assert not limits.max_peer_nbytes or sum(sizes) <= limits.max_peer_nbytes or len(sizes) == 1

    @invariant()
    def nothing_is_forgotten(self) -> None:
        if not hasattr(self, "bench"):
            return
        live = {record.id for record in self.bench.scheduler.live()}
        assert live == {n for n, record in self.records.items() if not record.state.final}
        assert {record.id for record in self.bench.finished} == set(self.records) - live
        for record in self.bench.scheduler.live():
            if record.id in self.held:
                assert record.state is TransferState.QUEUED
            elif record.peek() is not None:
                assert self.bench.scheduler.in_flight(record.routes[0])[0], f"{record} waits for nothing"
            elif not record.ops:
                assert self.bench.scheduler.next_wakeup() is not None, f"{record} waits for nothing"

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        for number in sorted(self.held):
            self.release(number)
        while self.bench.scheduler.live():
            if self.bench.running:
                chosen = min(self.bench.running)
                self.cover(self.bench.running[chosen][1])
                self.take(self.bench.done(chosen))
            else:
                due = self.bench.scheduler.next_wakeup()
                assert due is not None
                self.take(self.bench.tick(due))
        assert {record.id for record in self.bench.finished} == set(self.records)


TestWhateverHappens = SchedulerMachine.TestCase
TestWhateverHappens.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

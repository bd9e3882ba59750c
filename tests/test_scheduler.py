"""The scheduler alone: what starts when, and what is true whatever happens in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nixl_async.backend import Limits, Op
from nixl_async.errors import AccessError, BackendError, IntegrityError, PeerLost, Quarantined, TransferError
from nixl_async.queues import BATCH_NBYTES, BATCH_PARTS
from nixl_async.repeating import MAX_RETRIES
from nixl_async.scheduler import (
    BACKOFF_SECONDS,
    STRANDED_SECONDS,
    VERIFY_DRAIN_SECONDS,
    Action,
    Finish,
    Lost,
    Scheduler,
    Start,
    Stop,
    Verify,
)
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


def test_a_transfer_that_is_aborted_fails_with_that_error_once_it_is_quiet() -> None:
    bench = Bench(wire=Limits(max_ops=1, batch=False))
    running, waiting = bench.submit(), bench.submit()
    errors = TransferError("the lease has ended"), TransferError("the lease has ended")
    for record, error in zip((running, waiting), errors, strict=True):
        bench.take(bench.scheduler.abort(record.id, error, 0.0))
    assert (waiting.state, waiting.error) == (TransferState.FAILED, errors[1])
    assert (running.state, bench.stopped) == (TransferState.DRAINING, [1])
    bench.fail(BackendError("it was stopped"))
    assert (running.state, running.error) == (TransferState.FAILED, errors[0])
    for number in (running.id, 77):
        assert bench.take(bench.scheduler.abort(number, errors[0], 0.0)) == []


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
    error = record.error
    assert isinstance(error, BackendError)
    assert str(error) == f"still busy (sent again {MAX_RETRIES} times in 0.07 s, by wire)"
    assert (error.resent, error.seconds, error.tried) == (MAX_RETRIES, pytest.approx(0.07), ("wire",))
    assert record.attempts == MAX_RETRIES + 1
    assert (bench.scheduler.retries, bench.scheduler.failovers) == (MAX_RETRIES, 0)
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


def test_what_is_denied_does_not_move_on() -> None:
    bench = Bench(a=Limits(), b=Limits())
    record = bench.submit()
    bench.fail(AccessError("read-only"))
    assert record.state is TransferState.FAILED
    assert not bench.running


def test_back_offs_are_drawn_by_chance() -> None:
    bench = Bench()
    for chance, factor in ((0.0, 0.5), (1.0, 1.5)):
        bench.scheduler = Scheduler(bench.limits, chance=lambda chance=chance: chance)  # type: ignore[misc]
        bench.submit()
        bench.fail(BackendError("busy", retryable=True))
        assert bench.scheduler.next_wakeup() == pytest.approx(BACKOFF_SECONDS * factor)


def test_no_retry_waits_beyond_the_deadline() -> None:
    bench = Bench()
    record = bench.submit(deadline=0.02)
    bench.fail(BackendError("busy", retryable=True))
    bench.tick(0.01)
    bench.fail(BackendError("busy still", retryable=True))
    assert bench.finished == [record]
    assert str(record.error) == "busy still (sent again once in 0.01 s, by wire)"
    assert bench.scheduler.next_wakeup() is None


def test_what_cannot_wait_for_a_retry_moves_on() -> None:
    bench = Bench(a=Limits(), b=Limits())
    record = bench.submit(deadline=0.0)
    bench.fail(BackendError("busy", retryable=True))
    assert [backend for backend, _ in bench.running.values()] == ["b"]
    bench.done()
    assert record.result().route == "b"


def test_bytes_that_arrive_make_retries_count_afresh() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=10))
    record = bench.submit(nbytes=40)
    for _ in range(3):
        for _ in range(MAX_RETRIES):
            bench.fail(BackendError("busy", retryable=True))
            bench.tick(bench.scheduler.next_wakeup() or 0.0)
        bench.done()
    assert (record.state, record.nbytes_done, record.resent) == (TransferState.ACTIVE, 30, 3 * MAX_RETRIES)


# Routes that lose a peer.


def test_a_route_that_loses_the_peer_is_left_by_all_who_take_it() -> None:
    bench = Bench(a=Limits(max_ops=2, batch=False), b=Limits(max_ops=9, batch=False))
    first, second, third = bench.submit(), bench.submit(), bench.submit()
    other = bench.submit(peer="q")
    outages = [action.outage for action in bench.fail(PeerLost("reset"), 1) if isinstance(action, Lost)]
    assert [(outage.backend, outage.peer, outage.reason) for outage in outages] == [("a", "p", "reset")]
    # The first and the third have moved; the second is in flight still, and the other peer's have nothing to do with it.
    assert [(backend, op.parts[0][0]) for backend, op in bench.running.values()] == [("a", 2), ("b", 3), ("b", 1), ("a", 4)]
    assert not [action for action in bench.fail(PeerLost("reset"), 2) if isinstance(action, Lost)]
    later = bench.submit()
    assert {backend for backend, op in bench.running.values() if op.peer == "p"} == {"b"}
    while bench.running:
        bench.done()
    assert [record.result().route for record in (first, second, third, later, other)] == ["b", "b", "b", "b", "a"]
    assert (bench.scheduler.failovers, bench.scheduler.retries, bench.scheduler.outages.era) == (3, 0, 1)


def test_a_route_that_is_back_is_taken_again() -> None:
    bench = Bench(a=Limits(), b=Limits())
    bench.take(bench.scheduler.route_lost("a", "p", "reset", 0.0))
    bench.take(bench.scheduler.route_lost("a", "p", "reset", 0.0))
    bench.submit()
    bench.take(bench.scheduler.route_back("a", "p", 1.0))
    bench.submit()
    assert [backend for backend, _ in bench.started] == ["b", "a"]
    assert bench.scheduler.outages.era == 1


def test_what_fails_late_does_not_bring_a_route_down_that_is_back() -> None:
    bench = Bench(a=Limits(batch=False), b=Limits())
    record, _ = bench.submit(), bench.submit()
    bench.fail(PeerLost("reset"), 1)
    bench.take(bench.scheduler.route_back("a", "p", 0.0))
    assert not [action for action in bench.fail(PeerLost("reset"), 2) if isinstance(action, Lost)]
    assert [backend for backend, _ in bench.running.values()] == ["b", "a"]
    assert bench.scheduler.retries == 1
    bench.fail(PeerLost("reset again"))
    bench.done()
    assert record.state.final is False
    assert bench.scheduler.outages.first_up(("b",), "p") is None


def test_without_a_route_a_transfer_waits_until_one_is_back() -> None:
    bench = Bench(a=Limits(max_op_nbytes=40), b=Limits(max_op_nbytes=30))
    record = bench.submit(nbytes=100)
    bench.fail(PeerLost("reset"))
    bench.take(bench.scheduler.route_lost("b", "p", "reset too", 0.0))
    while bench.running:
        bench.fail(PeerLost("reset"))
    waiting = bench.submit(nbytes=100)
    assert (record.stranded is not None, waiting.state) == (True, TransferState.QUEUED)
    assert bench.scheduler.next_wakeup() == STRANDED_SECONDS
    bench.now = 1.0
    bench.take(bench.scheduler.route_back("b", "p", 1.0))
    while bench.running:
        bench.done()
    assert {record.result().route, waiting.result().route} == {"b"}
    assert bench.scheduler.next_wakeup() is None


def test_a_transfer_does_not_wait_for_a_route_for_ever() -> None:
    bench = Bench()
    record, waiting, hurried, late = (bench.submit(deadline=at) for at in (None, None, 2.0, -1.0))
    while bench.running:
        bench.fail(PeerLost("reset"))
    assert late.state is TransferState.FAILED
    bench.tick(2.0)
    assert hurried.state is TransferState.FAILED
    assert record.state is TransferState.ACTIVE
    bench.tick(STRANDED_SECONDS)
    assert waiting.state is TransferState.FAILED
    assert isinstance(record.error, PeerLost)
    assert str(record.error) == "reset (sent again once in 5 s, by wire)"
    assert bench.scheduler.next_wakeup() is None


def test_what_waits_for_a_route_can_be_cancelled_and_lose_its_peer() -> None:
    bench = Bench()
    bench.take(bench.scheduler.route_lost("wire", "p", "reset", 0.0))
    cancelled, lost = bench.submit(), bench.submit()
    bench.cancel(cancelled)
    error = PeerLost("gone")
    bench.take(bench.scheduler.peer_lost("p", error, 0.0))
    assert (cancelled.state, lost.state, lost.error) == (TransferState.CANCELLED, TransferState.FAILED, error)
    assert bench.scheduler.next_wakeup() is None
    # The next to have that name is another.
    bench.submit()
    assert len(bench.running) == 1


def test_a_route_that_fails_whenever_it_is_back_is_given_up() -> None:
    bench = Bench()
    record = bench.submit()
    for _ in range(MAX_RETRIES + 1):
        bench.fail(PeerLost("reset"))
        assert record.state is TransferState.ACTIVE
        bench.take(bench.scheduler.route_back("wire", "p", bench.now))
    bench.fail(PeerLost("reset"))
    assert record.state is TransferState.FAILED


def test_what_may_not_be_quiet_is_not_sent_again() -> None:
    bench = Bench(a=Limits(max_ops=1, max_op_nbytes=BATCH_NBYTES), b=Limits())
    bench.submit(routes=("a",))
    records = [bench.submit(), bench.submit()]
    bench.done()
    error = Quarantined("bytes of it may still be written")
    bench.fail(error)
    assert [(record.state, record.error) for record in records] == [(TransferState.FAILED, error)] * 2
    assert not bench.running


def test_what_may_not_be_quiet_when_it_is_cancelled_fails() -> None:
    bench = Bench()
    record = bench.submit()
    bench.cancel(record)
    error = Quarantined("bytes of it may still be written")
    bench.fail(error)
    assert (record.state, record.error) == (TransferState.FAILED, error)


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


@pytest.mark.parametrize("frees", [True, False])
def test_a_quarantine_spares_a_source_that_its_backend_has_let_go_of(frees: bool) -> None:
    bench = Bench(wire=Limits(frees_source=frees))
    record = bench.submit()
    bench.cancel(record)
    bench.tick(100.0)
    assert isinstance(record.error, Quarantined)
    sides = [record.plan.dst] if frees else [record.plan.src, record.plan.dst]
    assert list(record.error.moving) == [region for side in sides for region in side.regions]
    assert ("local" in str(record.error)) is not frees


def test_a_quarantine_keeps_the_error_that_came_first() -> None:
    bench = Bench()
    record = bench.submit()
    error = PeerLost("gone")
    bench.take(bench.scheduler.peer_lost("p", error, 0.0))
    bench.tick(100.0)
    assert isinstance(record.error, Quarantined)
    assert record.error.__cause__ is error


# Comparing what was copied.


def test_a_transfer_that_is_checked_is_done_when_it_has_been() -> None:
    bench = Bench(wire=Limits(max_op_nbytes=60))
    record, other = bench.submit(check="sums"), bench.submit()
    bench.done()
    assert not bench.verifying
    bench.done()
    assert list(bench.verifying.values()) == [record]
    bench.done()
    bench.done()
    assert bench.finished == [other]
    assert (record.state, record.nbytes_left, bench.scheduler.in_flight("wire")) == (TransferState.ACTIVE, 0, (0, 0))
    bench.verified()
    assert bench.finished == [other, record]
    assert (record.state, record.error, record.attempts) == (TransferState.DONE, None, 2)


def test_one_that_does_not_pass_fails_and_is_not_tried_again() -> None:
    bench = Bench(first=Limits(), second=Limits())
    record = bench.submit(check="sums")
    bench.done()
    error = IntegrityError("page 3 differs", retryable=True)
    bench.verified(error)
    assert bench.finished == [record]
    assert (record.state, record.error, record.attempts) == (TransferState.FAILED, error, 1)
    assert [event for _, _, event, _ in record.history] == ["admit", "abort", "drain"]
    assert bench.scheduler.next_wakeup() is None


@pytest.mark.parametrize("why", ["cancelled", "peer lost"])
def test_what_is_decided_meanwhile_waits_for_the_comparison_to_stop(why: str) -> None:
    bench = Bench()
    record = bench.submit(check="sums")
    bench.done()
    lost = PeerLost("gone")
    if why == "cancelled":
        bench.cancel(record)
    else:
        bench.take(bench.scheduler.peer_lost("p", lost, 0.0))
    assert bench.stopped == list(bench.verifying)
    assert (record.state, bench.finished) == (TransferState.DRAINING, [])
    bench.verified(BackendError("the comparison was cancelled"))
    assert bench.finished == [record]
    wanted = (TransferState.CANCELLED, None) if why == "cancelled" else (TransferState.FAILED, lost)
    assert (record.state, record.error) == wanted


def test_a_comparison_that_does_not_stop_is_quarantined() -> None:
    bench = Bench()
    record = bench.submit(check="sums")
    bench.done()
    bench.cancel(record)
    bench.tick(VERIFY_DRAIN_SECONDS)
    assert bench.finished == [record]
    assert isinstance(record.error, Quarantined)
    bench.verified()
    assert bench.finished == [record]


# Whatever happens.

MACHINE_LIMITS = {
    "fast": Limits(
        max_ops=3, max_nbytes=3000, max_op_nbytes=1200, max_op_segments=12, drain_seconds=1.0, slice_nbytes=300, lanes=2
    ),
    "slow": Limits(2, 700, 500, 5, drain_seconds=2.0, max_peer_ops=1, max_peer_nbytes=600, slice_nbytes=0),
}
PEERS = [None, "p", "q"]
FAILURES: dict[str, Callable[[], TransferError]] = {
    "retryable": lambda: BackendError("busy", retryable=True),
    "broken": lambda: BackendError("broken"),
    "denied": lambda: TransferError("denied"),
    "differs": lambda: IntegrityError("page 3 differs"),
    "lost": lambda: PeerLost("lost"),
    "not quiet": lambda: Quarantined("bytes of it may still be written"),
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
        self.down: set[tuple[str, str]] = set()
        # Transfers of which an attempt may still land: nothing of them is sent again, and they end as quarantined.
        self.leaking: set[int] = set()
        self.passed: set[int] = set()

    # What the scheduler says.

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start(backend, op):
                    self.check_start(backend, op)
                case Verify(_, record):
                    assert record.check is not None
                    assert (self.covered[record.id] == 1).all()
                case Stop(op_id) if op_id in self.bench.verifying:
                    assert op_id not in self.stops
                    self.stops.add(op_id)
                    assert self.bench.verifying[op_id].state is TransferState.DRAINING
                case Stop(op_id):
                    assert op_id in self.bench.running
                    assert op_id not in self.stops
                    self.stops.add(op_id)
                    _, op = self.bench.running[op_id]
                    assert all(self.records[n].state is TransferState.DRAINING for n, _, _ in op.parts)
                case Lost(outage):
                    self.down.add((outage.backend, outage.peer))
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
            assert number not in self.leaking
        if op.peer is not None:
            assert (backend, op.peer) not in self.down

    def check_finish(self, record: TransferRecord) -> None:
        assert record.state.final
        assert sum(seen is record for seen in self.bench.finished) == 1
        busy = any(number == record.id for _, op in self.bench.running.values() for number, _, _ in op.parts)
        busy |= record in self.bench.verifying.values()
        match record.state:
            case TransferState.DONE:
                assert (self.covered[record.id] == 1).all()
                assert record.nbytes_done == record.plan.nbytes
                assert not busy
                assert record.id in self.passed or record.check is None or not record.plan.nbytes
            case TransferState.CANCELLED:
                assert record.cancel_requested
                assert not busy
            case TransferState.FAILED:
                assert record.error is not None
                assert busy == isinstance(record.error, Quarantined) or record.id in self.leaking

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
        check=st.sampled_from([None, None, "sums"]),
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
        chosen, error = self.pick(data), FAILURES[kind]()
        if isinstance(error, Quarantined):
            self.leaking |= {number for number, _, _ in self.bench.running[chosen][1].parts}
        self.take(self.bench.fail(error, chosen))

    @precondition(lambda self: self.bench.verifying)
    @rule(data=st.data(), equal=st.sampled_from([True, True, False]))
    def verified(self, data: st.DataObject, equal: bool) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.bench.verifying)), label="comparison")
        if equal:
            self.passed.add(self.bench.verifying[chosen].id)
        self.take(self.bench.verified(None if equal else IntegrityError("page 3 differs"), chosen))

    @precondition(lambda self: self.stops & set(self.bench.running))
    @rule()
    def a_stopped_op_ends(self) -> None:
        chosen = min(self.stops & set(self.bench.running))
        self.take(self.bench.fail(BackendError("the op was cancelled"), chosen))

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.take(self.bench.cancel(self.records[data.draw(st.sampled_from(sorted(self.records)), label="transfer")]))

    @rule(backend=st.sampled_from(["fast", "slow"]), peer=st.sampled_from(["p", "q"]))
    def route_lost(self, backend: str, peer: str) -> None:
        self.take(self.bench.take(self.bench.scheduler.route_lost(backend, peer, "lost", self.bench.now)))
        self.down.add((backend, peer))

    @precondition(lambda self: self.down)
    @rule(data=st.data())
    def route_back(self, data: st.DataObject) -> None:
        backend, peer = data.draw(st.sampled_from(sorted(self.down)), label="route")
        self.down.discard((backend, peer))
        self.take(self.bench.take(self.bench.scheduler.route_back(backend, peer, self.bench.now)))

    @rule(peer=st.sampled_from(["p", "q"]))
    def peer_lost(self, peer: str) -> None:
        self.down = {route for route in self.down if route[1] != peer}
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
            elif record.stranded is not None:
                assert record.peer is not None
                assert {(route, record.peer) for route in record.routes} <= self.down
                assert self.bench.scheduler.next_wakeup() is not None, f"{record} waits for nothing"
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
            elif self.bench.verifying:
                self.passed.add(next(iter(self.bench.verifying.values())).id)
                self.take(self.bench.verified())
            else:
                due = self.bench.scheduler.next_wakeup()
                assert due is not None
                self.take(self.bench.tick(due))
        assert {record.id for record in self.bench.finished} == set(self.records)


TestWhateverHappens = SchedulerMachine.TestCase
TestWhateverHappens.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

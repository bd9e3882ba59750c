"""Whose turn it is: shares between classes, turns between peers, room for what is urgent, and bounds for each peer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nixl_async.backend import Limits
from nixl_async.errors import ConfigurationError, PeerLost
from nixl_async.queues import LINGER_SECONDS, SHARES
from nixl_async.transfer import TrafficClass, TransferState
from tests.scheduling import Bench

LATENCY, NORMAL, BULK = TrafficClass
MIB = 1 << 20


def jain(values: list[int]) -> float:
    """Return Jain's fairness index: 1 when all are equal, 1/n when one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def run(bench: Bench, nbytes: int) -> Counter[int]:
    """End ops, the oldest first, until `nbytes` bytes have moved; return the bytes of each transfer."""
    moved: Counter[int] = Counter()
    while moved.total() < nbytes:
        _, op = bench.running[next(iter(bench.running))]
        moved.update({number: size for number, _, size in op.parts})
        bench.done()
    return moved


# Between classes.


@settings(max_examples=30, deadline=None)
@given(
    shares=st.fixed_dictionaries({one: st.sampled_from([1, 2, 5, 16]) for one in TrafficClass}),
    sizes=st.fixed_dictionaries({one: st.sampled_from([1000, 7000, 30000]) for one in TrafficClass}),
    max_ops=st.integers(1, 6),
)
def test_classes_get_their_shares_while_all_have_work(
    shares: Mapping[TrafficClass, int], sizes: Mapping[TrafficClass, int], max_ops: int
) -> None:
    bench = Bench(shares, wire=Limits(max_ops=max_ops, max_op_nbytes=8000, slice_nbytes=3000))
    bench.checked = False
    wanted = sum(shares.values()) * 60_000
    records = {
        bench.submit(nbytes=sizes[one], traffic_class=one, start=False).id: one
        for one in TrafficClass
        for _ in range(3 * shares[one] * 60_000 // sizes[one] + 10)
    }
    bench.take(bench.scheduler.dispatch(0.0))
    moved: Counter[TrafficClass] = Counter()
    for number, nbytes in run(bench, wanted).items():
        moved[records[number]] += nbytes
    for one in TrafficClass:
        expected = shares[one] / sum(shares.values())
        # An op of each class may be on its way.
        assert moved[one] / moved.total() == pytest.approx(expected, rel=0.1, abs=8000 * (max_ops + 1) / wanted)


def test_a_class_alone_gets_everything() -> None:
    for one in TrafficClass:
        bench = Bench(wire=Limits(max_ops=4, max_op_nbytes=8 * MIB))
        bench.submit(nbytes=64 * MIB, traffic_class=one)
        assert [op.nbytes for _, op in bench.started] == [8 * MIB] * 4


def test_a_class_has_no_claim_to_what_it_did_not_use() -> None:
    bench = Bench(wire=Limits(max_ops=1, batch=False))
    for _ in range(50):
        bench.submit(nbytes=1000, traffic_class=NORMAL)
    run(bench, 40_000)
    late = [bench.submit(nbytes=1000, traffic_class=BULK) for _ in range(20)]
    normal = [bench.submit(nbytes=1000, traffic_class=NORMAL) for _ in range(20)]
    run(bench, 11_000)
    assert sum(record.state is TransferState.DONE for record in late) in (2, 3)
    assert not any(record.state is TransferState.DONE for record in normal)


def test_shares_that_are_no_positive_numbers_are_refused() -> None:
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match=r"BULK.*positive"):
            Bench({BULK: wrong})
    with pytest.raises(ConfigurationError, match="'bulk'"):
        Bench({"bulk": 1.0})  # type: ignore[dict-item]
    assert set(SHARES) == set(TrafficClass)


# Room for what is urgent.


def test_bulk_leaves_room_and_is_cut_finer_while_latency_traffic_comes_and_goes() -> None:
    bench = Bench(wire=Limits(max_ops=4, max_nbytes=64 * MIB, max_op_nbytes=16 * MIB, slice_nbytes=MIB))
    bench.submit(nbytes=1024 * MIB, traffic_class=BULK)
    assert [op.nbytes for _, op in bench.started] == [16 * MIB] * 4
    bench.done()
    first = bench.submit(nbytes=MIB, traffic_class=LATENCY)
    while bench.running:
        if first.state is TransferState.DONE and len(bench.running) == 1:
            break
        bench.done()
    for _ in range(20):
        bench.now += LINGER_SECONDS / 2
        before = len(bench.started)
        record = bench.submit(nbytes=MIB, traffic_class=LATENCY)
        started = bench.started[before:]
        assert [op.parts[0][0] for _, op in started] == [record.id], "it starts at once"
        bench.done(started[0][1].id)
        (running,) = [op for _, op in bench.running.values()]
        assert running.nbytes == MIB
        bench.done()
    bench.now += LINGER_SECONDS
    run(bench, 32 * MIB)
    assert [op.nbytes for _, op in bench.running.values()] == [16 * MIB] * 4


def test_the_room_that_is_left_follows_the_shares() -> None:
    bench = Bench({LATENCY: 1, BULK: 3}, wire=Limits(max_ops=8, max_op_nbytes=MIB, slice_nbytes=MIB // 4))
    bench.submit(nbytes=MIB, traffic_class=LATENCY)
    bench.done()
    bench.submit(nbytes=64 * MIB, traffic_class=BULK)
    assert [op.nbytes for _, op in bench.running.values()] == [MIB // 4] * 6


def test_what_may_not_be_cut_is_not() -> None:
    for limits in (Limits(slice_nbytes=0), Limits(batch=False)):
        bench = Bench(wire=limits)
        bench.submit(nbytes=MIB, traffic_class=LATENCY)
        bench.submit(nbytes=4 * MIB, traffic_class=BULK)
        assert [op.nbytes for _, op in bench.started] == [MIB, 4 * MIB]


def test_small_bulk_transfers_share_no_larger_op_than_others_leave_room_for() -> None:
    bench = Bench(wire=Limits(max_ops=4, slice_nbytes=1000))
    bench.submit(traffic_class=LATENCY)
    for _ in range(40):
        bench.submit(nbytes=100, traffic_class=BULK, start=False)
    bench.take(bench.scheduler.dispatch(0.0))
    assert [op.nbytes for _, op in bench.started] == [100, 1000]


def test_a_large_transfer_that_waits_alone_is_cut_for_all_lanes() -> None:
    limits = Limits(max_ops=6, max_op_nbytes=64 * MIB, lanes=4)
    bench = Bench(wire=limits)
    record = bench.submit(nbytes=16 * MIB + 1)
    assert [op.nbytes for _, op in bench.started] == [4 * MIB + 4096] * 3 + [4 * MIB - 3 * 4096 + 1]
    run(bench, record.plan.nbytes)
    assert record.state is TransferState.DONE
    bench = Bench(wire=limits)
    bench.submit(nbytes=3 * MIB)
    assert [op.nbytes for _, op in bench.started] == [3 * MIB], "not worth it"
    bench.submit(nbytes=16 * MIB)
    third = 1366 * 4096
    assert [op.nbytes for _, op in bench.started[1:]] == [third, third, 16 * MIB - 2 * third], "for those that are free"


def test_what_does_not_wait_alone_is_not_cut_for_lanes() -> None:
    for second in ({}, {"traffic_class": BULK}, {"peer": "another"}, {"priority": -1}):
        bench = Bench(wire=Limits(max_ops=8, max_op_nbytes=64 * MIB, lanes=2, slice_nbytes=0))
        for options in ({}, second):
            bench.submit(nbytes=16 * MIB, start=False, **options)
        bench.take(bench.scheduler.dispatch(0.0))
        first, *_ = [op.nbytes for _, op in bench.started]
        assert first == 16 * MIB, second


# Between peers, and between transfers.


def test_peers_take_turns_by_bytes_not_by_ops() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=1000, batch=False))
    bench.checked = False
    sizes = {"p": 1000, "q": 100, "r": 350}
    records = {
        bench.submit(peer=peer, nbytes=nbytes, start=False).id: peer for peer, nbytes in sizes.items() for _ in range(300)
    }
    bench.take(bench.scheduler.dispatch(0.0))
    moved: Counter[str] = Counter()
    for number, nbytes in run(bench, 60_000).items():
        moved[records[number]] += nbytes
    assert max(moved.values()) - min(moved.values()) <= 1000


def test_a_thousand_requests_of_a_class_get_the_same() -> None:
    bench = Bench(wire=Limits(max_ops=4, max_op_nbytes=1000))
    bench.checked = False
    peers = itertools.cycle(["p", "q", "r", "s"])
    records = [bench.submit(peer=next(peers), nbytes=10_000, start=False) for _ in range(1000)]
    bench.take(bench.scheduler.dispatch(0.0))
    moved = run(bench, 4_500_000)
    bench.scheduler.check()
    assert jain([moved[record.id] for record in records]) >= 0.95


def test_a_small_transfer_does_not_wait_for_all_of_a_large_one_to_the_same_peer() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=1000, batch=False))
    bench.submit(nbytes=100_000)
    small = bench.submit(nbytes=500)
    bench.done()
    bench.done()
    bench.done()
    assert small.state is TransferState.DONE


def test_a_priority_that_ends_leaves_no_debt() -> None:
    bench = Bench(wire=Limits(max_ops=1, max_op_nbytes=1000, batch=False))
    bench.submit(peer="p", nbytes=100_000, priority=1)
    while bench.running:
        bench.done()
    records = {bench.submit(peer=peer, nbytes=1000, start=False).id: peer for peer in ("p", "q") for _ in range(20)}
    bench.take(bench.scheduler.dispatch(0.0))
    moved = run(bench, 20_000)
    assert Counter(records[number] for number in moved) == {"p": 10, "q": 10}


def test_deadlines_order_transfers_to_all_peers() -> None:
    bench = Bench(wire=Limits(max_ops=1, batch=False))
    bench.submit()
    deadlines = [5.0, 1.0, 4.0, None, 2.0, 3.0]
    records = [bench.submit(peer=f"p{n}", deadline=deadline) for n, deadline in enumerate(deadlines)]
    while bench.running:
        bench.done()
    assert bench.order()[1:] == [[records[n].id] for n in (1, 4, 5, 2, 0, 3)]


# Bounds for each peer.


def test_a_peer_has_its_own_bounds_and_others_pass_it() -> None:
    bench = Bench(wire=Limits(max_ops=8, max_op_nbytes=100, max_peer_ops=2, max_peer_nbytes=1000))
    bench.submit(peer="p", nbytes=1000)
    bench.submit(peer="q", nbytes=1000)
    assert Counter(op.peer for _, op in bench.running.values()) == {"p": 2, "q": 2}
    bench.done()
    assert Counter(op.peer for _, op in bench.running.values()) == {"p": 2, "q": 2}
    by_bytes = Bench(wire=Limits(max_ops=8, max_op_nbytes=100, max_peer_nbytes=250))
    by_bytes.submit(peer="p", nbytes=1000)
    by_bytes.submit(peer=None, nbytes=1000)
    assert Counter(op.peer for _, op in by_bytes.running.values()) == {"p": 2, None: 2}
    alone = Bench(wire=Limits(max_ops=8, max_op_nbytes=100, max_peer_nbytes=50))
    alone.submit(peer="p", nbytes=1000)
    assert len(alone.running) == 1
    while alone.running:
        alone.done()
    assert alone.finished[0].state is TransferState.DONE


def test_a_batch_keeps_a_peers_bytes_bounded() -> None:
    bench = Bench(wire=Limits(max_ops=8, max_op_nbytes=1000, max_peer_nbytes=450))
    for _ in range(10):
        bench.submit(nbytes=100, start=False)
    bench.take(bench.scheduler.dispatch(0.0))
    assert [op.nbytes for _, op in bench.started] == [400]


def test_the_urgent_of_a_full_peer_goes_first_when_there_is_room() -> None:
    bench = Bench(wire=Limits(max_ops=8, max_peer_ops=1))
    bench.submit()
    later, urgent, dated = bench.submit(), bench.submit(priority=1), bench.submit(deadline=1.0)
    for _ in range(4):
        bench.done()
    assert bench.order() == [[1], [urgent.id], [dated.id], [later.id]]


def test_a_peer_that_is_lost_while_its_transfers_are_out_of_turn_comes_back() -> None:
    bench = Bench(wire=Limits(max_ops=8, max_peer_ops=1))
    bench.submit()
    waiting = bench.submit(deadline=9.0)
    bench.take(bench.scheduler.peer_lost("p", PeerLost("gone"), 0.0))
    assert waiting.state is TransferState.FAILED
    again = bench.submit(deadline=9.0)
    assert len(bench.running) == 1, "the op of the lost one is not quiet yet"
    bench.done()
    bench.done()
    assert again.state is TransferState.DONE


def test_accounts_of_many_peers_and_deadlines_do_not_pile_up() -> None:
    bench = Bench(wire=Limits(max_ops=2))
    for n in range(500):
        bench.submit(peer=f"p{n}", deadline=float(n) if n % 2 else None)
        bench.take(bench.scheduler.peer_lost(f"p{n - 5}", PeerLost("gone"), 0.0))
        if len(bench.running) == 2:
            bench.done()
    while bench.running:
        bench.done()
    queue = bench.scheduler._backends["wire"]
    rings = [ring for one in queue.classes.values() for ring in one.rings.values()]
    assert len(rings) <= 2
    assert sum(len(ring.lanes) for ring in rings) <= 100
    assert len(queue.peers) <= 20

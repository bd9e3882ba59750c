"""What is counted, and that it stays bounded whoever comes and goes."""

from __future__ import annotations

import pytest

from nixl_async.counters import LOCAL, OTHER, RX, TX, Counters, Traffic, direction
from nixl_async.descriptors import MemoryKind, Region, make_plan
from nixl_async.errors import PeerLost
from nixl_async.memory import RemoteRegion
from nixl_async.transfer import TrafficClass
from tests.scheduling import region_at

NORMAL = TrafficClass.NORMAL


def move(traffic: Traffic, peer: str | None, nbytes: int, way: str = TX) -> None:
    moved = traffic.of("tcp", peer, NORMAL, way)
    moved.nbytes += nbytes
    moved.transfers += 1


def by_peer(traffic: Traffic) -> dict[str | None, int]:
    return {key[1]: moved.nbytes for key, moved in traffic.by_peer().items()}


def test_each_peer_has_its_own_until_there_is_no_room() -> None:
    traffic = Traffic(lambda peer: True, max_peers=2)
    for peer in ("a", "b", "c", "d", "a", None):
        move(traffic, peer, 10)
    assert by_peer(traffic) == {"a": 20, "b": 10, OTHER: 20, None: 10}
    assert traffic.named() == {"a", "b"}
    assert traffic.totals()["tcp", NORMAL, TX].nbytes == 60
    assert traffic.by_route() == {"tcp": 60}


def test_peers_that_are_gone_make_room_and_their_bytes_stay_in_the_total() -> None:
    there = {"a", "b"}
    traffic = Traffic(there.__contains__, max_peers=2)
    for peer in ("a", "b"):
        move(traffic, peer, 10)
    there.symmetric_difference_update({"a", "c"})
    move(traffic, "c", 5)
    assert by_peer(traffic) == {"b": 10, "c": 5}
    assert traffic.totals()["tcp", NORMAL, TX].nbytes == 25
    assert traffic.totals()["tcp", NORMAL, TX].transfers == 3


def test_what_is_kept_is_bounded_however_many_peers_come_and_go() -> None:
    there: set[str] = set()
    traffic = Traffic(there.__contains__, max_peers=4)
    for number in range(10_000):
        there.clear()
        there.add(f"peer {number}")
        move(traffic, f"peer {number}", 1)
    assert len(traffic.by_peer()) <= 5
    assert len(traffic.found) <= 4097
    assert traffic.by_route() == {"tcp": 10_000}


def of_kind(kind: MemoryKind, peer: str | None = None) -> Region:
    if peer is not None:
        return RemoteRegion(peer, "life", "r", 1 << 20, 8, kind=kind)
    region = region_at(1 << 20, 8, None)
    region.kind = kind
    return region


@pytest.mark.parametrize(
    ("src", "dst", "way"),
    [
        ((MemoryKind.DRAM, None), (MemoryKind.DRAM, "p"), TX),
        ((MemoryKind.DRAM, "p"), (MemoryKind.VRAM, None), RX),
        ((MemoryKind.DRAM, None), (MemoryKind.VRAM, None), LOCAL),
        ((MemoryKind.DRAM, None), (MemoryKind.FILE, None), TX),
        ((MemoryKind.OBJECT, None), (MemoryKind.DRAM, None), RX),
    ],
)
def test_which_way_bytes_go(src: tuple[MemoryKind, str | None], dst: tuple[MemoryKind, str | None], way: str) -> None:
    plan = make_plan(of_kind(*src)[:], of_kind(*dst)[:])
    assert direction(plan, plan.dst.peer or plan.src.peer) == way


def test_events_and_errors_are_counted_by_kind() -> None:
    counters = Counters()
    counters.happened("joined")
    counters.happened("joined")
    counters.failed(PeerLost("gone"))
    counters.registered(10)
    counters.registered(5)
    counters.deregistered(10)
    counters.notified(3)
    assert (counters.events, counters.errors) == ({"joined": 2}, {"PeerLost": 1})
    assert (counters.registered_nbytes, counters.registered_last_nbytes, counters.deregistered_nbytes) == (15, 5, 10)
    assert (counters.notifications_sent, counters.notifications_sent_nbytes) == (1, 3)

"""Who waits for a backend, and whose turn it is. Pure: time is an argument.

Between traffic classes bytes are shared by weight, between equally urgent transfers of a class by peer, both by start-time fair
queueing (Goyal, Vin and Cheng, 1996): whoever has had least, for its weight, since it last had nothing to send, is next.
Within a class the higher priority goes first, then the earlier deadline; transfers to one peer take turns, an op each.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from nixl_async.backend import Limits
from nixl_async.descriptors import Plan, Region
from nixl_async.errors import ConfigurationError
from nixl_async.transfer import TrafficClass, TransferRecord

SHARES: Mapping[TrafficClass, float] = {TrafficClass.LATENCY: 16.0, TrafficClass.NORMAL: 4.0, TrafficClass.BULK: 1.0}
"""How many bytes a class gets, for each byte of the others, while all have work."""
LINGER_SECONDS = 0.25
"""How long less urgent classes leave room for a class that has nothing more to send."""
BATCH_NBYTES = 256 << 10
"""Pieces up to this size may share an op with others to the same peer."""
LANE_NBYTES = 2 << 20
"""The least that is worth an op of its own where a transfer is cut for a backend that works on several at once."""
_PAGE = 4096
BATCH_PARTS = 128
"""The most transfers that share one op; all of them end in one iteration of the loop."""

Key: TypeAlias = tuple[int, float]
"""How urgent a transfer is within its class, (negative priority, deadline): the least goes first."""
Part: TypeAlias = tuple[TransferRecord, int, Plan]
"""What an op carries of a transfer: the record, the first byte within the transfer, the plan."""
_NEVER = float("inf")


def read_shares(shares: Mapping[TrafficClass, float] | None) -> dict[TrafficClass, float]:
    """Fill in the classes that `shares` does not name.

    Raises:
        ConfigurationError: a share is not a positive number.
    """
    weights = {**SHARES, **(shares or {})}
    for traffic_class, weight in weights.items():
        if not isinstance(traffic_class, TrafficClass) or not 0 < weight < _NEVER:
            raise ConfigurationError(
                f"the share of {traffic_class!r} is {weight!r}; shares are positive numbers, for TrafficClass members"
            )
    return weights


@dataclass(slots=True, eq=False)
class Peer:
    """What one backend has in flight towards one peer, and how many transfers wait, by class."""

    ops: int = 0
    nbytes: int = 0
    waiting: list[int] = field(default_factory=lambda: [0] * len(TrafficClass))
    parked: list[Lane] = field(default_factory=list)
    """The lanes that are out of turn until an op towards the peer ends."""


@dataclass(slots=True, eq=False)
class Lane:
    """The transfers of one class and urgency that wait for one backend towards one peer.

    `tag` is where its next bytes begin, in its peers' common count. `listed`: it is in its ring's heap.
    """

    ring: Ring
    peer: Peer
    tag: float
    records: deque[TransferRecord] = field(default_factory=deque)
    listed: bool = False
    parked: bool = False

    def head(self) -> TransferRecord | None:
        """Return the transfer whose turn it is; forget those that no longer wait here."""
        records = self.records
        while records:
            if records[0].waits_in is self:
                return records[0]
            records.popleft()
        return None

    def take(self) -> Part:
        """Take a piece of the head; if more of it is left, it goes behind the others."""
        record = self.records[0]
        start, piece = record.take()
        self.records.popleft()
        if record.peek() is None:
            leave(record)
        else:
            self.records.append(record)
        return record, start, piece


@dataclass(slots=True, eq=False)
class Ring:
    """The lanes of one class and urgency, the one that has had least first; `now` is where the one served last began."""

    queue: ClassQueue
    key: Key
    lanes: dict[str | None, Lane] = field(default_factory=dict)
    heap: list[tuple[float, int, Lane]] = field(default_factory=list)
    now: float = 0.0
    parked: int = 0
    listed: bool = False

    def enlist(self, lane: Lane) -> None:
        """Let a lane take part."""
        if lane.tag < self.now:
            lane.tag = self.now
        lane.listed = True
        heapq.heappush(self.heap, (lane.tag, next(_sequence), lane))
        if not self.listed:
            self.queue.enlist(self)

    def charge(self, lane: Lane, nbytes: int) -> None:
        """Count the bytes that the first lane has sent."""
        self.now = lane.tag
        lane.tag += nbytes
        if lane.head() is None:
            heapq.heappop(self.heap)
            lane.listed = False
            if len(self.lanes) > 2 * (len(self.heap) + self.parked) + 64:
                self.lanes = {name: lane for name, lane in self.lanes.items() if lane.records or lane.tag > self.now}
        else:
            heapq.heapreplace(self.heap, (lane.tag, next(_sequence), lane))


_sequence = itertools.count()


class ClassQueue:
    """The transfers of one traffic class that wait for one backend, and what it has in flight.

    `tag` is where its next bytes begin in the backend's count, in bytes for each unit of `weight`.
    """

    __slots__ = ("backend", "index", "keys", "last", "ops", "rings", "tag", "weight")

    def __init__(self, backend: BackendQueue, index: int, weight: float) -> None:
        self.backend = backend
        self.index = index
        self.weight = weight
        self.tag = 0.0
        self.last = -_NEVER
        self.ops = 0
        self.rings: dict[Key, Ring] = {}
        self.keys: list[Key] = []

    def enlist(self, ring: Ring) -> None:
        """Let a ring take part; a class that had nothing to send has no claim to what it did not use."""
        if not self.keys and self.tag < self.backend.now:
            self.tag = self.backend.now
        ring.listed = True
        heapq.heappush(self.keys, ring.key)

    def push(self, record: TransferRecord, now: float, *, front: bool = False) -> None:
        """Let a transfer wait behind those of its urgency, or in front of them; one that waits here already stays in place."""
        key = (-record.priority, _NEVER if record.deadline is None else record.deadline)
        ring = self.rings.get(key)
        if ring is None:
            ring = self.rings[key] = Ring(self, key)
        lane = ring.lanes.get(record.peer)
        if lane is None:
            lane = ring.lanes[record.peer] = Lane(ring, self.backend.peer(record.peer), ring.now)
        if record.waits_in is lane:
            return
        leave(record)
        record.waits_in = lane
        lane.peer.waiting[self.index] += 1
        if front:
            lane.records.appendleft(record)
        else:
            lane.records.append(record)
        if not lane.listed and not lane.parked:
            ring.enlist(lane)
        self.last = now

    def first(self) -> Lane | None:
        """Return the lane whose turn it is; put those aside whose peers have all they may have in flight."""
        keys = self.keys
        while keys:
            ring = self.rings[keys[0]]
            while ring.heap:
                lane = ring.heap[0][2]
                head = lane.head()
                if head is None:
                    heapq.heappop(ring.heap)
                    lane.listed = False
                elif self.backend.peer_is_full(lane.peer, head):
                    heapq.heappop(ring.heap)
                    lane.listed, lane.parked = False, True
                    ring.parked += 1
                    lane.peer.parked.append(lane)
                else:
                    return lane
            heapq.heappop(keys)
            ring.listed = False
            self._drop(ring)
        return None

    def unpark(self, lane: Lane) -> None:
        """Let a lane take part that was put aside."""
        lane.parked = False
        lane.ring.parked -= 1
        if lane.head() is not None:
            lane.ring.enlist(lane)
        elif not lane.ring.listed:
            self._drop(lane.ring)

    def forget(self, name: str) -> None:
        """Forget a peer, towards which nothing waits."""
        for ring in list(self.rings.values()):
            lane = ring.lanes.pop(name, None)
            if lane is not None and not ring.listed:
                self._drop(ring)

    def _drop(self, ring: Ring) -> None:
        # Those without deadline are few, and needed again.
        if ring.parked == 0 and ring.key[1] != _NEVER:
            del self.rings[ring.key]


@dataclass(slots=True, eq=False)
class Turn:
    """What is next: a lane, and how many bytes its op may have. `slice_nbytes`: others want room too; larger pieces are cut."""

    lane: Lane
    room: int
    slice_nbytes: int


class BackendQueue:
    """What waits for one backend, and what it has in flight. `now` is where the class served last began."""

    __slots__ = ("_urgent_first", "classes", "limits", "name", "nbytes", "now", "ops", "peers")

    def __init__(self, name: str, limits: Limits, weights: Mapping[TrafficClass, float]) -> None:
        self.name = name
        self.limits = limits
        self.now = 0.0
        self.ops = 0
        self.nbytes = 0
        self.peers: dict[str | None, Peer] = {}
        self.classes = {c: ClassQueue(self, index, weights[c]) for index, c in enumerate(TrafficClass)}
        self._urgent_first = tuple(self.classes.values())

    def push(self, record: TransferRecord, now: float, *, front: bool = False) -> None:
        """Let a transfer wait behind those of its class and urgency, or in front of them."""
        self.classes[record.traffic_class].push(record, now, front=front)

    def idle(self, name: str | None, traffic_class: TrafficClass) -> bool:
        """Return whether nothing of the class, or of a more urgent one, waits towards a peer."""
        peer = self.peers.get(name)
        return peer is None or not any(peer.waiting[: self.classes[traffic_class].index + 1])

    def peer(self, name: str | None) -> Peer:
        """Return the account of a peer."""
        peer = self.peers.get(name)
        if peer is None:
            peer = self.peers[name] = Peer()
        return peer

    def forget(self, name: str) -> None:
        """Forget a peer, towards which nothing waits."""
        for queue in self._urgent_first:
            queue.forget(name)
        peer = self.peers.get(name)
        if peer is not None and peer.ops == 0:
            del self.peers[name]

    def peer_is_full(self, peer: Peer, record: TransferRecord) -> bool:
        """Return whether the next piece of a transfer would be too much in flight for its peer."""
        limits = self.limits
        if limits.max_peer_ops and peer.ops >= limits.max_peer_ops:
            return True
        if not limits.max_peer_nbytes or not peer.nbytes:
            return False
        piece = record.peek()
        return piece is not None and peer.nbytes + piece.nbytes > limits.max_peer_nbytes

    def next(self, now: float) -> Turn | None:
        """Return whose turn it is, `None` if nothing that waits finds room."""
        limits = self.limits
        if self.ops >= limits.max_ops:
            return None
        chosen: ClassQueue | None = None
        lane: Lane | None = None
        above, slice_nbytes = 0.0, 0
        for queue in self._urgent_first:
            first = queue.first() if queue.keys else None
            if first is not None and (chosen is None or queue.tag < chosen.tag):
                # Among those that wait, order is enough. For those that may come any moment, a place must be free.
                room = max(1, int(limits.max_ops * queue.weight / (queue.weight + above)))
                if chosen is not None or not above or queue.ops < room:
                    chosen, lane = queue, first
                    slice_nbytes = limits.slice_nbytes if above and limits.batch else 0
            if first is not None or queue.ops or now - queue.last < LINGER_SECONDS:
                above += queue.weight
        head = None if lane is None else lane.head()
        if lane is None or head is None:
            return None
        piece = head.peek()
        assert piece is not None
        if not slice_nbytes and limits.lanes > 1 and piece.nbytes >= 2 * LANE_NBYTES and len(lane.records) == 1:
            slice_nbytes = self._share_of_lanes(lane)
        nbytes = min(piece.nbytes, slice_nbytes or piece.nbytes)
        if self.nbytes and self.nbytes + nbytes > limits.max_nbytes:
            return None
        room = _room(limits.max_nbytes, self.nbytes, nbytes)
        if limits.max_peer_nbytes:
            room = min(room, _room(limits.max_peer_nbytes, lane.peer.nbytes, nbytes))
        return Turn(lane, room, slice_nbytes)

    def _share_of_lanes(self, lane: Lane) -> int:
        """Return the size to which pieces of the only transfer that waits are cut, so that no lane idles; 0 for none."""
        free = self.limits.lanes - self.ops
        chosen, record = lane.ring.queue, lane.records[0]
        others = any(queue.keys for queue in self._urgent_first if queue is not chosen)
        if others or len(chosen.keys) > 1 or len(lane.ring.heap) > 1 or record.n_left >= free:
            return 0
        return max(LANE_NBYTES, (record.nbytes_left + free - 1) // free + _PAGE - 1 & -_PAGE)

    def take(self, turn: Turn) -> list[Part]:
        """Take what the next op carries, and count it as in flight."""
        lane, limits = turn.lane, self.limits
        head = lane.records[0]
        if turn.slice_nbytes:
            head.cut(turn.slice_nbytes, limits.max_op_segments)
        part = lane.take()
        parts, nbytes = [part], part[2].nbytes
        if limits.batch and not head.solo and nbytes <= BATCH_NBYTES:
            nbytes = self._fill(lane, parts, min(limits.max_op_nbytes, turn.room, turn.slice_nbytes or turn.room))
        queue = lane.ring.queue
        lane.ring.charge(lane, nbytes)
        self.now = queue.tag
        queue.tag += nbytes / queue.weight
        queue.ops += 1
        lane.peer.ops += 1
        lane.peer.nbytes += nbytes
        self.ops += 1
        self.nbytes += nbytes
        return parts

    def _fill(self, lane: Lane, parts: list[Part], max_nbytes: int) -> int:
        """Add small pieces that may share the op of the first; return the bytes of all."""
        head, _, plan = parts[0]
        nbytes, segments, max_segments = plan.nbytes, len(plan.lengths), self.limits.max_op_segments
        records, waiting, index = lane.records, lane.peer.waiting, lane.ring.queue.index
        for _ in range(BATCH_PARTS - 1):
            if not records or (record := records[0]).waits_in is not lane:
                if lane.head() is None:
                    break
                record = records[0]
            piece = record.peek()
            if piece is None or record.solo or piece.nbytes > BATCH_NBYTES or not _alike(head, record):
                break
            segments += len(piece.lengths)
            if nbytes + piece.nbytes > max_nbytes or segments > max_segments:
                break
            nbytes += piece.nbytes
            # As `Lane.take`, written out: this runs once for each small transfer.
            start, piece = record.take()
            parts.append((record, start, piece))
            records.popleft()
            if record.taken < len(record.pieces) or record.again:
                records.append(record)
            else:
                waiting[index] -= 1
                record.waits_in = None
        return nbytes

    def land(self, queue: ClassQueue, peer: Peer, nbytes: int, now: float) -> None:
        """Take note that an op has ended."""
        self.ops -= 1
        self.nbytes -= nbytes
        peer.ops -= 1
        peer.nbytes -= nbytes
        queue.ops -= 1
        queue.last = now
        if peer.parked:
            parked, peer.parked = peer.parked, []
            for lane in parked:
                lane.ring.queue.unpark(lane)

    def check(self, flights: Iterable[tuple[ClassQueue, Peer, int]], records: Iterable[TransferRecord]) -> None:
        """Assert that the accounts agree with what is in flight and what waits; for tests and for debugging."""
        flying = list(flights)
        limits, sizes = self.limits, [nbytes for _, _, nbytes in flying]
        assert (self.ops, self.nbytes) == (len(sizes), sum(sizes)), self.name
        assert self.ops <= limits.max_ops, self.name
        assert self.nbytes <= limits.max_nbytes or self.ops == 1, self.name
        for queue in self._urgent_first:
            assert queue.ops == sum(one is queue for one, _, _ in flying), self.name
        lanes = [record.waits_in for record in records if record.waits_in is not None]
        mine = [lane for lane in lanes if lane.ring.queue.backend is self]
        for lane in mine:
            assert lane.listed or lane.parked, self.name
            assert lane.ring.queue.rings[lane.ring.key] is lane.ring, self.name
            assert not lane.parked or lane.peer.ops, self.name
        for name, peer in self.peers.items():
            sizes = [nbytes for _, one, nbytes in flying if one is peer]
            assert (peer.ops, peer.nbytes) == (len(sizes), sum(sizes)), (self.name, name)
            assert not limits.max_peer_ops or peer.ops <= limits.max_peer_ops, (self.name, name)
            assert not limits.max_peer_nbytes or peer.nbytes <= limits.max_peer_nbytes or peer.ops == 1, (self.name, name)
            for index, waiting in enumerate(peer.waiting):
                assert waiting == sum(lane.peer is peer and lane.ring.queue.index == index for lane in mine), (self.name, name)


def leave(record: TransferRecord) -> None:
    """Take a transfer out of where it waits, if it does."""
    lane = record.waits_in
    if lane is not None:
        lane.peer.waiting[lane.ring.queue.index] -= 1
        record.waits_in = None


def _room(limit: int, used: int, nbytes: int) -> int:
    """Return the bytes that may be added; where nothing is in flight, an op larger than the limit may go alone."""
    return limit - used if used else max(limit, nbytes)


def _alike(a: TransferRecord, b: TransferRecord) -> bool:
    """Return whether two transfers of one lane may share an op."""
    if a.put is not b.put:
        return False
    one, other = a.plan, b.plan
    return _same_place(one.src.regions[0], other.src.regions[0]) and _same_place(one.dst.regions[0], other.dst.regions[0])


def _same_place(a: Region, b: Region) -> bool:
    return a is b or (a.kind is b.kind and a.device == b.device)

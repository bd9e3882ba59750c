"""What an agent counts: plain numbers, added to where things happen, read by whoever asks. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from nixl_async.descriptors import MemoryKind, Plan
from nixl_async.transfer import TrafficClass

MAX_PEERS = 64
"""So many peers have counts of their own at a time; the others share those of `OTHER`."""
OTHER = "other"
TX, RX, LOCAL = "tx", "rx", "local"
_MAX_FOUND = 4096
_STORED = (MemoryKind.FILE, MemoryKind.OBJECT)

Key: TypeAlias = tuple[str, str | None, TrafficClass, str]
"""The backend, the peer (None: this agent itself, or storage), the traffic class and the direction of bytes that were moved."""


@dataclass(slots=True, eq=False)
class Moved:
    """Bytes that are in place, those of transfers that then failed included, and how many transfers are DONE."""

    nbytes: int = 0
    transfers: int = 0


class Traffic:
    """What was moved, by backend, peer, class and direction, for a bounded number of peers.

    Peers beyond `max_peers` are counted together as `OTHER`. When there is no room, those that are not `connected` any more give up
    theirs; `totals` keeps what they moved. `found` are the counts by key, for who adds to them often.
    """

    def __init__(self, connected: Callable[[str], bool] = lambda peer: True, max_peers: int = MAX_PEERS) -> None:
        self._connected, self.max_peers = connected, max_peers
        self.found: dict[Key, Moved] = {}
        self._moved: dict[Key, Moved] = {}
        self._past: dict[tuple[str, TrafficClass, str], Moved] = {}
        self._named: set[str] = set()
        # Where there are more keys, those of peers that are gone are looked for.
        self._crowded = _MAX_FOUND

    def of(self, route: str, peer: str | None, traffic_class: TrafficClass, direction: str) -> Moved:
        """Return the counts to add to; not to be kept."""
        key = route, peer, traffic_class, direction
        moved = self.found.get(key)
        return self._add(key) if moved is None else moved

    def by_peer(self) -> dict[Key, Moved]:
        """Return the counts of each peer that has some of its own, and of `OTHER`. Any thread may call it."""
        return dict(list(self._moved.items()))

    def named(self) -> set[str]:
        """Return the peers that have counts of their own. Any thread may call it."""
        return set(self._named)

    def totals(self) -> dict[tuple[str, TrafficClass, str], Moved]:
        """Return the counts of all peers together, those that are gone included. Any thread may call it."""
        found: dict[tuple[str, TrafficClass, str], Moved] = {}
        for (route, _, traffic_class, direction), moved in list(self._moved.items()):
            _join(found, (route, traffic_class, direction), moved)
        for key, moved in list(self._past.items()):
            _join(found, key, moved)
        return found

    def by_route(self) -> dict[str, int]:
        """Return the bytes that each backend moved."""
        found: dict[str, int] = {}
        for (route, _, _), moved in self.totals().items():
            found[route] = found.get(route, 0) + moved.nbytes
        return {route: nbytes for route, nbytes in found.items() if nbytes}

    def _add(self, key: Key) -> Moved:
        route, peer, traffic_class, direction = key
        label = peer
        if peer is not None and peer not in self._named:
            full = len(self._named) >= self.max_peers and not all(map(self._connected, self._named))
            if full or len(self.found) >= self._crowded:
                self._drop_gone()
                self._crowded = max(_MAX_FOUND, 2 * len(self.found))
            if len(self._named) < self.max_peers:
                self._named.add(peer)
            else:
                label = OTHER
        moved = self.found[key] = self._moved.setdefault((route, label, traffic_class, direction), Moved())
        return moved

    def _drop_gone(self) -> None:
        for key in [key for key in self.found if key[1] is not None and not self._connected(key[1])]:
            del self.found[key]
            if key[1] in self._named and (moved := self._moved.pop(key, None)) is not None:
                _join(self._past, (key[0], key[2], key[3]), moved)
        self._named = {peer for peer in self._named if self._connected(peer)}


def _join(found: dict[tuple[str, TrafficClass, str], Moved], key: tuple[str, TrafficClass, str], moved: Moved) -> None:
    total = found.setdefault(key, Moved())
    total.nbytes += moved.nbytes
    total.transfers += moved.transfers


def direction(plan: Plan, peer: str | None) -> str:
    """Return which way a plan's bytes go: to a peer or to storage (TX), from there (RX), or neither (LOCAL)."""
    if peer is not None:
        return RX if plan.dst.regions[0].peer is None else TX
    if plan.dst.regions[0].kind in _STORED:
        return TX
    return RX if plan.src.regions[0].kind in _STORED else LOCAL


@dataclass(slots=True, eq=False)
class Counters:
    """What else an agent counts. `events` are those of its peers by kind, `errors` why transfers failed by the error's class."""

    registered_nbytes: int = 0
    registered_last_nbytes: int = 0
    deregistered_nbytes: int = 0
    deregistered_last_nbytes: int = 0
    notifications_sent: int = 0
    notifications_sent_nbytes: int = 0
    quarantines: int = 0
    events: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)

    def registered(self, nbytes: int) -> None:
        """Count memory that was registered."""
        self.registered_nbytes += nbytes
        self.registered_last_nbytes = nbytes

    def deregistered(self, nbytes: int) -> None:
        """Count memory that is not registered any more."""
        self.deregistered_nbytes += nbytes
        self.deregistered_last_nbytes = nbytes

    def notified(self, nbytes: int) -> None:
        """Count a notification that was sent."""
        self.notifications_sent += 1
        self.notifications_sent_nbytes += nbytes

    def happened(self, kind: str) -> None:
        """Count what happened to a peer."""
        self.events[kind] = self.events.get(kind, 0) + 1

    def failed(self, error: BaseException) -> None:
        """Count why a transfer failed."""
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1

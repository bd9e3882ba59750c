"""Memory of peers that is leased to this agent: until when it may be used, renewing that, and giving it back quiet.

The owner's seconds begin later than ours: ours count from when the grant came, and from when a renewal that the owner has answered
was sent; the owner's from when it heard of either. So ours end first. Both are counted by CLOCK_BOOTTIME (Linux, `man 2
clock_gettime`), which goes on while a machine is suspended and which nobody sets; two of them may differ in rate by `DRIFT`.

The clock decides when transfers must end, never that they have ended: what tells the owner that its memory is quiet is a QUIET
frame, sent when no transfer of ours holds the region any more, or what `nixl_async.leases` says of a peer that sends none.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from nixl_async.errors import LeaseEnded, PeerLost, ProtocolError
from nixl_async.memory import RemoteRegion
from nixl_async.peers import Peer, read_region
from nixl_async.wire import FrameType, decode_json, encode_json

if TYPE_CHECKING:
    from nixl_async.descriptors import Region, Side
    from nixl_async.link import Link

logger = logging.getLogger("nixl_async.leases")

MAX_HELD = 1 << 20
DRIFT = 0.002
"""How much the rates of two hosts' clocks may differ: NTP corrects by 0.0005 at most (`man 2 adjtimex`), crystals err by less."""
RENEWALS = 3
"""How many renewals are sent during the shortest lease that is held of an owner."""
MIN_SECONDS, MAX_SECONDS = 0.1, 86400.0
ENDED_AT_ONCE = 64
"""How many leases are ended in one step of the loop."""
IDS_AT_ONCE = 4096
"""How many leases one frame names."""


def clock() -> float:
    """Return the time that leases are counted by, in seconds since the machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeasedRegion(RemoteRegion):
    """A peer's memory that it leased to this agent; `expires` is when it must be renewed at the latest, by `clock()`.

    After that, and after the owner has revoked the lease, transfers with it fail with `LeaseEnded`.
    """

    number: int = 0
    seconds: float = 0.0
    since: float = 0.0
    """When the grant came."""
    account: _Account
    on_unused: Callable[[], None] | None = None
    end: Callable[[str], None]

    @property
    def expires(self) -> float:
        """When the lease runs out unless it is renewed, by `clock()`."""
        account = self.account
        begun = max(self.since, account.renewed) if self.number <= account.through else self.since
        return begun + self.seconds * (1 - DRIFT)

    def check_usable(self) -> None:
        """Raise `LeaseEnded` when the lease is over, `PeerLost` when that life of its owner is."""
        if self.peer_gone:
            raise PeerLost(self.withdrawn, peer=self.peer)
        if self.withdrawn or clock() >= self.expires:
            raise self.ended()

    def ended(self) -> LeaseEnded:
        """Return the error that says so."""
        why = self.withdrawn or f"it ran out {clock() - self.expires:.3f} s ago"
        text = f"the lease of {self.seconds:g} s on region {self.name!r} of peer {self.peer!r} has ended: {why}"
        return LeaseEnded(text, peer=self.peer)

    def release(self) -> None:
        """Count one transfer less, and tell whoever waits for the last."""
        super().release()
        if self.on_unused is not None and self._holders == 0:
            self.on_unused()

    async def give_back(self) -> None:
        """End the lease before its time: fail what uses the region, tell the owner when that is quiet, and return. Idempotent."""
        if self.account.held.get(self.number) is self:
            self.end("it was given back")
        await self.wait_unused()

    @property
    def used(self) -> bool:
        """Whether a transfer holds it."""
        return self._holders > 0


def not_leased(backend: str, src: Side, dst: Side) -> str | None:
    """Return why a lease keeps `backend` from copying between the two sides, `None` if none does."""
    for region in (src if src.peer is not None else dst).regions:
        if isinstance(region, LeasedRegion) and backend not in region.keys:
            return f"region {region.name!r} of peer {region.peer!r} is not leased to us for it"
    return None


@dataclass(slots=True, eq=False)
class _Account:
    """The leases held of one life of an owner."""

    peer: Peer
    link: Link | None = None
    held: dict[int, LeasedRegion] = field(default_factory=dict)
    ending: dict[int, LeasedRegion] = field(default_factory=dict)
    """Ended, and still used by transfers that are being stopped."""
    returned: set[int] = field(default_factory=set)
    """Given back by ourselves since the last renewal that was answered."""
    quiet: list[int] = field(default_factory=list)
    """What the owner is about to be told of."""
    latest: int = 0
    through: int = 0
    renewed: float = -math.inf
    asked: tuple[int, float, int, frozenset[int]] | None = None
    """The renewal that is not answered: its number, when it was sent, up to which id, and what had been returned then."""
    number: int = 0
    next_renewal: float = 0.0
    bound: float = math.inf
    """No lease runs out before."""
    timer: asyncio.TimerHandle | None = None

    def shortest(self) -> float:
        return min((region.seconds for region in self.held.values()), default=math.inf)


class Holdings:
    """What this agent holds on lease. `abort(region, error)` must fail the transfers that touch a region.

    `changed(name)` is told whose regions are not what they were; `forget(region)` lets backends let go of one.
    """

    def __init__(self, changed: Callable[[str], None], forget: Callable[[LeasedRegion], None]) -> None:
        self.abort: Callable[[Region, Callable[[], LeaseEnded | PeerLost]], None] = lambda region, error: None
        self._changed, self._forget = changed, forget
        self._accounts: dict[tuple[str, str], _Account] = {}

    # What the link brings.

    def granted(self, peer: Peer, link: Link, payload: bytes) -> None:
        """Take a LEASE."""
        value = decode_json(payload, id=int, seconds=float, region=dict)
        number, seconds = value["id"], value["seconds"]
        if number <= 0 or not MIN_SECONDS <= seconds <= MAX_SECONDS:
            raise ProtocolError(f"{peer.name!r} offers the lease {number} of {seconds!r} s")
        account = self._accounts.setdefault((peer.name, peer.incarnation), _Account(peer))
        account.peer, account.link = peer, link
        if number in account.ending:
            return
        if len(account.held) >= MAX_HELD:
            raise ProtocolError(f"{peer.name!r} leases more than {MAX_HELD} regions")
        if number not in account.held:
            region = read_region(peer.name, peer.incarnation, value["region"], LeasedRegion)
            region.number, region.seconds, region.since, region.account = number, seconds, clock(), account
            region.end = partial(self._end, account, region)
            account.held[number] = region
            account.latest = max(account.latest, number)
            account.bound = min(account.bound, region.expires)
            account.next_renewal = min(account.next_renewal or math.inf, region.since + seconds / RENEWALS)
            peer.regions[region.name] = region
            self._arm(account)
            self._changed(peer.name)
        link.send(encode_json(FrameType.LEASED, {"id": number}))

    def revoked(self, peer: Peer, link: Link, payload: bytes) -> None:
        """Take a REVOKE: stop what uses those regions; say of each that it is quiet once it is."""
        account = self._accounts.get((peer.name, peer.incarnation))
        ids = read_ids(payload)
        if account is None:
            send_ids(link, FrameType.QUIET, ids)
        else:
            account.link = link
            self._revoke_some(account, ids)

    def _revoke_some(self, account: _Account, ids: list[int]) -> None:
        for number in ids[:ENDED_AT_ONCE]:
            if (region := account.held.get(number)) is not None:
                self._end(account, region, "its owner ended it", told=True)
            elif number not in account.ending:
                self._say_quiet(account, number)
        if len(ids) > ENDED_AT_ONCE:
            asyncio.get_running_loop().call_soon(self._revoke_some, account, ids[ENDED_AT_ONCE:])

    def renewed(self, peer: Peer, payload: bytes) -> None:
        """Take a RENEWED: the seconds count from when that renewal was sent."""
        account = self._accounts.get((peer.name, peer.incarnation))
        number = decode_json(payload, number=int)["number"]
        if account is None or account.asked is None or account.asked[0] != number:
            return
        _, account.renewed, account.through, told = account.asked
        account.asked = None
        account.returned -= told
        self._arm(account)

    # What the membership tells.

    def joined(self, peer: Peer) -> None:
        """Say again, over the link that the peer has, what an earlier one may not have delivered."""
        account = self._accounts.get((peer.name, peer.incarnation))
        if account is None or peer.link is None:
            return
        account.peer, account.link, account.asked, account.next_renewal = peer, peer.link, None, clock()
        send_ids(peer.link, FrameType.QUIET, list(account.returned))
        self._arm(account)

    def lost(self, peer: Peer) -> None:
        """Hold nothing of a peer that is gone any more; its transfers have been failed."""
        account = self._accounts.get((peer.name, peer.incarnation))
        if account is None:
            return
        for region in list(account.held.values()):
            self._end(account, region, peer.gone or "its owner is gone", told=True)
        # Before the LEAVE that may follow.
        self._send_quiet(account)
        self._settle(account)

    def close(self) -> None:
        """Stop the clocks."""
        for account in self._accounts.values():
            if account.timer is not None:
                account.timer.cancel()
        self._accounts.clear()

    # Inside.

    def _arm(self, account: _Account) -> None:
        if account.timer is not None:
            account.timer.cancel()
            account.timer = None
        if account.held:
            due = account.bound if account.asked is not None else min(account.bound, account.next_renewal)
            loop = asyncio.get_running_loop()
            account.timer = loop.call_later(max(0.0, due - clock()), self._due, account)

    def _due(self, account: _Account) -> None:
        account.timer = None
        now = clock()
        if now >= account.bound:
            for region in [region for region in account.held.values() if now >= region.expires]:
                self._end(account, region, "it ran out: its owner did not answer its renewal in time")
            account.bound = min((region.expires for region in account.held.values()), default=math.inf)
        if account.held and account.asked is None and now >= account.next_renewal and account.link is not None:
            account.number += 1
            account.asked = account.number, now, account.latest, frozenset(account.returned)
            account.next_renewal = now + account.shortest() / RENEWALS
            account.link.send(encode_json(FrameType.RENEW, {"number": account.number, "through": account.latest}))
        self._arm(account)

    def _end(self, account: _Account, region: LeasedRegion, why: str, *, told: bool = False) -> None:
        """End a lease, by our own clock unless `told`: stop what uses the region, and give it back when that is quiet."""
        del account.held[region.number]
        if not region.withdrawn:
            region.withdrawn = why
        account.ending[region.number] = region
        if account.peer.regions.get(region.name) is region:
            del account.peer.regions[region.name]
        if not told:
            account.returned.add(region.number)
        if region.used:
            region.on_unused = partial(self._give_back, account, region)
            self.abort(region, region.ended)
        else:
            self._give_back(account, region)
        self._changed(account.peer.name)

    def _give_back(self, account: _Account, region: LeasedRegion) -> None:
        region.on_unused = None
        del account.ending[region.number]
        self._say_quiet(account, region.number)
        self._forget(region)
        self._settle(account)

    def _say_quiet(self, account: _Account, number: int) -> None:
        if not account.quiet:
            asyncio.get_running_loop().call_soon(self._send_quiet, account)
        account.quiet.append(number)

    def _send_quiet(self, account: _Account) -> None:
        quiet, account.quiet = account.quiet, []
        if account.link is not None:
            send_ids(account.link, FrameType.QUIET, quiet)

    def _settle(self, account: _Account) -> None:
        if not account.held and account.timer is not None:
            account.timer.cancel()
            account.timer = None
        if not account.held and not account.ending and (account.link is None or account.link.closed):
            self._accounts.pop((account.peer.name, account.peer.incarnation), None)


def read_ids(payload: bytes) -> list[int]:
    """Read the ids of a frame.

    Raises:
        ProtocolError: they are no list of integers, or too many.
    """
    ids: list[Any] = decode_json(payload, ids=list)["ids"]
    if len(ids) > IDS_AT_ONCE or any(type(number) is not int for number in ids):
        raise ProtocolError(f"a frame names {len(ids)} leases; it must be a list of at most {IDS_AT_ONCE} integers")
    return ids


def send_ids(link: Link, kind: FrameType, ids: list[int]) -> None:
    """Send ids, in as many frames as it takes."""
    for at in range(0, len(ids), IDS_AT_ONCE):
        link.send(encode_json(kind, {"ids": ids[at : at + IDS_AT_ONCE]}))

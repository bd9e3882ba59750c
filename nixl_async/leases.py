"""Memory of this agent that is leased to single peers, and when it is quiet after a lease has ended.

A lease ends when its peer does not renew it, when it is revoked, when the peer gives it back, leaves or is lost. From then on its
keys are refused wherever this side can refuse them. That the memory is quiet is a different matter, which no clock settles, because
with one-sided copies it is the peer, its NIC or its GPU that moves the bytes: a peer that is stopped (SIGSTOP, a debugger, a paused
machine) goes on later where it was. Memory is quiet when all that moved bytes for the peer on this side has let go of it, and

- the peer has said so (QUIET), after its transfers with that memory were stopped and had ended; or
- no backend that lent it lets the peer move bytes alone (`Revocation.ENFORCED`); or
- none needs more than the end of the peer's process, which the kernel has told of (`Revocation.PROCESS`); or
- somebody vouches for it (`Lease.fenced`).

The other side of this is `nixl_async.leased`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nixl_async.backend import Backend, Revocation
from nixl_async.errors import ClosedError, ConfigurationError, LeaseEnded, NixlError, NoRoute, PeerLost, Quarantined
from nixl_async.leased import MAX_SECONDS, MIN_SECONDS, Holdings, LeasedRegion, clock, read_ids, send_ids
from nixl_async.memory import MemoryRegion
from nixl_async.peers import Peer, describe_regions
from nixl_async.wire import FrameType, decode_json, encode_json

if TYPE_CHECKING:
    from nixl_async.link import Link

logger = logging.getLogger("nixl_async.leases")

LEASE_FRAMES = frozenset(
    {FrameType.LEASE, FrameType.LEASED, FrameType.RENEW, FrameType.RENEWED, FrameType.REVOKE, FrameType.QUIET}
)
_kept: set[MemoryRegion] = set()
"""What is not quiet when its agent closes: never freed."""


class Lease:
    """Memory that one peer may use until it stops renewing, made by `region.lease(...)`.

    `async with lease:` revokes it in the end. `ended` says why it has ended, and is empty while it has not; `expired` whether
    that was for want of renewal; `is_quiet` whether the memory may be reused.
    """

    def __init__(
        self,
        leases: Leases,
        number: int,
        region: MemoryRegion,
        tenant: _Tenant,
        seconds: float,
        drain_seconds: float,
        *,
        writable: bool,
        backends: Mapping[str, Backend],
    ) -> None:
        self.region = region
        self.peer: str = tenant.peer.name
        self.seconds: float = seconds
        self.drain_seconds: float = drain_seconds
        self.writable: bool = writable
        self.ended = ""
        self.expired = False
        self._number = number
        self._leases, self._tenant = leases, tenant
        self._backends = dict(backends)
        self._keys: dict[str, bytes] = {}
        # What this side still moves, or may, by backend.
        self._serving: set[str] = set()
        self._told = False
        self._since = math.nan
        self._peer_quiet = ""
        self._verdict: asyncio.TimerHandle | None = None
        loop = asyncio.get_running_loop()
        self._taken: asyncio.Future[None] = loop.create_future()
        self._quiet: asyncio.Future[None] = loop.create_future()
        self._drained: asyncio.Future[None] = loop.create_future()
        for future in (self._taken, self._quiet, self._drained):
            future.add_done_callback(_consume)

    def __repr__(self) -> str:
        state = self.ended or f"{self.remaining:.3f} s left"
        return f"<Lease of {self.region.name!r} to {self.peer!r} by {', '.join(self._backends)}: {state}>"

    @property
    def backends(self) -> tuple[str, ...]:
        """By which the peer may use the memory."""
        return tuple(self._backends)

    @property
    def active(self) -> bool:
        """Whether the peer may use the memory."""
        return not self.ended

    @property
    def is_quiet(self) -> bool:
        """Whether the lease has ended and nothing of the peer moves in the memory any more: it may be reused."""
        return self._quiet.done() and self._quiet.exception() is None

    @property
    def expires(self) -> float:
        """When it ends unless the peer renews it, by CLOCK_BOOTTIME in seconds; the peer stops a little before."""
        tenant = self._tenant
        begun = max(self._since, tenant.renewed) if self._number <= tenant.through else self._since
        return begun + self.seconds

    @property
    def remaining(self) -> float:
        """How many seconds are left unless the peer renews it; 0 when it has ended."""
        return 0.0 if self.ended else max(0.0, self.expires - clock())

    async def revoke(self) -> None:
        """End the lease and return when the memory is quiet: when it may be reused. Idempotent.

        Cancelling this leaves the revocation going on.

        Raises:
            Quarantined: `drain_seconds` after its end the peer may still move bytes; the message says by what and why. The region
                is quarantined until `quiet()` returns.
        """
        self._leases.end(self, "it was revoked")
        if not self.is_quiet:
            await asyncio.shield(self._drained)

    async def quiet(self) -> None:
        """Wait until the lease has ended, for whatever reason, and the memory may be reused, however long that takes.

        Raises:
            ClosedError: the agent closed before.
        """
        await asyncio.shield(self._quiet)

    def fenced(self, reason: str) -> None:
        """Vouch that nothing of the peer moves any more, because it is known from elsewhere that its machine or process is gone.

        For a peer that was cut off by the network, or died on another host, with a key outstanding that only it could give up.
        It ends the lease; `quiet()` then waits for this side alone.
        """
        if not reason:
            raise ConfigurationError("reason is empty; say how it is known that the peer moves nothing any more")
        self._leases.end(self, f"its peer was fenced: {reason}")
        self._leases.peer_quiet(self, f"fenced: {reason}")

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.revoke()

    # For its owner.

    def _why_unquiet(self) -> str:
        if self._serving:
            return f"requests of the peer are still being served by {', '.join(sorted(self._serving))}"
        alone = [name for name, backend in self._backends.items() if backend.revocation is not Revocation.ENFORCED]
        life = "its process has ended, which does not stop bytes on their way" if self._tenant.dead else "it may be alive"
        return f"the peer moves bytes by {', '.join(alone)} itself and has not said that it stopped; {life}"


@dataclass(slots=True, eq=False)
class _Tenant:
    """One life of a peer that memory is leased to."""

    peer: Peer
    live: dict[int, Lease] = field(default_factory=dict)
    ended: dict[int, Lease] = field(default_factory=dict)
    """Ended, and not quiet."""
    regions: dict[MemoryRegion, Lease] = field(default_factory=dict)
    """Both by their memory."""
    through: int = 0
    renewed: float = -math.inf
    bound: float = math.inf
    """No lease runs out before."""
    timer: asyncio.TimerHandle | None = None
    telling: list[int] = field(default_factory=list)
    """Leases that the peer is about to be told have ended."""
    pidfd: int = -1
    dead: bool = False


class Leases:
    """Leases of one agent: those it has granted, and in `held` those it was granted.

    `backends` are the agent's; `spawn` runs a coroutine as a task that the agent ends.
    """

    def __init__(
        self,
        backends: Callable[[], Iterable[Backend]],
        find: Callable[[str], Peer],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[str], None],
        forget: Callable[[LeasedRegion], None],
    ) -> None:
        self.held = Holdings(changed, forget)
        self._backends, self._find, self._spawn = backends, find, spawn
        self._tenants: dict[tuple[str, str], _Tenant] = {}
        self._numbers = itertools.count(1)
        self._closed = False

    def all(self) -> list[Lease]:
        """Return the leases that are active, or have ended and are not quiet."""
        return [lease for tenant in self._tenants.values() for lease in (*tenant.live.values(), *tenant.ended.values())]

    async def idle(self) -> None:
        """Wait until none is left, or the agent closes."""
        while left := self.all():
            with suppress(ClosedError):
                await left[0].quiet()

    async def lease(
        self,
        region: MemoryRegion,
        peer: str | Peer,
        seconds: float,
        *,
        writable: bool = True,
        backends: Sequence[str] | None = None,
        drain_seconds: float = 5.0,
    ) -> Lease:
        """Grant a lease; see `MemoryRegion.lease`."""
        known = self._check(region, peer, seconds, drain_seconds)
        chosen = self._choose(region, known, backends)
        tenant = self._tenants.setdefault((known.name, known.incarnation), _Tenant(known))
        lease = Lease(
            self, next(self._numbers), region, tenant, float(seconds), drain_seconds, writable=writable, backends=chosen
        )
        tenant.live[lease._number] = tenant.regions[region] = lease
        self._watch_process(tenant, chosen)
        try:
            for name, backend in chosen.items():
                lease._serving.add(name)
                try:
                    key = await backend.grant(region, known.name, known.incarnation, writable=writable)
                    if not lease.ended:
                        lease._keys[name] = key
                        continue
                    # It ended meanwhile, and what was granted before has been revoked without this.
                    await backend.revoke(region, key)
                    break
                finally:
                    if name not in lease._keys:
                        lease._serving.discard(name)
                        self._settle(lease)
            if not lease.ended:
                self._tell(lease)
                await asyncio.shield(lease._taken)
        except BaseException as error:
            self.end(lease, f"it was not taken: {type(error).__name__}: {error}")
            raise
        if lease.ended and known.gone:
            raise PeerLost(known.gone, peer=known.name)
        if lease.ended:
            raise LeaseEnded(
                f"the lease of region {region.name!r} to {known.name!r} was not taken: {lease.ended}", peer=known.name
            )
        return lease

    def end(self, lease: Lease, reason: str, *, expired: bool = False) -> None:
        """End a lease, whose memory is quiet some time after."""
        if lease.ended:
            return
        lease.ended, lease.expired = reason, expired
        if self._closed:
            return
        tenant = lease._tenant
        del tenant.live[lease._number]
        tenant.ended[lease._number] = lease
        loop = asyncio.get_running_loop()
        lease._verdict = loop.call_later(lease.drain_seconds, self._judge, lease)
        if not lease._taken.done():
            lease._taken.set_result(None)
        if not tenant.telling:
            loop.call_soon(self._tell_ended, tenant)
        tenant.telling.append(lease._number)
        self._spawn(self._refuse(lease))

    async def end_all(self, region: MemoryRegion) -> None:
        """End the leases on a region and wait until it is quiet.

        Raises:
            Quarantined: it is not, `drain_seconds` after the end of one.
        """
        leases = [tenant.regions[region] for tenant in self._tenants.values() if region in tenant.regions]
        await self._drain(leases, "its region was deregistered")

    async def part(self, peer: Peer) -> None:
        """End the leases of a peer that this agent parts from, and wait for as long as they may take to become quiet."""
        tenant = self._tenants.get((peer.name, peer.incarnation))
        if tenant is not None:
            try:
                await self._drain([*tenant.live.values(), *tenant.ended.values()], "this agent parted from the peer")
            except Quarantined as error:
                logger.error("%s", error)

    async def end_every(self) -> None:
        """End all leases and wait for as long as they may take to become quiet."""
        try:
            await self._drain(self.all(), "its agent closes")
        except Quarantined as error:
            logger.error("%s", error)

    def close(self) -> None:
        """Forget everything; memory that is not quiet is kept for the life of the process."""
        left, self._closed = self.all(), True
        self.held.close()
        for lease in left:
            if lease._verdict is not None:
                lease._verdict.cancel()
            lease.region.unquiet.add(lease)
            _kept.add(lease.region)
            error = ClosedError(f"the agent closed before region {lease.region.name!r} was quiet: do not reuse its memory")
            for future in (lease._taken, lease._quiet, lease._drained):
                if not future.done():
                    future.set_exception(error)
        for tenant in self._tenants.values():
            if tenant.timer is not None:
                tenant.timer.cancel()
            self._unwatch(tenant)
        self._tenants.clear()

    # What the membership tells.

    def frame(self, peer: Peer, link: Link, kind: FrameType, payload: bytes) -> None:
        """Act on a frame about leases."""
        if peer.link is not link:
            # Of two connections the agents have chosen the other; what mattered is said there again.
            return
        match kind:
            case FrameType.LEASE:
                self.held.granted(peer, link, payload)
            case FrameType.RENEWED:
                self.held.renewed(peer, payload)
            case FrameType.REVOKE:
                self.held.revoked(peer, link, payload)
            case FrameType.LEASED:
                self._taken(peer, decode_json(payload, id=int)["id"])
            case FrameType.RENEW:
                self._renew(peer, link, payload)
            case FrameType.QUIET:
                self._given_back(peer, read_ids(payload))

    def lends(self, region: MemoryRegion, peer: Peer) -> bool:
        """Tell whether a peer may use a region by a lease that has not ended."""
        tenant = self._tenants.get((peer.name, peer.incarnation))
        lease = tenant.regions.get(region) if tenant is not None else None
        return lease is not None and not lease.ended

    def joined(self, peer: Peer) -> None:
        """Take note that a peer is connected, or is by another connection, over which everything unanswered is said again."""
        self.held.joined(peer)
        tenant = self._tenants.get((peer.name, peer.incarnation))
        if tenant is None or peer.link is None:
            return
        tenant.peer = peer
        for lease in tenant.live.values():
            if not lease._taken.done() and lease._keys.keys() == lease._backends.keys():
                self._tell(lease)
        send_ids(peer.link, FrameType.REVOKE, list(tenant.ended))

    def lost(self, peer: Peer) -> None:
        """End the leases of a peer that has left or is lost."""
        self.held.lost(peer)
        tenant = self._tenants.get((peer.name, peer.incarnation))
        if tenant is not None:
            for lease in list(tenant.live.values()):
                self.end(lease, peer.gone)

    def peer_quiet(self, lease: Lease, how: str) -> None:
        """Take note of why the peer moves nothing any more in the memory of a lease that has ended."""
        lease._peer_quiet = lease._peer_quiet or how
        self._settle(lease)

    # Granting.

    def _check(self, region: MemoryRegion, peer: str | Peer, seconds: float, drain_seconds: float) -> Peer:
        region.check_usable()
        if region.offered:
            raise ConfigurationError(
                f"region {region.name!r} is offered to every peer, for as long as it is registered; register it with"
                " offered=False to lease it"
            )
        for what, value, low in (("seconds", seconds, MIN_SECONDS), ("drain_seconds", drain_seconds, 0.0)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= MAX_SECONDS:
                raise ConfigurationError(f"{what} is {value!r}; it must be a number from {low:g} to {MAX_SECONDS:g}")
        known = self._find(peer if isinstance(peer, str) else peer.name)
        if isinstance(peer, Peer) and peer is not known:
            raise PeerLost(f"that life of peer {peer.name!r} is over: {peer.gone}", peer=peer.name)
        if known.link is None:
            raise ConfigurationError(f"peer {known.name!r} is a stock NIXL agent, which knows no leases; offer it the memory")
        tenant = self._tenants.get((known.name, known.incarnation))
        if tenant is not None and region in tenant.regions:
            raise ConfigurationError(
                f"region {region.name!r} is leased to {known.name!r} already: {tenant.regions[region]!r}; revoke that, and wait"
                " until it is quiet"
            )
        return known

    def _choose(self, region: MemoryRegion, peer: Peer, wanted: Sequence[str] | None) -> dict[str, Backend]:
        """Return the backends that lend a region: by default the first that reaches the peer, and those that can refuse it."""
        able = {b.name: b for b in self._backends() if b.remote and b.name in region.keys and b.name in peer.backends}
        if wanted is not None:
            if isinstance(wanted, str) or not wanted:
                raise ConfigurationError(f"backends is {wanted!r}; give a list of names, or None for the default")
            missing = [name for name in wanted if name not in able]
            if missing:
                why = {name: peer.refusals.get(name, "it does not have this memory") for name in missing}
                raise NoRoute(
                    f"region {region.name!r} cannot be leased to {peer.name!r} by {', '.join(missing)}; by"
                    f" {', '.join(able) or 'none'} it can",
                    why,
                )
            return {name: able[name] for name in dict.fromkeys(wanted)}
        first = next(iter(able), None)
        if first is None:
            raise NoRoute(f"no backend can lend region {region.name!r} to {peer.name!r}", dict(peer.refusals))
        return {name: b for name, b in able.items() if name == first or b.revocation is Revocation.ENFORCED}

    def _tell(self, lease: Lease) -> None:
        link = lease._tenant.peer.link
        if link is not None:
            lease._told = True
            (described,) = describe_regions([lease.region])
            described["readonly"] = lease.region.readonly or not lease.writable
            described["keys"] = {name: key.hex() for name, key in lease._keys.items()}
            link.send(encode_json(FrameType.LEASE, {"id": lease._number, "seconds": lease.seconds, "region": described}))

    # Renewing and expiry.

    def _taken(self, peer: Peer, number: int) -> None:
        tenant = self._tenants.get((peer.name, peer.incarnation))
        lease = None if tenant is None else tenant.live.get(number)
        if tenant is not None and lease is not None and not lease._taken.done():
            lease._since = clock()
            lease._taken.set_result(None)
            tenant.bound = min(tenant.bound, lease.expires)
            self._arm(tenant)

    def _renew(self, peer: Peer, link: Link, payload: bytes) -> None:
        value = decode_json(payload, number=int, through=int)
        tenant = self._tenants.get((peer.name, peer.incarnation))
        if tenant is not None:
            tenant.renewed, tenant.through = clock(), max(tenant.through, value["through"])
        link.send(encode_json(FrameType.RENEWED, {"number": value["number"]}))

    def _arm(self, tenant: _Tenant) -> None:
        if tenant.timer is not None:
            tenant.timer.cancel()
            tenant.timer = None
        if tenant.bound < math.inf:
            loop = asyncio.get_running_loop()
            tenant.timer = loop.call_later(max(0.0, tenant.bound - clock()), self._due, tenant)

    def _due(self, tenant: _Tenant) -> None:
        tenant.timer, now = None, clock()
        for lease in [lease for lease in tenant.live.values() if lease._taken.done() and now >= lease.expires]:
            self.end(lease, f"{lease.peer!r} did not renew it for {now - lease.expires + lease.seconds:.3f} s", expired=True)
        tenant.bound = min((one.expires for one in tenant.live.values() if one._taken.done()), default=math.inf)
        self._arm(tenant)

    # Ending.

    def _tell_ended(self, tenant: _Tenant) -> None:
        ids, tenant.telling = tenant.telling, []
        # Those that the peer gave back itself are settled already.
        if tenant.peer.link is not None and not tenant.peer.gone:
            send_ids(tenant.peer.link, FrameType.REVOKE, [number for number in ids if number in tenant.ended])

    async def _refuse(self, lease: Lease) -> None:
        """Refuse the keys, and wait for what this side moves."""
        for name, key in lease._keys.items():
            try:
                await lease._backends[name].revoke(lease.region, key)
            except NixlError as error:
                logger.error("backend %s cannot revoke a lease on region %r: %s", name, lease.region.name, error)
            else:
                lease._serving.discard(name)
        self._settle(lease)

    def _given_back(self, peer: Peer, ids: list[int]) -> None:
        tenant = self._tenants.get((peer.name, peer.incarnation))
        for number in ids if tenant is not None else ():
            if (lease := tenant.live.get(number)) is not None:  # type: ignore[union-attr]
                self.end(lease, f"{peer.name!r} gave it back")
            if (lease := tenant.ended.get(number)) is not None:  # type: ignore[union-attr]
                self.peer_quiet(lease, "the peer said so")

    def _settle(self, lease: Lease) -> None:
        tenant = lease._tenant
        if lease._number not in tenant.ended or lease._serving or self._closed:
            return
        needed = {backend.revocation for backend in lease._backends.values()} - {Revocation.ENFORCED}
        if tenant.dead:
            needed.discard(Revocation.PROCESS)
        # What the peer was never told of, it cannot use.
        if needed and lease._told and not lease._peer_quiet:
            return
        del tenant.ended[lease._number], tenant.regions[lease.region]
        if lease._verdict is not None:
            lease._verdict.cancel()
        lease.region.unquiet.discard(lease)
        for future in (lease._quiet, lease._drained):
            if not future.done():
                future.set_result(None)
        if not tenant.live and not tenant.ended:
            if tenant.timer is not None:
                tenant.timer.cancel()
            self._unwatch(tenant)
            self._tenants.pop((tenant.peer.name, tenant.peer.incarnation), None)

    def _judge(self, lease: Lease) -> None:
        """Say that the memory is not quiet in time."""
        lease._verdict = None
        lease.region.unquiet.add(lease)
        text = (
            f"region {lease.region.name!r} is not quiet {lease.drain_seconds:g} s after the end of its lease to {lease.peer!r}"
            f" ({lease.ended}): {lease._why_unquiet()}; do not reuse or free its memory before `await lease.quiet()` returns"
        )
        logger.error("%s", text)
        lease._drained.set_exception(Quarantined(text, peer=lease.peer))

    async def _drain(self, leases: list[Lease], reason: str) -> None:
        for lease in leases:
            self.end(lease, reason)
        ended = await asyncio.gather(*(asyncio.shield(lease._drained) for lease in leases), return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException):
                raise error

    # The peer's process.

    def _watch_process(self, tenant: _Tenant, chosen: Mapping[str, Backend]) -> None:
        if tenant.pidfd >= 0 or tenant.dead or all(one.revocation is Revocation.ENFORCED for one in chosen.values()):
            return
        for backend in self._backends():
            if backend.name in tenant.peer.backends and (pidfd := backend.pidfd(tenant.peer.name)) is not None:
                tenant.pidfd = pidfd
                asyncio.get_running_loop().add_reader(pidfd, self._died, tenant)
                return

    def _unwatch(self, tenant: _Tenant) -> None:
        if tenant.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(tenant.pidfd)
            os.close(tenant.pidfd)
            tenant.pidfd = -1

    def _died(self, tenant: _Tenant) -> None:
        self._unwatch(tenant)
        tenant.dead = True
        for lease in list(tenant.live.values()):
            self.end(lease, "the process of its peer has ended")
        for lease in list(tenant.ended.values()):
            self._settle(lease)


def _consume(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()

"""Which backend moves what: by the order of preference, what each backend refuses, and what each peer has.

The order is the caller's where `Agent` was given a list. Else it is that of the ranks, which a backend may answer for each peer
(`Backend.rank_for`), and which the environment may set: NIXL_ASYNC_RANKS="ucx=20,tcp=45".
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from nixl_async.backend import Backend
from nixl_async.costs import Prediction
from nixl_async.descriptors import Plan, Region, Side
from nixl_async.errors import ConfigurationError, NoRoute
from nixl_async.leased import not_leased
from nixl_async.membership import Membership
from nixl_async.outages import Outage

RANKS_VARIABLE = "NIXL_ASYNC_RANKS"
"""Ranks by backend, towards all peers, in place of the backends' own."""


def read_ranks(text: str) -> dict[str, int]:
    """Read what the environment says of ranks.

    Raises:
        ConfigurationError: it is not a list of NAME=NUMBER.
    """
    ranks: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (word.strip() for word in part.partition("="))
        try:
            ranks[name] = int(number)
        except ValueError:
            wanted = "backends and whole numbers, such as ucx=20,tcp=45"
            raise ConfigurationError(f"{RANKS_VARIABLE} has {part!r}; it lists {wanted}") from None
    return ranks


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend would move bytes between two places and `how`, and why the others would not.

    `costs`: what it should take by each way of that backend, with the numbers learnt so far; the way it would choose comes first.
    `outages`: of the routes, those that have lost the peer at present, and why; they come last. `ways`: how each route would go, of
    those that say it.
    """

    route: str | None
    routes: tuple[str, ...]
    refusals: dict[str, str]
    segments: int
    nbytes: int
    how: str = ""
    costs: tuple[Prediction, ...] = ()
    outages: Mapping[str, str] = field(default_factory=dict)
    ways: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        way = f" ({self.how})" if self.how else ""
        chosen = f"by {self.route}{way}" if self.route else "no route"
        lines = [f"{self.nbytes} bytes in {self.segments} segments: {chosen}"]
        lines += [f"  {'expected' if cost is self.costs[0] else 'otherwise'}: {cost}" for cost in self.costs]
        if self.route is not None and self.route in self.outages:
            lines.append(f"  {self.route}: down: {self.outages[self.route]}")
        lines += [
            f"  {name}: {f'down: {self.outages[name]}' if name in self.outages else 'next in line'}"
            for name in self.routes[1:]
        ]
        lines += [f"  {name}: no: {why}" for name, why in self.refusals.items()]
        return "\n".join(lines)


class Router:
    """Chooses among `backends`; `unavailable` says why others are not there.

    `ranked`: by their ranks between two sides; else the first that can is preferred.

    Raises:
        ConfigurationError: NIXL_ASYNC_RANKS cannot be read.
    """

    def __init__(
        self, backends: Mapping[str, Backend], unavailable: Mapping[str, str], membership: Membership, *, ranked: bool = False
    ) -> None:
        self.backends = backends
        self.unavailable = unavailable
        self._membership = membership
        self._ranked = ranked
        self._ranks = read_ranks(os.environ.get(RANKS_VARIABLE, "")) if ranked else {}
        # The last route found: regions of both sides, the peer's backends then, the age of the ranks, and what can copy.
        self._routed: tuple[tuple[tuple[Region, ...], tuple[Region, ...]], frozenset[str], int, tuple[str, ...]] | None = None
        self._age = 0

    def rank_changed(self) -> None:
        """Take note that a backend may have another rank than before; what is prepared keeps its routes."""
        self._age += 1

    def preferred(self, backends: list[Backend], src: Side, dst: Side) -> list[Backend]:
        """Put backends that can copy between two sides in order, the preferred first; they are given in the agent's."""
        if not self._ranked or len(backends) < 2:
            return backends
        ranks = [backend.rank_for(src, dst) for backend in backends]
        if given := self._ranks:
            ranks = [given.get(backend.name, rank) for backend, rank in zip(backends, ranks, strict=True)]
        # They mostly are in order already.
        if ranks == sorted(ranks):
            return backends
        return [backends[place] for place in sorted(range(len(ranks)), key=ranks.__getitem__)]

    def explain(
        self, plan: Plan, forced: str | None = None, *, outages: Mapping[str, Outage] | None = None, now: float = 0.0
    ) -> Explanation:
        """Ask every backend; `forced` refuses all but one. `outages` are the peer's at the time `now`."""
        refusals = dict(self.unavailable)
        if plan.src.peer is not None and plan.dst.peer is not None:
            both = f"both sides are peers' ({plan.src.peer!r}, {plan.dst.peer!r}); one side must be this agent's"
            return Explanation(None, (), dict.fromkeys(self.backends, both), len(plan.lengths), plan.nbytes)
        name = plan.dst.peer if plan.dst.peer is not None else plan.src.peer
        peer = None if name is None else self._membership.get(name)
        found: list[Backend] = []
        for backend in self.backends.values():
            if peer is not None and backend.name not in peer.backends and not backend.relays:
                why: str | None = peer.refusals.get(backend.name, "it reaches no peers")
            else:
                why = not_leased(backend.name, plan.src, plan.dst) if not backend.relays else None
                why = why or backend.refusal(plan.src, plan.dst)
            if why is None and forced in (None, backend.name):
                found.append(backend)
            else:
                refusals[backend.name] = why or f"backend={forced!r} was asked for"
        segments = len(plan.lengths)
        routes = [backend.name for backend in self.preferred(found, plan.src, plan.dst)]
        if not routes:
            return Explanation(None, (), refusals, segments, plan.nbytes)
        down = {name: _describe(outage, now) for name, outage in (outages or {}).items() if name in routes}
        routes.sort(key=lambda name: name in down)
        chosen = self.backends[routes[0]]
        costs = chosen.predict(plan)
        # A backend that tells what its ways cost need not tell which one it takes.
        ways = {name: way for name in routes if (way := self.backends[name].how(plan.src, plan.dst))}
        how = ways.get(chosen.name) or (costs[0].way if costs else "")
        return Explanation(routes[0], tuple(routes), refusals, segments, plan.nbytes, how, costs, down, ways)

    def routes(self, plan: Plan, forced: str | None) -> tuple[str, ...]:
        """Return the backends that can copy a plan, the preferred first.

        Raises:
            NoRoute: there are none; the message has each one's reason.
        """
        peer = self._membership.peers.get(plan.dst.peer or plan.src.peer or "")
        if forced is None and peer is not None and (plan.src.peer is None or plan.dst.peer is None):
            routed, age, regions = self._routed, self._age, (plan.src.regions, plan.dst.regions)
            if routed is not None and routed[0] == regions and routed[1] == peer.backends and routed[2] == age:
                return routed[3]
            found = [
                one
                for name, one in self.backends.items()
                if (one.relays or (name in peer.backends and not_leased(name, plan.src, plan.dst) is None))
                and one.refusal(plan.src, plan.dst) is None
            ]
            if found:
                names = tuple([backend.name for backend in self.preferred(found, plan.src, plan.dst)])
                self._routed = regions, frozenset(peer.backends), age, names
                return names
        explained = self.explain(plan, forced)
        if not explained.routes:
            why = "; ".join(f"{name}: {reason}" for name, reason in explained.refusals.items())
            places = f"from {plan.src.regions[0]!r} to {plan.dst.regions[0]!r}"
            raise NoRoute(f"no backend can copy {places}: {why}", explained.refusals)
        return explained.routes


def _describe(outage: Outage, now: float) -> str:
    again = "it is being tried again" if outage.again_at is None else f"tried again in {max(0.0, outage.again_at - now):.3g} s"
    return f"{outage.reason}; failed {now - outage.since:.3g} s ago, {again}"

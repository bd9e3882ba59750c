"""What a complete run has, how large each part is, and how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.commands import COMMANDS
from bench.record.sweep import QUICK, SHAPE, Shape
from bench.session import SAME_HOST, TCP, Path, Settings

SWEEPS: dict[str, Path] = {"sweep-samehost": SAME_HOST, "sweep-tcp": TCP}
TITLES = {name: f"the sweep, {path.name}" for name, path in SWEEPS.items()}
PARTS = (*SWEEPS, *COMMANDS)
"""Every part that there is, in the order in which they are measured."""
MINUTES = 25.0
SWEEP_SHARE = 0.36
"""Of the time that is given; what is left goes to the suites."""
LEAST_ROUNDS, MOST_ROUNDS = 1, 7
CHEAP_SECONDS, CHEAP_ROUNDS = 3.0, 5
"""Suites whose further rounds take no longer than this have so many at least: one that was disturbed is then outvoted."""
QUICK_SECONDS = 8.0


@dataclass(frozen=True)
class Cost:
    """What a suite takes on two cores with every peer there, in seconds: with one round, and with each further one.

    `settings` are other than the command's own where those would take the time of all others.
    """

    first: float
    further: float
    settings: dict[str, Any] = field(default_factory=dict)


COSTS: dict[str, Cost] = {
    "throughput": Cost(47, 17),
    "slices": Cost(18, 7),
    "layers": Cost(8, 3),
    "latency": Cost(4, 1, {"count": 1000}),
    "notification": Cost(13, 0, {"count": 400}),
    # A gigabyte in pages of 4 KiB takes others some seconds.
    "stall": Cost(53, 0, {"rounds": 1}),
    "idle": Cost(20, 0),
    "busy-peer": Cost(20, 0),
    "many": Cost(7, 2.5),
    "membership": Cost(75, 0),
    "compat": Cost(14, 5),
    "descriptors": Cost(6, 1),
    "planner": Cost(3, 1),
    "qos": Cost(18, 3),
    "failover": Cost(12, 0),
    "verify": Cost(10, 4),
    "tracing": Cost(20, 8),
    "scheduler": Cost(7, 1),
    "s3-get": Cost(40, 14),
    "s3-put": Cost(40, 16),
    "s3-many": Cost(65, 20),
    "azure": Cost(20, 7),
    "files": Cost(22, 8),
    "tiers": Cost(12, 5),
}


@dataclass(frozen=True)
class Planned:
    """A part to be measured: its size, and how long it will take."""

    name: str
    settings: dict[str, Any]
    """What says how much is measured, as it is written down."""
    seconds: float
    shape: Shape | None = None
    suite: Settings | None = None


def plan(names: Sequence[str], base: Settings, minutes: float, rounds: int | None, available_nbytes: int) -> list[Planned]:
    """Return the parts of those names, in their order, with sizes that fit the time; `rounds` of suites, if not chosen here."""
    sweeps = [name for name in PARTS if name in names and name in SWEEPS]
    suites = [name for name in PARTS if name in names and name not in SWEEPS]
    share = SWEEP_SHARE if sweeps and suites else 1.0 if sweeps else 0.0
    seconds = minutes * 60
    fitting = _fitting(suites, seconds * (1 - share)) if rounds is None else 0
    found = [_sweep(name, seconds * share / len(sweeps), base.quick, available_nbytes) for name in sweeps]
    return found + [_suite(name, base, rounds or _at_least(name, fitting)) for name in suites]


def _fitting(suites: Sequence[str], seconds: float) -> int:
    """Return the most rounds with which suites end in time; the least there may be where none does."""
    for rounds in range(MOST_ROUNDS, LEAST_ROUNDS, -1):
        if sum(_seconds(name, _at_least(name, rounds)) for name in suites) <= seconds:
            return rounds
    return LEAST_ROUNDS


def _seconds(name: str, rounds: int) -> float:
    cost = COSTS.get(name, Cost(60.0, 10.0))
    return cost.first + cost.further * (rounds - 1)


def _at_least(name: str, rounds: int) -> int:
    cheap = name in COSTS and 0 < COSTS[name].further <= CHEAP_SECONDS
    return max(rounds, CHEAP_ROUNDS) if cheap else rounds


def _sweep(name: str, seconds: float, quick: bool, available_nbytes: int) -> Planned:
    shape = (QUICK if quick else SHAPE).within(available_nbytes)
    seconds = QUICK_SECONDS if quick else seconds
    return Planned(name, dataclasses.asdict(shape) | {"seconds": round(seconds)}, seconds, shape=shape)


def _suite(name: str, base: Settings, rounds: int) -> Planned:
    changed = COSTS[name].settings if name in COSTS else {}
    settings = dataclasses.replace(base, **({"nbytes": COMMANDS[name].mib << 20, "rounds": rounds} | changed))
    if base.quick:
        settings = settings.made_quick()
    told = {"rounds": settings.rounds, "mib": settings.nbytes >> 20} | changed
    return Planned(name, told, QUICK_SECONDS if base.quick else _seconds(name, rounds), suite=settings)

"""What an examination found: facts, routes, trials, and the findings that follow from them."""

from __future__ import annotations

import enum
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from nixl_async.doctor.facts import Facts
from nixl_async.doctor.ucx import UCX

SCHEMA = "nixl-async/doctor/1"


class Level(enum.Enum):
    """How bad a finding is: fine; worth knowing; slower than it need be; does not work."""

    OK = "ok"
    NOTE = "note"
    SLOW = "slow"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """A judgement: `what` is the case, `why` it matters or how it is known, and what to `do`, a command or a setting."""

    level: Level
    what: str
    why: str = ""
    do: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"level": self.level.value, "what": self.what, "why": self.why, "do": self.do}


@dataclass(frozen=True, slots=True)
class Route:
    """The way from `src` to `dst`: the backend (`None`: there is none), `how` it goes, who is `next`, why the others refuse."""

    src: str
    dst: str
    route: str | None
    how: str
    next: tuple[str, ...]
    refusals: dict[str, str]
    expected: str = ""
    """What the route expects it to take, where it learns that."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A route that was tried: GB/s of each round there (`writes`), back (`reads`), and of one memcpy thread meanwhile.

    `small_p50` is the median time of 4 KiB, seconds; `error` says what went wrong, or nothing did.
    """

    route: str
    what: str
    verified: bool
    writes: tuple[float, ...] = ()
    reads: tuple[float, ...] = ()
    memcpy: tuple[float, ...] = ()
    small_p50: float | None = None
    error: str = ""

    def share(self, rates: tuple[float, ...]) -> float | None:
        """Return the median of `rates` as a share of memcpy's; `None` where either was not measured."""
        return statistics.median(rates) / statistics.median(self.memcpy) if rates and self.memcpy else None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, with medians and shares of memcpy."""
        shares = {"write_share_of_memcpy": self.share(self.writes), "read_share_of_memcpy": self.share(self.reads)}
        names = ("writes", "reads", "memcpy")
        medians = {f"{name}_gb_s": statistics.median(getattr(self, name)) if getattr(self, name) else None for name in names}
        return {**asdict(self), **medians, **shares}


@dataclass(eq=False)
class Report:
    """Everything that an examination found."""

    facts: Facts
    ucx: UCX | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    gpu: dict[str, Any] = field(default_factory=dict)
    gds: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Backends that are not there, and why."""
    failures: dict[str, str] = field(default_factory=dict)
    """Parts of the examination that did not come to their end, and how they ended."""
    ranks: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Places that are not there, and why."""
    routes: list[Route] = field(default_factory=list)
    trials: list[Tried] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is broken."""
        return all(finding.level is not Level.BROKEN for finding in self.findings)

    def route(self, src: str, dst: str) -> Route | None:
        """Return the way between two places, `None` if it was not asked about."""
        return next((route for route in self.routes if (route.src, route.dst) == (src, dst)), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole report as JSON values."""
        return {
            "schema": SCHEMA,
            "healthy": self.healthy,
            "findings": [finding.as_dict() for finding in self.findings],
            "facts": [fact.as_dict() for fact in self.facts.all],
            "ucx": None if self.ucx is None else asdict(self.ucx),
            "gpu": self.gpu,
            "backends": {"ranks": self.ranks, "missing": self.missing},
            "absent": self.absent,
            "routes": [asdict(route) for route in self.routes],
            "self_test": [trial.as_dict() for trial in self.trials],
            "failures": self.failures,
        }

"""What the drill has seen: values that the members report and the verdict is made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.churn.ledger import Count
from bench.churn.plan import Action


@dataclass(slots=True)
class Life:
    """One process of a member. Times are the host's monotonic clock, in seconds."""

    name: str
    number: int
    pid: int
    started: float
    ready: float | None = None
    ended: float | None = None
    """When it was killed or told to leave."""
    killed: bool = False
    code: int | None = None
    """Its exit status, if it has one."""
    expected_end: bool = False
    """Whether the drill ended it."""
    unheard: bool = False
    """Whether it had to be killed because it did not leave when it was told to."""
    count: Count = field(default_factory=Count)
    left: list[str] | None = None
    """What it left behind; `None`: it did not get to say."""
    overwritten: int = 0
    quarantined_pages: dict[str, int] = field(default_factory=dict)
    quarantined_region: bool = False
    routes: dict[str, int] = field(default_factory=dict)
    beats: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Time, resident bytes, descriptors, peers."""

    @property
    def label(self) -> str:
        """Its name and which of its lives it is."""
        return self.name if self.number == 1 else f"{self.name} (life {self.number})"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a member has seen happen to a peer."""

    observer: str
    life: int
    kind: str
    peer: str
    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A request or a transfer that failed."""

    member: str
    life: int
    what: str
    peer: str
    kind: str
    began: float
    at: float
    text: str
    trace: str


@dataclass(slots=True)
class Done:
    """An action as it was carried out.

    `ended`: when what was broken was whole again; after a restart, when the new life was ready.
    """

    action: Action
    began: float
    ended: float | None = None
    targets: tuple[str, ...] = ()
    lives: tuple[int, ...] = ()
    for_good: bool = False
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class First:
    """The first request that a member has completed with a peer after something was done to it."""

    member: str
    peer: str
    at: float


@dataclass
class Records:
    """All of it."""

    lives: list[Life] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    firsts: list[First] = field(default_factory=list)
    watches: list[tuple[str, str, float]] = field(default_factory=list)
    """Who was asked to tell when it completed a request with whom again, since when."""
    wrong: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    shared_memory: list[str] = field(default_factory=list)
    """What was left in /dev/shm."""
    began: float = 0.0
    ended: float = 0.0
    start_seconds: float = 0.0
    cpu_share: float = 0.0
    """How much of the machine's CPU was used while the fleet was at work, by whomever."""
    cpu_seconds: float = 0.0
    """What all processes of the drill used, their start included."""
    network: str = ""
    interrupted: bool = False

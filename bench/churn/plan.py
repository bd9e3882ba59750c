"""What is broken when: a schedule that follows from its seed alone. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

FIRST_SECONDS = 4.0
SETTLE_SECONDS = 9.0
"""How long a member is left alone after what was done to it, and the whole fleet at the end."""
LEAST = {"prefill": 3, "decode": 2}
"""How many of each role are spared at any time."""
STOPPED_SECONDS = 6.0
"""How long a stopped peer is believed in during the drill: the library's default of a minute would leave too little of it."""

SECONDS = {
    "kill": (0.3, 2.0),
    "crowd": (0.3, 1.0),
    "leave": (0.3, 1.5),
    "replace": (0.0, 0.0),
    "die": (0.0, 0.0),
    "pause": (0.4, 1.2),
    "stop": (3.2, 4.5),
    "freeze": (STOPPED_SECONDS + 2.0, STOPPED_SECONDS + 3.0),
    "blip": (0.2, 0.5),
    "gap": (0.8, 2.0),
    "cut": (4.5, 8.0),
    "unplug": (4.5, 7.0),
    "store-restart": (0.0, 0.0),
    "store-outage": (20.0, 20.0),
}
"""How long each kind lasts, at least and at most, in seconds."""
LINKS = ("blip", "gap", "cut", "unplug")
STORE = ("store-restart", "store-outage")
TOLD = {
    "kill": "kill -9, and started again under the same name",
    "crowd": "three at once: kill -9, and started again under their names",
    "leave": "leaves, and comes back under the same name",
    "replace": "leaves for good; another is added",
    "die": "kill -9 for good; another is added",
    "pause": "SIGSTOP for about a second: nobody should notice",
    "stop": "SIGSTOP for longer than suspect_seconds",
    "freeze": "SIGSTOP for longer than stopped_seconds",
    "blip": "link cut for less than half a second: nobody should be lost",
    "gap": "link cut for one or two seconds",
    "cut": "link cut: packets vanish",
    "unplug": "link down: no carrier",
    "store-restart": "etcd killed and started again",
    "store-outage": "etcd away; one member is killed and one added meanwhile",
}


@dataclass(frozen=True, slots=True)
class Action:
    """Something done to members (or the store, where there are no targets) at a time from the start, for so many seconds.

    `added` is the name of the member that is started with it.
    """

    at: float
    kind: str
    targets: tuple[str, ...]
    seconds: float
    added: str = ""

    def __str__(self) -> str:
        who = ", ".join(self.targets) + (f" +{self.added}" if self.added else "")
        return f"{self.at:6.1f} s  {self.kind} {who}" + (f" for {self.seconds:.1f} s" if self.seconds else "")


def names(prefill: int, decode: int) -> list[str]:
    """Return who is there at the start."""
    return [f"prefill-{n}" for n in range(prefill)] + [f"decode-{n}" for n in range(decode)]


def is_remote(name: str) -> bool:
    """Whether a member has a link of its own to the network, over which alone it is reached: every third has."""
    return int(name.rpartition("-")[2]) % 3 == 2


def make_plan(seed: int, seconds: float, prefill: int, decode: int, only: Collection[str] = ()) -> list[Action]:
    """Return the actions of a run; each kind comes at least once where the time and the fleet allow it. `only`: no others."""
    rng = random.Random(seed)
    kinds = [kind for kind in SECONDS if not only or kind in only]
    # The store's outage is as long as fits, and one is enough for each two minutes.
    outage = min(SECONDS["store-outage"][0], seconds / 6)
    step = max(1.0, min(4.0, (seconds - FIRST_SECONDS - SETTLE_SECONDS - outage) / (len(kinds) + 2)))
    alive, free_at = names(prefill, decode), dict.fromkeys(names(prefill, decode), 0.0)
    serial = {"prefill": prefill, "decode": decode}
    actions: list[Action] = []
    queue: list[str] = []
    store_free, at, waits = dict.fromkeys(STORE, 0.0), FIRST_SECONDS, 0
    while at < seconds - SETTLE_SECONDS:
        if not queue:
            queue = rng.sample(kinds, len(kinds))
        if waits > len(queue):
            # Nothing that is left may be done at present.
            at, waits = at + 0.5, 0
            if all(kind in STORE for kind in queue):
                queue += rng.sample(kinds, len(kinds))
                queue = [*dict.fromkeys(queue)]
            continue
        kind = queue.pop(0)
        lasts = outage if kind == "store-outage" else round(rng.uniform(*SECONDS[kind]), 1)
        ends = at + lasts
        fits = ends + SETTLE_SECONDS <= seconds or len(actions) < len(kinds)
        targets = _targets(rng, kind, alive, free_at, at)
        if not fits and kind in STORE:
            continue
        if targets is None or at < store_free.get(kind, 0.0) or ends + 3 > seconds:
            queue.append(kind)
            waits += 1
            continue
        waits, added = 0, ""
        if kind in ("replace", "die", "store-outage"):
            role = targets[0].partition("-")[0] if kind != "store-outage" else "prefill"
            added = f"{role}-{serial[role]}"
            serial[role] += 1
        if kind in ("replace", "die"):
            alive.remove(targets[0])
        for name in targets:
            free_at[name] = ends + SETTLE_SECONDS
        if added:
            alive.append(added)
            free_at[added] = ends + SETTLE_SECONDS
        if kind in STORE:
            store_free = {"store-restart": ends + 20, "store-outage": ends + (100 if kind == "store-outage" else 20)}
        actions.append(Action(round(at, 2), kind, targets, lasts, added))
        at += step * rng.uniform(0.7, 1.3)
    return actions


def _targets(
    rng: random.Random, kind: str, alive: Sequence[str], free_at: dict[str, float], at: float
) -> tuple[str, ...] | None:
    """Choose whom something is done to; `None` if too few would be left alone."""
    if kind == "store-restart":
        return ()
    count = 3 if kind == "crowd" else 1
    fit = [name for name in alive if free_at[name] <= at]
    # Whoever joins while the store is away is found by nobody who is not connected: a decode member dials by itself.
    roles = ("prefill",) if kind == "store-outage" else ("prefill", "decode")
    room = {role: sum(name.startswith(role) for name in fit) - least for role, least in LEAST.items()}
    chosen: list[str] = []
    for name in rng.sample(fit, len(fit)):
        role = name.partition("-")[0]
        if role in roles and room[role] > 0 and (kind not in LINKS or is_remote(name)) and len(chosen) < count:
            chosen.append(name)
            room[role] -= 1
    return tuple(sorted(chosen)) if len(chosen) == count else None

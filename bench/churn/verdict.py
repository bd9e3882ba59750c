"""Judges what the drill has seen: what was lost, wrong, late, left behind, or failed without a reason. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from bench.churn.ledger import Count
from bench.churn.options import Options
from bench.churn.plan import STOPPED_SECONDS, STORE
from bench.churn.records import Done, Event, Failure, Life, Records

DEATH_SECONDS, SUSPECT_SECONDS, SILENT_SECONDS, LEFT_SECONDS = 1.0, 2.5, 3.0, 1.0
FROZEN_SECONDS = STOPPED_SECONDS + 0.5
"""What the library promises of each kind of end, with the limits that the members set."""
RECOVERY_SECONDS = 10.0
"""How long after everything is whole again every decode member has to have completed a request with the one that was broken."""
GROWTH_NBYTES = 16 << 20
"""How much a member's resident memory may grow from a third of the run to its end."""
DESCRIPTORS_PER_PEER, SPARE_DESCRIPTORS = 8, 12
IDLE_SECONDS = 30.0
"""How long a decode member may live without completing a request."""
MOST_UNDER_WAY = 64
"""How many requests or transfers of its own a member may have under way when it is killed."""

EXPECTED = {
    "request": {"PeerLost", "NoRoute", "TimeoutError", "Replaced", "Expired", "Refused", "GivenUp", "CancelledError"},
    "transfer": {"PeerLost", "NoRoute", "TimeoutError", "GivenUp", "CancelledError"},
}
"""What may be met while one of the two is disturbed. `NoRoute`: the data connections have ended a moment before the control
connection does; that it lasts shows afterwards, when nothing explains it any more."""
REFUSED = {"PeerLost", "NoRoute", "TimeoutError", "Replaced", "Expired"}
"""What the other side may have met while it was disturbed."""
TITLES = {
    "death": "a process ends: lost",
    "leave": "an agent leaves: left",
    "suspect": "a process is stopped: suspect",
    "frozen": f"stopped for longer than {STOPPED_SECONDS:g} s: lost",
    "silent": "packets vanish: lost",
    "unplugged": "no carrier: lost",
}
LIMITS = {
    "death": DEATH_SECONDS,
    "leave": LEFT_SECONDS,
    "suspect": SUSPECT_SECONDS,
    "frozen": FROZEN_SECONDS,
    "silent": SILENT_SECONDS,
    "unplugged": SILENT_SECONDS,
}
DETECTED_BY: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "kill": [("death", ("lost", "left"))],
    "crowd": [("death", ("lost", "left"))],
    "die": [("death", ("lost", "left"))],
    "leave": [("leave", ("left",))],
    "replace": [("leave", ("left",))],
    "stop": [("suspect", ("suspect",))],
    "freeze": [("suspect", ("suspect",)), ("frozen", ("lost", "left"))],
    "cut": [("silent", ("lost", "left"))],
    "unplug": [("unplugged", ("lost", "left"))],
}


@dataclass
class Verdict:
    """What came out. The drill is passed if there are no `faults`."""

    faults: list[str] = field(default_factory=list)
    total: Count = field(default_factory=Count)
    died_with: Count = field(default_factory=Count)
    """What had no outcome when its process was killed."""
    detections: dict[str, list[float]] = field(default_factory=dict)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    """Failures by what failed, the kind of error, and whether something was being done to one of the two."""
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    growth: list[int] = field(default_factory=list)
    quarantined: dict[str, int] = field(default_factory=dict)
    routes: Counter[str] = field(default_factory=Counter)


def judge(records: Records, options: Options) -> Verdict:
    """Judge a run."""
    verdict = Verdict()
    disturbed = _Disturbed(records, options)
    _bytes(records, verdict)
    _ends(records, verdict)
    _accounts(records, verdict)
    _failures(records, disturbed, verdict)
    _detections(records, disturbed, options, verdict)
    _false_alarms(records, disturbed, options, verdict)
    _recoveries(records, disturbed, options, verdict)
    _memory(records, verdict)
    skipped = [done for done in records.done if done.skipped]
    if len(skipped) * 4 > len(records.done):
        verdict.faults.append(f"{len(skipped)} of {len(records.done)} actions were skipped: {skipped[0].skipped}")
    return verdict


class _Disturbed:
    """When something was being done to which member."""

    def __init__(self, records: Records, options: Options) -> None:
        self._spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        settle = options.limit + 3 + options.allowance
        for done in records.done:
            if done.skipped:
                continue
            end = float("inf") if done.for_good or done.ended is None else whole_at(records, done.ended) + settle
            for name in done.targets:
                self._spans[name].append((done.began - 0.1, end))

    def during(self, name: str, began: float, ended: float) -> bool:
        """Whether something was, between two times."""
        return any(start <= ended and began <= end for start, end in self._spans[name])


def whole_at(records: Records, at: float) -> float:
    """Return a time, or the end of the store's outage that it lies in: who comes back meanwhile is found afterwards."""
    for done in records.done:
        if done.action.kind in STORE and done.ended is not None and done.began <= at <= done.ended:
            return done.ended
    return at


def _bytes(records: Records, verdict: Verdict) -> None:
    verdict.faults += records.wrong + records.hangs
    for life in records.lives:
        if life.overwritten:
            verdict.faults.append(f"{life.label}: {life.overwritten} free pages were written to")


def _ends(records: Records, verdict: Verdict) -> None:
    for life in records.lives:
        if life.ready is None and not life.killed:
            verdict.faults.append(f"{life.label} never got ready")
        if not life.expected_end:
            verdict.faults.append(f"{life.label} died by itself, exit status {life.code}")
        elif life.unheard:
            verdict.faults.append(f"{life.label} did not leave when it was told to")
        elif not life.killed and life.left is None:
            verdict.faults.append(f"{life.label} left without a word, exit status {life.code}")
        verdict.faults += [f"{life.label} left behind: {what}" for what in life.left or ()]
        for peer, count in life.quarantined_pages.items():
            verdict.quarantined[f"{life.label}: {peer or 'a transfer that did not become quiet'}"] = count
        if life.quarantined_region:
            verdict.faults.append(f"{life.label}: its region is quarantined")
        verdict.routes.update(life.routes)
    verdict.faults += [f"logged: {text}" for text in records.logged]
    verdict.faults += [f"left in /dev/shm: {name}" for name in records.shared_memory]


def _accounts(records: Records, verdict: Verdict) -> None:
    sums, open_ones = [0] * len(Count._fields), [0] * len(Count._fields)
    for life in records.lives:
        count = life.count
        sums = [have + more for have, more in zip(sums, count, strict=True)]
        if life.killed:
            open_ones[0] += count.open_requests
            open_ones[3] += count.open_transfers
        allowed = MOST_UNDER_WAY if life.killed or life.unheard else 0
        for what, number in (("requests", count.open_requests), ("transfers", count.open_transfers)):
            if not 0 <= number <= allowed:
                verdict.faults.append(f"{life.label}: {number} {what} have no outcome: {count}")
        worked = (life.ended or records.ended) - max(life.ready or records.ended, records.began)
        if life.name.startswith("decode") and worked > IDLE_SECONDS and not life.count.requests_done:
            verdict.faults.append(f"{life.label} has completed no request in {worked:.0f} s: {count}")
    verdict.total, verdict.died_with = Count(*sums), Count(*open_ones)
    if not verdict.total.requests_done:
        verdict.faults.append("no request was completed")


def _failures(records: Records, disturbed: _Disturbed, verdict: Verdict) -> None:
    ended = {(life.name, life.number): life.ended or records.ended for life in records.lives}
    unexplained: dict[tuple[str, str], list[Failure]] = defaultdict(list)
    for failure in records.failures:
        kind = failure.kind if failure.kind != "Refused" else f"Refused: {failure.text}"
        cause = failure.what.partition(":")[0]
        leaving = failure.kind == "CancelledError" and failure.at >= ended[failure.member, failure.life] - 0.1
        explained = (
            failure.kind == "GivenUp"
            or leaving
            or failure.at >= records.ended
            or any(disturbed.during(name, failure.began, failure.at) for name in (failure.member, failure.peer))
        )
        expected = failure.kind in EXPECTED[cause] and (failure.kind != "Refused" or failure.text in REFUSED)
        verdict.outcomes[failure.what, kind, explained] += 1
        if not explained or not expected:
            unexplained[failure.what, kind].append(failure)
        verdict.examples.setdefault((failure.what, kind), failure.text)
    for (what, kind), found in unexplained.items():
        first = found[0]
        verdict.faults.append(
            f"{len(found)} times {what}: {kind} without a reason, or of no expected kind; the first: {first.member} with"
            f" {first.peer}, {first.began - records.began:.1f} to {first.at - records.began:.1f} s: {first.text}\n{first.trace}"
        )


def _lives_at(records: Records, at: float, until: float) -> Iterator[Life]:
    for life in records.lives:
        if life.ready is not None and life.ready <= at and (life.ended is None or life.ended >= until):
            yield life


class _Views:
    """What each life of each member has seen of each peer, in order."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._seen: dict[tuple[str, int, str], list[Event]] = defaultdict(list)
        for event in sorted(events, key=lambda one: one.at):
            self._seen[event.observer, event.life, event.peer].append(event)

    def connected(self, life: Life, peer: str, at: float) -> bool:
        """Whether it was connected to the peer."""
        before = [
            e.kind for e in self._seen[life.name, life.number, peer] if e.at <= at and e.kind in ("joined", "lost", "left")
        ]
        return bool(before) and before[-1] == "joined"

    def after(self, life: Life, peer: str, at: float, kinds: tuple[str, ...]) -> Event | None:
        """Return the first event of such a kind from a time on."""
        return next((e for e in self._seen[life.name, life.number, peer] if e.at >= at and e.kind in kinds), None)


def _began(done: Done, name: str, records: Records) -> float:
    """Return when something was done to a member; a kill, when the signal was sent."""
    if done.action.kind in ("kill", "crowd", "die", "leave", "replace"):
        for life in records.lives:
            if (life.name, life.number) in zip(done.targets, done.lives, strict=True) and life.name == name and life.ended:
                return life.ended
    return done.began


def _detections(records: Records, disturbed: _Disturbed, options: Options, verdict: Verdict) -> None:
    views = _Views(records.events)
    late: dict[str, list[str]] = defaultdict(list)
    for done in records.done:
        if done.skipped:
            continue
        for what, kinds in DETECTED_BY.get(done.action.kind, ()):
            limit = LIMITS[what] + options.allowance
            for name in done.targets:
                at = _began(done, name, records)
                if at + limit > records.ended:
                    continue
                for life in _lives_at(records, at, at + limit):
                    if life.name == name or disturbed.during(life.name, at - options.limit, at + limit):
                        continue
                    if not views.connected(life, name, at):
                        continue
                    found = views.after(life, name, at, kinds)
                    seconds = float("inf") if found is None else found.at - at
                    if seconds < float("inf"):
                        verdict.detections.setdefault(what, []).append(seconds)
                    if seconds > limit:
                        when = "never" if found is None else f"after {seconds:.2f} s"
                        late[what].append(f"{life.label} of {name} {when}, at {at - records.began:.1f} s")
    for what, told in late.items():
        verdict.faults.append(
            f"{TITLES[what]}: {len(told)} members noticed it later than {LIMITS[what]:g} + {options.allowance:g} s: {told[0]}"
        )


def _false_alarms(records: Records, disturbed: _Disturbed, options: Options, verdict: Verdict) -> None:
    """Find peers that were given up, or doubted, without a reason."""
    harmless = ("pause", "blip")
    for done in records.done:
        if done.action.kind not in harmless or done.skipped or done.ended is None:
            continue
        for event in records.events:
            of_it = {event.observer, event.peer} & set(done.targets)
            if of_it and event.kind == "lost" and done.began <= event.at <= done.ended + 3:
                other = ({event.observer, event.peer} - of_it or of_it).pop()
                if not disturbed.during(other, event.at - options.limit, event.at):
                    verdict.faults.append(
                        f"{event.observer} lost {event.peer} though it was away for {done.action.seconds:.1f} s only:"
                        f" {event.reason}"
                    )
    for event in records.events:
        if event.kind in ("lost", "left") and records.began <= event.at <= records.ended:
            span = event.at - options.limit, event.at
            if not any(disturbed.during(name, *span) for name in (event.observer, event.peer)):
                verdict.faults.append(
                    f"{event.observer} says that {event.peer} is {event.kind} without a reason,"
                    f" {event.at - records.began:.1f} s from the start: {event.reason}"
                )


def _recoveries(records: Records, disturbed: _Disturbed, options: Options, verdict: Verdict) -> None:
    limit = RECOVERY_SECONDS + options.allowance
    firsts: dict[tuple[str, str], list[float]] = defaultdict(list)
    for first in records.firsts:
        firsts[first.member, first.peer].append(first.at)
    missing = []
    for member, peer, asked in records.watches:
        kind, since = _kind_of(records, peer, asked), whole_at(records, asked)
        found = min((at for at in firsts[member, peer] if at >= asked), default=float("inf"))
        if found - since <= limit:
            verdict.recoveries.setdefault(kind, []).append(max(0.0, found - since))
            continue
        # Something else was done to one of them meanwhile, or the run ended.
        others = [d for d in records.done if not d.skipped and since < d.began <= since + limit]
        again = any(name in (member, peer) for d in others for name in d.targets)
        alone = not disturbed.during(member, since, since) or member == peer
        if not again and alone and since + limit <= records.ended:
            missing.append(f"{member} with {peer} ({kind}), from {since - records.began:.1f} s on")
    if missing:
        verdict.faults.append(
            f"{len(missing)} pairs of members had not completed a request {limit:g} s after all was whole again: "
            + "; ".join(missing[:5])
        )


def _kind_of(records: Records, peer: str, since: float) -> str:
    found = [d for d in records.done if d.began <= since and (peer in d.targets or peer == d.action.added)]
    return found[-1].action.kind if found else "start"


def _memory(records: Records, verdict: Verdict) -> None:
    early = records.began + (records.ended - records.began) / 3
    for life in records.lives:
        before = [beat for beat in life.beats if beat[0] <= early]
        after = [beat for beat in life.beats if beat[0] <= records.ended]
        if life.ready is None or life.ready > records.began or life.killed or len(before) < 4 or len(after) <= len(before):
            continue
        if life.ended is not None and life.ended < records.ended:
            continue
        grown = after[-1][1] - before[-1][1]
        verdict.growth.append(grown)
        if grown > GROWTH_NBYTES:
            verdict.faults.append(f"{life.label}: its memory grew by {grown / 2**20:.1f} MiB in the last two thirds")
        more = after[-1][2] - before[-1][2]
        peers = max(0, after[-1][3] - before[-1][3])
        if more > DESCRIPTORS_PER_PEER * peers + SPARE_DESCRIPTORS:
            verdict.faults.append(f"{life.label}: it has {more} more descriptors, and {peers} more peers, than at a third")

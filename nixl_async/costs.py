"""What copying costs by each way that a backend has, learnt from the copies themselves; which way is the cheapest. Pure.

A copy of `segments` segments and `nbytes` bytes is taken to last `per_op + per_segment * segments + per_byte * nbytes` seconds. The
three numbers are fitted to the copies that have ended, by recursive least squares of the relative error: old copies are forgotten,
no number becomes negative, and about what the copies do not tell (all have one page size, say) the numbers stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FORGETTING = 0.97
"""What each copy leaves of the weight of those before it: some thirty of them count."""
SURPRISE, SURPRISED_FORGETTING = 2.0, 0.8
"""What one leaves that lasted that many times longer or shorter than expected: costs have changed, if more of them follow."""
INERTIA = 0.05
"""How many copies the numbers of before weigh as much as when they are fitted again."""
OUTLIER = 4.0
"""A copy counts as lasting at most so many times what was expected: one whose thread had to wait for a core tells little."""
SWEEPS = 4
EXPLORE_EVERY = 40
"""After so many choices in one direction another way that should cost the same is tried; one of twice the cost more rarely."""
NEW_SAMPLES, EXPLORE_NEW_EVERY = 4, 8
"""A way that has seen fewer copies with segments of such a size is tried after so many: what it learnt may not hold there."""
EXPLORE_FACTOR = 4.0
"""But if it should cost more than so many times the cheapest, that much more rarely."""
BURST = 8
"""While copies go on, so many in a row go the same way: two ways at once take each other's cores, which tells nothing of either."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a copy is taken to last: seconds for an op, for each of its segments and for each byte."""

    per_op: float
    per_segment: float
    per_byte: float

    def seconds(self, segments: int, nbytes: int) -> float:
        """Return how long a copy should take."""
        return self.per_op + self.per_segment * segments + self.per_byte * nbytes


class LearntCost:
    """The cost of one way in one direction; `assumed`, whose numbers must be positive, is where it starts from."""

    def __init__(self, assumed: Cost) -> None:
        self._assumed = (assumed.per_op, assumed.per_segment, assumed.per_byte)
        if min(self._assumed) <= 0:
            raise ValueError(f"assumed is {assumed}; each number must be positive")
        # How many times the assumed numbers the learnt ones are: of the same order, so that the sums are well conditioned.
        self._times = [1.0, 1.0, 1.0]
        # The sums of what the ended copies say: of z * z for each two of a copy's three shares z, and of z * y.
        self._squares = [[0.0] * 3 for _ in range(3)]
        self._products = [0.0] * 3
        self.samples = 0
        """How many copies it has learnt from."""

    @property
    def cost(self) -> Cost:
        """The numbers as they are learnt so far."""
        per_op, per_segment, per_byte = (times * assumed for times, assumed in zip(self._times, self._assumed, strict=True))
        return Cost(per_op, per_segment, per_byte)

    def seconds(self, segments: int, nbytes: int) -> float:
        """Return how long a copy should take."""
        (op, segment, byte), (op_times, segment_times, byte_times) = self._assumed, self._times
        return op_times * op + segment_times * segment * segments + byte_times * byte * nbytes

    def learn(self, segments: int, nbytes: int, seconds: float) -> None:
        """Take note of a copy that has ended; one without bytes, or that took no time, says nothing."""
        if nbytes <= 0 or segments <= 0 or not 0 < seconds < float("inf"):
            return
        op, segment, byte = self._assumed
        expected = max(self.seconds(segments, nbytes), 1e-3 * (op + segment * segments + byte * nbytes))
        z = (op / expected, segment * segments / expected, byte * nbytes / expected)
        y = min(seconds / expected, OUTLIER)
        forgetting = FORGETTING if 1 / SURPRISE < y < SURPRISE else SURPRISED_FORGETTING
        for i in range(3):
            row = self._squares[i]
            for j in range(3):
                row[j] = forgetting * row[j] + z[i] * z[j]
            self._products[i] = forgetting * self._products[i] + z[i] * y
        self.samples += 1
        self._fit(INERTIA * max(z) ** 2)

    def _fit(self, inertia: float) -> None:
        """Minimise the squared error by going down each coordinate in turn, none below 0, from where the last fit ended."""
        (aa, ab, ac), (_, bb, bc), (_, _, cc) = self._squares
        a, b, c = self._times
        pulls = [product + inertia * times for product, times in zip(self._products, self._times, strict=True)]
        for _ in range(SWEEPS):
            a = max(0.0, (pulls[0] - ab * b - ac * c) / (aa + inertia))
            b = max(0.0, (pulls[1] - ab * a - bc * c) / (bb + inertia))
            c = max(0.0, (pulls[2] - ac * a - bc * b) / (cc + inertia))
        self._times = [a, b, c]


@dataclass(frozen=True, slots=True)
class Way:
    """A way of copying: its name, what it is assumed to cost, and how many cores it keeps busy on average.

    `assumed` is by direction: `True` to the peer, `False` from it.
    """

    name: str
    assumed: Mapping[bool, Cost]
    cores: float = 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan is expected to take by one way: `seconds` on `cores` cores, by `cost`, learnt from `samples` copies."""

    way: str
    seconds: float
    cores: float
    cost: Cost
    samples: int

    def __str__(self) -> str:
        cores = "core" if self.cores == 1 else "cores"
        return f"{self.way} {self.seconds * 1e6:,.0f} µs on {self.cores:g} {cores}"


class Ways:
    """The ways to one peer, and which of them is the cheapest: the one that takes the least time of cores.

    While nothing else runs, a way on two cores may end earlier than a cheaper one on a single core; but ops run side by side, and
    the peer has better things to do with a core. `share` is how many cores there are for each op where as many run as may: what ops
    take that are short of cores holds the time in which they waited for one, and more cores than that are not to be counted again.
    """

    def __init__(self, ways: Iterable[Way], share: float = float("inf")) -> None:
        self._cores = {way.name: way.cores for way in ways}
        self._weights = {way.name: min(way.cores, max(1.0, share)) for way in ways}
        self._learnt = {(way.name, put): LearntCost(cost) for way in ways for put, cost in way.assumed.items()}
        self._debts: dict[tuple[str, bool], float] = {}
        self._bursts: dict[tuple[bool, int], tuple[str, int]] = {}
        # How many copies with segments of a size were learnt from.
        self._seen: dict[tuple[str, bool, int], int] = {}

    def choose(self, put: bool, segments: int, nbytes: int, allowed: Sequence[str], *, busy: bool = False) -> str:
        """Return the way to copy by: the cheapest of `allowed`, rarely another one that is tried; `busy`: others are under way."""
        size = _size_class(segments, nbytes)
        chosen, left = self._bursts.get((put, size), ("", 0))
        if not busy or left <= 0 or chosen not in allowed:
            chosen, left = self._choose_anew(put, segments, nbytes, allowed), BURST
        self._bursts[put, size] = chosen, left - 1
        return chosen

    def _choose_anew(self, put: bool, segments: int, nbytes: int, allowed: Sequence[str]) -> str:
        costs = {name: self._weights[name] * self._learnt[name, put].seconds(segments, nbytes) for name in allowed}
        best = min(costs, key=costs.__getitem__)
        for name, cost in costs.items():
            share = costs[best] / max(cost, 1e-9)
            if self._seen.get((name, put, _size_class(segments, nbytes)), 0) < NEW_SAMPLES:
                due = min(1.0, EXPLORE_FACTOR * share) / EXPLORE_NEW_EVERY
            else:
                due = share * share / EXPLORE_EVERY
            debt = self._debts.get((name, put), 0.0) + due
            self._debts[name, put] = 0.0 if name == best or debt >= 1.0 else debt
            if name != best and debt >= 1.0:
                return name
        return best

    def learn(self, name: str, put: bool, segments: int, nbytes: int, seconds: float) -> None:
        """Take note of a copy that has ended."""
        self._learnt[name, put].learn(segments, nbytes, seconds)
        key = name, put, _size_class(segments, nbytes)
        self._seen[key] = self._seen.get(key, 0) + 1

    def seconds(self, name: str, put: bool, segments: int, nbytes: int) -> float:
        """Return how long a copy should take by one way."""
        return self._learnt[name, put].seconds(segments, nbytes)

    def predict(self, put: bool, segments: int, nbytes: int, allowed: Iterable[str]) -> tuple[Prediction, ...]:
        """Return what each of `allowed` should take, the one that would be chosen first."""
        found = []
        for name in allowed:
            learnt = self._learnt[name, put]
            seconds = learnt.seconds(segments, nbytes)
            found.append(Prediction(name, seconds, self._cores[name], learnt.cost, learnt.samples))
        return tuple(sorted(found, key=lambda one: one.seconds * self._weights[one.way]))


def _size_class(segments: int, nbytes: int) -> int:
    """Return the same number for mean sizes of segments within a factor of four."""
    return (nbytes // max(segments, 1)).bit_length() // 2

"""How many times faster one contender was than another, of rounds in which they took turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SLOWER = 0.95
"""Below this ratio we are slower: by more than 5 %."""
DOUBT = 0.15
"""How probable it may be, at most, that the median lies outside of the interval."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast we were: the median of the rounds' own ratios, and between what it lies."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def slower(self) -> bool:
        """Whether we are slower by more than 5 %."""
        return self.median < SLOWER

    @property
    def doubtful(self) -> bool:
        """Whether the rounds leave open on which side of the 5 % it is."""
        return self.low < SLOWER <= self.high

    @property
    def width(self) -> float:
        """Half the distance between its bounds, relative to it."""
        return (self.high - self.low) / 2 / self.median


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
    """Return the ratio of speeds that were measured in the same rounds, one right after the other; `None` without any.

    The interval is the sign test's: it takes nothing for granted about how the ratios are spread.
    """
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=False) if other > 0)
    if not ratios:
        return None
    cut = _cut(len(ratios))
    return Ratio(statistics.median(ratios), ratios[cut], ratios[-1 - cut], len(ratios))


def _cut(count: int) -> int:
    """Return how many of `count` sorted values may be left out at each end."""
    outside, cut = 0, 0
    while cut < count // 2:
        outside += math.comb(count, cut)
        if 2 * outside / 2**count > DOUBT:
            break
        cut += 1
    return max(0, cut - 1)


def geometric_mean(ratios: Iterable[Ratio]) -> float:
    """Return the geometric mean of the medians.

    Raises:
        ValueError: there is none.
    """
    return statistics.geometric_mean(ratio.median for ratio in ratios)

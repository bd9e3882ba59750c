"""Which peers this agent has given up in the life that they are in: such a peer may not know it. Pure.

Who connects to one of them again says so (REJOIN) before anything else, and uses no backend before the peer has confirmed
(FENCED) that it has closed, and will write nothing more of, what was connected before.
"""

from __future__ import annotations

import itertools

MAX_REMEMBERED = 1 << 16
"""How many are remembered. Of others that were given up before it is not known which: each connection to one says REJOIN."""


class Losses:
    """Numbers the losses of peers: each is greater than those before it."""

    def __init__(self, remembered: int = MAX_REMEMBERED) -> None:
        self._remembered = remembered
        self._numbers: dict[str, tuple[str, int]] = {}
        self._count = itertools.count(1)
        self._forgotten = 0

    def add(self, name: str, incarnation: str) -> None:
        """Take note that this life of a peer was given up."""
        self._numbers.pop(name, None)
        self._numbers[name] = incarnation, next(self._count)
        if len(self._numbers) > self._remembered:
            _, self._forgotten = self._numbers.pop(next(iter(self._numbers)))

    def number(self, name: str, incarnation: str) -> int:
        """Return the number of the last loss of this life of a peer; 0 if it was never lost."""
        known, number = self._numbers.get(name, ("", 0))
        return number if known == incarnation else self._forgotten

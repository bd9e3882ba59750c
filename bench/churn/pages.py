"""Pages that prove whose they are, and memory that shows when somebody writes to it while it is free.

A page's words follow from its owner's name and incarnation, the request and its place at the owner: a byte that is stale, torn, or
in the wrong place is none of them. Free pages hold a canary, which is looked at when they are taken again.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_NBYTES = 16 << 10
_WORDS = PAGE_NBYTES // 8
_INSIDE = np.arange(_WORDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_CANARY = np.uint64(0xA5A5A5A5A5A5A5A5)


def owner_salt(name: str, incarnation: str) -> int:
    """Return what the pages of one life of an agent begin with."""
    return int.from_bytes(hashlib.blake2b(f"{name}/{incarnation}".encode(), digest_size=8).digest(), "little")


def page_words(salt: int, request: int, places: Sequence[int]) -> NDArray[np.uint64]:
    """Return the words of the pages that an owner filled for a request; `places` are their numbers in its region."""
    first = np.asarray(places, np.uint64) * np.uint64(0xD1B54A32D192ED03)
    first += np.uint64((salt + request * 0x2545F4914F6CDD1D) % 2**64)
    return first[:, None] + _INSIDE


class Pages:
    """The memory of one member: `memory` is to be registered, its pages are taken and given back."""

    def __init__(self, count: int) -> None:
        self._words = np.full((count, _WORDS), _CANARY)
        self.memory = self._words.reshape(-1).view(np.uint8)
        self._free = deque(range(count))
        self.overwritten = 0
        """How many pages were written to while nothing should have moved there."""

    @property
    def free(self) -> int:
        """How many pages can be taken."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Take that many pages; `None` if there are not so many."""
        if count > len(self._free):
            return None
        taken = [self._free.popleft() for _ in range(count)]
        self.overwritten += int((self._words[taken] != _CANARY).any(axis=1).sum())
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages to which nothing moves any more; those freed first are taken first."""
        self._words[pages] = _CANARY
        self._free.extend(pages)

    def audit(self) -> int:
        """Look at every free page; return how many pages were written to while they were free, in all."""
        free = list(self._free)
        return self.overwritten + int((self._words[free] != _CANARY).any(axis=1).sum())

    def fill(self, pages: Sequence[int], salt: int, request: int) -> None:
        """Write what this owner's pages hold for a request."""
        self._words[pages] = page_words(salt, request, pages)

    def count_wrong(self, pages: Sequence[int], salt: int, request: int, places: Sequence[int]) -> int:
        """Return how many of the pages are not what their owner had at `places`."""
        return int((self._words[pages] != page_words(salt, request, places)).any(axis=1).sum())

    def spoil(self, page: int) -> None:
        """Change one byte, to see whether it is noticed."""
        self.memory[page * PAGE_NBYTES + 12345] ^= 1

"""Which pages of a KV cache are free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from examples.fastapi_disagg.model import PAGE_TOKENS


class TooLong(Exception):
    """Refuse a request that needs more pages than there are."""


class OutOfPages(Exception):
    """Refuse a request that has to wait until others are done."""


class Pages:
    """The pages of one KV cache. What is given back last is taken last, so a request's pages are soon scattered."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = deque(range(count))

    @property
    def n_free(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    def take(self, tokens: int) -> list[int]:
        """Take pages for so many tokens.

        Raises:
            TooLong: they would not fit if the request were alone.
            OutOfPages: not enough are free.
        """
        wanted = -(-tokens // PAGE_TOKENS)
        if wanted > self.count:
            raise TooLong(f"{tokens} tokens need {wanted} pages; this server has {self.count}")
        if wanted > self.n_free:
            raise OutOfPages(f"{tokens} tokens need {wanted} pages; {self.n_free} of {self.count} are free")
        return [self._free.popleft() for _ in range(wanted)]

    def give_back(self, pages: Iterable[int]) -> None:
        """Give pages back. Nothing may write to them or read from them any more."""
        self._free.extend(pages)

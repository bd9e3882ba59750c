"""Which pages of a member others may read or write, and when they are its own again.

A peer that was asked to push may write until it has answered. One that is lost is not asked: what it had sent by the network may be
on its way to its place for a moment more; a process of this host that was stopped may go on with a copy when it goes on. Pages that
it may write to are quarantined until some time after it was cut off for certain, or has joined again.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from bench.churn.pages import Pages

Offer = tuple[str, int]
"""Who may read, and the number of its request."""


@dataclass(eq=False)
class Lent:
    """Pages of a request; `holder` says who frees them: the request, the peer that may write to them, or nobody: quarantined."""

    pages: list[int]
    peer: str
    holder: str = "request"


class Lending:
    """The pages of one member that are lent. `settle`: how long one that has joined again may still be busy with what it had begun.

    `cuts_off`: whether a lost peer's writes are refused from then on, as they are where all go by connections.
    """

    def __init__(self, pages: Pages, settle: float, *, cuts_off: bool) -> None:
        self._pages, self._settle, self._cuts_off = pages, settle, cuts_off
        self._exposed: dict[int, Lent] = {}
        self._offers: dict[Offer, tuple[list[int], float]] = {}
        self._held_back: deque[tuple[float, list[int]]] = deque()
        self.quarantined: dict[str, list[int]] = {}
        """By peer; "" has those of transfers that did not become quiet."""

    def expose(self, number: int, lent: Lent) -> None:
        """Let the peer write, from when it is asked to."""
        lent.holder = "peer"
        self._exposed[number] = lent

    def answered(self, number: int, *, waited_for: bool) -> None:
        """Take note that the peer has answered; free the pages if nobody waits for that any more."""
        lent = self._exposed.pop(number, None)
        if lent is not None:
            lent.holder = "request"
            if not waited_for:
                self._pages.give_back(lent.pages)

    def offer(self, to: Offer, pages: list[int], until: float) -> None:
        """Let a peer read, until it says that it has, or a time."""
        self._offers[to] = pages, until

    def over(self, to: Offer) -> None:
        """Take note that a peer has read what it was offered."""
        if (offered := self._offers.pop(to, None)) is not None:
            self._pages.give_back(offered[0])

    def keep(self, pages: list[int]) -> None:
        """Never use pages again: a transfer did not become quiet."""
        self.quarantined.setdefault("", []).extend(pages)

    def gone(self, peer: str, *, left: bool) -> None:
        """Take note that a peer has left, or is lost."""
        for number in [number for number, lent in self._exposed.items() if lent.peer == peer]:
            lent = self._exposed.pop(number)
            lent.holder = "nobody"
            self.quarantined.setdefault(peer, []).extend(lent.pages)
        if left or self._cuts_off:
            self.joined(peer)

    def joined(self, peer: str) -> None:
        """Take note that a peer is there again: what it had begun before ends soon."""
        if pages := self.quarantined.pop(peer, []):
            self._held_back.append((time.monotonic() + self._settle, pages))

    def tick(self, now: float) -> None:
        """Free what is free by now."""
        for to in [to for to, (_, until) in self._offers.items() if until < now]:
            self.over(to)
        while self._held_back and self._held_back[0][0] < now:
            self._pages.give_back(self._held_back.popleft()[1])

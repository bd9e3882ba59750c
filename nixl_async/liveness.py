"""Whether peers are alive: one timer for all links of an agent, and what the kernel knows of their connections.

Three things are told apart. A process that has ended: its kernel closes the connection, which shows at once. A silent network: the
other kernel acknowledges nothing any more. A process that is stopped or stuck: its kernel still acknowledges what its program
does not read. Linux says which (`TCP_INFO`, `man 7 tcp`). Nothing is sent to a peer that was heard of lately.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from nixl_async.errors import ConfigurationError

# Of struct tcp_info (linux/tcp.h): tcpi_probes at 3, tcpi_unacked at 24, tcpi_last_ack_recv (ms) at 56.
_INFO = struct.Struct("=3xB20xI28xI")
_INFO_NBYTES = 60


@dataclass(frozen=True, slots=True)
class Liveness:
    """When a peer is doubted and when it is given up, in seconds.

    `suspect_seconds`: a peer whose program has not been heard of for so long, though asked, is suspect. `lost_seconds`: one whose
    host acknowledges nothing for so long is lost: the network is silent. `stopped_seconds`: one whose host acknowledges while its
    program says nothing (stopped by a signal, in a debugger, stuck) stays suspect until then; `None` for ever.
    A process that ends is noticed at once, whatever these are.
    """

    suspect_seconds: float = 2.0
    lost_seconds: float = 3.0
    stopped_seconds: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("suspect_seconds", "lost_seconds", "stopped_seconds"):
            value = getattr(self, name)
            if value is None and name == "stopped_seconds":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.1 <= value < 86400:
                raise ConfigurationError(f"{name} is {value!r}; it must be a number of seconds from 0.1 to 86400")
        if self.stopped_seconds is not None and self.stopped_seconds < self.suspect_seconds:
            raise ConfigurationError(
                f"stopped_seconds is {self.stopped_seconds:g}, less than suspect_seconds ({self.suspect_seconds:g}):"
                " a peer is suspect before it is lost"
            )


class Kernel(NamedTuple):
    """What the kernel knows of a connection."""

    waiting: bool
    """Whether something was sent that the other side should have acknowledged: bytes, or a probe."""
    silent: float
    """Seconds since the other side last acknowledged anything."""


def ask_kernel(sock: Any) -> Kernel | None:
    """Return what the kernel knows of a TCP connection; `None` where it does not say."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        found = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_NBYTES)
    except OSError:
        return None
    if len(found) < _INFO_NBYTES:
        return None
    probes, unacknowledged, silent = _INFO.unpack(found)
    return Kernel(bool(probes or unacknowledged), silent / 1e3)


def watch(sock: Any, liveness: Liveness) -> None:
    """Let the kernel end a connection whose other side is silent, should this process not come to look itself."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(liveness.lost_seconds)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    # No TCP_USER_TIMEOUT: it ends the connection to a process that is merely stopped once its buffers are full.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)


def reset_on_close(sock: Any) -> None:
    """Let closing a connection tell the other side at once, should one way still work.

    The end of an orderly close waits behind what was sent and is not acknowledged.
    """
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Verdict(NamedTuple):
    """What is to be done about a peer: ask it, doubt it, believe in it again, give it up (and why)."""

    ask: bool = False
    doubt: str = ""
    believe: bool = False
    lost: str = ""


_NOTHING = Verdict()


class Vigil:
    """What is known of one peer's life. Pure: time and the kernel's answers are arguments."""

    __slots__ = ("_asked", "_quiet", "_waiting", "limits", "suspect")

    def __init__(self, liveness: Liveness) -> None:
        self.suspect = False
        self.limits = liveness
        # All in seconds that this process was awake for: what it slept through is nobody's silence.
        self._quiet = self._asked = self._waiting = 0.0

    def heard(self) -> Verdict:
        """Take note that the peer's program said something since the last look."""
        believe, self.suspect = self.suspect, False
        self._quiet = self._asked = self._waiting = 0.0
        return Verdict(believe=True) if believe else _NOTHING

    def due(self, elapsed: float) -> bool:
        """Take note of `elapsed` seconds without a word; return whether the kernel is to be asked."""
        self._quiet += elapsed
        return self._quiet >= ask_after(self.limits)

    def look(self, elapsed: float, kernel: Kernel | None) -> Verdict:
        """Judge a peer that has been quiet for long enough to be asked."""
        limits, quiet = self.limits, self._quiet
        self._waiting = self._waiting + elapsed if kernel is not None and kernel.waiting and self._asked else 0.0
        host = (
            "its host is silent too" if kernel is not None and kernel.silent >= limits.suspect_seconds else "its host answers"
        )
        lost = ""
        if (
            kernel is not None
            # One look is not enough: a question just sent is not answered yet.
            and self._waiting >= 1.9 * period(limits)
            and kernel.silent >= limits.lost_seconds - 1.5 * period(limits)
        ):
            lost = f"its host has acknowledged nothing for {kernel.silent:.1f} s"
        elif limits.stopped_seconds is not None and quiet >= limits.stopped_seconds:
            lost = f"its program has said nothing for {quiet:.1f} s; {host}"
        ask = not lost and (not self._asked or quiet - self._asked >= ask_after(limits))
        if ask:
            self._asked = quiet
        doubt = ""
        if not self.suspect and (lost or quiet >= limits.suspect_seconds):
            self.suspect = True
            doubt = f"nothing was heard of it for {quiet:.1f} s; {host}"
        return Verdict(ask, doubt, lost=lost)


def ask_after(limits: Liveness) -> float:
    """Return how long a peer may say nothing before it is asked, in seconds."""
    return min(limits.suspect_seconds / 2, limits.lost_seconds / 3)


def period(limits: Liveness) -> float:
    """Return how often peers are looked at, in seconds."""
    return ask_after(limits) / 2


class Watched(Protocol):
    """What the pulse needs of a connection."""

    vigil: Vigil
    heard: bool
    """Set by the connection whenever something came; cleared here."""

    @property
    def socket(self) -> Any:
        """The connection's socket."""

    def ping(self) -> None:
        """Ask the other side to say something."""

    def doubt(self, reason: str) -> None:
        """Take note that the peer is suspect."""

    def believe(self) -> None:
        """Take note that the peer is suspect no more."""

    def give_up(self, reason: str) -> None:
        """End the connection."""


_AT_ONCE = 32
"""How many connections are looked at in one step of the loop: to ask one takes some ten microseconds."""


class Pulse:
    """Looks at every connection of an agent in turn; one timer, and none while there is no connection."""

    def __init__(self, liveness: Liveness) -> None:
        self.liveness = liveness
        self._links: dict[Watched, None] = {}
        self._round: list[Watched] = []
        self._timer: asyncio.Handle | None = None
        self._last = self._elapsed = 0.0

    def add(self, link: Watched) -> None:
        """Look after a connection from here on."""
        self._links[link] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._last = loop.time()
            self._timer = loop.call_later(period(self.liveness), self._begin)

    def discard(self, link: Watched) -> None:
        """Look after it no longer."""
        self._links.pop(link, None)
        if not self._links and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._round = []

    def _begin(self) -> None:
        now = asyncio.get_running_loop().time()
        # A loop that was held up, or a process that was stopped, heard nothing meanwhile for a reason of its own.
        self._elapsed = min(now - self._last, 1.5 * period(self.liveness))
        self._last = now
        self._round = list(self._links)
        self._some()

    def _some(self) -> None:
        for _ in range(min(_AT_ONCE, len(self._round))):
            link = self._round.pop()
            if link in self._links:
                self._look(link)
        if not self._links:
            return
        loop = asyncio.get_running_loop()
        if self._round:
            self._timer = loop.call_soon(self._some)
        else:
            self._timer = loop.call_later(period(self.liveness), self._begin)

    def _look(self, link: Watched) -> None:
        vigil = link.vigil
        if link.heard:
            link.heard = False
            verdict = vigil.heard()
        elif vigil.due(self._elapsed):
            verdict = vigil.look(self._elapsed, ask_kernel(link.socket))
        else:
            return
        if verdict.doubt:
            link.doubt(verdict.doubt)
        elif verdict.believe:
            link.believe()
        if verdict.lost:
            link.give_up(verdict.lost)
        elif verdict.ask:
            link.ping()

"""The one rule of what may be sent again after it failed, for pieces of transfers and for small copies made at once. Pure.

It is for what is quiet: nothing of the attempt that failed lands any more. `Quarantined` says that this is not certain, and is
never followed by another attempt.
"""

from __future__ import annotations

import enum

from nixl_async.errors import BackendError, PeerLost, TransferError

MAX_RETRIES = 3
"""How often what fails is sent again by one route before bytes of its transfer have arrived."""


class Repeat(enum.Enum):
    """How something is sent again."""

    CONNECTED = "by the first route that is up, or is up again"
    LATER = "by the same route, after a while"
    ELSEWHERE = "by the next route"


def repeats(error: BaseException, n_routes: int, retries: int = 0) -> tuple[Repeat, ...]:
    """Return the ways to send again what met `error`, the preferred first; none if it must not be.

    `n_routes` counts those that are left, the one that failed included; `retries` the attempts since bytes last arrived.
    """
    if isinstance(error, PeerLost):
        # The route may come back, and fail again: that must end some time.
        return (Repeat.CONNECTED,) if retries < MAX_RETRIES + n_routes else ()
    ways = []
    if isinstance(error, TransferError) and error.retryable and retries < MAX_RETRIES:
        ways.append(Repeat.LATER)
    if isinstance(error, BackendError) and n_routes > 1:
        ways.append(Repeat.ELSEWHERE)
    return tuple(ways)

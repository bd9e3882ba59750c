"""What may be sent again, how, and how often."""

from __future__ import annotations

import pytest

from nixl_async import AccessError, BackendError, NotFoundError, PeerLost, Quarantined
from nixl_async.errors import TransferError
from nixl_async.repeating import MAX_RETRIES, Repeat, repeats

BUSY = BackendError("busy", retryable=True)
UNABLE = BackendError("it cannot")
LOST = PeerLost("reset")


@pytest.mark.parametrize(
    ("error", "n_routes", "expected"),
    [
        (LOST, 1, (Repeat.CONNECTED,)),
        (LOST, 3, (Repeat.CONNECTED,)),
        (BUSY, 1, (Repeat.LATER,)),
        (BUSY, 2, (Repeat.LATER, Repeat.ELSEWHERE)),
        (UNABLE, 1, ()),
        (UNABLE, 2, (Repeat.ELSEWHERE,)),
        (TransferError("not now", retryable=True), 2, (Repeat.LATER,)),
        (AccessError("refused"), 2, ()),
        (NotFoundError("no such object"), 2, ()),
        (Quarantined("it may still move"), 2, ()),
        (ValueError("a bug"), 2, ()),
    ],
    ids=repr,
)
def test_what_may_be_sent_again(error: BaseException, n_routes: int, expected: tuple[Repeat, ...]) -> None:
    assert repeats(error, n_routes) == expected


def test_nothing_is_sent_again_for_ever() -> None:
    assert repeats(BUSY, 1, MAX_RETRIES - 1) == (Repeat.LATER,)
    assert repeats(BUSY, 1, MAX_RETRIES) == ()
    assert repeats(BUSY, 2, MAX_RETRIES) == (Repeat.ELSEWHERE,)
    # A route that is lost costs an attempt, and so may each of the others.
    assert repeats(LOST, 2, MAX_RETRIES + 1) == (Repeat.CONNECTED,)
    assert repeats(LOST, 2, MAX_RETRIES + 2) == ()

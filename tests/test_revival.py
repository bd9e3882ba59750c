"""Routes that are down are tried again: at once, then later and later, until they are back or their peer is gone."""

from __future__ import annotations

import asyncio
import random

import pytest

from nixl_async import BackendError, PeerLost, revival
from nixl_async.backends.memory import MemoryBackend
from nixl_async.membership import Membership
from nixl_async.outages import Outage
from nixl_async.peers import Peer
from nixl_async.revival import Revival
from nixl_async.security import Credentials
from nixl_async.staging import StagingBackend

SECONDS = 10


class Tried(Membership):
    """A membership whose peer "p" is reached by the backend at the attempt number `works`, or never."""

    def __init__(self, works: int | None) -> None:
        async def quiet(peer: str) -> None:
            pass

        super().__init__("a", "1", Credentials(None, None), peer_gone=lambda *_: None, peer_quiet=quiet)
        self.works = works
        self.attempts: list[float] = []
        self.tried = asyncio.Event()

    async def reconnect(self, backend: object, name: str) -> None:
        self.attempts.append(asyncio.get_running_loop().time())
        self.tried.set()
        if name != "p":
            raise PeerLost(f"no peer is called {name!r}")
        if self.works is None or len(self.attempts) < self.works:
            raise BackendError(f"attempt {len(self.attempts)} fails")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(revival, "FIRST_SECONDS", 0.005)
    monkeypatch.setattr(revival, "LONGEST_SECONDS", 0.02)


def outage() -> Outage:
    return Outage("memory", "p", "reset", 0.0)


async def test_a_route_is_tried_at_once_then_later_and_later() -> None:
    tried, back = Tried(5), asyncio.Event()
    routes = Revival({"memory": MemoryBackend()}, tried, lambda *_: back.set())
    one = outage()
    routes.begin(one)
    async with asyncio.timeout(SECONDS):
        await tried.tried.wait()
        while one.again_at is None:
            await asyncio.sleep(0)
        assert one.reason == "attempt 1 fails"
        await back.wait()
    waits = [after - before for before, after in zip(tried.attempts, tried.attempts[1:], strict=False)]
    assert len(waits) == 4
    for wait, least in zip(waits, [0.005, 0.01, 0.02, 0.02], strict=True):
        assert wait >= least * 0.9
    await routes.quiet("p")


async def test_a_route_that_fails_again_soon_is_not_tried_at_once() -> None:
    tried, back = Tried(1), asyncio.Event()
    routes = Revival({"memory": MemoryBackend()}, tried, lambda *_: back.set())
    loop = asyncio.get_running_loop()
    began = []
    for _ in range(3):
        back.clear()
        began.append(loop.time())
        routes.begin(outage())
        async with asyncio.timeout(SECONDS):
            await back.wait()
            await routes.quiet("p")
    waits = [at - before for at, before in zip(tried.attempts, began, strict=True)]
    assert waits[1] >= 0.004
    assert waits[2] >= 0.009
    routes.forget("p")
    back.clear()
    routes.begin(outage())
    await asyncio.sleep(0)
    assert len(tried.attempts) == 4
    await back.wait()
    await routes.quiet("p")


async def test_a_relay_is_back_when_the_routes_it_goes_by_are() -> None:
    tried, back = Tried(3), []
    routes = Revival({"memory": MemoryBackend(), "staging": StagingBackend()}, tried, lambda *route: back.append(route[0]))
    routes.begin(Outage("staging", "p", "reset", 0.0))
    routes.begin(outage())
    async with asyncio.timeout(SECONDS):
        await routes.quiet("p")
    assert back == ["memory", "staging"]
    assert len(tried.attempts) == 3


async def test_nothing_is_tried_for_a_peer_that_is_gone_or_when_it_is_closed() -> None:
    tried, back = Tried(None), []
    routes = Revival({"memory": MemoryBackend()}, tried, lambda *route: back.append(route))
    routes.begin(outage())
    async with asyncio.timeout(SECONDS):
        await tried.tried.wait()
        routes.forget("p")
        await routes.quiet("p")
        n = len(tried.attempts)
        routes.begin(outage())
        while len(tried.attempts) == n:
            await asyncio.sleep(0)
        await routes.aclose()
        await routes.aclose()
    assert back == []


@pytest.mark.parametrize(("told_after", "works", "n_told"), [(0.03, 6, 1), (0.03, 2, 0), (SECONDS, 6, 0)])
async def test_a_route_that_stays_down_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, told_after: float, works: int, n_told: int
) -> None:
    monkeypatch.setattr(revival, "TOLD_SECONDS", told_after)
    tried = Tried(works)
    tried.peers["p"] = Peer("p", "1", {})
    routes = Revival({"memory": MemoryBackend()}, tried, lambda *_: None)
    with caplog.at_level("WARNING"):
        routes.begin(outage())
        async with asyncio.timeout(SECONDS):
            await routes.quiet("p")
    messages = [record.message for record in caplog.records]
    assert sum("stays down and is tried again: attempt " in message for message in messages) == n_told
    # Who was warned hears of its end too.
    assert len(messages) == 2 * n_told

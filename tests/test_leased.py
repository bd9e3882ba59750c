"""Leases as their holder sees them: until when memory may be used, whatever the frames and the clocks do, and giving it back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, ClosedError, Lease, LeasedRegion, LeaseEnded, Quarantined, TransferError, load_backend
from nixl_async.backend import Limits
from nixl_async.errors import ProtocolError
from nixl_async.leased import DRIFT, IDS_AT_ONCE, Holdings, clock, read_ids
from nixl_async.peers import Peer
from nixl_async.testing import Canary, FaultyBackend, assert_same, pattern
from nixl_async.wire import FrameReader, FrameType, encode_json
from tests.agents import TOKEN, connect, two_agents


class _Link:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[FrameType, Any]] = []
        self.closed = False

    def send(self, frame: bytes) -> None:
        ((kind, payload),) = FrameReader(1 << 20).feed(frame)
        self.sent.append((kind, json.loads(payload)))


class _Held:
    """Holdings of one owner, "o", whose frames a test makes up."""

    def __init__(self) -> None:
        self.link = _Link()
        self.peer = Peer("o", "1", link=self.link)  # type: ignore[arg-type]
        self.forgotten: list[LeasedRegion] = []
        self.holdings = Holdings(lambda name: None, self.forgotten.append)
        self.aborted: list[Any] = []
        self.holdings.abort = lambda region, error: self.aborted.append((region, error()))

    def grant(self, number: int, seconds: float, name: str = "kv") -> LeasedRegion:
        region = {
            "name": name,
            "address": 4096,
            "nbytes": 64,
            "kind": "DRAM",
            "device": 0,
            "readonly": False,
            "keys": {"tcp": "00"},
        }
        self.holdings.granted(self.peer, self.link, _payload(id=number, seconds=seconds, region=region))  # type: ignore[arg-type]
        found = self.peer.regions[name]
        assert isinstance(found, LeasedRegion)
        return found

    async def asked(self) -> dict[str, Any]:
        """Wait for the next renewal."""
        async with asyncio.timeout(10):
            while not (found := [value for kind, value in self.link.sent if kind is FrameType.RENEW]):
                await asyncio.sleep(0.005)
        self.link.sent.clear()
        return dict(found[-1])

    async def quiet(self) -> list[int]:
        await asyncio.sleep(0)
        return [number for kind, value in self.link.sent if kind is FrameType.QUIET for number in value["ids"]]


def _payload(**value: Any) -> bytes:
    return encode_json(FrameType.LEASE, value)[5:]


# The clock.


async def test_the_seconds_count_from_the_grant_and_from_when_an_answered_renewal_was_sent() -> None:
    held = _Held()
    before = clock()
    region = held.grant(1, 0.6)
    assert before <= region.since <= clock()
    assert region.expires == region.since + 0.6 * (1 - DRIFT)
    renewal = await held.asked()
    sent = clock()
    assert renewal == {"number": 1, "through": 1}
    assert region.expires == region.since + 0.6 * (1 - DRIFT)
    await asyncio.sleep(0.1)
    held.holdings.renewed(held.peer, _payload(number=7))
    assert region.expires == region.since + 0.6 * (1 - DRIFT)
    held.holdings.renewed(held.peer, _payload(number=1))
    assert sent - 0.1 < region.expires - 0.6 * (1 - DRIFT) <= sent
    # One that came after the renewal was sent is not renewed by it.
    later = held.grant(2, 0.6, "later")
    assert later.expires == later.since + 0.6 * (1 - DRIFT)
    held.holdings.close()


async def test_what_is_not_renewed_is_refused_and_given_back() -> None:
    held = _Held()
    region = held.grant(1, 0.2)
    region.check_usable()
    region.hold()
    await held.asked()
    async with asyncio.timeout(10):
        while not held.aborted:
            await asyncio.sleep(0.005)
    assert clock() >= region.expires
    ((aborted, error),) = held.aborted
    assert aborted is region
    assert isinstance(error, LeaseEnded)
    assert isinstance(error, TransferError)
    assert isinstance(error, ClosedError)
    with pytest.raises(LeaseEnded, match=r"lease of 0.2 s on region 'kv' of peer 'o' has ended: it ran out"):
        region.check_usable()
    # While a transfer holds it, it is not said to be quiet.
    assert await held.quiet() == []
    region.release()
    assert await held.quiet() == [1]
    assert held.forgotten == [region]
    assert "kv" not in held.peer.regions


async def test_it_is_refused_by_the_clock_before_any_timer_has_run() -> None:
    held = _Held()
    region = held.grant(1, 5.0)
    region.since -= 5.0
    with pytest.raises(LeaseEnded, match="ran out 0.0"):
        region.check_usable()
    held.holdings.close()


# Frames.


async def test_a_revocation_is_answered_when_nothing_holds_the_region() -> None:
    held = _Held()
    first, second = held.grant(1, 5.0, "first"), held.grant(2, 5.0, "second")
    first.hold()
    held.link.sent.clear()
    held.holdings.revoked(held.peer, held.link, _payload(ids=[1, 2, 77]))  # type: ignore[arg-type]
    assert sorted(await held.quiet()) == [2, 77]
    assert [region for region, _ in held.aborted] == [first]
    # Asked again, it is not said twice, and what is not quiet is not said to be.
    held.holdings.revoked(held.peer, held.link, _payload(ids=[1]))  # type: ignore[arg-type]
    assert sorted(await held.quiet()) == [2, 77]
    first.release()
    assert sorted(await held.quiet()) == [1, 2, 77]
    for region in (first, second):
        with pytest.raises(LeaseEnded, match="its owner ended it"):
            region.check_usable()


async def test_a_grant_that_comes_twice_is_one() -> None:
    held = _Held()
    region = held.grant(1, 5.0)
    assert held.grant(1, 5.0) is region
    assert [kind for kind, _ in held.link.sent] == [FrameType.LEASED] * 2
    region.hold()
    held.holdings.revoked(held.peer, held.link, _payload(ids=[1]))  # type: ignore[arg-type]
    held.link.sent.clear()
    with pytest.raises(KeyError):
        held.grant(1, 5.0)
    region.release()
    assert await held.quiet() == [1]


async def test_over_another_connection_what_was_given_back_is_said_again() -> None:
    held = _Held()
    held.grant(1, 0.2)
    held.grant(2, 5.0, "other")
    async with asyncio.timeout(10):
        while not await held.quiet():
            await asyncio.sleep(0.005)
    held.link = _Link()
    held.peer.link = held.link  # type: ignore[assignment]
    held.holdings.joined(held.peer)
    assert await held.quiet() == [1]
    renewal = await held.asked()
    held.holdings.renewed(held.peer, _payload(number=renewal["number"]))
    held.holdings.joined(held.peer)
    assert await held.quiet() == []
    held.holdings.close()


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"id": 1, "seconds": 1.0, "region": []},
        {"id": 1, "seconds": 1, "region": {}},
        {"id": 0, "seconds": 1.0, "region": {}},
        {"id": 1, "seconds": float("nan"), "region": {}},
        {"id": 1, "seconds": 0.0, "region": {}},
        {"id": 1, "seconds": 1e9, "region": {}},
        {"id": 1, "seconds": 1.0, "region": {"name": "kv"}},
        {"id": True, "seconds": 1.0, "region": {}},
    ],
)
async def test_grants_that_are_malformed(value: dict[str, Any]) -> None:
    held = _Held()
    with pytest.raises(ProtocolError):
        held.holdings.granted(held.peer, held.link, _payload(**value))  # type: ignore[arg-type]
    assert held.peer.regions == {}


@pytest.mark.parametrize("ids", [5, ["1"], [1.0], [True], [[1]], list(range(IDS_AT_ONCE + 1))])
def test_ids_that_are_malformed(ids: object) -> None:
    with pytest.raises(ProtocolError):
        read_ids(_payload(ids=ids))


# Through agents.


async def _lend(b: Agent, memory: np.ndarray, seconds: float = 5.0, **options: Any) -> Lease:
    return await (await b.register(memory, name="kv", offered=False)).lease("a", seconds, **options)


async def test_giving_it_back() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        memory = np.zeros(24 << 20, np.uint8)
        lease = await _lend(b, memory)
        far, here = peer.region("kv"), await a.register(pattern(24 << 20, 1))
        assert isinstance(far, LeasedRegion)
        transfers = [a.submit(here, far) for _ in range(3)]
        await asyncio.sleep(0)
        await far.give_back()
        for transfer in transfers:
            with pytest.raises(LeaseEnded):
                await transfer
        async with asyncio.timeout(10):
            await lease.quiet()
        assert "gave it back" in lease.ended
        await Canary(memory).watch()
        await far.give_back()


async def test_an_op_that_cannot_be_stopped_keeps_the_memory_from_being_quiet() -> None:
    faulty = FaultyBackend(load_backend("samehost"))
    faulty.limits = Limits(drain_seconds=0.05)
    async with Agent("a", token=TOKEN, backends=[faulty]) as a, Agent("b", token=TOKEN, backends=["samehost"]) as b:
        peer = await connect(a, b)
        memory = np.zeros(4096, np.uint8)
        lease = await _lend(b, memory, drain_seconds=0.3)
        here = await a.register(pattern(4096, 1))
        with faulty.hang(stubborn=True) as gate:
            transfer = a.submit(here, peer.region("kv"))
            await gate.reached()
            with pytest.raises(Quarantined, match="has not said"):
                await lease.revoke()
            # The holder has given up waiting for it, too, and does not call it quiet for that.
            with pytest.raises(Quarantined):
                await transfer
            assert not lease.is_quiet
            gate.release()
        async with asyncio.timeout(10):
            await lease.quiet()
        await Canary(memory).watch()


async def test_what_waits_to_be_sent_fails_with_the_lease() -> None:
    async with two_agents(backends=["samehost"]) as (a, b, peer):
        memory = np.zeros(4096, np.uint8)
        lease = await _lend(b, memory)
        far, here = peer.region("kv"), await a.register(pattern(4096, 1))
        prepared = await a.prepare(here, far)
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transfer = a.submit(here, far, after=never)
        canary = Canary(memory)
        await lease.revoke()
        with pytest.raises(LeaseEnded):
            await transfer
        with pytest.raises(LeaseEnded):
            await a.transfer(prepared)
        canary.check()
        with pytest.raises(LeaseEnded):
            far.check_usable()


async def test_lent_again_it_is_another_lease() -> None:
    async with two_agents(backends=["samehost"]) as (a, b, peer):
        memory = np.zeros(4096, np.uint8)
        lease = await _lend(b, memory)
        old, here = peer.region("kv"), await a.register(pattern(4096, 1))
        await lease.revoke()
        async with await lease.region.lease("a", 5.0):
            with pytest.raises(LeaseEnded):
                await a.transfer(here, old)
            await a.transfer(here, peer.region("kv"))
            assert_same(memory, pattern(4096, 1))

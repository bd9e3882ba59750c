"""The tier of memory: who goes first, who never, who waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from nixl_async.tiers import DRAM
from nixl_async.tiers import dram as module
from nixl_async.tiers.context import Context
from nixl_async.tiers.dram import MemoryTier
from tests.tiers.conftest import BLOCK, Bench


@pytest.fixture
async def tier(bench: Bench) -> AsyncIterator[MemoryTier]:
    context = Context(bench.agent, BLOCK)
    made = MemoryTier(context, DRAM(4 * BLOCK + 100, ttl=100.0))
    await made.open()
    yield made
    await made.aclose()
    context.close()


async def _fill(tier: MemoryTier, *keys: bytes) -> list[int]:
    slots = await tier.take(len(keys))
    return tier.fill(keys, slots)


async def test_the_least_recently_used_goes_first(tier: MemoryTier) -> None:
    tier.unpin(await _fill(tier, b"a", b"b", b"c", b"d"))
    tier.unpin(tier.pin([b"a"]))
    tier.unpin(await _fill(tier, b"e", b"f"))
    assert [key in tier.known for key in (b"a", b"b", b"c", b"d", b"e", b"f")] == [True, False, False, True, True, True]
    assert tier.statistics().evictions == 2
    assert len(tier) == 4


async def test_what_is_pinned_stays_and_others_wait_for_it(tier: MemoryTier) -> None:
    slots = await _fill(tier, b"a", b"b", b"c", b"d")
    waiting = asyncio.create_task(tier.take(1))
    await asyncio.sleep(0)
    assert tier.take_now(1) == []
    tier.pin([b"a"])
    tier.unpin(slots[:1])
    await asyncio.sleep(0)
    assert not waiting.done(), "it is pinned twice"
    tier.unpin(slots[:1])
    assert await waiting == slots[:1]
    assert b"a" not in tier.known
    assert tier.take_now(3) == []


async def test_what_another_call_brought_meanwhile_stays_where_it_is(
    tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await _fill(tier, b"a")
    taken = await tier.take(2)
    # It may be on its way down: if it were forgotten there, and evicted here, no tier would know of it meanwhile.
    assert tier.fill([b"a", b"b"], taken) == [first[0], taken[1]]
    tier.unpin([*first, taken[1]])
    assert len(tier.take_now(4)) == 3, "it is pinned twice"
    assert b"a" in tier.known
    tier.unpin(first)
    assert len(tier.take_now(1)) == 1


async def test_what_has_outlived_its_time_gives_way_to_what_is_younger(
    tier: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = await _fill(tier, b"a")
    later = module.time.time() + 1000
    monkeypatch.setattr(module.time, "time", lambda: later)
    taken = await tier.take(1)
    assert tier.fill([b"a"], taken) == taken != [old]
    assert b"a" in tier.known


async def test_waiting_can_be_given_up(tier: MemoryTier) -> None:
    slots = await _fill(tier, b"a", b"b", b"c", b"d")
    waiting = asyncio.create_task(tier.take(2))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    tier.unpin(slots)
    assert len(tier.take_now(9)) == 4


async def test_a_block_that_comes_twice_leaves_one_slot(tier: MemoryTier) -> None:
    first = await _fill(tier, b"a")
    second = await _fill(tier, b"a")
    assert len(tier) == 1
    tier.unpin(first)
    tier.unpin(second)
    third = await _fill(tier, b"a")
    tier.unpin(third)
    assert tier.n_obtainable == 4
    assert sorted(await tier.take(4)) == [0, 1, 2, 3]


async def test_deleted_blocks_free_their_slots_when_they_are_not_pinned(tier: MemoryTier) -> None:
    tier.unpin(await _fill(tier, b"a"))
    pinned = await _fill(tier, b"b")
    tier.delete([b"a", b"b", b"nobody's"])
    assert len(tier) == 0
    assert tier.n_obtainable == 3
    tier.unpin(pinned)
    assert tier.n_obtainable == 4


async def test_what_is_too_old_is_not_there(tier: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier.unpin(await _fill(tier, b"a"))
    later = module.time.time() + 101
    monkeypatch.setattr(module.time, "time", lambda: later)
    tier.unpin(await _fill(tier, b"b"))
    assert b"a" not in tier.known
    assert b"b" in tier.known
    tier.sweep()
    assert len(tier) == 1

"""The tier of an object store: found by other hosts, verified by its trailer, bounded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from nixl_async import Agent, IntegrityError
from nixl_async.testing.servers import Server
from nixl_async.tiers import Objects
from nixl_async.tiers import objects as module
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context
from nixl_async.tiers.keys import object_name
from nixl_async.tiers.objects import ObjectTier
from nixl_async.tiers.tier import MISSING
from tests.stores import fresh_prefix, s3_options
from tests.tiers.conftest import BLOCK, Bench, N

Open = Callable[..., Awaitable[ObjectTier]]


@pytest.fixture
async def open_tier(bench: Bench, tmp_path: Path) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def make(url: str = f"file://{tmp_path}", agent: Agent = bench.agent, **options: Any) -> ObjectTier:
            context = Context(agent, BLOCK)
            stack.callback(context.close)
            tier = ObjectTier(context, Objects(url, **options))
            await tier.open()
            stack.push_async_callback(tier.aclose)
            return tier

        yield make


def _src(bench: Bench, which: Any = range(N)) -> Blocks:
    return Blocks.of(bench.src(which), len(which), BLOCK)


def _dst(bench: Bench, which: Any = range(N)) -> Blocks:
    return Blocks.of(bench.dst(which), len(which), BLOCK)


async def test_blocks_go_and_come_and_are_found_by_listing(bench: Bench, open_tier: Open) -> None:
    a = await open_tier()
    assert await a.write(bench.keys, _src(bench), durable=True) == [None] * N
    b = await open_tier()
    assert all(key in b.known for key in bench.keys)
    assert await b.read(bench.keys, _dst(bench)) == [None] * N
    assert bench.right()


async def test_what_is_not_listed_is_asked_for(bench: Bench, open_tier: Open) -> None:
    a = await open_tier()
    asks, silent = await open_tier(listing=False), await open_tier(listing=False, ask=False)
    await a.write(bench.keys[:3], _src(bench, range(3)), durable=False)
    assert await silent.find(bench.keys[:4]) == [False] * 4
    assert await silent.read(bench.keys[:1], _dst(bench, [0])) == [MISSING]
    assert await asks.find(bench.keys[:4]) == [True] * 3 + [False]
    assert await asks.read(bench.keys[:4], _dst(bench, range(4))) == [None] * 3 + [MISSING]
    assert bench.right(range(3))


async def test_objects_of_a_real_server(open_tier: Open, bench: Bench, seaweed: Server) -> None:
    pytest.importorskip("aiobotocore")
    url, options = f"s3://bench/{fresh_prefix()}", s3_options(seaweed)
    async with Agent("s3", backends=["memory", "s3"]) as agent:
        context = Context(agent, BLOCK)
        async with await agent.register(bench.data) as source, await agent.register(bench.blank) as target:
            tier = ObjectTier(context, Objects(url, options=options))
            await tier.open()
            assert await tier.write(bench.keys, Blocks.of(source, N, BLOCK), durable=True) == [None] * N
            await tier.aclose()
            other = ObjectTier(context, Objects(url, options=options))
            await other.open()
            assert len(other) == N
            assert await other.read(bench.keys, Blocks.of(target, N, BLOCK)) == [None] * N
            await other.delete(bench.keys[:2])
            assert await other.find(bench.keys[:3]) == [False, False, True]
            await other.aclose()
        context.close()
    assert bench.right()


async def test_what_is_damaged_is_an_error_and_not_served(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    await tier.write(bench.keys[:4], _src(bench, range(4)), durable=False)
    paths = [tmp_path / str(BLOCK) / object_name(key) for key in bench.keys[:4]]
    whole = paths[0].read_bytes()
    paths[0].write_bytes(b"\x00" + whole[1:])
    paths[1].write_bytes(paths[2].read_bytes())
    paths[3].write_bytes(whole[:-1] + b"\xff")
    failures = await tier.read(bench.keys[:4], _dst(bench, range(4)))
    assert [type(one) for one in failures] == [IntegrityError, IntegrityError, type(None), IntegrityError]
    assert tier.counters.corrupt == 3


async def test_what_others_deleted_is_a_miss(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    await tier.write(bench.keys[:2], _src(bench, range(2)), durable=False)
    (tmp_path / str(BLOCK) / object_name(bench.keys[0])).unlink()
    assert await tier.read(bench.keys[:2], _dst(bench, range(2))) == [MISSING, None]
    assert bench.keys[0] not in tier.known


async def test_it_holds_no_more_than_it_may(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier(nbytes=4 * BLOCK)
    await tier.write(bench.keys[:4], _src(bench, range(4)), durable=False)
    await tier.read(bench.keys[:1], _dst(bench, [0]))
    await tier.write(bench.keys[4:6], _src(bench, [4, 5]), durable=False)
    assert [key in tier.known for key in bench.keys[:6]] == [True, False, False, True, True, True]
    assert len(list((tmp_path / str(BLOCK)).iterdir())) == 4


async def test_what_outlived_its_time_is_deleted(bench: Bench, open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = await open_tier(ttl=60.0)
    await tier.write(bench.keys[:2], _src(bench, range(2)), durable=False)
    later = module.time.time() + 61
    monkeypatch.setattr(module.time, "time", lambda: later)
    assert await tier.read(bench.keys[:2], _dst(bench, range(2))) == [MISSING] * 2
    await tier.sweep()
    assert len(tier) == 0
    assert tier.counters.evictions == 2


async def test_blocks_of_another_size_are_not_mixed_in(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    await tier.write(bench.keys[:1], _src(bench, [0]), durable=False)
    context = Context(bench.agent, BLOCK // 2)
    half = ObjectTier(context, Objects(f"file://{tmp_path}"))
    await half.open()
    assert await half.find(bench.keys[:1]) == [False]
    await half.aclose()
    context.close()

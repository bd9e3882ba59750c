"""The tier of a directory: several tiers on one, slots taken from readers, damage, cancellation."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import IntegrityError, OutOfSpace
from nixl_async.testing import Canary, cancel_at_await
from nixl_async.tiers import Files
from nixl_async.tiers import files as module
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context
from nixl_async.tiers.files import FileTier
from nixl_async.tiers.segments import Segments
from nixl_async.tiers.tier import MISSING
from tests.tiers.conftest import BLOCK, Bench, N

Open = Callable[..., Awaitable[FileTier]]


@pytest.fixture
async def open_tier(bench: Bench, tmp_path: Path) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def make(n_slots: int = N, *, verify: bool = True, **options: Any) -> FileTier:
            context = Context(bench.agent, BLOCK, verify=verify)
            stack.callback(context.close)
            tier = FileTier(context, Files(tmp_path, n_slots * BLOCK, segment_nbytes=16 * BLOCK, **options))
            await tier.open()
            stack.push_async_callback(tier.aclose)
            return tier

        yield make


def _src(bench: Bench, which: Any = range(N)) -> Blocks:
    return Blocks.of(bench.src(which), len(which), BLOCK)


def _dst(bench: Bench, which: Any = range(N)) -> Blocks:
    return Blocks.of(bench.dst(which), len(which), BLOCK)


def _segment(tmp_path: Path, number: int = 0) -> Path:
    return tmp_path / f"{BLOCK}-byte-blocks" / f"segment-{number:06}"


@pytest.mark.parametrize("options", [{}, {"direct": True}], ids=["page cache", "direct"])
async def test_blocks_of_many_segments_in_any_order(bench: Bench, open_tier: Open, options: dict[str, Any]) -> None:
    tier = await open_tier(**options)
    assert await tier.write(bench.keys, _src(bench), durable=True) == [None] * N
    order = np.random.default_rng(1).permutation(N)
    failures = await tier.read([bench.keys[at] for at in order], _dst(bench, order))
    assert failures == [None] * N
    assert bench.right()


async def test_what_two_stored_at_the_same_time_is_deleted_twice(bench: Bench, open_tier: Open) -> None:
    a, b = await open_tier(), await open_tier()
    for tier in (a, b):
        assert await tier.write(bench.keys[:1], _src(bench, [0]), durable=False) == [None]
    await a.delete(bench.keys[:1])
    assert len(await open_tier()) == 0


async def test_another_tier_on_the_directory_finds_what_one_stored(bench: Bench, open_tier: Open) -> None:
    a, b = await open_tier(), await open_tier()
    await a.write(bench.keys[:8], _src(bench, range(8)), durable=False)
    assert bench.keys[0] not in b.known
    assert await b.find(bench.keys[:9]) == [True] * 8 + [False]
    assert await b.read(bench.keys[:8], _dst(bench, range(8))) == [None] * 8
    assert bench.right(range(8))
    await b.delete(bench.keys[:4])
    await a.refresh()
    assert [key in a.known for key in bench.keys[:8]] == [False] * 4 + [True] * 4


async def test_a_slot_taken_from_a_reader_is_a_miss(bench: Bench, open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checksums too: the generation alone must tell."""
    reader, writer = await open_tier(4, verify=False), await open_tier(4)
    await writer.write(bench.keys[:4], _src(bench, range(4)), durable=False)
    await reader.refresh()
    move = Segments.move

    async def overtaken(self: Segments, slots: Any, blocks: Blocks, *, put: bool) -> Any:
        # The reader has decided where to read, and then all slots get other blocks.
        if not put:
            monkeypatch.setattr(Segments, "move", move)
            assert await writer.write(bench.keys[4:8], _src(bench, range(4, 8)), durable=False) == [None] * 4
        return await move(self, slots, blocks, put=put)

    monkeypatch.setattr(Segments, "move", overtaken)
    assert await reader.read(bench.keys[:4], _dst(bench, range(4))) == [MISSING] * 4
    assert await reader.read(bench.keys[4:8], _dst(bench, range(4, 8))) == [None] * 4
    assert bench.right(range(4, 8))


async def test_a_slot_taken_from_a_reader_of_the_page_cache_is_a_miss(
    bench: Bench, open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = await open_tier(4), await open_tier(4)
    await writer.write(bench.keys[:4], _src(bench, range(4)), durable=False)
    await reader.refresh()
    summed = Context.summed

    async def overtaken(self: Context, *arguments: Any) -> Any:
        monkeypatch.setattr(Context, "summed", summed)
        assert await writer.write(bench.keys[4:8], _src(bench, range(4, 8)), durable=False) == [None] * 4
        return await summed(self, *arguments)

    monkeypatch.setattr(Context, "summed", overtaken)
    assert await reader.read(bench.keys[:4], _dst(bench, range(4))) == [MISSING] * 4
    assert reader.counters.corrupt == 0
    assert await reader.read(bench.keys[4:8], _dst(bench, range(4, 8))) == [None] * 4
    assert bench.right(range(4, 8))


async def test_what_the_page_cache_has_not_comes_from_the_device(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    assert await tier.write(bench.keys, _src(bench), durable=True) == [None] * N
    for number in range(0, N // 16, 2):
        with open(_segment(tmp_path, number), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert await tier.read(bench.keys, _dst(bench)) == [None] * N
    assert bench.right()


async def test_a_segment_that_cannot_be_opened_fails_its_blocks(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    _segment(tmp_path).mkdir(parents=True)
    failures = await tier.write(bench.keys[:32], _src(bench, range(32)), durable=False)
    assert [error is None for error in failures] == [False] * 16 + [True] * 16
    assert await tier.read(bench.keys[16:32], _dst(bench, range(16, 32))) == [None] * 16
    assert bench.right(range(16, 32))


async def test_a_full_tier_evicts_what_was_used_least_recently(bench: Bench, open_tier: Open) -> None:
    tier = await open_tier(16)
    await tier.write(bench.keys[:16], _src(bench, range(16)), durable=False)
    await tier.read(bench.keys[:2], _dst(bench, range(2)))
    await tier.write(bench.keys[16:18], _src(bench, range(16, 18)), durable=False)
    assert [key in tier.known for key in bench.keys[:6]] == [True, True, False, False, True, True]
    assert tier.counters.evictions == 2
    # More than there is room for leaves the last.
    assert await tier.write(bench.keys, _src(bench), durable=False) == [None] * N
    assert bench.keys[-1] in tier.known
    assert len(tier) == 16


async def test_damaged_bytes_are_an_error_and_then_a_miss(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    await tier.write(bench.keys[:3], _src(bench, range(3)), durable=True)
    with open(_segment(tmp_path), "r+b") as file:
        file.seek(BLOCK + 77)
        file.write(b"\x00\x01\x02\x03")
    failures = await tier.read(bench.keys[:3], _dst(bench, range(3)))
    assert [type(one) for one in failures] == [type(None), IntegrityError, type(None)]
    assert await tier.read(bench.keys[:3], _dst(bench, range(3))) == [None, MISSING, None]
    assert tier.counters.corrupt == 1


async def test_a_block_in_anothers_place_does_not_pass(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    await tier.write(bench.keys[:2], _src(bench, range(2)), durable=True)
    data = bytearray(_segment(tmp_path).read_bytes())
    data[:BLOCK], data[BLOCK : 2 * BLOCK] = data[BLOCK : 2 * BLOCK], data[:BLOCK]
    _segment(tmp_path).write_bytes(data)
    assert all(isinstance(one, IntegrityError) for one in await tier.read(bench.keys[:2], _dst(bench, range(2))))


async def test_a_segment_cut_short_fails_only_the_blocks_behind(bench: Bench, open_tier: Open, tmp_path: Path) -> None:
    tier = await open_tier()
    await tier.write(bench.keys[:8], _src(bench, range(8)), durable=True)
    with open(_segment(tmp_path), "r+b") as file:
        file.truncate(5 * BLOCK)
    failures = await tier.read(bench.keys[:8], _dst(bench, range(8)))
    assert [one is None for one in failures] == [True] * 5 + [False] * 3
    assert bench.right(range(5))


async def test_what_is_read_is_not_evicted_and_a_tier_can_be_too_small(bench: Bench, open_tier: Open) -> None:
    tier = await open_tier(2)
    await tier.write(bench.keys[:2], _src(bench, range(2)), durable=False)
    tier._table.pins[:] = 1
    (error,) = await tier.write(bench.keys[2:3], _src(bench, [2]), durable=False)
    assert isinstance(error, OutOfSpace)
    tier._table.pins[:] = 0
    assert await tier.write(bench.keys[2:3], _src(bench, [2]), durable=False) == [None]


async def test_what_outlived_its_time_is_not_there(bench: Bench, open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = await open_tier(ttl=60.0)
    await tier.write(bench.keys[:2], _src(bench, range(2)), durable=False)
    later = module.time.time() + 61
    monkeypatch.setattr(module.time, "time", lambda: later)
    assert await tier.find(bench.keys[:2]) == [False, False]
    assert await tier.write(bench.keys[:1], _src(bench, [0]), durable=False) == [None]
    assert await tier.find(bench.keys[:2]) == [True, False]
    await tier.sweep()
    assert len(tier) == 1
    assert await tier.read(bench.keys[:1], _dst(bench, [0])) == [None]


@pytest.mark.parametrize("at", range(6))
async def test_a_cancelled_write_or_read_leaves_memory_and_slots_alone(bench: Bench, open_tier: Open, at: int) -> None:
    tier = await open_tier(N)
    await tier.write(bench.keys[: N // 2], _src(bench, range(N // 2)), durable=False)
    await cancel_at_await(tier.write(bench.keys[N // 2 :], _src(bench, range(N // 2, N)), durable=True), at)
    canary = Canary(bench.blank)
    if await cancel_at_await(tier.read(bench.keys[: N // 2], _dst(bench, range(N // 2))), at):
        canary = Canary(bench.blank)
        await canary.watch()
    if tier._committing is not None:
        # It goes on when its write is cancelled, and in a full tier a second copy of its blocks would drive others out.
        await asyncio.wait([tier._committing])
    # Whatever was cancelled, every slot is a block's or can be had again.
    assert await tier.write(bench.keys, _src(bench), durable=False) == [None] * N
    assert await tier.read(bench.keys, _dst(bench)) == [None] * N
    assert bench.right()


async def test_many_small_writes_share_transactions(bench: Bench, open_tier: Open) -> None:
    tier = await open_tier()
    before = tier._index.latest()
    await asyncio.gather(*(tier.write([bench.keys[at]], _src(bench, [at]), durable=True) for at in range(N)))
    assert tier._index.latest() - before < N
    assert await tier.read(bench.keys, _dst(bench)) == [None] * N
    assert bench.right()


async def test_durable_writes_share_the_device_s_turns(bench: Bench, open_tier: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = await open_tier()
    synced, fdatasync = [], os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (synced.append(fd), fdatasync(fd)))
    writes = (tier.write([bench.keys[at]], _src(bench, [at]), durable=True) for at in range(16))
    assert await asyncio.gather(*writes) == [[None]] * 16
    assert 0 < len(synced) < 16


async def test_a_device_that_fails_to_sync_acknowledges_nothing(
    bench: Bench, open_tier: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = await open_tier()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        writes = (tier.write([bench.keys[at]], _src(bench, [at]), durable=True) for at in range(4))
        failed = await asyncio.gather(*writes)
    assert all("segments" in str(error) for (error,) in failed), failed
    assert not any(key in tier.known for key in bench.keys)
    assert await tier.write(bench.keys, _src(bench), durable=True) == [None] * N

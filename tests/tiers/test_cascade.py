"""How blocks go down and up, and what a tier that fails does to the others: nothing."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from nixl_async import OutOfSpace
from nixl_async.tiers import DRAM, Files, Objects, Tiers
from nixl_async.tiers.files import FileTier
from nixl_async.tiers.tier import Failures
from tests.tiers.conftest import BLOCK, Bench, N


def _three(tmp_path: Path, memory: int = 16, files: int = N) -> list[Any]:
    return [
        DRAM(memory * BLOCK),
        Files(tmp_path / "files", files * BLOCK, segment_nbytes=16 * BLOCK),
        Objects(f"file://{tmp_path}/objects"),
    ]


class _Full:
    """Lets a directory have no space while it is `on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        write = FileTier.write

        async def refuse(tier: FileTier, keys: Any, blocks: Any, *, durable: bool) -> Failures:
            if self.on:
                return [OutOfSpace("no space left on device")] * len(keys)
            return await write(tier, keys, blocks, durable=durable)

        monkeypatch.setattr(FileTier, "write", refuse)


async def test_blocks_reach_every_tier(bench: Bench, tmp_path: Path) -> None:
    async with Tiers(bench.agent, _three(tmp_path), block_nbytes=BLOCK) as tiers:
        assert all(await tiers.put(bench.keys, bench.src()))
        assert await tiers.flush() == {}
        assert [tier.blocks for tier in tiers.statistics().tiers] == [16, N, N]
        assert all(await tiers.get(bench.keys, bench.dst()))
    assert bench.right()


@pytest.mark.parametrize("kept", ["files", "objects"])
async def test_a_hit_below_goes_up(bench: Bench, tmp_path: Path, kept: str) -> None:
    async with Tiers(bench.agent, _three(tmp_path), block_nbytes=BLOCK) as tiers:
        await tiers.put(bench.keys[:8], bench.src(range(8)))
    if kept == "objects":
        shutil.rmtree(tmp_path / "files")
    async with Tiers(bench.agent, _three(tmp_path), block_nbytes=BLOCK) as tiers:
        first = await tiers.get(bench.keys[:8], bench.dst(range(8)))
        again = await tiers.get(bench.keys[:8], bench.dst(range(8)))
        assert {one.tier for one in first} == {kept}
        assert {one.tier for one in again} == {"dram"}
        await tiers.flush()
        assert tiers.statistics()["files"].blocks == 8
        assert tiers.statistics()["dram"].promoted == 8
    assert bench.right(range(8))


async def test_without_memory_a_hit_in_the_store_goes_up_into_files(bench: Bench, tmp_path: Path) -> None:
    _, files, objects = _three(tmp_path)
    async with Tiers(bench.agent, [objects], block_nbytes=BLOCK) as tiers:
        await tiers.put(bench.keys, bench.src())
    async with Tiers(bench.agent, [files, objects], block_nbytes=BLOCK) as tiers:
        first = await tiers.get(bench.keys, bench.dst())
        again = await tiers.get(bench.keys, bench.dst())
        assert {one.tier for one in first} == {"objects"}
        assert {one.tier for one in again} == {"files"}
    assert bench.right()


async def test_without_promotion_blocks_stay_where_they_are(bench: Bench, tmp_path: Path) -> None:
    async with Tiers(bench.agent, _three(tmp_path)[1:], block_nbytes=BLOCK) as tiers:
        await tiers.put(bench.keys, bench.src())
    async with Tiers(bench.agent, _three(tmp_path), block_nbytes=BLOCK, promote=False) as tiers:
        assert {one.tier for one in await tiers.get(bench.keys, bench.dst())} == {"files"}
        assert tiers.statistics()["dram"].blocks == 0
    assert bench.right()


async def test_small_tiers_above_a_slow_one_lose_nothing(bench: Bench, tmp_path: Path) -> None:
    async with Tiers(bench.agent, _three(tmp_path, memory=4, files=16), block_nbytes=BLOCK) as tiers:
        assert all(await tiers.put(bench.keys, bench.src()))
        assert await tiers.flush() == {}
        assert tiers.statistics()["objects"].blocks == N
        assert tiers.statistics()["objects"].dropped == 0


async def test_a_lower_tier_that_fails_is_told_and_passed_by(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = _Full(monkeypatch)
    async with Tiers(bench.agent, _three(tmp_path, memory=N), block_nbytes=BLOCK) as tiers:
        put = await tiers.put(bench.keys[:8], bench.src(range(8)))
        assert all(put)
        failed = await tiers.flush()
        assert set(failed) == set(bench.keys[:8])
        assert all(isinstance(error, OutOfSpace) for error in failed.values())
        assert {one.tier for one in await tiers.get(bench.keys[:8], bench.dst(range(8)))} == {"dram"}
        assert tiers.statistics()["objects"].blocks == 8
        # Every slot of memory can be had again: nothing is pinned by what failed.
        assert all(await tiers.put(bench.keys, bench.src()))
        full.on = False
        await tiers.flush()


async def test_durable_needs_a_tier_that_keeps_and_says_for_each_key(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Full(monkeypatch)
    memory, files, objects = _three(tmp_path)
    async with Tiers(bench.agent, [memory, files], block_nbytes=BLOCK) as tiers:
        put = await tiers.put(bench.keys[:4], bench.src(range(4)), durable=True)
        assert not any(put)
        assert all(one.tier == "dram" and isinstance(one.error, OutOfSpace) for one in put)
        assert all(await tiers.get(bench.keys[:4], bench.dst(range(4))))
    async with Tiers(bench.agent, [memory, files, objects], block_nbytes=BLOCK) as tiers:
        put = await tiers.put(bench.keys[:4], bench.src(range(4)), durable=True)
        assert {one.tier for one in put} == {"objects"}


async def test_damage_in_one_tier_is_made_good_by_the_next(bench: Bench, tmp_path: Path) -> None:
    async with Tiers(bench.agent, _three(tmp_path)[1:], block_nbytes=BLOCK) as tiers:
        await tiers.put(bench.keys[:8], bench.src(range(8)))
        await tiers.flush()
        segment = tmp_path / "files" / f"{BLOCK}-byte-blocks" / "segment-000000"
        segment.write_bytes(b"\xff" * segment.stat().st_size)
        got = await tiers.get(bench.keys[:8], bench.dst(range(8)))
        assert {one.tier for one in got} == {"objects"}
        assert all(one and one.error is not None for one in got)
        assert bench.right(range(8))
        assert {one.tier for one in await tiers.get(bench.keys[:8], bench.dst(range(8)))} == {"files"}


async def test_many_puts_of_the_same_blocks_at_once(bench: Bench, tmp_path: Path) -> None:
    async with Tiers(bench.agent, _three(tmp_path), block_nbytes=BLOCK) as tiers:
        every = await asyncio.gather(*(tiers.put(bench.keys, bench.src()) for _ in range(6)))
        assert all(all(one) for one in every)
        await tiers.flush()
        assert [tier.blocks for tier in tiers.statistics().tiers[1:]] == [N, N]
        assert tiers._cascade.memory is not None
        assert tiers._cascade.memory.n_obtainable == 16, "none is pinned for ever"
        got = await asyncio.gather(*(tiers.get(bench.keys, bench.dst()) for _ in range(6)))
        assert all(all(one) for one in got)
    assert bench.right()

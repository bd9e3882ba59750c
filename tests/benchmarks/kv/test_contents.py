"""Bytes that show where they belong: what is right passes, and one wrong byte anywhere does not."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async.benchmarks.kv import contents
from nixl_async.benchmarks.kv.contents import Cache, Memory, WrongBytes, check_words, fill_words, find_memory
from nixl_async.benchmarks.kv.layouts import AXES
from nixl_async.benchmarks.kv.profiling import pool_blocks
from nixl_async.errors import ConfigurationError
from nixl_async.geometry import KVGeometry, Sharding
from nixl_async.planner import Pair, plan_pairs

PAGES = 7
MEMORY = Memory("dram")


def pairs(access: str, head_dim: int = 3) -> list[Pair]:
    geometry = KVGeometry(4, 4, head_dim, 1)
    axes = AXES[access]
    return plan_pairs(geometry, Sharding(tp=4, page_tokens=2, axes=axes), Sharding(tp=2, pp=2, page_tokens=2, axes=axes))


def sides(pair: Pair) -> tuple[Cache, Cache]:
    blocks = pool_blocks(PAGES)
    tables = [np.random.default_rng(side).permutation(blocks)[:PAGES] for side in range(2)]
    return (
        Cache(pair, source=True, blocks=blocks, table=tables[0], memory=MEMORY),
        Cache(pair, source=False, blocks=blocks, table=tables[1], memory=MEMORY),
    )


@pytest.mark.parametrize("access", ["block", "layer"])
@pytest.mark.parametrize("number", range(8))
def test_both_sides_hold_the_same_though_they_are_shaped_differently(access: str, number: int) -> None:
    source, target = sides(pairs(access)[number])
    source.fill(5)
    with pytest.raises(WrongBytes, match="7 pages of 0 to 6"):
        target.check(5)
    # As a transfer would: page by page, in the shape that both share.
    target._view[target.table] = source._view[source.table]
    target.check(5)
    with pytest.raises(WrongBytes):
        target.check(6)


@pytest.mark.parametrize("access", ["block", "layer"])
def test_one_wrong_byte_is_found_anywhere_and_others_do_not_matter(access: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "CHUNK_NBYTES", 100)
    pair = pairs(access)[0]
    _, target = sides(pair)
    target.fill(1)
    target.check(1)
    moved = pair.nbytes(PAGES * 2)
    wrong = 0
    for at in range(target.nbytes):
        target.buffer[at] ^= 0xFF
        try:
            target.check(1)
        except WrongBytes:
            wrong += 1
        target.buffer[at] ^= 0xFF
    assert wrong == moved


def test_every_place_has_other_bytes() -> None:
    source, _ = sides(pairs("block", head_dim=8)[0])
    source.fill(1)
    words = np.ascontiguousarray(source._view[source.table]).view(np.uint64)
    assert len(np.unique(words)) == words.size


@pytest.mark.parametrize("nbytes", [1, 7, 8, 4096, 5427])
def test_messages(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "CHUNK_NBYTES", 512)
    buffer = MEMORY.allocate(8192)
    fill_words(MEMORY, buffer, rank=3, salt=2)
    message = buffer[64 : 64 + nbytes].copy()
    assert check_words(MEMORY, message, 3, 2, 64) == 0
    assert check_words(MEMORY, message, 2, 2, 64) > 0
    assert check_words(MEMORY, message, 3, 1, 64) > 0
    assert check_words(MEMORY, message, 3, 2, 128) > 0
    message[-1] ^= 1
    assert check_words(MEMORY, message, 3, 2, 64) == 1


async def test_work_is_done_off_the_loop() -> None:
    buffer = MEMORY.allocate(64)
    await MEMORY.run(lambda: fill_words(MEMORY, buffer, 0, 1))
    assert check_words(MEMORY, buffer, 0, 1, 0) == 0


def test_device_memory_is_refused_where_there_is_none() -> None:
    assert find_memory("dram") == "dram"
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception:
        assert find_memory(None) == "dram"
        with pytest.raises(ConfigurationError, match="--memory dram"):
            find_memory("vram")
    else:
        assert find_memory("vram") == "vram"

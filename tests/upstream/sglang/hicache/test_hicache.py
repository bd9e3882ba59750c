"""`HiCacheNixlAsync` as SGLang uses it: made by its factory, with its host pools, over real files and servers."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pools
import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import STORAGE_BATCH_SIZE, PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

from nixl_async import ClosedError, ConfigurationError
from nixl_async.integrations.sglang_hicache import HiCacheNixlAsync
from nixl_async.integrations.sglang_hicache.config import read_options
from nixl_async.integrations.sglang_hicache.loop import LoopThread
from nixl_async.integrations.sglang_hicache.pool import PoolStore

PAGES = 1000
SOME = 40
ATTENTION = {"K/V": pools.mha, "MLA": pools.mla}


def _store(backend: Any, keys: list[str], order: Any) -> None:
    for at in range(0, len(keys), STORAGE_BATCH_SIZE):
        some = order[at : at + STORAGE_BATCH_SIZE]
        assert backend.batch_set_v1(keys[at : at + len(some)], pools.slots(some)) == [True] * len(some)


def _load(backend: Any, keys: list[str], order: Any) -> list[bool]:
    found: list[bool] = []
    for at in range(0, len(keys), STORAGE_BATCH_SIZE):
        some = order[at : at + STORAGE_BATCH_SIZE]
        found += backend.batch_get_v1(keys[at : at + len(some)], pools.slots(some))
    return found


def _wrong(pool: Any, order: Any, other: Any, into: Any) -> list[int]:
    """Return which pages of two pools differ."""
    pairs = zip(order, into, strict=True)
    return [at for at, (a, b) in enumerate(pairs) if pools.page(pool, int(a)) != pools.page(other, int(b))]


LAYOUTS = ("page_first", "layer_first", "page_first_direct")
THOUSAND = [
    *itertools.product(("files", "direct"), LAYOUTS, ATTENTION, (True, False)),
    *itertools.product(("s3", "dram+files+s3"), LAYOUTS[:2], ATTENTION, (True,)),
    *itertools.product(("gds", "directory", "az", "dram+files", "direct+az"), LAYOUTS[:1], ATTENTION, (True,)),
]


@pytest.mark.parametrize(
    ("kind", "layout", "attention", "zero_copy"),
    THOUSAND,
    ids=[
        f"{kind}, {layout}, {attention}, {'in place' if zero_copy else 'bounced'}"
        for kind, layout, attention, zero_copy in THOUSAND
    ],
)
def test_a_thousand_pages_come_back(tiers: Any, attach: Any, kind: str, layout: str, attention: str, zero_copy: bool) -> None:
    make = ATTENTION[attention]
    pool, keys = make(layout, PAGES), pools.keys(PAGES)
    there, here = np.random.default_rng(1).permutation(PAGES), np.random.default_rng(2).permutation(PAGES)
    pools.fill(pool, 3)
    config = {"is_mla_model": attention == "MLA", "zero_copy": zero_copy}
    writer = attach(pool, tiers(kind), **config)
    assert type(writer) is HiCacheNixlAsync
    assert writer.batch_exists(keys[:3]) == 0
    assert not any(_load(writer, keys[:3], there))
    _store(writer, keys, there)
    assert writer.batch_exists(keys) == PAGES
    writer.close()

    other = make(layout, PAGES)
    pools.wipe(other)
    reader = attach(other, tiers(kind), **config)
    assert reader.batch_exists([*keys[:7], *pools.keys(2, PAGES), *keys[7:9]]) == 7
    assert reader.exists(keys[5])
    assert not reader.exists(pools.keys(1, PAGES)[0])
    assert all(_load(reader, keys, here))
    assert not _wrong(pool, there, other, here)


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_tensors_come_back_without_interface_v1(tiers: Any, attach: Any, layout: str) -> None:
    pool, keys = pools.mha(layout, SOME), pools.keys(SOME)
    pools.fill(pool, 4)
    backend = attach(pool, tiers("files"), interface_v1=0, bounce_nbytes=pool.get_dummy_flat_data_page().nbytes * 3)
    values = [pool.get_data_page(at * pools.PAGE_SIZE) for at in range(SOME)]
    assert backend.batch_set(keys[1:], values[1:]) is True
    assert backend.set(keys[0], values[0]) is True
    assert backend.batch_exists(keys) == SOME
    targets = [pool.get_dummy_flat_data_page() for _ in keys]
    found = backend.batch_get([*keys[:3], *pools.keys(1, SOME), *keys[3:]], [*targets[:3], targets[0].clone(), *targets[3:]])
    assert [one is None for one in found] == [False] * 3 + [True] + [False] * (SOME - 3)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(values, targets, strict=True))
    alone = backend.get(keys[2])
    assert torch.equal(alone.view(torch.uint8), values[2].view(torch.uint8))
    assert backend.get(pools.keys(1, SOME)[0]) is None
    with pytest.raises(ValueError, match="a page of kv is"):
        backend.set(pools.keys(1, 99)[0], values[0][:5])
    # The same pages, as v1 has them: without interface_v1 both go through copies.
    pools.wipe(pool)
    assert all(backend.batch_get_v1(keys, pools.slots(range(SOME))))
    assert all(
        torch.equal(pool.get_data_page(at * pools.PAGE_SIZE).view(torch.uint8), one.view(torch.uint8))
        for at, one in enumerate(values)
    )


def test_tensors_are_refused_where_pages_are_moved_in_place(tiers: Any, attach: Any) -> None:
    pool = pools.mha("page_first", SOME)
    backend = attach(pool, tiers("files"))
    with pytest.raises(ConfigurationError, match="batch_set_v1"):
        backend.batch_set(pools.keys(1), [pool.get_data_page(0)])


@pytest.mark.parametrize("layout", ["page_head", "page_unified"])
def test_layouts_that_only_some_backends_take(tiers: Any, attach: Any, layout: str) -> None:
    pool, keys = pools.mha(layout, SOME), pools.keys(SOME)
    pools.fill(pool, 14)
    if layout == "page_unified":
        with pytest.raises(ConfigurationError, match="choose another --hicache-mem-layout"):
            attach(pool, tiers("files"))
        return
    _store(attach(pool, tiers("files")), keys, range(SOME))
    before = [pools.page(pool, at) for at in range(SOME)]
    pools.wipe(pool)
    assert all(_load(attach(pool, tiers("files")), keys, range(SOME)))
    assert [pools.page(pool, at) for at in range(SOME)] == before


def test_wrong_counts_are_misses(tiers: Any, attach: Any) -> None:
    backend = attach(pools.mha("page_first", SOME), tiers("files"))
    assert backend.batch_set_v1(pools.keys(2), pools.slots([0])) == [False, False]
    assert backend.batch_get_v1(pools.keys(2), pools.slots([0, 1, 2])) == [False, False]
    assert backend.batch_get_v1([], pools.slots([])) == []
    assert backend.batch_exists([]) == 0


@pytest.mark.parametrize(
    "changed", [{"model_name": "another"}, {"namespace": "x"}, {"tp_rank": 1, "tp_size": 2}, {"pp_size": 2}]
)
def test_pages_of_others_are_not_there(tiers: Any, attach: Any, changed: dict[str, Any]) -> None:
    pool, keys = pools.mha("page_first", SOME), pools.keys(SOME)
    _store(attach(pool, tiers("files")), keys, range(SOME))
    assert attach(pool, tiers("files"), **changed).batch_exists(keys) == 0
    assert attach(pool, tiers("files")).batch_exists(keys) == SOME
    assert attach(pools.mha("layer_first", SOME), tiers("files")).batch_exists(keys) == 0
    assert attach(pools.mha("page_first", SOME, dtype=torch.float16), tiers("files")).batch_exists(keys) == 0


def test_ranks_of_a_compressed_cache_share_what_one_of_them_writes(tiers: Any, attach: Any) -> None:
    pool, keys = pools.mla("page_first", SOME), pools.keys(SOME)
    pools.fill(pool, 5)
    ranks = [attach(pool, tiers("files"), is_mla_model=True, tp_rank=rank, tp_size=2) for rank in range(2)]
    assert all(ranks[1].batch_set_v1(keys, pools.slots(range(SOME))))
    assert ranks[0].batch_exists(keys) == ranks[1].batch_exists(keys) == 0
    assert all(ranks[0].batch_set_v1(keys, pools.slots(range(SOME))))
    before = [pools.page(pool, at) for at in range(SOME)]
    pools.wipe(pool)
    assert all(ranks[1].batch_get_v1(keys, pools.slots(range(SOME))))
    assert [pools.page(pool, at) for at in range(SOME)] == before


def test_ranks_with_other_numbers_of_heads_share_pages(tiers: Any, attach: Any) -> None:
    """One rank with four heads and two with two each, as `tp_lcm_size` and the layout page_head make it."""
    whole, keys = pools.mha("page_head", SOME, heads=4), pools.keys(SOME)
    pools.fill(whole, 6)
    one = attach(whole, tiers("files"), tp_lcm_size=2, should_split_heads=True)
    _store(one, keys, range(SOME))
    assert one.batch_exists(keys) == SOME
    for rank in range(2):
        half = pools.mha("page_head", SOME, heads=2)
        pools.wipe(half)
        reader = attach(half, tiers("files"), tp_rank=rank, tp_size=2, tp_lcm_size=2)
        assert all(_load(reader, keys, range(SOME)))
        assert torch.equal(
            half.kv_buffer.view(torch.uint8), whole.kv_buffer[:, :, 2 * rank : 2 * rank + 2].contiguous().view(torch.uint8)
        )
    again = pools.mha("page_head", SOME, heads=4)
    pools.wipe(again)
    assert all(_load(attach(again, tiers("files"), tp_lcm_size=2, should_split_heads=True), keys, range(SOME)))
    assert torch.equal(again.kv_buffer.view(torch.uint8), whole.kv_buffer.view(torch.uint8))


# What hybrid models keep.


def _hybrid(side_state: bool) -> tuple[Any, Any]:
    return pools.mha("page_first", SOME), pools.mamba(SOME, side_state=side_state)


@pytest.mark.parametrize("side_state", [False, True], ids=["zero copy", "bounce"])
@pytest.mark.parametrize("kind", ["files", "dram+files+s3"])
def test_state_of_recurrent_layers_comes_back(tiers: Any, attach: Any, kind: str, side_state: bool) -> None:
    (kv, state), keys = _hybrid(side_state), pools.keys(SOME)
    pools.fill(kv, 7)
    pools.fill(state, 8)
    backend = attach(kv, tiers(kind), hybrid={PoolName.MAMBA: state})
    _store(backend, keys, range(SOME))
    kept = [3, 4, 11, 25]
    transfer = PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor(kept), keys=[keys[at] for at in kept])
    assert backend.batch_set_v2([transfer]) == {PoolName.MAMBA: [True] * 4}
    backend.close()

    (kv_2, state_2) = _hybrid(side_state)
    pools.wipe(kv_2)
    pools.wipe(state_2)
    backend = attach(kv_2, tiers(kind), hybrid={PoolName.MAMBA: state_2})
    into = [5, 0, 9, 1]
    transfer.host_indices = torch.tensor(into)
    missing = PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor([2, 3]), keys=[keys[5], keys[11]])
    assert backend.batch_get_v2([transfer]) == {PoolName.MAMBA: [True] * 4}
    assert not _wrong(state, kept, state_2, into)
    assert backend.batch_get_v2([missing]) == {PoolName.MAMBA: [False, True]}
    assert backend.batch_set_v2([PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor([1]), keys=keys[:2])]) == {
        PoolName.MAMBA: [False, False]
    }
    assert backend.batch_get_v2([PoolTransfer(name=PoolName.SWA, host_indices=torch.tensor([1]), keys=keys[:1])]) == {
        PoolName.SWA: [False]
    }


def test_what_can_be_restored_is_told_for_every_length(tiers: Any, attach: Any) -> None:
    (kv, state), keys = _hybrid(False), pools.keys(SOME)
    window = pools.mha("page_first", SOME, layers=2)
    index = pools.mla("layer_first", SOME, layers=1)
    hybrid = {PoolName.MAMBA: state, PoolName.SWA: window, PoolName.INDEXER: index}
    backend = attach(kv, tiers("files"), hybrid=hybrid)
    n_kv, n_index, states, windows = 30, 28, [4, 9, 10, 20, 27, 28], [0, 1, 2, 8, 9, 10, 11, 18, 19, 20, 25, 26, 27, 28, 33]
    _store(backend, keys[:n_kv], range(n_kv))
    stored = [
        PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor(states), keys=[keys[at] for at in states]),
        PoolTransfer(name=PoolName.SWA, host_indices=pools.slots(windows), keys=[keys[at] for at in windows]),
        PoolTransfer(name=PoolName.INDEXER, host_indices=pools.slots(range(n_index)), keys=keys[:n_index]),
    ]
    assert all(all(found) for found in backend.batch_set_v2(stored).values())
    asked = [
        PoolTransfer(name=PoolName.MAMBA, keys=keys[:1], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        PoolTransfer(name=PoolName.SWA, keys=keys[:3], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        PoolTransfer(name=PoolName.INDEXER, hit_policy=PoolHitPolicy.ALL_PAGES),
    ]
    told = attach(kv, tiers("files"), hybrid=hybrid).batch_exists_v2(keys, asked)

    def right(length: int) -> bool:
        trailing = set(range(max(0, length - 3), length)) <= set(windows)
        return length <= min(n_kv, n_index) and length - 1 in states and trailing

    expected = [length for length in range(1, SOME + 1) if right(length)]
    assert expected == [11, 21, 28]
    assert told.restorable_prefix_pages == expected
    assert told.kv_hit_pages == 28
    assert told.extra_pool_hit_pages == {PoolName.KV: n_kv, PoolName.MAMBA: 29, PoolName.SWA: 29, PoolName.INDEXER: n_index}
    assert backend.batch_exists_v2(keys).kv_hit_pages == n_kv
    assert backend.batch_exists_v2(pools.keys(3, SOME), asked).kv_hit_pages == 0
    assert backend.batch_exists_v2(keys, [PoolTransfer(name=PoolName.DRAFT)]).kv_hit_pages == 0
    with pytest.raises(ValueError, match="trailing_pages"):
        backend.batch_exists_v2(keys, [PoolTransfer(name=PoolName.MAMBA, hit_policy=PoolHitPolicy.BLOCK_GROUPS)])


def test_an_anchor_without_bytes_leaves_it_to_the_others(tiers: Any, attach: Any) -> None:
    side, keys = pools.mla("page_first", SOME), pools.keys(SOME)
    pools.fill(side, 9)
    anchor = LogicalHostPool(SOME * pools.PAGE_SIZE, pools.PAGE_SIZE)
    backend = attach(anchor, tiers("files"), hybrid={PoolName.DEEPSEEK_V4_C4: side}, is_mla_model=True)
    assert all(backend.batch_set_v1(keys, pools.slots(range(SOME))))
    assert backend.batch_exists(keys) == 0
    asked = [PoolTransfer(name=PoolName.DEEPSEEK_V4_C4)]
    assert backend.batch_exists_v2(keys, asked).kv_hit_pages == 0
    stored = [PoolTransfer(name=PoolName.DEEPSEEK_V4_C4, host_indices=pools.slots(range(12)), keys=keys[:12])]
    assert all(backend.batch_set_v2(stored)[PoolName.DEEPSEEK_V4_C4])
    assert backend.batch_exists_v2(keys, asked).kv_hit_pages == 12
    assert all(backend.batch_get_v1(keys, pools.slots(range(SOME))))


def test_a_pool_that_comes_late_is_opened_too(tiers: Any, attach: Any) -> None:
    kv, state = _hybrid(False)
    backend = attach(kv, tiers("files"))
    backend.register_mem_host_pool_v2(state, PoolName.MAMBA)
    transfer = PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor([1]), keys=pools.keys(1))
    assert backend.batch_set_v2([transfer]) == backend.batch_get_v2([transfer]) == {PoolName.MAMBA: [True]}


# Room, time, ends.


@pytest.mark.parametrize("kind", ["files", "objects"])
def test_the_least_recently_used_make_room(tmp_path: Path, attach: Any, kind: str) -> None:
    pool, keys = pools.mha("page_first", PAGES), pools.keys(PAGES)
    pools.fill(pool, 10)
    page = pool.get_dummy_flat_data_page().nbytes
    room = 300
    tier: dict[str, Any] = {"kind": kind, "nbytes": room * page}
    if kind == "files":
        tier |= {"path": str(tmp_path), "segment_nbytes": 64 * page}
    else:
        tier["url"] = f"file://{tmp_path}"
    backend = attach(pool, [tier])
    _store(backend, keys, range(PAGES))
    if kind == "files":
        used = sum(at.stat().st_blocks * 512 for at in tmp_path.rglob("segment-*"))
    else:
        used = page * sum(at.is_file() for at in tmp_path.rglob("*"))
    assert 0 < used <= room * page
    here = [backend.exists(key) for key in keys]
    assert 0 < sum(here) <= room
    assert not any(here[: PAGES - room])
    before = [pools.page(pool, at) for at in range(PAGES)]
    pools.wipe(pool)
    found = _load(backend, keys, range(PAGES))
    assert found == here
    assert all(pools.page(pool, at) == before[at] for at in range(PAGES) if found[at])
    (counted,) = (tiers[kind] for tiers in backend.statistics().values())
    assert counted.evictions >= PAGES - room


@pytest.mark.parametrize("kind", ["files", "directory", "s3", "dram+files+directory"])
def test_clear_deletes_what_is_ours(tiers: Any, attach: Any, kind: str) -> None:
    (kv, state), keys = _hybrid(False), pools.keys(SOME)
    hybrid = {PoolName.MAMBA: state}
    mine, of_mine, other = (attach(kv, tiers(kind), hybrid=hybrid, model_name=name) for name in ("mine", "mine", "another"))
    transfer = PoolTransfer(name=PoolName.MAMBA, host_indices=torch.tensor([1]), keys=keys[:1])
    for backend, some in ((mine, keys[:20]), (of_mine, keys[20:]), (other, keys)):
        _store(backend, some, range(len(some)))
        assert backend.batch_set_v2([transfer]) == {PoolName.MAMBA: [True]}
    for backend in (mine, of_mine, other):
        backend.flush()
    mine.clear()
    assert mine.batch_exists(keys) == 0
    assert not any(mine.exists(key) for key in keys)
    assert mine.batch_get_v2([transfer]) == {PoolName.MAMBA: [False]}
    assert attach(kv, tiers(kind), hybrid=hybrid, model_name="mine").batch_exists(keys[20:]) == 0
    assert other.batch_exists(keys) == SOME
    _store(mine, keys, range(SOME))
    assert mine.batch_exists(keys) == SOME


def test_stats_tell_of_each_call_once(tiers: Any, attach: Any) -> None:
    pool, keys = pools.mha("page_first", SOME), pools.keys(SOME)
    backend = attach(pool, tiers("files"))
    _store(backend, keys, range(SOME))
    _load(backend, keys[:7], range(7))
    stats = backend.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([SOME], [7])
    assert len(stats.backup_bandwidth) == len(stats.prefetch_bandwidth) == 1
    assert min(stats.backup_bandwidth + stats.prefetch_bandwidth) > 0
    assert backend.get_stats().backup_pgs == []
    (counted,) = backend.statistics().values()
    assert (counted.puts, counted.hits) == (SOME, 7)


def test_two_threads_at_once(tiers: Any, attach: Any) -> None:
    pool, keys = pools.mha("page_first", 2 * PAGES), pools.keys(PAGES)
    pools.fill(pool, 11)
    wanted = [pools.page(pool, at) for at in range(PAGES)]
    backend = attach(pool, tiers("dram+files"))

    def backup() -> None:
        _store(backend, keys, range(PAGES))

    def prefetch() -> int:
        got = 0
        while got < PAGES:
            n = min(backend.batch_exists(keys[got : got + STORAGE_BATCH_SIZE]), PAGES - got)
            into = range(PAGES + got, PAGES + got + n)
            assert backend.batch_get_v1(keys[got : got + n], pools.slots(into)) == [True] * n
            got += n
        return got

    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(prefetch)
        threads.submit(backup).result(60)
        assert reading.result(60) == PAGES
    assert [pools.page(pool, PAGES + at) for at in range(PAGES)] == wanted


def test_storage_that_stops_answering_is_given_up_and_taken_up_again(tiers: Any, attach: Any, s3: Any) -> None:
    pool, keys = pools.mha("page_first", SOME), pools.keys(SOME)
    pools.fill(pool, 12)
    _store(attach(pool, tiers("s3")), keys[:20], range(20))
    backend = attach(pool, tiers("s3"), timeout=2.0)
    s3.freeze()
    try:
        assert not any(backend.batch_get_v1(keys[:5], pools.slots(range(20, 25))))
        # Given up, the memory is the caller's: whatever the server answers later does not get there.
        pool.kv_buffer[:, 20 * pools.PAGE_SIZE : 25 * pools.PAGE_SIZE] = 7.0
        marked = [pools.page(pool, at) for at in range(20, 25)]
        assert not any(backend.batch_set_v1(keys[20:25], pools.slots(range(20, 25))))
        assert backend.batch_exists(keys[30:]) == 0
    finally:
        s3.thaw()
    fresh = attach(pool, tiers("s3"))
    assert all(fresh.batch_get_v1(keys[:5], pools.slots(range(30, 35))))
    assert not _wrong(pool, range(5), pool, range(30, 35))
    assert all(backend.batch_get_v1(keys[:5], pools.slots(range(25, 30)))), "the backend goes on"
    assert not _wrong(pool, range(5), pool, range(25, 30))
    assert [pools.page(pool, at) for at in range(20, 25)] == marked


def test_closing_waits_no_longer_than_it_may(tiers: Any, attach: Any, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, move = threading.Event(), PoolStore._moving

    async def moving(store: PoolStore, *arguments: Any, put: bool) -> Any:
        if not put:
            reads.set()
        return await move(store, *arguments, put=put)

    monkeypatch.setattr(PoolStore, "_moving", moving)
    pool, keys = pools.mha("page_first", SOME), pools.keys(SOME)
    backend = attach(pool, tiers("dram+s3"), timeout=2.0)
    reader = attach(pool, tiers("s3"), timeout=2.0)
    s3.freeze()
    try:
        assert all(backend.batch_set_v1(keys, pools.slots(range(SOME)))), "they are in memory"
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(reader.batch_get_v1, keys, pools.slots(range(SOME)))
            assert reads.wait(20)
            began = time.monotonic()
            reader.close()
            backend.close()
            assert time.monotonic() - began < 20
            assert not any(reading.result(20))
    finally:
        s3.thaw()
    assert not [one for one in threading.enumerate() if one.name == "nixl-async-hicache"]


def test_a_wait_that_is_interrupted_leaves_nothing_running() -> None:
    loop, ended = LoopThread("loop"), threading.Event()
    caller = threading.get_ident()

    async def work() -> None:
        try:
            signal.pthread_kill(caller, signal.SIGUSR1)
            await asyncio.Event().wait()
        finally:
            ended.set()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run(work())
        assert ended.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)
        loop.close()


def test_what_runs_when_the_loop_ends_is_told_so() -> None:
    loop, running = LoopThread("loop"), threading.Event()

    async def work() -> None:
        running.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(loop.run, work())
        assert running.wait(20)
        loop.close()
        with pytest.raises(ClosedError, match="meanwhile"):
            waiting.result(20)
    with pytest.raises(ClosedError, match="is closed"):
        loop.run(work())
    loop.close()


def test_storage_that_refuses_is_told_when_it_is_attached(tiers: Any, attach: Any) -> None:
    (tier,) = tiers("s3")
    tier["options"]["secret_key"] = "wrong"
    with pytest.raises(Exception, match=r"(?i)signature|403|denied|forbidden"):
        attach(pools.mha("page_first", SOME), [tier])
    assert not [one for one in threading.enumerate() if one.name == "nixl-async-hicache"]


def test_closed_it_refuses_and_nothing_is_left(tiers: Any, attach: Any) -> None:
    pool, keys = pools.mha("page_first", SOME), pools.keys(SOME)
    attach(pool, tiers("dram+direct")).close()
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        backend = attach(pool, tiers("dram+direct"))
        _store(backend, keys, range(SOME))
        backend.close()
        backend.close()
        with pytest.raises(ClosedError, match="attach"):
            backend.batch_exists(keys)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_idle_it_sleeps(tiers: Any, attach: Any) -> None:
    backend = attach(pools.mha("page_first", SOME), tiers("dram+files+directory"))
    _store(backend, pools.keys(SOME), range(SOME))
    backend.flush()
    seconds, began = 2.0, os.times()
    threading.Event().wait(seconds)
    ended = os.times()
    assert (ended.user + ended.system) - (began.user + began.system) <= 0.02 * seconds


WRITER = """
import conftest, pools
from sglang.srt.mem_cache.storage import StorageBackendFactory
pool = pools.mha("page_first", {pages})
pools.fill(pool, 13)
config = pools.config({{**conftest.DYNAMIC, "tiers": {tiers!r}}})
backend = StorageBackendFactory.create_backend("dynamic", config, pool)
backend.register_mem_pool_host(pool)
assert all(backend.batch_set_v1(pools.keys({pages}), pools.slots(range({pages}))))
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)"], ids=["end", "exit"])
def test_a_process_that_ends_without_closing_writes_what_is_queued(tiers: Any, attach: Any, end: str) -> None:
    program = WRITER.format(pages=SOME, tiers=tiers("dram+files+directory"), end=end)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    pool, other = pools.mha("page_first", SOME), pools.mha("page_first", SOME)
    pools.fill(pool, 13)
    pools.wipe(other)
    for kind in ("files", "directory"):
        reader = attach(other, tiers(kind))
        assert reader.batch_exists(pools.keys(SOME)) == SOME
        assert all(_load(reader, pools.keys(SOME), range(SOME)))
        assert not _wrong(pool, range(SOME), other, range(SOME))


FILES = {"kind": "files", "path": "/x", "nbytes": "1Gi"}
REFUSED = [
    ({}, "tiers=None; it must be a list"),
    ({"tiers": []}, "list of one tier or more"),
    ({"tiers": ["files"]}, "a tier is a dictionary"),
    ({"tiers": [{"kind": "disk"}]}, "kind='disk'; it must be one of dram, files, gds, objects"),
    ({"tiers": [{**FILES, "dirct": True}]}, "has dirct; it may have direct, name, nbytes, path, segment_nbytes, ttl"),
    ({"tiers": [{"kind": "gds", "path": "/x", "nbytes": 1, "direct": True}]}, "has direct; it may have"),
    ({"tiers": [{"kind": "files", "path": "/x"}]}, "lacks nbytes; it needs path, nbytes"),
    ({"tiers": [{**FILES, "nbytes": "much"}]}, "nbytes='much'; it must be a positive number of bytes"),
    ({"tiers": [{**FILES, "nbytes": -1}]}, "nbytes=-1; it must be a positive"),
    ({"tiers": [{**FILES, "ttl": 0}]}, "ttl=0; it must be a positive number of seconds"),
    ({"tiers": [{**FILES, "direct": "yes"}]}, "direct='yes'; it must be a bool"),
    ({"tiers": [{"kind": "objects", "url": "http://x"}]}, "must begin with one of file://, s3://, az://, gs://"),
    ({"tiers": [{"kind": "objects", "url": "s3://x", "options": 3}]}, "options=3; it must be a dict"),
    ({"tiers": [FILES], "verfy": True}, "has verfy; it may have bounce_nbytes, checksum, durable"),
    ({"tiers": [FILES], "verify": 1}, "verify=1; it must be true or false"),
    ({"tiers": [FILES], "timeout": 0}, "timeout=0; it must be a positive"),
    ({"tiers": [{"kind": "dram", "nbytes": 1 << 20}], "durable": True}, "needs a tier of kind files, gds or objects"),
]


@pytest.mark.parametrize(("extra", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_wrong_options_are_refused_with_what_is_allowed(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("[", r"\[")):
        HiCacheNixlAsync(pools.config(extra), {})


def test_wrong_options_of_a_store_are_refused_when_it_is_attached(attach: Any) -> None:
    tier = {"kind": "objects", "url": "s3://bucket", "options": {"adressing": "path"}}
    with pytest.raises(ConfigurationError, match="adressing"):
        attach(pools.mha("page_first", SOME), [tier])


def test_sizes_are_read_as_they_are_written() -> None:
    given = {"500": 500, "1Ki": 1024, "1KiB": 1024, "2k": 2000, "1.5G": 1_500_000_000, "64 Gi": 64 << 30, "1tb": 10**12}
    for text, nbytes in given.items():
        assert read_options({"tiers": [{"kind": "dram", "nbytes": text}]}).tiers[0].nbytes == nbytes

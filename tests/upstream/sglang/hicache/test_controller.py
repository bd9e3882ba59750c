"""SGLang's own cache controller and its storage threads over `HiCacheNixlAsync`: pages are backed up and prefetched by it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import pools
import pytest
import torch
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel

PAGES = 400
RANKS = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_dcp_size": 1, "attn_dcp_rank": 0}


class Device:
    """What the controller asks of a device's pool before any page moves to or from the device."""

    device, layer_num = "cpu", 4

    def register_layer_transfer_counter(self, counter: Any) -> None:
        """Take the counter that layers wait for; no layer is computed here."""

    def get_kvcache(self) -> Device:
        """Be the allocator too."""
        return self


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process group of one rank."""
    monkeypatch.setattr("sglang.srt.managers.cache_controller.is_dp_attention_enabled", lambda: False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    with get_parallel().override(**RANKS):
        yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("interface_v1", [1, 0])
@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_what_the_controller_backs_up_it_prefetches(group: Any, tiers: Any, layout: str, interface_v1: int) -> None:
    pool = pools.mha(layout, 2 * PAGES)
    pools.fill(pool, 1)
    controller = HiCacheController(Device(), pool, pools.PAGE_SIZE, group, threading.Event(), write_policy="write_through")
    extra = {**conftest.DYNAMIC, "interface_v1": interface_v1, "tiers": tiers("files")}
    controller.attach_storage_backend("dynamic", model_name="model", storage_backend_extra_config=extra)
    backend = controller.storage_backend
    try:
        tokens = list(range(PAGES * pools.PAGE_SIZE))
        hashes = get_storage_hash_str(tokens, None, page_size=pools.PAGE_SIZE)
        theirs = pool.alloc(len(tokens))
        assert theirs is not None
        controller.write_storage(theirs, tokens, hash_value=hashes)
        assert controller.ack_backup_queue.get(timeout=60).completed_tokens == len(tokens)

        # A request that begins with the same tokens, and goes on with others.
        operation = controller.prefetch("request", [*tokens[: 300 * pools.PAGE_SIZE], *[7] * 20 * pools.PAGE_SIZE])
        assert controller.prefetch_hit_queue.get(timeout=60) is operation
        assert operation.hash_value == hashes[:300]
        mine = operation.host_indices = pool.alloc(300 * pools.PAGE_SIZE)
        controller.prefetch_buffer.put(operation)
        done = 0
        while not (ack := controller.ack_prefetch_queue.get(timeout=60)).completed_req:
            done = ack.completed_tokens or done
        assert done == 300 * pools.PAGE_SIZE
        _check_equal(pool, theirs, pool, mine)
        stats = backend.get_stats()
        assert sum(stats.backup_pgs) == PAGES
        assert sum(stats.prefetch_pgs) == 300
    finally:
        controller.detach_storage_backend()
    assert "closed" in repr(backend)
    assert not [one for one in threading.enumerate() if one.name == "nixl-async-hicache"]


def _check_equal(pool: Any, theirs: torch.Tensor, other: Any, mine: torch.Tensor) -> None:
    """Compare pages of two pools, as many as `mine` has slots for."""
    for a, b in zip(theirs[:: pool.page_size].tolist(), mine[:: pool.page_size].tolist(), strict=False):
        left, right = pool.get_data_page(a), other.get_data_page(b)
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), (a, b)


def test_the_hybrid_controller_restores_what_all_pools_have(group: Any, tiers: Any) -> None:
    """Keys and values, an index beside each page, and a recurrent state after some pages only."""
    kv, index, state = pools.mha("page_first", 2 * PAGES), pools.mla("page_first", 2 * PAGES, layers=1), pools.mamba(8)
    for seed, pool in enumerate((kv, index, state)):
        pools.fill(pool, seed)
    device = Device()
    entries = [
        PoolEntry(PoolName.KV, kv, device, lambda layer: layer, is_primary_index_anchor=True),
        PoolEntry(PoolName.INDEXER, index, device, lambda layer: layer),
        PoolEntry(PoolName.MAMBA, state, device, lambda layer: layer),
    ]
    controller = HybridCacheController(
        device, HostPoolGroup(entries), pools.PAGE_SIZE, group, threading.Event(), write_policy="write_through"
    )
    controller.attach_storage_backend(
        "dynamic",
        model_name="model",
        storage_backend_extra_config={**conftest.DYNAMIC, "tiers": tiers("dram+files")},
        host_pools=entries,
    )
    try:
        tokens = list(range(PAGES * pools.PAGE_SIZE))
        hashes = get_storage_hash_str(tokens, None, page_size=pools.PAGE_SIZE)
        theirs = kv.alloc(len(tokens))
        trailing = PoolHitPolicy.TRAILING_PAGES

        def beside(*states: tuple[int, str]) -> list[PoolTransfer]:
            slots, keys = torch.tensor([slot for slot, _ in states]), [key for _, key in states]
            return [
                PoolTransfer(name=PoolName.INDEXER, indices_from_pool=PoolName.KV),
                PoolTransfer(name=PoolName.MAMBA, host_indices=slots, keys=keys, hit_policy=trailing),
            ]

        controller.write_storage(theirs, tokens, hash_value=hashes, extra_pools=beside((3, hashes[99]), (4, hashes[149])))
        assert controller.ack_backup_queue.get(timeout=60).completed_tokens == len(tokens)

        wanted = [*tokens[: 200 * pools.PAGE_SIZE], *[7] * pools.PAGE_SIZE]
        handle = CacheRequestHandle("request", 0)
        operation = controller.prefetch(handle, wanted, extra_pools=beside((6, hashes[0])))
        assert controller.prefetch_hit_queue.get(timeout=60) is operation
        # 200 pages are there, and the last of them that has a state is the 150th.
        assert operation.hash_value == hashes[:150]
        mine = operation.host_indices = kv.alloc(150 * pools.PAGE_SIZE)
        controller.prefetch_buffer.put(operation)
        done, beyond = 0, {}
        while not (ack := controller.ack_prefetch_queue.get(timeout=60)).completed_req:
            done, beyond = ack.completed_tokens or done, ack.pool_hits or beyond
        assert done == 150 * pools.PAGE_SIZE
        assert {name: n for name, n in beyond.items() if n} == {PoolName.MAMBA: 1}
        _check_equal(kv, theirs, kv, mine)
        _check_equal(index, theirs, index, mine)
        assert pools.page(state, 6) == pools.page(state, 4) != pools.page(state, 3)
        assert controller.clear_storage_backend() is True
        again = controller.prefetch(handle, wanted, extra_pools=beside((6, hashes[0])))
        assert controller.prefetch_hit_queue.get(timeout=60) is again
        assert again.hash_value == []
    finally:
        controller.detach_storage_backend()
    assert not [one for one in threading.enumerate() if one.name == "nixl-async-hicache"]

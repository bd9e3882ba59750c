"""Our L2 adapter under LMCache's own storage manager: its controllers store, evict, look up, prefetch and lock."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager
from places import TIERS, URLS, WAIT_SECONDS, key_of
from tests.v1.distributed.utils import single_row_spec

Parameters = Callable[[str], dict[str, Any]]
Managers = Callable[..., StorageManager]
LAYOUT = MemoryLayoutDesc(shapes=[torch.Size([2, 4, 16, 256])], dtypes=[torch.bfloat16])
CHUNK = 2 * 4 * 16 * 256 * 2


class Told(L2AdapterListener):
    """Keeps which keys are stored."""

    def __init__(self) -> None:
        self.there: set[ObjectKey] = set()

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.there.update(keys)

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None:
        pass

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None:
        self.there.difference_update(keys)


@pytest.fixture
def managers() -> Iterator[Managers]:
    """Return what makes LMCache's storage manager with our adapter; all are closed at the end."""
    made: list[StorageManager] = []

    def make(given: dict[str, Any], **outer: Any) -> StorageManager:
        spec = {
            "type": "plugin",
            "module_path": "nixl_async.integrations.lmcache",
            "class_name": "NixlAsyncL2Adapter",
            "adapter_params": given,
        }
        n_bytes = 32 << 20
        memory = L1MemoryManagerConfig(size_in_bytes=n_bytes, use_lazy=False, init_size_in_bytes=n_bytes, align_bytes=4096)
        config = StorageManagerConfig(
            l1_manager_config=L1ManagerConfig(memory_config=memory, write_ttl_seconds=600, read_ttl_seconds=300),
            eviction_config=EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec | outer)])),
        )
        made.append(StorageManager(config))
        return made[-1]

    yield make
    for manager in made:
        # It cannot be closed twice.
        if manager.l2_adapters() and manager.report_status()["store_controller"]["thread_alive"]:
            manager.close()


def status(manager: StorageManager) -> dict[str, Any]:
    return manager.report_status()["l2_adapters"][0]  # type: ignore[no-any-return]


def until(true: Callable[[], bool]) -> None:
    """Wait for what LMCache's threads do, of which nothing tells."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def write(manager: StorageManager, keys: list[ObjectKey]) -> dict[ObjectKey, torch.Tensor]:
    """Write objects to L1, and wait until the store controller has stored them; return their bytes."""
    told = Told()
    manager.register_l2_listener(told)
    reserved = manager.reserve_write(keys, LAYOUT)
    assert set(reserved) == set(keys)
    wanted = {}
    for key, one in reserved.items():
        # Numbers that fp8 keeps as they are.
        one.tensor.copy_(torch.randint(-4, 5, one.tensor.shape))
        wanted[key] = one.tensor.clone()
    manager.finish_write(keys)
    until(lambda: told.there.issuperset(keys) and manager.report_status()["l1_manager"]["read_locked_count"] == 0)
    return wanted


def prefetch(manager: StorageManager, keys: list[ObjectKey], wanted: dict[ObjectKey, torch.Tensor]) -> list[int]:
    """Fetch objects to L1, compare the bytes of those that are there; return which are."""
    handle = manager.submit_prefetch_task(single_row_spec(keys, LAYOUT, fetching_policy="full"))
    assert manager.wait_prefetch_status(handle, WAIT_SECONDS)
    result = manager.query_prefetch_status(handle)
    assert result is not None
    hits: list[int] = result.hit_cells[0].get_indices_list()
    found = [keys[at] for at in hits]
    if found:
        with manager.read_prefetched_results(found) as objects:
            assert objects is not None
            for key, one in zip(found, objects, strict=True):
                assert torch.equal(one.tensor, wanted[key])
        manager.finish_read_prefetched(found)
    return hits


@pytest.mark.parametrize("place", URLS + TIERS)
@pytest.mark.parametrize("serde", [{}, {"serde": {"type": "fp8"}}], ids=["plain", "fp8"])
def test_what_l1_has_given_up_comes_from_l2(
    place: str, serde: dict[str, Any], parameters: Parameters, managers: Managers
) -> None:
    manager = managers(parameters(place), **serde)
    keys = list(map(key_of, range(24)))
    wanted = write(manager, keys)
    assert manager.delete_l1_keys(keys) == (24, 0)
    asked = [*keys[:20], key_of(99), *keys[20:]]
    assert prefetch(manager, asked, wanted) == [*range(20), *range(21, 25)]
    until(lambda: status(manager)["locked_key_count"] == 0)
    # From L1 again, and from L2 once more.
    assert prefetch(manager, keys, wanted) == list(range(24))
    manager.clear()
    assert prefetch(manager, keys, wanted) == list(range(24))
    until(lambda: status(manager)["locked_key_count"] == 0)


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_lmcaches_eviction_keeps_the_capacity(place: str, parameters: Parameters, managers: Managers) -> None:
    given = parameters(place) | {"max_capacity_gb": 20 * CHUNK / (1 << 30)}
    eviction = {"eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.5, "eviction_ratio": 0.3}}
    first = managers(given, **eviction)
    wanted = write(first, list(map(key_of, range(8))))
    first.close()
    # Those of the first are counted, and evicted too.
    manager = managers(given, **eviction)
    for start in range(100, 124, 6):
        wanted |= write(manager, list(map(key_of, range(start, start + 6))))
        assert status(manager)["current_size_bytes"] <= 20 * CHUNK
        until(lambda: status(manager)["current_size_bytes"] <= 10 * CHUNK)
    manager.clear()
    left = prefetch(manager, list(wanted), wanted)
    assert 1 <= len(left) <= 10
    assert all(at >= 8 for at in left)


def test_an_adapter_comes_and_goes_at_run_time(parameters: Parameters, managers: Managers) -> None:
    manager = managers(parameters("directory"))
    keys = list(map(key_of, range(4)))
    wanted = write(manager, keys)
    ((descriptor, _),) = manager.l2_adapters()
    manager.delete_l2_adapter(descriptor.index)
    spec = {
        "type": "plugin",
        "module_path": "nixl_async.integrations.lmcache",
        "class_name": "NixlAsyncL2Adapter",
        "adapter_params": parameters("directory"),
    }
    (config,) = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)])).adapters
    manager.add_l2_adapter(config)
    manager.clear()
    assert prefetch(manager, keys, wanted) == list(range(4))

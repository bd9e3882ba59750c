"""Our storage plug-in in LMCache's own storage manager, on every place: whole, short and layer-wise chunks, and its end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager
from places import TIERS, URLS, WAIT_SECONDS, s3_options, served

from nixl_async.integrations.lmcache import NixlAsyncStorageBackend
from nixl_async.testing.servers import Server, seaweedfs

Parameters = Callable[[str], dict[str, Any]]
Managers = Callable[..., StorageManager]
LAYERS, TOKENS, HEADS, HEAD = 3, 64, 2, 32
HIDDEN = HEADS * HEAD
KIND = {"module_path": "nixl_async.integrations.lmcache", "class_name": "NixlAsyncStorageBackend"}


@pytest.fixture
def managers() -> Iterator[Managers]:
    """Return what makes LMCache's storage manager with our plug-in, of parameters and settings; all are closed at the end."""
    made: list[StorageManager] = []

    def make(
        given: dict[str, Any],
        *,
        mla: bool = False,
        plugins: Sequence[str] = ("kv",),
        extra: dict[str, Any] | None = None,
        **settings: Any,
    ) -> StorageManager:
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=TOKENS, local_cpu=True, max_local_cpu_size=0.02, lmcache_instance_id="test", **settings
        )
        config.storage_plugins = list(plugins)
        config.extra_config = {f"storage_plugin.kv.{name}": value for name, value in (KIND | given).items()} | (extra or {})
        metadata = LMCacheMetadata(
            model_name="org/model",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(LAYERS, 1 if mla else 2, TOKENS, HEADS, HEAD),
            use_mla=mla,
            chunk_size=TOKENS,
        )
        made.append(StorageManager(config=config, metadata=metadata, event_manager=EventManager()))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def ours(manager: StorageManager) -> NixlAsyncStorageBackend:
    backend = manager.storage_backends["kv"]
    assert isinstance(backend, NixlAsyncStorageBackend)
    return backend


def key_of(number: int) -> CacheEngineKey:
    return CacheEngineKey("org/model", 1, 0, number, torch.bfloat16)


def chunks(manager: StorageManager, n: int, tokens: int = TOKENS) -> list[Any]:
    """Allocate chunks in LMCache's memory, and fill them."""
    found = []
    for _ in range(n):
        one = manager.allocate(manager.metadata.get_shapes(tokens), manager.metadata.get_dtypes(), busy_loop=False)
        assert one is not None
        one.raw_tensor.copy_(torch.randint(0, 256, one.raw_tensor.shape, dtype=torch.uint8))
        found.append(one)
    return found


def content(one: Any) -> torch.Tensor:
    return one.raw_tensor[: one.get_size()].clone()


def stored(manager: StorageManager, keys: list[Any], objects: list[Any]) -> None:
    """Store chunks by our plug-in, wait, and give the memory back."""
    futures = ours(manager).batched_submit_put_task(keys, objects)
    assert futures is not None
    for future in futures:
        future.result(WAIT_SECONDS)
    for one in objects:
        assert one.get_ref_count() == 1
        one.ref_count_down()


def allocated(manager: StorageManager) -> int:
    """Return the bytes that are allocated of LMCache's memory."""
    allocator = manager.storage_backends["LocalCPUBackend"].get_memory_allocator()
    assert allocator.memcheck()
    return allocator.pin_allocator.address_manager.total_allocated_size  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", URLS + TIERS)
def test_through_lmcaches_storage_manager(place: str, parameters: Parameters, managers: Managers) -> None:
    manager = managers(parameters(place))
    backend = ours(manager)
    keys = list(map(key_of, range(6)))
    objects = chunks(manager, 5) + chunks(manager, 1, tokens=17)
    wanted = list(map(content, objects))
    assert not any(map(backend.contains, keys))
    manager.batched_put(keys, objects)
    deadline = time.monotonic() + WAIT_SECONDS
    while any(map(backend.exists_in_put_tasks, keys)):
        assert time.monotonic() < deadline
    manager.storage_backends["LocalCPUBackend"].clear()
    assert allocated(manager) == 0
    hits, where = manager.batched_contains([*keys, key_of(99)])
    assert hits == 6
    assert list(where) == ["kv"]
    found = manager.batched_get(keys, location="kv")
    for number, (one, bytes_) in enumerate(zip(found, wanted, strict=True)):
        assert one is not None
        assert torch.equal(content(one), bytes_)
        tokens = 17 if number == 5 else TOKENS
        assert one.get_shape() == torch.Size([2, LAYERS, tokens, HIDDEN])
        assert one.get_dtype() == torch.bfloat16
        assert one.get_memory_format() == MemoryFormat.KV_2LTD
    # What was read is in LMCache's hot cache too.
    assert manager.batched_contains(keys)[1] == {"LocalCPUBackend": keys}
    for one in found:
        one.ref_count_down()
    assert manager.get(key_of(99)) is None
    assert backend.batched_get_blocking([key_of(99), keys[0]])[0] is None


@pytest.mark.parametrize("place", ["directory", "tiers"])
@pytest.mark.parametrize("form", ["whole", "mla", "layers", "layers of mla", "layers to blend"])
def test_every_shape(place: str, form: str, parameters: Parameters, managers: Managers) -> None:
    mla, layers = "mla" in form, "layers" in form
    manager = managers(parameters(place), mla=mla, use_layerwise=layers, enable_blending="blend" in form)
    keys = [key_of(number) for number in range(2)]
    if layers:
        keys = [layer for key in keys for layer in key.split_layers(LAYERS)]
        shape, kind = {
            "layers": ([TOKENS, 2, HIDDEN], MemoryFormat.KV_T2D),
            "layers of mla": ([TOKENS, HIDDEN], MemoryFormat.KV_MLA_FMT),
            "layers to blend": ([2, TOKENS, HIDDEN], MemoryFormat.KV_2TD),
        }[form]
    else:
        shape, kind = [1 if mla else 2, LAYERS, TOKENS, HIDDEN], MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD
    objects = []
    for _ in keys:
        one = manager.allocate(torch.Size(shape), torch.bfloat16, fmt=kind, busy_loop=False)
        one.raw_tensor.copy_(torch.randint(0, 256, one.raw_tensor.shape, dtype=torch.uint8))
        objects.append(one)
    wanted = list(map(content, objects))
    stored(manager, keys, objects)
    assert ours(manager).batched_contains(keys) == len(keys)
    for one, bytes_ in zip(ours(manager).batched_get_blocking(keys), wanted, strict=True):
        assert one is not None
        assert torch.equal(content(one), bytes_)
        assert one.get_shape() == torch.Size(shape)
        assert one.get_memory_format() == kind
        one.ref_count_down()
    assert allocated(manager) == 0


@pytest.mark.parametrize("place", ["directory", "s3", "tiers"])
def test_a_new_process_finds_what_the_one_before_stored(place: str, parameters: Parameters, managers: Managers) -> None:
    given = parameters(place)
    first = managers(given)
    objects = chunks(first, 3)
    wanted = list(map(content, objects))
    keys = list(map(key_of, range(3)))
    stored(first, keys, objects)
    first.close()
    second = managers(given)
    for one, bytes_ in zip(ours(second).batched_get_blocking(keys), wanted, strict=True):
        assert one is not None
        assert torch.equal(content(one), bytes_)
        one.ref_count_down()


@pytest.mark.parametrize("place", ["directory", "s3", "tiers"])
def test_coroutines_on_another_loop(place: str, parameters: Parameters, managers: Managers) -> None:
    manager = managers(parameters(place))
    backend = ours(manager)
    objects = chunks(manager, 4)
    wanted = list(map(content, objects))
    keys = list(map(key_of, range(4)))
    stored(manager, [keys[0], keys[1], keys[3]], [objects[0], objects[1], objects[3]])
    objects[2].ref_count_down()

    async def ask() -> None:
        assert await backend.batched_async_contains("request", keys, pin=True) == 2
        assert not backend.batched_remove(keys[:2], force=False)
        found = await backend.batched_get_non_blocking("request", keys)
        assert len(found) == 2
        for one, bytes_ in zip(found, wanted, strict=False):
            assert torch.equal(content(one), bytes_)
            one.ref_count_down()

    asyncio.run_coroutine_threadsafe(ask(), manager.loop).result(WAIT_SECONDS)
    assert allocated(manager) == 0
    assert backend.unpin(keys[0])
    assert not backend.unpin(keys[0])
    assert backend.pin(keys[0])
    assert not backend.pin(keys[2])
    assert backend.batched_remove(keys, force=False) == 1
    assert backend.batched_remove(keys) == 2
    assert not backend.remove(keys[0])
    assert backend.batched_contains(keys) == 0


def test_each_chunk_is_told_of_and_stored_once(parameters: Parameters, managers: Managers) -> None:
    manager = managers(parameters("s3"))
    backend = ours(manager)
    objects = chunks(manager, 2)
    told: list[Any] = []
    keys = [key_of(1), key_of(2)]

    def tell(key: Any) -> None:
        # It may ask the one that tells it.
        assert backend.contains(key)
        told.append(key)
        raise RuntimeError("a callback's own fault")

    futures = backend.batched_submit_put_task([keys[0], keys[1], keys[0]], [*objects, objects[0]], on_complete_callback=tell)
    assert futures is not None
    futures[0].result(WAIT_SECONDS)
    assert told == keys
    assert [one.get_ref_count() for one in objects] == [1, 1]
    for one in objects:
        one.ref_count_down()
    assert allocated(manager) == 0


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[Server]:
    """Run a SeaweedFS of the test's own, to freeze and kill."""
    with served(seaweedfs(tmp_path / "weed")) as server:
        yield server


@pytest.mark.parametrize("during", ["allocation", "transfer"])
def test_a_read_that_is_cancelled_gives_quiet_memory_back(during: str, frail: Server, managers: Managers) -> None:
    manager = managers({"url": "s3://bench/frail/", "options": s3_options(frail)})
    backend = ours(manager)
    keys = list(map(key_of, range(4)))
    stored(manager, keys, chunks(manager, 4))
    allocating, go_on = threading.Event(), threading.Event()
    allocate = manager.local_cpu_backend.allocate

    def watched(*layout: Any, **settings: Any) -> Any:
        allocating.set()
        assert go_on.wait(WAIT_SECONDS)
        return allocate(*layout, **settings)

    manager.local_cpu_backend.allocate = watched

    async def cancelled() -> None:
        task = asyncio.ensure_future(backend.batched_get_non_blocking("request", keys))
        assert await asyncio.to_thread(allocating.wait, WAIT_SECONDS)
        frail.freeze()
        if during == "transfer":
            go_on.set()
            while not backend._chunks._tasks:
                await asyncio.sleep(0.005)
            assert allocated(manager) > 0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if during == "transfer":
            assert allocated(manager) == 0
        go_on.set()
        # Memory that was being allocated comes back when that thread ends.
        while allocated(manager) or not allocating.is_set():
            await asyncio.sleep(0.005)

    asyncio.run_coroutine_threadsafe(asyncio.wait_for(cancelled(), WAIT_SECONDS), manager.loop).result()
    manager.local_cpu_backend.allocate = allocate
    frail.thaw()
    found = backend.batched_get_blocking(keys)
    assert None not in found
    for one in found:
        one.ref_count_down()


def test_a_store_that_is_gone(frail: Server, managers: Managers) -> None:
    manager = managers({"url": "s3://bench/frail/", "options": s3_options(frail), "failures": 1, "retry_seconds": 60.0})
    backend = ours(manager)
    frail.kill()
    objects = chunks(manager, 2)
    futures = backend.batched_submit_put_task([key_of(1), key_of(2)], objects)
    assert futures is not None
    with pytest.raises(Exception, match=r"."):
        futures[0].result(WAIT_SECONDS)
    assert not backend.exists_in_put_tasks(key_of(1))
    began = time.monotonic()
    for _ in range(100):
        assert not backend.contains(key_of(1))
        assert backend.get_blocking(key_of(1)) is None
    assert time.monotonic() - began < 2.0
    assert backend.batched_remove([key_of(1)]) == 0
    for one in objects:
        one.ref_count_down()
    assert allocated(manager) == 0


@pytest.mark.parametrize("place", ["directory", "tiers"])
def test_closing_the_manager_lets_stores_end_before_the_memory_is_freed(
    place: str, parameters: Parameters, managers: Managers
) -> None:
    given = parameters(place)
    manager = managers(given)
    objects = chunks(manager, 64)
    wanted = list(map(content, objects))
    keys = list(map(key_of, range(64)))
    # LMCache frees its memory first, then closes what is stored from it.
    manager.batched_put(keys, objects)
    manager.close()
    assert ours(manager).batched_submit_put_task(keys[:1], objects[:1]) is None
    second = managers(given)
    for start in range(0, 64, 16):
        for one, bytes_ in zip(ours(second).batched_get_blocking(keys[start : start + 16]), wanted[start:], strict=False):
            assert one is not None
            assert torch.equal(content(one), bytes_)
            one.ref_count_down()


def test_lmcache_frees_its_memory_when_nothing_is_read_from_it_any_more(frail: Server, managers: Managers) -> None:
    manager = managers({"url": "s3://bench/frail/", "options": s3_options(frail), "close_seconds": 0.5})
    backend = ours(manager)
    keys, objects = list(map(key_of, range(4))), chunks(manager, 4)
    allocator = manager.local_cpu_backend.memory_allocator
    freeing, busy = allocator.close, []

    def watched() -> None:
        busy.append([*filter(backend.exists_in_put_tasks, keys)])
        freeing()

    allocator.close = watched
    frail.freeze()
    manager.batched_put(keys, objects)
    assert all(map(backend.exists_in_put_tasks, keys))
    manager.close()
    assert busy == [[]]


def test_a_configuration_has_it_once_or_derived(parameters: Parameters, managers: Managers) -> None:
    given = parameters("directory")
    second = {"module_path": "places", "class_name": "Derived", "url": given["url"] + "-second"}
    extra = {f"storage_plugin.second.{name}": value for name, value in second.items()}
    manager = managers(given, plugins=["kv", "second"], extra=extra)
    assert type(manager.storage_backends["kv"]) is NixlAsyncStorageBackend
    assert type(manager.storage_backends["second"]).__name__ == "Derived"
    objects = chunks(manager, 1)
    stored(manager, [key_of(1)], objects)
    assert ours(manager).contains(key_of(1))
    assert not manager.storage_backends["second"].contains(key_of(1))
    again = {f"storage_plugin.second.{name}": value for name, value in (second | KIND).items()}
    assert list(managers(given, plugins=["kv", "second"], extra=again).storage_backends) == ["LocalCPUBackend"]


@pytest.mark.parametrize(
    "wrong",
    [{}, {"url": "file:///x", "max_capacity_gb": 1}, {"url": "file:///x", "uri": 1}, {"url": "ftp://x/y"}],
)
def test_wrong_parameters_are_refused(wrong: dict[str, Any], managers: Managers) -> None:
    # LMCache logs why, and goes on without it.
    assert "kv" not in managers(wrong).storage_backends

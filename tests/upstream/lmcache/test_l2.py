"""Our L2 adapter: made by LMCache's factory, on every place; what is wrong in its parameters; failing stores; its end."""

from __future__ import annotations

import argparse
import json
import select
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.internal_api import L1MemoryDesc, L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from places import (
    TIERS,
    URLS,
    WAIT_SECONDS,
    key_of,
    load,
    look_up,
    object_of,
    random_bytes,
    s3_options,
    served,
    store,
    wait_for,
)

from nixl_async import ConfigurationError
from nixl_async.integrations.lmcache import NixlAsyncL2Adapter, NixlAsyncL2AdapterConfig
from nixl_async.integrations.lmcache.names import chunk_name, parse_chunk_name
from nixl_async.testing.servers import Server, seaweedfs

Make = Callable[..., NixlAsyncL2Adapter]
Parameters = Callable[[str], dict[str, Any]]
CHUNK = 48 << 10


def pieces(memory: torch.Tensor, n_bytes: int) -> list[Any]:
    return [object_of(part) for part in memory.split(n_bytes)]


@pytest.mark.parametrize("place", URLS + TIERS)
def test_by_lmcaches_factory(place: str, parameters: Parameters) -> None:
    arena = random_bytes(64 * CHUNK)
    spec = {
        "type": "plugin",
        "module_path": "nixl_async.integrations.lmcache",
        "class_name": "NixlAsyncL2Adapter",
        "adapter_params": parameters(place),
        "eviction": {"eviction_policy": "LRU"},
    }
    config = parse_args_to_l2_adapters_config(argparse.Namespace(l2_adapter=[json.dumps(spec)]))
    desc = L1MemoryDesc(arena.data_ptr(), arena.numel(), 4096)
    adapter = create_l2_adapter_from_registry(config.adapters[0], desc)
    try:
        assert isinstance(adapter, NixlAsyncL2Adapter)
        keys = [key_of(number, cache_salt="tenant" if number % 2 else "") for number in range(32)]
        source, target = arena[: 32 * CHUNK], arena[32 * CHUNK :]
        result = store(adapter, keys, pieces(source, CHUNK))
        assert result.is_successful()
        assert result.bytes_transferred() == source.numel()
        assert store(adapter, keys[:4], pieces(source[: 4 * CHUNK], CHUNK)) == 0
        target.zero_()
        unknown = key_of(99)
        assert look_up(adapter, [unknown, *keys], CHUNK) == [False] + [True] * 32
        # In another order, and beside the arena.
        order = torch.randperm(32).tolist()
        outside = random_bytes(CHUNK)
        objects = [object_of(target[at * CHUNK : (at + 1) * CHUNK]) for at in order]
        bits = load(
            adapter,
            [unknown, *(keys[at] for at in order), keys[3]],
            [object_of(random_bytes(CHUNK)), *objects, object_of(outside)],
        )
        assert bits == [False] + [True] * 33
        assert torch.equal(source, target)
        assert torch.equal(outside, source[3 * CHUNK : 4 * CHUNK])
        adapter.submit_unlock(keys)
        status = adapter.report_status()
        assert status["is_healthy"]
        assert status["locked_key_count"] == 0
        assert status["current_size_bytes"] > 0
    finally:
        adapter.close()
        adapter.close()


@pytest.mark.parametrize("place", ["directory", "s3", "azure", "tiers", "tiers, unaligned", "tiers to s3"])
def test_a_new_process_finds_what_the_one_before_stored(place: str, parameters: Parameters, adapters: Make) -> None:
    given = parameters(place)
    memory = random_bytes(8 * CHUNK)
    keys = list(map(key_of, range(8)))
    first = adapters(given)
    assert store(first, keys, pieces(memory, CHUNK)).is_successful()
    first.close()
    second = adapters(given)
    assert look_up(second, keys, CHUNK) == [True] * 8
    target = torch.zeros_like(memory)
    assert load(second, keys, pieces(target, CHUNK)) == [True] * 8
    assert torch.equal(memory, target)


@pytest.mark.parametrize("place", ["directory", "s3", "tiers"])
def test_another_layout_of_the_same_model_is_a_miss(place: str, parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters(place))
    memory, key = random_bytes(CHUNK), key_of(1)
    assert store(adapter, [key], [object_of(memory)]).is_successful()
    for n_bytes in (CHUNK // 2, 2 * CHUNK):
        assert load(adapter, [key], [object_of(torch.zeros(n_bytes, dtype=torch.uint8))]) == [False]
    # It takes the old one's place.
    half = random_bytes(CHUNK // 2)
    assert store(adapter, [key], [object_of(half)]).bytes_transferred() == CHUNK // 2
    target = torch.zeros_like(half)
    assert load(adapter, [key], [object_of(target)]) == [True]
    assert torch.equal(target, half)


def test_lmcaches_fs_adapter_reads_ours_and_ours_reads_its(tmp_path: Path, adapters: Make) -> None:
    ours = adapters({"url": f"file://{tmp_path}"})
    theirs = FSL2Adapter(FSL2AdapterConfig(str(tmp_path)))
    try:
        memory = random_bytes(4 * CHUNK)
        keys = [key_of(1), key_of(2, object_group_id=3, cache_salt="tenant"), key_of(3), key_of(4)]
        objects = pieces(memory, CHUNK)
        assert store(ours, keys[:2], objects[:2]).is_successful()
        assert store(theirs, keys[2:], objects[2:]).is_successful()
        for adapter in (ours, theirs):
            target = torch.zeros_like(memory)
            assert look_up(adapter, keys, CHUNK) == [True] * 4
            assert load(adapter, keys, pieces(target, CHUNK)) == [True] * 4
            assert torch.equal(memory, target)
    finally:
        theirs.close()


def test_names_can_be_read_back() -> None:
    for key in (key_of(1), key_of(2, object_group_id=17, cache_salt="a b%"), key_of(3, model="m")):
        assert parse_chunk_name(chunk_name(key)) == key
    for name in ("", "x.data", "a@b@c@d.data", "a@0x1@0@zz.data", "a@0x1@0@00", "a@0x1@0@00@x@y.data"):
        assert parse_chunk_name(name) is None


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_a_name_that_is_too_long_for_a_file_is_a_hash(place: str, parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters(place) | {"failures": 1})
    keys = [key_of(1, model="m" * 200, cache_salt=salt * 128) for salt in "ab"]
    memory = random_bytes(2 * 4096)
    target = torch.zeros_like(memory)
    assert store(adapter, keys, pieces(memory, 4096)).is_successful()
    assert look_up(adapter, keys) == [True, True]
    assert load(adapter, keys, pieces(target, 4096)) == [True, True]
    assert torch.equal(memory, target)


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_keys_are_listed(place: str, parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters(place))
    keys = [key_of(number) for number in range(7)] + [key_of(number, model="org/other") for number in range(3)]
    store(adapter, keys, pieces(random_bytes(10 * 4096), 4096))
    found, cursor = [], None
    while True:
        page = adapter.list_l2_keys(model_name="org/model", page_size=3, cursor=cursor)
        found += page.entries
        assert len(page.entries) <= 3
        cursor = page.next_page_token
        if cursor is None:
            break
    assert {entry.key.chunk_hash_hex for entry in found} == {key.chunk_hash.hex() for key in keys[:7]}
    assert len(found) == 7
    assert {entry.size_bytes for entry in found} == {4096}
    assert len(adapter.list_l2_keys().entries) == 10
    with pytest.raises(ValueError, match="positive"):
        adapter.list_l2_keys(page_size=0)


def test_tiers_keep_no_names(parameters: Parameters, adapters: Make) -> None:
    with pytest.raises(NotImplementedError, match="tiers"):
        adapters(parameters("tiers")).list_l2_keys()


@pytest.mark.parametrize("place", ["directory", "s3", "tiers"])
def test_what_is_locked_is_not_deleted(place: str, parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters(place))
    keys = [key_of(1), key_of(2)]
    store(adapter, keys, pieces(random_bytes(2 * 4096), 4096))
    assert look_up(adapter, keys[:1], 4096) == [True]
    assert look_up(adapter, keys[:1], 4096) == [True]
    adapter.delete(keys)
    assert look_up(adapter, keys, 4096) == [True, False]
    for left in (2, 1, 0):
        adapter.delete(keys[:1])
        adapter.submit_unlock(keys[:1])
        assert adapter.report_status()["locked_key_count"] == (left > 0)
    adapter.delete(keys[:1])
    assert look_up(adapter, keys, 4096) == [False, False]


class Told(L2AdapterListener):
    """Keeps what it is told; fails if so asked."""

    def __init__(self, fails: bool = False) -> None:
        self.stored: dict[Any, int] = {}
        self.deleted: list[Any] = []
        self.accessed: list[Any] = []
        self._fails = fails

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        assert not set(keys) & set(self.stored)
        self.stored |= dict(zip(keys, sizes, strict=True))
        self._fail()

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self.accessed += keys
        self._fail()

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        self.deleted += keys
        self._fail()

    def _fail(self) -> None:
        if self._fails:
            raise RuntimeError("a listener's own fault")


def test_a_failing_listener_keeps_no_task_from_its_end(parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters("directory"))
    adapter.register_listener(Told(fails=True))
    memory, target, key = random_bytes(4096), torch.zeros(4096, dtype=torch.uint8), key_of(1)
    assert store(adapter, [key], [object_of(memory)]).is_successful()
    assert load(adapter, [key], [object_of(target)]) == [True]
    assert torch.equal(memory, target)
    adapter.delete([key])
    assert look_up(adapter, [key]) == [False]


@pytest.mark.parametrize("place", ["directory", "s3"])
def test_a_capacity_counts_what_is_there_and_refuses_what_is_too_much(
    place: str, parameters: Parameters, adapters: Make
) -> None:
    given = parameters(place) | {"max_capacity_gb": 10 * 4096 / (1 << 30)}
    first = adapters(given)
    keys = list(map(key_of, range(14)))
    objects = pieces(random_bytes(14 * 4096), 4096)
    assert store(first, keys[:6], objects[:6]).is_successful()
    first.close()
    adapter, told = adapters(given), Told()
    assert adapter.supports_global_eviction
    adapter.register_listener(told)
    assert look_up(adapter, keys[:6]) == [True] * 6
    # What was there is told of beside the first task.
    deadline = time.monotonic() + WAIT_SECONDS
    while adapter.get_usage().total_bytes_used < 6 * 4096:
        assert time.monotonic() < deadline
    assert told.stored == dict.fromkeys(keys[:6], 4096)
    result = store(adapter, keys, objects)
    assert not result.is_successful()
    assert adapter.get_usage().total_bytes_used == 10 * 4096
    assert set(told.stored) == set(keys[:10])
    adapter.submit_unlock(keys[:6])
    adapter.delete(keys[:4])
    assert told.deleted == keys[:4]
    assert store(adapter, keys[10:], objects[10:]).is_successful()
    assert adapter.get_usage().usage_fraction == 1.0
    # What another process deletes is found out by the lookup.
    other = adapters({name: value for name, value in given.items() if name != "max_capacity_gb"})
    other.delete(keys[4:6])
    assert look_up(adapter, keys[4:7]) == [False, False, True]
    assert adapter.get_usage().total_bytes_used == 8 * 4096
    assert told.deleted == keys[:6]


def test_tiers_tell_the_last_tiers_bytes(parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters("tiers"))
    store(adapter, list(map(key_of, range(4))), pieces(random_bytes(4 * CHUNK), CHUNK))
    deadline = time.monotonic() + WAIT_SECONDS
    while adapter.get_usage().total_bytes_used < 4 * CHUNK:
        # They go down to the files by themselves.
        assert time.monotonic() < deadline
    usage = adapter.get_usage()
    assert usage.total_capacity_bytes == 16 << 20
    assert not adapter.supports_global_eviction


def test_more_than_tiers_hold_goes_round(parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters("tiers"))
    memory = random_bytes(24 << 20)
    n_bytes = 1 << 20
    keys = list(map(key_of, range(24)))
    for at in range(24):
        assert store(adapter, [keys[at]], [object_of(memory[at * n_bytes :][:n_bytes])]).is_successful()
    hits = look_up(adapter, keys, n_bytes)
    assert hits[-4:] == [True] * 4
    assert not all(hits)
    target = torch.zeros_like(memory)
    bits = load(adapter, keys, pieces(target, n_bytes))
    assert bits[-4:] == [True] * 4
    for at in range(24):
        if bits[at]:
            assert torch.equal(memory[at * n_bytes :][:n_bytes], target[at * n_bytes :][:n_bytes])


@pytest.mark.parametrize("place", ["directory", "s3", "tiers"])
def test_many_threads_at_once(place: str, parameters: Parameters, adapters: Make) -> None:
    """Two controllers call in LMCache; here eight threads do, each its own keys and some that all of them have."""
    n_threads, n_rounds, n_bytes = 8, 6, 8192
    arena = random_bytes(n_threads * 4 * n_bytes)
    adapter = adapters(parameters(place), arena)
    shared = random_bytes(n_bytes)
    results: dict[int, Any] = {}
    bitmaps: dict[int, Any] = {}
    done = threading.Condition()
    stop = threading.Event()
    failed: list[BaseException] = []
    tasks: dict[str, set[int]] = {"lookup": set(), "load": set()}

    def completions() -> None:
        poll = select.poll()
        for fd in (adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()):
            poll.register(fd, select.POLLIN)
        while not stop.is_set():
            for fd, _ in poll.poll(100):
                wait_for(fd)
            with done:
                results.update(adapter.pop_completed_store_tasks())
                for task in list(tasks["lookup"]):
                    if (found := adapter.query_lookup_and_lock_result(task)) is not None:
                        tasks["lookup"].discard(task)
                        bitmaps[task] = found
                for task in list(tasks["load"]):
                    if (found := adapter.query_load_result(task)) is not None:
                        tasks["load"].discard(task)
                        bitmaps[task] = found
                done.notify_all()

    def wait(where: dict[int, Any], task: int) -> Any:
        with done:
            assert done.wait_for(lambda: task in where, WAIT_SECONDS), task
            return where[task]

    def caller(number: int) -> None:
        try:
            mine = arena[number * 4 * n_bytes :][: 4 * n_bytes]
            for turn in range(n_rounds):
                keys = [key_of(1000 * number + 10 * turn + at) for at in range(2)]
                source, target = mine[: 2 * n_bytes], mine[2 * n_bytes :]
                objects = [*pieces(source, n_bytes), object_of(shared)]
                assert wait(results, adapter.submit_store_task([*keys, key_of(7)], objects)).is_successful()
                with done:
                    task = adapter.submit_lookup_and_lock_task([*keys, key_of(7)], {})
                    tasks["lookup"].add(task)
                assert wait(bitmaps, task).popcount() == 3
                target.zero_()
                common = torch.zeros_like(shared)
                with done:
                    task = adapter.submit_load_task([*keys, key_of(7)], [*pieces(target, n_bytes), object_of(common)])
                    tasks["load"].add(task)
                assert wait(bitmaps, task).popcount() == 3
                assert torch.equal(source, target)
                assert torch.equal(common, shared)
                adapter.submit_unlock([*keys, key_of(7)])
                adapter.delete(keys)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=completions), *(threading.Thread(target=caller, args=(n,)) for n in range(n_threads))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    if failed:
        raise failed[0]
    assert adapter.report_status()["locked_key_count"] == 0


# When the store fails.


@pytest.fixture
def frail(tmp_path: Path) -> Iterator[Server]:
    """Run a SeaweedFS of the test's own, to freeze and kill."""
    with served(seaweedfs(tmp_path / "weed")) as server:
        yield server


def stocked(server: Server, adapters: Make) -> tuple[dict[str, Any], list[Any], torch.Tensor]:
    """Store chunks; return an adapter's parameters, their keys, and memory to load them into."""
    given = {"url": "s3://bench/frail/", "options": s3_options(server)}
    adapter = adapters(given)
    keys = list(map(key_of, range(4)))
    assert store(adapter, keys, pieces(random_bytes(4 * CHUNK), CHUNK)).is_successful()
    adapter.close()
    return given, keys, torch.full((4 * CHUNK,), 7, dtype=torch.uint8)


def test_a_store_that_answers_no_more_is_left_alone_until_it_does(frail: Server, adapters: Make) -> None:
    given, keys, target = stocked(frail, adapters)
    adapter = adapters(given | {"lookup_seconds": 0.5, "transfer_seconds": 2.0, "failures": 2, "retry_seconds": 0.5})
    assert look_up(adapter, [key_of(9)], CHUNK) == [False]
    frail.freeze()
    began = time.monotonic()
    assert load(adapter, keys, pieces(target, CHUNK)) == [False] * 4
    assert look_up(adapter, keys, CHUNK) == [False] * 4
    assert not adapter.report_status()["is_healthy"]
    assert not store(adapter, [key_of(9)], [object_of(random_bytes(CHUNK))]).is_successful()
    assert time.monotonic() - began < WAIT_SECONDS
    # Nothing of the load that failed comes late.
    target.fill_(9)
    frail.thaw()
    deadline = time.monotonic() + WAIT_SECONDS
    while look_up(adapter, keys, CHUNK) != [True] * 4:
        assert time.monotonic() < deadline
    assert adapter.report_status()["is_healthy"]
    assert (target == 9).all()
    adapter.submit_unlock(keys)
    assert load(adapter, keys, pieces(target, CHUNK)) == [True] * 4
    assert not (target == 9).all()


def test_closing_ends_what_is_under_way_and_nothing_moves_afterwards(frail: Server, adapters: Make) -> None:
    given, keys, target = stocked(frail, adapters)
    adapter = adapters(given)
    frail.freeze()
    loads = adapter.submit_load_task(keys, pieces(target, CHUNK))
    stores = adapter.submit_store_task([key_of(9)], [object_of(random_bytes(CHUNK))])
    lookup = adapter.submit_lookup_and_lock_task(keys, {})
    began = time.monotonic()
    adapter.close()
    assert time.monotonic() - began < WAIT_SECONDS
    # Each task has a result, and it is a failure.
    bitmap = adapter.query_load_result(loads)
    assert bitmap is not None
    assert bitmap.popcount() == 0
    found = adapter.query_lookup_and_lock_result(lookup)
    assert found is not None
    assert found.popcount() == 0
    assert not adapter.pop_completed_store_tasks()[stores].is_successful()
    target.fill_(9)
    frail.thaw()
    fresh = adapters(given)
    assert load(fresh, keys, pieces(torch.zeros_like(target), CHUNK)) == [True] * 4
    assert (target == 9).all()


def test_a_dead_server(frail: Server, adapters: Make) -> None:
    given, keys, _ = stocked(frail, adapters)
    adapter = adapters(given | {"failures": 1, "retry_seconds": 60.0})
    frail.kill()
    assert look_up(adapter, keys, CHUNK) == [False] * 4
    # From here on nobody waits for it.
    began = time.monotonic()
    for _ in range(100):
        assert look_up(adapter, keys, CHUNK) == [False] * 4
    assert not store(adapter, [key_of(9)], [object_of(random_bytes(CHUNK))]).is_successful()
    assert time.monotonic() - began < 2.0
    assert adapter.report_status()["failures_in_a_row"] >= 1


@pytest.mark.parametrize("place", ["directory", "s3", "tiers", "tiers, unaligned"])
def test_misses_are_no_failures(place: str, parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters(place) | {"failures": 1})
    memory, target = random_bytes(CHUNK), torch.zeros(CHUNK, dtype=torch.uint8)
    for _ in range(3):
        assert load(adapter, [key_of(1)], [object_of(target)]) == [False]
        assert look_up(adapter, [key_of(1)], CHUNK) == [False]
        adapter.delete([key_of(1)])
    assert adapter.report_status()["failures_in_a_row"] == 0
    assert store(adapter, [key_of(1)], [object_of(memory)]).is_successful()


def test_an_object_that_is_not_in_this_processs_memory_fails_alone(parameters: Parameters, adapters: Make) -> None:
    class Elsewhere:
        raw_tensor = None

        @property
        def data_ptr(self) -> int:
            raise NotImplementedError

    adapter = adapters(parameters("directory"))
    keys, memory = [key_of(1), key_of(2)], random_bytes(CHUNK)
    result = store(adapter, keys, [Elsewhere(), object_of(memory)])
    assert not result.is_successful()
    target = torch.zeros_like(memory)
    assert load(adapter, keys, [Elsewhere(), object_of(target)]) == [False, True]
    assert torch.equal(memory, target)
    with pytest.raises(ValueError, match="2 keys but 1 objects"):
        adapter.submit_store_task([key_of(1), key_of(2)], [object_of(random_bytes(1))])


def test_after_the_end_it_refuses(parameters: Parameters, adapters: Make) -> None:
    adapter = adapters(parameters("directory"))
    adapter.close()
    with pytest.raises(Exception, match="closed"):
        adapter.submit_lookup_and_lock_task([key_of(1)], {})
    assert not adapter.report_status()["is_healthy"]


# Parameters.

FILES = {"type": "files", "path": "/nowhere", "nbytes": 1 << 20}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "either url or tiers"),
        ({"url": "file:///x", "tiers": [FILES], "block_nbytes": 1}, "either url or tiers"),
        ({"url": "/x"}, "url is '/x'"),
        ({"url": "file:///x", "uri": 1}, "no parameter 'uri'; known are url, options"),
        ({"url": "file:///x", "block_nbytes": 4096}, "block_nbytes has no meaning with url"),
        ({"url": "file:///x", "lookup_seconds": 0}, "lookup_seconds is 0"),
        ({"url": "file:///x", "failures": True}, "failures is True"),
        ({"url": "file:///x", "max_capacity_gb": -1}, "max_capacity_gb is -1"),
        ({"url": "file:///x", "options": []}, "options is"),
        ({"tiers": [], "block_nbytes": 4096}, "at least one"),
        ({"tiers": [FILES]}, "block_nbytes is missing"),
        ({"tiers": [FILES], "block_nbytes": 4096, "max_capacity_gb": 1}, "max_capacity_gb has no meaning with tiers"),
        ({"tiers": [{"type": "tape"}], "block_nbytes": 4096}, "tier 1 is .* one of dram, files, objects"),
        ({"tiers": [FILES | {"nbyte": 1}], "block_nbytes": 4096}, "tier 1 has no parameter 'nbyte'"),
        ({"tiers": [{"type": "files", "nbytes": 1}], "block_nbytes": 4096}, "tier 1 needs path"),
        ({"tiers": [FILES | {"direct": "yes"}], "block_nbytes": 4096}, "tier 1: direct is 'yes'"),
        ({"tiers": [FILES, {"type": "dram", "nbytes": 1 << 20}], "block_nbytes": 4096}, "DRAM is tier 2"),
        ({"url": "ftp://x/y"}, "scheme 'ftp'"),
        ({"url": "file:///x", "options": {"speed": 1}}, "speed"),
    ],
)
def test_wrong_parameters_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        NixlAsyncL2Adapter(given)


def test_the_help_names_every_parameter() -> None:
    text = NixlAsyncL2AdapterConfig.help()
    for name in ("url", "options", "tiers", "block_nbytes", "durable", "max_capacity_gb", "lookup_seconds", "retry_seconds"):
        assert f"- {name} " in text

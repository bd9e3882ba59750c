"""The cuda backend: many pages by one kernel, pinned and pageable memory, several devices, a device's faults.

Needs a CUDA device and cupy; it stands alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent
from nixl_async.backends import cuda as backend_module
from nixl_async.backends.cuda import CUDABackend
from nixl_async.cuda import DeviceBytes, device_by_uuid, device_count, device_uuid, pinned_address
from nixl_async.cuda_kernels import Kernels
from nixl_async.testing import assert_same, pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
    pytest.mark.filterwarnings("default"),
]
needs_two = pytest.mark.skipif(device_count() < 2, reason="needs two CUDA devices")
POISON = 0xEE
N = 300


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


@asynccontextmanager
async def mover(**options: Any) -> AsyncIterator[tuple[Agent, CUDABackend]]:
    backend = CUDABackend(**options)
    async with Agent("gpu", backends=[backend, "memory"], authenticate=False) as agent:
        yield agent, backend


def upload(cupy: Any, content: Any) -> Any:
    made = cupy.asarray(content)
    cupy.cuda.Device().synchronize()
    return made


def filled(cupy: Any, nbytes: int, value: int = POISON) -> Any:
    made = cupy.full(nbytes, value, cupy.uint8)
    cupy.cuda.Device().synchronize()
    return made


def pinned(cupy: Any, nbytes: int) -> Any:
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


# Within a device.


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "copies"])
@pytest.mark.parametrize("page", [1, 511, 4096, 5000, 65536])
async def test_pages_within_a_device(cupy: Any, monkeypatch: pytest.MonkeyPatch, page: int, kernel: bool) -> None:
    if not kernel:
        monkeypatch.setattr("nixl_async.cuda_lane.kernels", lambda device: Kernels())
    rng = np.random.default_rng(page)
    content = pattern(N * page)
    for src_at, dst_at in ((0, 0), (1, 0), (8, 4), (3, 3)):
        source, target = upload(cupy, np.concatenate([content, content[:16]])), filled(cupy, N * page + 16)
        here, there = rng.permutation(N), rng.permutation(N)
        async with mover() as (agent, _):
            src, dst = await agent.register(source), await agent.register(target)
            result = await agent.transfer(
                src.pages(here[:-1], page, offset=src_at), dst.pages(there[:-1], page, offset=dst_at)
            )
            assert result.route == "cuda"
        expected = np.full(N * page + 16, POISON, np.uint8)
        rows = expected[dst_at : dst_at + N * page].reshape(N, page)
        rows[there[:-1]] = np.concatenate([content, content[:16]])[src_at : src_at + N * page].reshape(N, page)[here[:-1]]
        assert_same(cupy.asnumpy(target), expected)


async def test_a_prepared_transfer_is_sent_again_and_again(cupy: Any) -> None:
    page, n = 5000, 4000
    rng = np.random.default_rng(8)
    here, there = rng.permutation(n), rng.permutation(n)
    content = pattern(n * page)
    source, target = upload(cupy, content), filled(cupy, n * page)
    async with mover() as (agent, backend):
        src, dst = await agent.register(source), await agent.register(target)
        prepared = await agent.prepare(src.pages(here, page), dst.pages(there, page))
        assert len(backend._kept._plans) == 1
        for turn in range(3):
            content = np.roll(content, 11)
            source.set(content)
            target[:] = turn
            cupy.cuda.Device().synchronize()
            await prepared.transfer()
            expected = np.empty((n, page), np.uint8)
            expected[there] = content.reshape(n, page)[here]
            assert np.array_equal(cupy.asnumpy(target).reshape(n, page), expected)


async def test_ranges_of_all_sizes(cupy: Any) -> None:
    rng = np.random.default_rng(7)
    lengths = np.concatenate([rng.integers(1, 40_000, 400), [9_000_001]])
    ends = np.cumsum(lengths)
    content = pattern(int(ends[-1]))
    source, target = upload(cupy, content), filled(cupy, int(ends[-1]))
    order = rng.permutation(len(lengths))
    there = np.cumsum(lengths[order]) - lengths[order]
    async with mover() as (agent, _):
        src, dst = await agent.register(source), await agent.register(target)
        await agent.transfer(src.ranges((ends - lengths)[order], lengths[order]), dst.ranges(there, lengths[order]))
    assert_same(cupy.asnumpy(target), np.concatenate([content[ends[i] - lengths[i] : ends[i]] for i in order]))


async def test_tens_of_thousands_of_small_pages(cupy: Any) -> None:
    n, page = 200_000, 1024
    content = pattern(n * page)
    source, target = upload(cupy, content), filled(cupy, n * page)
    order = np.random.default_rng(8).permutation(n)
    async with mover() as (agent, _):
        src, dst = await agent.register(source), await agent.register(target)
        await agent.transfer(src.pages(order, page), dst.pages(np.arange(n), page))
    assert np.array_equal(cupy.asnumpy(target), content.reshape(n, page)[order].ravel())


async def test_a_thousand_copies_at_once_use_few_lanes(cupy: Any) -> None:
    content = pattern(1000 * 4096)
    source, target = upload(cupy, content), filled(cupy, 1000 * 4096)
    async with mover() as (agent, backend):
        src, dst = await agent.register(source), await agent.register(target)
        await asyncio.gather(*(agent.transfer(src[i : i + 4096], dst[i : i + 4096]) for i in range(0, len(content), 4096)))
        assert backend._lanes is not None
        assert backend._lanes.launched == 0
        assert sum(map(len, backend._lanes._idle.values())) <= backend_module.MAX_LAUNCHED + backend.limits.max_ops
    assert_same(cupy.asnumpy(target), content)


async def test_cancelled_launches_are_quiet(cupy: Any) -> None:
    nbytes = 1 << 30
    source, target = filled(cupy, nbytes, 1), filled(cupy, nbytes)
    order = np.random.default_rng(3).permutation(nbytes // 4096)
    async with mover() as (agent, _):
        src, dst = await agent.register(source), await agent.register(target)
        prepared = await agent.prepare(src.pages(order, 4096), dst.pages(order, 4096))
        await agent.transfer(prepared)
        cancelled = 0
        for step in range(20):
            task = asyncio.create_task(agent.transfer(prepared))
            await asyncio.wait([task], timeout=step * 0.0001)
            task.cancel()
            await asyncio.wait([task])
            cancelled += task.cancelled()
            target[:] = POISON
            cupy.cuda.Device().synchronize()
            await asyncio.sleep(0.003)
            assert bool((target == POISON).all()), "the device's memory was written after a transfer was cancelled"
        assert cancelled


# Pinned and pageable memory of the host.


@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("page", [3, 4096, 100_000, 2 << 20])
async def test_pages_to_and_from_the_host(cupy: Any, page: int, is_pinned: bool) -> None:
    n = max(8, min(N, (64 << 20) // page))
    rng = np.random.default_rng(page)
    sent, got = (pinned(cupy, n * page) if is_pinned else np.empty(n * page, np.uint8) for _ in range(2))
    sent[:], got[:] = pattern(n * page), POISON
    target = filled(cupy, n * page)
    async with mover(chunk_nbytes=1 << 20, n_threads=3) as (agent, backend):
        host, back, vram = await agent.register(sent), await agent.register(got), await agent.register(target)
        explained = agent.explain(host, vram)
        assert explained.how == ("pinned memory, where it is" if is_pinned else "through 3 pinned buffers of 1048576 bytes")
        assert (pinned_address(host.address, host.nbytes) is not None) == is_pinned
        here, there, last = rng.permutation(n), rng.permutation(n), rng.permutation(n)
        await agent.transfer(host.pages(here, page), vram.pages(there, page))
        on_device = sent.reshape(n, page)[here]
        expected = np.empty_like(on_device)
        expected[there] = on_device
        assert_same(cupy.asnumpy(target), expected.ravel())
        await agent.transfer(vram.pages(there, page), back.pages(last, page))
        expected = np.empty_like(on_device)
        expected[last] = on_device
        assert_same(got, expected.ravel())
        await agent.transfer(host, vram)
        await agent.transfer(vram, back)
        assert_same(got, sent)
        assert backend._lanes is not None
        used = [lane for lane in backend._lanes._idle[0, False] if lane._pinned is not None]
        assert len(used) <= 3
        assert bool(used) is not is_pinned


async def test_pinned_memory_that_ends_early_is_not_taken_for_pinned(cupy: Any) -> None:
    runtime = cupy.cuda.runtime
    block = np.zeros(3 << 20, np.uint8)
    start = -(-block.ctypes.data // 4096) * 4096 - block.ctypes.data
    half = block[start : start + (1 << 20)]
    runtime.hostRegister(half.ctypes.data, half.nbytes, 0)
    try:
        content = pattern(2 << 20)
        async with mover() as (agent, _):
            whole = await agent.register(block[start : start + (2 << 20)])
            vram = await agent.register(upload(cupy, content))
            assert "pinned buffers" in agent.explain(vram, whole).how
            await agent.transfer(vram, whole)
            inner = await agent.register(half)
            assert "where it is" in agent.explain(vram[: 1 << 20], inner).how
            assert_same(block[start : start + (2 << 20)], content)
            half[:] = 0
            await agent.transfer(vram[: 1 << 20], inner)
            assert_same(half, content[: 1 << 20])
    finally:
        runtime.hostUnregister(half.ctypes.data)


async def test_large_and_small_copies_share_the_threads(cupy: Any) -> None:
    large = np.zeros(512 << 20, np.uint8)
    small = pattern(64 << 10)
    async with mover() as (agent, _):
        host, vram = await agent.register(large), await agent.register(filled(cupy, 512 << 20, 3))
        little, target = await agent.register(small), await agent.register(got := filled(cupy, 64 << 10))
        bulk = agent.submit(vram, host, traffic_class="bulk")
        await asyncio.sleep(0.002)
        for _ in range(5):
            await agent.transfer(little, target, traffic_class="latency")
        # The small ones did not have to wait for the end of the large one.
        assert not bulk.done()
        await bulk
        assert_same(cupy.asnumpy(got), small)
    assert (large == 3).all()


# Several devices.


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=needs_two)])
async def test_devices_that_do_not_reach_each_other(cupy: Any, monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    monkeypatch.setattr(backend_module, "reaches", lambda device, other: False)
    page, rng = 3000, np.random.default_rng(9)
    content = pattern(N * page)
    source = upload(cupy, content)
    with cupy.cuda.Device(devices - 1):
        target = filled(cupy, N * page)
    here, there = rng.permutation(N), rng.permutation(N)
    async with mover(chunk_nbytes=1 << 18, n_threads=2) as (agent, _):
        src, dst = await agent.register(source), await agent.register(target)
        assert "through the host" in agent.explain(src, dst).how
        await agent.transfer(src.pages(here, page), dst.pages(there, page))
    expected = np.empty((N, page), np.uint8)
    expected[there] = content.reshape(N, page)[here]
    with cupy.cuda.Device(devices - 1):
        assert_same(cupy.asnumpy(target), expected.ravel())


@needs_two
async def test_between_devices_and_from_each_to_the_host(cupy: Any) -> None:
    page, rng = 16384, np.random.default_rng(9)
    content, got = pattern(N * page), np.zeros(N * page, np.uint8)
    with cupy.cuda.Device(1):
        source = upload(cupy, content)
    target = filled(cupy, N * page)
    async with mover() as (agent, _):
        # The device is the driver's to say.
        src, dst = await agent.register(DeviceBytes(source.data.ptr, source.nbytes)), await agent.register(target)
        assert (src.device, dst.device) == (1, 0)
        order = rng.permutation(N)
        await agent.transfer(src.pages(order, page), dst.pages(order, page))
        assert_same(cupy.asnumpy(target), content)
        await agent.transfer(src, await agent.register(got))
        assert_same(got, content)
        got[:] = 5
        await agent.transfer(await agent.register(got), src)
        await agent.transfer(src, dst)
        assert bool((target == 5).all())
    assert cupy.cuda.runtime.getDevice() == 0


def test_devices_are_known_by_their_uuid() -> None:
    for device in range(device_count()):
        assert device_by_uuid(device_uuid(device)) == device
    assert device_by_uuid(bytes(16)) is None


# What goes wrong on the device.

FAULT = """
import asyncio, cupy, numpy as np
from nixl_async import Agent, BackendError
source = 'extern "C" __global__ void fault(long *p) { long t = clock64(); while (clock64() - t < 600000000) { } *p = 1; }'
fault = cupy.RawKernel(source, 'fault')
async def main():
    async with Agent('a', backends=['cuda'], authenticate=False) as agent:
        a, b = cupy.zeros(1 << 20, cupy.uint8), cupy.zeros(1 << 20, cupy.uint8)
        src, dst = await agent.register(a), await agent.register(b)
        await agent.transfer(src, dst)
        order = np.random.default_rng(1).permutation(256)
        # Its blocks leave no room for others before it faults.
        fault((4096,), (1024,), (np.int64(8),))
        caught = []
        for _ in range(3):
            try:
                async with asyncio.timeout(10):
                    await agent.transfer(src.pages(order, 4096), dst.pages(order, 4096))
            except BackendError as error:
                caught.append(str(error))
        print('caught', caught)
asyncio.run(main())
"""


def test_a_fault_of_the_device_fails_what_is_under_way() -> None:
    ran = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=60, check=False)
    assert "caught ['" in ran.stdout, ran.stdout + ran.stderr
    assert "illegal" in ran.stdout

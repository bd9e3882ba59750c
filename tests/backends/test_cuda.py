"""The cuda backend where there is no device: what it says, and, with a stand-in, what is around its copies. Copies: tests/gpu."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from nixl_async import (
    Agent,
    BackendError,
    ConfigurationError,
    MemoryRegion,
    MissingDependency,
    RegistrationError,
    load_backend,
)
from nixl_async.backends import cuda
from nixl_async.backends.cuda import CUDABackend
from nixl_async.cuda import DeviceBytes, device_count
from nixl_async.cuda_kept import MIN_SEGMENTS
from nixl_async.memory import open_buffer
from nixl_async.testing import assert_same, pattern
from tests.agents import TOKEN
from tests.cuda_host import Host, stand_in

pytestmark = pytest.mark.skipif(device_count() > 0, reason="this machine has a CUDA device")


@pytest.mark.parametrize("name", ["cuda", "gds"])
async def test_it_is_not_loaded(name: str) -> None:
    with pytest.raises(MissingDependency, match="libcuda"):
        load_backend(name)
    with pytest.raises(MissingDependency, match=f"the {name} backend needs a CUDA driver"):
        async with Agent("a", token=TOKEN, backends=[name, "memory"]):
            pass


async def test_explain_says_why_it_is_not_there() -> None:
    async with Agent("a", token=TOKEN) as agent:
        here = await agent.register(np.zeros(100, np.uint8))
        explained = agent.explain(here[:50], here[50:])
        assert explained.route == "memory"
        assert "libcuda" in explained.refusals["cuda"]
        assert "cuda: no: the cuda backend needs a CUDA driver (libcuda.so.1) and a device; there is none here" in str(
            explained
        )


async def test_device_memory_is_refused_with_the_reason() -> None:
    async with Agent("a", token=TOKEN) as agent:
        with pytest.raises(RegistrationError, match=r"VRAM.*cuda: the cuda backend needs a CUDA driver"):
            await agent.register(DeviceBytes(0x7000, 4096))
        assert agent.statistics().regions == 0


@pytest.mark.parametrize(("options", "reason"), [({"n_threads": 0}, "n_threads is 0"), ({"chunk_nbytes": 1}, "at least 4096")])
def test_options_that_make_no_sense_are_refused(options: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        CUDABackend(**options)


# With memory of this process in the device's place.


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    for name in ("need_device", "need_cupy", "check_region"):
        monkeypatch.setattr(cuda, name, lambda what: None)
    monkeypatch.setattr(cuda, "pinned_address", lambda address, nbytes: None)
    monkeypatch.setattr(cuda, "allow_access", lambda device, other: None)
    monkeypatch.setattr(cuda, "reaches", lambda device, other: device == other)
    return stand_in(monkeypatch)


async def device_memory(agent: Agent, array: Any, device: int = 0) -> MemoryRegion:
    region = await agent.register(DeviceBytes(array.ctypes.data, array.nbytes))
    region.device = device
    return region


@pytest.mark.parametrize("page", [100, 5000, 40_000])
async def test_pages_go_through_pinned_buffers_chunk_by_chunk(host: Host, page: int) -> None:
    n, rng = 64, np.random.default_rng(page)
    sent, device, got = pattern(n * page), np.zeros(n * page, np.uint8), np.zeros(n * page, np.uint8)
    async with Agent("a", backends=[CUDABackend(n_threads=3, chunk_nbytes=16384)]) as agent:
        here, vram, back = await agent.register(sent), await device_memory(agent, device), await agent.register(got)
        assert agent.explain(here, vram).how == "through 3 pinned buffers of 16384 bytes"
        order, there = rng.permutation(n), rng.permutation(n)
        await agent.transfer(here.pages(order, page), vram.pages(there, page))
        assert_same(device.reshape(n, page)[there].ravel(), sent.reshape(n, page)[order].ravel())
        await agent.transfer(vram.pages(there, page), back.pages(order, page))
        assert_same(got, sent)
        assert 1 <= len(host.lanes) <= 3
    assert host.lanes == []


async def test_pinned_memory_is_copied_where_the_device_sees_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    # The device sees the memory of `there` at `here`.
    here, there, device = pattern(64 * 1000), np.zeros(64 * 1000, np.uint8), np.zeros(64 * 1000, np.uint8)
    monkeypatch.setattr(cuda, "pinned_address", lambda address, nbytes: here.ctypes.data)
    async with Agent("a", backends=[CUDABackend()]) as agent:
        memory, vram = await agent.register(there), await device_memory(agent, device)
        assert agent.explain(memory, vram).how == "pinned memory, where it is"
        order = np.random.default_rng(1).permutation(64)
        await agent.transfer(memory.pages(order, 1000), vram)
        assert_same(device, here.reshape(64, 1000)[order].ravel())
        device[:] = 3
        await agent.transfer(vram, memory.pages(order, 1000))
        assert (here == 3).all()


@pytest.mark.parametrize("devices", [(0, 0), (0, 1)])
async def test_between_devices(host: Host, devices: tuple[int, int]) -> None:
    a, b = pattern(64 * 1000), np.zeros(64 * 1000, np.uint8)
    order = np.random.default_rng(2).permutation(64)
    async with Agent("a", backends=[CUDABackend(chunk_nbytes=4096)]) as agent:
        src, dst = await device_memory(agent, a, devices[0]), await device_memory(agent, b, devices[1])
        far = devices == (0, 1)
        assert agent.explain(src, dst).how == "one kernel for each op" + ", devices 0 and 1 through the host" * far
        await agent.transfer(src.pages(order, 1000), dst)
        assert_same(b, a.reshape(64, 1000)[order].ravel())
        assert {lane.device for lane in host.lanes} == set(devices)


async def test_a_prepared_transfer_is_described_once(host: Host) -> None:
    n = 2 * MIN_SEGMENTS
    a, b = pattern(n * 100), np.zeros(n * 100, np.uint8)
    order = np.random.default_rng(3).permutation(n)
    async with Agent("a", backends=[CUDABackend()]) as agent:
        src, dst = await device_memory(agent, a), await device_memory(agent, b)
        prepared = await agent.prepare(src.pages(order, 100), dst)
        once = await agent.prepare(src.pages(order, 100), dst, once=True)
        assert len(host.described) == 1
        for number in range(3):
            a[:] = np.roll(a, 1)
            await prepared.transfer()
            assert_same(b, a.reshape(n, 100)[order].ravel())
            assert host.n_sent == number + 1
        b[:] = 0
        await once.transfer()
        assert_same(b, a.reshape(n, 100)[order].ravel())
        assert host.n_sent == 3
        # A launch that fails leaves it as it was.
        host.fail_at = host.n_copies + 1
        with pytest.raises(BackendError, match="on fire"):
            await prepared.transfer()
        await prepared.transfer()
    assert host.freed


@pytest.mark.parametrize("kinds", ["host", "device"])
async def test_a_cancelled_copy_is_quiet_when_it_ends(host: Host, kinds: str) -> None:
    device, target = pattern(1 << 20), np.zeros(1 << 20, np.uint8)
    async with Agent("a", backends=[CUDABackend(n_threads=2, chunk_nbytes=4096)]) as agent:
        src = await device_memory(agent, device)
        dst = await (agent.register(target) if kinds == "host" else device_memory(agent, target))
        host.gate = threading.Event()
        task = asyncio.create_task(agent.transfer(src, dst))
        while not host.n_copies:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task], timeout=0.02)
        assert not task.done()
        host.gate.set()
        await asyncio.wait([task])
        assert task.cancelled()
        # Two chunks were under way, or the one launch.
        assert host.n_copies <= 2
        target[:] = 9
        await asyncio.sleep(0.01)
        assert (target == 9).all()


@pytest.mark.parametrize("kinds", ["host", "device"])
async def test_what_the_device_refuses_is_an_error_of_the_backend(host: Host, kinds: str) -> None:
    device, target = pattern(1 << 16), np.zeros(1 << 16, np.uint8)
    async with Agent("a", backends=[CUDABackend(chunk_nbytes=4096)]) as agent:
        src = await device_memory(agent, device)
        dst = await (agent.register(target) if kinds == "host" else device_memory(agent, target))
        host.fail_at = 1
        with pytest.raises(BackendError, match="on fire"):
            await agent.transfer(src, dst)
        await agent.transfer(src, dst)
        assert_same(target, device)


async def test_it_is_open_between_open_and_close(host: Host) -> None:
    backend = CUDABackend()
    region = MemoryRegion("r", open_buffer(DeviceBytes(0x7000, 4096)), nothing)
    with pytest.raises(BackendError, match="not open"):
        await backend.register(region)
    await backend.aclose()


async def nothing(region: MemoryRegion) -> None:
    pass

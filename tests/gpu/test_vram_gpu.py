"""A device's memory as regions, whoever allocated it; and between a device and a peer: through UCX, and through buffers.

It stands alone, as the other tests here do. What needs RMM, torch, UCXX or a second device is skipped without.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, NoRoute, PeerLost, RegistrationError
from nixl_async.cuda import DeviceBytes, device_count, pinned_address
from nixl_async.descriptors import MemoryKind
from nixl_async.staging import StagingBackend
from nixl_async.testing import assert_same, cancel_after, pattern
from tests.agents import TOKEN
from tests.gpu.vram_peer import vram_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
    # cupy, torch and RMM warn of what they find in other packages.
    pytest.mark.filterwarnings("default"),
]
needs_ucx = pytest.mark.skipif(importlib.util.find_spec("ucxx") is None, reason="no ucxx")
N = 100_000
POISON = 0xEE
PATIENCE_SECONDS = 20


@pytest.fixture
def cupy() -> Iterator[Any]:
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(0):
        yield cupy


def alone() -> Agent:
    return Agent("gpu", token=TOKEN, backends=["cuda", "memory"])


def digest(memory: Any) -> str:
    return hashlib.sha256(memory).hexdigest()


async def check_there_and_back(agent: Agent, region: Any, nbytes: int) -> None:
    """Write to a device's region and read it again."""
    assert (region.kind, region.nbytes) == (MemoryKind.VRAM, nbytes)
    sent, got = pattern(nbytes, 7), np.zeros(nbytes, np.uint8)
    async with await agent.register(sent) as source, await agent.register(got) as target:
        await agent.transfer(source, region)
        await agent.transfer(region, target)
    assert_same(got, sent)


# Whoever allocated it.


async def test_a_pool_s_sub_allocations_and_slices_are_themselves(cupy: Any) -> None:
    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        whole = [cupy.full(N, POISON, cupy.uint8) for _ in range(3)]
    cupy.cuda.Device().synchronize()
    async with alone() as agent:
        async with await agent.register(whole[1]) as region:
            assert region.address == whole[1].data.ptr
            await check_there_and_back(agent, region, N)
        async with await agent.register(whole[0][1001:2002]) as region:
            await check_there_and_back(agent, region, 1001)
    for array, changed in ((whole[0], slice(1001, 2002)), (whole[2], slice(0, 0))):
        got = cupy.asnumpy(array)
        got[changed] = POISON
        assert (got == POISON).all()


async def test_stream_ordered_allocations(cupy: Any) -> None:
    pool = cupy.cuda.MemoryAsyncPool()
    with cupy.cuda.using_allocator(pool.malloc):
        array = cupy.zeros(N, cupy.uint8)
    cupy.cuda.Device().synchronize()
    async with alone() as agent, await agent.register(array) as region:
        await check_there_and_back(agent, region, N)


async def test_torch_tensors_and_their_slices() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    whole = torch.full((4, 64, 128), 1.0, dtype=torch.bfloat16, device="cuda:0")
    torch.cuda.synchronize()
    async with alone() as agent:
        for tensor in (whole, whole[1], whole[2, 3:5], whole.view(-1)[7:1007], whole[3].view(torch.uint8)):
            async with await agent.register(tensor) as region:
                assert (region.address, region.device) == (tensor.data_ptr(), 0)
                await check_there_and_back(agent, region, tensor.numel() * tensor.element_size())
        for tensor in (whole[:, 1], whole[0].T, whole[:0]):
            with pytest.raises(RegistrationError):
                await agent.register(tensor)
        with pytest.raises(RegistrationError, match="requires grad"):
            await agent.register(torch.zeros(10, device="cuda", requires_grad=True))


class OnlyDLPack:
    """Shows a device's array through DLPack alone."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


async def test_dlpack_of_a_device(cupy: Any) -> None:
    array = cupy.zeros((10, 1000), cupy.int16)
    cupy.cuda.Device().synchronize()
    async with alone() as agent:
        async with await agent.register(OnlyDLPack(array)) as region:
            assert (region.address, region.device) == (array.data.ptr, 0)
            await check_there_and_back(agent, region, array.nbytes)
        async with await agent.register(array[3:5].__dlpack__(stream=-1)) as region:
            assert region.address == array[3:5].data.ptr
            await check_there_and_back(agent, region, 4000)
        with pytest.raises(RegistrationError, match="C-contiguous"):
            await agent.register(OnlyDLPack(array[:, ::2]))


async def test_a_torch_capsule_keeps_its_tensor_until_the_region_is_closed() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    async with alone() as agent:
        async with await agent.register(torch.utils.dlpack.to_dlpack(tensor)) as region:
            del tensor
            gc.collect()
            assert torch.cuda.memory_allocated() >= before + (1 << 20)
            await check_there_and_back(agent, region, 1 << 20)
        del region
        gc.collect()
        assert torch.cuda.memory_allocated() == before


async def test_rmm_buffers_and_pools() -> None:
    rmm = pytest.importorskip("rmm")
    pool = rmm.mr.PoolMemoryResource(rmm.mr.CudaMemoryResource(), initial_pool_size=16 << 20)
    async with alone() as agent:
        for resource in (None, pool):
            buffers = [rmm.DeviceBuffer(size=N, **({} if resource is None else {"mr": resource})) for _ in range(2)]
            async with await agent.register(buffers[1]) as region:
                assert (region.address, region.device) == (buffers[1].ptr, 0)
                await check_there_and_back(agent, region, N)


async def test_what_is_no_device_s_memory_is_refused(cupy: Any) -> None:
    runtime = cupy.cuda.runtime
    held = runtime.malloc(4 << 20)
    pinned = cupy.cuda.alloc_pinned_memory(4096)
    freed = runtime.malloc(64 << 20)
    runtime.free(freed)
    async with alone() as agent:
        for what, wrong in {
            "the host's": DeviceBytes(np.zeros(4096, np.uint8).ctypes.data, 4096),
            "pinned": DeviceBytes(pinned.ptr, 4096),
            "longer than its allocation": DeviceBytes(held, 64 << 30),
            "given back": DeviceBytes(freed, 4096),
            "nowhere": DeviceBytes(1 << 20, 4096),
        }.items():
            with pytest.raises(
                RegistrationError, match=f"no device memory of {wrong.__cuda_array_interface__['shape'][0]} bytes"
            ):
                await agent.register(wrong)
                pytest.fail(f"memory that is {what} was taken")
        for array, why in (
            (cupy.zeros((8, 8))[:, ::2], "C-contiguous"),
            (cupy.zeros((8, 8)).T[:3], "C-contiguous"),
            (cupy.zeros(0), "no bytes"),
        ):
            with pytest.raises(RegistrationError, match=why):
                await agent.register(array)
        async with await agent.register(pinned) as region:
            assert region.kind is MemoryKind.DRAM
    runtime.free(held)


@pytest.mark.skipif(device_count() < 2, reason="one device")
async def test_each_device_s_memory_has_its_number(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        array = cupy.zeros(N, cupy.uint8)
        cupy.cuda.Device().synchronize()
    nameless = DeviceBytes(array.data.ptr, N)
    async with alone() as agent:
        for shown in (array, nameless):
            async with await agent.register(shown) as region:
                assert region.device == 1
                await check_there_and_back(agent, region, N)


# Between a device and a peer, through UCX.

UCX = ["ucx", "cuda", "memory"]


@needs_ucx
@pytest.mark.parametrize(("near", "far"), [("vram", "vram"), ("vram", "dram"), ("dram", "vram")])
async def test_pages_between_a_device_and_a_peer_through_ucx(cupy: Any, near: str, far: str) -> None:
    nbytes = 24 << 18
    sent = pattern(nbytes, 3)
    source: Any = cupy.asarray(sent) if near == "vram" else sent
    target: Any = cupy.empty_like(source) if near == "vram" else np.empty_like(sent)
    async with vram_process("far", nbytes=nbytes, backends=UCX) as peer, Agent("near", token=TOKEN, backends=UCX) as agent:
        remote = (await agent.connect(peer.address)).region(far)
        here, back = await agent.register(source), await agent.register(target)
        for page in (4096, 1 << 18):
            n = nbytes // page
            mine, theirs = np.random.default_rng(1).permutation(n), np.random.default_rng(2).permutation(n)
            target[:] = POISON
            cupy.cuda.Device().synchronize()
            assert "ucx" in agent.explain(here.pages(mine, page), remote.pages(theirs, page)).routes
            async with asyncio.timeout(PATIENCE_SECONDS):
                result = await agent.transfer(here.pages(mine, page), remote.pages(theirs, page), backend="ucx")
            assert (result.route, result.nbytes) == ("ucx", nbytes)
            placed = np.empty_like(sent).reshape(n, -1)
            placed[theirs] = sent.reshape(n, -1)[mine]
            assert (await peer.order("digest", of=far))["digest"] == digest(placed.ravel())
            async with asyncio.timeout(PATIENCE_SECONDS):
                await agent.transfer(remote.pages(theirs, page), back.pages(mine, page), backend="ucx")
            assert_same(cupy.asnumpy(target) if near == "vram" else target, sent)


@needs_ucx
async def test_a_peer_that_dies_under_a_device_s_copy(cupy: Any) -> None:
    nbytes = 256 << 20
    memory = cupy.zeros(nbytes, cupy.uint8)
    cupy.cuda.Device().synchronize()
    async with vram_process("far", nbytes=nbytes, backends=UCX) as peer, Agent("near", token=TOKEN, backends=UCX) as agent:
        remote = (await agent.connect(peer.address)).region("dram")
        region = await agent.register(memory)
        transfers = [agent.submit(region, remote, backend="ucx") for _ in range(8)]
        await asyncio.sleep(0.01)
        peer.kill()
        async with asyncio.timeout(PATIENCE_SECONDS):
            for transfer in transfers:
                with pytest.raises(PeerLost):
                    await transfer


@needs_ucx
@pytest.mark.parametrize("far", ["vram", "dram"])
async def test_cancelled_copies_through_ucx_are_quiet(cupy: Any, far: str) -> None:
    nbytes = 64 << 20
    memory = cupy.zeros(nbytes, cupy.uint8)
    cupy.cuda.Device().synchronize()
    async with vram_process("far", nbytes=nbytes, backends=UCX) as peer, Agent("near", token=TOKEN, backends=UCX) as agent:
        remote = (await agent.connect(peer.address)).region(far)
        region = await agent.register(memory)
        pages = np.arange(nbytes >> 16)[::-1]
        cancelled = 0
        for step in range(6):
            copy = agent.transfer(remote.pages(pages, 65536), region.pages(pages, 65536), backend="ucx")
            cancelled += await cancel_after(copy, step * 0.002)
            memory[:] = POISON
            cupy.cuda.Device().synchronize()
            await asyncio.sleep(0.02)
            assert bool((memory == POISON).all()), "the device's memory was written after a transfer was cancelled"
        assert cancelled
        await agent.transfer(remote, region, backend="ucx")
        assert_same(cupy.asnumpy(memory), pattern(nbytes, 1 if far == "vram" else 2))


@needs_ucx
async def test_an_idle_ucx_with_a_device_sleeps(cupy: Any) -> None:
    memory = cupy.zeros(1 << 20, cupy.uint8)
    cupy.cuda.Device().synchronize()
    async with vram_process("far", nbytes=1 << 20, backends=UCX) as peer, Agent("near", token=TOKEN, backends=UCX) as agent:
        remote = (await agent.connect(peer.address)).region("vram")
        await agent.transfer(await agent.register(memory), remote, backend="ucx")
        before = time.process_time()
        await asyncio.sleep(1)
        # A thread that cannot arm would have used all of it.
        assert time.process_time() - before < 0.5


# Between a device and a peer's host memory, through buffers.


@pytest.mark.parametrize("route", ["samehost", "tcp"])
async def test_a_device_and_a_peer_s_host_memory_through_buffers(cupy: Any, route: str) -> None:
    n, page = 600, 65536
    nbytes = n * page
    mine, theirs = np.random.default_rng(1).permutation(n), np.random.default_rng(2).permutation(n)
    sent = pattern(nbytes, 4)
    source, target = cupy.asarray(sent), cupy.full(nbytes, POISON, cupy.uint8)
    cupy.cuda.Device().synchronize()
    staging = StagingBackend()
    backends = ["cuda", "memory", route]
    async with (
        vram_process("far", nbytes=nbytes, backends=backends) as peer,
        Agent("near", token=TOKEN, backends=[*backends, staging]) as agent,
    ):
        here, back, host = await agent.register(source), await agent.register(target), await agent.register(sent, name="host")
        known = await agent.connect(peer.address)
        remote, out_of_reach = known.region("dram"), known.region("vram")
        explained = agent.explain(here.pages(mine, page), remote.pages(theirs, page))
        assert (explained.route, explained.how) == ("staging", f"cuda, then {route}")
        await agent.transfer(here.pages(mine, page), remote.pages(theirs, page))
        await agent.transfer(remote.pages(theirs, page), back.pages(mine, page))
        assert_same(cupy.asnumpy(target), sent)
        assert staging._arena is not None
        block = staging._arena.region
        assert pinned_address(block.address, block.nbytes) is not None
        # What buffers do not reach is said, with what to do, and the other side can do it.
        with pytest.raises(NoRoute, match="let the peer fetch the bytes"):
            await agent.transfer(host, out_of_reach)
        told = await peer.order("transfer", ours="vram", peer="near", theirs="host", put=False)
        assert told == {"nbytes": nbytes, "route": "staging"}
        assert (await peer.order("digest", of="vram"))["digest"] == digest(sent)
        with pytest.raises(NoRoute, match="transfer to DRAM that it registers"):
            await agent.transfer(here, out_of_reach)
    assert pinned_address(block.address, block.nbytes) is None


async def test_cancelled_copies_through_buffers_are_quiet(cupy: Any) -> None:
    nbytes = 256 << 20
    memory = cupy.zeros(nbytes, cupy.uint8)
    cupy.cuda.Device().synchronize()
    backends = ["cuda", "memory", "samehost"]
    async with (
        vram_process("far", nbytes=nbytes, backends=backends) as peer,
        Agent("near", token=TOKEN, backends=[*backends, "staging"]) as agent,
    ):
        remote = (await agent.connect(peer.address)).region("dram")
        region = await agent.register(memory)
        cancelled = 0
        for step in range(6):
            cancelled += await cancel_after(agent.transfer(remote, region), step * 0.004)
            memory[:] = POISON
            cupy.cuda.Device().synchronize()
            await asyncio.sleep(0.02)
            assert bool((memory == POISON).all()), "the device's memory was written after a transfer was cancelled"
        assert cancelled
        await agent.transfer(remote, region)
    assert_same(cupy.asnumpy(memory), pattern(nbytes, 2))

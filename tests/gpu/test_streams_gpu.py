"""Transfers and CUDA streams: `after=` and `wait_on`, with cupy's and torch's streams and events. It stands alone."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from nixl_async import Agent, TransferState
from nixl_async.cuda import device_count

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
    pytest.mark.filterwarnings("default"),
]
N = 1 << 22
SPIN = r"""
extern "C" __global__ void spin_then_fill(unsigned char *out, long n, unsigned char value, long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) { }
    for (long i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = value;
}
"""
SLOW = 200_000_000
"""Cycles: about a tenth of a second."""


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


@pytest_asyncio.fixture
async def agent() -> AsyncIterator[Agent]:
    async with Agent("gpu-streams") as made:
        yield made


def fill(cupy: Any, array: Any, value: int, cycles: int = SLOW) -> None:
    kernel = cupy.RawKernel(SPIN, "spin_then_fill")
    kernel((32,), (256,), (array, np.int64(array.nbytes), np.uint8(value), np.int64(cycles)))


async def test_bytes_are_read_after_the_stream(agent: Agent, cupy: Any) -> None:
    vram, dram = cupy.zeros(N, cupy.uint8), np.zeros(N, np.uint8)
    src, dst = await agent.register(vram), await agent.register(dram)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        fill(cupy, vram, 0, cycles=1)
        stream.synchronize()
        fill(cupy, vram, 7)
    transfer = agent.submit(src, dst, after=stream)
    beats = 0
    while not transfer.done():
        await asyncio.sleep(0.001)
        beats += transfer.state is TransferState.QUEUED
    await transfer
    # The loop went on while the kernel ran.
    assert beats > 5
    assert (dram == 7).all()


async def test_bytes_are_read_after_the_event_and_not_after_later_work(agent: Agent, cupy: Any) -> None:
    vram, dram = cupy.zeros(N, cupy.uint8), np.zeros(N, np.uint8)
    src, dst = await agent.register(vram), await agent.register(dram)
    stream = cupy.cuda.Stream(non_blocking=True)
    other = cupy.zeros(N, cupy.uint8)
    with stream:
        fill(cupy, vram, 9)
        event = stream.record()
        fill(cupy, other, 1, cycles=10 * SLOW)
    await agent.transfer(src, dst, after=event)
    assert (dram == 9).all()
    assert not stream.done
    stream.synchronize()


async def test_what_is_done_already_is_not_waited_for(agent: Agent, cupy: Any) -> None:
    vram, dram = cupy.full(N, 4, cupy.uint8), np.zeros(N, np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    event = stream.record()
    cupy.cuda.Device().synchronize()
    await agent.transfer(await agent.register(vram), await agent.register(dram), after=[stream, event])
    assert (dram == 4).all()


async def test_a_stream_waits_for_bytes_without_blocking_the_host(agent: Agent, cupy: Any) -> None:
    vram, dram = cupy.zeros(N, cupy.uint8), np.full(N, 6, np.uint8)
    copied = cupy.zeros(N, cupy.uint8)
    src, dst = await agent.register(dram), await agent.register(vram)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    gate = asyncio.get_running_loop().create_future()
    transfer = agent.submit(src, dst, after=gate)
    transfer.wait_on(stream)
    cupy.cuda.runtime.memcpyAsync(copied.data.ptr, vram.data.ptr, N, cupy.cuda.runtime.memcpyDeviceToDevice, stream.ptr)
    await asyncio.sleep(0.05)
    assert not stream.done
    gate.set_result(None)
    await transfer
    await asyncio.to_thread(stream.synchronize)
    assert (cupy.asnumpy(copied) == 6).all()


async def test_a_stream_goes_on_after_a_cancelled_transfer(agent: Agent, cupy: Any) -> None:
    src = await agent.register(np.zeros(N, np.uint8))
    dst = await agent.register(cupy.zeros(N, cupy.uint8))
    stream = cupy.cuda.Stream(non_blocking=True)
    transfer = agent.submit(src, dst, after=asyncio.get_running_loop().create_future())
    transfer.wait_on(stream)
    transfer.cancel()
    await asyncio.to_thread(stream.synchronize)
    with pytest.raises(asyncio.CancelledError):
        await transfer


async def test_thousands_of_waits_leave_nothing(agent: Agent, cupy: Any) -> None:
    src = await agent.register(np.zeros(4096, np.uint8))
    dst = await agent.register(cupy.zeros(4096, cupy.uint8))
    stream = cupy.cuda.Stream(non_blocking=True)
    for _ in range(100):
        # A stream takes a limited number of entries; the driver blocks whoever puts more on one that stands still.
        transfers = []
        for _ in range(16):
            with stream:
                cupy.zeros(16, cupy.uint8)
            transfers.append(agent.submit(src, dst, after=stream))
            transfers[-1].wait_on(stream)
        for transfer in transfers:
            await transfer
    await asyncio.to_thread(stream.synchronize)


async def test_an_agent_may_leave_before_the_stream_comes_there(cupy: Any) -> None:
    vram, dram = cupy.zeros(N, cupy.uint8), np.zeros(N, np.uint8)
    stream = cupy.cuda.Stream(non_blocking=True)
    async with Agent("leaving") as agent:
        src, dst = await agent.register(vram), await agent.register(dram)
        with stream:
            fill(cupy, vram, 7)
            event = stream.record()
        waits = [agent.submit(src, dst, after=stream), agent.submit(src, dst, after=event)]
    assert all(transfer.cancelled() for transfer in waits)
    assert not dram.any()
    stream.synchronize()


async def test_torch_streams_and_events(agent: Agent, cupy: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    vram, dram = torch.zeros(N, dtype=torch.uint8, device="cuda"), np.zeros(N, np.uint8)
    src, dst = await agent.register(vram), await agent.register(dram)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLOW)
        vram.fill_(3)
        event = torch.cuda.Event()
        event.record(stream)
    await agent.transfer(src, dst, after=event)
    assert (dram == 3).all()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLOW)
        vram.fill_(5)
    await agent.transfer(src, dst, after=stream)
    assert (dram == 5).all()
    # The default stream, too.
    torch.cuda._sleep(SLOW)
    vram.fill_(8)
    await agent.transfer(src, dst, after=torch.cuda.current_stream())
    assert (dram == 8).all()

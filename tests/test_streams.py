"""Transfers and compute streams: `after=`, `wait_on`, points that fail. On a CPU stand-in here; tests/gpu runs it on a device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from nixl_async import Agent, ClosedError, CPUEvent, CPUStream, TransferError, TransferState
from nixl_async.streams import Streams

N = 1 << 16


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with Agent("streams", backends=["memory"]) as made:
        yield made


@pytest.fixture
def src() -> np.ndarray:
    return np.zeros(N, np.uint8)


@pytest.fixture
def dst() -> np.ndarray:
    return np.zeros(N, np.uint8)


async def test_bytes_are_read_only_after_the_stream_has_come_there(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    near, far = await agent.register(src), await agent.register(dst)
    gate = threading.Event()
    with CPUStream() as stream:
        stream.launch(gate.wait)
        stream.launch(src.fill, 7)
        transfer = agent.submit(near, far, after=stream)
        stream.launch(gate.wait)
        await asyncio.sleep(0)
        assert transfer.state is TransferState.QUEUED
        assert not dst.any()
        gate.set()
        await transfer
    assert (dst == 7).all()


async def test_work_put_on_the_stream_later_is_not_waited_for(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    near, far = await agent.register(src), await agent.register(dst)
    gate = threading.Event()
    with CPUStream() as stream:
        stream.launch(src.fill, 3)
        event = stream.record()
        stream.launch(gate.wait)
        await agent.transfer(near, far, after=event)
        assert (dst == 3).all()
        gate.set()


async def test_a_point_that_is_reached_already_costs_no_wait(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    event = CPUEvent()
    event.set()
    assert Streams(asyncio.get_running_loop()).reached(event) is None
    await agent.transfer(await agent.register(src), await agent.register(dst), after=[event, event])


async def test_several_points_are_all_waited_for(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    near, far = await agent.register(src), await agent.register(dst)
    first, second = CPUEvent(), asyncio.get_running_loop().create_future()
    transfer = agent.submit(near, far, after=[first, second])
    first.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert transfer.state is TransferState.QUEUED
    second.set_result("ignored")
    assert (await transfer).nbytes == N


async def test_a_coroutine_is_run(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    async def fill() -> None:
        await asyncio.sleep(0)
        src.fill(9)

    await agent.transfer(await agent.register(src), await agent.register(dst), after=fill())
    assert (dst == 9).all()


async def test_a_transfer_follows_another(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    between = await agent.register(np.zeros(N, np.uint8))
    src.fill(5)
    first = agent.submit(await agent.register(src), between)
    await agent.transfer(between, await agent.register(dst), after=first)
    assert first.done()
    assert (dst == 5).all()


async def test_cancelling_one_that_waits_leaves_what_it_waits_for_alone(
    agent: Agent, src: np.ndarray, dst: np.ndarray
) -> None:
    near, far = await agent.register(src), await agent.register(dst)
    future = asyncio.get_running_loop().create_future()
    gate = asyncio.Event()
    first = agent.submit(near, far, after=gate.wait())
    second = agent.submit(near, far, after=[first, future])
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not future.done()
    assert first.state is TransferState.QUEUED
    future.set_result(None)
    gate.set()
    await first


async def test_cancelling_ends_the_coroutine_that_it_waits_for(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    ended = asyncio.get_running_loop().create_future()

    async def never() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            ended.set_result(None)
            raise

    transfer = agent.submit(await agent.register(src), await agent.register(dst), after=never())
    await asyncio.sleep(0)
    transfer.cancel()
    await ended
    with pytest.raises(asyncio.CancelledError):
        await transfer
    assert not dst.any()


async def test_what_fails_before_fails_the_transfer(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    async def fail() -> None:
        raise ValueError("no compute")

    src.fill(1)
    with pytest.raises(TransferError, match="waited for failed: ValueError: no compute") as caught:
        await agent.transfer(await agent.register(src), await agent.register(dst), after=fail())
    assert isinstance(caught.value.__cause__, ValueError)
    assert not dst.any()
    assert agent.statistics().failed == 1


async def test_a_cancelled_point_fails_the_transfer(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    future = asyncio.get_running_loop().create_future()
    transfer = agent.submit(await agent.register(src), await agent.register(dst), after=future)
    future.cancel()
    with pytest.raises(TransferError, match="it was cancelled"):
        await transfer


async def test_leaving_the_agent_cancels_what_waits(src: np.ndarray, dst: np.ndarray) -> None:
    async with Agent("leaving", backends=["memory"]) as agent:
        near, far = await agent.register(src), await agent.register(dst)
        event = CPUEvent()
        transfer = agent.submit(near, far, after=event)
        assert agent.statistics().live_transfers == 1
    assert transfer.cancelled()
    event.set()
    assert not dst.any()


async def test_what_no_transfer_can_wait_for_is_named(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    near, far = await agent.register(src), await agent.register(dst)
    with pytest.raises(TypeError, match="'soon' is nothing that a transfer can wait for; give a CUDA stream"):
        agent.submit(near, far, after="soon")
    assert agent.statistics().live_transfers == 0
    await near.aclose()


async def test_a_stream_waits_for_a_transfer(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    near, far = await agent.register(src), await agent.register(dst)
    gate = asyncio.get_running_loop().create_future()
    seen: list[int] = []
    with CPUStream() as stream:
        src.fill(8)
        transfer = agent.submit(near, far, after=gate)
        transfer.wait_on(stream)
        stream.launch(lambda: seen.append(int(dst[0])))
        point = stream.record()
        assert not point.done
        gate.set_result(None)
        await transfer
        await asyncio.to_thread(stream.synchronize)
    assert seen == [8]


async def test_a_stream_goes_on_when_its_transfer_is_cancelled(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    transfer = agent.submit(await agent.register(src), await agent.register(dst), after=CPUEvent())
    with CPUStream() as stream:
        transfer.wait_on(stream)
        transfer.cancel()
        await asyncio.to_thread(stream.synchronize)
    with pytest.raises(asyncio.CancelledError):
        await transfer


async def test_a_stream_does_not_wait_for_what_is_over(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    transfer = agent.submit(await agent.register(src), await agent.register(dst))
    await transfer
    with CPUStream() as stream:
        transfer.wait_on(stream)
        stream.synchronize()


async def test_only_a_stream_waits(agent: Agent, src: np.ndarray, dst: np.ndarray) -> None:
    transfer = agent.submit(await agent.register(src), await agent.register(dst))
    with pytest.raises(TypeError, match="is not a stream; give a CUDA stream"):
        transfer.wait_on(object())
    await transfer


def test_a_stream_tells_what_its_work_raised() -> None:
    ran: list[int] = []
    with CPUStream("failing") as stream:
        stream.launch(lambda: 1 // 0)
        stream.launch(ran.append, 1)
        with pytest.raises(ZeroDivisionError):
            stream.synchronize()
        stream.launch(ran.append, 2)
        stream.synchronize()
    assert ran == [2]
    with pytest.raises(ClosedError, match="'failing' is closed"):
        stream.launch(print)


async def test_the_loop_may_end_before_the_event() -> None:
    event = CPUEvent()

    async def forget() -> None:
        Streams(asyncio.get_running_loop()).reached(event)

    await asyncio.to_thread(asyncio.run, forget())
    event.set()

"""What a caller holds: a transfer that can be awaited, watched and cancelled, and one that is sent again and again."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nixl_async import Agent, BackendError, ClosedError, ConfigurationError, TransferState, load_backend
from nixl_async.testing import FaultyBackend, assert_same, pattern
from tests.agents import TOKEN

NBYTES = 1 << 20


async def test_a_transfer_is_awaited_any_number_of_times_by_anyone() -> None:
    async with Agent("a", backends=["memory"]) as a:
        src, dst = await a.register(pattern(NBYTES, 1)), await a.register(np.zeros(NBYTES, np.uint8))
        transfer = a.submit(src, dst)
        results = await asyncio.gather(*(_await(transfer) for _ in range(3)))
        assert results == [transfer.result()] * 3
        assert (transfer.done(), transfer.cancelled(), transfer.exception()) == (True, False, None)
        assert transfer.nbytes == transfer.nbytes_done == results[0].nbytes == NBYTES
        assert results[0].route == "memory"
        assert 0 <= results[0].queued_seconds <= results[0].seconds
        assert not transfer.cancel()
        assert "DONE" in repr(transfer)


async def test_before_the_end_there_is_no_result() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(8, 1)), await a.register(np.zeros(8, np.uint8))
        with faulty.hang() as gate:
            transfer = a.submit(src, dst)
            await gate.reached()
            assert transfer.state is TransferState.ACTIVE
            for question in (transfer.result, transfer.exception):
                with pytest.raises(asyncio.InvalidStateError, match="ACTIVE"):
                    question()
            gate.release()
        await transfer
        assert [event for _, _, event, _ in transfer.history] == ["admit", "complete"]


async def test_a_failure_is_the_same_for_everyone_and_has_the_history() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(8, 1)), await a.register(np.zeros(8, np.uint8))
        with faulty.fail_next(BackendError("on purpose"), times=9):
            transfer = a.submit(src, dst)
            with pytest.raises(BackendError, match="on purpose") as caught:
                await transfer
        assert transfer.exception() is caught.value
        assert caught.value.transfer_id == transfer.id
        assert [event for _, _, event, _ in caught.value.history] == ["admit", "abort", "drain"]
        with pytest.raises(BackendError):
            transfer.result()


async def test_cancelling_the_transfer_cancels_who_awaits_it() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(8, 1)), await a.register(np.zeros(8, np.uint8))
        with faulty.hang() as gate:
            transfer = a.submit(src, dst)
            task = asyncio.create_task(_await(transfer))
            await gate.reached()
            assert transfer.cancel()
            assert not transfer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert transfer.cancelled()
        for question in (transfer.result, transfer.exception):
            with pytest.raises(asyncio.CancelledError):
                question()


async def test_a_shield_keeps_the_transfer_going() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        got = np.zeros(8, np.uint8)
        src, dst = await a.register(pattern(8, 1)), await a.register(got)
        with faulty.hang() as gate:
            transfer = a.submit(src, dst)
            await gate.reached()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(transfer), 0.01)
            gate.release()
        await transfer
        assert_same(got, pattern(8, 1))


async def test_parts_come_when_they_are_there_and_once() -> None:
    async with Agent("a", backends=["memory"]) as a:
        src, dst = await a.register(pattern(NBYTES, 1)), await a.register(np.zeros(NBYTES, np.uint8))
        sides = [src[0:100], src[100:100], src[100:NBYTES]], dst
        transfer = a.submit(*sides)
        assert sorted([(part.index, part.nbytes) async for part in transfer.parts()]) == [(0, 100), (1, 0), (2, NBYTES - 100)]
        # Also after the end, and of a transfer of one part.
        assert len([part async for part in transfer.parts()]) == 3
        single = a.submit(src, dst)
        assert [(part.index, part.nbytes) async for part in single.parts()] == [(0, NBYTES)]
        empty = a.submit(src[0:0], dst[0:0])
        assert [(part.index, part.nbytes) async for part in empty.parts()] == [(0, 0)]


async def test_parts_of_a_transfer_that_fails_end_with_its_error() -> None:
    faulty = FaultyBackend(load_backend("memory"))
    async with Agent("a", backends=[faulty]) as a:
        src, dst = await a.register(pattern(8, 1)), await a.register(np.zeros(8, np.uint8))
        for places in (src, [src[0:4], src[4:8]]):
            with faulty.fail_next(BackendError("on purpose"), times=9):
                transfer = a.submit(places, dst)
                with pytest.raises(BackendError, match="on purpose"):
                    async for _ in transfer.parts():
                        pass


async def test_progress_in_bytes() -> None:
    async with Agent("a", backends=["memory"]) as a:
        nbytes = 64 << 20
        src, dst = await a.register(np.ones(nbytes, np.uint8)), await a.register(np.zeros(nbytes, np.uint8))
        transfer = a.submit(src, dst)
        seen = [transfer.nbytes_done async for _ in transfer.parts()]
        assert seen[-1] == nbytes
        assert (await transfer).attempts == 8


async def test_a_prepared_transfer_is_sent_many_times_at_once() -> None:
    async with Agent("a", backends=["memory"]) as a:
        mine, got = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
        src, dst = await a.register(mine), await a.register(got)
        ready = await a.prepare(src, dst)
        assert ready.nbytes == NBYTES
        await asyncio.gather(*(ready.transfer() for _ in range(4)), *(_await(ready.submit()) for _ in range(4)))
        assert_same(got, mine)
        async with Agent("b", token=TOKEN) as b:
            with pytest.raises(ConfigurationError, match="another agent"):
                await b.transfer(ready)
        await src.aclose()
        with pytest.raises(ClosedError):
            await ready.transfer()
        with pytest.raises(ClosedError):
            ready.submit()


async def _await(transfer: object) -> object:
    return await transfer  # type: ignore[misc]

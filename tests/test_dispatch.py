"""What the dispatcher does beyond the scheduler: copies at once, batches of an iteration, foreign errors, the loop's turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from nixl_async import (
    Agent,
    BackendError,
    Limits,
    MemoryRegion,
    Op,
    PartsFailed,
    Peer,
    PeerLost,
    RemoteRegion,
    Transfer,
    TransferError,
    TransferState,
)
from nixl_async.backends.memory import MemoryBackend
from nixl_async.testing import FaultyBackend, assert_same, pattern
from tests.agents import TOKEN, connect

NBYTES = 1 << 20


@dataclass
class Setup:
    """Two connected agents; the backend of the one that transfers is `wrapped`."""

    wrapped: FaultyBackend
    a: Agent
    peer: Peer
    here: MemoryRegion
    there: RemoteRegion
    source: np.ndarray
    target: np.ndarray


@asynccontextmanager
async def opened(limits: Limits | None = None) -> AsyncIterator[Setup]:
    wrapped = FaultyBackend(MemoryBackend())
    wrapped.limits = limits or wrapped.limits
    source, target = pattern(NBYTES, 1), np.zeros(NBYTES, np.uint8)
    async with Agent("a", token=TOKEN, backends=[wrapped]) as a, Agent("b", token=TOKEN, backends=["memory"]) as b:
        await b.register(target, name="kv")
        peer = await connect(a, b)
        yield Setup(wrapped, a, peer, await a.register(source), peer.region("kv"), source, target)


async def test_small_is_copied_at_once_and_behind_what_waits_it_is_not() -> None:
    async with opened(Limits(max_ops=1, inline_nbytes=4096)) as on:
        await on.a.transfer(on.here[0:4096], on.there[0:4096])
        assert (on.wrapped.inline, on.wrapped.copies, on.a.statistics().inline) == (1, 0, 1)
        with on.wrapped.hang() as gate:
            running = on.a.submit(on.here, on.there)
            await gate.reached()
            waiting = on.a.submit(on.here, on.there)
        # The gate is open and the fault gone, but one op runs and one waits: what was asked for first is first.
        small = asyncio.ensure_future(on.a.transfer(on.here[0:4096], on.there[0:4096]))
        await asyncio.gather(running, waiting, small)
        assert on.wrapped.inline == 1
        assert_same(on.target, on.source)


async def test_a_task_that_only_copies_at_once_lets_the_loop_run() -> None:
    async with opened() as on:
        turns, stop = 0, False

        async def other() -> None:
            nonlocal turns
            while not stop:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        for _ in range(500):
            await on.a.transfer(on.here[0:4096], on.there[0:4096])
        stop = True
        await task
        assert on.wrapped.inline > 0
        # Each counts for at least 10 us of an iteration's 400.
        assert turns >= 10


async def test_what_one_iteration_submits_goes_in_few_ops() -> None:
    async with opened() as on:
        pieces = [slice(i * 8192, i * 8192 + 8192) for i in range(128)]
        transfers = [on.a.submit(on.here[piece], on.there[piece]) for piece in pieces]
        assert all(transfer.state is TransferState.QUEUED for transfer in transfers)
        await asyncio.gather(*transfers)
        assert on.wrapped.copies <= 8
        assert_same(on.target, on.source)


async def test_a_foreign_exception_comes_out_as_a_backend_error_with_its_cause() -> None:
    async with opened() as on:
        with on.wrapped.fail_next(ZeroDivisionError("a slip")), pytest.raises(BackendError, match="a slip") as caught:
            await on.a.transfer(on.here, on.there)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert caught.value.peer == "b"
        assert caught.value.history[-1][3] == "FAILED"
        assert on.a.statistics().failed == 1


async def test_parting_ends_every_live_transfer_and_waits_until_all_are_quiet() -> None:
    async with opened() as on:
        with on.wrapped.hang() as gate:
            transfers = [on.a.submit(on.here, on.there) for _ in range(3)]
            await gate.reached()
            await on.a.disconnect(on.peer)
            assert [type(transfer.exception()) for transfer in transfers] == [PeerLost] * 3
            assert on.wrapped.in_flight == 0
        assert on.a.statistics().live_transfers == 0


async def test_a_closing_agent_cancels_what_is_in_flight() -> None:
    async with opened() as on:
        with on.wrapped.hang() as gate:
            transfer = on.a.submit(on.here, on.there)
            await gate.reached()
            await on.a.aclose()
        assert transfer.cancelled()
        assert on.wrapped.in_flight == 0


# Backends that tell of parts.


class Telling(MemoryBackend):
    """Copies, and tells of the parts of an op as it was told to: `(first byte, bytes, error)`, and then how it ends."""

    reports = True
    limits = Limits(batch=False)

    def __init__(self, tells: list[tuple[int, int, BackendError | None]], end: Exception | None = None) -> None:
        super().__init__()
        self.tells, self.end = tells, end
        self.attempts = 0

    async def copy(self, op: Op) -> None:
        self.attempts += 1
        await super().copy(op)
        for start, nbytes, error in self.tells:
            op.report(start, nbytes, error)
        if self.end is not None:
            raise self.end


async def _told(
    backend: Telling, n_parts: int = 4
) -> tuple[list[tuple[int, BackendError | None]], BaseException | None, Transfer]:
    async with Agent("a", backends=[backend]) as a:
        src, dst = await a.register(pattern(n_parts * 100)), await a.register(np.zeros(n_parts * 100, np.uint8))
        transfer = a.submit([src[i * 100 : (i + 1) * 100] for i in range(n_parts)], dst)
        parts: list[tuple[int, BackendError | None]] = []
        failed = None
        try:
            async for part in transfer.parts():
                parts.append((part.index, part.error))  # type: ignore[arg-type]  # noqa: PERF401
            await transfer
        except TransferError as error:
            failed = error
        return parts, failed, transfer


async def test_parts_are_settled_as_the_backend_tells() -> None:
    parts, failed, transfer = await _told(Telling([(300, 100, None), (50, 50, None), (0, 50, None), (100, 200, None)]))
    assert (parts, failed, transfer.nbytes_done) == ([(3, None), (0, None), (1, None), (2, None)], None, 400)


async def test_a_backend_that_tells_of_nothing_has_told_of_all_when_it_ends() -> None:
    parts, failed, _ = await _told(Telling([]))
    assert (parts, failed) == ([(0, None), (1, None), (2, None), (3, None)], None)


async def test_parts_that_failed_are_listed_by_the_error() -> None:
    bad = BackendError("bad")
    backend = Telling([(0, 100, None), (100, 200, bad), (300, 100, None)], PartsFailed("some failed"))
    parts, failed, transfer = await _told(backend)
    assert sorted(parts, key=lambda part: part[0]) == [(0, None), (1, bad), (2, bad), (3, None)]
    assert isinstance(failed, PartsFailed)
    assert (failed.parts, transfer.nbytes_done, backend.attempts) == ({1: bad, 2: bad}, 200, 1)


@pytest.mark.parametrize("retryable", [False, True])
async def test_what_told_of_parts_is_not_sent_again(retryable: bool) -> None:
    backend = Telling([(0, 100, None)], BackendError("in the middle", retryable=retryable))
    parts, failed, transfer = await _told(backend)
    assert (parts, backend.attempts, transfer.nbytes_done) == ([(0, None)], 1, 100)
    assert "in the middle" in str(failed)
    silent = Telling([], BackendError("at the start", retryable=retryable))
    await _told(silent)
    assert silent.attempts == (4 if retryable else 1)


async def test_what_is_copied_at_once_counts_in_its_class() -> None:
    async with Agent("a", token="t", backends=["memory"]) as agent:
        region = await agent.register(np.zeros(8192, np.uint8))
        now = asyncio.get_running_loop().time()
        await agent.transfer(region[:4096], region[4096:], traffic_class="latency", deadline=now - 1)
        await agent.transfer(region[:4096], region[4096:], traffic_class="latency", deadline=now + 60)
        found = agent.statistics()
        assert (found.done, found.inline) == (2, 2)
        assert found.classes["latency"] == (0, 2, 1, 8192)

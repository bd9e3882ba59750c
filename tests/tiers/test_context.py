"""Slots of registered memory, waited for in turn; work on threads that ends before a cancelled call does."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from nixl_async import ClosedError, DescriptorError
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import CRC64NVME, NONE
from nixl_async.tiers.context import Context, Slots, together
from tests.tiers.conftest import BLOCK, Bench, N


async def test_slots_are_waited_for_in_turn(bench: Bench) -> None:
    context = Context(bench.agent, BLOCK)
    slots = await Slots.make(context, 4, BLOCK)
    taken = await slots.take(3)
    large = asyncio.create_task(slots.take(4))
    small = asyncio.create_task(slots.take(1))
    await asyncio.sleep(0)
    slots.give(taken[:2])
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done(), "the one that came later does not overtake"
    large.cancel()
    got = await small
    slots.give(got + taken[2:])
    assert sorted(await slots.take(4)) == [0, 1, 2, 3]
    await slots.aclose()
    context.close()


async def test_work_on_a_thread_ends_before_a_cancelled_call_does(bench: Bench) -> None:
    context = Context(bench.agent, BLOCK)
    go, ended = threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        ended.set()

    task = asyncio.create_task(context.on_thread(work))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    context.close()


async def test_the_wrong_blocks_are_found(bench: Bench) -> None:
    context = Context(bench.agent, BLOCK)
    blocks = Blocks.of(bench.src(), N, BLOCK)
    sums = await context.checksums(CRC64NVME, bench.keys, blocks)
    kinds = np.full(N, CRC64NVME, np.uint8)
    bench.data[7 * BLOCK] ^= 1
    bench.data[8 * BLOCK] ^= 1
    bench.data[9 * BLOCK] ^= 1
    kinds[9] = NONE
    errors: list[object] = [None] * N
    errors[8] = "not looked at"
    good = await context.verified(bench.keys, blocks, sums, kinds, errors)
    assert np.flatnonzero(~good).tolist() == [7]
    kinds[5] = 77
    assert np.flatnonzero(~await context.verified(bench.keys, blocks, sums, kinds, errors)).tolist() == [5, 7]
    context.close()


async def test_blocks_are_copied_however_they_are_cut(bench: Bench) -> None:
    context = Context(bench.agent, BLOCK)
    before = bench.agent.statistics().nbytes.get("memory", 0)
    whole, pieces = Blocks.of(bench.src(), N, BLOCK), Blocks.of(bench.source.pages(np.arange(4 * N), BLOCK // 4), N, BLOCK)
    to_whole = Blocks.of(bench.dst(), N, BLOCK)
    to_pieces = Blocks.of(bench.target.pages(np.arange(4 * N), BLOCK // 4), N, BLOCK)
    to_eighths = Blocks.of(bench.target.pages(np.arange(8 * N), BLOCK // 8), N, BLOCK)
    for source, target in ((whole, to_whole), (whole, to_pieces), (pieces, to_whole), (pieces, to_pieces)):
        bench.blank[:] = 0
        await context.copy(source, target, put=True)
        assert bench.right()
    assert bench.agent.statistics().nbytes.get("memory", 0) == before
    bench.blank[:] = 0
    await context.copy(pieces, to_eighths, put=True)
    assert bench.right()
    assert bench.agent.statistics().nbytes["memory"] == before + N * BLOCK, "what is cut in different ways is the agent's"
    context.close()


async def test_a_copy_is_refused_as_the_agent_would(bench: Bench) -> None:
    context = Context(bench.agent, BLOCK)
    fixed = await bench.agent.register(bytes(N * BLOCK))
    with pytest.raises(DescriptorError, match="read-only"):
        await context.copy(Blocks.of(bench.src(), N, BLOCK), Blocks.of(fixed[:], N, BLOCK), put=False)
    source = Blocks.of(fixed[:], N, BLOCK)
    await fixed.aclose()
    with pytest.raises(ClosedError, match="deregistered"):
        await context.copy(source, Blocks.of(bench.dst(), N, BLOCK), put=False)
    context.close()


async def test_the_first_error_of_two_comes_bare() -> None:
    async def fail() -> None:
        raise ValueError("this one")

    ended = False

    async def other() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    with pytest.raises(ValueError, match="this one"):
        await together(fail(), other())
    assert ended

"""The block of memory that is lent: in order, no byte twice, and all of it comes back."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async import BackendError, MemoryRegion
from nixl_async.arena import Arena
from nixl_async.memory import open_buffer


async def _closed(region: MemoryRegion) -> None:
    pass


def arena(nbytes: int) -> Arena:
    return Arena(MemoryRegion("arena", open_buffer(np.zeros(nbytes, np.uint8)), _closed))


async def test_it_lends_in_order_and_gets_all_back() -> None:
    one = arena(64 << 10)
    taken: list[int] = []
    release = asyncio.Event()

    async def take(number: int, nbytes: int) -> None:
        async with one.lend(nbytes):
            taken.append(number)
            await release.wait()

    tasks = [asyncio.create_task(take(number, nbytes)) for number, nbytes in enumerate([40_000, 40_000, 4096, 1])]
    for _ in range(5):
        await asyncio.sleep(0)
    # The small ones do not overtake the large one.
    assert taken == [0]
    tasks[1].cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert taken == [0, 2, 3]
    release.set()
    await asyncio.wait(tasks)
    assert one.lent_nbytes == 0
    async with one.lend(64 << 10) as address:
        assert address == one.region.address
    with pytest.raises(BackendError, match="do not fit"):
        async with one.lend((64 << 10) + 1):
            pass


async def test_it_does_not_lose_what_is_given_as_it_is_cancelled() -> None:
    one = arena(8192)
    async with one.lend(8192):
        waiting = asyncio.create_task(one.lend(8192).__aenter__())
        await asyncio.sleep(0)
    # It has been given the memory, but has not run since.
    waiting.cancel()
    await asyncio.wait([waiting])
    assert one.lent_nbytes == 0


@given(sizes=st.lists(st.tuples(st.integers(1, 40_000), st.integers(0, 3)), max_size=40))
def test_it_lends_no_byte_twice(sizes: list[tuple[int, int]]) -> None:
    asyncio.run(_lends_apart(sizes))


async def _lends_apart(sizes: list[tuple[int, int]]) -> None:
    one = arena(64 << 10)
    lent: dict[int, int] = {}

    async def use(nbytes: int, turns: int) -> None:
        async with one.lend(nbytes) as address:
            assert all(address + nbytes <= at or at + n <= address for at, n in lent.items())
            assert one.region.address <= address <= one.region.address + one.region.nbytes - nbytes
            lent[address] = nbytes
            for _ in range(turns):
                await asyncio.sleep(0)
            del lent[address]

    await asyncio.gather(*(use(*size) for size in sizes))
    assert one.lent_nbytes == 0

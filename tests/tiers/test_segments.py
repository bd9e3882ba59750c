"""Segment files: slots by their places, also over several files, and errors slot by slot."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context
from nixl_async.tiers.groups import NOTHING
from nixl_async.tiers.index import Index
from nixl_async.tiers.segments import Segments
from tests.tiers.conftest import BLOCK, Bench

SLOTS = 4


@pytest.fixture
async def segments(bench: Bench, tmp_path: Path) -> AsyncIterator[Segments]:
    context, index = Context(bench.agent, BLOCK), Index(str(tmp_path), BLOCK, 10 * BLOCK, SLOTS * BLOCK)
    index.open()
    made = Segments(context, index, direct=False)
    yield made
    await made.aclose()
    context.close()
    index.close(NOTHING[:, 0])


async def test_slots_lie_where_their_numbers_say(bench: Bench, segments: Segments, tmp_path: Path) -> None:
    slots = np.array([1, 3, 4, 9])
    assert await segments.move(slots, Blocks.of(bench.src(range(4)), 4, BLOCK), put=True) == [None] * 4
    async with segments.files(slots) as (fds, offsets):
        for row, (fd, offset) in enumerate(zip(fds.tolist(), offsets.tolist(), strict=True)):
            assert os.pread(fd, BLOCK, offset) == bench.data[row * BLOCK : (row + 1) * BLOCK].tobytes()
    assert offsets.tolist() == [BLOCK, 3 * BLOCK, 0, BLOCK]
    assert os.stat(tmp_path / "segment-000000").st_size == SLOTS * BLOCK
    assert await segments.move(slots, Blocks.of(bench.dst(range(4)), 4, BLOCK), put=False) == [None] * 4
    assert bench.right(range(4))
    await segments.sync(slots)
    await segments.synced()


async def test_of_slots_that_fail_the_others_are_moved(bench: Bench, segments: Segments, tmp_path: Path) -> None:
    slots = np.arange(2 * SLOTS)
    await segments.move(slots, Blocks.of(bench.src(slots), 8, BLOCK), put=True)
    os.truncate(tmp_path / "segment-000001", 2 * BLOCK)
    errors = await segments.move(slots, Blocks.of(bench.dst(slots), 8, BLOCK), put=False)
    assert [error is None for error in errors] == [True] * 6 + [False] * 2
    assert bench.right(range(6))

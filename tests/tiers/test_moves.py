"""Moves with checksums: in one go through the page cache or by the agent, the outcome is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.checksums import CRC64NVME, checksum_blocks
from nixl_async.tiers.context import Context
from nixl_async.tiers.groups import NOTHING
from nixl_async.tiers.index import Index
from nixl_async.tiers.moves import CheckedMoves
from nixl_async.tiers.segments import Segments
from tests.tiers.conftest import BLOCK, Bench, N


@pytest.mark.parametrize("written", [True, False], ids=["written in one go", "written by the agent"])
@pytest.mark.parametrize("read", [True, False], ids=["read in one go", "read by the agent"])
async def test_both_ways_write_and_read_the_same(bench: Bench, tmp_path: Path, written: bool, read: bool) -> None:
    context, index = Context(bench.agent, BLOCK), Index(str(tmp_path), BLOCK, N * BLOCK, 16 * BLOCK)
    index.open()
    segments = Segments(context, index, direct=False)
    slots, kinds = np.arange(N), np.full(N, CRC64NVME, np.uint8)
    source, target = Blocks.of(bench.src(), N, BLOCK), Blocks.of(bench.dst(), N, BLOCK)
    nbytes = bench.agent.statistics().nbytes.get("posix", 0)
    try:
        errors, sums = await CheckedMoves(context, segments, cached=written).write(bench.keys, slots, source)
        assert errors == [None] * N
        assert np.array_equal(sums, checksum_blocks(bench.keys, source))
        sums[5] ^= np.uint64(1)
        looked: list[Any] = []
        moves = CheckedMoves(context, segments, cached=read)
        errors, good, seen = await moves.read(bench.keys, slots, target, sums, kinds, lambda: looked.append(1) or 7)
        assert errors == [None] * N
        assert np.flatnonzero(~good).tolist() == [5]
        assert seen == 7
        assert bench.right()
        moved = bench.agent.statistics().nbytes.get("posix", 0) - nbytes
        # Of what went in one go, the agent moves what is not cached.
        assert moved >= N * BLOCK * ((not written) + (not read))
    finally:
        await segments.aclose()
        context.close()
        index.close(NOTHING[:, 0])

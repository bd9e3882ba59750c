"""A caller's memory cut into blocks."""

from __future__ import annotations

import numpy as np
import pytest

from nixl_async import BlockLayout, DescriptorError
from nixl_async.http import view
from nixl_async.tiers.blocks import Blocks
from tests.tiers.conftest import BLOCK, Bench, N


def _bytes(blocks: Blocks) -> list[bytes]:
    whole = view(blocks.region.address, blocks.region.nbytes)
    rows = zip(blocks.offsets.tolist(), blocks.lengths.tolist(), strict=True)
    return [b"".join(bytes(whole[at : at + n]) for at, n in zip(*row, strict=True)) for row in rows]


def test_pages_are_blocks(bench: Bench) -> None:
    blocks = Blocks.of(bench.src([5, 3, 9]), 3, BLOCK)
    assert _bytes(blocks) == [bytes(bench.data[i * BLOCK : (i + 1) * BLOCK]) for i in (5, 3, 9)]
    assert _bytes(blocks.take([2, 0])) == [bytes(bench.data[i * BLOCK : (i + 1) * BLOCK]) for i in (9, 5)]
    assert blocks.descriptor().offsets.tolist() == [5 * BLOCK, 3 * BLOCK, 9 * BLOCK]


def test_a_region_and_long_ranges_are_cut(bench: Bench) -> None:
    assert len(Blocks.of(bench.source, N, BLOCK)) == N
    given = bench.source.ranges([8 * BLOCK, 0], [2 * BLOCK, BLOCK])
    assert Blocks.of(given, 3, BLOCK).offsets.ravel().tolist() == [8 * BLOCK, 9 * BLOCK, 0]


def test_a_block_may_be_several_pages(bench: Bench) -> None:
    layout = BlockLayout(("block", "layer"), (8, 4), BLOCK // 4)
    wide = Blocks.of(bench.source.ranges([0, 9000, 100, 20000], [1000, 3096, 96, 4000]), 2, BLOCK)
    assert _bytes(wide)[0] == bytes(bench.data[:1000]) + bytes(bench.data[9000:12096])
    rows = np.arange(8)[:, None] * BLOCK + np.arange(4)[None, ::-1] * (BLOCK // 4)
    blocks = Blocks.of(bench.source.ranges(rows.ravel(), layout.page_nbytes), 8, BLOCK)
    assert [len(row) for row in blocks.each()] == [4] * 8
    assert _bytes(blocks)[0][:1024] == bytes(bench.data[3 * 1024 : 4 * 1024])
    assert blocks.take([1]).descriptor().nbytes == BLOCK


def test_what_does_not_fall_into_blocks_is_refused(bench: Bench) -> None:
    with pytest.raises(DescriptorError, match="3 keys of 4096 bytes each need 12288 bytes"):
        Blocks.of(bench.src([1, 2]), 3, BLOCK)
    with pytest.raises(DescriptorError, match="does not fall into 2 blocks"):
        Blocks.of(bench.source.ranges([0, 9000, 100], [1000, 3096, 4096]), 2, BLOCK)
    with pytest.raises(DescriptorError, match="does not fall into 2 blocks"):
        Blocks.of(bench.source.ranges([0, 9000], [4000, 4192]), 2, BLOCK)
    with pytest.raises(TypeError, match="list"):
        Blocks.of([bench.src()], N, BLOCK)  # type: ignore[arg-type]

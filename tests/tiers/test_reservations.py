"""Slots reserved for the next write while one moves its bytes, and only where the tier has room to spare."""

from __future__ import annotations

from pathlib import Path

import pytest

from nixl_async.tiers import Files
from nixl_async.tiers.blocks import Blocks
from nixl_async.tiers.context import Context
from nixl_async.tiers.files import FileTier
from tests.tiers.conftest import BLOCK, Bench, N


@pytest.mark.parametrize(("n_slots", "n_ahead"), [(9 * N, N), (9 * N - 1, 0)])
async def test_slots_are_reserved_ahead_of_need(bench: Bench, tmp_path: Path, n_slots: int, n_ahead: int) -> None:
    context = Context(bench.agent, BLOCK)
    tier = FileTier(context, Files(tmp_path, n_slots * BLOCK, segment_nbytes=16 * BLOCK))
    await tier.open()
    try:
        assert await tier.write(bench.keys, Blocks.of(bench.src(), N, BLOCK), durable=False) == [None] * N
        await tier._reservations.settled()
        ahead = tier._reservations.slots.tolist()
        assert len(ahead) == n_ahead
        assert not set(ahead) & set(tier._table.slot_of.values())
        assert tier.counters.evictions == 0
        taken = await tier._reservations.take(N)
        assert taken[:, 0].tolist()[:n_ahead] == ahead
        tier._reservations.give(taken)
        assert tier._reservations.slots.tolist()[:n_ahead] == ahead or not n_ahead
    finally:
        await tier.aclose()
        context.close()

"""kill -9 at any moment: what was acknowledged as durable is there afterwards, whole; what was not is whole or not there.

NIXL_ASYNC_KILLS sets how many kills each test makes (25 by default; the promise is about 500).
"""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import numpy as np
import pytest

from nixl_async import Agent
from nixl_async.tiers import Tiers
from tests.tiers.crash import BLOCK, LIFE, MOST, content_of, key_of, stores, victim

KILLS = int(os.environ.get("NIXL_ASYNC_KILLS", "25"))
N_VICTIMS = 2
LONGEST_SECONDS = 0.3
AT_ONCE = 64
pytestmark = pytest.mark.timeout(60 + 3 * KILLS)


async def _check(agent: Agent, tiers: Tiers, numbers: list[int]) -> list[int]:
    """Get blocks; return those that are missed. Those that are there must be right."""
    missed = []
    memory = np.zeros((AT_ONCE, BLOCK), np.uint8)
    async with await agent.register(memory) as region:
        for at in range(0, len(numbers), AT_ONCE):
            part = numbers[at : at + AT_ONCE]
            found = await tiers.get([key_of(n) for n in part], region.pages(range(len(part)), BLOCK))
            for row, (number, one) in enumerate(zip(part, found, strict=True)):
                assert one.error is None, (number, one)
                if one:
                    assert np.array_equal(memory[row], content_of(number)), f"block {number} is torn"
                else:
                    missed.append(number)
            await asyncio.sleep(0)
    return missed


async def _kill_many(tmp_path: Path, n_blocks: int, *, memory: bool, keeps: bool) -> None:
    chance = random.Random(7)
    lives = iter(range(1, KILLS + 1))
    everything: list[int] = []
    async with Agent("survivor", backends=["memory", "posix"]) as agent:

        async def lives_of_one(tiers: Tiers) -> None:
            longest = LONGEST_SECONDS
            async with victim() as one:
                for life in lives:
                    setup = {"path": str(tmp_path), "n_blocks": n_blocks, "memory": memory, "durable": keeps, "life": life}
                    acknowledged = await one.live_and_die(setup, chance.uniform(0.0, longest))
                    everything.extend(acknowledged)
                    # On a busy machine a life must be longer to get anywhere.
                    longest = max(LONGEST_SECONDS, longest * (0.9 if acknowledged else 1.25))
                    last = max(acknowledged, default=life * LIFE - 1)
                    missed = await _check(agent, tiers, list(range(life * LIFE, last + 1 + 2 * MOST)))
                    if keeps:
                        lost = set(acknowledged) & set(missed)
                        assert not lost, f"life {life} lost blocks that it had acknowledged: {sorted(lost)}"

        async with Tiers(agent, stores(tmp_path, n_blocks, False), block_nbytes=BLOCK) as tiers:
            async with asyncio.TaskGroup() as group:
                for _ in range(N_VICTIMS):
                    group.create_task(lives_of_one(tiers))
            assert tiers.statistics()["files"].corrupt == 0
        assert len(everything) > KILLS
        # Opened by nobody else, the index is verified and cleared up.
        async with Tiers(agent, stores(tmp_path, n_blocks, False), block_nbytes=BLOCK) as tiers:
            missed = await _check(agent, tiers, everything)
            # Where there is no room for all, some must have gone, and not all.
            assert not missed if keeps else 0 < len(missed) < len(everything)
            assert tiers.statistics()["files"].corrupt == 0


@pytest.mark.parametrize("memory", [False, True], ids=["files", "dram and files"])
async def test_what_was_acknowledged_survives_kills(tmp_path: Path, memory: bool) -> None:
    # More than fast machines fill: each life leaves slots of its share behind, and what makes room gives up a whole share.
    await _kill_many(tmp_path, 1200 * KILLS, memory=memory, keeps=True)


async def test_nothing_torn_is_served_while_slots_are_taken_from_readers(tmp_path: Path) -> None:
    await _kill_many(tmp_path, 256, memory=False, keeps=False)

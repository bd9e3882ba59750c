"""Decode's steps: everybody who runs gets a token in each, and who is cancelled is no part of the next."""

from __future__ import annotations

import asyncio
import time

import pytest

from nixl_async.benchmarks.serve.computing import Compute
from nixl_async.benchmarks.serve.decode import Batch

# A step of one request takes 20 ms, of two 30 ms: memory for weights, then for each token of context.
COMPUTE = Compute(layers=1, hidden=1, parameters=1.0, weight_nbytes=10.0, token_nbytes=1, flops=1e9, bandwidth=1000.0)


async def test_a_request_alone_gets_a_token_a_step() -> None:
    began = time.monotonic()
    times = await Batch(COMPUTE).generate(10, 3)
    # Contexts of 10, 11, 12 tokens behind 10 bytes of weights: 20, 21, 22 ms.
    for before, after, least in zip((began, *times), times, (0.020, 0.021, 0.022), strict=False):
        assert after - before >= least


async def test_requests_share_their_steps() -> None:
    batch = Batch(COMPUTE)
    first, second = await asyncio.gather(batch.generate(10, 2), batch.generate(10, 4))
    assert first == second[:2]
    assert len(second) == 4


async def test_who_is_cancelled_leaves_the_others() -> None:
    batch = Batch(COMPUTE)
    gone, stays = asyncio.create_task(batch.generate(10, 1000)), asyncio.create_task(batch.generate(10, 2))
    await asyncio.sleep(0)
    gone.cancel()
    assert len(await stays) == 2
    with pytest.raises(asyncio.CancelledError):
        await gone
    # Nothing runs on, and more can come.
    assert len(await batch.generate(10, 1)) == 1


async def test_no_tokens_need_no_step() -> None:
    assert await Batch(COMPUTE).generate(10, 0) == []

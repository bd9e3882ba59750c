"""Buckets, and who starts and stops what fills them."""

from __future__ import annotations

import asyncio

from nixl_async.metrics.families import BUCKETS_US
from nixl_async.metrics.timings import Histogram, Timings
from tests.agents import two_agents


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram()
    for microseconds in (0.0, 10.0, 10.1, 1e7, 1e7 + 1):
        histogram.add(microseconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-2:] == [1, 1]
    assert len(histogram.counts) == len(BUCKETS_US) + 1
    assert histogram.total == 2e7 + 21.1


async def test_the_last_who_stops_ends_it() -> None:
    async with two_agents(backends=["tcp"]) as (a, _, _):
        timings = Timings(a)
        timings.start()
        timings.start()
        timings.stop()
        assert a._observers.finished is not None
        while not sum(timings.stalls.counts):
            await asyncio.sleep(0.01)
        timings.stop()
        assert a._observers.finished is None
        assert timings.served == {"tcp": (0, 0)}

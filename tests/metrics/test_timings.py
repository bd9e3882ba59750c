"""Buckets, and who starts and stops what fills them."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from nixl_async import TrafficClass
from nixl_async.metrics.families import BUCKETS_US
from nixl_async.metrics.timings import Histogram, Timings
from tests.agents import known, two_agents

KEY = "tcp", TrafficClass.NORMAL


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


async def test_a_post_ends_with_the_turn_and_counts_only_what_is_done() -> None:
    async with two_agents(backends=["tcp"]) as (a, b, peer):
        mine = await a.register(np.ones(1 << 20, np.uint8))
        await b.register(np.zeros(1 << 20, np.uint8), name="theirs")
        await known(a, peer, "theirs")
        timings, ready = Timings(a), asyncio.get_running_loop().create_future()
        timings.start()
        given_up, held = (a.submit(mine, peer.region("theirs"), after=ready) for _ in range(2))
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        await asyncio.sleep(0.02)
        ready.set_result(None)
        result = await held
        assert (sum(timings.posts()[KEY].counts), sum(timings.transfers()[KEY].counts)) == (1, 1)
        # It waited for `ready` first, and then moved a mebibyte.
        assert 20_000 <= timings.posts()[KEY].total < timings.transfers()[KEY].total
        assert timings.transfers()[KEY].total <= result.seconds * 1e6 * 1.01
        await a.transfer(mine[:64], peer.region("theirs")[:64])
        timings.stop()
        # What was copied at once had no turn: its post is all of it.
        posts, transfers = timings.posts()[KEY], timings.transfers()[KEY]
        assert sum(posts.counts) == sum(transfers.counts) == 2
        assert posts.total < transfers.total


def test_histograms_add_up() -> None:
    one, other = Histogram(), Histogram()
    one.add(5.0)
    other.add(5.0)
    other.add(1e9)
    both = one + other
    assert (both.counts[0], both.counts[-1], both.total) == (2, 1, 1e9 + 10)
    assert (sum(one.counts), sum(other.counts)) == (1, 2)

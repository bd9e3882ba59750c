"""Figures of requests, by hand."""

from __future__ import annotations

import pytest

from nixl_async.benchmarks.serve.metrics import exposed, itls, quantiles, ttfts
from tests.benchmarks.serve.made import failed, record, turn

GOOD = record(0, 10.0, [10.1, 10.2, 10.4], prompt=100, tiers=["dram", "dram"])
LATE = record(1, 10.5, [11.1, 11.2], prompt=60, tiers=["nvme"])
SLOW = record(2, 11.0, [11.2, 11.8], prompt=40)
LONE = record(3, 11.0, [11.1])


def test_a_requests_life() -> None:
    assert GOOD.ttft == pytest.approx(0.1)
    assert GOOD.itls == pytest.approx([0.1, 0.2])
    assert GOOD.exposed == pytest.approx(0.02)
    assert (GOOD.done, GOOD.ended) == (True, True)
    assert (failed(4, 0.0).done, failed(4, 0.0).ended) == (False, True)
    LONE.said, said = {}, LONE.said
    assert (LONE.done, LONE.ended) == (False, False)
    LONE.said = said


def test_objectives_are_of_the_first_token_and_the_mean_of_the_others() -> None:
    assert GOOD.meets(0.11, 0.151)
    assert not GOOD.meets(0.11, 0.149)
    assert not GOOD.meets(0.09, 0.151)
    assert LONE.meets(0.11, 0.0001)
    assert not failed(4, 0.0).meets(100, 100)


def test_goodput_is_of_requests_that_meet_both() -> None:
    found = turn(GOOD, LATE, SLOW, failed(4, 11.0))
    # From 10.0 to 11.8; of four, GOOD alone has its first token in 0.3 s and the others in 0.2.
    assert found.seconds == pytest.approx(1.8)
    assert found.goodput(0.3, 0.2) == pytest.approx(1 / 1.8)
    assert found.attainment(0.3, 0.2) == 0.25
    assert found.goodput(1, 1) == pytest.approx(3 / 1.8)
    assert found.attainment(1, 1) == 0.75
    assert found.goodput(0.01, 1) == 0


def test_nobody_waits_for_batch_requests() -> None:
    batch = record(5, 10.0, [12.0, 13.0], batch=True)
    found = turn(GOOD, batch)
    assert found.attainment(0.3, 0.2) == 1.0
    assert found.goodput(0.3, 0.2) == pytest.approx(1 / 3)
    assert ttfts([found]) == [GOOD.ttft]
    assert itls([found]) == GOOD.itls
    assert exposed([found]) == pytest.approx([0.02, 0.02])


def test_hits_are_shares_of_the_prompts_tokens() -> None:
    found = turn(GOOD, LATE, SLOW, failed(4, 11.0))
    # Blocks of 32 tokens, 200 in all prompts that were served.
    assert found.hit_rates() == {"dram": 64 / 200, "nvme": 32 / 200}
    assert found.kv_nbytes == 200_000


def test_quantiles_lie_between_neighbours() -> None:
    assert quantiles([4.0, 1.0, 2.0, 3.0], (0.0, 0.5, 1.0)) == [1.0, 2.5, 4.0]
    assert quantiles(range(101)) == [50.0, 99.0]
    assert quantiles([]) == [None, None]


def test_a_round_in_which_nothing_was_served() -> None:
    found = turn(failed(0, 1.0))
    assert (found.seconds, found.goodput(1, 1), found.attainment(1, 1), found.hit_rates(), found.kv_nbytes) == (0, 0, 0, {}, 0)

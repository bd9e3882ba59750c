"""Ratios of speeds from rounds in which two took turns."""

from __future__ import annotations

import itertools

import pytest

from bench.record.ratios import DOUBT, geometric_mean, paired


def test_a_ratio_is_of_the_same_round() -> None:
    # The machine is half as fast in the second round, for both: the ratio does not see it.
    ratio = paired((4.0, 2.0, 4.4), (2.0, 1.0, 2.0))
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2.0, 2.0, 2.2, 3)
    assert (ratio.slower, ratio.doubtful) == (False, False)
    assert ratio.width == pytest.approx(0.05)


def test_slower_begins_below_95_percent() -> None:
    found = [paired((mine,) * 3, (100.0,) * 3) for mine in (94.9, 95.0, 200.0)]
    assert [one.slower for one in found if one] == [True, False, False]
    doubtful = paired((90.0, 94.0, 96.0), (100.0,) * 3)
    assert doubtful is not None
    assert (doubtful.slower, doubtful.doubtful) == (True, True)


def test_without_rounds_there_is_none_and_rounds_of_one_alone_do_not_count() -> None:
    assert paired((1.0,), ()) is None
    assert paired((1.0,), (0.0,)) is None
    ratio = paired((1.0, 2.0, 9.0), (1.0, 1.0))
    assert ratio is not None
    assert (ratio.rounds, ratio.median) == (2, 1.5)


@pytest.mark.parametrize("count", [6, 7, 9, 12])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    """Of all ways in which rounds can lie above or below the true ratio, it misses it in at most `DOUBT`."""
    missed = 0
    for signs in itertools.product((-1, 1), repeat=count):
        values = [10.0 + sign * (1 + place / 100) for place, sign in enumerate(signs)]
        ratio = paired(values, (1.0,) * count)
        assert ratio is not None
        missed += not ratio.low <= 10.0 <= ratio.high
    assert 0 < missed / 2**count <= DOUBT


def test_more_rounds_leave_out_the_extremes() -> None:
    ratio = paired((0.1, 1.0, 1.01, 1.02, 1.03, 1.04, 50.0), (1.0,) * 7)
    assert ratio is not None
    assert (ratio.low, ratio.high) == (1.0, 1.04)


def test_the_geometric_mean() -> None:
    ratios = [paired((one,), (1.0,)) for one in (0.5, 8.0)]
    assert geometric_mean(one for one in ratios if one) == pytest.approx(2.0)

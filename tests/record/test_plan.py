"""A plan fits the time that is given, and says what it will take."""

from __future__ import annotations

import pytest

from bench.commands import COMMANDS
from bench.record.plan import CHEAP_ROUNDS, CHEAP_SECONDS, COSTS, LEAST_ROUNDS, MINUTES, MOST_ROUNDS, PARTS, SWEEPS, plan
from bench.session import Settings

MEMORY = 24 << 30


def test_every_suite_has_a_cost() -> None:
    assert set(COSTS) == set(COMMANDS)


def test_everything_fits_the_usual_time() -> None:
    found = plan(PARTS, Settings(), MINUTES, None, MEMORY)
    assert [one.name for one in found] == [*SWEEPS, *COMMANDS]
    assert sum(one.seconds for one in found) <= MINUTES * 60
    assert sum(one.seconds for one in found if one.name in SWEEPS) <= 12 * 60
    suites = {
        one.name: one.suite.rounds for one in found if one.suite is not None and "rounds" not in COSTS[one.name].settings
    }
    cheap = {name for name in suites if 0 < COSTS[name].further <= CHEAP_SECONDS}
    assert {"layers", "latency"} <= cheap
    assert all(suites[name] >= CHEAP_ROUNDS for name in cheap)
    (rounds,) = {suites[name] for name in suites if name not in cheap}
    assert LEAST_ROUNDS + 1 < rounds <= MOST_ROUNDS


def test_more_time_makes_more_rounds_and_too_little_the_least() -> None:
    def rounds(minutes: float) -> int:
        return next(one.suite.rounds for one in plan(PARTS, Settings(), minutes, None, MEMORY) if one.suite is not None)

    assert rounds(500) == MOST_ROUNDS
    assert rounds(1) == LEAST_ROUNDS
    assert rounds(1) <= rounds(25) <= rounds(60)


def test_only_what_is_wanted_is_planned_in_the_order_of_measuring() -> None:
    found = plan(("latency", "sweep-tcp", "throughput"), Settings(), 10, 2, MEMORY)
    assert [one.name for one in found] == ["sweep-tcp", "throughput", "latency"]
    assert [one.settings["rounds"] for one in found[1:]] == [2, 2]
    # A sweep alone has all of the time.
    (alone,) = plan(("sweep-tcp",), Settings(), 10, None, MEMORY)
    assert alone.seconds == 600


def test_what_is_said_of_the_size_is_what_is_measured() -> None:
    for one in plan(tuple(COMMANDS), Settings(), MINUTES, 3, MEMORY):
        assert one.suite is not None
        assert one.settings["rounds"] == one.suite.rounds == COSTS[one.name].settings.get("rounds", 3)
        assert one.settings["mib"] == one.suite.nbytes >> 20
        for name in COSTS[one.name].settings:
            assert one.settings[name] == getattr(one.suite, name)


@pytest.mark.parametrize(("gib", "most"), [(24, 1 << 30), (7, 1 << 30), (4, 1 << 28), (1, 1 << 26)])
def test_requests_are_no_larger_than_the_memory_allows(gib: int, most: int) -> None:
    (one,) = plan(("sweep-tcp",), Settings(), MINUTES, None, gib << 30)
    assert one.shape is not None
    assert one.shape.most_nbytes == one.settings["most_nbytes"] == most


def test_quick_is_small() -> None:
    found = plan(PARTS, Settings(quick=True), MINUTES, None, MEMORY)
    assert all(one.suite.nbytes <= 2 << 20 for one in found if one.suite is not None)
    assert all(one.shape.most_nbytes <= 1 << 20 for one in found if one.shape is not None)

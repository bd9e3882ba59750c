"""The cost model: it learns the true numbers from noisy copies, never goes below zero, and chooses the cheaper way."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixl_async.costs import BURST, EXPLORE_EVERY, EXPLORE_NEW_EVERY, NEW_SAMPLES, Cost, LearntCost, Way, Ways

ASSUMED = Cost(5e-6, 300e-9, 2e-10)
numbers = st.tuples(
    st.floats(1e-6, 1e-4),
    st.floats(1e-9, 2e-6),
    st.floats(5e-11, 2e-9),
)
copies = st.tuples(st.integers(-1, 1 << 16), st.integers(-1, 1 << 30), st.floats(allow_nan=True, allow_infinity=True))


def _sizes(chance: random.Random) -> tuple[int, int]:
    segments = chance.choice([1, 10, 100, 1000, 5000, 16384])
    return segments, min(max(segments * chance.choice([256, 1024, 4096, 65536]), 1 << 19), 16 << 20)


@given(numbers, st.integers(0, 1 << 30))
def test_it_learns_the_true_cost_from_noisy_copies(true: tuple[float, float, float], seed: int) -> None:
    chance, truth, learnt = random.Random(seed), Cost(*true), LearntCost(ASSUMED)
    for _ in range(500):
        segments, nbytes = _sizes(chance)
        learnt.learn(segments, nbytes, truth.seconds(segments, nbytes) * chance.uniform(0.9, 1.1))
    assert learnt.samples == 500
    for _ in range(50):
        segments, nbytes = _sizes(chance)
        assert learnt.seconds(segments, nbytes) == pytest.approx(truth.seconds(segments, nbytes), rel=0.15)


@given(st.lists(copies, max_size=60))
def test_no_number_is_ever_negative_whatever_it_is_told(told: list[tuple[int, int, float]]) -> None:
    learnt = LearntCost(ASSUMED)
    for segments, nbytes, seconds in told:
        learnt.learn(segments, nbytes, seconds)
        cost = learnt.cost
        assert min(cost.per_op, cost.per_segment, cost.per_byte) >= 0
        assert 0 <= learnt.seconds(100, 1 << 20) < float("inf")
        assert learnt.seconds(100, 1 << 20) == pytest.approx(cost.seconds(100, 1 << 20))


@given(st.sampled_from([0.0, -1.0, float("nan"), float("inf")]))
def test_what_cannot_be_is_not_learnt(seconds: float) -> None:
    learnt = LearntCost(ASSUMED)
    learnt.learn(1, 4096, seconds)
    learnt.learn(0, 4096, 1.0)
    learnt.learn(1, 0, 1.0)
    assert (learnt.samples, learnt.cost) == (0, ASSUMED)


def test_one_outlier_changes_little_and_a_lasting_change_is_followed() -> None:
    learnt = LearntCost(ASSUMED)
    for _ in range(100):
        learnt.learn(4096, 16 << 20, 5e-3)
    learnt.learn(4096, 16 << 20, 5.0)
    assert learnt.seconds(4096, 16 << 20) == pytest.approx(5e-3, rel=0.15)
    for _ in range(300):
        learnt.learn(4096, 16 << 20, 50e-3)
    assert learnt.seconds(4096, 16 << 20) == pytest.approx(50e-3, rel=0.05)


def test_what_the_copies_do_not_tell_stays_as_it_was() -> None:
    learnt = LearntCost(ASSUMED)
    for _ in range(200):
        learnt.learn(1000, 4096 * 1000, ASSUMED.seconds(1000, 4096 * 1000))
    assert learnt.cost.per_op == pytest.approx(ASSUMED.per_op)
    assert learnt.cost.per_segment == pytest.approx(ASSUMED.per_segment)
    assert learnt.cost.per_byte == pytest.approx(ASSUMED.per_byte)


def test_assumed_numbers_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        LearntCost(Cost(0.0, 1e-9, 1e-9))


def _ways(one: Cost, two: Cost, cores: int = 1) -> Ways:
    return Ways([Way("one", {True: one, False: one}), Way("two", {True: two, False: two}, cores)])


@given(numbers, numbers, st.integers(1, 10_000), st.integers(1, 16 << 20), st.integers(1, 3), st.booleans())
def test_the_cheaper_way_is_chosen(
    a: tuple[float, float, float], b: tuple[float, float, float], segments: int, nbytes: int, cores: int, put: bool
) -> None:
    one, two = Cost(*a), Cost(*b)
    ways = _ways(one, two, cores)
    cheaper = "one" if one.seconds(segments, nbytes) <= cores * two.seconds(segments, nbytes) else "two"
    assert ways.choose(put, segments, nbytes, ["one", "two"]) == cheaper
    assert ways.choose(put, segments, nbytes, ["two"]) == "two"
    predictions = ways.predict(put, segments, nbytes, ["one", "two"])
    assert predictions[0].way == cheaper
    by_name = {prediction.way: prediction for prediction in predictions}
    assert by_name["two"].seconds == pytest.approx(two.seconds(segments, nbytes))
    assert by_name["two"].cores == cores


@given(numbers, st.floats(1.5, 100.0))
def test_a_wrong_assumption_is_found_out(true: tuple[float, float, float], factor: float) -> None:
    truth = {"one": Cost(*(factor * number for number in true)), "two": Cost(*true)}
    # What is assumed is the other way round.
    ways = _ways(truth["two"], truth["one"])
    chosen = []
    for _ in range(EXPLORE_EVERY * 60):
        way = ways.choose(True, 1000, 4 << 20, ["one", "two"])
        chosen.append(way)
        ways.learn(way, True, 1000, 4 << 20, truth[way].seconds(1000, 4 << 20))
        if chosen[-30:] == ["two"] * 30:
            break
    assert chosen[-30:] == ["two"] * 30


@given(numbers, numbers, st.floats(0.25, 4.0))
def test_cores_that_ops_wait_for_are_not_counted_again(
    a: tuple[float, float, float], b: tuple[float, float, float], share: float
) -> None:
    one, two = Cost(*a), Cost(*b)
    ways = Ways([Way("one", {True: one}), Way("two", {True: two}, 3)], share)
    cheaper = "one" if one.seconds(100, 1 << 20) <= min(3.0, max(1.0, share)) * two.seconds(100, 1 << 20) else "two"
    assert ways.choose(True, 100, 1 << 20, ["one", "two"]) == cheaper
    first, second = ways.predict(True, 100, 1 << 20, ["one", "two"])
    assert first.way == cheaper
    assert {first.way: first.cores, second.way: second.cores} == {"one": 1, "two": 3}


def test_the_dearer_way_is_tried_rarely() -> None:
    cheap, dear = Cost(1e-6, 1e-9, 1e-10), Cost(2e-6, 2e-9, 2e-10)
    ways = _ways(cheap, dear)
    for _ in range(NEW_SAMPLES):
        ways.learn("two", False, 10, 1 << 20, dear.seconds(10, 1 << 20))
    chosen = [ways.choose(False, 10, 1 << 20, ["one", "two"]) for _ in range(EXPLORE_EVERY * 10)]
    assert 1 <= chosen.count("two") <= 10


def test_while_copies_go_on_several_in_a_row_go_the_same_way() -> None:
    ways = _ways(Cost(1e-6, 1e-9, 1e-10), Cost(2e-6, 2e-9, 2e-10))
    chosen = [ways.choose(True, 10, 1 << 20, ["one", "two"], busy=True) for _ in range(BURST * EXPLORE_NEW_EVERY * 4)]
    runs = [list(run) for _, run in itertools.groupby(chosen)]
    assert len(runs) > 2
    assert all(len(run) % BURST == 0 for run in runs)
    # Of another size, or when nothing goes on, or where that way is not to be had, the choice is free.
    assert ways.choose(True, 10, 1 << 20, ["two"], busy=True) == "two"
    assert ways.choose(True, 1, 1 << 20, ["one", "two"], busy=True) == "one"
    assert ways.choose(True, 10, 1 << 20, ["one", "two"]) == "one"


def test_directions_are_learnt_apart() -> None:
    ways = _ways(ASSUMED, ASSUMED)
    for _ in range(100):
        ways.learn("one", True, 10, 1 << 20, 0.01)
    assert ways.seconds("one", True, 10, 1 << 20) == pytest.approx(0.01, rel=0.1)
    assert ways.seconds("one", False, 10, 1 << 20) == ASSUMED.seconds(10, 1 << 20)
    (prediction,) = ways.predict(False, 10, 1 << 20, ["one"])
    assert (prediction.cost, prediction.samples) == (ASSUMED, 0)
    assert "one 218 µs on 1 core" in str(prediction)

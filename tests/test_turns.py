"""Tests of several processes run side by side, and one that is alone runs when no other does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.turns import Turns


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[tuple[Turns, Turns]]:
    """Take part twice, as two processes do."""
    with ExitStack() as stack:
        pair = Turns(tmp_path), Turns(tmp_path)
        for one in pair:
            stack.callback(one.close)
        yield pair


def test_tests_run_side_by_side(turns: tuple[Turns, Turns]) -> None:
    one, other = turns
    with one.turn(alone=False), other.turn(alone=False):
        pass


@pytest.mark.parametrize("first_is_alone", [False, True])
def test_one_that_is_alone_and_another_wait_for_each_other(turns: tuple[Turns, Turns], first_is_alone: bool) -> None:
    one, other = turns
    told: list[str] = []
    asking = threading.Event()

    def second() -> None:
        asking.set()
        with other.turn(alone=not first_is_alone):
            told.append("second")

    thread = threading.Thread(target=second)
    with one.turn(alone=first_is_alone):
        thread.start()
        asking.wait()
        # Without the locks the other is there long before.
        thread.join(0.2)
        told.append("first")
    thread.join(10)
    assert told == ["first", "second"]


def test_a_pause_comes_when_the_other_test_has_ended(turns: tuple[Turns, Turns]) -> None:
    one, other = turns
    told: list[str] = []
    began, end = threading.Event(), threading.Event()

    def second() -> None:
        with other.turn(alone=False):
            began.set()
            end.wait()
            told.append("ended")

    thread = threading.Thread(target=second)
    thread.start()
    with one.turn(alone=False):
        began.wait()
        threading.Timer(0.2, end.set).start()
        with one.pause():
            told.append("paused")
    thread.join(10)
    assert told == ["ended", "paused"]


def test_two_that_pause_at_once_hold_each_other_up_for_no_longer_than_that(turns: tuple[Turns, Turns]) -> None:
    both = threading.Barrier(2)
    done: list[Turns] = []

    def test(one: Turns) -> None:
        with one.turn(alone=False):
            both.wait()
            with one.pause():
                done.append(one)

    threads = [threading.Thread(target=test, args=(one,), daemon=True) for one in turns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(done) == 2

"""Tests of several processes run side by side, long files first, and one that is alone runs when no other does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.agents import ROOT
from tests.turns import LONGEST, Turns, longest_first


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


@dataclass
class Item:
    nodeid: str


def test_long_files_come_first_and_then_those_of_most_tests() -> None:
    few, most = [f"tests/test_few.py::test_{n}" for n in (2, 1)], [f"tests/test_most.py::test_{n}[::]" for n in (3, 1, 2)]
    long = [f"{name}::test" for name in LONGEST]
    items: Any = [Item(name) for name in (*few, *reversed(long), *most)]
    longest_first(items)
    assert [item.nodeid for item in items] == [*long, *most, *few]


@pytest.mark.parametrize("name", LONGEST)
def test_the_files_that_take_longest_exist(name: str) -> None:
    assert (ROOT / name).is_file()


def test_the_order_is_that_in_which_processes_are_given_files(tmp_path: Path) -> None:
    for name, count in (("few", 1), ("most", 3), ("some", 2)):
        (tmp_path / f"test_{name}.py").write_text("".join(f"def test_{n}(): pass\n" for n in range(count)))
    (tmp_path / "conftest.py").write_text(
        "import tests.turns\ntests.turns.LONGEST = ('test_few.py',)\n"
        "from tests.conftest import pytest_collection_modifyitems, pytest_configure, pytest_runtest_protocol\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-v", "-n", "1", "--dist", "loadfile", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    files = re.findall(r"PASSED test_(\w+)\.py", ran.stdout)
    assert files == ["few"] + ["most"] * 3 + ["some"] * 2, ran.stdout

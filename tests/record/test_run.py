"""Parts are measured one after the other, and each is written, whatever becomes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.commands import Command
from bench.process import ROOT, WorkerError
from bench.record import files, run
from bench.record.files import Part
from bench.record.plan import Planned
from bench.record.run import Recorder, Screen
from bench.report import Row
from bench.session import Settings
from tests.record.made import SYSTEM, row

Suite = Callable[[Settings], Iterator[Row]]


def good(settings: Settings) -> Iterator[Row]:
    settings.progress("working")
    yield row(1.0, 2.0)
    settings.warn(f"{ROOT}/thing is left out")
    yield row(3.0, 2.0)


def failing(settings: Settings) -> Iterator[Row]:
    yield row(5.0, 2.0)
    raise WorkerError(f"raw (target): {ROOT}/bench/x.py ended")


def interrupted(error: BaseException) -> Suite:
    def suite(settings: Settings) -> Iterator[Row]:
        yield row(7.0, 2.0)
        raise error

    return suite


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """A recorder into an empty directory."""
    return Recorder(tmp_path, SYSTEM, ("python", "-m", "bench", "results"), "", Screen(), sources="abc")


def planned(name: str) -> Planned:
    return Planned(name, {"rounds": 1, "mib": 1}, 1.0, suite=Settings())


def commands(monkeypatch: pytest.MonkeyPatch, **suites: tuple[Suite, ...]) -> list[Planned]:
    """Have commands of those suites, one for each path."""
    made = {name: Command(name, tuple((str(n), one) for n, one in enumerate(each))) for name, each in suites.items()}
    monkeypatch.setattr(run, "COMMANDS", made)
    return [planned(name) for name in suites]


def speeds(part: Part) -> list[float]:
    return [one.ours.median for one in part.rows]


def test_a_suite_that_fails_is_told_as_failed_and_the_others_go_on(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = commands(monkeypatch, first=(failing, good), second=(good,))
    heard: list[str] = []
    recorder.screen = Screen(
        doing=heard.append, warn=heard.append, end=lambda one, part: heard.append(f"{one.name} {part.about.state}")
    )
    first, second = recorder.run(plan)
    # What it measured before it failed, and its other path.
    assert speeds(first) == [5.0, 1.0, 3.0]
    assert first.about.failures == ("WorkerError: raw (target): bench/x.py ended",)
    assert (first.about.state, second.about.state) == ("failed", "complete")
    assert heard == ["working", "thing is left out", "first failed", "working", "thing is left out", "second complete"]
    assert second.about.warnings == ("thing is left out",)
    for part in (first, second):
        written = files.read(files.path_of(recorder.directory, part.about.part))
        assert (written.about, speeds(written)) == (part.about, speeds(part))
    assert first.about.seconds >= 0
    assert first.about.started


def test_a_part_without_a_row_is_not_complete(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(settings: Settings) -> Iterator[Row]:
        settings.warn("its server is left out")
        yield from ()

    plan = commands(monkeypatch, first=(absent, absent), second=(absent, good))
    first, second = recorder.run(plan)
    assert first.about.failures == ("nothing was measured: what it needs is not there",)
    assert second.about.complete
    assert [recorder.keep(one) for one in plan] == [False, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=["SIGINT", "SIGTERM"])
def test_what_was_measured_before_an_interrupt_is_written(
    error: BaseException, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = commands(monkeypatch, first=(good,), second=(interrupted(error), good), third=(good,))
    with pytest.raises(type(error)):
        recorder.run(plan)
    assert sorted(path.stem for path in recorder.directory.iterdir()) == ["first", "second"]
    second = files.read(files.path_of(recorder.directory, "second"))
    assert (second.about.state, speeds(second)) == ("interrupted", [7.0])


def test_only_whole_parts_of_the_same_code_are_kept(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = commands(monkeypatch, first=(good,), second=(failing,))
    assert [recorder.keep(one) for one in plan] == [False, False]
    recorder.run(plan)
    assert [recorder.keep(one) for one in plan] == [True, False]
    assert not recorder.keep(dataclasses.replace(plan[0], settings={"rounds": 2, "mib": 1}))
    recorder.sources = "def"
    assert not recorder.keep(plan[0])
    files.path_of(recorder.directory, "first").write_text("{")
    recorder.sources = "abc"
    assert not recorder.keep(plan[0])


def test_long_texts_lose_their_beginning(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def suite(settings: Settings) -> Iterator[Row]:
        yield row(1.0, 1.0)
        raise WorkerError("x" * 100_000 + "the end")

    (part,) = recorder.run(commands(monkeypatch, first=(suite,)))
    (text,) = part.about.failures
    assert len(text) < 2 * run.LONGEST_TEXT
    assert text.endswith("xthe end")

"""The files of a recorded run: what is written is read again, and other tools read it, too."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bench.record import files
from bench.record.plan import PARTS
from bench.report import Row
from nixl_async.benchmarks.reading import read
from nixl_async.benchmarks.results import ResultsError
from tests.record.made import SYSTEM, about, row, suite, sweep


def checked() -> Row:
    made = row(8.123456789, 2.0)
    made.at_least("NIXL", 3.0)
    return made


def test_a_suite_comes_back_as_it_was_but_for_digits_that_say_nothing(tmp_path: Path) -> None:
    part = suite("throughput", [checked(), row(1.0, 2.0, "us")], warnings=("fio is left out",))
    files.write(tmp_path, part)
    found = files.read(tmp_path / "throughput.json")
    assert found.about == part.about
    assert found.system == {**SYSTEM, "run": found.system["run"]}
    assert [one.ours.median for one in found.rows] == [8.123, 1.0]
    (check,) = found.rows[0].checks
    assert (check.target, check.met, check.shown) == (">= 3x NIXL", True, "{:.2f}x")
    assert [one.name for one in tmp_path.iterdir()] == ["throughput.json"]


def test_a_sweep_comes_back(tmp_path: Path) -> None:
    part = sweep("sweep-tcp", {("write", 4096, 1): ((1.0, 2.0), (2.0, 2.0)), ("read", 4096, 4): ((1.0,), None)})
    files.write(tmp_path, part)
    found = files.read(tmp_path / "sweep-tcp.json")
    assert found.about == part.about
    assert found.sweep is not None
    assert part.sweep is not None
    assert found.sweep.rows == part.sweep.rows


def test_comparisons_and_drawings_read_both_forms(tmp_path: Path) -> None:
    files.write(tmp_path, suite("throughput", [checked()]))
    files.write(tmp_path, sweep("sweep-tcp", {("write", 4096, 1): ((1.0,), (2.0,))}))
    for name in ("throughput", "sweep-tcp"):
        results, left = read(tmp_path / f"{name}.json")
        assert left == 0
        assert len(results.rows) == 2


def test_parts_are_read_in_the_order_of_measuring(tmp_path: Path) -> None:
    for name in ("latency", "other", "throughput"):
        files.write(tmp_path, suite(name, []))
    assert [part.about.part for part in files.read_all(tmp_path, PARTS)] == ["throughput", "latency", "other"]
    assert files.read_all(tmp_path / "nowhere", PARTS) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no JSON", "is no part of a recorded run: Expecting value"),
        ("", "is no part of a recorded run: IndexError"),
        ('{"system": {}}', "is no part of a recorded run: KeyError('run')"),
        ('{"system": {"run": {"part": "x"}}}', "is no part of a recorded run: TypeError"),
        ("[1]", "is no part of a recorded run: TypeError"),
    ],
    ids=["text", "empty", "no run", "half a run", "a list"],
)
def test_what_is_no_part_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ResultsError, match=re.escape(said)) as caught:
        files.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="cannot be read: No such file"):
        files.read(tmp_path / "x.json")
    with pytest.raises(ResultsError, match="cannot be written"):
        files.write(tmp_path / "nowhere", suite("throughput", []))


def test_a_part_is_like_another_only_of_the_same_machine_code_libraries_and_sizes(tmp_path: Path) -> None:
    part = suite("throughput", [])
    files.write(tmp_path, part)
    found = files.read(tmp_path / "throughput.json")
    assert found.like(SYSTEM, part.about)
    for key in ("cpu", "kernel", "nixl"):
        assert not found.like({**SYSTEM, key: "another"}, part.about)
    assert not found.like({key: value for key, value in SYSTEM.items() if key != "nixl"}, part.about)
    for change in ({"sources": "def"}, {"quick": True}, {"settings": {"rounds": 4, "mib": 256}}):
        assert not found.like(SYSTEM, dataclasses.replace(part.about, **change))
    assert found.like(SYSTEM, dataclasses.replace(part.about, invocation="later", started="", command=()))


def test_the_state_of_a_part() -> None:
    states = [about("x"), about("x", failures=("why",)), about("x", failures=("why",), interrupted=True)]
    assert [one.state for one in states] == ["complete", "failed", "interrupted"]
    assert [one.complete for one in states] == [True, False, False]


def test_the_digest_is_of_all_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "ROOT", tmp_path)
    for room in files.SOURCES:
        (tmp_path / room).mkdir()
    seen = {files.sources_digest()}
    for path in ("bench/a.py", "nixl_async/b.c", "backends/c.py", "bench/d.json"):
        (tmp_path / path).write_text("x")
        seen.add(files.sources_digest())
    # Results are no code.
    assert len(seen) == 4
    (tmp_path / "bench/a.py").write_text("y")
    assert files.sources_digest() not in seen

"""The GPU benches without a GPU: they say so at once; what they write is put together. With one, bench/gpu/run.sh runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app as all_benches
from bench.gpu.cli import COMMANDS, NO_DEVICE, app, why_not
from bench.report import Check, Figure, Row, to_json
from nixl_async.cuda import device_count
from tests.agents import ROOT

needs_no_device = pytest.mark.skipif(device_count() > 0, reason="this machine has a CUDA device")
SECONDS = 30


@needs_no_device
def test_the_runner_ends_at_once_without_a_device(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", "bench/gpu/run.sh", str(tmp_path / "wheels"), str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ran.returncode == NO_DEVICE
    assert "there is no CUDA device here" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_the_runner_is_a_program_that_bash_can_read() -> None:
    runner = ROOT / "bench/gpu/run.sh"
    assert os.access(runner, os.X_OK)
    subprocess.run(["bash", "-n", str(runner)], check=True)
    text = runner.read_text()
    bounds = [int(line.split()[1]) for line in text.splitlines() if line.startswith("part ")]
    # With what installing and collecting take.
    assert sum(bounds) < 8 * 60 - 20
    for name in COMMANDS:
        assert f"part {bounds[0]} tests" in text
        assert f" {name} " in text


@needs_no_device
@pytest.mark.parametrize("name", [*COMMANDS, "all"])
def test_every_command_says_what_it_needs(name: str) -> None:
    assert "libcuda.so.1" in why_not()
    ran = CliRunner().invoke(app, [name])
    assert ran.exit_code == NO_DEVICE
    assert "need a CUDA device and cupy" in ran.output


@needs_no_device
def test_they_are_reached_through_the_other_benches_too() -> None:
    ran = CliRunner().invoke(all_benches, ["gpu", "wake"])
    assert ran.exit_code == NO_DEVICE


def a_row() -> Row:
    row = Row("gpu pages", {"op": "write", "page": 4096}, "GB/s", Figure("nixl_async", (8.0, 10.0, 12.0), "cuda_ipc"))
    row.others.append(Figure("NIXL", (2.0, 2.5, 3.0)))
    row.raw = Figure("D2D copy", (20.0, 20.0, 20.0))
    row.share_of_raw(0.4)
    row.at_least("NIXL", 5.0)
    return row


def test_a_row_survives_its_file() -> None:
    row = a_row()
    again = Row.from_dict(json.loads(to_json(row.as_dict())))
    assert (again.ours.median, again.ours.note, again.ours.spread) == (10.0, "cuda_ipc", row.ours.spread)
    assert again.raw is not None
    assert again.ratio(again.raw) == 0.5
    assert again.ratio(again.others[0]) == 4.0
    assert [check.met for check in again.checks] == [True, False]
    assert isinstance(again.checks[0], Check)


def write_parts(directory: Path, *, incomplete: str = "", missing: str = "") -> None:
    for name in COMMANDS:
        if name != missing:
            rows = [a_row().as_dict()] if name == "pages" else []
            part = {"system": {"gpu": "a test's"}, "rows": rows, "failures": [], "complete": name != incomplete}
            (directory / f"{name}.json").write_text(to_json(part))
    (directory / "tests.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
        '<testcase classname="a" name="b"/><testcase classname="a" name="c"><failure message="no"/></testcase>'
        '<testcase classname="a" name="d"><skipped message="no rmm"/></testcase></testsuite></testsuites>'
    )


def test_parts_are_put_together(tmp_path: Path) -> None:
    write_parts(tmp_path)
    ran = CliRunner().invoke(app, ["collect", str(tmp_path), str(tmp_path / "gpu.json")])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["system"] == {"gpu": "a test's"}
    assert [row["ours"]["median"] for row in found["rows"]] == [10.0]
    assert found["tests"]["failed"] == ["a.c"]
    assert "tests: 3, 1 failed, 1 skipped: no rmm (1); failed: a.c" in ran.output
    assert "NOT MET" in ran.output


@pytest.mark.parametrize("wrong", [{"incomplete": "host"}, {"missing": "host"}])
def test_what_did_not_end_is_no_success(tmp_path: Path, wrong: dict[str, str]) -> None:
    write_parts(tmp_path, **wrong)
    ran = CliRunner().invoke(app, ["collect", str(tmp_path), str(tmp_path / "gpu.json")])
    assert ran.exit_code == 1
    assert "host" in ran.output

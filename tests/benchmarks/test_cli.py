"""`nixl-async bench` as a user meets it: its programs, `compare` and `plot`; and it costs nobody else anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nixl_async.benchmarks.cli import app
from nixl_async.benchmarks.results import Results, Row
from nixl_async.cli import app as whole
from tests.agents import ROOT
from tests.benchmarks.made import SYSTEM, rates


def bench(*arguments: str | Path, hidden: Path | None = None) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-P", "-m", "nixl_async", "bench", *map(str, arguments)]
    path = os.pathsep.join(map(str, filter(None, (hidden, ROOT))))
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": path}
    return subprocess.run(whole, capture_output=True, text=True, timeout=110, check=False, cwd=ROOT, env=environment)


def told(*arguments: str | Path) -> Result:
    """Run a command in this process, which has loaded what it computes with."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    rates().write(first)
    rates(0.9, seed=2).write(second)
    return first, second


def test_a_slower_run_is_shown_and_fails_when_asked_to(files: tuple[Path, Path]) -> None:
    ran = bench("compare", *files)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("slower") == 9
    assert "write, tcp, 4 KiB of 64 MiB" in ran.stdout
    failed = told("compare", *files, "--fail-on-slower", "5")
    assert failed.exit_code == 1
    assert "nixl-async bench: 9 rows are slower by 5 % or more" in failed.stderr
    assert "and 6 more" in failed.stderr
    assert told("compare", *files, "--fail-on-slower", "20").exit_code == 0
    assert told("compare", *reversed(files), "--fail-on-slower", "0").exit_code == 0


def test_a_comparison_as_json(files: tuple[Path, Path]) -> None:
    ran = told("compare", *files, "--format", "json", "--metric", "throughput", "--fail-on-slower", "5")
    assert ran.exit_code == 1
    result = json.loads(ran.stdout)
    assert [one["verdict"] for one in result["comparisons"]] == ["slower"] * 3
    assert result["failed"] == result["comparisons"]
    assert result["only_first"] == result["only_second"] == []


def test_too_few_repetitions_are_said(tmp_path: Path) -> None:
    rates(n=3).write(tmp_path / "a.json")
    ran = told("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert ran.exit_code == 0
    assert "too few (3 < 5 repetitions)" in ran.stdout


def test_a_report_is_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    ran = bench("plot", *files, "-o", tmp_path / "report.html")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(tmp_path / "report.html")
    assert "Plotly.newPlot" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compare"], "A.json"),
        (["compare", "a.json"], "B.json"),
        (["compare", "none.json", "none.json"], "nixl-async bench: none.json cannot be read: No such file"),
        (["compare", "README.md", "README.md"], "nixl-async bench: README.md is not JSON"),
        (["compare", "a.json", "b.json", "--fail-on-slower", "-1"], "fail-on-slower"),
        (["compare", "a.json", "b.json", "--confidence", "100"], "confidence"),
        (["compare", "a.json", "b.json", "--metric", "speed"], "throughput"),
        (["compare", "a.json", "b.json", "--format", "xml"], "json"),
        (["plot", "-o", "x.html"], "RESULTS.json"),
        (["plot", "none.json"], "--output"),
        (["plot", "none.json", "-o", "x.html"], "nixl-async bench: none.json cannot be read"),
        (["fly"], "fly"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2
    assert text in ran.stderr
    assert not ran.stdout


def test_two_results_of_different_things_are_refused(tmp_path: Path) -> None:
    rates().write(tmp_path / "a.json")
    Results(("x",), SYSTEM, (Row("other", "write", 1, 1, throughput=(1.0,)),)).write(tmp_path / "b.json")
    ran = told("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert ran.exit_code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "no row in common" in ran.stderr


@pytest.mark.parametrize(("package", "command"), [("scipy", "compare"), ("plotly", "plot")])
def test_what_is_missing_names_its_extra(files: tuple[Path, Path], tmp_path: Path, package: str, command: str) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / f"{package}.py").write_text("raise ModuleNotFoundError('hidden by the test')")
    ran = bench(command, *files, *([] if command == "compare" else ["-o", "x.html"]), hidden=hidden)
    assert ran.returncode == 2
    assert "pip install 'nixl-async[report]'" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_help_lists_the_commands_and_loads_little() -> None:
    ran = bench("--help")
    assert ran.returncode == 0
    for command in ("compare", "plot"):
        assert command in ran.stdout
    program = "import sys, nixl_async.cli; print(*(name for name in sys.modules if 'benchmarks' in name or 'doctor' in name))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_programs_are_listed(arguments: list[str]) -> None:
    assert "kv" in CliRunner().invoke(app, arguments).output


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["bench", "--help"], 0, "kv"),
        (["bench", "kv", "--help"], 0, "plan"),
        (["bench", "kv", "plan", "--help"], 0, "--kvbench-compatible"),
        (["bench", "nothing"], 2, "No such command"),
        (["bench", "kv", "plan"], 2, "--model"),
        (["bench", "kv", "plan", "--model", "gpt-5"], 2, "known are"),
    ],
)
def test_options_and_exit_statuses_pass_through(arguments: list[str], status: int, text: str) -> None:
    ran = CliRunner().invoke(whole, arguments, env={"COLUMNS": "200"})
    assert (ran.exit_code, text in ran.output) == (status, True), ran.output


def test_nobody_else_loads_them() -> None:
    program = (
        "import sys; from nixl_async.cli import app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith('nixl_async.benchmarks') or name == 'yaml'))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout == "\n"


def test_they_run_out_of_a_checkout_too() -> None:
    command = [sys.executable, "-m", "bench.kv", "kvcache", "--model", "qwen3-8b", "--format", "csv"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.splitlines()[1].startswith("qwen3-8b,1000,1,63,2359296,1,1,16,block,bfloat16,147456")

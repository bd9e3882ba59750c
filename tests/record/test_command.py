"""The command: one run at tiny sizes, its files and its document, going on after an interrupt, and what it refuses."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench.cli import app
from bench.record import files
from bench.record.plan import PARTS
from tests.agents import ROOT
from tests.record.made import row, suite

SECONDS = 60
TINY = ("--quick", "--no-install", "--environments", "/nowhere")


def command(*arguments: str) -> list[str]:
    """Return the command; the NIXL that is told is none, and so absent."""
    return [sys.executable, "-m", "bench", "results", *TINY, "--nixl-python", sys.executable, *arguments]


def results(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)


def refused(*arguments: str) -> Result:
    """Run the command in this process, where it measures nothing."""
    return CliRunner().invoke(app, ["results", *arguments])


def test_one_run_its_document_and_going_on(tmp_path: Path) -> None:
    only = ("--only", "sweep-samehost", "--only", "descriptors")
    ran = results("--output", str(tmp_path), *only)
    assert ran.returncode == 0, ran.stderr
    assert "2 parts, about 16 s, until " in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "descriptors.json", "sweep-samehost.json"]
    first, second = files.read_all(tmp_path, PARTS)
    assert (first.about.part, second.about.part) == ("sweep-samehost", "descriptors")
    assert first.about.invocation == second.about.invocation
    assert first.about.command == ("python", "-m", "bench", "results", "--quick", "--no-install", *only)
    assert first.about.complete
    assert any(text.startswith("nixl is absent") for text in first.about.warnings)
    text = (tmp_path / "RESULTS.md").read_text()
    for said in ("Tiny sizes", "### the sweep, same host, read", "## Descriptors", "- mooncake: it has no environment here"):
        assert said in text
    # The document comes of the files alone, and is the same each time.
    assert refused("--render", "--output", str(tmp_path)).exit_code == 0
    assert (tmp_path / "RESULTS.md").read_text() == text

    (tmp_path / "descriptors.json").unlink()
    before = (tmp_path / "sweep-samehost.json").read_text()
    ran = results("--output", str(tmp_path), *only, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert "sweep-samehost: kept" in ran.stderr
    assert (tmp_path / "sweep-samehost.json").read_text() == before
    assert (tmp_path / "descriptors.json").exists()
    assert "Put together from 2 invocations" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_all_processes_and_what_was_measured_is_written(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    only = ("--only", "planner", "--only", "descriptors", "--only", "scheduler")
    # What a shell starts in the background ignores SIGINT, and what that starts does too.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipe = subprocess.PIPE
    run = command("--output", str(tmp_path), *only)
    with subprocess.Popen(run, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=listen) as parent:
        assert parent.stderr is not None
        while not parent.stderr.readline().startswith("planner: about"):
            pass
        while not (children := _children(parent.pid)):
            pass
        pidfds = [os.pidfd_open(pid) for pid in children]
        try:
            parent.send_signal(number)
            _, said = parent.communicate(timeout=SECONDS)
            for pidfd in pidfds:
                readable, _, _ = select.select([pidfd], [], [], SECONDS)
                assert readable, "still alive"
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
    assert parent.returncode == status, said
    first, second = files.read_all(tmp_path, ("descriptors", "planner"))
    assert (first.about.part, first.about.state, second.about.state) == ("descriptors", "complete", "interrupted")
    assert "parts that did not come to their end | planner" in (tmp_path / "RESULTS.md").read_text()


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--only", "sweeps"), "--only sweeps: there is no such part; there are sweep-samehost, sweep-tcp, throughput"),
        (("--quick",), "--quick would put figures that mean nothing into bench/results: give another --output"),
        (("--output", "x", "--report", "/nowhere/x.md"), "--report is /nowhere/x.md; its directory does not exist"),
        (("--output", "/proc/x"), "/proc/x"),
        (("--output", "/tmp", "--nixl-python", "/nowhere"), "--nixl-python /nowhere cannot be run"),
        (("--render", "--output", "/nowhere"), "/nowhere has no part of a run; python -m bench results writes them"),
        (("--minutes", "0"), "--minutes"),
        (("--rounds", "0"), "--rounds"),
    ],
    ids=["part", "quick", "report", "output", "interpreter", "render", "minutes", "rounds"],
)
def test_what_it_refuses(given: tuple[str, ...], said: str) -> None:
    ran = refused(*given)
    assert ran.exit_code == 2, ran.output
    assert said in ran.output.replace("\n", " ")
    assert "Traceback" not in ran.output


def test_a_file_that_is_no_part_is_named(tmp_path: Path) -> None:
    files.write(tmp_path, suite("throughput", [row(1.0, 1.0)]))
    (tmp_path / "latency.json").write_text(json.dumps({"system": {}}))
    ran = refused("--render", "--output", str(tmp_path))
    assert ran.exit_code == 2
    assert f"{tmp_path}/latency.json is no part of a recorded run" in ran.output.replace("\n", "")
    assert not (tmp_path / "RESULTS.md").exists()


def test_the_document_goes_where_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    files.write(tmp_path / "files", suite("throughput", [row(1.0, 1.0)]))
    ran = refused("--render", "--output", str(tmp_path / "files"), "--report", str(tmp_path / "here.md"))
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "here.md").read_text().startswith("# Results\n")

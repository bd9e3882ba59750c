"""The command line as a user meets it: the demo, its ends good and bad, and what else the command can do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nixl_async
from nixl_async.backend import BUILT_IN
from nixl_async.cli import app
from nixl_async.demo.job import Job
from nixl_async.demo.run import DemoFailed, run_job
from tests.agents import ROOT

KEYS = [
    "bytes",
    "pages",
    "gb_per_second",
    "memcpy_share",
    "transfer_seconds",
    "exposed_seconds",
    "ttft_seconds",
    "loop_stall_p999_seconds",
    "cpu_seconds_per_gb",
    "route",
    "verified",
]
SMALL = ["--tokens", "64", "--compute-ms", "1"]


def command(*arguments: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "nixl_async", *arguments]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(whole, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, env=environment)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.1-70b", "deepseek-r1", "qwen3-235b"])
def test_the_demo_of_each_model_as_json(model: str) -> None:
    ran = command("demo", "--model", model, *SMALL, "--format", "json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(KEYS) <= set(result)
    assert result["verified"] is True
    assert result["bytes"] == Job(model, 64, 16, 1, 0.001).nbytes
    assert result["route"] == "samehost"
    assert result["gb_per_second"] > 0


def test_the_table_has_a_line_for_each_figure() -> None:
    ran = command("demo", *SMALL, "--layers-per-push", "8", "--backend", "tcp")
    assert ran.returncode == 0, ran.stderr
    for text in ("GB/s", "memcpy", "not hidden", "last layer", "p99.9", "CPU seconds per GB", "tcp", "True"):
        assert text in ran.stdout
    # No bars where there is no terminal.
    assert ran.stderr == ""


@pytest.mark.nixl
def test_the_demo_beside_nixl(nixl_python: str) -> None:
    ran = command("demo", *SMALL, "--versus", "nixl", "--nixl-python", nixl_python, "--format", "json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(KEYS) <= set(result["versus"]["nixl"])
    assert result["versus"]["nixl"]["verified"] is True
    assert result["versus"]["ratios"]["gb_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "gpt-5"], "llama-3.1-8b"),
        (["--tokens", "0"], "'--tokens'"),
        (["--tokens", "many"], "'--tokens'"),
        (["--tokens", "100000000"], "GiB are available"),
        (["--layers-per-push", "33"], "32 layers"),
        (["--page-size", "0"], "page-size"),
        (["--backend", "warp"], "known are azure, cuda"),
        (["--backend", "memory"], "does not reach other processes"),
        (["--versus", "nixl"], "--nixl-python"),
        (["--versus", "nixl", "--nixl-python", "/nowhere"], "/nowhere"),
        (["--format", "xml"], "json"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIXL_ASYNC_NIXL_PYTHON", raising=False)
    ran = CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "200"})
    assert ran.exit_code == 2
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_everything_in_under_a_second(number: signal.Signals) -> None:
    program = [sys.executable, "-m", "nixl_async", "demo", "--tokens", "64", "--compute-ms", "1000"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as demo:
        children = _children(demo.pid, 2)
        demo.send_signal(number)
        told = time.monotonic()
        demo.wait(20)
        assert time.monotonic() - told < 1.0
        assert demo.stderr is not None
        assert demo.stderr.read().splitlines()[-1] == "nixl-async: interrupted"
    assert demo.returncode == 130
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def _children(parent: int, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        if len(text.split()) == count:
            return [int(pid) for pid in text.split()]
        time.sleep(0.01)
    raise AssertionError("the demo's processes did not start")


@pytest.mark.alone
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("backend", ["samehost", "tcp"])
async def test_a_side_that_is_killed_is_reported_by_the_other_in_under_a_second(role: str, backend: str) -> None:
    killed: dict[str, float] = {}
    pids: dict[str, int] = {}

    def take(who: str, message: dict[str, Any]) -> None:
        if "pid" in message:
            pids[who] = message["pid"]
        if message.get("event") == "pushed" and not killed:
            os.kill(pids[role], signal.SIGKILL)
            killed["at"] = time.monotonic()

    with pytest.raises(DemoFailed, match="SIGKILL") as caught:
        await run_job(Job("llama-3.1-8b", 64, 16, 1, 0.2), [backend], take)
    assert time.monotonic() - killed["at"] < 1.0 + 0.7
    other = "decode" if role == "prefill" else "prefill"
    assert f"{other} says" in str(caught.value)
    assert role in str(caught.value)
    await asyncio.sleep(0)


def test_the_self_test_names_every_backend_it_tried() -> None:
    ran = command("self-test")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    tried = [name for name, text in said.items() if text.startswith("ok")]
    assert tried == ["memory", "samehost", "tcp", "ucx", "posix", "directory", "staging"]
    assert all("server" in said[name] for name in ("s3", "azure", "gcs"))


def test_backends_are_listed_with_their_limits() -> None:
    ran = command("backends")
    assert ran.returncode == 0
    for name in BUILT_IN:
        assert name in ran.stdout


def test_the_demo_does_not_mistake_a_checkout_around_it_for_itself(tmp_path: Path) -> None:
    """A plain `pip install .` leaves the checkout, which has no compiled module, in the working directory."""
    (tmp_path / "nixl_async").mkdir()
    (tmp_path / "nixl_async/__init__.py").write_text("raise SystemExit('the wrong package')")
    whole = [sys.executable, "-P", "-m", "nixl_async", "demo", *SMALL, "--format", "json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(whole, capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["verified"] is True


def test_what_a_missing_backend_needs_is_named_whole(tmp_path: Path) -> None:
    (tmp_path / "ucxx.py").write_text("raise ModuleNotFoundError('hidden by the test')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for arguments in (["backends"], ["self-test"]):
        whole = [sys.executable, "-P", "-m", "nixl_async", *arguments]
        ran = subprocess.run(whole, capture_output=True, text=True, timeout=110, check=False, env=environment, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "pip install 'nixl-async[ucx-cu12]'" in ran.stdout


def test_versions_are_listed() -> None:
    ran = command("version")
    assert f"nixl-async {nixl_async.__version__}" in ran.stdout
    assert f"python {sys.version.split()[0]}" in ran.stdout
    assert command("--version").stdout == f"nixl-async {nixl_async.__version__}\n"


def test_without_a_command_there_is_help() -> None:
    ran = command()
    assert "demo" in ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "arguments",
    [["version"], ["--help"], ["backends"], ["bench", "kv", "plan", "--model", "deepseek-r1"], ["bench", "--help"]],
    ids=" ".join,
)
def test_a_reader_that_goes_away_ends_a_command_quietly(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "wb") as output:
        whole = [sys.executable, "-m", "nixl_async", *arguments]
        ran = subprocess.run(whole, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_without_an_output_a_command_runs() -> None:
    ran = subprocess.run(
        ["sh", "-c", 'exec "$0" -m nixl_async version >&-', sys.executable],
        capture_output=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")

"""Processes that crash, hang, talk nonsense or leave others behind: each is reported, and nothing of it outlives the question."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nixl_async.doctor.children import ask, run
from tests.agents import ROOT


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


async def test_messages_and_other_output_are_told_apart() -> None:
    heard: list[dict[str, Any]] = []
    answer = await run(python("print('UCX says hello'); print('{\"event\": 1}'); print('[1]')"), 30, on_message=heard.append)
    assert answer.failure == ""
    assert answer.messages == heard == [{"event": 1}]
    assert answer.text == "UCX says hello\n[1]\n"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it was killed by SIGSEGV"),
        ("raise SystemExit(3)", "it ended with exit status 3"),
        ("raise RuntimeError('no luck')", "it ended with exit status 1: RuntimeError: no luck"),
        ("import os; os.abort()", "it was killed by SIGABRT"),
    ],
)
async def test_how_a_process_ended(program: str, said: str) -> None:
    assert (await run(python(program), 30)).failure == said


async def test_a_process_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('{\"pid\": %d}' % child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    began = time.monotonic()
    answer = await run(python(program), 2)
    assert answer.failure == "it did not end within 2 s"
    assert time.monotonic() - began < 20
    (message,) = answer.messages
    deadline = time.monotonic() + 10
    while _lives(message["pid"]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        # One that has ended and nobody has waited for yet does not count.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_process_is_ended_when_the_question_is_cancelled() -> None:
    heard = asyncio.Event()
    pids: list[int] = []

    def take(message: dict[str, Any]) -> None:
        pids.append(message["pid"])
        heard.set()

    program = "import os, time; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)"
    task = asyncio.create_task(run(python(program), 60, on_message=take))
    await heard.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _lives(pids[0])


async def test_its_input_ends_when_it_is_told_to() -> None:
    until = asyncio.Event()
    program = 'import sys; print(\'{"line": "%s"}\' % sys.stdin.readline().strip(), flush=True); sys.stdin.read()'
    answer = await run(python(program), 30, given="hello\n", on_message=lambda message: until.set(), until=until)
    assert answer.failure == ""
    assert answer.messages == [{"line": "hello"}]


async def test_a_program_that_is_not_there() -> None:
    assert "it cannot be started" in (await run(["/nowhere/at/all"], 5)).failure


async def test_questions_reach_the_child_and_refusals_come_back() -> None:
    answer = await ask("backend", seconds=60, setup={"name": "memory"})
    assert (answer.failure, answer.messages) == ("", [{"event": "opened"}])
    answer = await ask("backend", seconds=60, setup={"name": "warp"})
    (message,) = answer.messages
    assert (message["event"], message["kind"]) == ("refused", "ConfigurationError")
    assert "warp" in message["text"]


async def test_the_child_tells_what_the_kernel_and_cuda_offer() -> None:
    (engine,) = (await ask("file-engine", seconds=60)).messages
    assert engine["how"].startswith(("io_uring", "threads"))
    (gpu,) = (await ask("gpu", seconds=60)).messages
    assert isinstance(gpu["devices"], list)


async def test_a_child_does_not_outlive_who_started_it() -> None:
    setup = '{"token": "t", "nbytes": 1048576, "without": {}, "name": "same host"}'
    program = (
        "import subprocess, sys\n"
        "from nixl_async.doctor.children import PROGRAM\n"
        "child = subprocess.Popen([sys.executable, *PROGRAM, 'peer'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        f"print({setup!r}, file=child.stdin, flush=True)\n"
        "assert 'serving' in child.stdout.readline()\n"
        "print('{\"pid\": %d}' % child.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    answer = await run(python(program), 60, environment={"PYTHONPATH": str(ROOT)})
    assert answer.messages, (answer.failure, answer.errors)
    (message,) = answer.messages
    deadline = time.monotonic() + 10
    while _lives(message["pid"]):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)

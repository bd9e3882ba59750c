"""Processes that are asked something and may crash or hang: bounded in time, and what they started ends with them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# -P: a checkout in the working directory must not take the place of the package that is running.
PROGRAM = ("-P", "-m", "nixl_async.doctor.child")
PACKAGE_PARENT = Path(__file__).resolve().parents[2]
LINE_NBYTES = 4 << 20
_KEPT_NBYTES = 64 << 10


@dataclass(eq=False)
class Answer:
    """What a process said: its messages (objects, one a line), its other output, and `failure`, empty if it ended well."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    errors: str = ""
    failure: str = ""
    seconds: float = 0.0


async def ask(
    *arguments: str,
    seconds: float,
    setup: Mapping[str, Any] | None = None,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
    until: asyncio.Event | None = None,
) -> Answer:
    """Run `nixl_async.doctor.child` with `arguments` in a process of its own, with `setup` as its first line of input."""
    path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = json.dumps(dict(setup or {})) + "\n"
    command = [sys.executable, *PROGRAM, *arguments]
    environment = {"PYTHONPATH": path}
    return await run(command, seconds, environment=environment, given=line, on_message=on_message, until=until)


async def run(
    command: Sequence[str],
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    given: str = "",
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
    until: asyncio.Event | None = None,
) -> Answer:
    """Run a command for `seconds` at most; its standard input ends when `until` is set, or with it."""
    answer, began = Answer(), time.monotonic()
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={**os.environ, **(environment or {})},
            limit=LINE_NBYTES,
            # A group of its own: what the process has started is ended with it.
            start_new_session=True,
        )
    except OSError as error:
        answer.failure = f"it cannot be started: {error}"
        return answer
    readers = [asyncio.create_task(_messages(process, answer, on_message)), asyncio.create_task(_errors(process, answer))]
    if until is not None:
        readers.append(asyncio.create_task(_end_input(process, until)))
    try:
        async with asyncio.timeout(seconds):
            await _give(process, given)
            await process.wait()
            await asyncio.wait(readers[:2])
    except TimeoutError:
        answer.failure = f"it did not end within {seconds:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        if process.stdin is not None:
            process.stdin.close()
    answer.seconds = time.monotonic() - began
    if not answer.failure:
        answer.failure = _ending(process.returncode, answer.errors)
    return answer


async def _give(process: asyncio.subprocess.Process, given: str) -> None:
    assert process.stdin is not None
    # One that has ended already says so by its exit status.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(given.encode())
        await process.stdin.drain()


async def _end_input(process: asyncio.subprocess.Process, until: asyncio.Event) -> None:
    await until.wait()
    assert process.stdin is not None
    process.stdin.close()


async def _messages(process: asyncio.subprocess.Process, answer: Answer, on_message: Callable[[dict[str, Any]], None]) -> None:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if isinstance(message, dict):
            answer.messages.append(message)
            on_message(message)
        elif len(answer.text) < _KEPT_NBYTES * 16:
            # A program that is not ours, or a library that prints to standard output.
            answer.text += line.decode(errors="replace")


async def _errors(process: asyncio.subprocess.Process, answer: Answer) -> None:
    assert process.stderr is not None
    while chunk := await process.stderr.read(_KEPT_NBYTES):
        answer.errors = (answer.errors + chunk.decode(errors="replace"))[-_KEPT_NBYTES:]


def _ending(code: int | None, errors: str) -> str:
    if not code:
        return ""
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "")
    return f"it ended with exit status {code}" + (f": {last}" if last else "")

"""Contenders as processes, alone or in pairs: start them, command them, hold them still while another is measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
COMMAND_SECONDS = 300.0


class WorkerError(RuntimeError):
    """A contender's process failed; the message carries its traceback, or the end of what it wrote to stderr."""


@dataclass(frozen=True)
class Contender:
    """Who takes part in a row: what to call it, the module to run, in which interpreter and with what environment.

    `stopped_between_turns`: its idle threads spin, so both processes get SIGSTOP while others are measured.
    """

    label: str
    module: str
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    stopped_between_turns: bool = False


class Worker:
    """One process of a contender."""

    def __init__(self, contender: Contender, role: str) -> None:
        self.label, self.role = contender.label, role
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
        # What the caller has there may be where his packages are.
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= contender.environment | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "NIXL_LOG_LEVEL": "ERROR"}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            [contender.python, "-m", contender.module, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            cwd=ROOT,
        )
        theirs.close()
        ours.settimeout(COMMAND_SECONDS)
        self._socket, self._file = ours, ours.makefile("rb")

    def send(self, do: str, **arguments: Any) -> None:
        """Send a command without waiting for the answer."""
        try:
            self._socket.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except OSError as error:
            raise self._failure(str(error)) from error

    def receive(self) -> Any:
        """Wait for the answer to the oldest command.

        Raises:
            WorkerError: the command failed, the process ended, or it said nothing for `COMMAND_SECONDS`.
        """
        try:
            line = self._file.readline()
        except OSError as error:
            raise self._failure(f"no answer within {COMMAND_SECONDS:.0f} s ({error})") from error
        if not line:
            raise self._failure("the process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.label} ({self.role}): {answer['error']}")
        return answer["ok"]

    def call(self, do: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer."""
        self.send(do, **arguments)
        return self.receive()

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def close(self) -> None:
        """Hang up and make sure that the process is gone."""
        self._file.close()
        self._socket.close()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._stderr.close()

    def _failure(self, what: str) -> WorkerError:
        self.signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace")[-3000:]
        return WorkerError(f"{self.label} ({self.role}): {what}; exit code {self.process.poll()}; it wrote:\n{tail}")


class Processes:
    """A contender's processes."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.workers: list[Worker] = []

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let the processes run for the duration of the block."""
        if self.contender.stopped_between_turns:
            self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Hold the processes still, if they would otherwise use the CPU."""
        if self.contender.stopped_between_turns:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for worker in self.workers:
            worker.signal(number)

    def close(self) -> None:
        """End the processes."""
        self._signal(signal.SIGCONT)
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Pair(Processes):
    """A contender's two processes, connected: the initiator that is timed, and the target."""

    def __init__(self, contender: Contender, nbytes: int) -> None:
        super().__init__(contender)
        self.target = Worker(contender, "target")
        self.workers.append(self.target)
        try:
            self.initiator = Worker(contender, "initiator")
            self.workers.insert(0, self.initiator)
            self.target.send("open", role="target", nbytes=nbytes, options=contender.options)
            self.initiator.send("open", role="initiator", nbytes=nbytes, options=contender.options)
            address, own = self.target.receive(), self.initiator.receive()
            self.initiator.call("connect", peer=address)
            self.target.call("accept", peer=own)
        except BaseException:
            self.close()
            raise


class Single(Processes):
    """A contender's only process, the client of a storage server or of files."""

    def __init__(self, contender: Contender, nbytes: int) -> None:
        super().__init__(contender)
        self.worker = Worker(contender, "client")
        self.workers.append(self.worker)
        try:
            self.worker.call("open", role="client", nbytes=nbytes, options=contender.options)
        except BaseException:
            self.close()
            raise

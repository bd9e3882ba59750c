"""Looking into a running process: a local socket that `nixl-async top`, `dump` and `trace record` ask, and a dump on a signal.

All of it is opt-in. The socket is a file that its owner alone may use; whoever may, reads names and sizes, and no memory.
A request is a line of JSON, {"do": "dump", "limit": 100} or {"do": "record", "seconds": 5}, and so is the answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nixl_async.dump import MAX_TRANSFERS
from nixl_async.errors import ConfigurationError
from nixl_async.timeline import Timeline

if TYPE_CHECKING:
    from nixl_async.agent import Agent

MAX_REQUEST_NBYTES = 4096
MAX_SECONDS = 600.0
MAX_ANSWER_NBYTES = 256 << 20


class Inspection:
    """`async with inspection.serve(agent, path=…)`."""

    def __init__(self, agents: tuple[Agent, ...], path: str | Path) -> None:
        self._agents, self.path = agents, Path(path)
        self._server: asyncio.Server | None = None
        self._asking: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Inspection:
        _remove_stale(self.path)
        # Nobody may connect before the mode is right.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            sock.bind(str(self.path))
        except OSError as error:
            sock.close()
            raise ConfigurationError(f"no socket can be made at {self.path}: {error}; choose another path") from error
        finally:
            os.umask(before)
        self._server = await asyncio.start_unix_server(self._answer, sock=sock, limit=MAX_REQUEST_NBYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            while line := await reader.readline():
                try:
                    told = await self._obey(json.loads(line))
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    told = {"error": f"{type(error).__name__}: {error}"}
                encoded = await asyncio.to_thread(json.dumps, told)
                writer.write(encoded.encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, asyncio.LimitOverrunError):
            return
        except asyncio.CancelledError:
            # The server closes; a task of asyncio's own that ends cancelled is logged as an error.
            return
        finally:
            self._asking.discard(task)
            writer.close()

    async def _obey(self, request: dict[str, Any]) -> dict[str, Any]:
        what = request["do"]
        if what == "dump":
            limit = max(0, int(request.get("limit", MAX_TRANSFERS)))
            return {"time": time.time(), "pid": os.getpid(), "agents": [agent.dump(limit) for agent in self._agents]}
        if what == "record":
            seconds = min(max(0.0, float(request["seconds"])), MAX_SECONDS)
            timelines = [Timeline(agent, os.getpid() * 100 + n) for n, agent in enumerate(self._agents)]
            for timeline in timelines:
                timeline.start()
            try:
                await asyncio.sleep(seconds)
            finally:
                for timeline in timelines:
                    timeline.stop()
            return {
                "dropped": sum(timeline.dropped for timeline in timelines),
                "events": [event for timeline in timelines for event in timeline.events()],
            }
        raise ValueError(f"{what!r} cannot be done; ask for 'dump' or 'record'")


def serve(*agents: Agent, path: str | Path) -> Inspection:
    """Let programs of this user on this machine look into agents of this process, by a socket at `path`.

    Raises:
        ConfigurationError: when the block is entered: no socket can be made there, or a live process has one.
    """
    return Inspection(agents, path)


def dump_on_signal(*agents: Agent, number: int = signal.SIGUSR1, path: str | Path | None = None) -> None:
    """Write a dump of agents when this process gets a signal: a line of JSON to `path`, which grows, or to standard error.

    Call it on the agents' loop, on the main thread. It is the loop that writes: one that is stuck does so when it goes on.
    """

    def write() -> None:
        lines = "".join(json.dumps({"time": time.time(), "pid": os.getpid(), **agent.dump()}) + "\n" for agent in agents)
        if path is None:
            sys.stderr.write(lines)
            sys.stderr.flush()
        else:
            with Path(path).open("a") as file:
                file.write(lines)

    asyncio.get_running_loop().add_signal_handler(number, write)


def ask(path: str | Path, request: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """Ask a process by its socket, and return the answer; blocks for at most `timeout` seconds.

    Raises:
        ConfigurationError: nobody answers there, or it refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.readline(MAX_ANSWER_NBYTES)
        except OSError as error:
            raise ConfigurationError(
                f"nobody answers at {path}: {error}; the process has to do `inspection.serve(agent, path={str(path)!r})`"
            ) from error
    if not line.endswith(b"\n"):
        raise ConfigurationError(f"the process at {path} ended before it had answered")
    told: dict[str, Any] = json.loads(line)
    if "error" in told:
        raise ConfigurationError(f"the process at {path} refuses: {told['error']}")
    return told


def _remove_stale(path: Path) -> None:
    """Remove the socket of a process that has ended."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return

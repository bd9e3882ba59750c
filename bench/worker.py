"""The process behind a contender: reads commands as JSON lines from a socket, answers each with one line.

Runs in the contender's own interpreter, so it needs nothing but the standard library. A command is
`{"do": name, ...arguments}`; the answer `{"ok": result}` or `{"error": traceback}`. End of file ends the process.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PR_SET_PDEATHSIG = 1


@dataclass
class Then:
    """A result to send at once, and work to do after it is on its way."""

    result: object
    work: Callable[[], None]


class Common:
    """Commands that every contender answers."""

    def usage(self) -> dict[str, Any]:
        """Return the CPU seconds this process has used, the monotonic clock, and its peak memory in bytes."""
        return {"cpu": time.process_time(), "at": time.monotonic(), "rss_peak": rss_peak()}

    def spin(self, seconds: float) -> Then:
        """Keep the interpreter busy in pure Python for `seconds`, on this thread, from right after the answer."""
        return Then(time.monotonic() + seconds, lambda: _spin(seconds))


def _spin(seconds: float) -> None:
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        count += 1


def rss_peak() -> int:
    """Return the most memory this process has held since the last `reset_rss_peak`, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def reset_rss_peak() -> int:
    """Start the peak afresh and return the memory held at this moment, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return rss_peak()


@contextmanager
def silence() -> Iterator[None]:
    """Keep a third party's chatter on standard output away from ours."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even while it is stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _connection() -> socket.socket:
    die_with_parent()
    return socket.socket(fileno=int(sys.argv[1]))


def _encode(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def serve(handler: Common) -> None:
    """Answer commands with the handler's methods until the orchestrator hangs up; then exit without clean-up."""
    connection = _connection()
    for line in connection.makefile("rb"):
        command = json.loads(line)
        after: Callable[[], None] | None = None
        try:
            result = getattr(handler, command.pop("do"))(**command)
            if isinstance(result, Then):
                after, result = result.work, result.result
            answer = _encode({"ok": result})
        except Exception:
            answer = _encode({"error": traceback.format_exc()})
        connection.sendall(answer)
        if after:
            after()
    # Peers' libraries are known to crash in their destructors; nothing of theirs is needed any more.
    os._exit(0)


async def serve_async(handler: Common) -> None:
    """Answer commands with the handler's methods, coroutines or not, on the running loop."""
    reader, writer = await asyncio.open_connection(sock=_connection(), limit=1 << 24)
    while line := await reader.readline():
        command = json.loads(line)
        after: Callable[[], None] | None = None
        try:
            result = getattr(handler, command.pop("do"))(**command)
            if asyncio.iscoroutine(result):
                result = await result
            if isinstance(result, Then):
                after, result = result.work, result.result
            answer = _encode({"ok": result})
        except Exception:
            answer = _encode({"error": traceback.format_exc()})
        writer.write(answer)
        await writer.drain()
        if after:
            after()
    writer.close()


async def serve_made(make: Callable[[], Any]) -> None:
    """Make a handler on the running loop, answer commands with its methods, and close it."""
    handler = make()
    try:
        await serve_async(handler)
    finally:
        await handler.aclose()

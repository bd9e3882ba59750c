"""What a member tells the drill of itself: lines of JSON on standard output, what it weighs, and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import threading
import traceback
from pathlib import Path
from typing import Any


def say(**message: Any) -> None:
    """Report to the drill; the first name says what it is about."""
    os.write(1, json.dumps(message).encode() + b"\n")


class Records(logging.Handler):
    """Reports what the library and asyncio log as errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Report one."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))[-1500:]
        say(log=f"{record.name}: {text}")


class Footprint:
    """What of this process outlives an agent that does not clean up."""

    def __init__(self) -> None:
        gc.collect()
        self.fds = {}
        for number in os.listdir("/proc/self/fd"):
            try:
                self.fds[number] = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
        self.threads = {thread.name for thread in threading.enumerate()}
        self.n_native = len(os.listdir("/proc/self/task"))
        self.tasks = len(asyncio.all_tasks())

    def grown(self, now: Footprint) -> list[str]:
        """Name what there is more of than before."""
        found = [f"fd {n}: {t}" for n, t in now.fds.items() if n not in self.fds] if len(now.fds) > len(self.fds) else []
        found += [f"thread {name}" for name in now.threads - self.threads]
        if now.n_native > self.n_native:
            found.append(f"{now.n_native - self.n_native} native threads")
        if now.tasks > self.tasks:
            found.append(f"{now.tasks - self.tasks} tasks")
        return found


def resident() -> int:
    """Return this process's resident memory, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def waits_at(task: asyncio.Task[Any] | None) -> str:
    """Return where a task waits, the innermost place last."""
    places, waiting = [], None if task is None else task.get_coro()
    while (code := getattr(waiting, "cr_code", None)) is not None:
        frame = getattr(waiting, "cr_frame", None)
        places.append(f"{code.co_qualname}:{frame.f_lineno if frame else '?'}")
        waiting = getattr(waiting, "cr_await", None)
    return " > ".join([*places, repr(waiting)])

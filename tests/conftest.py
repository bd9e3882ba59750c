"""Fixtures that every test gets: nothing may be left behind, and a hang ends."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Iterator

import pytest


def _descriptors() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        # The event loop's own, and pytest's capture files, come and go on their own account.
        if not target.startswith(("anon_inode:[eventpoll]", "/tmp", "/dev", "pipe:")):
            found.add(f"{number}:{target}")
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread or a file descriptor behind."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    gc.collect()
    left = {t for t in threading.enumerate() if t.name.startswith("nixl")} - threads
    assert not left, f"threads left behind: {left}"
    opened = {d.partition(":")[2] for d in _descriptors()} - {d.partition(":")[2] for d in descriptors}
    assert not opened, f"file descriptors left behind: {opened}"


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    """Fail a test that leaves a task behind."""
    yield
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert not left, f"tasks left behind: {left}"

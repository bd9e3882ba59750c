"""Tests side by side in several processes (pytest-xdist): their order, and those that must have the machine to themselves."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

LONGEST = (
    "tests/test_bench.py",
    "tests/benchmarks/test_transfer.py",
    "tests/test_churn.py",
    "tests/docs/test_pages.py",
    "tests/backends/test_storage_conformance.py",
    "tests/backends/test_conformance.py",
    "tests/test_cli.py",
    "tests/benchmarks/test_transfer_ranks.py",
    "tests/discovery/test_etcd_store.py",
    "tests/test_liveness.py",
    "tests/test_fastapi_disagg.py",
    "tests/compat/test_behaviours.py",
    "tests/test_leases.py",
    "tests/test_security.py",
    "tests/test_examples.py",
)
"""The files that take longest, the longest first."""
LONG_SECONDS = 45.0
"""A file that takes longer than this should be among them."""


class Turns:
    """Lets tests of several processes run side by side, and one that is `alone` only when no other does.

    Two locks on files: everyone holds `running`, shared or, when alone, exclusively; `waiting` is held until it is had, so that
    nobody begins while one waits to be alone.
    """

    def __init__(self, directory: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._running, self._waiting = (os.open(directory / name, flags, 0o600) for name in ("running", "waiting"))

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        """Wait for the turn of a test, and hold it until the block ends."""
        fcntl.flock(self._waiting, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.flock(self._waiting, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._running, fcntl.LOCK_UN)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within a turn, wait until the tests that run beside it have ended; the next begin after the block."""
        # Whoever waits holds up nobody that does the same.
        fcntl.flock(self._running, fcntl.LOCK_UN)
        fcntl.flock(self._waiting, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._running, fcntl.LOCK_EX)
        finally:
            fcntl.flock(self._waiting, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._running, fcntl.LOCK_SH)

    def close(self) -> None:
        """Take part no longer."""
        os.close(self._running)
        os.close(self._waiting)


def join(config: pytest.Config) -> Turns | None:
    """Take part in a run of several processes; `None` if this process runs all tests."""
    if not hasattr(config, "workerinput"):
        return None
    # The first process has loaded readline, which tells those it starts a terminal's size; what tests start has none.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    # What another process of the run leaves is told apart by its session, as that of all others on the machine is.
    os.setsid()
    # Each process has a directory of its own in that of the run.
    return Turns(Path(config.option.basetemp).parent)


def longest_first(items: list[pytest.Item]) -> None:
    """Order files so that no process is left with a long one at the end: `LONGEST`, then those of most tests."""
    counts = Counter(map(file_of, items))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(file_of(item), len(places)), -counts[file_of(item)], file_of(item)))


def file_of(item: pytest.Item | pytest.TestReport) -> str:
    """Return the file of a test, from the checkout's root."""
    return item.nodeid.partition("::")[0]

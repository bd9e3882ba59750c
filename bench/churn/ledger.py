"""Counters that outlive their process: a killed member's last figures are in a file that it had mapped."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_FORMAT = struct.Struct("<8q")
NBYTES = _FORMAT.size


class Count(NamedTuple):
    """What a member has begun and what became of it; the difference is under way. Requests make transfers, on either side."""

    requests: int = 0
    requests_done: int = 0
    requests_failed: int = 0
    transfers: int = 0
    transfers_done: int = 0
    transfers_failed: int = 0
    nbytes: int = 0
    pages_checked: int = 0

    @property
    def open_requests(self) -> int:
        """Requests without an outcome."""
        return self.requests - self.requests_done - self.requests_failed

    @property
    def open_transfers(self) -> int:
        """Transfers without an outcome."""
        return self.transfers - self.transfers_done - self.transfers_failed


class Ledger:
    """Counts into a file. Each counter is one aligned store: a process that is killed leaves no torn figure."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), NBYTES)
        self._values = memoryview(self._map).cast("q")

    def add(self, name: str, count: int = 1) -> None:
        """Add to a counter."""
        self._values[Count._fields.index(name)] += count

    def close(self) -> None:
        """Let go of the file."""
        self._values.release()
        self._map.close()


def create(path: Path) -> None:
    """Make a file for a member that is about to start."""
    path.write_bytes(bytes(NBYTES))


def read(path: Path) -> Count:
    """Return what a member has counted, dead or alive."""
    return Count(*_FORMAT.unpack(path.read_bytes()))

"""Who uses a directory of blocks: each process holds a lock file for as long as it lives, which tells the living from the dead."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Owners:
    """The processes that use `directory`, by the numbers that the index gave them. Everything here blocks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._own = 0
        self._fd = -1

    def make(self) -> None:
        """Make the directory."""
        (self._directory / "owners").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Keep other processes from opening the directory meanwhile."""
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @property
    def joined(self) -> bool:
        """Whether this process is one of them."""
        return self._fd >= 0

    def join(self, owner: int) -> None:
        """Be `owner` until `leave`, or the end of the process."""
        self._own = owner
        self._fd = os.open(self._path(owner), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def leave(self) -> None:
        """Take this process out, if it is in."""
        if self.joined:
            self.forget(self._own)
            os.close(self._fd)
            self._fd = -1

    def living(self) -> list[int]:
        """Return those that live."""
        names = os.listdir(self._directory / "owners")
        return [int(name) for name in names if name.isdecimal() and not self.is_dead(int(name))]

    def is_dead(self, owner: int) -> bool:
        """Tell whether nobody holds its lock."""
        try:
            fd = os.open(self._path(owner), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def forget(self, owner: int) -> None:
        """Remove its lock file."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(owner))

    def _path(self, owner: int) -> Path:
        return self._directory / "owners" / str(owner)

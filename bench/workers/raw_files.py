"""The machine's own limits for files: fio past the page cache, and one thread's preadv and pwritev through it.

The bench also has it write what the others read, and read what the others have written, past the page cache if they went past it:
what is in the cache is the contenders' business.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.worker import serve
from bench.workers.stored import Stored

IOVECS = 1024
FIO_DEPTH, FIO_LOOPS = 32, 8
"""As many requests in flight as one thread of ours has; one loop would end before fio is at speed."""


class RawFiles(Stored):
    """One file, and one thread or one run of fio."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Take memory."""
        self.allocate(nbytes)
        self.fd = -1

    def prepare(self) -> None:
        """Open the file."""
        if self.fd >= 0:
            os.close(self.fd)
        direct = os.O_DIRECT if self.where["direct"] else 0
        self.fd = os.open(self.where["path"], os.O_RDWR | os.O_CREAT | direct)

    def move(self) -> dict[str, float]:
        """Read or write every block once: in one run of fio, which moves its own bytes, or in a few calls."""
        if self.where["direct"]:
            return self._fio()
        call = os.pwritev if self.write else os.preadv
        with self.timed():
            self._all(call)
        return self.measured

    def store(self) -> None:
        """Write page n as block n, for others to read, and make sure it has arrived."""
        self._pieces(os.pwrite)
        os.fsync(self.fd)

    def fetch(self) -> None:
        """Read block n to page n, to see what others have written."""
        self.buffer.fill(0)
        self._pieces(lambda fd, view, offset: os.preadv(fd, [view], offset))

    def _pieces(self, call: Callable[[int, memoryview, int], int], step: int = 8 << 20) -> None:
        view = self.buffer.data
        for start in range(0, len(view), step):
            piece = view[start : start + step]
            if (count := call(self.fd, piece, start)) != len(piece):
                raise RuntimeError(f"{count} of {len(piece)} bytes at {start}")

    def _all(self, call: Any) -> None:
        pages = self.buffer.reshape(len(self.order), self.page_nbytes)
        listed = np.argsort(self.order).tolist()
        for first in range(0, len(listed), IOVECS):
            some = [pages[place] for place in listed[first : first + IOVECS]]
            wanted, start = len(some) * self.page_nbytes, first * self.page_nbytes
            if (count := call(self.fd, some, start)) != wanted:
                raise RuntimeError(f"{count} of {wanted} bytes at {start}")

    def has_fio(self) -> bool:
        """Tell whether fio is installed."""
        return shutil.which("fio") is not None

    def _fio(self) -> dict[str, float]:
        operation = ("rand" if not self.where["contiguous"] else "") + ("write" if self.write else "read")
        command = ["fio", "--name=bench", f"--filename={self.where['path']}", f"--rw={operation}", "--direct=1", "--thread"]
        command += ["--ioengine=io_uring", f"--iodepth={FIO_DEPTH}", f"--bs={self.page_nbytes}", f"--size={len(self.buffer)}"]
        command += ["--overwrite=1", "--fallocate=none", "--invalidate=0", f"--loops={FIO_LOOPS}", "--output-format=json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=os.path.dirname(self.where["path"]))
        if done.returncode:
            raise RuntimeError(f"fio ended with {done.returncode}: {done.stderr[-500:]}")
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        found = job["write" if self.write else "read"]
        if found["io_bytes"] != FIO_LOOPS * len(self.buffer):
            raise RuntimeError(f"fio moved {found['io_bytes']} bytes, not {FIO_LOOPS} times {len(self.buffer)}")
        # It counts whole milliseconds.
        seconds = max(1, found["runtime"]) / 1e3 / FIO_LOOPS
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
        return {"seconds": seconds, "cpu": cpu, "rss_growth": 0}


if __name__ == "__main__":
    serve(RawFiles())

"""Moves bytes between files and memory: the native file engine, and the threads it runs on. The file backends share it.

Each thread has an io_uring of its own, so that requests need no lock, and one thread keeps 64 requests in flight. The loop does not
submit them itself: a request that the page cache answers is copied while it is submitted, which would hold the loop for as long.
Where io_uring is forbidden (Docker's default seccomp profile), the threads read and write themselves.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nixl_async.backend import quiesce
from nixl_async.errors import BackendError, ConfigurationError
from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array

T = TypeVar("T")
DEPTH = 64
ENGINES = ("auto", "io_uring", "threads")


@dataclass(slots=True, eq=False)
class FileSegments:
    """What to move: `lengths[i]` bytes at `offsets[i]` of file `fds[i]`, from or to `addresses[i]`.

    `direct_fds[i]` is -1, or the same file opened past the page cache, whose alignment is (memory, offset) in bytes.
    """

    fds: NDArray[np.int32]
    direct_fds: NDArray[np.int32]
    offsets: Array
    addresses: Array
    lengths: Array
    alignment: tuple[int, int] = (4096, 4096)


class FileError(OSError):
    """An operating system's error, and the `segment` that met it."""

    segment: int = 0


class FileEngine:
    """Reads and writes segments on `n_threads` threads named after `name`; `engine` is one of `ENGINES`."""

    def __init__(self, name: str, n_threads: int, engine: str = "auto") -> None:
        if engine not in ENGINES:
            raise ConfigurationError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
        self._local = threading.local()
        self._rings: list[Any] = []
        self._lock = threading.Lock()
        self.why_threads = "" if engine != "threads" else "asked for"
        """Why there is no io_uring; empty if there is."""
        if engine != "threads":
            ring, error = _open_ring()
            if ring == ffi.NULL:
                self.why_threads = f"io_uring_setup: {os.strerror(error)}"
                if engine == "io_uring":
                    raise ConfigurationError(f"engine='io_uring', but the kernel refuses it: {os.strerror(error)}")
            else:
                lib.nx_ring_close(ring)
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(n_threads, thread_name_prefix=name)

    def close(self) -> None:
        """End the threads; nothing may be in flight."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
            for ring in self._rings:
                lib.nx_ring_close(ring)
            self._rings.clear()

    @property
    def how(self) -> str:
        """The engine in a few words."""
        return f"threads, no io_uring ({self.why_threads})" if self.why_threads else "io_uring"

    async def submit(self, work: Callable[[Any], T]) -> T:
        """Run `work(stop)` on a thread and wait for it to end, also when cancelled; `stop[0]` becomes 1 then."""
        stop = ffi.new("int32_t *")
        return await quiesce(self._start(work, stop), lambda: _set(stop))

    async def spread(self, work: Callable[[Any], None], n: int) -> None:
        """Run `work(stop)` on `n` threads at once and wait for all to end; `stop[0]` becomes 1 when cancelled, or one raises.

        The error of the one that raised first is raised.
        """
        if n == 1:
            return await self.submit(work)
        stop = ffi.new("int32_t *")
        failed: list[BaseException] = []

        def one(stop: Any) -> None:
            try:
                work(stop)
            except BaseException as error:
                failed.append(error)
                _set(stop)

        await quiesce(asyncio.gather(*(self._start(one, stop) for _ in range(n))), lambda: _set(stop))
        if failed:
            raise failed[0]

    def _start(self, work: Callable[[Any], T], stop: Any) -> asyncio.Future[T]:
        if self._threads is None:
            raise BackendError("the file engine is closed", backend="posix")
        return asyncio.get_running_loop().run_in_executor(self._threads, work, stop)

    def run(self, put: bool, segments: FileSegments, stop: Any) -> None:
        """Move segments, on one of the engine's threads.

        Raises:
            FileError: the operating system's error; ENODATA means that a file is shorter than was asked for.
            InterruptedError: `stop` was set.
        """
        failed = ffi.new("int64_t *")
        memory, offset = segments.alignment
        error = lib.nx_file_run(
            self._ring(),
            put,
            ffi.from_buffer("int32_t[]", segments.fds),
            ffi.from_buffer("int32_t[]", segments.direct_fds),
            int64(segments.offsets),
            int64(segments.addresses),
            int64(segments.lengths),
            len(segments.lengths),
            memory,
            offset,
            stop,
            failed,
        )
        if error == 0:
            return
        if -error == errno.ECANCELED:
            raise InterruptedError(errno.ECANCELED, "stopped")
        raised = FileError(-error, os.strerror(-error))
        raised.segment = failed[0]
        raise raised

    def _ring(self) -> Any:
        ring = getattr(self._local, "ring", None)
        if ring is None:
            ring = ffi.NULL
            if not self.why_threads:
                ring, _ = _open_ring()
                if ring != ffi.NULL:
                    with self._lock:
                        self._rings.append(ring)
            self._local.ring = ring
        return ring


def _open_ring() -> tuple[Any, int]:
    error = ffi.new("int *")
    return lib.nx_ring_open(DEPTH, error), error[0]


def _set(stop: Any) -> None:
    stop[0] = 1


def alignment(fd: int) -> tuple[int, int]:
    """Return what direct I/O needs of memory addresses and of file offsets, in bytes."""
    memory, offset = ffi.new("int64_t *"), ffi.new("int64_t *")
    lib.nx_file_align(fd, memory, offset)
    return memory[0], offset[0]


def strictest(direct_fds: Iterable[int]) -> tuple[int, int]:
    """Return an alignment that suits all of these files; -1 is none."""
    found = [alignment(fd) for fd in set(direct_fds) if fd >= 0]
    return max((memory for memory, _ in found), default=1), max((offset for _, offset in found), default=1)

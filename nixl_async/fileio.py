"""Moves bytes between files and memory: the native file engine, and the threads it runs on. The file backends share it.

Lanes are native threads that never take Python's lock; whole lists of segments go to them (`FileEngine.move`), and an eventfd wakes
the loop when they are moved. Work that has Python in it runs on ordinary threads (`submit`, `run`). Each thread has an io_uring of
its own, so that requests need no lock, and one thread keeps 64 requests in flight. The loop does not submit them itself: a request
that the page cache answers is copied while it is submitted, which would hold the loop for as long. Where io_uring is forbidden
(Docker's default seccomp profile), the threads read and write themselves.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
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
_ENDED_AT_ONCE = 64
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


@dataclass(slots=True, eq=False)
class SummedBlocks:
    """Blocks to move and sum up: block i is at `offsets[i]` of file `fds[i]`, and in the ranges `addresses[i, :]`, `lengths[i, :]`.

    `sums[i]` is continued; `moved[i]` becomes true if the block was moved whole.
    """

    fds: NDArray[np.int32]
    offsets: Array
    addresses: Array
    lengths: Array
    sums: NDArray[np.uint64]
    moved: NDArray[np.bool_]


class FileError(OSError):
    """An operating system's error, and the `segment` that met it."""

    segment: int = 0


@dataclass(slots=True, eq=False)
class _Moving:
    """What lanes work on. They use the arrays of `used`, which stay alive until it has ended."""

    ended: asyncio.Future[None]
    used: object


class FileEngine:
    """Reads and writes segments on `n_threads` lanes, and as many threads named after `name`; `engine` is one of `ENGINES`.

    Both start when they are first needed. `close` is called on the loop that `move` was awaited on, or after that loop is closed.
    """

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
        self._n_threads = n_threads
        self._threads: ThreadPoolExecutor | None = ThreadPoolExecutor(n_threads, thread_name_prefix=name)
        self._lanes: Any = ffi.NULL
        self._event_fd = -1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._moving: dict[int, _Moving] = {}
        self._job_ids = itertools.count(1)
        # What has ended, as C fills it in: ids, errors, the segments that met them.
        self._ended = ffi.new(f"int64_t[{3 * _ENDED_AT_ONCE}]")

    def close(self) -> None:
        """End the threads; nothing may be in flight."""
        if self._lanes != ffi.NULL:
            lib.nx_lanes_close(self._lanes)
            self._lanes = ffi.NULL
        if self._event_fd >= 0:
            self._detach()
            os.close(self._event_fd)
            self._event_fd = -1
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

    async def move(self, put: bool, segments: FileSegments, ways: int = 1) -> None:
        """Move segments on up to `ways` lanes at once; when cancelled, wait until nothing moves any more.

        Raises:
            FileError: the operating system's error; ENODATA means that a file is shorter than was asked for.
            BackendError: the engine is closed, or there is no memory for threads.
        """
        lanes = self._ready()
        await self._moved(
            segments,
            lambda job: lib.nx_lanes_submit(
                lanes,
                job,
                ways,
                put,
                *_pointers(segments),
                len(segments.lengths),
                int(segments.lengths.sum()),
                *segments.alignment,
            ),
        )

    async def copy(self, targets: Array, sources: Array, lengths: Array, ways: int = 1) -> None:
        """Copy memory, by addresses, on up to `ways` lanes at once; when cancelled, wait until nothing moves any more.

        Raises:
            BackendError: as `move`.
        """
        lanes, arrays = self._ready(), (targets, sources, lengths)
        pointers = tuple(int64(array) for array in arrays)
        await self._moved(arrays, lambda job: lib.nx_lanes_submit_copy(lanes, job, ways, *pointers, len(lengths)))

    async def summed(self, turn: Any, blocks: SummedBlocks, ways: int = 1) -> None:
        """Move blocks between files and memory and continue their checksums, as `nx_crc64nvme_move` says, on up to `ways` lanes.

        Which were moved, `blocks.moved` tells. When cancelled, wait until nothing moves any more.

        Raises:
            BackendError: as `move`.
        """
        lanes = self._ready()
        await self._moved(
            (turn, blocks),
            lambda job: lib.nx_lanes_submit_summed(
                lanes,
                job,
                ways,
                turn,
                ffi.from_buffer("int32_t[]", blocks.fds),
                int64(blocks.offsets),
                int64(blocks.addresses),
                int64(blocks.lengths),
                len(blocks.fds),
                blocks.addresses.shape[1],
                ffi.from_buffer("uint64_t[]", blocks.sums, require_writable=True),
                ffi.from_buffer("uint8_t[]", blocks.moved, require_writable=True),
            ),
        )

    def _ready(self) -> Any:
        """Return the lanes, which tell the running loop when a job has ended."""
        if self._threads is None:
            raise BackendError("the file engine is closed", backend="posix")
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._attach(loop)
        return self._lanes

    async def _moved(self, used: object, submit: Callable[[int], int]) -> None:
        """Have the lanes work on a job, which uses the arrays of `used` until it has ended."""
        lanes, job = self._lanes, next(self._job_ids)
        error = submit(job)
        if error:
            raise _file_error(error, 0)
        moving = self._moving[job] = _Moving(asyncio.get_running_loop().create_future(), used)
        await quiesce(moving.ended, lambda: lib.nx_lanes_cancel(lanes, job))

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._event_fd < 0:
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        if self._lanes == ffi.NULL:
            self._lanes = lib.nx_lanes_open(self._n_threads, not self.why_threads, DEPTH, self._event_fd)
            if self._lanes == ffi.NULL:
                raise BackendError("the operating system starts no thread for the file engine", backend="posix")
        self._detach()
        loop.add_reader(self._event_fd, self._take_ended)
        self._loop = loop

    def _detach(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._event_fd)
        self._loop = None

    def _take_ended(self) -> None:
        ids, errors, failed = (self._ended + i * _ENDED_AT_ONCE for i in range(3))
        n = _ENDED_AT_ONCE
        while n == _ENDED_AT_ONCE:
            n = lib.nx_lanes_done(self._lanes, ids, errors, failed, _ENDED_AT_ONCE)
            for i in range(n):
                ended = self._moving.pop(ids[i]).ended
                if ended.done():
                    continue
                if errors[i]:
                    ended.set_exception(_file_error(errors[i], failed[i]))
                else:
                    ended.set_result(None)

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
        error = lib.nx_file_run(self._ring(), put, *_pointers(segments), len(segments.lengths), memory, offset, stop, failed)
        if error:
            raise _file_error(error, failed[0])

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


def _pointers(segments: FileSegments) -> tuple[Any, Any, Any, Any, Any]:
    return (
        ffi.from_buffer("int32_t[]", segments.fds),
        ffi.from_buffer("int32_t[]", segments.direct_fds),
        int64(segments.offsets),
        int64(segments.addresses),
        int64(segments.lengths),
    )


def _file_error(error: int, segment: int) -> OSError:
    if -error == errno.ECANCELED:
        return InterruptedError(errno.ECANCELED, "stopped")
    made = FileError(-error, os.strerror(-error))
    made.segment = segment
    return made


def alignment(fd: int) -> tuple[int, int]:
    """Return what direct I/O needs of memory addresses and of file offsets, in bytes."""
    memory, offset = ffi.new("int64_t *"), ffi.new("int64_t *")
    lib.nx_file_align(fd, memory, offset)
    return memory[0], offset[0]


def strictest(direct_fds: Iterable[int]) -> tuple[int, int]:
    """Return an alignment that suits all of these files; -1 is none."""
    found = [alignment(fd) for fd in set(direct_fds) if fd >= 0]
    return max((memory for memory, _ in found), default=1), max((offset for _, offset in found), default=1)

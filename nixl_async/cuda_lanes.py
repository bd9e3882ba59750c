"""The lanes of a backend: launches by one thread, whose ends the event loop is told, and copies in chunks by several threads.

A launch ends for the loop when the driver, behind the work, has called compiled code that writes an eventfd (`native/wake.c`): no
thread waits for the device, and none spins. After an error of the device the driver calls nothing: while something is under way
the streams are asked twice a second.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nixl_async.backend import Begun
from nixl_async.cuda import check, entered, load_driver
from nixl_async.cuda_kernels import is_compiled, kernels
from nixl_async.cuda_lane import Lane
from nixl_async.errors import BackendError
from nixl_async.native import ffi, lib

if TYPE_CHECKING:
    from nixl_async.descriptors import Plan

_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_TOKENS = 64
_LOOK_SECONDS = 0.5
NOW_SEGMENTS = 32768
"""Launches of up to so many segments are made on the loop: they take it a fraction of a millisecond, a thread longer."""
CHUNK_SEGMENTS = 65536
BRIEF_NBYTES = 1 << 20
BRIEF_SECONDS = 40e-6
"""What is launched on the loop and is so little ends, on an idle device, before the loop could fall asleep: it looks for so long.

On machines whose cores sleep deeply, virtual ones above all, to be woken takes five times as long as such a copy.
"""
PATIENCE = 4
"""After so many looks in vain, while the device has other work, only one of `LOOKS_AGAIN` such launches is looked after."""
LOOKS_AGAIN = 64
READY_LANES = 2
"""How many lanes of each urgency are made before the first op."""


@dataclass(slots=True, eq=False)
class _Job:
    argument: Any
    device: int
    urgent: bool
    work: Callable[[Lane], None]
    future: asyncio.Future[None]
    brief: bool
    lane: Lane | None = None


def begun(launched: asyncio.Future[None]) -> bool | Begun:
    """Return what `Backend.copy_now` tells of a launch: that it has ended, or what waits for it, since it cannot be taken back."""
    return (launched.done() and not launched.exception()) or Begun(launched, lambda: None)


class Lanes:
    """The lanes of one backend on one event loop, made when they are needed.

    `n_threads` copy in chunks of `chunk_nbytes`; each uses as much pinned memory, and as much of the device's, and keeps it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, *, n_threads: int = 1, chunk_nbytes: int = 1 << 20) -> None:
        self.n_threads, self.chunk_nbytes = n_threads, chunk_nbytes
        self._loop = loop
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix=f"nixl-{name}-launch")
        self._threads = ThreadPoolExecutor(n_threads, thread_name_prefix=f"nixl-{name}")
        self._idle: dict[tuple[int, bool], list[Lane]] = {}
        self._prepared: dict[int, asyncio.Future[None]] = {}
        self._lock = threading.Lock()
        self._signals = lib.nx_signals_open()
        if self._signals == ffi.NULL:
            raise OSError("no eventfd for signals from CUDA streams; too many open files?")
        self._fd = lib.nx_signals_fd(self._signals)
        self._tokens = ffi.new("uint64_t[]", _TOKENS)
        self._jobs: dict[int, _Job] = {}
        self._next = 0
        self._patience, self._unseen = PATIENCE, 0
        self._timer: asyncio.TimerHandle | None = None
        loop.add_reader(self._fd, self._readable)

    async def aclose(self) -> None:
        """Free all lanes but those that something never let go of, and end the threads."""
        if self._timer is not None:
            self._timer.cancel()
        if self._idle:
            # Freeing device memory may wait for all that runs on the device.
            await self._loop.run_in_executor(self._launcher, self._free)
        self._launcher.shutdown()
        self._threads.shutdown()
        self._loop.remove_reader(self._fd)
        lib.nx_signals_close(self._signals)

    @property
    def launched(self) -> int:
        """How many launches have not ended."""
        return len(self._jobs)

    # Launches.

    async def prepare(self, device: int) -> None:
        """Compile and load the kernel for a device, and make some lanes, on a thread; at once if that has been done.

        Each of these may wait for all streams of the device, those included that stand still until a transfer has ended
        (`Transfer.wait_on`): that transfer must not need them first.
        """
        if device not in self._prepared:
            self._prepared[device] = self._loop.run_in_executor(self._launcher, self._make_ready, device)
        await asyncio.shield(self._prepared[device])

    def call(self, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Call a function of the driver on the launching thread, behind what was launched before."""
        return self._loop.run_in_executor(self._launcher, function, *arguments)

    def launch(
        self, device: int, work: Callable[[Lane], None], *, now: bool = False, urgent: bool = False, nbytes: int = 0
    ) -> asyncio.Future[None]:
        """Let `work` enqueue something on a lane of `device`; return a future that ends when that has ended on the device.

        `work` is called on the launching thread, or, with `now`, at once if a lane is idle. The future gets what `work` raises, or
        the device's error, once the lane is quiet. Of little that was launched at once, `nbytes` bytes, the end may be there when
        this returns.
        """
        self._next += 1
        argument = lib.nx_signals_add(self._signals, self._next)
        if argument == ffi.NULL:
            raise MemoryError("no memory for a signal from a CUDA stream")
        job = _Job(argument, device, urgent, work, self._loop.create_future(), 0 < nbytes <= BRIEF_NBYTES)
        self._jobs[self._next] = job
        if now and self._idle.get((device, urgent)) and is_compiled(device):
            self._enqueue(self._next, job, here=True)
        else:
            self._launcher.submit(self._enqueue, self._next, job)
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)
        return job.future

    def _make_ready(self, device: int) -> None:
        with suppress(BackendError), entered(device):
            kernels(device)
            for urgent in (False, True):
                for _ in range(READY_LANES):
                    self._give(Lane(device, self.chunk_nbytes, urgent))

    def _enqueue(self, token: int, job: _Job, here: bool = False) -> None:
        driver = load_driver()
        try:
            with entered(job.device):
                lane = job.lane = self._take(job.device, job.urgent)
                try:
                    job.work(lane)
                    if here and job.brief and self._ends_soon(lane):
                        lib.nx_signal_drop(job.argument)
                        self._ended(token, None)
                        return
                    function, argument = lib.nx_signal_function(), int(ffi.cast("uintptr_t", job.argument))
                    check(driver.cuLaunchHostFunc(lane.stream, function, argument), "a host function")
                except BaseException:
                    # What was enqueued before is on its way.
                    if lane.quiet():
                        self._give(lane)
                    job.lane = None
                    raise
        except BaseException as error:
            lib.nx_signal_drop(job.argument)
            self._tell(self._ended, token, error)

    def _ends_soon(self, lane: Lane) -> bool:
        """Look for a moment whether a lane's work ends, unless that was in vain of late."""
        if not self._patience:
            self._unseen = (self._unseen + 1) % LOOKS_AGAIN
            if self._unseen:
                return False
        ends = time.perf_counter() + BRIEF_SECONDS
        while (code := lane.query()) == _NOT_READY and time.perf_counter() < ends:
            pass
        check(0 if code == _NOT_READY else code, "copying")
        self._patience = max(0, self._patience - 1) if code else PATIENCE
        return code == 0

    def _readable(self) -> None:
        n = _TOKENS
        while n == _TOKENS:
            n = lib.nx_signals_collect(self._signals, self._tokens, _TOKENS)
            for index in range(n):
                self._ended(self._tokens[index], None)

    def _ended(self, token: int, error: BaseException | None) -> None:
        job = self._jobs.pop(token, None)
        if job is None:
            return
        # A lane that has failed is not used again.
        if job.lane is not None and error is None:
            self._give(job.lane)
        if not job.future.done():
            if error is None:
                job.future.set_result(None)
            else:
                job.future.set_exception(error)

    def _look(self) -> None:
        self._timer = None
        if self._jobs:
            self._launcher.submit(self._query, dict(self._jobs))
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)

    def _query(self, jobs: dict[int, _Job]) -> None:
        for token, job in jobs.items():
            if job.lane is not None and (code := job.lane.query()) not in (0, _NOT_READY):
                try:
                    check(code, "copying")
                except BackendError as error:
                    self._tell(self._ended, token, error)

    # Chunks.

    def in_chunks(self, plan: Plan, copy: Callable[[Plan], None]) -> tuple[asyncio.Future[None], Callable[[], None]]:
        """Call `copy` on several threads for the pieces of a plan, those of other plans in turn with them.

        Return a future that ends when no call is under way, and what lets no more calls begin.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        work = _Chunks(self, plan, copy, future)
        for _ in range(work.running):
            self._threads.submit(work.step)
        return future, work.stop

    @contextmanager
    def lane(self, device: int) -> Iterator[Lane]:
        """Lend a lane of a device, whose context is current meanwhile; whoever uses it waits for what it enqueues."""
        with entered(device):
            lane = self._take(device, False)
            try:
                yield lane
            except BaseException:
                if lane.quiet():
                    self._give(lane)
                raise
            self._give(lane)

    def _take(self, device: int, urgent: bool) -> Lane:
        with self._lock:
            idle = self._idle.setdefault((device, urgent), [])
            if idle:
                return idle.pop()
        return Lane(device, self.chunk_nbytes, urgent)

    def _give(self, lane: Lane) -> None:
        with self._lock:
            self._idle.setdefault((lane.device, lane.urgent), []).append(lane)

    def _free(self) -> None:
        for (device, _), idle in self._idle.items():
            with suppress(BackendError), entered(device):
                for lane in idle:
                    lane.free()
        self._idle.clear()

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        # Nobody waits once the loop is closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


class _Chunks:
    """The chunks of one plan, which several threads take in turn."""

    def __init__(self, lanes: Lanes, plan: Plan, copy: Callable[[Plan], None], future: asyncio.Future[None]) -> None:
        self._lanes, self._copy, self._future = lanes, copy, future
        self._chunks = plan.split(lanes.chunk_nbytes, CHUNK_SEGMENTS)
        self.running = max(1, min(lanes.n_threads, -(-plan.nbytes // lanes.chunk_nbytes)))
        self._lock = threading.Lock()
        self._stopped = False
        self._error: BaseException | None = None

    def stop(self) -> None:
        self._stopped = True

    def step(self) -> None:
        """Copy one chunk, and go to the end of the queue: the chunks of other plans come between."""
        try:
            with self._lock:
                chunk = None if self._stopped else next(self._chunks, None)
            if chunk is not None:
                self._copy(chunk)
                self._lanes._threads.submit(self.step)
                return
        except BaseException as error:
            self._error = self._error or error
            self._stopped = True
        with self._lock:
            self.running -= 1
            last = self.running == 0
        if last:
            self._lanes._tell(self._finish)

    def _finish(self) -> None:
        if self._future.done():
            return
        if self._error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(self._error)

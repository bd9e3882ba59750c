"""The lanes of a backend: launches by one thread, whose ends the event loop is told, and copies in chunks by several threads.

A launch ends for the loop when the driver, behind the work, has called compiled code that writes an eventfd (`native/wake.c`): no
thread waits for the device, and none spins. After an error of the device the driver calls nothing: while something is under way
the streams are asked twice a second.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nixl_async.backend import Begun
from nixl_async.cuda import check, entered, load_driver
from nixl_async.cuda_kernels import is_compiled, kernels
from nixl_async.cuda_lane import Described, Lane
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
WATCHED_SECONDS = 3e-3
"""What should end so soon, by the speed of what has ended before, the loop looks after between its callbacks; it does not sleep."""
WATCHED_NBYTES = 16 << 20
"""Launches of fewer bytes tell nothing of the speed."""
UNKNOWN_SPEED = 1.5e12
"""Bytes per second, until some have been moved."""
PATIENCE = 4
"""After so many looks in vain, while the device has other work, only one of `LOOKS_AGAIN` such launches is looked after."""
LOOKS_AGAIN = 64
READY_LANES = 2
"""How many lanes of each urgency are made before the first op."""


@dataclass(slots=True, eq=False)
class _Job:
    device: int
    urgent: bool
    work: Callable[[Lane], None] | None
    future: asyncio.Future[None]
    nbytes: int
    way: Hashable
    ended: Callable[[BaseException | None], BaseException | None] | None
    lane: Lane | None = None
    began: float = 0.0
    watched_until: float = 0.0


def begun(launched: asyncio.Future[None]) -> bool | Begun:
    """Return what `Backend.copy_now` tells of a launch: that it has ended, or what waits for it, since it cannot be taken back."""
    return (launched.done() and not launched.exception()) or Begun(launched, lambda: None)


def _error(code: int) -> BackendError | None:
    try:
        check(code, "copying")
    except BackendError as error:
        return error
    return None


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
        self._speeds: dict[Hashable, float] = {}
        self._watched: dict[int, _Job] = {}
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
        self,
        device: int,
        work: Callable[[Lane], None],
        *,
        now: bool = False,
        urgent: bool = False,
        nbytes: int = 0,
        way: Hashable = None,
        ended: Callable[[BaseException | None], BaseException | None] | None = None,
    ) -> asyncio.Future[None]:
        """Let `work` enqueue something on a lane of `device`; return a future that ends when that has ended on the device.

        `work` is called on the launching thread, or, with `now`, at once if a lane is idle. The future gets what `work` raises, or
        the device's error, once the lane is quiet, or what `ended` makes of that. Of little that was launched at once, `nbytes`
        bytes, the end may be there when this returns. `way` tells apart what is of different speed.
        """
        job = self._begin(device, work, urgent, nbytes, way, ended)
        if now and self._idle.get((device, urgent)) and is_compiled(device):
            self._enqueue(self._next, job, here=True)
        else:
            self._launcher.submit(self._enqueue, self._next, job)
            self._look_later()
        return job.future

    def send(
        self,
        device: int,
        described: Described,
        *,
        urgent: bool,
        nbytes: int,
        way: Hashable = None,
        ended: Callable[[BaseException | None], BaseException | None] | None = None,
    ) -> asyncio.Future[None]:
        """Launch the copy of what has been described to a device, at once if a lane is idle; see `launch`."""
        idle = self._idle.get((device, urgent))
        if not idle:
            return self.launch(device, lambda lane: lane.send(described), urgent=urgent, nbytes=nbytes, way=way, ended=ended)
        job, token = self._begin(device, None, urgent, nbytes, way, ended), self._next
        with self._lock:
            lane = job.lane = idle.pop()
        try:
            job.began = time.perf_counter()
            lane.send(described)
            self._await_end(token, job, lane, here=True)
        except BaseException as error:
            self._failed(token, job, lane, error)
        return job.future

    def _begin(
        self,
        device: int,
        work: Callable[[Lane], None] | None,
        urgent: bool,
        nbytes: int,
        way: Hashable,
        ended: Callable[[BaseException | None], BaseException | None] | None,
    ) -> _Job:
        self._next += 1
        job = self._jobs[self._next] = _Job(device, urgent, work, self._loop.create_future(), nbytes, (device, way), ended)
        return job

    def _make_ready(self, device: int) -> None:
        with suppress(BackendError), entered(device):
            kernels(device)
            for urgent in (False, True):
                for _ in range(READY_LANES):
                    self._give(Lane(device, self.chunk_nbytes, urgent))

    def _enqueue(self, token: int, job: _Job, here: bool = False) -> None:
        try:
            with entered(job.device):
                lane = job.lane = self._take(job.device, job.urgent)
                try:
                    assert job.work is not None
                    job.began = time.perf_counter()
                    job.work(lane)
                    self._await_end(token, job, lane, here)
                except BaseException as error:
                    self._failed(token, job, lane, error)
        except BaseException as error:
            self._tell(self._ended, token, error)

    def _await_end(self, token: int, job: _Job, lane: Lane, here: bool) -> None:
        """Arrange that the loop hears of the end of what has been enqueued."""
        if here and 0 < job.nbytes <= BRIEF_NBYTES and self._ends_soon(lane):
            self._ended(token, None)
        elif not self._is_watched(job):
            self._signal(token, lane)
            if here:
                self._look_later()
        elif here:
            self._watch(token, job)
        else:
            self._tell(self._watch, token, job)

    def _failed(self, token: int, job: _Job, lane: Lane, error: BaseException) -> None:
        # What was enqueued before is on its way.
        if lane.quiet():
            self._give(lane)
        job.lane = None
        self._tell(self._ended, token, error)

    def _ends_soon(self, lane: Lane) -> bool:
        """Look for a moment whether a lane's work ends, unless that was in vain of late."""
        if not self._may_look():
            return False
        ends = time.perf_counter() + BRIEF_SECONDS
        while (code := lane.query()) == _NOT_READY and time.perf_counter() < ends:
            pass
        check(0 if code == _NOT_READY else code, "copying")
        self._patience = max(0, self._patience - 1) if code else PATIENCE
        return code == 0

    def _may_look(self) -> bool:
        if not self._patience:
            self._unseen = (self._unseen + 1) % LOOKS_AGAIN
        return bool(self._patience) or not self._unseen

    def _signal(self, token: int, lane: Lane) -> None:
        """Let the driver tell of the end."""
        argument = lib.nx_signals_add(self._signals, token)
        if argument == ffi.NULL:
            raise MemoryError("no memory for a signal from a CUDA stream")
        function, pointer = lib.nx_signal_function(), int(ffi.cast("uintptr_t", argument))
        if code := load_driver().cuLaunchHostFunc(lane.stream, function, pointer):
            lib.nx_signal_drop(argument)
            check(code, "a host function")

    def _is_watched(self, job: _Job) -> bool:
        expected = job.nbytes / self._speeds.get(job.way, UNKNOWN_SPEED)
        if job.nbytes <= BRIEF_NBYTES or expected > WATCHED_SECONDS or not self._may_look():
            return False
        job.watched_until = time.perf_counter() + 2 * expected + BRIEF_SECONDS
        return True

    def _watch(self, token: int, job: _Job) -> None:
        if not self._watched:
            self._loop.call_soon(self._peek)
        self._watched[token] = job

    def _peek(self) -> None:
        """Ask of what is watched whether it has ended, and again when the loop has done what else there is; not for too long."""
        for token, job in list(self._watched.items()):
            if job.lane is None or token not in self._watched:
                continue
            code = job.lane.query()
            if code != _NOT_READY:
                self._patience = PATIENCE
                self._ended(token, _error(code))
            elif time.perf_counter() >= job.watched_until:
                del self._watched[token]
                self._patience = max(0, self._patience - 1)
                self._sleep_on(token, job, job.lane)
        if self._watched:
            self._loop.call_soon(self._peek)

    def _sleep_on(self, token: int, job: _Job, lane: Lane) -> None:
        try:
            self._signal(token, lane)
            self._look_later()
        except (BackendError, MemoryError) as error:
            # Bytes may move until the lane is quiet, and waiting for that takes a thread.
            self._launcher.submit(self._failed, token, job, lane, error)

    def _readable(self) -> None:
        n = _TOKENS
        while n == _TOKENS:
            n = lib.nx_signals_collect(self._signals, self._tokens, _TOKENS)
            for index in range(n):
                self._ended(self._tokens[index], None)

    def _ended(self, token: int, error: BaseException | None) -> None:
        job = self._jobs.pop(token, None)
        self._watched.pop(token, None)
        if job is None:
            return
        # A lane that has failed is not used again.
        if job.lane is not None and error is None:
            self._give(job.lane)
            if job.nbytes >= WATCHED_NBYTES:
                speed = job.nbytes / (time.perf_counter() - job.began)
                self._speeds[job.way] = max(speed, self._speeds.get(job.way, 0.0) * 0.9 + speed * 0.1)
        if job.ended is not None:
            error = job.ended(error)
        if not job.future.done():
            if error is None:
                job.future.set_result(None)
            else:
                job.future.set_exception(error)

    def _look_later(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._jobs:
            self._launcher.submit(self._query, dict(self._jobs))
            self._look_later()

    def _query(self, jobs: dict[int, _Job]) -> None:
        for token, job in jobs.items():
            if job.lane is not None and (code := job.lane.query()) not in (0, _NOT_READY):
                self._tell(self._ended, token, _error(code))

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

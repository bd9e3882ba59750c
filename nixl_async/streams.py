"""Compute streams: what a transfer waits for before it reads, and what waits for a transfer before it computes.

Work on a stream runs in the order in which it was put there: a CUDA stream's on the device, a `CPUStream`'s on a thread. A point
of a stream is reached when all that was put there before has ended.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from nixl_async.errors import ClosedError

if TYPE_CHECKING:
    from nixl_async.cuda_streams import CUDAStreams


class CPUEvent:
    """A point in the work of a `CPUStream`, as a CUDA event is one of a CUDA stream's. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reached = threading.Event()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether it has been reached."""
        return self._reached.is_set()

    def set(self) -> None:
        """Reach it. Idempotent."""
        with self._lock:
            self._reached.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def synchronize(self) -> None:
        """Block the calling thread until it is reached."""
        self._reached.wait()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the thread that reaches the event; at once if it is reached already."""
        with self._lock:
            if not self._reached.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def remove_done_callback(self, callback: Callable[[], None]) -> None:
        """Take a callback back."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)


class CPUStream:
    """A compute stream without a device: a thread that runs what it is given in order. Its methods are called as cupy's are.

    Use it as a context manager, or `close` it: leaving waits for what was launched.
    """

    def __init__(self, name: str = "compute") -> None:
        self.name = name
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"nixl-stream-{name}", daemon=True)
        self._thread.start()
        self._closed = False

    def __repr__(self) -> str:
        return f"<CPUStream {self.name!r}{' closed' if self._closed else ''}>"

    def launch(self, function: Callable[..., object], *arguments: object) -> None:
        """Let the stream call `function` when all that was launched before has ended.

        After a function has raised, no later one is called; `synchronize` raises what it raised. Events are still reached.
        """
        self._put(partial(self._call, partial(function, *arguments)))

    def record(self, event: CPUEvent | None = None) -> CPUEvent:
        """Put a point behind what was launched so far and return it."""
        event = CPUEvent() if event is None else event
        self._put(event.set)
        return event

    def wait_event(self, event: CPUEvent) -> None:
        """Let what is launched later wait until `event` is reached."""
        self._put(event.synchronize)

    def synchronize(self) -> None:
        """Block the calling thread until all that was launched so far has ended; raise what a function of it raised."""
        self.record().synchronize()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for what was launched, and end the thread. Idempotent."""
        if not self._closed:
            self._closed = True
            self._work.put(None)
            self._thread.join()

    def __enter__(self) -> CPUStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(self, work: Callable[[], object]) -> None:
        if self._closed:
            raise ClosedError(f"stream {self.name!r} is closed; make a new CPUStream")
        self._work.put(work)

    def _call(self, function: Callable[[], object]) -> None:
        if self._error is None:
            try:
                function()
            except BaseException as error:
                self._error = error

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class Streams:
    """Connects one event loop with compute streams: points to futures, and transfers to what a stream waits for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._cuda: CUDAStreams | None = None

    def close(self) -> None:
        """Forget what is waited for."""
        if self._cuda is not None:
            self._cuda.close()
            self._cuda = None

    def reached(self, point: object) -> asyncio.Future[Any] | None:
        """Return a future that ends when `point` is reached, and can be cancelled without effect on it; None if it is already.

        `point` is a CUDA stream (all that is on it so far), a CUDA event, a `CPUStream`, a `CPUEvent`, any awaitable, or a list or
        tuple of these. A coroutine is run, and is cancelled with the future; other awaitables are only watched.

        Raises:
            TypeError: it is none of these.
            MissingDependency: it is a CUDA stream or event, and there is no CUDA driver.
        """
        if isinstance(point, list | tuple):
            futures = [future for future in map(self.reached, point) if future is not None]
            return asyncio.gather(*futures) if futures else None
        if isinstance(point, CPUStream):
            point = point.record()
        if isinstance(point, CPUEvent):
            return None if point.done else self._watch(point)
        if inspect.iscoroutine(point):
            return self._loop.create_task(point)
        if asyncio.isfuture(point):
            return self._follow(point)
        if inspect.isawaitable(point):
            if (watch := getattr(point, "watch", None)) is not None:
                # A transfer: to cancel an await of it would cancel the transfer.
                return self._loop.create_task(watch())
            return self._follow(asyncio.ensure_future(_run(point), loop=self._loop))
        handle = _cuda(point)
        if handle is None:
            raise TypeError(
                f"{point!r} is nothing that a transfer can wait for; give a CUDA stream or event (cupy, torch, __cuda_stream__),"
                " a CPUStream, a CPUEvent, an awaitable, or a list of these"
            )
        return self._of_cuda().reached(*handle)

    def mark(self, point: object) -> object:
        """Return what `reached` takes later in the place of `point`: of a stream, the point to which it has been filled so far.

        None if that has been reached already. Events and awaitables are returned as they are; lists one by one.

        Raises:
            MissingDependency: `point` is a CUDA stream, and there is no CUDA driver.
        """
        if isinstance(point, list | tuple):
            return [one for one in map(self.mark, point) if one is not None]
        if isinstance(point, CPUStream):
            return point.record()
        if point is None or isinstance(point, CPUEvent) or inspect.isawaitable(point):
            return point
        handle = _cuda(point)
        return point if handle is None or not handle[1] else self._of_cuda().reached(*handle)

    def hold(self, stream: object) -> Callable[[], None]:
        """Let what is put on `stream` from here on wait until the returned function is called, once, on the loop's thread.

        Raises:
            TypeError: it is neither a CUDA stream nor a `CPUStream`.
            MissingDependency: it is a CUDA stream, and there is no driver, or it cannot let a stream wait for memory.
        """
        if isinstance(stream, CPUStream):
            event = CPUEvent()
            stream.wait_event(event)
            return event.set
        handle = _cuda(stream)
        if handle is None or not handle[1]:
            raise TypeError(f"{stream!r} is not a stream; give a CUDA stream (cupy, torch, __cuda_stream__) or a CPUStream")
        return self._of_cuda().hold(handle[0])

    def _watch(self, event: CPUEvent) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def reached() -> None:
            # The loop may have been closed meanwhile: then nobody waits any more.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(settle)

        future.add_done_callback(lambda _: event.remove_done_callback(reached))
        event.add_done_callback(reached)
        return future

    def _follow(self, watched: asyncio.Future[Any]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()

        def settle(ended: asyncio.Future[Any]) -> None:
            if future.done():
                return
            if ended.cancelled():
                future.cancel()
            elif (error := ended.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(None)

        watched.add_done_callback(settle)
        future.add_done_callback(lambda _: watched.remove_done_callback(settle))
        return future

    def _of_cuda(self) -> CUDAStreams:
        if self._cuda is None:
            from nixl_async.cuda_streams import CUDAStreams

            self._cuda = CUDAStreams(self._loop)
        return self._cuda


async def _run(awaitable: Any) -> Any:
    return await awaitable


def _cuda(point: Any) -> tuple[int, bool] | None:
    """Return the handle of a CUDA stream or event, and whether it is a stream; `None` for anything else."""
    protocol = getattr(point, "__cuda_stream__", None)
    if protocol is not None:
        # CUDA Python, "Stream protocol": (version, handle).
        return int(protocol()[1]), True
    for attribute, is_stream in (("cuda_stream", True), ("cuda_event", False)):
        if isinstance(handle := getattr(point, attribute, None), int):
            return handle, is_stream
    if isinstance(handle := getattr(point, "ptr", None), int):
        if hasattr(point, "wait_event"):
            return handle, True
        if hasattr(point, "synchronize"):
            return handle, False
    return None

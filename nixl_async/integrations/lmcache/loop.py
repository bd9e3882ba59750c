"""An event loop on a thread of its own for callers on other threads: LMCache's controllers, workers and loops call from theirs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from nixl_async import ClosedError
from nixl_async.backend import quiesce

T = TypeVar("T")


class Call(Generic[T]):
    """A coroutine that runs on the thread's loop. `future` ends when the coroutine has ended, cancelled or not, never before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> None:
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()
        self._loop = loop
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        """Start it; called on the loop."""
        self._task = self._loop.create_task(self._coroutine)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.future.set_exception(ClosedError("the call was cancelled"))
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())

    def cancel(self) -> None:
        """Ask for its end, from any thread; `future` tells when nothing moves any more."""
        # One turn later: a coroutine that is cancelled before its first step cannot give back what it was given.
        self._loop.call_soon_threadsafe(lambda: self._loop.call_soon(lambda: self._task and self._task.cancel()))

    def result(self) -> T:
        """Block this thread until it has ended; return its result or raise its error.

        Raises:
            RuntimeError: this is the loop's own thread, which would wait for itself.
        """
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            return self.future.result()
        if here is self._loop:
            raise RuntimeError(
                "a call on this thread's own loop cannot be waited for here; await it, or call from another thread"
            )
        return self.future.result()

    async def wait(self) -> T:
        """Await it on another loop. Cancelling that cancels the call, and returns when the call has ended."""
        return await quiesce(asyncio.wrap_future(self.future), self.cancel)


class LoopThread:
    """Runs coroutines for other threads, in the order of their submission, until it is stopped."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._name = name
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def current(self) -> bool:
        """Whether the caller is on this thread, and so must not wait for it."""
        return threading.current_thread() is self._thread

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Call[T]:
        """Start a coroutine on the loop.

        Raises:
            ClosedError: the thread is stopped; the coroutine is closed then.
        """
        call = Call(self.loop, coroutine)
        with self._lock:
            if not self._stopped:
                self.loop.call_soon_threadsafe(call.start)
                return call
        coroutine.close()
        raise ClosedError(f"{self._name} is closed; make a new one")

    def stop(self, last: Coroutine[Any, Any, Any] | None = None) -> None:
        """Refuse new calls, run `last` to its end, and end the thread. Idempotent.

        `last` must see to the end of the calls under way.
        """
        with self._lock:
            if self._stopped:
                if last is not None:
                    last.close()
                return
            self._stopped = True
            call = None if last is None else Call(self.loop, last)
            if call is not None:
                self.loop.call_soon_threadsafe(call.start)
        try:
            if call is not None:
                call.result()
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

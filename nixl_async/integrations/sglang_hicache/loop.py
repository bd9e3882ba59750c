"""A loop on a thread of its own, for a backend whose callers' threads block: it sleeps while nothing is asked of it.

Nothing here imports SGLang.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - its end of the process is registered before ours, and comes after it
import logging
import os
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from nixl_async.errors import ClosedError

T = TypeVar("T")
logger = logging.getLogger("nixl_async.sglang_hicache")


class LoopThread:
    """Runs coroutines for other threads, any number at once; uvloop's loop where it is installed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = _new_loop()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            # Whoever waits for one of them gets its cancellation.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for its result; if the wait is interrupted, until it has been cancelled and ended.

        Raises:
            ClosedError: the thread has ended, or this is the thread itself.
        """
        ended = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            task = self._loop.create_task(work)
            task.add_done_callback(lambda _: ended.set())
            tasks.append(task)

        with self._lock:
            if self._closing or not self._thread.is_alive() or threading.current_thread() is self._thread:
                work.close()
                raise ClosedError(f"the loop of {self._name} is closed, or this is its own thread")
            self._loop.call_soon_threadsafe(start)
        try:
            ended.wait()
        except BaseException:
            # Its memory is the caller's again: nothing may move in it.
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            raise
        if tasks[0].cancelled():
            raise ClosedError(f"the loop of {self._name} was closed meanwhile")
        return tasks[0].result()

    def close(self) -> None:
        """End the thread, after cancelling what still runs on it. Idempotent."""
        with self._lock:
            if not self._closing and self._thread.is_alive():
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._closing = True
        self._thread.join()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


OPEN: weakref.WeakSet[Any] = weakref.WeakSet()
"""What is to be closed before the process ends."""


def _close_all() -> None:
    for one in list(OPEN):
        try:
            one.close()
        except Exception:
            logger.exception("closing %r at the end of the process failed", one)


# `atexit` is too late: executors take no more work by then, and what is queued could not be written.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
# A child that was forked has not the threads of its parent.
os.register_at_fork(after_in_child=OPEN.clear)

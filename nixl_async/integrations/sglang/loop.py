"""An event loop on a thread of its own, for SGLang's scheduler, whose threads know nothing of asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger(__name__)


class LoopThread:
    """Runs one event loop on a daemon thread until `close`; the thread sleeps while nothing happens. Any thread may call it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine there, wait for it and return its result; cancel it after `timeout` seconds.

        Raises:
            TimeoutError: it took longer.
        """
        return asyncio.run_coroutine_threadsafe(_within(work, timeout), self._loop).result()

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function there soon, after all that was asked for before; nothing happens once the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.debug("%r was asked for after the end", function)

    def spawn(self, work: Coroutine[Any, Any, T], *, watched: bool = False) -> asyncio.Task[T]:
        """Start a task; called on the loop's own thread. Its exception is logged, unless it is `watched` by the caller."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard if watched else self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_coro(), exc_info=error)

    def close(self, last: Coroutine[Any, Any, Any], timeout: float) -> None:
        """Run a last coroutine for at most `timeout` seconds, cancel the tasks and end the thread."""
        try:
            self.run(last, timeout)
        except TimeoutError:
            logger.warning("closing took longer than %g s", timeout)
        finally:
            try:
                self.run(self._cancel_all(), timeout)
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join(timeout)

    async def _cancel_all(self) -> None:
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _within(work: Coroutine[Any, Any, T], timeout: float | None) -> T:
    async with asyncio.timeout(timeout):
        return await work

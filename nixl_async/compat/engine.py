"""The loop that all drop-in agents of a process share: asyncio on one thread, which sleeps while nothing happens.

Callers are other threads, with event loops of their own or without; they cross over by `run` and wait, or by `call` and go on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from nixl_async.compat.errors import nixlUnknownError, refusal

T = TypeVar("T")
LEAVE_SECONDS = 1.0
"""How long whoever drops the last reference to an agent waits until it is closed."""
EXIT_SECONDS = 3.0
"""How long the end of a process waits for agents to part from their peers."""


class Bell:
    """Wakes whoever waits; rung before anybody does, it makes the next wait short. Cheaper than `threading.Event`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float) -> None:
        """Wait until it rings, or `seconds` are over; other threads run meanwhile."""
        self._lock.acquire(timeout=seconds)

    def ring(self) -> None:
        """Wake one who waits."""
        if self._lock.locked():
            try:
                self._lock.release()
            except RuntimeError:
                # Another thread rang in between.
                return


class Engine:
    """Runs the loop while somebody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: set[Callable[[], Coroutine[Any, Any, None]]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def enter(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Add a user, whom `close` ends when the process does; start the thread if there is none."""
        with self._lock:
            self._users.add(close)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._work, args=(self._loop,), name="nixl-compat", daemon=True)
                self._thread.start()

    def leave(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Close a user's agents, and let the thread end when there is no user left.

        The memory of who leaves may be freed next: this waits for the close, on the loop's own thread excepted, but not for ever.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        closed = Bell()

        async def work() -> None:
            try:
                await self._leave(close)
            finally:
                closed.ring()

        try:
            loop.call_soon_threadsafe(lambda: loop.create_task(work()))
        except RuntimeError:
            return
        if not self.inside():
            closed.wait(LEAVE_SECONDS)

    async def _leave(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await close()
        finally:
            with self._lock:
                self._users.discard(close)
                if not self._users and self._loop is not None:
                    self._loop.stop()
                    self._loop = self._thread = None

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    def inside(self) -> bool:
        """Tell whether the caller is the loop's own thread, where a garbage collector may run anything."""
        return threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for its result.

        Raises:
            nixlUnknownError: there is no loop: this process was forked after its agents were made, or is about to end.
        """
        loop = self._loop
        if loop is None or self.inside():
            work.close()
            raise refusal(nixlUnknownError, "this process has no engine: make agents after a fork, not before")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have the loop call a function soon; dropped when there is no loop any more."""
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(function, *arguments)
            except RuntimeError:
                # It was closed meanwhile.
                return

    def shut_down(self) -> None:
        """Close every user's agents and end the thread; for the end of the process."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        for close in list(self._users):
            asyncio.run_coroutine_threadsafe(self._leave(close), loop)
        thread.join(EXIT_SECONDS)

    def forget(self) -> None:
        """Begin anew in a child that was forked: its parent's thread is not there."""
        self.__init__()  # type: ignore[misc]


ENGINE = Engine()
# Before the executors end, which those who close need: they are told in the same way, and who comes last is told first.
threading._register_atexit(ENGINE.shut_down)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=ENGINE.forget)

"""Cancel a coroutine at each place where it waits, the way asyncio does it."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any


async def cancel_at_await(coroutine: Coroutine[Any, Any, Any], at: int, *, times: int = 1) -> bool:
    """Run `coroutine` as a task and cancel it when it waits for the `at`-th time (from 0); return whether it got so far.

    `times` more cancellations follow, one each time it waits again. The outcome is swallowed if it is a
    cancellation; other errors are raised.
    """
    loop = asyncio.get_running_loop()
    reached = False

    def cancel() -> None:
        nonlocal reached
        reached = True
        task.cancel()

    def waiting(point: int) -> None:
        # Later, because the task has not yet stored the future that it is about to wait for.
        if at <= point < at + times:
            loop.call_soon(cancel)

    task = loop.create_task(_watched(coroutine, waiting))
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return reached


async def cancel_after(coroutine: Coroutine[Any, Any, Any], seconds: float) -> bool:
    """Run `coroutine` as a task and cancel it `seconds` after it began; return whether the cancellation came first."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(coroutine)
    handle = loop.call_later(seconds, task.cancel)
    await asyncio.wait([task])
    handle.cancel()
    if task.cancelled():
        return True
    task.result()
    return False


async def _watched(coroutine: Coroutine[Any, Any, Any], waiting: Callable[[int], None]) -> Any:
    return await _drive(coroutine, waiting)


@types.coroutine
def _drive(coroutine: Coroutine[Any, Any, Any], waiting: Callable[[int], None]) -> Generator[Any, Any, Any]:
    point = 0
    error: BaseException | None = None
    while True:
        try:
            future = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration as end:
            return end.value
        waiting(point)
        point += 1
        error = None
        try:
            yield future
        except BaseException as thrown:
            error = thrown

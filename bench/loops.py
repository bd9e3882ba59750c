"""Watch an event loop: the CPU that its thread spends in each iteration, and how late a ticker is woken."""

from __future__ import annotations

import asyncio
import contextlib
import time

from nixl_async.demo.stall import TimedSelector

__all__ = ["TimedSelector", "Watch"]

TICK_SECONDS = 0.001


class Watch:
    """Records loop iterations and ticker lag between `start` and `stop` on a loop that uses a `TimedSelector`."""

    def __init__(self, selector: TimedSelector) -> None:
        self._selector = selector
        self._lags: list[float] = []
        self._ticker: asyncio.Task[None] | None = None
        self._due = float("inf")

    def start(self, *, ticker: bool) -> None:
        """Begin recording; `ticker` measures lag, and adds its own cheap iterations to the others."""
        self._selector.iterations, self._lags = [], []
        self._ticker = asyncio.get_running_loop().create_task(self._tick()) if ticker else None

    async def stop(self) -> dict[str, list[float]]:
        """End recording; return the iterations' CPU times and the ticks' lags, all in seconds."""
        if self._ticker is not None:
            # A loop that was blocked until here has kept a tick waiting, which counts too.
            self._lags.append(max(0.0, time.perf_counter() - self._due))
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        return {"cpu": [nanoseconds / 1e9 for nanoseconds in self._selector.finish()], "lag": self._lags}

    async def _tick(self) -> None:
        while True:
            self._due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._lags.append(time.perf_counter() - self._due)

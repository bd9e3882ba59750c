"""Measure how long an event loop's iterations keep its thread busy."""

from __future__ import annotations

import selectors
import time
from typing import Any


class TimedSelector(selectors.DefaultSelector):
    """Notes the thread CPU time from the end of one `select` to the start of the next: one loop iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.iterations: list[int] | None = None
        self._left = 0

    def select(self, timeout: float | None = None) -> Any:
        """Wait for events as the base class does."""
        if self.iterations is not None and self._left:
            self.iterations.append(time.thread_time_ns() - self._left)
        events = super().select(timeout)
        self._left = time.thread_time_ns() if self.iterations is not None else 0
        return events

    def finish(self) -> list[int]:
        """Stop noting; return what was noted in nanoseconds, the iteration under way included."""
        if self.iterations is None:
            return []
        if self._left:
            self.iterations.append(time.thread_time_ns() - self._left)
        found, self.iterations, self._left = self.iterations, None, 0
        return found


def p999_seconds(iterations: list[int]) -> float:
    """Return the 99.9th percentile of nanoseconds, in seconds."""
    if not iterations:
        return 0.0
    ordered = sorted(iterations)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.999))] * 1e-9

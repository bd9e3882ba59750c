"""Bytes that show where they came from, and memory that shows when somebody writes to it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes: TypeAlias = NDArray[np.uint8]

CANARY = 0xA5
POISON = 0xEE
WATCH_SECONDS = 0.03


def pattern(nbytes: int, seed: int = 0) -> Bytes:
    """Return `nbytes` writable bytes that are the same for the same seed, and differ from place to place and seed to seed."""
    return np.frombuffer(bytearray(np.random.Generator(np.random.SFC64(seed)).bytes(nbytes)), np.uint8)


def assert_same(actual: Bytes, expected: Bytes, what: str = "destination") -> None:
    """Compare byte for byte.

    Raises:
        AssertionError: they differ; the message says how many bytes do, and where the first is.
    """
    assert len(actual) == len(expected), f"{what} has {len(actual)} bytes where {len(expected)} were expected"
    if not np.array_equal(actual, expected):
        wrong = np.flatnonzero(actual != expected)
        first = int(wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {len(actual)} bytes are wrong, the first at {first}: {actual[first]:#04x} instead of"
            f" {expected[first]:#04x}"
        )


class Canary:
    """Memory that nobody may write to any more: fills `dst`, poisons `src`, and later tells whether `dst` was written."""

    def __init__(self, dst: Bytes, src: Bytes | None = None) -> None:
        self._dst = dst
        dst[:] = CANARY
        if src is not None:
            src[:] = POISON

    def check(self) -> None:
        """Raise `AssertionError` if the memory was written to."""
        assert_same(self._dst, np.full(len(self._dst), CANARY, np.uint8), "memory that must not be written any more")

    async def watch(self, seconds: float = WATCH_SECONDS) -> None:
        """Look after `seconds` too, for writes that come late."""
        self.check()
        await asyncio.sleep(seconds)
        self.check()

"""Memory of a rank, and bytes that show where they belong and when they were written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np

from nixl_async.benchmarks.kv.matrices import VRAM
from nixl_async.errors import ConfigurationError, MissingDependency
from nixl_async.planner import Pair

# numpy's arrays or cupy's, which do the same.
Array: TypeAlias = Any
T = TypeVar("T")

WORD = 8
CHUNK_NBYTES = 4 << 20
_PLACE, _WORD, _SALT = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_MODULUS = 1 << 64


class WrongBytes(AssertionError):
    """Say that a transfer reported success and left other bytes than the source's."""


class Memory:
    """Where a rank's buffers are: host memory, or a CUDA device's, the ranks spread over the devices."""

    def __init__(self, kind: str, rank: int = 0) -> None:
        self.kind = kind
        self.xp: Any = np
        self._device: Any = None
        if kind == VRAM:
            try:
                import cupy
            except ImportError:
                raise MissingDependency("VRAM needs cupy: pip install 'nixl-async[cu12]'") from None
            self.xp, self._device = cupy, cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount())

    def allocate(self, nbytes: int) -> Array:
        """Return bytes that are mapped."""
        if self._device is None:
            return np.full(nbytes, 0x5A, np.uint8)
        with self._device:
            return self.xp.full(nbytes, 0x5A, self.xp.uint8)

    async def run(self, work: Callable[[], T]) -> T:
        """Do work on the buffers on a thread of its own; when this returns, a device has done it too."""

        def run() -> T:
            if self._device is None:
                return work()
            with self._device:
                result = work()
                self._device.synchronize()
            return result

        return await asyncio.to_thread(run)


def find_memory(wanted: str | None) -> str:
    """Return `vram` or `dram`: what is wanted; where nothing is, VRAM if there is a CUDA device that cupy can use.

    Raises:
        ConfigurationError: VRAM is wanted, and there is none.
    """
    if wanted is not None and wanted != VRAM:
        return wanted
    try:
        import cupy

        count, why = cupy.cuda.runtime.getDeviceCount(), "there is no CUDA device"
    except Exception as error:
        # cupy raises its own class where there is no driver.
        count, why = 0, f"cupy is not to be had ({error})"
    if count:
        return VRAM
    if wanted == VRAM:
        raise ConfigurationError(f"the patterns are for VRAM, and {why}; --memory dram runs them in host memory")
    return "dram"


class Cache:
    """A rank's pool of pages, and what the part of it that a pair of ranks moves must hold.

    Reckoned apart from the planner, which it judges: by the pool's shape and the numbers of page, layer, head and token.
    """

    def __init__(self, pair: Pair, *, source: bool, blocks: int, table: np.ndarray[Any, Any], memory: Memory) -> None:
        shard = pair.src if source else pair.dst
        lengths = {"block": blocks, **shard.lengths}
        axes = shard.sharding.axes
        self.memory, self.pair, self.table = memory, pair, table
        self.nbytes = blocks * shard.block_nbytes
        self.buffer = memory.allocate(self.nbytes)
        shape = [*(lengths[axis] for axis in axes), shard.geometry.row_nbytes]
        order = [*(axes.index(axis) for axis in ("block", "layer", "kv", "token", "head")), len(axes)]
        layers = slice(pair.layers.start - shard.layers.start, pair.layers.stop - shard.layers.start)
        heads = slice(pair.heads.start - shard.heads.start, pair.heads.stop - shard.heads.start)
        self._view = self.buffer.reshape(shape).transpose(order)[:, layers, :, :, heads]
        each = int(np.prod(self._view.shape[1:]))
        self._chunks = [
            (at, min(at + max(1, CHUNK_NBYTES // each), len(table)))
            for at in range(0, len(table), max(1, CHUNK_NBYTES // each))
        ]

    def _expected(self, first: int, last: int, salt: int) -> Array:
        xp, geometry = self.memory.xp, self.pair.src.geometry
        tokens = self._view.shape[3]
        place = xp.arange(first, last, dtype=xp.uint64)
        for numbers, length in (
            (self.pair.layers, geometry.layers),
            (range(geometry.kv), geometry.kv),
            (range(tokens), tokens),
            (self.pair.heads, geometry.heads),
        ):
            place = place[..., None] * np.uint64(length) + xp.asarray(list(numbers), dtype=xp.uint64)
        words = xp.arange(-(-geometry.row_nbytes // WORD), dtype=xp.uint64) * np.uint64(_WORD)
        words += np.uint64(salt * _SALT % _MODULUS)
        return (place[..., None] * np.uint64(_PLACE) + words).view(xp.uint8)[..., : geometry.row_nbytes]

    def fill(self, salt: int) -> None:
        """Write what belongs there."""
        for first, last in self._chunks:
            self._view[self.memory.xp.asarray(self.table[first:last])] = self._expected(first, last, salt)

    def check(self, salt: int) -> None:
        """Compare every byte.

        Raises:
            WrongBytes: a page holds something else.
        """
        for first, last in self._chunks:
            found = self._view[self.memory.xp.asarray(self.table[first:last])]
            wrong = (found != self._expected(first, last, salt)).reshape(last - first, -1).any(axis=1)
            if bool(wrong.any()):
                raise WrongBytes(f"{int(wrong.sum())} pages of {first} to {last - 1} hold wrong bytes")


def fill_words(memory: Memory, buffer: Array, rank: int, salt: int) -> None:
    """Write into a send buffer, whose length is a multiple of 8, what a rank sends in a round."""
    for first in range(0, len(buffer), CHUNK_NBYTES):
        last = min(first + CHUNK_NBYTES, len(buffer))
        buffer[first:last] = _sent(memory, rank, salt, first, last)


def check_words(memory: Memory, found: Array, rank: int, salt: int, offset: int) -> int:
    """Return how many bytes are not those that a rank sends from an offset, a multiple of 8, of its buffer."""
    wrong = 0
    for first in range(0, len(found), CHUNK_NBYTES):
        last = min(first + CHUNK_NBYTES, len(found))
        wrong += int((found[first:last] != _sent(memory, rank, salt, offset + first, offset + last)).sum())
    return wrong


def _sent(memory: Memory, rank: int, salt: int, first: int, last: int) -> Array:
    xp = memory.xp
    words = xp.arange(first // WORD, -(-last // WORD), dtype=xp.uint64) * np.uint64(_WORD)
    words += np.uint64(((rank + 1) * _PLACE + salt * _SALT) % _MODULUS)
    return words.view(xp.uint8)[: last - first]

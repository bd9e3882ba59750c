"""Buffers of a device and of its host that are filled, blanked and checked by the device; the pattern is `bench.pattern`'s.

Needs numpy and cupy: it runs inside each contender's own interpreter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from bench.pattern import WORD

PAUSE_SECONDS = 0.02
"""What is timed once begins so long after something else: neither on a device that has just worked, nor on one that sleeps."""

SOURCE = r"""
typedef unsigned long long word;
#define STEP 0x9E3779B97F4A7C15ull
#define EACH(i, n) (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (long long)blockDim.x)

extern "C" __global__ void fill(word *out, long long n, word salt) {
    for EACH(i, n) out[i] = i * STEP + salt * 0x1000003ull + 1;
}

/* Counts the words that are not where a finished run leaves them; see bench/pattern.py, count_wrong. */
extern "C" __global__ void count_wrong(const word *data, const long long *order, long long n_pages, long long per_page, word salt,
                                       int scattered, word *wrong) {
    for EACH(i, n_pages * per_page) {
        long long page = i / per_page, inside = i % per_page;
        long long source = scattered ? page : order[page], place = scattered ? order[page] : page;
        if (data[place * per_page + inside] != (source * per_page + inside) * STEP + salt * 0x1000003ull + 1)
            atomicAdd(wrong, 1ull);
    }
}

/* Holds a stream until the host writes `value` to a word of pinned memory, or so many cycles have passed. */
extern "C" __global__ void hold(volatile unsigned *gate, unsigned value, long long cycles) {
    long long start = clock64();
    while (*gate != value && clock64() - start < cycles) { }
}

extern "C" __global__ void tell(volatile unsigned *flag, unsigned value) {
    *flag = value;
    __threadfence_system();
}
"""
BLOCKS, THREADS = 2048, 256


@lru_cache(maxsize=1)
def cupy() -> Any:
    """Import cupy, which takes a second."""
    import cupy as imported

    return imported


@lru_cache(maxsize=8)
def kernel(name: str) -> Any:
    """Return one of the kernels above."""
    return cupy().RawModule(code=SOURCE).get_function(name)


def synchronize() -> None:
    """Wait until the device has done everything."""
    cupy().cuda.Device().synchronize()


class DeviceBuffer:
    """A device's memory."""

    kind = "VRAM"

    def __init__(self, nbytes: int) -> None:
        self.array = cupy().zeros(nbytes, np.uint8)
        synchronize()

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.array.data.ptr)

    def fill(self, salt: int) -> None:
        """Write the pattern of `salt` into all of it."""
        words = self.array.view(np.uint64)
        kernel("fill")((BLOCKS,), (THREADS,), (words, np.int64(len(words)), np.uint64(salt)))
        synchronize()

    def blank(self, salt: int) -> None:
        """Overwrite it with one byte that differs from run to run."""
        self.array.fill(salt * 37 % 251)
        synchronize()

    def count_wrong(self, order: Any, page_nbytes: int, salt: int, *, scattered: bool) -> int:
        """Count the words that are not what a finished run leaves there; see `bench.pattern.count_wrong`."""
        if page_nbytes % WORD:
            raise ValueError(f"page_nbytes is {page_nbytes}; it must be a multiple of {WORD}")
        wrong, places = cupy().zeros(1, np.uint64), cupy().asarray(order, dtype=np.int64)
        sizes = np.int64(len(order)), np.int64(page_nbytes // WORD)
        arguments = (self.array, places, *sizes, np.uint64(salt), np.int32(scattered), wrong)
        kernel("count_wrong")((BLOCKS,), (THREADS,), arguments)
        return int(wrong[0])


class HostBuffer:
    """Memory of the host, pinned or not; the device fills and checks it by way of memory of its own."""

    kind = "DRAM"

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._pinned = cupy().cuda.alloc_pinned_memory(nbytes) if pinned else None
        self.array = np.zeros(nbytes, np.uint8) if self._pinned is None else np.frombuffer(self._pinned, np.uint8, nbytes)
        self.array.fill(1)
        self._scratch: DeviceBuffer | None = None

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self.array.ctypes.data)

    def _device(self) -> DeviceBuffer:
        if self._scratch is None:
            self._scratch = DeviceBuffer(self.array.nbytes)
        return self._scratch

    def fill(self, salt: int) -> None:
        """Write the pattern of `salt` into all of it."""
        self._device().fill(salt)
        self._device().array.get(out=self.array)

    def blank(self, salt: int) -> None:
        """Overwrite it with one byte that differs from run to run."""
        self.array.fill(salt * 37 % 251)

    def count_wrong(self, order: Any, page_nbytes: int, salt: int, *, scattered: bool) -> int:
        """Count the words that are not what a finished run leaves there."""
        self._device().array.set(self.array)
        synchronize()
        return self._device().count_wrong(order, page_nbytes, salt, scattered=scattered)


Buffer = DeviceBuffer | HostBuffer


def allocate(kind: str, nbytes: int) -> Buffer:
    """Return memory of the kind `vram`, `pinned` or `pageable`."""
    return DeviceBuffer(nbytes) if kind == "vram" else HostBuffer(nbytes, pinned=kind == "pinned")

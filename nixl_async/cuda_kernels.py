"""The kernel that gathers and scatters: any number of pages of a device's memory copied by one launch, and how it is told of them.

A piece is what one entry of its arrays describes; a unit is what one warp copies of a piece at a time. Pieces of one size, the
pages of a KV cache, are two addresses each; pieces of many sizes have their lengths too, and long ones are cut.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.cuda import need_cupy
from nixl_async.descriptors import page_nbytes_of
from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nixl_async.descriptors import Array, Side

logger = logging.getLogger("nixl_async.cuda")

UNIT_NBYTES = 2048
THREADS_PER_BLOCK = 256
UNITS_PER_BLOCK = THREADS_PER_BLOCK // 32
AREAS = 4096
"""As `nx_describe` has it."""
_AREA_SHIFT = 21
REACH_NBYTES = 256 << 20
MIN_ORDERED = 256
"""Fewer entries than this are not worth putting in order."""

SOURCE = r"""
#define UNIT 2048u

template <typename T>
__device__ __forceinline__ void copy_unit(char *dst, const char *src, unsigned n, unsigned lane) {
    /* Bytes up to the destination's first whole word, then words, four loads before their stores, then the last bytes. More loads
       would take registers that more warps make better use of. */
    unsigned head = (unsigned)(-(unsigned long long)dst) & (sizeof(T) - 1);
    if (head > n)
        head = n;
    if (lane < head)
        dst[lane] = src[lane];
    const T *from = (const T *)(src + head);
    T *to = (T *)(dst + head);
    unsigned words = (n - head) / sizeof(T);
    for (unsigned i = lane; i < words; i += 4 * 32) {
        T word[4];
#pragma unroll
        for (unsigned k = 0; k < 4; k++)
            if (i + 32 * k < words)
                word[k] = from[i + 32 * k];
#pragma unroll
        for (unsigned k = 0; k < 4; k++)
            if (i + 32 * k < words)
                to[i + 32 * k] = word[k];
    }
    unsigned done = head + words * sizeof(T);
    if (lane < n - done)
        dst[done + lane] = src[done + lane];
}

extern "C" __global__ void __launch_bounds__(256)
nixl_copy(const unsigned long long *src, const unsigned long long *dst, const unsigned long long *lengths,
          unsigned long long nbytes, unsigned units, unsigned units_per_piece) {
    unsigned lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x >> 5);
    for (unsigned unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); unit < units; unit += warps) {
        unsigned piece = unit / units_per_piece;
        unsigned long long at = (unsigned long long)(unit - piece * units_per_piece) * UNIT;
        unsigned long long end = lengths ? lengths[piece] : nbytes;
        if (at >= end)
            continue;
        unsigned n = end - at < UNIT ? (unsigned)(end - at) : UNIT;
        const char *from = (const char *)(src[piece] + at);
        char *to = (char *)(dst[piece] + at);
        /* The widest word at whose boundaries both can be. */
        unsigned skew = (unsigned)((unsigned long long)from ^ (unsigned long long)to);
        if (!(skew & 15))
            copy_unit<int4>(to, from, n, lane);
        else if (!(skew & 7))
            copy_unit<int2>(to, from, n, lane);
        else if (!(skew & 3))
            copy_unit<int>(to, from, n, lane);
        else
            copy_unit<char>(to, from, n, lane);
    }
}

/* Fetches what is in the host's memory. */
extern "C" __global__ void nixl_fetch(const unsigned long long *from, unsigned long long *to, unsigned n) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        to[i] = from[i];
}

/* Reads a cache line of each place, by one warp each: how long that takes tells what the translation of addresses costs. */
extern "C" __global__ void nixl_touch(const unsigned long long *at, unsigned n, unsigned *sink) {
    unsigned lane = threadIdx.x & 31, sum = 0;
    for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) >> 5; i < n; i += (gridDim.x * blockDim.x) >> 5)
        sum += *(volatile const unsigned *)(at[i] + 4 * lane);
    /* Never true; the compiler must not know. */
    if (sum == 0x9E3779B9u && blockDim.x == 1)
        *sink = sum;
}

/* Puts entries in order by the area of memory that one of their addresses lies in: `starts` says how many lie before it. */
extern "C" __global__ void nixl_order(const unsigned long long *by, unsigned n, unsigned long long low, unsigned shift,
                                      unsigned *starts, const unsigned long long *from, unsigned long long *to, unsigned rows) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        unsigned at = atomicAdd(&starts[(by[i] - low) >> shift], 1u);
        for (unsigned row = 0; row < rows; row++)
            to[row * n + at] = from[row * n + i];
    }
}
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one launch copies: segments, cut into `n` pieces of `piece_nbytes` bytes, or of at most so many if they are not `same`.

    `lengths` is `None` where every segment is a piece of that size.
    """

    src: Array
    dst: Array
    lengths: Array | None
    piece_nbytes: int
    n: int
    same: bool = True

    @property
    def rows(self) -> int:
        """How many arrays the kernel reads: sources, destinations, and lengths if they are not one."""
        return 2 if self.same else 3

    @property
    def units_per_piece(self) -> int:
        """How many units the longest piece has."""
        return -(-self.piece_nbytes // UNIT_NBYTES)

    @property
    def units(self) -> int:
        """How many units there are, those behind the end of a short piece included."""
        return self.n * self.units_per_piece

    @property
    def blocks(self) -> int:
        """How many blocks of threads copy each unit at once."""
        return -(-self.units // UNITS_PER_BLOCK)

    def write(self, to: Any, moves: tuple[int, int] = (0, 0)) -> None:
        """Write the kernel's arrays one behind the other to a pointer, sources and destinations moved by so many bytes."""
        src, dst, n = int64(self.src), int64(self.dst), self.n
        if self.lengths is None:
            lib.nx_describe(src, moves[0], dst, moves[1], ffi.NULL, n, 0, 0, 0, 0, to, ffi.NULL)
            return
        sizes = ffi.NULL if self.same else to + 2 * n
        lib.nx_cut(src, moves[0], dst, moves[1], int64(self.lengths), len(self.lengths), self.piece_nbytes, to, to + n, sizes)

    def arrays(self) -> tuple[Array, ...]:
        """Return the kernel's arrays."""
        if self.lengths is None:
            return self.src, self.dst
        made = np.empty((self.rows, self.n), np.int64)
        self.write(ffi.cast("int64_t *", made.ctypes.data))
        return tuple(made)


def make_batch(src: Array, dst: Array, lengths: Array) -> Batch:
    """Describe segments to the kernel: `lengths[i]` bytes, all positive, from address `src[i]` to `dst[i]`.

    Segments of different sizes are cut so that few warps find nothing to do: pieces are at most twice the segments, and 1,024.
    Pages of which some follow each other are cut into pages again.
    """
    src, dst, n = np.ascontiguousarray(src, np.int64), np.ascontiguousarray(dst, np.int64), len(lengths)
    if page_nbytes := page_nbytes_of(lengths):
        return Batch(src, dst, None, page_nbytes, n)
    lengths, found = np.ascontiguousarray(lengths, np.int64), np.empty(3, np.int64)
    lib.nx_sizes(int64(lengths), n, UNIT_NBYTES, 2 * n + 1024, int64(found))
    piece, count, same = found.tolist()
    return Batch(src, dst, None if same and count == n else lengths, piece, count, bool(same))


def shifted(side: Side, by: Sequence[int]) -> Array:
    """Return a side's addresses, those in its region number i moved by `by[i]` bytes: to where a device sees that memory."""
    moves = np.array(by, np.int64)
    return side.addresses + (moves[0] if side.index is None else moves[side.index])


@dataclass(frozen=True, slots=True)
class Far:
    """The side of a copy that is another process's or device's memory: whether the destinations, and the addresses it lies between.

    A device translates addresses by tables of a limited reach. For such memory that may be some hundred megabytes (seen on an H100,
    not on an H200, whose driver maps it in larger pages): pages picked at random from more cost a walk of the tables each. Where
    that is so (`Lane.order_pays`) they are copied in the order of the areas that they lie in: what is under way at one time then
    lies close together.
    """

    dst: bool
    low: int
    high: int

    @property
    def shift(self) -> int:
        """The power of two bytes that one of `AREAS` areas has; 0 where any order is as good."""
        nbytes = self.high - self.low
        return max(_AREA_SHIFT, nbytes.bit_length() - (AREAS.bit_length() - 1)) if nbytes > REACH_NBYTES else 0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The handles of the kernels on one device; all 0 where they cannot be compiled."""

    copy: int = 0
    fetch: int = 0
    order: int = 0
    touch: int = 0
    # What must stay loaded.
    module: Any = None


_compiling = threading.Lock()
_compiled: dict[int, Kernels] = {}


def kernels(device: int) -> Kernels:
    """Return the kernels of a device. The first time it takes a second: on a thread."""
    if (compiled := _compiled.get(device)) is not None:
        return compiled
    with _compiling:
        if device not in _compiled:
            _compiled[device] = _compile(device)
        return _compiled[device]


def is_compiled(device: int) -> bool:
    """Tell whether `kernels` returns at once."""
    return device in _compiled


def _compile(device: int) -> Kernels:
    cupy = need_cupy("cuda")
    try:
        with cupy.cuda.Device(device):
            module = cupy.RawModule(code=SOURCE, options=("-std=c++14",))
            functions = [module.get_function(f"nixl_{name}") for name in ("copy", "fetch", "order", "touch")]
            copy, fetch, order, touch = (int(function.kernel.ptr) for function in functions)
            return Kernels(copy, fetch, order, touch, functions)
    except Exception as error:
        # NVRTC is a package of its own to some installations of cupy.
        logger.warning("the copy kernel cannot be compiled, pages are copied one by one: %s: %s", type(error).__name__, error)
        return Kernels()

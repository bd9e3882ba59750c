"""A CUDA stream that copies: segments by one kernel, runs of bytes by the driver, with the pinned memory that this takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.cuda import check, load_driver, primary_context
from nixl_async.cuda_kernels import AREAS, MIN_ORDERED, THREADS_PER_BLOCK, Batch, Far, Kernels, kernels, make_batch
from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

# CUDA Driver API: CU_STREAM_NON_BLOCKING, CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING, CU_EVENT_BLOCKING_SYNC,
# CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP.
_NON_BLOCKING = 1
_BLOCKING_EVENT = 3
_TIMED_EVENT = 1
_PORTABLE_AND_MAPPED = 3
IN_PLACE_UNITS = 1024
"""Batches up to this size have their descriptors read in the host's memory: a copy to the device would take longer."""
DESCRIBED_NBYTES = 1 << 20
"""The descriptors that a lane has room for from the beginning: a launch on the loop allocates nothing."""
FETCHED_NBYTES = 64 << 10
"""Descriptors up to this size a kernel fetches."""
FIRST_SLICE, SLICE = 16384, 65536
"""How many segments the device is told of first, and at a time at most: it copies while it is told of others."""
TOUCHED, TOUCHED_NBYTES = 16384, 128
"""How many places are read, and of each how much, to see whether their order matters, three times in either order."""
ORDER_PAYS = 1.3
"""How many times longer the places must take in random order."""
STARTS_NBYTES = 4 * AREAS
"""What `nx_describe` writes of areas."""


def slices(n: int, *, ordered: bool) -> Iterator[tuple[int, int]]:
    """Yield where the slices of `n` segments begin and end.

    What is put in order is better put in order all together; but the device is to have something to do meanwhile.
    """
    at = 0
    while at < n:
        left = n - at
        if ordered:
            size = n // 8 if at == 0 and n >= 2 * SLICE else left
        else:
            size = min(left, max(FIRST_SLICE, min(SLICE, at // 2)))
        yield at, at + size
        at += size


@lru_cache(maxsize=1)
def _tell(driver: Any) -> None:
    """Tell the compiled module where the driver's functions are."""
    names = "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuLaunchKernel", "cuStreamQuery"
    lib.nx_cuda_use(*(ctypes.cast(getattr(driver, name), ctypes.c_void_p).value or 0 for name in names))


class Pinned:
    """Pinned host memory, which devices see too. Its owner's device is current where it is made and freed."""

    def __init__(self, nbytes: int) -> None:
        driver, host, device = load_driver(), ctypes.c_void_p(), ctypes.c_uint64()
        check(driver.cuMemHostAlloc(ctypes.byref(host), nbytes, _PORTABLE_AND_MAPPED), f"{nbytes} bytes of pinned memory")
        check(driver.cuMemHostGetDevicePointer_v2(ctypes.byref(device), host, 0), "the device's address of pinned memory")
        assert host.value is not None
        self.address, self.device_address, self.nbytes = host.value, device.value, nbytes

    def free(self) -> None:
        """Give it back; nothing uses it any more."""
        load_driver().cuMemFreeHost(self.address)


class Described:
    """A batch as the kernel is told of it: its arrays at an address of the device, and its shape."""

    __slots__ = ("arguments", "blocks")

    def __init__(self, batch: Batch, at: int) -> None:
        arrays = at, at + 8 * batch.n, 0 if batch.same else at + 16 * batch.n
        self.arguments = ffi.new("uint64_t[]", [*arrays, batch.piece_nbytes, batch.units, batch.units_per_piece])
        self.blocks = batch.blocks


class Lane:
    """A stream of one device, with room for the descriptors of one batch and, when asked for, staging. One op uses it at a time.

    Its device's context is current (`entered`) wherever it is used. What is `urgent` goes before large copies' blocks of threads.
    """

    _described: Pinned

    def __init__(self, device: int, staging_nbytes: int, urgent: bool = False) -> None:
        self.device, self.urgent = device, urgent
        self._driver = load_driver()
        _tell(self._driver)
        self._staging_nbytes = staging_nbytes
        stream, event, lowest, highest = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        check(self._driver.cuCtxGetStreamPriorityRange(ctypes.byref(lowest), ctypes.byref(highest)), "stream priorities")
        priority = highest.value if urgent else lowest.value
        check(self._driver.cuStreamCreateWithPriority(ctypes.byref(stream), _NON_BLOCKING, priority), "a stream")
        check(self._driver.cuEventCreate(ctypes.byref(event), _BLOCKING_EVENT), "an event")
        self.stream, self._event = stream.value, event.value
        self._context = primary_context(device)
        self._on_device = 0
        self._used = 0
        self._make_room(DESCRIBED_NBYTES)
        self._pinned: Pinned | None = None
        self._buffer = 0

    @property
    def pinned(self) -> Pinned:
        """The lane's staging in the host's memory."""
        if self._pinned is None:
            self._pinned = Pinned(self._staging_nbytes)
        return self._pinned

    @property
    def buffer(self) -> int:
        """The address of the lane's staging in the device's memory."""
        if not self._buffer:
            self._buffer = self.allocate(self._staging_nbytes)
        return self._buffer

    def allocate(self, nbytes: int) -> int:
        """Take memory of the device, which may wait for all that runs on it; return its address."""
        address = ctypes.c_uint64()
        check(self._driver.cuMemAlloc_v2(ctypes.byref(address), nbytes), f"{nbytes} bytes of device memory")
        return address.value

    def copy(
        self,
        src: Array,
        dst: Array,
        lengths: Array,
        *,
        moves: tuple[int, int] = (0, 0),
        far: Far | None = None,
        max_blocks: int = 0,
    ) -> None:
        """Enqueue the copy of segments of memory that the device can reach, by one kernel of at most `max_blocks` blocks.

        The device sees sources and destinations `moves` bytes from where they are said to be. Call it once before `wait` or the
        op's end: the next call uses the descriptors' room again.
        """
        handles = kernels(self.device)
        if len(lengths) == 1 or not handles.copy:
            for to, at, nbytes in zip(dst.tolist(), src.tolist(), lengths.tolist(), strict=True):
                self.copy_run(to + moves[1], at + moves[0], nbytes)
            return
        parts = list(slices(len(lengths), ordered=far is not None and far.shift > 0))
        self._used = 0
        # Enough for pages of one size.
        self._take_room(16 * len(lengths) + STARTS_NBYTES * len(parts))
        self._used = 0
        for start, stop in parts:
            self._copy_slice(handles, src[start:stop], dst[start:stop], lengths[start:stop], moves, far, max_blocks)

    def copy_described(self, batch: Described, max_blocks: int = 0) -> None:
        """Enqueue the copy of what has been described to the device."""
        blocks = min(batch.blocks, max_blocks or batch.blocks)
        self._call(0, kernels(self.device).copy, blocks, THREADS_PER_BLOCK, batch.arguments)

    def send(self, batch: Described) -> None:
        """Enqueue the copy of what has been described, whatever context is current."""
        self._call(self._context, kernels(self.device).copy, batch.blocks, THREADS_PER_BLOCK, batch.arguments)

    def describe(
        self,
        src: Array,
        dst: Array,
        lengths: Array,
        *,
        moves: tuple[int, int] = (0, 0),
        far: Far | None = None,
        take: Callable[[int], int | None],
    ) -> Described | None:
        """Describe segments to the device once for many copies, where `take` finds so many bytes of its memory; wait for it.

        Return `None` where there is no memory for it, and where the driver copies.
        """
        handles = kernels(self.device)
        if len(lengths) == 1 or not handles.copy:
            return None
        batch = make_batch(src, dst, lengths)
        nbytes = 8 * batch.n * batch.rows
        if (to := take(nbytes)) is None:
            return None
        self._used = 0
        self.copy_run(to, self._describe(handles, batch, moves, far), nbytes)
        self.wait()
        return Described(batch, to)

    def order_pays(self, low: int, nbytes: int) -> bool:
        """Tell whether far memory is read faster in the order of its addresses: some of it is, for about a millisecond.

        Nothing that was enqueued before is still to be done.
        """
        touch = kernels(self.device).touch
        if not touch:
            return False
        # Some way apart, and the same each time: what is found does not depend on chance.
        places = np.linspace(low, low + nbytes - TOUCHED_NBYTES, TOUCHED).astype(np.int64) & -TOUCHED_NBYTES
        rows = np.stack([places, np.random.default_rng(TOUCHED).permutation(places)])
        ctypes.memmove(self._described.address, rows.ctypes.data, rows.nbytes)
        self.copy_run(self._on_device, self._described.address, rows.nbytes)
        ends = []
        for _ in range(2):
            end = ctypes.c_void_p()
            check(self._driver.cuEventCreate(ctypes.byref(end), _TIMED_EVENT), "an event")
            ends.append(end)
        try:
            found = [[self._touch(touch, self._on_device + at, *ends) for at in (0, 8 * TOUCHED)] for _ in range(3)]
        finally:
            for end in ends:
                self._driver.cuEventDestroy_v2(end)
        in_order, at_random = (min(times) for times in zip(*found, strict=True))
        return bool(at_random > ORDER_PAYS * in_order)

    def copy_run(self, dst: int, src: int, nbytes: int) -> None:
        """Enqueue the copy of one run of bytes, of whatever memory the driver knows or the host has."""
        check(self._driver.cuMemcpyAsync(dst, src, nbytes, self.stream), "copying")

    def copy_to_peer(self, other: Lane, nbytes: int) -> None:
        """Enqueue the copy of this lane's buffer to that of another device's, by way of the host if need be."""
        contexts = primary_context(other.device), primary_context(self.device)
        places = other.buffer, contexts[0], self.buffer, contexts[1]
        check(self._driver.cuMemcpyPeerAsync(*places, nbytes, self.stream), f"copying {nbytes} bytes between devices")

    def wait(self) -> None:
        """Block until all that was enqueued has ended, asleep."""
        check(self._driver.cuEventRecord(self._event, self.stream), "an event")
        check(self._driver.cuEventSynchronize(self._event), "copying")

    def query(self) -> int:
        """Return what the driver says of the stream."""
        return int(lib.nx_cuda_query(self.stream))

    def quiet(self) -> bool:
        """Block until nothing runs; return whether the lane can be used again."""
        return int(self._driver.cuStreamSynchronize(self.stream)) == 0

    def free(self) -> None:
        """Give everything back; nothing runs."""
        self._described.free()
        self._driver.cuMemFree_v2(self._on_device)
        if self._pinned is not None:
            self._pinned.free()
        if self._buffer:
            self._driver.cuMemFree_v2(self._buffer)
        self._driver.cuEventDestroy_v2(self._event)
        self._driver.cuStreamDestroy_v2(self.stream)

    def _copy_slice(
        self,
        handles: Kernels,
        src: Array,
        dst: Array,
        lengths: Array,
        moves: tuple[int, int],
        far: Far | None,
        max_blocks: int,
    ) -> None:
        batch = make_batch(src, dst, lengths)
        self.copy_described(Described(batch, self._describe(handles, batch, moves, far)), max_blocks)

    def _describe(self, handles: Kernels, batch: Batch, moves: tuple[int, int], far: Far | None) -> int:
        """Enqueue what puts a batch's arrays where the device finds them; return where that is."""
        n, rows = batch.n, batch.rows
        nbytes = 8 * n * rows
        few = nbytes <= FETCHED_NBYTES
        offset = self._take_room(nbytes + STARTS_NBYTES)
        room = self._described.address + offset
        shift = far.shift if far is not None and n >= MIN_ORDERED else 0
        side, low = (0, 0) if far is None or not shift else (2 if far.dst else 1, far.low)
        words, starts = ffi.cast("int64_t *", room), ffi.cast("uint32_t *", room + nbytes)
        if not side:
            batch.write(words, moves)
        else:
            src, dst, *lengths = batch.arrays()
            sizes = int64(lengths[0]) if lengths else ffi.NULL
            lib.nx_describe(int64(src), moves[0], int64(dst), moves[1], sizes, n, side, low, shift, few, words, starts)
        if not side and batch.units <= IN_PLACE_UNITS:
            return self._described.device_address + offset
        at = self._on_device + offset
        if few:
            # So little a copy would write to the device word by word, from this thread.
            self._launch(handles.fetch, min(16, -(-n // 256)), 256, self._described.device_address + offset, at, n * rows)
            return at
        self.copy_run(at, room, nbytes + (STARTS_NBYTES if side else 0))
        if not side:
            return at
        to = at + self._described.nbytes
        by = at + 8 * n if side == 2 else at
        self._launch(handles.order, min(64, -(-n // 256)), 256, by, n, low, shift, at + nbytes, at, to, rows)
        return to

    def _touch(self, touch: int, places: int, begin: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Return the milliseconds that reading a list of places takes."""
        took = ctypes.c_float()
        check(self._driver.cuEventRecord(begin, self.stream), "an event")
        self._launch(touch, TOUCHED // 32, 256, places, TOUCHED, self._on_device)
        check(self._driver.cuEventRecord(end, self.stream), "an event")
        check(self._driver.cuEventSynchronize(end), "reading")
        check(self._driver.cuEventElapsedTime(ctypes.byref(took), begin, end), "a time")
        return took.value

    def _take_room(self, nbytes: int) -> int:
        """Return how far into the descriptors' room the next `nbytes` bytes are."""
        if self._used + nbytes > self._described.nbytes:
            if self._used:
                # The slices before are being read.
                self.wait()
            self._make_room(1 << (nbytes - 1).bit_length())
            self._used = 0
        offset = self._used
        self._used += nbytes
        return offset

    def _launch(self, kernel: int, blocks: int, threads: int, *arguments: int) -> None:
        self._call(0, kernel, blocks, threads, ffi.new("uint64_t[]", arguments))

    def _call(self, context: int, kernel: int, blocks: int, threads: int, arguments: Any) -> None:
        code = lib.nx_cuda_launch(context, self.stream, kernel, blocks, threads, arguments, len(arguments))
        check(code, "launching a kernel")

    def _make_room(self, nbytes: int) -> None:
        described = Pinned(nbytes)
        # As they come, and in order.
        on_device = self.allocate(2 * nbytes)
        if self._on_device:
            self._described.free()
            self._driver.cuMemFree_v2(self._on_device)
        self._described, self._on_device = described, on_device

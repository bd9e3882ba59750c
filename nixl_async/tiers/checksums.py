"""Checksums of blocks: CRC-64/NVME over the block's key and then its bytes, so that a block in another's place does not pass."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array
    from nixl_async.tiers.blocks import Blocks

NONE, CRC64NVME = 0, 1
"""The kinds as they are kept on disk. NONE: the block was written with `checksum=False` and cannot be verified."""


def checksum_blocks(keys: Sequence[bytes], blocks: Blocks) -> NDArray[np.uint64]:
    """Return the checksum of each block; on a thread, and only while the region is held: the bytes are read where they are.

    It lets the interpreter's lock go once for all blocks and not for each: with a busy loop, getting it back is what takes time.
    """
    found = _of_keys(keys)
    addresses = np.ascontiguousarray(blocks.offsets + blocks.region.address)
    sizes = np.ascontiguousarray(blocks.lengths)
    values = ffi.from_buffer("uint64_t[]", found, require_writable=True)
    lib.nx_crc64nvme(int64(addresses), int64(sizes), len(keys), addresses.shape[1], values)
    return found


def _of_keys(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    joined = b"".join(keys)
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    start = int(ffi.cast("intptr_t", ffi.from_buffer(joined)))
    found = np.zeros(len(keys), np.uint64)
    values = ffi.from_buffer("uint64_t[]", found, require_writable=True)
    lib.nx_crc64nvme(int64(np.cumsum(lengths) - lengths + start), int64(lengths), len(keys), 1, values)
    return found


def new_turn() -> Any:
    """Return what lets one thread at a time write: writers into the page cache of one file exclude each other, and spin."""
    return ffi.gc(lib.nx_turn_new(), lib.nx_turn_free)


class SummedMove:
    """Moves blocks out of the page cache, or with a `turn` into it, and sums them up while their bytes are in the processor's.

    Block i is at `offsets[i]` of file `fds[i]`. `run` may be called on several threads, which share the work.
    """

    def __init__(
        self, keys: Sequence[bytes], blocks: Blocks, fds: NDArray[np.int32], offsets: Array, turn: Any = None
    ) -> None:
        self.sums = np.zeros(0, np.uint64)
        self.done = np.zeros(len(keys), np.bool_)
        """Which blocks are moved and summed up. Others were not cached or met an error; what was to be filled is undefined."""
        self._keys, self._turn = keys, ffi.NULL if turn is None else turn
        self._fds, self._offsets = fds, np.ascontiguousarray(offsets)
        self._addresses = np.ascontiguousarray(blocks.offsets + blocks.region.address)
        self._lengths = np.ascontiguousarray(blocks.lengths)
        self._next, self._stop = ffi.new("int64_t *"), ffi.new("int32_t *")
        self._lock = threading.Lock()

    def run(self) -> None:
        """Move until nothing is left."""
        with self._lock:
            if not len(self.sums):
                self.sums = _of_keys(self._keys)
        lib.nx_crc64nvme_move(
            self._turn,
            ffi.from_buffer("int32_t[]", self._fds),
            int64(self._offsets),
            int64(self._addresses),
            int64(self._lengths),
            len(self._keys),
            self._addresses.shape[1],
            ffi.from_buffer("uint64_t[]", self.sums, require_writable=True),
            ffi.from_buffer("uint8_t[]", self.done, require_writable=True),
            self._next,
            self._stop,
        )

    def stop(self) -> None:
        """Have `run` end soon."""
        self._stop[0] = 1

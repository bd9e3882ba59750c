"""Checksums of blocks: CRC-64/NVME over the block's key and then its bytes, so that a block in another's place does not pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.tiers.blocks import Blocks

NONE, CRC64NVME = 0, 1
"""The kinds as they are kept on disk. NONE: the block was written with `checksum=False` and cannot be verified."""


def checksum_blocks(keys: Sequence[bytes], blocks: Blocks) -> NDArray[np.uint64]:
    """Return the checksum of each block; on a thread, and only while the region is held: the bytes are read where they are.

    It lets the interpreter's lock go once for all blocks and not for each: with a busy loop, getting it back is what takes time.
    """
    found = key_sums(keys)
    addresses, sizes = blocks.addresses(), np.ascontiguousarray(blocks.lengths)
    values = ffi.from_buffer("uint64_t[]", found, require_writable=True)
    lib.nx_crc64nvme(int64(addresses), int64(sizes), len(keys), addresses.shape[1], values)
    return found


def key_sums(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Return the checksum of each key, which its block's continues."""
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

"""`nixl._utils`: memory by its address, for tests and examples."""

from __future__ import annotations

import ctypes
import mmap
import threading

FILL = 0xBA
_LOCK = threading.Lock()
_MAPS: dict[int, mmap.mmap] = {}


def malloc_passthru(size: int) -> int:
    """Allocate `size` bytes at a page's boundary; return their address."""
    area = mmap.mmap(-1, max(1, size))
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with _LOCK:
        _MAPS[address] = area
    return address


def free_passthru(address: int) -> None:
    """Give back what `malloc_passthru` returned.

    Raises:
        ValueError: it did not return that address, or it was given back already.
    """
    with _LOCK:
        area = _MAPS.pop(address, None)
    if area is None:
        raise ValueError(f"{address:#x} was not allocated by malloc_passthru, or is freed already")


def ba_buf(address: int, size: int) -> None:
    """Fill `size` bytes at an address with 0xba."""
    ctypes.memset(address, FILL, size)


def verify_transfer(first: int, second: int, size: int) -> None:
    """Check that the bytes at two addresses are equal.

    Raises:
        AssertionError: they are not.
    """
    if ctypes.string_at(first, size) != ctypes.string_at(second, size):
        raise AssertionError(f"the {size} bytes at {first:#x} and at {second:#x} differ")

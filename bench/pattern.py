"""Bytes that prove where they came from: every 8-byte word is unique to its place and to the run's salt.

Needs only numpy: it runs inside each contender's own interpreter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORD = 8
_STEP = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 1 << 16
_ALIGNMENT = 4096


def page_order(n_pages: int, seed: int) -> NDArray[np.int64]:
    """Return the random order in which a run visits `n_pages` pages; the same on both sides."""
    return np.random.default_rng(seed).permutation(n_pages).astype(np.int64)


def allocate(nbytes: int) -> NDArray[np.uint8]:
    """Return `nbytes` bytes of memory, a multiple of 8, whose pages the kernel has already mapped."""
    return np.full(nbytes, 0x5A, np.uint8)


def allocate_aligned(nbytes: int) -> NDArray[np.uint8]:
    """Return memory as `allocate` does, that begins at a memory page, as direct I/O wants it."""
    whole = allocate(nbytes + _ALIGNMENT)
    skipped = -whole.ctypes.data % _ALIGNMENT
    return whole[skipped : skipped + nbytes]


def words(start: int, count: int, salt: int) -> NDArray[np.uint64]:
    """Return the words that belong at word positions `start` and after."""
    return np.arange(start, start + count, dtype=np.uint64) * _STEP + np.uint64(salt * 0x1000003 + 1)


def fill(buffer: NDArray[np.uint8], salt: int) -> None:
    """Write the pattern of `salt` into all of `buffer`."""
    view = buffer.view(np.uint64)
    for start in range(0, len(view), _BLOCK):
        stop = min(start + _BLOCK, len(view))
        view[start:stop] = words(start, stop - start, salt)


def blank(buffer: NDArray[np.uint8], salt: int) -> None:
    """Overwrite `buffer` with one byte that differs from run to run."""
    buffer.fill(salt * 37 % 251)


def count_wrong(buffer: NDArray[np.uint8], order: NDArray[np.int64], page_nbytes: int, salt: int, *, scattered: bool) -> int:
    """Count the pages of `buffer` that are not what a finished run leaves there.

    `scattered`: page i of the source went to place `order[i]`; otherwise place i holds source page `order[i]`.
    """
    if page_nbytes % WORD:
        raise ValueError(f"page_nbytes is {page_nbytes}; it must be a multiple of {WORD}")
    per_page = page_nbytes // WORD
    pages = buffer[: len(order) * page_nbytes].view(np.uint64).reshape(-1, per_page)
    wrong = 0
    step = max(1, _BLOCK // per_page)
    inside = np.arange(per_page, dtype=np.uint64) * _STEP + np.uint64(salt * 0x1000003 + 1)
    everything = np.arange(len(order))
    for start in range(0, len(order), step):
        which = everything[start : start + step]
        sources, places = (which, order[which]) if scattered else (order[which], which)
        first = (sources * per_page).astype(np.uint64) * _STEP
        wrong += int((pages[places] != first[:, None] + inside).any(axis=1).sum())
    return wrong

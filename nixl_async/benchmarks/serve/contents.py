"""A process's pool of pages, and bytes that show which block, page and layer they are of.

A page's bytes in a layer are a window of random words that all processes have alike, chosen by a number that is the block's, page's
and layer's own; the first word is that number itself. So writing a page is one copy, and checking it one comparison.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nixl_async.benchmarks.kv.contents import WORD, WrongBytes
from nixl_async.geometry import KVGeometry

Array = np.ndarray[Any, Any]
WINDOWS = 1 << 16
SEED = 8
_BLOCK, _PAGE, _LAYER, _MIX = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xBF58476D1CE4E5B9
_HALF = np.uint64(32)

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Pages:
    """A pool of `count` pages of `page_tokens` tokens, in each layer one after the other; calls release the GIL while they copy."""

    def __init__(self, geometry: KVGeometry, count: int, page_tokens: int, block_tokens: int) -> None:
        self.page_nbytes = geometry.token_nbytes // geometry.layers * page_tokens
        self.layers, self.count = geometry.layers, count
        self.in_block = block_tokens // page_tokens
        self.buffer = np.full(self.layers * count * self.page_nbytes, 0x5A, np.uint8)
        self._words = self.buffer.view(np.uint64).reshape(self.layers, count, -1)
        each = self.page_nbytes // WORD
        self._random = np.random.default_rng(SEED).integers(0, 1 << 63, WINDOWS + each, np.uint64)

    def numbers(self, blocks: Sequence[int], first: int, last: int, layer: int) -> Array:
        """Return the numbers of a request's pages `first` to `last - 1`, in a layer; `blocks` are ids of its blocks."""
        pages = np.arange(first, last)
        ids = np.asarray(blocks, np.uint64)[pages // self.in_block]
        mixed = ids * np.uint64(_BLOCK) + (pages % self.in_block).astype(np.uint64) * np.uint64(_PAGE)
        mixed += np.uint64((layer + 1) * _LAYER % (1 << 64))
        mixed ^= mixed >> _HALF
        mixed *= np.uint64(_MIX)
        mixed ^= mixed >> _HALF
        return mixed

    def blank(self, table: Array) -> None:
        """Make pages hold nothing's bytes, so that what was left there does not pass for what has been moved there."""
        self._words[:, table, 0] = 0
        self._words[:, table, -1] = 0

    def fill(self, table: Array, blocks: Sequence[int], first: int) -> None:
        """Write what belongs into a request's pages from `first` on; `table` has the places of all of its pages."""
        for layer in range(self.layers):
            numbers = self.numbers(blocks, first, len(table), layer)
            for to, source in self._places(table[first:], numbers, layer):
                ctypes.memmove(to, source, self.page_nbytes)
            self._words[layer, table[first:], 0] = numbers

    def check(self, table: Array, blocks: Sequence[int]) -> None:
        """Compare every byte of a request.

        Raises:
            WrongBytes: a page holds something else.
        """
        for layer in range(self.layers):
            numbers = self.numbers(blocks, 0, len(table), layer)
            wrong = self._words[layer, table, 0] != numbers
            for page, (found, expected) in enumerate(self._places(table, numbers, layer)):
                if _memcmp(found + WORD, expected + WORD, self.page_nbytes - WORD):
                    wrong[page] = True
            if bool(wrong.any()):
                raise WrongBytes(f"{int(wrong.sum())} of {len(table)} pages of layer {layer} hold wrong bytes")

    def _places(self, table: Array, numbers: Array, layer: int) -> Any:
        start = int(self.buffer.ctypes.data) + layer * self.count * self.page_nbytes
        windows = int(self._random.ctypes.data) + (numbers >> np.uint64(48)).astype(np.int64) * WORD
        return zip((start + table.astype(np.int64) * self.page_nbytes).tolist(), windows.tolist(), strict=True)

    def in_blocks(self, table: Array, first: int, last: int) -> Array:
        """Return which pages, counted through all layers of the pool, make up a request's blocks `first` to `last - 1`."""
        pages = np.asarray(table[first * self.in_block : last * self.in_block], np.int64).reshape(-1, 1, self.in_block)
        return (pages + np.arange(self.layers).reshape(1, -1, 1) * self.count).ravel()


def page_count(tokens: int, page_tokens: int) -> int:
    """Return how many pages that many tokens take."""
    return math.ceil(tokens / page_tokens)

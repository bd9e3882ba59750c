"""Where the slices of one request are when four tensor-parallel ranks send to two: the pair (1, 0) of them.

Reckoned apart from the library's planner, which it judges too, and with numpy alone: every contender's interpreter runs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bench.pattern import WORD, words

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGE_TOKENS = 16
SRC_TP, DST_TP, HEADS, KV = 4, 2, 8, 2
PAIR = (1, 0)


@dataclass(frozen=True)
class Request:
    """A request of `tokens` tokens in `layers` layers; each rank of the source has `slice_nbytes` bytes of a token in a layer."""

    layers: int
    tokens: int
    slice_nbytes: int
    seed: int = 1

    @property
    def pages(self) -> int:
        """Pages of one layer; the pool has as many blocks."""
        return -(-self.tokens // PAGE_TOKENS)

    @property
    def count(self) -> int:
        """Slices in all."""
        return self.layers * KV * self.tokens

    def table(self, tp: int) -> NDArray[np.int32]:
        """Return the block table of a side."""
        return np.random.default_rng((self.seed, tp)).permutation(self.pages).astype(np.int32)

    def pool_nbytes(self, tp: int) -> int:
        """Bytes of a rank's pool."""
        return self.layers * KV * self.pages * PAGE_TOKENS * self.slice_nbytes * SRC_TP // tp

    def offsets(self, tp: int) -> NDArray[np.int64]:
        """Return where each slice is in a rank's pool of `tp` ranks, layer by layer, token by token."""
        stride = self.slice_nbytes * SRC_TP // tp
        tokens = np.arange(self.tokens)
        in_layer = (self.table(tp).astype(np.int64)[tokens // PAGE_TOKENS] * PAGE_TOKENS + tokens % PAGE_TOKENS) * stride
        layers = np.arange(self.layers * KV) * (self.pages * PAGE_TOKENS * stride)
        # The source's heads are the second half of the destination's.
        return (layers[:, None] + in_layer).ravel() + (self.slice_nbytes if tp == DST_TP else 0)

    def count_wrong(self, buffer: NDArray[np.uint8], salt: int) -> int:
        """Count the slices of the destination that are not the source's, which was filled with the pattern of `salt`."""
        per_slice = self.slice_nbytes // WORD
        inside = words(0, per_slice, salt)
        step = words(1, 1, 0)[0] - words(0, 1, 0)[0]
        source, target = self.offsets(SRC_TP) // WORD, self.offsets(DST_TP) // WORD
        view = buffer.view(np.uint64)
        wrong = 0
        for start in range(0, len(source), 4096):
            places = target[start : start + 4096, None] + np.arange(per_slice)
            expected = source[start : start + 4096, None].astype(np.uint64) * step + inside
            wrong += int((view[places] != expected).any(axis=1).sum())
        return wrong

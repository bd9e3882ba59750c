"""What is moved: model shapes, the pool's layout, block tables, and bytes that show where they belong.

Imports numpy and the standard library only, and nothing of the library: the side that runs NIXL's wheel in an interpreter of its
own loads this very file.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BF16_NBYTES = 2
POOL_SLACK = 1.25
"""How much larger the pool is than what the job uses of it."""
WORD = 8
_LAYER, _PAGE, _STEP = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)


@dataclass(frozen=True)
class Model:
    """The part of a model's shape that its KV cache has; `kv` is 2 where keys and values are apart, 1 for MLA's latent."""

    layers: int
    kv: int
    token_nbytes: int
    """Bytes of one token in one layer, for one of `kv`."""


MODELS = {
    # The models' config.json: num_hidden_layers, num_key_value_heads * head_dim, kv_lora_rank + qk_rope_head_dim.
    "llama-3.1-8b": Model(32, 2, 8 * 128 * BF16_NBYTES),
    "llama-3.1-70b": Model(80, 2, 8 * 128 * BF16_NBYTES),
    "deepseek-r1": Model(61, 1, (512 + 64) * BF16_NBYTES),
    "qwen3-235b": Model(94, 2, 4 * 128 * BF16_NBYTES),
}


@dataclass(frozen=True)
class Job:
    """One request's KV cache on its way; everything that both sides must agree on."""

    model: str
    tokens: int
    page_size: int
    """Tokens in a page."""
    layers_per_push: int
    compute_seconds: float
    """What the simulated compute of one layer takes at least."""
    seed: int = 1

    @classmethod
    def read(cls, values: dict[str, Any]) -> Job:
        """Take the job out of a message that holds other things too."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def as_dict(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        return asdict(self)

    @property
    def shape(self) -> Model:
        """The model's shape."""
        return MODELS[self.model]

    @property
    def page_nbytes(self) -> int:
        """Bytes of a page in one layer, for one of keys and values."""
        return self.shape.token_nbytes * self.page_size

    @property
    def n_blocks(self) -> int:
        """The pages that the tokens take in one layer, for one of keys and values."""
        return -(-self.tokens // self.page_size)

    @property
    def pool_blocks(self) -> int:
        """The pages that the pool has there."""
        return int(self.n_blocks * POOL_SLACK) + 1

    @property
    def pages(self) -> int:
        """All pages that are moved."""
        return self.shape.layers * self.shape.kv * self.n_blocks

    @property
    def nbytes(self) -> int:
        """All bytes that are moved."""
        return self.pages * self.page_nbytes

    @property
    def pool_nbytes(self) -> int:
        """Bytes of one side's pool."""
        return self.shape.layers * self.shape.kv * self.pool_blocks * self.page_nbytes

    def table(self, side: int) -> NDArray[np.int64]:
        """Return a side's block table: which block of the pool holds logical block i."""
        return np.random.default_rng((self.seed, side)).permutation(self.pool_blocks)[: self.n_blocks].astype(np.int64)

    def pushes(self) -> list[tuple[int, int]]:
        """Return the layers of each push, as (first, last + 1)."""
        last = self.shape.layers
        return [(first, min(first + self.layers_per_push, last)) for first in range(0, last, self.layers_per_push)]

    def view(self, pool: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """View a pool as words: [layers, kv, blocks, words of a page]."""
        return pool.view(np.uint64).reshape(self.shape.layers, self.shape.kv, self.pool_blocks, self.page_nbytes // WORD)

    def expected(self, layer: int, kv: int) -> NDArray[np.uint64]:
        """Return what the pages of a layer hold: [logical blocks, words of a page]."""
        pages = (np.arange(self.n_blocks, dtype=np.uint64) + np.uint64((layer * self.shape.kv + kv) * self.n_blocks)) * _PAGE
        words = np.arange(self.page_nbytes // WORD, dtype=np.uint64) * _STEP
        return (pages + _LAYER * np.uint64(self.seed))[:, None] + words

    def fill(self, pool: NDArray[np.uint8], table: NDArray[np.int64], first: int, last: int) -> float:
        """Compute layers `first` to `last` - 1: write what belongs there. Return the CPU seconds that it took."""
        began = time.thread_time()
        words = self.view(pool)
        for layer in range(first, last):
            for kv in range(self.shape.kv):
                words[layer, kv, table] = self.expected(layer, kv)
        return time.thread_time() - began

    def verify(self, pool: NDArray[np.uint8], table: NDArray[np.int64], first: int, last: int) -> tuple[str, float]:
        """Compare every byte of layers `first` to `last` - 1. Return where the first wrong one is, if any, and CPU seconds."""
        began = time.thread_time()
        words = self.view(pool)
        for layer in range(first, last):
            for kv in range(self.shape.kv):
                wrong = words[layer, kv, table] != self.expected(layer, kv)
                if wrong.any():
                    block, word = np.argwhere(wrong)[0].tolist()
                    where = f"layer {layer}, kv {kv}, block {block} at byte {word * WORD}"
                    return f"{where}: {int(wrong.sum())} words of that layer are wrong", time.thread_time() - began
        return "", time.thread_time() - began


def busy_seconds(intervals: list[tuple[float, float]]) -> float:
    """Return how long at least one of the intervals lasted."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def memcpy_gb_per_second(nbytes: int = 64 << 20, repeats: int = 5) -> float:
    """Return how fast one thread of this machine copies memory, the best of some tries."""
    source, destination = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        np.copyto(destination, source)
        best = min(best, time.perf_counter() - began)
    return nbytes / best / 1e9

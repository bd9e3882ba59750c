"""A small decoder-only transformer on a paged KV cache: Llama's parts, with random weights that a seed makes again anywhere.

It knows nothing of servers or transfers. What matters for them: a forward pass goes layer by layer, and when `layer` returns, the
keys and values of that layer are in the cache and may leave for another process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from nixl_async import KVGeometry

PAGE_TOKENS = 16
"""Tokens in a page of the cache."""


@dataclass(frozen=True)
class Shape:
    """The model's size. Its heads are wide for so small a model, so that there is a KV cache worth moving: 48 KiB a token."""

    vocabulary: int = 256
    """Tokens are bytes."""
    layers: int = 12
    width: int = 128
    heads: int = 8
    head_dim: int = 64
    hidden: int = 256
    max_tokens: int = 4096
    """Of prompt and answer together."""

    def geometry(self, dtype: torch.dtype = torch.float32) -> KVGeometry:
        """Describe the KV cache to nixl_async."""
        return KVGeometry(self.layers, self.heads, self.head_dim, dtype_nbytes=dtype.itemsize)


class Transformer:
    """The model. Two of the same shape, seed and dtype compute the same, bit for bit, with the same number of threads."""

    def __init__(self, shape: Shape | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape = shape or Shape()
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> Tensor:
            # Drawn in one dtype: a model in float64 has the same weights.
            return (torch.randn(rows, columns, generator=generator) / math.sqrt(rows)).to(dtype)

        inner = shape.heads * shape.head_dim
        self._embedding = matrix(shape.vocabulary, shape.width) * math.sqrt(shape.vocabulary)
        self._layers = [
            _Layer(
                qkv=matrix(shape.width, 3 * inner),
                out=matrix(inner, shape.width),
                gate_up=matrix(shape.width, 2 * shape.hidden),
                down=matrix(shape.hidden, shape.width),
            )
            for _ in range(shape.layers)
        ]
        self._head = matrix(shape.width, shape.vocabulary)
        angles = torch.outer(
            torch.arange(shape.max_tokens, dtype=torch.float64),
            10_000.0 ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim),
        )
        self._cos, self._sin = angles.cos().to(dtype), angles.sin().to(dtype)

    @property
    def n_parameters(self) -> int:
        """How many numbers the model has."""
        matrices: list[Tensor] = [self._embedding, self._head]
        for layer in self._layers:
            matrices += [layer.qkv, layer.out, layer.gate_up, layer.down]
        return sum(one.numel() for one in matrices)

    def new_cache(self, n_pages: int) -> Tensor:
        """Make a paged KV cache: [layers, keys and values, pages, PAGE_TOKENS, heads, head_dim]."""
        shape = self.shape
        return torch.zeros(shape.layers, 2, n_pages, PAGE_TOKENS, shape.heads, shape.head_dim, dtype=self.dtype)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Return what goes into the first layer: [tokens, width]."""
        return self._embedding[torch.tensor(tokens)]

    def layer(self, number: int, x: Tensor, cache: Tensor, pages: Tensor, start: int) -> Tensor:
        """Compute a layer for the tokens from position `start` on, and return what goes into the next one.

        It writes their keys and values into `pages` of `cache`, and attends to those of all tokens up to each; so those before
        `start` must be there. `x` is [tokens, width]: the whole prompt with `start` 0, or one token.
        """
        shape, weights = self.shape, self._layers[number]
        n = len(x)
        if start and n > 1:
            raise ValueError(f"{n} tokens from position {start} on: only a whole prompt has more than one")
        query, key, value = (rms_norm(x, x.shape[-1:]) @ weights.qkv).view(n, 3, shape.heads, shape.head_dim).unbind(1)
        query, key = self._rotate(query, start), self._rotate(key, start)

        at = torch.arange(start, start + n)
        page, slot = pages[at // PAGE_TOKENS], at % PAGE_TOKENS
        cache[number, 0, page, slot] = key
        cache[number, 1, page, slot] = value
        if start:
            # [keys and values, tokens so far, heads, head_dim]
            key, value = cache[number][:, pages[: start // PAGE_TOKENS + 1]].flatten(1, 2)[:, : start + 1]
        # [a batch of one, heads, tokens, head_dim]: only so is there a kernel for it that is not quadratic in memory.
        query, key, value = (one.transpose(0, 1)[None] for one in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value, is_causal=n > 1)
        x = x + attended[0].transpose(0, 1).reshape(n, -1) @ weights.out

        gate, up = (rms_norm(x, x.shape[-1:]) @ weights.gate_up).chunk(2, -1)
        return x + (silu(gate) * up) @ weights.down

    def next_token(self, x: Tensor) -> int:
        """Return the likeliest token after the last one, given what came out of the last layer."""
        return int((rms_norm(x[-1], x.shape[-1:]) @ self._head).argmax())

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        cos, sin = (one[start : start + len(x), None] for one in (self._cos, self._sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@dataclass(frozen=True)
class _Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

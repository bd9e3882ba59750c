"""The forward pass of one request, layer by layer: what a server's thread is given to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.fastapi_disagg.model import Transformer


class Forward:
    """One forward pass of one request: `layer(0)`, `layer(1)`, …, then `next_token()`, all on one thread.

    `tokens` are those from position `start` on, `pages` the request's pages in `cache`, in the order of its tokens.
    """

    def __init__(self, model: Transformer, cache: Tensor, pages: Sequence[int], tokens: Sequence[int], start: int = 0) -> None:
        self._model, self._cache, self._pages, self._start = model, cache, torch.tensor(pages), start
        self._tokens = tokens
        self._x: Tensor | None = None

    def layer(self, number: int) -> None:
        """Compute a layer; its keys and values are in the cache when this returns."""
        if self._x is None:
            self._x = self._model.embed(self._tokens)
        self._x = self._model.layer(number, self._x, self._cache, self._pages, self._start)

    def next_token(self) -> int:
        """Return the token that follows, after all layers."""
        assert self._x is not None, "no layer has been computed"
        return self._model.next_token(self._x)

    def run(self) -> int:
        """Compute all layers, and return the token that follows."""
        for number in range(self._model.shape.layers):
            self.layer(number)
        return self.next_token()

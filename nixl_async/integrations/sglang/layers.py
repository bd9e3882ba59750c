"""Layers of a chunk that are sent while the model still computes the next ones."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from nixl_async.errors import Aborted


class LayerEvents:
    """When each layer's keys and values are in the pool: said by who computes them, on any thread, waited for by transfers.

    SGLang gives a sender one event for a chunk, in `_early_send_wait_event`, that is to be reached before the chunk is read; this
    takes its place where the layers are ready one after another. A chunk that has one is moved layer by layer.
    """

    def __init__(self, layers: int) -> None:
        self._layers: list[Future[Any]] = [Future() for _ in range(layers)]

    def __len__(self) -> int:
        return len(self._layers)

    def announce(self, layer: int, event: Any = None) -> None:
        """Say that a layer will be in the pool when `event` is reached (a CUDA event, a `CPUEvent`); at once if it is `None`."""
        if not self._layers[layer].done():
            self._layers[layer].set_result(event)

    def announce_rest(self, event: Any = None) -> None:
        """Say the same of every layer that nothing has been said of yet: at the end of the model, at the latest."""
        for layer in range(len(self)):
            self.announce(layer, event)

    def give_up(self, why: str) -> None:
        """Say that layers that nothing has been said of yet will not come: the chunk's room fails."""
        for layer in self._layers:
            if not layer.done():
                layer.set_exception(Aborted(why))

    async def event_of(self, layer: int) -> Any:
        """Wait until a layer is announced, and return its event.

        Raises:
            Aborted: it will not come.
        """
        # Others wait for it too: that this wait is cancelled must not cancel it.
        return await asyncio.shield(asyncio.wrap_future(self._layers[layer]))

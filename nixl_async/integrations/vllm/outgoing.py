"""What the prefill side keeps of a request that it sends, of a wish for it, and of the pass that computes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nixl_async import NixlError
from nixl_async.integrations.vllm.layout import Table


class Step:
    """One forward pass: which layers' KV it has put in place so far, each with what must be reached before it may be read."""

    def __init__(self, loop: asyncio.AbstractEventLoop, layers: int) -> None:
        self._layers = layers
        self._reached: dict[int, object] = {}
        self._exchanges: list[Any] = []
        self.closed = loop.create_future()
        """Ends when all layers have been reached."""

    def reach(self, layer: int, after: object) -> None:
        """Let a layer go in all exchanges of the step."""
        if layer not in self._reached:
            self._reached[layer] = after
            for exchange in self._exchanges:
                _let_go(exchange, [layer], after)

    def close(self, after: object) -> None:
        """Let all layers go that have not."""
        left = [layer for layer in range(self._layers) if layer not in self._reached]
        self._reached.update(dict.fromkeys(left, after))
        for exchange in self._exchanges:
            _let_go(exchange, left, after)
        if not self.closed.done():
            self.closed.set_result(None)

    def join(self, exchange: Any) -> None:
        """Let an exchange, a push or an offer, have the layers as they are reached."""
        self._exchanges.append(exchange)
        for layer, after in self._reached.items():
            _let_go(exchange, [layer], after)


def _let_go(exchange: Any, layers: Iterable[int], after: object) -> None:
    # Where it has failed, whoever waits for its end hears why.
    with contextlib.suppress(NixlError):
        exchange.ready(*layers, after=after)


@dataclass(eq=False)
class Want:
    """A decode rank's wish for one request: into which of its blocks, by their positions in the request; how far it has come."""

    peer: str
    to: str
    rank: int
    tp: int
    index: list[Table]
    blocks: list[Table]
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    chunks: int = 0
    tokens: int = 0
    """The first tokens of the request that have gone, or are on their way."""
    complete: bool = False
    """Whether the last chunk has gone, or is on its way."""
    done: bool = False


@dataclass(eq=False)
class Outgoing:
    """A request that is being prefilled here, or has been: its blocks, and the first `tokens` tokens that are in them."""

    request: str
    transfer: str
    blocks: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    final: bool = False
    wants: dict[tuple[str, str], Want] = field(default_factory=dict)
    claimed_by: set[str] = field(default_factory=set)
    lease: asyncio.TimerHandle | None = None
    """When it expires; None until the engine has finished it."""
    target_tp: int | None = None
    orphaned: bool = False
    """Whether whoever claimed it has died."""
    expired: bool = False
    step: Step | None = None
    """The pass that puts the latest tokens in place; None if all are."""
    served: set[int] = field(default_factory=set)
    """The decode ranks that need nothing more."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """What may still read the blocks."""

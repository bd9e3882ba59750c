"""The side of an exchange that uses the layers: yields each as it is there, and says when it has been used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING

from nixl_async.errors import NixlError
from nixl_async.layers.plan import check_layers

if TYPE_CHECKING:
    from nixl_async.layers.exchanges import Exchanges


class LayerStream:
    """What `Incoming` and `Pull` have in common: the layers that have arrived, in the order in which they are used."""

    def __init__(self, exchanges: Exchanges, request: str, count: int | None) -> None:
        self._exchanges = exchanges
        self.request = request
        self._count = count
        self._arrived: dict[int, None] = {}
        self._confirmed: set[int] = set()
        # Of those that arrived, what has not been used; and up to which layer everything has.
        self._fresh: dict[int, None] = {}
        self._lowest = 0
        self._failure: NixlError | None = None
        self._changed: asyncio.Future[None] | None = None
        self._holds: dict[int, list[Callable[[], None]]] = {}

    @property
    def n_layers(self) -> int | None:
        """How many layers the request has; None while nobody has said."""
        return self._count

    @property
    def arrived(self) -> tuple[int, ...]:
        """The layers whose bytes are in place, in the order in which they came."""
        return tuple(self._arrived)

    @property
    def complete(self) -> bool:
        """Whether all layers are in place."""
        return len(self._arrived) == self._count

    async def layers(self, *, ordered: bool = True) -> AsyncIterator[int]:
        """Yield each layer once its bytes are in place, the lowest first; with `ordered=False` as they come.

        Asking for the next layer confirms the one before: until then it counts against the other side's window, and if the
        iteration ends there, a later one yields it again.

        Raises:
            PeerLost: the other side is lost; what has arrived is kept, and a later iteration goes on with what its successor
                brings.
            Aborted: the other side gave up; the same holds.
        """
        while True:
            layer = self._next(ordered)
            if layer is not None:
                yield layer
                if layer not in self._confirmed:
                    self._confirmed.add(layer)
                    self._fresh.pop(layer, None)
                    self._confirm(layer)
            elif len(self._confirmed) == self._count:
                return
            elif self._failure is not None:
                error, self._failure = self._failure, None
                raise error
            else:
                self._changed = self._exchanges.loop.create_future()
                await self._changed

    def wait_on(self, stream: object, layer: int) -> None:
        """Let all work that is put on a compute stream from here on wait until a layer is in place; blocks nobody else.

        Leaving the block lets the stream go on too. See `Transfer.wait_on` for what must not be done meanwhile.

        Raises:
            DescriptorError: the request has no such layer.
            TypeError: `stream` is no stream.
        """
        if self._count is not None:
            check_layers([layer], self._count, self.request)
        if layer not in self._arrived:
            self._holds.setdefault(layer, []).append(self._exchanges.streams.hold(stream))

    # For the two kinds of it.

    def _confirm(self, layer: int) -> None:
        """Tell the other side that a layer has been used."""
        raise NotImplementedError

    def _take_layers(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if layer not in self._arrived:
                self._arrived[layer] = self._fresh[layer] = None
                self._exchanges.note("arrived", self.request, (layer,))
            for release in self._holds.pop(layer, ()):
                release()
        self._wake()

    def _failed(self, error: NixlError) -> None:
        self._failure = error
        self._wake()

    def _release_streams(self) -> None:
        holds, self._holds = self._holds, {}
        for releases in holds.values():
            for release in releases:
                release()

    def _next(self, ordered: bool) -> int | None:
        if not ordered:
            return next(iter(self._fresh), None)
        while self._lowest in self._confirmed:
            self._lowest += 1
        return self._lowest if self._lowest in self._fresh else None

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

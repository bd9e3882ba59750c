"""The side of an exchange that copies: one transfer for what is let go together, in that order, within a window."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nixl_async.backend import quiesce
from nixl_async.errors import ClosedError, DescriptorError
from nixl_async.transfer import TransferState

if TYPE_CHECKING:
    from nixl_async.handle import PreparedTransfer, Transfer
    from nixl_async.layers.exchanges import Sender
    from nixl_async.layers.plan import LayerPlan

AHEAD = 128
"""How many layers are checked and paired before it is known that they may go."""


@dataclass(frozen=True, slots=True)
class Route:
    """How a mover's transfers go: to or from which peer, by which backend (None: the best), and what `Agent.submit` gets."""

    peer: str
    push: bool
    backend: str | None
    options: dict[str, Any]


class Mover:
    """Copies the layers of a plan as they are let go, at most `window` of them unconfirmed; nothing before `accept`.

    `tell(layers)` makes the notification that goes with a transfer, `arrived(layers)` hears of each that has ended well.
    `run` is the one task that does it; when it returns or raises, nothing moves any more.
    """

    def __init__(
        self,
        sender: Sender,
        plan: LayerPlan,
        window: int | None,
        route: Route,
        *,
        tell: Callable[[list[int]], bytes] | None = None,
        arrived: Callable[[list[int]], None],
    ) -> None:
        self._sender, self._plan, self._route = sender, plan, route
        self._window = len(plan) if window is None else window
        self._tell, self._arrived = tell, arrived
        self._queue: deque[tuple[list[int], object]] = deque()
        self._seen: set[int] = set()
        self._unconfirmed: set[int] = set()
        self._ready: dict[int, PreparedTransfer] = {}
        self._transfers: set[Transfer] = set()
        self._accepted = self._finishing = False
        self._error: BaseException | None = None
        self._changed: asyncio.Future[None] | None = None

    @property
    def seen(self) -> frozenset[int]:
        """The layers that have been let go, or were there already."""
        return frozenset(self._seen)

    def accept(self, have: Iterable[int] = (), confirmed: Iterable[int] = ()) -> None:
        """Begin to copy; what the other side has is left out, and counts as unconfirmed unless it is in `confirmed`."""
        self._accepted = True
        had, used = set(have), set(confirmed)
        self._seen |= had
        self._unconfirmed |= had - used
        left = ((layers, after, [layer for layer in layers if layer not in had]) for layers, after in self._queue)
        self._queue = deque((layers, after) for _, after, layers in left if layers)
        self._wake()

    def let_go(self, layers: Iterable[int], after: object = None) -> None:
        """Copy layers together once `after` is reached; those that are there already are left out."""
        chosen = [layer for layer in dict.fromkeys(layers) if layer not in self._seen]
        self._seen.update(chosen)
        if chosen:
            self._queue.append((chosen, after))
            self._wake()

    def confirm(self, layers: Iterable[int]) -> None:
        """Take note that the consumer has used layers."""
        self._unconfirmed.difference_update(layers)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Let `run` raise `error`, unless it has ended or fails already."""
        if self._error is None:
            self._error = error
        self._wake()

    def finish(self) -> None:
        """Let `run` return when all that was let go has arrived."""
        self._finishing = True
        self._wake()

    async def run(self) -> None:
        """Copy until `finish` or `fail`."""
        try:
            while True:
                if self._error is not None:
                    raise self._error
                if self._queue and self._room():
                    await self._start(*self._queue.popleft())
                    # What was submitted goes at the end of this turn of the loop: not when all layers have been.
                    await asyncio.sleep(0)
                elif self._finishing and not self._queue and not self._transfers:
                    return
                elif (layer := self._next()) is not None:
                    self._ready[layer] = await self._prepare([layer])
                    await asyncio.sleep(0)
                else:
                    self._changed = asyncio.get_running_loop().create_future()
                    await self._changed
        finally:
            for transfer in list(self._transfers):
                transfer.cancel()
            if self._transfers:
                await quiesce(asyncio.gather(*map(_settled, self._transfers)))

    def _room(self) -> bool:
        """Tell whether the next group may go: it fits the window, or nothing is in its way."""
        return self._accepted and (not self._unconfirmed or len(self._unconfirmed) + len(self._queue[0][0]) <= self._window)

    def _next(self) -> int | None:
        """Return the next layer to prepare ahead."""
        if len(self._ready) >= AHEAD or self._finishing:
            return None
        return next((one for one in range(len(self._plan)) if one not in self._seen and one not in self._ready), None)

    async def _start(self, layers: list[int], after: object) -> None:
        prepared = self._ready.pop(layers[0], None) if len(layers) == 1 else None
        if prepared is None:
            for layer in layers:
                self._ready.pop(layer, None)
            prepared = await self._prepare(layers)
        if self._error is not None:
            return
        notify = None if self._tell is None else self._tell(layers)
        self._unconfirmed.update(layers)
        transfer = self._sender.submit(prepared, notify=notify, after=after, **self._route.options)
        self._transfers.add(transfer)
        transfer.add_done_callback(partial(self._ended, layers))

    async def _prepare(self, layers: list[int]) -> PreparedTransfer:
        prepared = await self._sender.prepare(*self._plan.places(layers), backend=self._route.backend, once=True)
        route, plan = self._route, prepared.plan
        found = plan.dst.peer if route.push else plan.src.peer
        if found != route.peer:
            side, whose = ("dst", "to") if route.push else ("src", "from")
            where = "this agent's own memory" if found is None else f"memory of peer {found!r}"
            raise DescriptorError(
                f"{side} of layer {layers[0]} of request {self._plan.request!r} is {where}; it must be {whose} peer {route.peer!r}"
            )
        return prepared

    def _ended(self, layers: list[int], transfer: Transfer) -> None:
        self._transfers.discard(transfer)
        if transfer.state is TransferState.CANCELLED:
            self.fail(ClosedError("the agent closes"))
        elif (error := transfer.exception()) is not None:
            self.fail(error)
        else:
            self._arrived(layers)
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


async def _settled(transfer: Transfer) -> None:
    try:
        await transfer.watch()
    except BaseException:
        if not transfer.done():
            raise

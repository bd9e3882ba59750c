"""Pulling: who wants the layers reads each out of the peer's memory when the peer says that it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from types import TracebackType
from typing import Any

from nixl_async.backend import quiesce
from nixl_async.errors import Aborted, ClosedError, ConfigurationError, NixlError, PeerLost
from nixl_async.layers.exchanges import Exchanges, gave_up, numbers, reason
from nixl_async.layers.mover import Mover, Route
from nixl_async.layers.plan import LayerPlan, check_layers
from nixl_async.layers.stream import LayerStream


class Pull(LayerStream):
    """The consumer's side of a pull: `async with agent.pull(peer, plan) as pull`, `async for layer in pull.layers()`.

    `async for layer in agent.pull(peer, plan)` is short for both. Leaving the block before all layers are in place stops what is
    under way, waits until nothing moves, and tells the peer.
    """

    def __init__(self, exchanges: Exchanges, plan: LayerPlan, window: int | None, route: Route, have: Iterable[int]) -> None:
        super().__init__(exchanges, plan.request, len(plan))
        self._plan, self._peer, self._window = plan, route.peer, window
        self._take_layers(check_layers(have, len(plan), plan.request))
        self._confirmed.update(self._arrived)
        self._fresh.clear()
        self._mover = Mover(exchanges.sender, plan, window, route, arrived=self._read)
        self._mover.accept(self._arrived, self._confirmed)
        self._number = 0
        self._task: asyncio.Task[None] | None = None
        self._ended_there = self._lost = False

    def __repr__(self) -> str:
        return f"<Pull {self.request!r} from {self._peer!r}: {len(self._arrived)}/{self._count} layers>"

    async def __aenter__(self) -> Pull:
        if self._task is not None:
            raise ClosedError("a pull is used once; make another")
        self._exchanges.check_peer(self._peer)
        self._number = self._exchanges.begin(self._peer, self)
        self._task = self._exchanges.loop.create_task(self._run())
        fields = {"k": "pull", "r": self.request, "n": self._count, "have": sorted(self._arrived)}
        self._exchanges.post(self._peer, "open", self._number, mine=True, **fields)
        return self

    async def __aiter__(self) -> AsyncIterator[int]:
        async with self:
            async for layer in self.layers():
                yield layer

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._release_streams()
        if self.complete:
            self._mover.finish()
        else:
            self._mover.fail(Aborted("its block was left" if error is None else reason(error)))
        await quiesce(self._task)

    async def _run(self) -> None:
        why = ""
        try:
            await self._mover.run()
        except BaseException as error:
            why = reason(error)
            self._failed(error if isinstance(error, NixlError) else ClosedError(why))
        finally:
            if self._ended_there:
                self._exchanges.post(self._peer, "quiet", self._number, mine=True)
            elif not self._lost:
                kind = "end" if why else "done"
                self._exchanges.post(self._peer, kind, self._number, mine=True, **({"why": why} if why else {}))
            self._exchanges.forget(self._peer, self._number, mine=True)

    def _read(self, layers: list[int]) -> None:
        self._take_layers(layers)
        if self.complete:
            self._mover.finish()

    def _confirm(self, layer: int) -> None:
        self._mover.confirm([layer])

    # End

    def take(self, kind: str, message: dict[str, Any]) -> None:
        """Act on a message of the side that offers; see `End`."""
        match kind:
            case "take":
                if self.complete:
                    self._mover.finish()
            case "layers":
                layers = numbers(message, "l", len(self._plan))
                # In one transfer, unless that would be more than the window.
                for group in [layers] if self._window is None else [[layer] for layer in layers]:
                    self._mover.let_go(group)
            case "end":
                self._ended_there = True
                self._mover.fail(gave_up(self._peer, self.request, message))
            case "refuse":
                self._lost = True
                self._mover.fail(gave_up(self._peer, self.request, message))

    def lost(self, error: NixlError) -> None:
        """Take note that the other side, or this agent, is gone; see `End`."""
        self._lost = isinstance(error, PeerLost)
        self._mover.fail(error)


class Offer:
    """The producer's side of a pull: `async with agent.offer(peer, request, n) as offer`, and `offer.ready(layer)` for each layer.

    Leaving the block waits until the peer has read every layer; leaving it by an exception makes the peer stop, and waits until it
    reads no more. Either way no byte is read any more afterwards.
    """

    kind = "pull"

    def __init__(self, exchanges: Exchanges, request: str, peer: str, count: int) -> None:
        self._exchanges, self._count = exchanges, count
        self.request: str = request
        self.peer: str = peer
        self._ready: set[int] = set()
        self._waits: set[asyncio.Future[Any]] = set()
        self._marked: set[int] = set()
        self._exchange: tuple[str, int] | None = None
        self._had: set[int] = set()
        self._error: NixlError | None = None
        self._end: asyncio.Future[None] = exchanges.loop.create_future()
        self._entered = False

    def __repr__(self) -> str:
        return f"<Offer {self.request!r} to {self.peer!r}: {len(self._ready)}/{self._count} layers ready>"

    async def __aenter__(self) -> Offer:
        if self._entered:
            raise ClosedError("an offer is used once; make another")
        self._entered = True
        self._exchanges.check_peer(self.peer)
        self._exchanges.open_door(self)
        return self

    def ready(self, *layers: int, after: object = None) -> None:
        """Let the peer read layers, as soon as `after` is reached; see `Agent.transfer` for `after`.

        Returns at once. Until the block is left their bytes must stay as they are.

        Raises:
            DescriptorError: there is no such layer.
            Aborted, PeerLost, TransferError: the offer has failed; leave the block.
        """
        chosen = check_layers(layers, self._count, self.request)
        if not self._entered:
            raise ClosedError("an offer begins with `async with`")
        if self._error is not None:
            raise self._error
        self._marked.update(chosen)
        self._exchanges.note("ready", self.request, chosen)
        reached = None if after is None else self._exchanges.streams.reached(after)
        if reached is None:
            self._tell(chosen)
            return
        self._waits.add(reached)
        reached.add_done_callback(partial(self._reached, chosen))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        missing = sorted(set(range(self._count)) - self._marked)
        if error is not None:
            self._fail(Aborted(reason(error)))
        elif missing:
            self._fail(ConfigurationError(f"the offer of request {self.request!r} ends and layers {missing} were never ready"))
        try:
            await quiesce(self._end, partial(self._fail, Aborted("it was cancelled")))
        finally:
            for wait in self._waits:
                wait.cancel()
            self._exchanges.close_door(self, "" if self._error is None else reason(self._error))
        if error is None and self._error is not None:
            raise self._error

    def _reached(self, layers: list[int], after: asyncio.Future[Any]) -> None:
        self._waits.discard(after)
        if after.cancelled():
            return
        failed = after.exception()
        if failed is None:
            self._tell(layers)
            return
        wrapped = Aborted(f"what layers {layers} of request {self.request!r} waited for failed: {reason(failed)}")
        wrapped.__cause__ = failed
        self._fail(wrapped)

    def _tell(self, layers: list[int]) -> None:
        self._ready.update(layers)
        left = [layer for layer in layers if layer not in self._had]
        if self._exchange is not None and left and self._error is None:
            self._exchanges.post(self._exchange[0], "layers", self._exchange[1], mine=False, l=left)

    def _fail(self, error: NixlError) -> None:
        """Give up: the peer is told, and the end comes when it has said that it is quiet."""
        if self._error is not None or self._end.done():
            return
        self._error = error
        if self._exchange is None:
            self._over()
        else:
            self._exchanges.post(self._exchange[0], "end", self._exchange[1], mine=False, why=reason(error))

    def _over(self) -> None:
        if self._exchange is not None:
            self._exchanges.forget(*self._exchange, mine=False)
            self._exchange = None
        if not self._end.done():
            self._end.set_result(None)

    # Door

    def accept(self, peer: str, number: int, message: dict[str, Any]) -> str | None:
        """Let the consumer begin; see `Door`."""
        if self._error is not None or self._end.done():
            return "the offer is over"
        if self._exchange is not None:
            return "it is being pulled already"
        if message["n"] != self._count:
            return f"the offer has {self._count} layers, and the pull {message['n']}"
        self._exchange = peer, number
        self._had = set(numbers(message, "have", self._count))
        self._exchanges.adopt(peer, number, self)
        self._exchanges.post(peer, "take", number, mine=False)
        if message.get("done") is True:
            self._over()
        else:
            self._tell(sorted(self._ready))
        return None

    def take(self, kind: str, message: dict[str, Any]) -> None:
        """Act on a message of the consumer; see `End`."""
        match kind:
            case "done" | "quiet":
                self._over()
            case "end":
                # It says so when it is quiet.
                if self._error is None:
                    self._error = gave_up(self.peer, self.request, message)
                self._over()

    def lost(self, error: NixlError) -> None:
        """Take note that the consumer is gone, or that this agent closes; see `End`."""
        if isinstance(error, ClosedError):
            self._fail(error)
            return
        if self._error is None and not self._end.done():
            self._error = error
        self._over()

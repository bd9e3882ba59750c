"""Pushing: who has the layers writes each into the peer's memory when it is ready, and the peer hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from functools import partial
from types import TracebackType
from typing import Any

from nixl_async.backend import quiesce
from nixl_async.errors import Aborted, ClosedError, ConfigurationError, NixlError, PeerLost
from nixl_async.layers.exchanges import Exchanges, encode, gave_up, numbers, reason
from nixl_async.layers.mover import Mover, Route
from nixl_async.layers.plan import LayerPlan, check_layers
from nixl_async.layers.stream import LayerStream

CONFIRM_LAYERS = 16
"""How many layers a consumer uses before it says so, where nobody waits for it."""


class Push:
    """The producer's side of a push: `async with agent.push(peer, plan) as push`, and `push.ready(layer)` for each layer.

    Leaving the block waits until every layer is in place at the peer; leaving it by an exception stops what is under way and
    tells the peer. Either way no byte moves any more afterwards.
    """

    def __init__(self, exchanges: Exchanges, plan: LayerPlan, window: int | None, route: Route) -> None:
        self._exchanges, self._plan, self._peer, self._window = exchanges, plan, route.peer, window
        self._number = 0
        self._mover = Mover(exchanges.sender, plan, window, route, tell=self._tell, arrived=self._landed)
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._ended_there = self._lost = False
        self._order: list[int] = []
        self._landed_layers: set[int] = set()
        self._changed: asyncio.Future[None] | None = None
        self._confirmed: set[int] = set()
        self._accepted: asyncio.Future[frozenset[int]] = exchanges.loop.create_future()

    def __repr__(self) -> str:
        there = f"{len(self._landed_layers)}/{len(self._plan)} layers"
        return f"<Push {self._plan.request!r} to {self._peer!r}: {there} in place, {len(self._confirmed)} confirmed>"

    @property
    def landed(self) -> frozenset[int]:
        """The layers that are in place at the peer."""
        return frozenset(self._landed_layers)

    @property
    def confirmed(self) -> frozenset[int]:
        """The layers that the peer has used, as far as it has said; without a window it says so of many at once."""
        return frozenset(self._confirmed)

    async def __aenter__(self) -> Push:
        if self._task is not None:
            raise ClosedError("a push is used once; make another")
        self._exchanges.check_peer(self._peer)
        self._number = self._exchanges.begin(self._peer, self)
        self._task = self._exchanges.loop.create_task(self._run())
        fields = {"k": "push", "r": self._plan.request, "n": len(self._plan), "window": self._window is not None}
        self._exchanges.post(self._peer, "open", self._number, mine=True, **fields)
        return self

    def ready(self, *layers: int, after: object = None) -> None:
        """Let layers go together, by one transfer and one message, once `after` is reached; see `Agent.transfer` for `after`.

        Returns at once. Until the block is left their bytes must stay as they are. A layer that the peer has already is not sent.

        Raises:
            DescriptorError: there is no such layer.
            Aborted, PeerLost, TransferError: the push has failed; leave the block.
        """
        chosen = check_layers(layers, len(self._plan), self._plan.request)
        if self._task is None:
            raise ClosedError("a push begins with `async with`")
        if self._error is not None:
            raise self._error
        self._exchanges.note("ready", self._plan.request, chosen)
        # The stream as it is here: what is launched on it later belongs to later layers.
        self._mover.let_go(chosen, self._exchanges.streams.mark(after))

    async def sent(self) -> AsyncIterator[int]:
        """Yield each layer as soon as it is in place at the peer, those that were there before included; their memory is free then.

        Ends with the last layer. One iteration at a time.

        Raises:
            Aborted, PeerLost, TransferError: the push has failed.
        """
        given = 0
        while given < len(self._plan):
            while given < len(self._order):
                given += 1
                yield self._order[given - 1]
            if given < len(self._plan):
                if self._error is not None:
                    raise self._error
                self._changed = self._exchanges.loop.create_future()
                await self._changed

    async def wanted(self) -> frozenset[int]:
        """Wait until the peer takes part, and return the layers that it has not got: all of them, unless it got some before.

        Raises:
            Aborted, PeerLost: it does not.
        """
        return frozenset(range(len(self._plan))) - await asyncio.shield(self._accepted)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        if error is not None:
            self._mover.fail(Aborted(reason(error)))
            await quiesce(self._task)
            return
        stop = partial(self._mover.fail, Aborted("it was cancelled"))
        try:
            if len(self._mover.seen) < len(self._plan):
                await self.wanted()
        except asyncio.CancelledError:
            stop()
            await quiesce(self._task)
            raise
        except NixlError as failed:
            self._mover.fail(failed)
        missing = sorted(set(range(len(self._plan))) - self._mover.seen)
        if missing:
            self._mover.fail(
                ConfigurationError(f"the push of request {self._plan.request!r} ends and layers {missing} were never ready")
            )
        self._mover.finish()
        await quiesce(self._task, stop)
        if self._error is not None:
            raise self._error

    async def _run(self) -> None:
        why = ""
        try:
            await self._mover.run()
        except BaseException as error:
            self._error = error
            why = reason(error)
        finally:
            self._wake()
            if not self._accepted.done():
                self._accepted.set_exception(self._error or ClosedError("the push is over"))
                # Nobody need have asked.
                self._accepted.exception()
            if self._ended_there:
                self._exchanges.post(self._peer, "quiet", self._number, mine=True)
            elif why and not self._lost:
                self._exchanges.post(self._peer, "end", self._number, mine=True, why=why)
            self._exchanges.forget(self._peer, self._number, mine=True)

    def _tell(self, layers: list[int]) -> bytes:
        return encode("layers", self._number, mine=True, l=layers)

    def _landed(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if layer not in self._landed_layers:
                self._landed_layers.add(layer)
                self._exchanges.note("landed", self._plan.request, (layer,))
                self._order.append(layer)
        self._wake()

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # End

    def take(self, kind: str, message: dict[str, Any]) -> None:
        """Act on a message of the consumer; see `End`."""
        count = len(self._plan)
        match kind:
            case "take":
                have, confirmed = numbers(message, "have", count), numbers(message, "confirmed", count)
                self._landed(have)
                self._confirmed.update(confirmed)
                if not self._accepted.done():
                    self._accepted.set_result(frozenset(have))
                self._mover.accept(have, confirmed)
            case "confirm":
                layers = numbers(message, "l", count)
                self._confirmed.update(layers)
                self._mover.confirm(layers)
            case "end":
                self._ended_there = True
                self._mover.fail(gave_up(self._peer, self._plan.request, message))
            case "refuse":
                self._lost = True
                self._mover.fail(gave_up(self._peer, self._plan.request, message))

    def lost(self, error: NixlError) -> None:
        """Take note that the consumer is gone; see `End`."""
        self._lost = isinstance(error, PeerLost)
        self._mover.fail(error)


class Incoming(LayerStream):
    """The consumer's side of a push: `async with agent.incoming(request) as incoming`, `async for layer in incoming.layers()`.

    It outlives the producer: when that is lost, `layers` raises, and another iteration waits for the request to be pushed again, by
    the same peer or, if none was named, by any; what has arrived is not sent again. Leaving the block before all layers are in
    place makes the producer stop, and waits until nothing moves any more.

    A producer that is lost but alive (its network is cut, not its process) goes on writing until it notices too, by default
    within 3 seconds of silence: memory that it was given is safe to use for something else only after that, or once the
    region is unregistered.
    """

    kind = "push"

    def __init__(self, exchanges: Exchanges, request: str, peer: str | None) -> None:
        super().__init__(exchanges, request, None)
        self.peer = peer
        self.trace: bytes = b""
        """The trace context of the producer, for `nixl_async.tracing`; empty until it has come."""
        self._exchange: tuple[str, int] | None = None
        self._quiet: asyncio.Future[None] | None = None
        self._entered = False
        # Whether the producer waits for what is confirmed, and what it has not been told of.
        self._windowed = False
        self._unsaid: list[int] = []

    def __repr__(self) -> str:
        source = f"from {self._exchange[0]!r}" if self._exchange else "from nobody yet"
        return f"<Incoming {self.request!r} {source}: {len(self._arrived)}/{self._count} layers>"

    async def __aenter__(self) -> Incoming:
        if self._entered:
            raise ClosedError("an incoming request is used once; make another")
        self._entered = True
        self._exchanges.open_door(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = "" if self.complete else reason(error) if error is not None else "its block was left"
        self._exchanges.close_door(self, why)
        self._release_streams()
        if self._exchange is not None and not self.complete:
            self._quiet = self._exchanges.loop.create_future()
            self._exchanges.post(self._exchange[0], "end", self._exchange[1], mine=False, why=why)
            await quiesce(self._quiet)
        self._detach()

    def _confirm(self, layer: int) -> None:
        if self._exchange is not None:
            self._unsaid.append(layer)
            if self._windowed or len(self._unsaid) >= CONFIRM_LAYERS or len(self._confirmed) == self._count:
                self._exchanges.post(self._exchange[0], "confirm", self._exchange[1], mine=False, l=self._unsaid)
                self._unsaid = []
            if self.complete and len(self._confirmed) == self._count:
                self._detach()

    def _detach(self) -> None:
        if self._exchange is not None:
            self._exchanges.forget(*self._exchange, mine=False)
            self._exchange = None
        if self._quiet is not None and not self._quiet.done():
            self._quiet.set_result(None)

    # Door

    def accept(self, peer: str, number: int, message: dict[str, Any]) -> str | None:
        """Let a producer begin; see `Door`."""
        if self._exchange is not None:
            return f"it is being received from {self._exchange[0]!r} already"
        if self._count not in (None, message["n"]):
            return f"it had {self._count} layers before, and has {message['n']}"
        self._count = message["n"]
        self.trace = message["trace"]
        self._exchange = peer, number
        self._windowed, self._unsaid = message.get("window") is True, []
        # What is known of the producer before this one says nothing about this one.
        self._failure = None
        self._exchanges.adopt(peer, number, self)
        have, confirmed = sorted(self._arrived), sorted(self._confirmed)
        self._exchanges.post(peer, "take", number, mine=False, have=have, confirmed=confirmed)
        self._wake()
        return None

    def take(self, kind: str, message: dict[str, Any]) -> None:
        """Act on a message of the producer; see `End`."""
        match kind:
            case "layers":
                assert self._count is not None
                self._take_layers(numbers(message, "l", self._count))
            case "end":
                peer = self._exchange[0] if self._exchange else "?"
                self._detach()
                self._failed(gave_up(peer, self.request, message))
            case "quiet":
                self._detach()

    def lost(self, error: NixlError) -> None:
        """Take note that the producer is gone, or that this agent closes; see `End`."""
        if not isinstance(error, ClosedError):
            self._detach()
        if not self.complete:
            self._failed(error)

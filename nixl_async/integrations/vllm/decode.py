"""The decode side of one rank: asks prefill ranks for the KV cache of a request, and takes it into the request's blocks.

Everything here runs on the loop. A request's blocks may be used, or reused, only once it has been reported: by then nothing
writes into them any more, whether it arrived, failed or was aborted.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nixl_async import Aborted, LayerPlan, NixlError, PeerLost, ProtocolError
from nixl_async.integrations.vllm.layout import Slice, Table, packed, shared, sources, table
from nixl_async.integrations.vllm.node import Node, exchange_name
from nixl_async.integrations.vllm.reports import Reports

logger = logging.getLogger("nixl_async.integrations.vllm")


@dataclass(frozen=True)
class Receive:
    """A request whose KV cache is wanted: what the prefill side calls it, where its ranks are, and where it goes.

    `blocks[g]` are this side's blocks in KV cache group g, `index[g]` the positions in the request that they stand for, ascending;
    `windowed[g]` tells that those which have left a sliding window need not come.
    `early`: the prefill may not have begun. `sync`: the engine's thread waits for it, layer by layer, in this very step.
    """

    request: str
    transfer: str
    addresses: tuple[str, ...]
    index: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[int, ...], ...]
    windowed: tuple[bool, ...]
    early: bool = False
    sync: bool = False


@dataclass
class _Progress:
    """What has come from one prefill rank: of each chunk, how many of its layers, or all of them by being over."""

    last: int | None = None
    layers: dict[int, set[int]] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)


class Load:
    """A request on its way here."""

    def __init__(self, receive: Receive, ranks: Iterable[int], now: float) -> None:
        self.receive = receive
        self.index = [np.asarray(one, np.int64) for one in receive.index]
        self.blocks = [np.asarray(one, np.int64) for one in receive.blocks]
        self.began = now
        self.nbytes = 0
        self.cancelled = False
        self.task: asyncio.Task[None] | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._progress = {rank: _Progress() for rank in ranks}
        self._missing = {rank: [np.ones(len(index), np.bool_) for index in self.index] for rank in self._progress}

    # What the loop says.

    def expect(self, rank: int, chunk: int, *, final: bool) -> None:
        """Take note of a chunk that a rank sends."""
        with self._changed:
            self._progress[rank].layers[chunk] = set()
            if final:
                self._progress[rank].last = chunk
            self._changed.notify_all()

    def layer_arrived(self, rank: int, chunk: int, layer: int) -> None:
        """Take note of one layer of a chunk."""
        with self._changed:
            self._progress[rank].layers[chunk].add(layer)
            self._changed.notify_all()

    def chunk_arrived(self, rank: int, chunk: int, places: list[Table]) -> None:
        """Take note of a whole chunk, of the blocks at these places of `blocks`."""
        with self._changed:
            self._progress[rank].over.add(chunk)
            self._changed.notify_all()
        for missing, place in zip(self._missing[rank], places, strict=True):
            missing[place] = False

    def end(self) -> None:
        """Let whoever waits go on: nothing more comes."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def bad_blocks(self) -> set[int]:
        """Return the blocks that are not in place, of any group."""
        found: set[int] = set()
        for rank in self._missing:
            for missing, blocks in zip(self._missing[rank], self.blocks, strict=True):
                found.update(blocks[missing].tolist())
        return found

    def shortfall(self) -> int:
        """Return how many blocks are not in place that have to be."""
        strict = [group for group, windowed in enumerate(self.receive.windowed) if not windowed]
        return sum(int(missing[group].sum()) for missing in self._missing.values() for group in strict)

    # What the engine's thread asks.

    def wait(self, layer: int | None = None) -> None:
        """Block the calling thread until a layer is in place, or, if None, all is over; or until the request has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (layer is not None and self._has(layer)))

    def _has(self, layer: int) -> bool:
        return all(
            one.last is not None
            and all(chunk in one.over or layer in one.layers.get(chunk, ()) for chunk in range(one.last + 1))
            for one in self._progress.values()
        )


class Decode:
    """The requests that this rank receives."""

    def __init__(self, node: Node, reports: Reports, *, push: bool, one_group: bool) -> None:
        self._node, self._reports, self._push, self._one_group = node, reports, push, one_group
        self._loop = asyncio.get_running_loop()
        self._loads: dict[str, Load] = {}
        self._boxes: dict[tuple[str, str], asyncio.Queue[dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._loads)

    # What the engine says.

    def load(self, receive: Receive) -> Load:
        """Return the record of a request that `start` will ask for. Any thread may call it."""
        needed, _ = self._ranks(receive.addresses)
        return Load(receive, needed, self._loop.time())

    def start(self, load: Load) -> None:
        """Ask for a request."""
        self._loads[load.receive.request] = load
        load.task = self._spawn(self._receive(load))

    def cancel(self, request: str) -> None:
        """Stop receiving a request; it is reported when nothing writes into its blocks any more."""
        load = self._loads.get(request)
        if load is not None and load.task is not None and not load.cancelled:
            load.cancelled = True
            load.task.cancel()

    def claim(self, addresses: tuple[str, ...], transfers: list[str]) -> None:
        """Ask the prefill ranks at these addresses to keep requests."""
        needed, others = self._ranks(addresses)
        for rank in [*needed, *others]:
            self._spawn(self._say(addresses[rank], "claim", ids=transfers))

    def release(self, request: str, transfer: str, addresses: tuple[str, ...]) -> None:
        """Tell the prefill ranks that nothing of a request is needed."""
        needed, others = self._ranks(addresses)
        for rank in [*needed, *others]:
            self._spawn(self._say(addresses[rank], "release", id=transfer, to=request))

    async def close(self) -> None:
        """Stop everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What the prefill side says.

    def heard(self, peer: str, message: dict[str, Any]) -> None:
        """Hand a message of a prefill rank to the request that it is for."""
        box = self._boxes.get((peer, message["to"]))
        if box is not None:
            box.put_nowait(message)

    def lost(self, peer: str, reason: str) -> None:
        """Fail what waits for a peer that is gone."""
        for (name, _), box in self._boxes.items():
            if name == peer:
                box.put_nowait({"t": "lost", "why": reason})

    # Receiving.

    async def _receive(self, load: Load) -> None:
        receive = load.receive
        needed, others = self._ranks(receive.addresses)
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for rank in needed:
                    group.create_task(self._from(load, rank))
            if short := load.shortfall():
                raise ProtocolError(f"{short} blocks of request {receive.transfer!r} that were asked for did not come")
        except NixlError as error:
            failure = error
        except BaseExceptionGroup as errors:
            failure = _first(errors)
        except asyncio.CancelledError as error:
            failure = error
        if load.cancelled:
            failure = asyncio.CancelledError()
        del self._loads[receive.request]
        for rank in others if failure is None else [*needed, *others]:
            self._spawn(self._say(receive.addresses[rank], "release", id=receive.transfer, to=receive.request))
        self._report(load, failure)
        load.end()

    def _report(self, load: Load, failure: BaseException | None) -> None:
        request, seconds = load.receive.request, self._loop.time() - load.began
        if failure is None:
            if load.receive.sync:
                self._reports.loaded(seconds, load.nbytes)
            else:
                self._reports.received(request, seconds, load.nbytes)
        elif isinstance(failure, asyncio.CancelledError):
            if not load.receive.sync:
                self._reports.cancelled(request)
        else:
            log = logger.warning if isinstance(failure, NixlError) else logger.error
            log(
                "the KV cache of %s did not arrive: %s",
                request,
                failure,
                exc_info=None if isinstance(failure, NixlError) else failure,
            )
            if load.receive.sync:
                self._reports.broken(load.bad_blocks())
            else:
                # vLLM finds requests by their blocks only where all layers share one table.
                self._reports.failed(request, load.bad_blocks() if self._one_group else None)

    async def _from(self, load: Load, rank: int) -> None:
        """Ask one prefill rank, and take what it sends."""
        receive = load.receive
        peer = (await self._node.reach(receive.addresses[rank])).name
        key = peer, receive.request
        box = self._boxes[key] = asyncio.Queue()
        try:
            self._node.post(
                peer,
                "want",
                id=receive.transfer,
                to=receive.request,
                early=receive.early,
                index=[packed(one) for one in load.index],
                blocks=[packed(one) for one in load.blocks],
            )
            async with asyncio.TaskGroup() as group:
                final = False
                while not final:
                    message = await box.get()
                    if message["t"] == "refused":
                        raise Aborted(f"{peer} does not send request {receive.transfer!r}: {message['why']}")
                    if message["t"] == "lost":
                        raise PeerLost(message["why"], peer=peer)
                    final = message["final"]
                    load.expect(rank, message["k"], final=final)
                    group.create_task(self._take(load, rank, peer, message))
        finally:
            del self._boxes[key]

    async def _take(self, load: Load, rank: int, peer: str, message: dict[str, Any]) -> None:
        """Take one chunk."""
        node, chunk = self._node, message["k"]
        _, layout = node.known(peer)
        theirs, mine = shared(layout, node.layout)
        origins, places = [], []
        for index, blocks, wanted in zip(message["index"], message["blocks"], load.index, strict=True):
            positions, origin = table(index), table(blocks)
            place = np.searchsorted(wanted, positions)
            if (
                len(origin) != len(positions)
                or (len(place) and place[-1] >= len(wanted))
                or np.any(wanted[place] != positions)
            ):
                raise ProtocolError(f"{peer} sends blocks of request {load.receive.transfer!r} that were not asked for")
            origins.append(origin)
            places.append(place)
        if any(len(place) for place in places):
            targets = [blocks[place] for blocks, place in zip(load.blocks, places, strict=True)]
            await self._copy(load, rank, chunk, peer, (theirs, origins), (mine, targets))
        load.chunk_arrived(rank, chunk, places)

    async def _copy(
        self,
        load: Load,
        rank: int,
        chunk: int,
        peer: str,
        source: tuple[Slice, list[Table]],
        target: tuple[Slice, list[Table]],
    ) -> None:
        node, name = self._node, exchange_name(load.receive.transfer, load.receive.request, chunk)
        (theirs, origins), (mine, targets) = source, target
        places = [mine.pages(here, node.regions[here.region], targets[here.group]) for here in node.layout.layers]
        if self._push:
            exchange: Any = node.agent.incoming(name, peer=peer)
        else:
            remote, layout = node.known(peer)
            layers = []
            for there, dst in zip(layout.layers, places, strict=True):
                layers.append((theirs.pages(there, remote.region(there.region), origins[there.group]), dst))
            exchange = node.agent.pull(peer, LayerPlan(name, layers))
        async with exchange:
            async for layer in exchange.layers(ordered=False):
                load.layer_arrived(rank, chunk, layer)
        load.nbytes += sum(place.nbytes for place in places)

    async def _say(self, address: str, kind: str, **fields: Any) -> None:
        try:
            peer = await self._node.reach(address)
        except NixlError as error:
            logger.info("%s does not hear a %s: %s", address, kind, error)
        else:
            self._node.post(peer.name, kind, **fields)

    def _ranks(self, addresses: tuple[str, ...]) -> tuple[list[int], list[int]]:
        layout = self._node.layout
        return sources(layout.heads, len(addresses), layout.rank, layout.tp)

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group of groups: the others are mostly what it caused."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""The prefill side of one rank: keeps a request's blocks until every decode rank has what it needs of them, and sends it.

Everything here runs on the loop. A request's blocks may be reused only once it has been reported by `Reports.sent`: by then
nothing reads them any more. It is reported when all decode ranks have it, when they need it no longer, when its lease ends with
nobody reading, or soon after the decode side that claimed it has died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nixl_async import Aborted, LayerPlan, NixlError, PeerLost, ProtocolError
from nixl_async.integrations.vllm.layout import Table, consumers, packed, shared, table
from nixl_async.integrations.vllm.node import Node, exchange_name
from nixl_async.integrations.vllm.outgoing import Outgoing, Step, Want
from nixl_async.integrations.vllm.reports import Reports

logger = logging.getLogger("nixl_async.integrations.vllm")

MAX_REMEMBERED = 4096
"""How many transfers that are over are remembered."""


@dataclass(frozen=True)
class Terms:
    """How the prefill side behaves: who copies, and for how long it keeps what."""

    push: bool
    lease: float
    """Seconds for which a finished request waits for somebody to want it, from its end or its last claim."""
    orphan: float
    """Seconds for which it waits for another one when the decode side that claimed it has died."""
    early: float
    """Seconds for which a wish waits for its request to be prefilled."""


class Prefill:
    """The requests that this rank sends."""

    def __init__(self, node: Node, reports: Reports, terms: Terms) -> None:
        self._node, self._reports, self._terms = node, reports, terms
        self._loop = asyncio.get_running_loop()
        self._by_request: dict[str, Outgoing] = {}
        self._by_transfer: dict[str, Outgoing] = {}
        self._early: dict[str, dict[tuple[str, str], tuple[Want, asyncio.TimerHandle]]] = {}
        self._over: dict[str, str] = {}
        """Of the latest transfers that are here no longer, why; for those who ask too late."""

    def __len__(self) -> int:
        return len(self._by_request)

    # What the engine says.

    def begin(self, request: str, transfer: str) -> None:
        """Take note that a request is being prefilled, so that wishes for it wait for it."""
        if request in self._by_request:
            return
        self._over.pop(transfer, None)
        outgoing = Outgoing(request, transfer)
        self._by_request[request] = self._by_transfer[transfer] = outgoing
        for want, timer in self._early.pop(transfer, {}).values():
            timer.cancel()
            outgoing.wants[want.peer, want.to] = want

    def advance(self, request: str, blocks: list[list[int]], tokens: int, final: bool, step: Step | None) -> None:
        """Take note that a pass puts a request's first `tokens` tokens in place, in `blocks`; `step` says when which layer is."""
        outgoing = self._by_request.get(request)
        if outgoing is not None:
            outgoing.blocks, outgoing.tokens, outgoing.final, outgoing.step = blocks, tokens, final, step
            for want in list(outgoing.wants.values()):
                self._feed(outgoing, want)

    def finish(self, request: str, transfer: str, blocks: list[list[int]], tokens: int, lease: float) -> None:
        """Take over a prefilled request's blocks until it is reported as sent."""
        self.begin(request, transfer)
        outgoing = self._by_request[request]
        self._lease(outgoing, min(lease, self._terms.orphan) if outgoing.orphaned else lease)
        self.advance(request, blocks, tokens, True, None)
        self._settle(outgoing)

    async def abort(self, request: str, *, report: bool) -> None:
        """Give a request up that will not be finished; with `report`, report it as sent once nothing reads its blocks."""
        outgoing = self._by_request.get(request)
        if outgoing is not None:
            for want in list(outgoing.wants.values()):
                await self._refuse(want, "its prefill was aborted")
            self._forget(outgoing, "its prefill was aborted")
            while outgoing.tasks:
                await asyncio.wait(list(outgoing.tasks))
        if report:
            self._reports.sent(request)

    async def quiesce(self, requests: Iterable[str]) -> None:
        """Wait until nothing reads the blocks of requests that are being prefilled, because they are about to be reused."""
        for outgoing in [self._by_request[one] for one in requests if one in self._by_request]:
            tasks = [task for want in outgoing.wants.values() for task in want.tasks]
            await asyncio.gather(*tasks, return_exceptions=True)
            # It begins again; what has gone already need not go again.
            outgoing.blocks, outgoing.tokens, outgoing.final = [], 0, False

    # What the decode side says.

    def want(self, peer: str, message: dict[str, Any]) -> None:
        """Begin to send a request, or as soon as it is here."""
        layout = self._node.layouts.get(peer)
        to, transfer = message["to"], message["id"]
        if layout is None:
            self._node.post(peer, "refused", to=to, why="it has not said what its KV cache is like")
            return
        index, blocks = [table(one) for one in message["index"]], [table(one) for one in message["blocks"]]
        if [len(one) for one in index] != [len(one) for one in blocks] or len(index) != len(layout.group_tokens):
            raise ProtocolError(f"{transfer!r} is wanted in {len(blocks)} groups, of which positions and blocks do not match")
        want = Want(peer, to, layout.rank, layout.tp, index, blocks)
        outgoing = self._by_transfer.get(transfer)
        if outgoing is not None:
            outgoing.wants[peer, to] = want
            outgoing.claimed_by.add(peer)
            outgoing.orphaned = False
            self._feed(outgoing, want)
        elif message["early"] and transfer not in self._over:
            timer = self._loop.call_later(self._terms.early, self._too_early, transfer, want)
            self._early.setdefault(transfer, {})[peer, to] = want, timer
        else:
            self._node.post(peer, "refused", to=to, why=self._over.get(transfer, "it is not here"))

    def claim(self, peer: str, transfers: Iterable[str]) -> None:
        """Keep requests for a peer that will want them."""
        for outgoing in [self._by_transfer[one] for one in transfers if one in self._by_transfer]:
            outgoing.claimed_by.add(peer)
            outgoing.orphaned = False
            if outgoing.lease is not None:
                self._lease(outgoing, self._terms.lease)

    async def release(self, peer: str, transfer: str, to: str) -> None:
        """Take note that a decode rank needs nothing more of a request."""
        wants = self._early.get(transfer, {})
        if (peer, to) in wants:
            wants.pop((peer, to))[1].cancel()
        if not wants:
            self._early.pop(transfer, None)
        outgoing, layout = self._by_transfer.get(transfer), self._node.layouts.get(peer)
        if outgoing is None or layout is None:
            return
        want = outgoing.wants.get((peer, to))
        if want is not None:
            await self._stop(want)
        outgoing.served.add(layout.rank)
        self._settle(outgoing, layout.tp)

    def lost(self, peer: str) -> None:
        """Give back what only a peer that is gone wanted."""
        for transfer, wants in list(self._early.items()):
            for key in [key for key in wants if key[0] == peer]:
                wants.pop(key)[1].cancel()
            if not wants:
                del self._early[transfer]
        for outgoing in list(self._by_request.values()):
            mine = [key for key in outgoing.wants if key[0] == peer]
            if not mine and peer not in outgoing.claimed_by:
                continue
            outgoing.claimed_by.discard(peer)
            for key in mine:
                self._spawn(outgoing, self._stop(outgoing.wants.pop(key)))
            if mine:
                # What its ranks had does not count for those that may come instead.
                outgoing.served.clear()
            if outgoing.claimed_by or outgoing.wants:
                continue
            outgoing.orphaned = True
            if outgoing.lease is not None:
                self._lease(outgoing, min(outgoing.lease.when() - self._loop.time(), self._terms.orphan))

    async def close(self) -> None:
        """Stop everything; the agent is closed next."""
        for outgoing in list(self._by_request.values()):
            for want in outgoing.wants.values():
                await self._stop(want)
            self._forget(outgoing, "the engine is shut down")
        for wants in self._early.values():
            for _, timer in wants.values():
                timer.cancel()

    # Sending.

    def _feed(self, outgoing: Outgoing, want: Want) -> None:
        """Send what has come into place since the last time."""
        if want.complete or want.done or not (outgoing.tokens > want.tokens or outgoing.final):
            return
        try:
            parts = [self._part(outgoing, want, group) for group in range(len(self._node.layout.group_tokens))]
        except NixlError as error:
            self._spawn(outgoing, self._refuse(want, str(error)))
            return
        number, want.chunks = want.chunks, want.chunks + 1
        want.tokens, want.complete = max(want.tokens, outgoing.tokens), outgoing.final
        fields: dict[str, Any] = {"to": want.to, "k": number, "final": want.complete}
        fields["index"] = [packed(index) for index, _, _ in parts]
        fields["blocks"] = [packed(blocks) for _, blocks, _ in parts]
        self._node.post(want.peer, "chunk", **fields)
        task = self._spawn(outgoing, self._send(outgoing.transfer, want, number, parts, outgoing.step))
        want.tasks.add(task)
        task.add_done_callback(partial(self._gone, outgoing, want))

    def _part(self, outgoing: Outgoing, want: Want, group: int) -> tuple[Table, Table, Table]:
        """Return the positions in the request, our blocks and theirs of what one group has to send."""
        size, index = self._node.layout.group_tokens[group], want.index[group]
        mine = np.asarray(outgoing.blocks[group], np.int64)
        if outgoing.final and len(index) and index[-1] >= len(mine):
            raise Aborted(f"block {index[-1]} of the request is wanted, which has {len(mine)} blocks here")
        # Blocks that are not full go with the last chunk: what lands in a block lands there once.
        stop = len(mine) if outgoing.final else outgoing.tokens // size
        chosen = (index >= want.tokens // size) & (index < min(stop, len(mine)))
        # vLLM's null block, whose number is 0, stands for what has left a sliding window.
        chosen[chosen] &= mine[index[chosen]] != 0
        return index[chosen], mine[index[chosen]], want.blocks[group][chosen]

    async def _send(
        self, transfer: str, want: Want, number: int, parts: list[tuple[Table, Table, Table]], step: Step | None
    ) -> None:
        node, name = self._node, exchange_name(transfer, want.to, number)
        if not any(len(index) for index, _, _ in parts):
            return
        count = len(node.layout.layers)
        if self._terms.push:
            remote, layout = node.known(want.peer)
            mine, theirs = shared(node.layout, layout)
            layers = []
            for here, there in zip(node.layout.layers, layout.layers, strict=True):
                _, blocks, targets = parts[here.group]
                src = mine.pages(here, node.regions[here.region], blocks)
                layers.append((src, theirs.pages(there, remote.region(there.region), targets)))
            exchange: Any = node.agent.push(want.peer, LayerPlan(name, layers))
        else:
            exchange = node.agent.offer(want.peer, name, count)
        async with exchange:
            if step is None:
                exchange.ready(*range(count))
            else:
                step.join(exchange)
                await asyncio.shield(step.closed)

    def _gone(self, outgoing: Outgoing, want: Want, task: asyncio.Task[None]) -> None:
        """Draw the conclusions from the end of one chunk."""
        want.tasks.discard(task)
        if task.cancelled() or want.done:
            return
        error = task.exception()
        if error is None:
            if want.complete and not want.tasks:
                want.done = True
                outgoing.served.add(want.rank)
                self._settle(outgoing, want.tp)
        elif isinstance(error, PeerLost | Aborted):
            # The other side is gone, or gives up: it says the rest by itself.
            logger.info("sending %s to %s ends: %s", outgoing.transfer, want.peer, error)
            want.done = True
        else:
            logger.error("sending %s to %s failed: %r", outgoing.transfer, want.peer, error)
            self._reports.count("failed_sends")
            self._spawn(outgoing, self._refuse(want, str(error)))

    async def _refuse(self, want: Want, why: str) -> None:
        await self._stop(want)
        self._node.post(want.peer, "refused", to=want.to, why=why)

    def _too_early(self, transfer: str, want: Want) -> None:
        wants = self._early.get(transfer, {})
        if wants.pop((want.peer, want.to), None) is not None:
            why = f"nobody has prefilled request {transfer!r} within {self._terms.early:g} s"
            self._node.post(want.peer, "refused", to=want.to, why=why)
        if not wants:
            self._early.pop(transfer, None)

    async def _stop(self, want: Want) -> None:
        """End a wish; when this returns nothing reads blocks for it."""
        want.done = True
        tasks = list(want.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Keeping and giving back.

    def _spawn(self, outgoing: Outgoing, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        outgoing.tasks.add(task)
        task.add_done_callback(partial(self._quiet, outgoing))
        return task

    def _quiet(self, outgoing: Outgoing, task: asyncio.Task[None]) -> None:
        outgoing.tasks.discard(task)
        if not task.cancelled():
            task.exception()
        if outgoing.expired:
            # After what else hears of the task: it may have been the last that was needed.
            self._loop.call_soon(self._expire, outgoing)

    def _lease(self, outgoing: Outgoing, seconds: float) -> None:
        if outgoing.lease is not None:
            outgoing.lease.cancel()
        outgoing.lease = self._loop.call_later(max(0.0, seconds), self._expire, outgoing)

    def _expire(self, outgoing: Outgoing) -> None:
        if self._by_request.get(outgoing.request) is not outgoing:
            return
        # What is being read is not given away; the end of the reading comes back here.
        outgoing.expired = True
        if not outgoing.tasks:
            logger.warning("the blocks of %s are given back: nobody has taken all of them in time", outgoing.request)
            self._reports.count("expired")
            self._give_back(outgoing, "its lease has ended")

    def _settle(self, outgoing: Outgoing, tp: int | None = None) -> None:
        """Give a finished request's blocks back if every decode rank has what it needs of them."""
        if tp is not None:
            outgoing.target_tp = tp
        if outgoing.lease is None or outgoing.target_tp is None:
            return
        layout = self._node.layout
        if outgoing.served.issuperset(consumers(layout.heads, layout.rank, layout.tp, outgoing.target_tp)):
            self._give_back(outgoing, "it has been sent")

    def _give_back(self, outgoing: Outgoing, why: str) -> None:
        self._forget(outgoing, why)
        if outgoing.tasks:
            self._loop.create_task(self._report_when_quiet(outgoing))
        else:
            self._reports.sent(outgoing.request)

    async def _report_when_quiet(self, outgoing: Outgoing) -> None:
        while outgoing.tasks:
            await asyncio.wait(list(outgoing.tasks))
        self._reports.sent(outgoing.request)

    def _forget(self, outgoing: Outgoing, why: str) -> None:
        if outgoing.lease is not None:
            outgoing.lease.cancel()
        self._by_request.pop(outgoing.request, None)
        if self._by_transfer.get(outgoing.transfer) is outgoing:
            del self._by_transfer[outgoing.transfer]
        self._over[outgoing.transfer] = why
        if len(self._over) > MAX_REMEMBERED:
            del self._over[next(iter(self._over))]

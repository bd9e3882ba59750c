"""The agent of one rank of a vLLM engine, on an event loop of its own thread, and what ranks say to each other.

Messages are notifications that begin with `PREFIX`, followed by msgpack. The decode side connects:

    hello    ⇄ layout, answer: once for each connection; both sides check that they fit together
    claim    → ids: requests whose KV cache will be wanted; each claim renews their lease
    want     → id, to, early, index, blocks: the decode side's request `to` wants what the prefill side calls `id`: which positions
               of the request in which blocks; `early`: it may be that nobody has prefilled it yet
    chunk    ← to, k, final, index, blocks: the exchange `exchange_name(id, to, k)` moves these blocks, layer by layer; `final`
               says that there is no further one
    refused  ← to, why: it will not be
    release  → id, to: nothing more of it is needed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec  # type: ignore[import-not-found]

from nixl_async import Agent, MembershipEvent, NixlError, Notification, Peer, PeerLost
from nixl_async.integrations.vllm.layout import Layout

logger = logging.getLogger("nixl_async.integrations.vllm")

T = TypeVar("T")
PREFIX = b"nixl_async.vllm\x00"
CONNECT_SECONDS = 10.0
"""How long reaching a peer may take: connecting, and hearing what its KV cache is like."""


def exchange_name(transfer: str, to: str, number: int) -> str:
    """Name the exchange of layers that moves one chunk of a request."""
    return f"{transfer}>{to}#{number}"


class LoopThread:
    """An event loop on a daemon thread; other threads hand it work and may wait for the result."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function on the loop, soon, after what was handed over before; after `close` do nothing."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and return its result; blocks the calling thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def close(self) -> None:
        """End the loop and the thread. Idempotent."""
        self.call(self.loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()


class Node:
    """An agent with the rank's KV cache registered, that knows what its peers' are like. Of one loop, like the agent.

    `heard(peer, message)` is called with each message but hello, `lost(peer, reason)` when a peer is gone: on the loop, in order.
    """

    def __init__(
        self,
        agent: Agent,
        layout: Layout,
        heard: Callable[[str, dict[str, Any]], None],
        lost: Callable[[str, str], None],
    ) -> None:
        self.agent, self.layout = agent, layout
        self.address = ""
        self.regions: dict[str, Any] = {}
        self.layouts: dict[str, Layout] = {}
        """The peers that have said hello and whose KV cache fits this one's."""
        self._heard, self._lost = heard, lost
        self._refusals: dict[str, NixlError] = {}
        self._greetings: dict[str, asyncio.Future[None]] = {}
        self._reached: dict[str, Peer] = {}
        self._reaching: dict[str, asyncio.Task[Peer]] = {}
        self._outgoing: dict[str, deque[bytes]] = {}
        self._posting: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, memory: Mapping[str, Any], host: str, port: int, advertise: str) -> None:
        """Open the agent, register `memory` under its names, and serve at `host`:`port`, told to peers as `advertise`:port."""
        await self.agent.__aenter__()
        try:
            for name, tensor in memory.items():
                self.regions[name] = await self.agent.register(tensor, name=name)
            _, bound = await self.agent.serve(host, port, advertise=advertise)
        except BaseException:
            await self.agent.aclose()
            raise
        self.address = f"[{advertise}]:{bound}" if ":" in advertise else f"{advertise}:{bound}"
        events, messages = self.agent.membership(), self.agent.notifications(prefix=PREFIX)
        self._tasks = [asyncio.create_task(self._watch(events)), asyncio.create_task(self._listen(messages))]

    async def aclose(self) -> None:
        """Close the agent: nothing moves any more when this returns, and the memory is free."""
        running = [*self._tasks, *self._posting, *self._reaching.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self.agent.aclose()

    async def reach(self, address: str) -> Peer:
        """Return the peer that is served at an address, connected and known to fit.

        Raises:
            PeerLost: nobody answers there, or not within CONNECT_SECONDS.
            ConfigurationError: its KV cache does not fit this one's.
        """
        peer = self._reached.get(address)
        if peer is not None and peer.connected:
            return peer
        task = self._reaching.get(address)
        if task is None:
            task = self._reaching[address] = asyncio.create_task(self._reach(address))
            task.add_done_callback(lambda ended: (self._reaching.pop(address, None), ended.cancelled() or ended.exception()))
        return await asyncio.shield(task)

    def known(self, name: str) -> tuple[Peer, Layout]:
        """Return a connected peer and what its KV cache is like.

        Raises:
            PeerLost: it is not there any more.
        """
        peer, layout = self.agent.peers.get(name), self.layouts.get(name)
        if peer is None or layout is None:
            raise PeerLost(f"peer {name!r} is gone", peer=name)
        return peer, layout

    def post(self, peer: str, kind: str, **fields: Any) -> None:
        """Send a message, after those posted before; one to a peer that is gone is dropped."""
        payload = PREFIX + msgspec.msgpack.encode({"t": kind, **fields})
        queue = self._outgoing.get(peer)
        if queue is not None:
            queue.append(payload)
            return
        self._outgoing[peer] = deque([payload])
        task = asyncio.create_task(self._drain(peer))
        self._posting.add(task)
        task.add_done_callback(self._posting.discard)

    async def _drain(self, peer: str) -> None:
        queue = self._outgoing[peer]
        try:
            while queue:
                await self.agent.notify(peer, queue[0])
                queue.popleft()
        except NixlError as error:
            logger.info("messages to %s are dropped: %s", peer, error)
        finally:
            del self._outgoing[peer]

    async def _reach(self, address: str) -> Peer:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                peer = await self._connect(address)
                if peer.name not in self.layouts and peer.name not in self._refusals:
                    heard = self._greetings.setdefault(peer.name, asyncio.get_running_loop().create_future())
                    self.post(peer.name, "hello", layout=self.layout.pack(), answer=True)
                    await asyncio.shield(heard)
        except TimeoutError:
            raise PeerLost(f"{address} did not say within {CONNECT_SECONDS:g} s what its KV cache is like") from None
        if peer.name in self._refusals:
            raise self._refusals[peer.name]
        if not peer.connected:
            raise PeerLost(peer.gone, peer=peer.name)
        self._reached[address] = peer
        return peer

    async def _connect(self, address: str) -> Peer:
        try:
            return await self.agent.connect(address)
        except PeerLost:
            # The other side parts from who takes long to greet it, as a process does that starts on a busy machine.
            return await self.agent.connect(address)

    async def _listen(self, messages: AsyncIterator[Notification]) -> None:
        async for notification in messages:
            peer = notification.peer
            try:
                message = msgspec.msgpack.decode(notification.payload[len(PREFIX) :], type=dict[str, Any])
                if message["t"] == "hello":
                    self._greeted(peer, message)
                else:
                    self._heard(peer, message)
            except Exception as error:
                # Whatever one peer sends, the conversation with the others goes on.
                logger.warning("peer %s sent a message that is not understood: %r", peer, error)

    async def _watch(self, events: AsyncIterator[MembershipEvent]) -> None:
        async for event in events:
            if event.kind in ("lost", "left"):
                logger.info("peer %s is gone: %s", event.peer, event.reason)
                self.layouts.pop(event.peer, None)
                self._refusals.pop(event.peer, None)
                self._settle(event.peer)
                for address in [address for address, peer in self._reached.items() if peer.name == event.peer]:
                    del self._reached[address]
                self._lost(event.peer, event.reason)

    def _greeted(self, peer: str, message: dict[str, Any]) -> None:
        try:
            layout = Layout.unpack(message["layout"])
            self.layout.check(layout)
        except NixlError as error:
            logger.error("peer %s cannot exchange KV blocks with this engine: %s", peer, error)
            self._refusals[peer] = error
        else:
            self.layouts[peer] = layout
        if message["answer"]:
            self.post(peer, "hello", layout=self.layout.pack(), answer=False)
        self._settle(peer)

    def _settle(self, peer: str) -> None:
        greeting = self._greetings.pop(peer, None)
        if greeting is not None and not greeting.done():
            greeting.set_result(None)

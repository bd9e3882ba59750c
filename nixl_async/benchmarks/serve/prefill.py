"""The prefill side: takes what prefix the tiers have, computes the rest by layers, pushes all of it, and offloads what is new."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from nixl_async.benchmarks.serve.computing import Compute
from nixl_async.benchmarks.serve.contents import Array, page_count
from nixl_async.benchmarks.serve.side import REGION, TABLE, Side, request_name
from nixl_async.layers import LayerPlan
from nixl_async.streams import CPUStream
from nixl_async.tiers import DRAM, Files, Objects, Tiers
from nixl_async.tiers.options import TierOptions

LAYERS, WHOLE = "layers", "whole"
"""Schedules: each layer goes when it is computed; all of them when the last one is."""
MOST_SEGMENT = 64 << 20


class Prefill(Side):
    """Serves requests' first part, one at a time; what comes waits in turn."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.compute = Compute(**self.setup["compute"])
        self.block_nbytes = self.pages.page_nbytes * self.pages.layers * self.pages.in_block
        self.tiers: Tiers | None = None
        self._tables: dict[str, asyncio.Future[bytes]] = {}
        self._turn = asyncio.Lock()
        self._stream: CPUStream
        self._listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._stream = self._stack.enter_context(CPUStream())
        self._listener = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._listener is not None:
            self._listener.cancel()
        await super().__aexit__(*exc)

    async def connect(self, addresses: Sequence[Sequence[Any]]) -> None:
        """Connect to every decode process."""
        for host, port in addresses:
            await self.agent.connect((host, port))

    async def _listen(self) -> None:
        async for message in self.agent.notifications(prefix=TABLE):
            name, _, table = message.payload.removeprefix(TABLE).partition(b" ")
            future = self._table(name.decode())
            # Who waited for it may have been cancelled, and the future with him.
            if not future.done():
                future.set_result(table)

    def _table(self, name: str) -> asyncio.Future[bytes]:
        return self._tables.setdefault(name, asyncio.get_running_loop().create_future())

    # Tiers.

    async def enter_leg(self) -> None:
        """Open empty tiers."""
        self._tables.clear()
        if options := _tiers(self.setup["tiers"], self.leg["number"], self.block_nbytes):
            self.tiers = await Tiers(self.agent, options, block_nbytes=self.block_nbytes).__aenter__()

    async def leave_leg(self) -> dict[str, Any]:
        """Empty the tiers and close them; return their counters."""
        tiers, self.tiers = self.tiers, None
        if tiers is None:
            return {"tiers": [], "refused": 0}
        try:
            refused = len(await tiers.flush())
            found = [
                {"name": one.name, "read": one.nbytes_read, "written": one.nbytes_written} for one in tiers.statistics().tiers
            ]
            if self.setup["tiers"]["objects"]:
                await tiers.delete(list(tiers.keys()))
        finally:
            await tiers.aclose(flush=False)
        return {"tiers": found, "refused": refused}

    def _keys(self, request: dict[str, Any]) -> list[bytes]:
        """Return the keys of the blocks that can be stored: those that the prompt fills."""
        if self.tiers is None or request["warm"]:
            return []
        full = request["prompt"] // self.setup["block_tokens"]
        salt = f"{self.setup['tiers']['run']} {self.leg['number']}"
        return [hashlib.sha256(f"{salt} {one}".encode()).digest() for one in request["blocks"][:full]]

    async def _load(self, keys: list[bytes], table: Array) -> list[str]:
        """Take the longest prefix that the tiers have into the pool; return which tier each block is from."""
        if self.tiers is None or not keys:
            return []
        found = await self.tiers.prefix(keys)
        if not found:
            return []
        indices = self.pages.in_blocks(table, 0, found)
        outcomes = await self.tiers.get(keys[:found], self.region.pages(indices, self.pages.page_nbytes))
        names = [one.tier if one else None for one in outcomes]
        return [name for name in names[: names.index(None) if None in names else found] if name is not None]

    # Requests.

    async def serve(self, request: dict[str, Any]) -> None:
        """Load, compute, push, offload."""
        name = request_name(self.leg["number"], request["number"])
        table = await self.reserve(page_count(request["prompt"], self.setup["page_tokens"]))
        times: dict[str, Any] = {"reserved": time.monotonic()}
        try:
            keys = self._keys(request)
            # The last token is always computed: the first one of the answer comes of it.
            usable = keys[: (request["prompt"] - 1) // self.setup["block_tokens"]]
            self.pages.blank(table)
            known = await self.tiers.prefix(usable) if self.tiers is not None and usable else 0
            in_block = self.pages.in_block
            await self.on_thread(self.pages.fill, table, request["blocks"], known * in_block)
            theirs = np.frombuffer(await self._table(name), np.int32)
            async with self._pushing(request, name, table, theirs) as push, self._turn:
                times["turn"] = time.monotonic()
                tiers = await self._load(usable, table)
                times["loaded"] = time.monotonic()
                if len(tiers) < known:
                    # It was evicted meanwhile, and is computed with the rest.
                    await self.on_thread(self.pages.fill, table, request["blocks"], len(tiers) * in_block)
                times["layers"] = await self._compute(request, len(tiers), push)
            times["pushed"] = time.monotonic()
            self.parent.say(event="prefilled", number=request["number"], asked=len(usable), tiers=tiers, **times)
            if self.tiers is not None and len(keys) > len(tiers):
                indices = self.pages.in_blocks(table, len(tiers), len(keys))
                await self.tiers.put(keys[len(tiers) :], self.region.pages(indices, self.pages.page_nbytes))
        finally:
            self._tables.pop(name, None)
            self.release(table)

    @asynccontextmanager
    async def _pushing(self, request: dict[str, Any], name: str, table: Array, theirs: Array) -> AsyncIterator[Any]:
        peer = request["decode"]
        remote = (await self.agent.peer(peer)).region(REGION)
        options: dict[str, Any] = {"backend": self.leg["backend"]}
        if self.leg["classes"]:
            options["traffic_class"] = "bulk" if request["batch"] else "latency"
            if not request["batch"]:
                options["deadline"] = request["arrival"] + self.setup["slo_ttft"]
        plan = LayerPlan(name, self.pair.by_layer(self.region, table, remote, theirs))
        async with self.agent.push(peer, plan, **options) as push:
            yield push

    async def _compute(self, request: dict[str, Any], cached_blocks: int, push: Any) -> list[float]:
        """Let the time of computing pass, on the stream; return when each layer was computed."""
        cached = cached_blocks * self.setup["block_tokens"]
        seconds = 0.0 if request["warm"] else self.compute.prefill_seconds(request["prompt"] - cached, cached)
        loop, layers = asyncio.get_running_loop(), self.pages.layers
        ends: list[float] = []
        computed = loop.create_future()
        start = time.monotonic()
        for layer in range(layers):
            self._stream.launch(_until, start + (layer + 1) * seconds / layers, ends)
            if self.leg["schedule"] == LAYERS:
                push.ready(layer, after=self._stream.record())
        if self.leg["schedule"] == WHOLE:
            push.ready(*range(layers), after=self._stream.record())
        self._stream.launch(loop.call_soon_threadsafe, _resolve, computed)
        await computed
        return ends


def _until(moment: float, ends: list[float]) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
    ends.append(time.monotonic())


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _tiers(wanted: dict[str, Any], leg: int, block_nbytes: int) -> list[TierOptions]:
    """Return the tiers that there are. They begin empty: a leg has files, and keys of objects, of its own."""
    found: list[TierOptions] = []
    if wanted["dram"]:
        found.append(DRAM(wanted["dram"], name="dram"))
    if wanted["nvme"]:
        segment = max(block_nbytes, min(MOST_SEGMENT, wanted["nvme_nbytes"] // 4) // block_nbytes * block_nbytes)
        found.append(Files(Path(wanted["nvme"], f"leg-{leg}"), wanted["nvme_nbytes"], segment_nbytes=segment, name="nvme"))
    if wanted["objects"]:
        found.append(Objects(wanted["objects"], listing=False, options=wanted["object_options"], name="objects"))
    return found

"""The decode side: takes a request's KV cache as it comes, checks it, and makes a token of every running request in each step."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from nixl_async.benchmarks.serve.computing import Compute
from nixl_async.benchmarks.serve.contents import page_count
from nixl_async.benchmarks.serve.side import TABLE, Side, request_name


@dataclass(eq=False)
class _Running:
    context: int
    left: int
    done: asyncio.Future[None]
    times: list[float] = field(default_factory=list)


class Batch:
    """Continuous batching: a step makes one token for each request that runs; who comes joins at the next step."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._running: list[_Running] = []
        self._task: asyncio.Task[None] | None = None

    async def generate(self, context: int, tokens: int) -> list[float]:
        """Make tokens behind a context of so many; return when each was there, on the machine's clock."""
        if not tokens:
            return []
        one = _Running(context, tokens, asyncio.get_running_loop().create_future())
        self._running.append(one)
        if self._task is None:
            self._task = asyncio.create_task(self._steps())
        try:
            await one.done
        finally:
            if one in self._running:
                self._running.remove(one)
        return one.times

    async def _steps(self) -> None:
        while self._running:
            batch = list(self._running)
            # Not the loop's clock, which rounds up to a millisecond.
            await asyncio.to_thread(time.sleep, self._compute.step_seconds(len(batch), sum(one.context for one in batch)))
            now = time.monotonic()
            for one in batch:
                if one not in self._running:
                    continue
                one.times.append(now)
                one.context += 1
                one.left -= 1
                if not one.left:
                    self._running.remove(one)
                    one.done.set_result(None)
        self._task = None


class Decode(Side):
    """Serves requests' second part. The first token is prefill's, and is there when the KV cache is."""

    async def enter_leg(self) -> None:
        """Begin with nothing running."""
        self.batch = Batch(Compute(**self.setup["compute"]))

    async def serve(self, request: dict[str, Any]) -> None:
        """Tell prefill where the pages go, take the layers, check each, and make the other tokens."""
        prompt, blocks, warm = request["prompt"], request["blocks"], request["warm"]
        tokens = 1 if warm else request["answer"]
        page_tokens = self.setup["page_tokens"]
        table = await self.reserve(page_count(prompt + tokens, page_tokens))
        admitted = time.monotonic()
        check: asyncio.Future[None] | None = None
        try:
            filled = table[: page_count(prompt, page_tokens)]
            self.pages.blank(filled)
            name = request_name(self.leg["number"], request["number"])
            arrived: list[float] = [0.0] * self.pages.layers
            async with self.agent.incoming(name, peer=request["prefill"]) as incoming:
                await self.agent.notify(request["prefill"], TABLE + f"{name} ".encode() + filled.tobytes())
                async for layer in incoming.layers(ordered=False):
                    arrived[layer] = time.monotonic()
            first = max(arrived)
            # Not layer by layer: it would take the time of those that are still to come.
            check = asyncio.ensure_future(self.on_thread(self.pages.check, filled, blocks))
            times = await self.batch.generate(prompt, tokens - 1)
            await check
        finally:
            if check is not None:
                await asyncio.wait([check])
            self.release(table)
        self.parent.say(event="done", number=request["number"], reserved=admitted, arrived=arrived, tokens=[first, *times])

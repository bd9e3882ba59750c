"""nixl_async moving a request layer by layer while a stream that needs no CPU computes it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.worker import serve_made
from bench.workers.ours import Ours
from nixl_async import CPUStream, LayerPlan

READY = b"ready"


class Layers(Ours):
    """Commands of the suite `layers`. The initiator computes and pushes, or offers; the target takes the layers."""

    def _plan(self, n_layers: int, request: str, push: bool) -> LayerPlan:
        """Share the pages among the layers; page i of the initiator goes to page `order[i]` of the target."""
        each = len(self.order) // n_layers
        cuts = [slice(at, at + each) for at in range(0, each * n_layers, each)]
        src, dst = (self.region, self.remote) if push else (self.remote, self.region)
        sides = (
            (src.pages(self.indices[cut], self.page_nbytes), dst.pages(self.table[cut], self.page_nbytes)) for cut in cuts
        )
        return LayerPlan(request, sides)

    async def produce(
        self, n_layers: int, request: str, push: bool, layer_seconds: float = 0.0, one_by_one: bool = False
    ) -> dict[str, Any]:
        """Compute layers of `layer_seconds` each (0: all are there at once) and let each go; times on the machine's clock.

        All is put on the stream at once, as engines do; a layer goes when the stream has come behind it. `one_by_one`: a pushed
        layer goes when the one before is in place.
        """
        side: Any
        ends: list[float] = []
        if push:
            side = self.agent.push(self.peer, self._plan(n_layers, request, push))
        else:
            side = self.agent.offer(self.peer, request, n_layers)
        with CPUStream() as stream:
            async with side:
                await anext(self.agent.notifications(prefix=READY))
                started = time.monotonic()
                if push and one_by_one:
                    side.ready(0)
                    async for layer in side.sent():
                        if layer + 1 < n_layers:
                            side.ready(layer + 1)
                else:
                    for layer in range(n_layers):
                        if layer_seconds:
                            stream.launch(_until, started + (layer + 1) * layer_seconds)
                        side.ready(layer, after=stream.record() if layer_seconds else None)
                stream.launch(lambda: ends.append(time.monotonic()))
                await asyncio.to_thread(stream.synchronize)
        return {"started": started, "computed": ends[0]}

    async def consume(self, n_layers: int, request: str, push: bool, one_by_one: bool = False) -> float:
        """Take every layer; return when the last one was there, on the machine's clock."""
        if push:
            async with self.agent.incoming(request) as incoming:
                return await self._take(incoming.layers())
        async with self.agent.pull(self.peer, self._plan(n_layers, request, push), window=1 if one_by_one else None) as pull:
            return await self._take(pull.layers())

    async def _take(self, layers: Any) -> float:
        # Both sides are ready before the clock runs.
        await self.agent.notify(self.peer, READY)
        arrived = 0.0
        async for _ in layers:
            arrived = time.monotonic()
        return arrived


def _until(due: float) -> None:
    time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    asyncio.run(serve_made(lambda: Layers(None)))

"""nixl_async between two processes, with memory of a device on one side or both."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.gpu.memory import PAUSE_SECONDS, Buffer, allocate
from bench.worker import serve_async
from bench.workers.ours import TOKEN, Ours
from nixl_async import Agent


class GPUMover(Ours):
    """One agent; `options["memory"]` says what either side has, `options["backend"]` forces a route."""

    def __init__(self) -> None:
        super().__init__(None)
        self.memory: Buffer

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, Any]:
        """Open the agent, register the buffer and listen."""
        self.memory = allocate(options["memory"][role], nbytes)
        self.backend = options.get("backend")
        self.agent = Agent(role, backends=options.get("backends"), token=TOKEN)
        await self.agent.__aenter__()
        self.region = await self.agent.register(self.memory.array, name="kv")
        host, port = await self.agent.serve("127.0.0.1", 0)
        return {"name": role, "host": host, "port": port}

    def fill(self, salt: int) -> None:
        """Write the source pattern of `salt` into the buffer."""
        self.memory.fill(salt)

    def blank(self, salt: int) -> None:
        """Overwrite the buffer with something that no source pattern holds."""
        self.memory.blank(salt)

    def check(self, salt: int) -> int:
        """Return how many words are wrong on the destination after a run."""
        return self.memory.count_wrong(self.order, self.page_nbytes, salt, scattered=self.write)

    def explain(self) -> dict[str, Any]:
        """Return by what the next move goes, or why by nothing."""
        explained = self.agent.explain(*self._sides())
        route = explained.route if self.backend is None else self.backend if self.backend in explained.routes else None
        return {"route": route, "how": explained.how, "refusals": explained.refusals}

    async def move(self) -> dict[str, Any]:
        """Move every page once; timed from page indices to the completed await."""
        cpu, start = time.process_time(), time.perf_counter()
        result = await self.agent.transfer(*self._sides(), backend=self.backend)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu": time.process_time() - cpu, "route": result.route}

    async def move_prepared(self) -> dict[str, Any]:
        """Move every page once; timed from what `agent.prepare` returned some time before to the completed await."""
        prepared = await self.agent.prepare(*self._sides(), backend=self.backend)
        # As idle as the device is before a copy of the raw limit.
        await asyncio.sleep(PAUSE_SECONDS)
        cpu, start = time.process_time(), time.perf_counter()
        result = await prepared.transfer()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu": time.process_time() - cpu, "route": result.route}


async def main(worker: GPUMover) -> None:
    try:
        await serve_async(worker)
    finally:
        await worker.aclose()


if __name__ == "__main__":
    asyncio.run(main(GPUMover()))

"""nixl_async on files: one transfer of many blocks, between an open file and one registered buffer."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from bench.worker import serve_made
from bench.workers.stored import Stored
from nixl_async import Agent


class OursFiles(Stored):
    """One agent and one open file."""

    def __init__(self) -> None:
        super().__init__()
        self.agent: Agent | None = None
        self.file: Any = None

    async def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Open the agent; register the buffer."""
        self.allocate(nbytes)
        self.agent = await Agent("bench", backends=["memory", "posix"]).__aenter__()
        self.region = await self.agent.register(self.whole, name="kv")

    async def aim(self, where: dict[str, Any], op: str, page_nbytes: int, n_pages: int, seed: int) -> None:
        """Open the file; choosing blocks of it belongs to the timed part."""
        assert self.agent is not None
        if self.file is not None:
            await self.file.aclose()
        super().aim(where, op, page_nbytes, n_pages, seed)
        self.file = await self.agent.file(where["path"], "r+", direct=where["direct"])
        self.near, self.far = np.arange(n_pages), self.order
        if where["contiguous"]:
            self.near, self.far = np.argsort(self.order), np.arange(n_pages)

    async def move(self) -> dict[str, float]:
        """Move every block once."""
        assert self.agent is not None
        with self.timed():
            near, far = self.region.pages(self.near, self.page_nbytes), self.file.pages(self.far, self.page_nbytes)
            await (self.agent.transfer(near, far) if self.write else self.agent.transfer(far, near))
        return self.measured

    async def aclose(self) -> None:
        """Leave in order."""
        if self.agent is not None:
            await self.agent.aclose()


if __name__ == "__main__":
    asyncio.run(serve_made(OursFiles))

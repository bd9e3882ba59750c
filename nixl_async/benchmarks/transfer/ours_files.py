"""This library's process where the far side is files."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.benchmarks.transfer.ours import Ours, main
from nixl_async.benchmarks.transfer.peers.plain import Files, Flow, Stored, allocate

if TYPE_CHECKING:
    from nixl_async.descriptors import Places
    from nixl_async.storage import FileRegion


class OursInFiles(Stored, Ours):
    """One agent that copies between its memory and files."""

    async def opened(self) -> dict[str, Any]:
        """Open the agent, register the memory, and make the files."""
        found = await Ours.opened(self)
        nbytes = len(self.buffer)
        self.files = await asyncio.to_thread(Files, self.options, "ours", self.index, nbytes)
        direct = self.files.direct or None
        self.opened_files: list[FileRegion] = [await self.agent.file(path, "r+", direct=direct) for path in self.files.paths]
        return found

    async def met(self, peers: dict[str, Any]) -> None:
        """Nobody is there to be met."""

    async def prepared(self) -> None:
        """Lay out what is read, and make the slots' requests."""
        self.salt = self.point.salt
        if not self.is_source:
            await asyncio.to_thread(self.files.put, self.layout(), self.point.block)
        await Ours.prepared(self)

    def sides(self, flow: Flow, slot: int) -> tuple[Places, Places]:
        """Describe a slot's blocks, file after file: source and destination."""
        point, region = self.point, self.regions[0]
        files, offsets = self.files.locate(self.numbers(slot), point.block)
        near, far = [], []
        for number in np.unique(files).tolist():
            chosen = files == number
            near.append(region.ranges(point.near(flow, slot)[chosen], point.block))
            far.append(self.opened_files[number].ranges(offsets[chosen], point.block))
        return (near, far) if point.op == "WRITE" else (far, near)

    async def check(self) -> Any:
        """Compare every byte where it has arrived."""
        if not self.is_source:
            return Ours.check(self)
        found = allocate(self.n_blocks * self.point.block)
        return self.count_far(await asyncio.to_thread(self.files.fetch, found, self.point.block))

    async def close(self) -> None:
        """Leave in order."""
        for region in getattr(self, "opened_files", ()):
            await region.aclose()
        await Ours.close(self)


if __name__ == "__main__":
    main(OursInFiles)

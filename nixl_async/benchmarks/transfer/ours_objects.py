"""This library's process where the far side is objects of a store."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.benchmarks.transfer.ours import Ours, main
from nixl_async.benchmarks.transfer.peers.plain import Array, Flow, Stored, allocate

if TYPE_CHECKING:
    from nixl_async.descriptors import Places
    from nixl_async.stores import Store


class OursInObjects(Stored, Ours):
    """One agent that copies between its memory and a store's objects, one for each block."""

    async def opened(self) -> dict[str, Any]:
        """Open the agent, register the memory, and open the store."""
        found = await Ours.opened(self)
        self.store: Store = await self.agent.store(self.options["store_url"], **self.options["store_options"])
        self.keys: set[str] = set()
        return found

    async def met(self, peers: dict[str, Any]) -> None:
        """Nobody is there to be met."""

    def _keys(self, numbers: Array) -> list[str]:
        prefix = f"nixl-async-bench-{self.options['run']}/ours/{self.index}/{self.point.block}"
        keys = [f"{prefix}/{number}" for number in numbers.tolist()]
        self.keys.update(keys)
        return keys

    async def prepared(self) -> None:
        """Put what is got, and make the slots' requests."""
        self.salt = self.point.salt
        if not self.is_source:
            await self._move_all(self.layout(), put=True)
        await Ours.prepared(self)

    async def _move_all(self, content: Array, *, put: bool) -> None:
        objects = self.store.objects(self._keys(np.arange(self.n_blocks)), self.point.block)
        async with await self.agent.register(content) as region:
            await self.agent.transfer(*((region, objects) if put else (objects, region)))

    def sides(self, flow: Flow, slot: int) -> tuple[Places, Places]:
        """Describe a slot's blocks and their objects: source and destination."""
        point = self.point
        near = self.regions[0].ranges(point.near(flow, slot), point.block)
        far = self.store.objects(self._keys(self.numbers(slot)), point.block)
        return (near, far) if point.op == "WRITE" else (far, near)

    async def check(self) -> Any:
        """Compare every byte where it has arrived."""
        if not self.is_source:
            return Ours.check(self)
        found = allocate(self.n_blocks * self.point.block)
        await self._move_all(found, put=False)
        return self.count_far(found)

    async def close(self) -> None:
        """Delete the objects and leave in order."""
        if getattr(self, "keys", None):
            # The server may be what has gone.
            with contextlib.suppress(Exception):
                await self.store.delete(sorted(self.keys))
        await Ours.close(self)


if __name__ == "__main__":
    main(OursInObjects)

"""Two instances of one backend in one process, connected as two agents would connect them, and memory registered with both."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.backend import Backend, Host, Op, PeerInfo
from nixl_async.descriptors import Places, Region, make_plan
from nixl_async.memory import MemoryRegion, RemoteRegion, open_buffer
from nixl_async.testing.patterns import CANARY, assert_same, pattern

if TYPE_CHECKING:
    from nixl_async.testing.patterns import Bytes

OURS, THEIRS = "ours", "theirs"
HOST = "127.0.0.1"


@dataclass(slots=True, eq=False)
class Copy:
    """Memory for one direction: the bytes and the regions of both sides, as the backend under test sees them."""

    src_bytes: Bytes
    dst_bytes: Bytes
    src: Region
    dst: Region

    def check(self) -> None:
        """Compare the whole destination with the whole source."""
        assert_same(self.dst_bytes, self.src_bytes)


@dataclass(eq=False)
class Pair:
    """The backend under test, its peer, and what has been registered.

    `ours` is under test; `theirs` is what it reaches as peer "theirs". `lost` collects what `ours` reported to its host.
    """

    ours: Backend
    theirs: Backend
    lost: list[tuple[str, str]] = field(default_factory=list)
    incarnation: str = ""
    """That of `theirs`."""
    our_incarnation: str = ""
    _regions: list[tuple[Backend, MemoryRegion]] = field(default_factory=list)
    _open: set[str] = field(default_factory=set)
    _ids: Iterable[int] = field(default_factory=lambda: itertools.count(1))

    async def open(self) -> None:
        """Open both and connect them."""
        loop = asyncio.get_running_loop()
        self.incarnation = secrets.token_hex(8)
        for name, backend, lost in ((OURS, self.ours, self.lost), (THEIRS, self.theirs, [])):
            if name not in self._open:
                await backend.open(Host(name, self.incarnation, loop, peer_lost=lambda *event, to=lost: to.append(event)))
                self._open.add(name)
                if name == OURS:
                    self.our_incarnation = self.incarnation
                if backend.remote:
                    await backend.listen(HOST)
        if self.ours.remote:
            await asyncio.gather(
                self.ours.connect(
                    PeerInfo(THEIRS, self.incarnation, self.theirs.describe_to(OURS, self.our_incarnation), HOST)
                ),
                self.theirs.connect(
                    PeerInfo(OURS, self.our_incarnation, self.ours.describe_to(THEIRS, self.incarnation), HOST)
                ),
            )

    async def aclose(self) -> None:
        """Unregister everything, disconnect, and close both."""
        for backend, region in self._regions:
            await backend.unregister(region)
        if self.ours.remote and {OURS, THEIRS} <= self._open:
            await asyncio.gather(self.ours.disconnect(THEIRS), self.theirs.disconnect(OURS))
        await self.close_ours()
        if THEIRS in self._open:
            self._open.discard(THEIRS)
            await self.theirs.aclose()

    async def close_ours(self) -> None:
        """Close the backend under test only. Idempotent."""
        if OURS in self._open:
            self._open.discard(OURS)
            self._regions = [(backend, region) for backend, region in self._regions if backend is not self.ours]
            await self.ours.aclose()

    async def replace_theirs(self, theirs: Backend) -> None:
        """Let the peer go and come back under its name, as another incarnation."""
        await self.ours.disconnect(THEIRS)
        await self.theirs.disconnect(OURS)
        for backend, region in [entry for entry in self._regions if entry[0] is self.theirs]:
            await backend.unregister(region)
            self._regions.remove((backend, region))
        self._open.discard(THEIRS)
        await self.theirs.aclose()
        self.theirs = theirs
        await self.open()

    # Memory.

    async def register(self, memory: Bytes, *, remote: bool = False, claim_nbytes: int | None = None) -> Region:
        """Register `memory` with the backend under test, or with its peer if `remote`; return the region as `ours` sees it.

        `claim_nbytes` makes a remote region claim to be larger than it is.
        """
        backend = self.theirs if remote else self.ours
        region = MemoryRegion(f"region-{len(self._regions)}", open_buffer(memory), _closed)
        region.keys[backend.name] = await backend.register(region)
        self._regions.append((backend, region))
        if not remote:
            return region
        nbytes = region.nbytes if claim_nbytes is None else claim_nbytes
        return RemoteRegion(THEIRS, self.incarnation, region.name, region.address, nbytes, keys=dict(region.keys))

    async def lend(self, memory: Bytes, *, writable: bool = True) -> tuple[RemoteRegion, Callable[[], Awaitable[None]]]:
        """Register `memory` with the peer, which grants it to `ours` alone; return it as `ours` sees it, and what revokes that."""
        region = MemoryRegion(f"region-{len(self._regions)}", open_buffer(memory), _closed)
        name = self.theirs.name
        region.keys[name] = await self.theirs.register(region)
        self._regions.append((self.theirs, region))
        key = await self.theirs.grant(region, OURS, self.our_incarnation, writable=writable)
        seen = RemoteRegion(THEIRS, self.incarnation, region.name, region.address, region.nbytes, keys={name: key})
        return seen, partial(self.theirs.revoke, region, key)

    async def unregister(self, region: Region) -> None:
        """Unregister the memory of a region that `register` returned."""
        for backend, registered in self._regions:
            if registered.name == region.name:
                await backend.unregister(registered)
                self._regions.remove((backend, registered))
                return

    async def memory(self, direction: str, nbytes: int, *, seed: int = 0) -> Copy:
        """Register a source with a pattern and a destination of the same size, for a "put", a "get" or a "local" copy."""
        src_bytes, dst_bytes = pattern(nbytes, seed), np.full(nbytes, CANARY, np.uint8)
        src = await self.register(src_bytes, remote=direction == "get")
        dst = await self.register(dst_bytes, remote=direction == "put")
        return Copy(src_bytes, dst_bytes, src, dst)

    # Copying.

    def ops(self, src: Places, dst: Places) -> list[Op]:
        """Plan a transfer and cut it to the backend's limits, as the scheduler does."""
        plan = make_plan(src, dst)
        limits = self.ours.limits
        peer = plan.dst.peer or plan.src.peer
        pieces = plan.split(limits.max_op_nbytes, limits.max_op_segments)
        return [Op(next(iter(self._ids)), piece, peer, plan.dst.peer is not None) for piece in pieces]

    async def copy(self, src: Places, dst: Places) -> None:
        """Copy by as many ops at once as the backend's limits allow; all are quiet when this returns or raises."""
        room = asyncio.Semaphore(self.ours.limits.max_ops)
        async with asyncio.TaskGroup() as group:
            for op in self.ops(src, dst):
                await room.acquire()
                task = group.create_task(self.ours.copy(op))
                task.add_done_callback(lambda _: room.release())

    async def copy_first(self, memory: Copy) -> None:
        """Copy the first op's worth of a copy's memory, without a task group around it: errors come bare."""
        await self.ours.copy(self.ops(memory.src, memory.dst)[0])


async def _closed(region: MemoryRegion) -> None:
    pass


@asynccontextmanager
async def open_pair(make: Callable[[], Backend]) -> AsyncIterator[Pair]:
    """Open two backends that `make` makes and connect them; close both in the end."""
    pair = Pair(make(), make())
    try:
        await pair.open()
        yield pair
    finally:
        await pair.aclose()

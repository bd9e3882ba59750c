"""The route between two places that no backend joins: through a block of our memory, both halves at once.

Storage to storage, a peer's memory to or from storage, a device's memory to or from objects, and to or from a peer's host memory.
The block bounds the memory; while one stretch of it is being filled others are being emptied. Objects are written whole: those that
fit a buffer from there, larger ones piece by piece as uploads.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from nixl_async import checksums
from nixl_async.arena import PAGE_NBYTES, Arena
from nixl_async.backend import Backend, Host, Limits, Op, quiesce
from nixl_async.cuda import pin, unpin
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import BackendError, ConfigurationError, NixlError
from nixl_async.leased import not_leased
from nixl_async.memory import MemoryRegion, open_buffer
from nixl_async.relay import Relay

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

BUFFER_NBYTES = 16 << 20
N_BUFFERS = 4
_STORAGE = frozenset({MemoryKind.FILE, MemoryKind.OBJECT})
_KEPT: list[MemoryRegion] = []


async def _nothing(region: MemoryRegion) -> None:
    pass


class StagingBackend(Backend):
    """Copies through memory of this process with two other backends.

    It uses `n_buffers` times `buffer_nbytes` at most, all its transfers together; nothing is used before the first of them. An
    object that is larger than a buffer is written as an upload of several pieces.
    """

    name = "staging"
    remote = False
    relays = True
    reports = True
    kinds = frozenset()
    # After what does alone what this does with two, but before UCX: without RDMA that takes several times as long to move a
    # device's memory to a peer's host.
    rank = 38
    # What ends an op may be the abort of an upload at a slow server.
    limits = Limits(
        max_ops=32,
        max_nbytes=1 << 62,
        max_op_nbytes=1 << 62,
        max_op_segments=1 << 62,
        drain_seconds=30.0,
        batch=False,
    )

    def __init__(self, *, buffer_nbytes: int = BUFFER_NBYTES, n_buffers: int = N_BUFFERS) -> None:
        if buffer_nbytes < PAGE_NBYTES or buffer_nbytes % PAGE_NBYTES:
            raise ConfigurationError(f"buffer_nbytes is {buffer_nbytes}; it must be a positive multiple of {PAGE_NBYTES}")
        if n_buffers < 1:
            raise ConfigurationError(f"n_buffers is {n_buffers}; it must be at least 1")
        self.buffer_nbytes, self.n_buffers = buffer_nbytes, n_buffers
        self._arena: Arena | None = None
        self._pinned_by: int | None = None
        self._host: Host | None = None
        self._op_ids = itertools.count(1)
        self._making = asyncio.Lock()

    async def open(self, host: Host) -> None:
        """Remember where the other backends are."""
        self._host = host

    async def aclose(self) -> None:
        """Give the memory back; what a transfer that never became quiet may still write to is kept for good."""
        host, self._host = self._host, None
        arena, self._arena = self._arena, None
        if host is None or arena is None:
            return
        if arena.lent_nbytes:
            _KEPT.append(arena.region)
            return
        for name in arena.region.keys:
            await host.backends[name].unregister(arena.region)
        if self._pinned_by is not None:
            await quiesce(host.loop.run_in_executor(None, unpin, arena.region.address, self._pinned_by))
            self._pinned_by = None

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that were ever in use at once."""
        return 0 if self._arena is None else self._arena.peak_nbytes

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse what one backend can do, and what no two can."""
        if not {src.kind, dst.kind} & _STORAGE and (why := _why_not_memory(src, dst)):
            return why
        if MemoryKind.DRAM in (src.kind, dst.kind) and src.peer is None and dst.peer is None:
            return "a single backend is to copy between local memory and storage"
        stage = _probe()
        for a, b, what in ((src, stage, "read"), (stage, dst, "write")):
            if self._find(a, b) is None:
                side = a if b is stage else b
                return f"no backend can {what} {side.regions[0]!r}"
        return None

    def how(self, src: Side, dst: Side) -> str:
        """Name the two backends."""
        stage = _probe()
        first, second = self._find(src, stage), self._find(stage, dst)
        return f"{first.name if first else '?'}, then {second.name if second else '?'}"

    def _find(self, src: Side, dst: Side) -> Backend | None:
        if self._host is None:
            return None
        found = [
            backend
            for backend in self._host.backends.values()
            if backend is not self and not_leased(backend.name, src, dst) is None and backend.refusal(src, dst) is None
        ]
        return self._host.preferred(found, src, dst)[0] if found else None

    async def copy(self, op: Op) -> None:
        """Fill and empty buffers until all is moved; objects that fail do not keep the others from their places.

        When cancelled, it waits for both halves and aborts the uploads that are not finished.
        """
        if self._host is None:
            raise BackendError("the staging backend is closed", backend=self.name, peer=op.peer)
        stage = _probe()
        first, second = self._find(op.plan.src, stage), self._find(stage, op.plan.dst)
        if first is None or second is None:
            raise BackendError("a backend that this route needs is gone", backend=self.name, peer=op.peer)
        vram = next((side for side in (op.plan.src, op.plan.dst) if side.kind is MemoryKind.VRAM), None)
        arena = await self._memory(None if vram is None else vram.regions[0].device)
        await Relay(op, first, second, arena, self.buffer_nbytes, self.n_buffers, self._op_ids).run()

    def why_not_read(self, side: Side) -> str | None:
        """Return why `read` cannot read ranges of up to `PAGE_NBYTES` of `checksums` from local storage, or `None` if it can."""
        if self.buffer_nbytes * self.n_buffers < checksums.PAGE_NBYTES:
            return f"the staging buffers have less than {checksums.PAGE_NBYTES} bytes together"
        return None if self._find(side, _probe()) is not None else f"no backend can read {side.regions[0]!r}"

    @asynccontextmanager
    async def read(self, side: Side, lengths: Array) -> AsyncIterator[Array]:
        """Read ranges of local storage into one stretch of the block; yield at which address each is while the block lasts.

        They must fit the buffers together. When cancelled, it waits until nothing is read any more.

        Raises:
            TransferError: they cannot be read.
        """
        backend = self._find(side, _probe())
        if backend is None:
            raise BackendError("a backend that this route needs is gone", backend=self.name)
        arena = await self._memory(None)
        ends = np.cumsum(lengths)
        joined = side.addresses[1:] == side.addresses[:-1] + lengths[:-1]
        if side.index is not None:
            joined &= side.index[1:] == side.index[:-1]
        firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
        async with arena.lend(int(ends[-1])) as address:
            places = address + ends - lengths
            merged = np.add.reduceat(lengths, firsts)
            plan = Plan(side.choose(firsts), Side(arena.region.alone, places[firsts]), merged, int(ends[-1]), ())
            for piece in plan.split(backend.limits.max_op_nbytes, backend.limits.max_op_segments):
                await backend.copy(Op(next(self._op_ids), piece, None, False))
            yield places

    async def _memory(self, device: int | None) -> Arena:
        """Make the block when it is first used, and pin it when a CUDA device first copies to or from it."""
        async with self._making:
            if self._arena is None:
                self._arena = await self._make()
            if device is not None and self._pinned_by is None:
                await self._pin(self._arena.region, device)
            return self._arena

    async def _pin(self, region: MemoryRegion, device: int) -> None:
        host = self._host
        assert host is not None

        def on_thread() -> None:
            if pin(region.address, region.nbytes, device):
                self._pinned_by = device

        await quiesce(host.loop.run_in_executor(None, on_thread))
        if self._pinned_by is None:
            return
        for name in region.keys:
            backend = host.backends[name]
            if MemoryKind.VRAM in backend.kinds and not backend.remote:
                # What copies to and from the device looks when it registers whether memory is pinned.
                await backend.unregister(region)
                region.keys[name] = await backend.register(region)

    async def _make(self) -> Arena:
        host = self._host
        assert host is not None
        nbytes = self.buffer_nbytes * self.n_buffers
        # Whole pages, for direct I/O; those that nobody touches cost nothing.
        memory = np.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        region = MemoryRegion("staging", open_buffer(memory), _nothing)
        for backend in list(host.backends.values()):
            if MemoryKind.DRAM in backend.kinds:
                # As with `Agent.register`: a backend that does not take it is none of those that copy to it.
                with suppress(NixlError):
                    region.keys[backend.name] = await backend.register(region)
        return Arena(region)


def _why_not_memory(src: Side, dst: Side) -> str:
    """Tell why the block is no way between two memories; empty for a device's memory of ours and a peer's host memory."""
    if (peer := src.peer or dst.peer) is None or MemoryKind.VRAM not in (src.kind, dst.kind):
        return "no storage is on either side, and no device's memory of ours with a peer's DRAM"
    if src.kind is dst.kind:
        return (
            f"its buffers do not reach peer {peer!r}'s VRAM: transfer to DRAM that it registers, and let it copy on from there"
        )
    if src.kind is MemoryKind.VRAM and src.peer is not None:
        return f"its buffers do not reach peer {peer!r}'s VRAM: let the peer send the bytes, with a transfer of its own"
    if dst.kind is MemoryKind.VRAM and dst.peer is not None:
        return f"its buffers do not reach peer {peer!r}'s VRAM: let the peer fetch the bytes, with a transfer of its own"
    return ""


_PROBE: list[Side] = []


def _probe() -> Side:
    """Return a side that stands for local memory when backends are asked what they refuse."""
    if not _PROBE:
        region = MemoryRegion("staging", open_buffer(np.zeros(1, np.uint8)), _nothing)
        _PROBE.append(Side(region.alone, np.zeros(0, np.int64)))
    return _PROBE[0]

"""Copies between a device's memory and the host's, and within this process between and within devices.

Within a device, and between two that reach each other, one kernel copies all segments of an op. Host memory that is pinned is
copied to and from where it is. Other host memory goes through pinned buffers: while the device fills or empties some, threads copy
between others and the memory itself; the device packs and unpacks pages, so that the bus sees whole buffers.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nixl_async.backend import Backend, Begun, Host, Limits, Op, quiesce
from nixl_async.cuda import allow_access, check_region, need_cupy, need_device, pinned_address, reaches
from nixl_async.cuda_kept import KeptPlans, Take
from nixl_async.cuda_kernels import REACH_NBYTES, Far, shifted
from nixl_async.cuda_lane import Described, Lane
from nixl_async.cuda_lanes import NOW_SEGMENTS, Lanes, begun
from nixl_async.descriptors import MemoryKind, Plan, Region, Side
from nixl_async.errors import BackendError, ConfigurationError
from nixl_async.memory import MemoryRegion
from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

_BOTH = frozenset({MemoryKind.DRAM, MemoryKind.VRAM})
CHUNK_NBYTES = 4 << 20
MAX_LAUNCHED, SMALL_NBYTES = 8, 4 << 20
"""With so many launches under way small copies wait for the scheduler; larger ones with any."""
RUN_NBYTES = 1 << 20
"""Segments of pinned memory that are longer on average are left to the copy engines, one by one."""
BUS_BLOCKS = 8
"""Blocks of threads that keep the bus busy; more would only take the place of others' kernels."""

_ORDERS: dict[tuple[int, int], bool] = {}
"""Whether, from one device to another, copies are faster in the order of the far addresses: measured once."""


class CUDABackend(Backend):
    """Moves bytes between VRAM and DRAM of this process, and between the VRAM of its devices.

    `n_threads` copy to and from DRAM that is not pinned, each by way of `chunk_nbytes` of pinned memory and as much of the
    device's, which are allocated when they are first needed and kept until the agent closes.
    """

    name = "cuda"
    begins = True
    kinds = _BOTH
    remote = False
    rank = 5
    limits = Limits(
        max_ops=4,
        max_nbytes=8 << 30,
        max_op_nbytes=4 << 30,
        max_op_segments=1 << 18,
        inline_nbytes=4 << 30,
        slice_nbytes=64 << 20,
    )

    def __init__(self, *, n_threads: int | None = None, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        if n_threads is not None and n_threads < 1:
            raise ConfigurationError(f"n_threads is {n_threads}; it must be at least 1")
        if chunk_nbytes < 4096:
            raise ConfigurationError(f"chunk_nbytes is {chunk_nbytes}; it must be at least 4096")
        need_device(self.name)
        need_cupy(self.name)
        self._n_threads, self._chunk_nbytes = n_threads or max(2, min(4, (os.cpu_count() or 1) // 2)), chunk_nbytes
        self._lanes: Lanes | None = None
        self._kept: KeptPlans[None]
        # Where devices see the regions of DRAM that are pinned, less where the host sees them.
        self._pinned: dict[Region, int] = {}

    async def open(self, host: Host) -> None:
        """Make ready to start threads when there is work for them."""
        name = f"cuda-{host.agent_name}"
        self._lanes = Lanes(host.loop, name, n_threads=self._n_threads, chunk_nbytes=self._chunk_nbytes)
        self._kept = KeptPlans(self._lanes)

    async def aclose(self) -> None:
        """Free streams and buffers, and end the threads."""
        if self._lanes is not None:
            await self._kept.aclose()
            await self._lanes.aclose()
            self._lanes = None

    async def register(self, region: MemoryRegion) -> bytes:
        """Check that VRAM is what it is said to be, and see whether DRAM is pinned: it must stay so while it is registered."""
        check_region(region)
        if region.kind is MemoryKind.VRAM:
            await self._opened().prepare(region.device)
        elif (seen := pinned_address(region.address, region.nbytes)) is not None:
            self._pinned[region] = seen - region.address
        return b""

    async def unregister(self, region: MemoryRegion) -> None:
        """Forget whether it was pinned."""
        self._pinned.pop(region, None)

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse what is not VRAM of this process on one side and VRAM or DRAM of it on the other."""
        if {src.kind, dst.kind} - _BOTH or MemoryKind.VRAM not in (src.kind, dst.kind):
            return f"it copies VRAM to and from DRAM, not {src.kind.value} to {dst.kind.value}"
        if (peer := src.peer or dst.peer) is not None:
            return f"peer {peer!r} lives in another process"
        return None

    def how(self, src: Side, dst: Side) -> str:
        """Tell whether buffers are in between."""
        if src.kind is dst.kind:
            through = "" if _pusher(src, dst) is not None else f", devices {_device(src)} and {_device(dst)} through the host"
            return f"one kernel for each op{through}"
        if self._is_pinned(src if src.kind is MemoryKind.DRAM else dst):
            return "pinned memory, where it is"
        return f"through {self._n_threads} pinned buffers of {self._chunk_nbytes} bytes"

    def copy_now(self, op: Op) -> bool | Begun:
        """Begin a copy within or between devices."""
        lanes, plan = self._opened(), op.plan
        device = _pusher(plan.src, plan.dst) if plan.src.kind is plan.dst.kind else None
        if device is None or lanes.launched >= (MAX_LAUNCHED if op.nbytes <= SMALL_NBYTES else 1):
            return False
        return begun(self._launch(device, plan))

    async def prepare(self, op: Op) -> None:
        """Tell the device of the plan's pages, if its kernel copies them: sending it is one launch then."""
        plan = op.plan
        device = _pusher(plan.src, plan.dst) if plan.src.kind is plan.dst.kind else None
        if device is not None:
            await self._kept.keep(plan, device, partial(_describe, plan))

    async def copy(self, op: Op) -> None:
        """Copy every segment; when cancelled, wait for the launch, or for the chunks that are under way."""
        lanes, plan = self._opened(), op.plan
        if plan.src.kind is plan.dst.kind:
            device = _pusher(plan.src, plan.dst)
            if device is not None:
                await quiesce(self._launch(device, plan))
                return
            copy_chunk = self._through_host
        else:
            host, vram = (plan.src, plan.dst) if plan.src.kind is MemoryKind.DRAM else (plan.dst, plan.src)
            if self._is_pinned(host):
                shifts = [self._pinned[region] for region in host.regions]
                await quiesce(lanes.launch(_device(vram), partial(_pinned, plan, shifts)))
                return
            copy_chunk = self._out if host is plan.dst else self._in
        done, stop = lanes.in_chunks(plan, copy_chunk)
        await quiesce(done, stop)

    def _opened(self) -> Lanes:
        if self._lanes is None:
            raise BackendError("the cuda backend is not open", backend=self.name)
        return self._lanes

    def _launch(self, device: int, plan: Plan) -> asyncio.Future[None]:
        between, urgent = (_device(plan.src), _device(plan.dst)), plan.nbytes <= SMALL_NBYTES
        if (kept := self._kept.find(plan)) is not None:
            return self._opened().send(device, kept.described, urgent=urgent, nbytes=plan.nbytes, way=between)
        known = between[0] == between[1] or between in _ORDERS or _largest(plan.src, plan.dst).nbytes <= REACH_NBYTES
        now = known and len(plan.lengths) <= NOW_SEGMENTS
        work = partial(_between, plan)
        return self._opened().launch(device, work, now=now, urgent=urgent, nbytes=plan.nbytes, way=between)

    def _is_pinned(self, side: Side) -> bool:
        return all(region in self._pinned for region in side.regions)

    # Chunks, on threads.

    def _out(self, chunk: Plan) -> None:
        with self._opened().lane(_device(chunk.src)) as lane:
            at = _packed(chunk)
            if len(at) == 1:
                lane.copy_run(lane.pinned.address, int(chunk.src.addresses[0]), chunk.nbytes)
            else:
                lane.copy(chunk.src.addresses, at + lane.buffer, chunk.lengths)
                lane.copy_run(lane.pinned.address, lane.buffer, chunk.nbytes)
            lane.wait()
            _copy_host(chunk.dst.addresses, at + lane.pinned.address, chunk.lengths)

    def _in(self, chunk: Plan) -> None:
        with self._opened().lane(_device(chunk.dst)) as lane:
            at = _packed(chunk)
            _copy_host(at + lane.pinned.address, chunk.src.addresses, chunk.lengths)
            if len(at) == 1:
                lane.copy_run(int(chunk.dst.addresses[0]), lane.pinned.address, chunk.nbytes)
            else:
                lane.copy_run(lane.buffer, lane.pinned.address, chunk.nbytes)
                lane.copy(at + lane.buffer, chunk.dst.addresses, chunk.lengths)
            lane.wait()

    def _through_host(self, chunk: Plan) -> None:
        at = _packed(chunk)
        with self._opened().lane(_device(chunk.dst)) as target:
            buffer = target.buffer
            with self._opened().lane(_device(chunk.src)) as source:
                source.copy(chunk.src.addresses, at + source.buffer, chunk.lengths)
                source.copy_to_peer(target, chunk.nbytes)
                source.wait()
            target.copy(at + buffer, chunk.dst.addresses, chunk.lengths)
            target.wait()


def _device(side: Side) -> int:
    return side.regions[0].device


def _pusher(src: Side, dst: Side) -> int | None:
    """Return the device whose kernel copies between two sides of VRAM: rather the one that writes far; `None` if neither can."""
    ours, theirs = _device(src), _device(dst)
    if reaches(ours, theirs):
        return ours
    return theirs if reaches(theirs, ours) else None


def _largest(*sides: Side) -> Region:
    return max((region for side in sides for region in side.regions), key=lambda region: region.nbytes)


def _between(plan: Plan, lane: Lane) -> None:
    lane.copy(plan.src.addresses, plan.dst.addresses, plan.lengths, far=_far(plan, lane))


def _describe(plan: Plan, lane: Lane, take: Take) -> tuple[Described | None, None]:
    return lane.describe(plan.src.addresses, plan.dst.addresses, plan.lengths, far=_far(plan, lane), take=take), None


def _far(plan: Plan, lane: Lane) -> Far | None:
    """Make what is another device's memory accessible; say where it is if it is better copied in order."""
    if _device(plan.src) == _device(plan.dst):
        return None
    other = plan.dst if lane.device == _device(plan.src) else plan.src
    allow_access(lane.device, _device(other))
    ends = [region.address + region.nbytes for region in other.regions]
    low = min(region.address for region in other.regions)
    between, largest = (_device(plan.src), _device(plan.dst)), _largest(other)
    if between not in _ORDERS and largest.nbytes > REACH_NBYTES:
        _ORDERS[between] = lane.order_pays(largest.address, largest.nbytes)
    return Far(other is plan.dst, low, max(ends)) if _ORDERS.get(between) else None


def _pinned(plan: Plan, shifts: list[int], lane: Lane) -> None:
    src, dst = plan.src.addresses, plan.dst.addresses
    if plan.nbytes >= RUN_NBYTES * len(plan.lengths):
        for to, at, nbytes in zip(dst.tolist(), src.tolist(), plan.lengths.tolist(), strict=True):
            lane.copy_run(to, at, nbytes)
        return
    if plan.src.kind is MemoryKind.DRAM:
        src = shifted(plan.src, shifts)
    else:
        dst = shifted(plan.dst, shifts)
    lane.copy(src, dst, plan.lengths, max_blocks=BUS_BLOCKS)


def _packed(chunk: Plan) -> Array:
    """Return where each segment begins when they lie one behind the other."""
    ends: Array = np.cumsum(chunk.lengths)
    return ends - chunk.lengths


def _copy_host(dst: Array, src: Array, lengths: Array) -> None:
    arrays = [np.ascontiguousarray(array) for array in (dst, src, lengths)]
    lib.nx_copy_segments(*map(int64, arrays), len(lengths), ffi.NULL)

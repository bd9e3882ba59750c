"""Copies between a device's memory and that of another process of this host, by CUDA IPC: one kernel copies all pages of an op.

A region's key names its allocation (`cuIpcGetMemHandle`), where the region lies in that, and the device by its UUID. Whoever copies
opens the allocation once (`cuIpcOpenMemHandle`) and keeps it until the owner withdraws the last region in it, or the peer goes. The
peer takes no part, so its interpreter may be stuck. CUDA leaves it undefined what happens when the owner frees memory that others
have open: `agent` lets a region go only when its peers have said that they are done with it.

When the owner's process dies the driver keeps the memory until it is closed here (seen with driver 580: reading goes on). Such a
copy ends, and then fails with `PeerLost`, since nobody is left whose bytes they are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from nixl_async.backend import Backend, Begun, Host, Limits, Op, PeerInfo, quiesce
from nixl_async.backends.cuda_ipc_keys import Place, Shared, began, decode_key, refused_key
from nixl_async.cuda import (
    allocation_of,
    allow_access,
    check_region,
    close_handle,
    device_by_uuid,
    device_uuid,
    export_handle,
    need_cupy,
    need_device,
    open_handle,
    reaches,
    why_not_shared,
)
from nixl_async.cuda_kept import Kept, KeptPlans, Take
from nixl_async.cuda_kernels import REACH_NBYTES, Far, shifted
from nixl_async.cuda_lane import Described, Lane
from nixl_async.cuda_lanes import NOW_SEGMENTS, Lanes, begun
from nixl_async.descriptors import MemoryKind, Plan, Region, Side
from nixl_async.errors import BackendError, PeerLost
from nixl_async.memory import MemoryRegion, RemoteRegion

if TYPE_CHECKING:
    from nixl_async.descriptors import Array

logger = logging.getLogger("nixl_async.cuda_ipc")

MAX_LAUNCHED, SMALL_NBYTES = 8, 4 << 20
"""With so many launches under way small copies wait for the scheduler; larger ones with any."""


@dataclass(slots=True, eq=False)
class _Mapping:
    """A peer's allocation as one device of ours sees it, once it is open."""

    shared: Shared
    device: int
    pointer: int = 0
    nbytes: int = 0
    in_order: bool = False
    """Whether our device reads it faster in the order of its addresses."""
    regions: set[Region] = field(default_factory=set)
    ops: int = 0
    condemned: bool = False

    def open(self, lane: Lane) -> None:
        """Open it and see how far the device reaches, on the launching thread; again without effect."""
        if self.pointer:
            return
        pointer = open_handle(self.shared.handle, self.device)
        try:
            self.nbytes = allocation_of(pointer, self.device)[1]
            self.in_order = self.nbytes > REACH_NBYTES and lane.order_pays(pointer, self.nbytes)
        except BaseException:
            close_handle(pointer, self.device)
            raise
        self.pointer = pointer

    def close(self) -> None:
        """Close it, on the launching thread, behind the launches that use it."""
        if self.pointer:
            pointer, self.pointer = self.pointer, 0
            try:
                close_handle(pointer, self.device)
            except BackendError as error:
                # The device has failed: nothing of it can be used any more.
                logger.warning("cuda_ipc: %s", error)


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    local: bool
    pidfd: int = -1
    alive: select.poll = field(default_factory=select.poll)
    mappings: dict[tuple[bytes, int], _Mapping] = field(default_factory=dict)

    def ended(self) -> bool:
        """Tell whether its process has ended, as far as that can be seen from here."""
        return self.pidfd >= 0 and bool(self.alive.poll(0))

    def lost(self) -> PeerLost:
        return PeerLost(f"the process of peer {self.name!r} has ended", backend="cuda_ipc", peer=self.name)


class CUDAIPCBackend(Backend):
    """Moves bytes between VRAM of this process and VRAM of other processes of this host."""

    name = "cuda_ipc"
    begins = True
    kinds = frozenset({MemoryKind.VRAM})
    rank = 8
    limits = Limits(
        max_ops=4,
        max_nbytes=8 << 30,
        max_op_nbytes=4 << 30,
        max_op_segments=1 << 18,
        inline_nbytes=4 << 30,
        slice_nbytes=64 << 20,
    )

    def __init__(self) -> None:
        need_device(self.name)
        need_cupy(self.name)
        self._here = Place.here()
        self._host: Host | None = None
        self._lanes: Lanes | None = None
        self._kept: KeptPlans[list[_Mapping]]
        self._peers: dict[str, _Peer] = {}

    async def open(self, host: Host) -> None:
        """Make ready to start a thread when there is work for it."""
        self._host = host
        self._lanes = Lanes(host.loop, f"cuda-ipc-{host.agent_name}")
        self._kept = KeptPlans(self._lanes)

    async def aclose(self) -> None:
        """Close what is open of peers, free streams, and end the thread."""
        if self._lanes is not None:
            for peer in list(self._peers):
                await self.disconnect(peer)
            await self._kept.aclose()
            await self._lanes.aclose()
            self._lanes = None

    async def register(self, region: MemoryRegion) -> bytes:
        """Return the region's key; of memory that CUDA cannot share, one that tells peers why: it can be our side all the same."""
        check_region(region)
        await self._opened().prepare(region.device)
        if why := why_not_shared(region):
            return refused_key(why)
        base, _ = allocation_of(region.address, region.device)
        handle = export_handle(base, region.device)
        return Shared(handle, device_uuid(region.device), region.address - base, region.nbytes).encode()

    def describe(self) -> bytes:
        """Return where this process is."""
        return self._here.encode()

    async def connect(self, peer: PeerInfo) -> None:
        """Check that the peer's process is on this host and shares its IPC namespace."""
        try:
            place = Place.decode(peer.description)
        except ValueError as error:
            raise BackendError(f"peer {peer.name!r} described itself wrongly: {error}", backend=self.name) from None
        if place.boot != self._here.boot:
            raise BackendError(f"peer {peer.name!r} is on another host", backend=self.name, peer=peer.name)
        if place.ipc != self._here.ipc:
            raise BackendError(
                f"peer {peer.name!r} is in another IPC namespace; run both containers with one, such as docker's --ipc=host",
                backend=self.name,
                peer=peer.name,
            )
        await self.disconnect(peer.name)
        found = _Peer(peer.name, local=place.secret == self._here.secret)
        if not found.local and place.pids == self._here.pids:
            self._watch(found, place)
        self._peers[peer.name] = found

    async def forget(self, region: RemoteRegion) -> None:
        """Close the region's allocation if no other region of the peer lies in it."""
        peer = self._peers.get(region.peer or "")
        for key, mapping in list(peer.mappings.items()) if peer is not None else ():
            mapping.regions.discard(region)
            if not mapping.regions and peer is not None:
                del peer.mappings[key]
                await self._close(mapping)

    async def disconnect(self, peer: str) -> None:
        """Close all that is open of a peer; what an op still uses, when it has ended."""
        found = self._peers.pop(peer, None)
        if found is None:
            return
        if found.pidfd >= 0:
            os.close(found.pidfd)
            found.pidfd = -1
        for mapping in found.mappings.values():
            await self._close(mapping)
        found.mappings.clear()

    # Copying.

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse what is not VRAM of ours on one side and VRAM that a connected peer shares on the other."""
        if src.kind is not MemoryKind.VRAM or dst.kind is not MemoryKind.VRAM:
            return f"it copies VRAM only, not {src.kind.value} to {dst.kind.value}"
        if (src.peer is None) == (dst.peer is None):
            return "it copies between this process and a peer only"
        ours, theirs = (src, dst) if src.peer is None else (dst, src)
        peer = self._peers.get(theirs.peer or "")
        if peer is None:
            return "it copies to and from other processes of this host only"
        for region in theirs.regions:
            if why := _why_not(region, peer, ours.regions[0].device):
                return f"region {region.name!r} of peer {peer.name!r}: {why}"
        return None

    def how(self, src: Side, dst: Side) -> str:
        """Tell that one kernel copies all pages."""
        return "one kernel for each op"

    def copy_now(self, op: Op) -> bool | Begun:
        """Begin a copy of memory that is open already."""
        peer = self._peer(op)
        if self._opened().launched >= (MAX_LAUNCHED if op.nbytes <= SMALL_NBYTES else 1):
            return False
        if (kept := self._find(op)) is not None:
            return begun(self._send(op, peer, kept))
        ours, theirs = op.sides
        if not peer.local and not all(
            self._mapping(peer, region, ours.regions[0].device).pointer for region in theirs.regions
        ):
            return False
        return begun(self._begin(op, peer))

    async def prepare(self, op: Op) -> None:
        """Tell the device of the plan's pages: sending it is one launch then."""
        peer = self._peer(op)
        ours, theirs = op.sides
        device = ours.regions[0].device
        mappings = [] if peer.local else [self._mapping(peer, region, device) for region in theirs.regions]
        for mapping in mappings:
            mapping.ops += 1
        try:
            await self._kept.keep(op.plan, device, partial(_describe, op.plan, op.put, mappings))
        finally:
            self._let_go(mappings)

    async def copy(self, op: Op) -> None:
        """Copy all segments by one kernel; when cancelled, wait for it."""
        peer, kept = self._peer(op), self._find(op)
        await quiesce(self._begin(op, peer) if kept is None else self._send(op, peer, kept))

    def _opened(self) -> Lanes:
        if self._lanes is None:
            raise BackendError("the cuda_ipc backend is not open", backend=self.name)
        return self._lanes

    def _peer(self, op: Op) -> _Peer:
        peer = self._peers.get(op.peer or "")
        if peer is None:
            raise PeerLost(f"peer {op.peer!r} is not connected", backend=self.name, peer=op.peer)
        if peer.ended():
            raise peer.lost()
        return peer

    def _begin(self, op: Op, peer: _Peer) -> asyncio.Future[None]:
        lanes = self._opened()
        ours, theirs = op.sides
        device = ours.regions[0].device
        work: Callable[[Lane], None]
        mappings: list[_Mapping] = []
        if peer.local:
            work = partial(_copy_local, op.plan, theirs)
        else:
            mappings = [self._mapping(peer, region, device) for region in theirs.regions]
            work = partial(_copy_mapped, op.plan, op.put, mappings)
        for mapping in mappings:
            mapping.ops += 1
        now = len(op.plan.lengths) <= NOW_SEGMENTS and all(mapping.pointer for mapping in mappings)
        return lanes.launch(
            device,
            work,
            now=now,
            urgent=op.nbytes <= SMALL_NBYTES,
            nbytes=op.nbytes,
            way=peer.name,
            ended=partial(self._ended, peer, mappings),
        )

    def _find(self, op: Op) -> Kept[list[_Mapping]] | None:
        """Return what our device knows of an op's plan, if the peer's memory is where it was."""
        kept = self._kept.find(op.plan)
        return kept if kept is not None and not any(mapping.condemned for mapping in kept.beside) else None

    def _send(self, op: Op, peer: _Peer, kept: Kept[list[_Mapping]]) -> asyncio.Future[None]:
        for mapping in kept.beside:
            mapping.ops += 1
        return self._opened().send(
            op.sides[0].regions[0].device,
            kept.described,
            urgent=op.nbytes <= SMALL_NBYTES,
            nbytes=op.nbytes,
            way=peer.name,
            ended=partial(self._ended, peer, kept.beside),
        )

    def _ended(self, peer: _Peer, mappings: list[_Mapping], error: BaseException | None) -> BaseException | None:
        self._let_go(mappings)
        if not peer.ended():
            return error
        lost = peer.lost()
        lost.__cause__ = error
        return lost

    def _let_go(self, mappings: list[_Mapping]) -> None:
        for mapping in mappings:
            mapping.ops -= 1
            if mapping.condemned and not mapping.ops:
                self._opened().call(mapping.close)

    def _mapping(self, peer: _Peer, region: Region, device: int) -> _Mapping:
        shared = _shared(region)
        if isinstance(shared, str) or shared.nbytes < region.nbytes:
            raise BackendError(
                f"region {region.name!r} of peer {peer.name!r} has a wrong key", backend=self.name, peer=peer.name
            )
        mapping = peer.mappings.get((shared.handle, device))
        if mapping is None:
            mapping = peer.mappings[shared.handle, device] = _Mapping(shared, device)
        mapping.regions.add(region)
        return mapping

    async def _close(self, mapping: _Mapping) -> None:
        mapping.condemned = True
        if not mapping.ops:
            await self._opened().call(mapping.close)

    def _watch(self, peer: _Peer, place: Place) -> None:
        try:
            pidfd = os.pidfd_open(place.pid)
        except OSError as error:
            raise BackendError(
                f"peer {peer.name!r}: process {place.pid}: {error}", backend=self.name, peer=peer.name
            ) from None
        if began(place.pid) not in (place.began, 0):
            os.close(pidfd)
            raise BackendError(f"process {place.pid} is not peer {peer.name!r}", backend=self.name, peer=peer.name)
        peer.pidfd = pidfd
        peer.alive.register(pidfd, select.POLLIN)


def _shared(region: Region) -> Shared | str:
    return decode_key(region.keys.get("cuda_ipc", b"") if isinstance(region, RemoteRegion) else b"")


def _why_not(region: Region, peer: _Peer, device: int) -> str:
    """Tell why a device of ours cannot copy to and from a peer's region; empty if it can."""
    if peer.local:
        return "" if reaches(device, region.device) else f"our device {device} does not reach device {region.device}"
    shared = _shared(region)
    if isinstance(shared, str):
        return shared
    other = device_by_uuid(shared.uuid)
    if other is None:
        return f"its device GPU-{shared.uuid.hex()} is not visible in this process (CUDA_VISIBLE_DEVICES)"
    return "" if reaches(device, other) else f"our device {device} does not reach its device {other} (no peer access)"


def _copy_local(plan: Plan, theirs: Side, lane: Lane) -> None:
    allow_access(lane.device, theirs.regions[0].device)
    lane.copy(plan.src.addresses, plan.dst.addresses, plan.lengths)


def _copy_mapped(plan: Plan, put: bool, mappings: list[_Mapping], lane: Lane) -> None:
    src, dst, moves, far = _seen(plan, put, mappings, lane)
    lane.copy(src, dst, plan.lengths, moves=moves, far=far)


def _describe(
    plan: Plan, put: bool, mappings: list[_Mapping], lane: Lane, take: Take
) -> tuple[Described | None, list[_Mapping]]:
    if mappings:
        src, dst, moves, far = _seen(plan, put, mappings, lane)
        return lane.describe(src, dst, plan.lengths, moves=moves, far=far, take=take), mappings
    allow_access(lane.device, (plan.dst if put else plan.src).regions[0].device)
    return lane.describe(plan.src.addresses, plan.dst.addresses, plan.lengths, take=take), mappings


def _seen(plan: Plan, put: bool, mappings: list[_Mapping], lane: Lane) -> tuple[Array, Array, tuple[int, int], Far | None]:
    """Open what a plan needs of a peer; return sources, destinations, how far from there our device sees them, the far side."""
    theirs = plan.dst if put else plan.src
    shifts = []
    for region, mapping in zip(theirs.regions, mappings, strict=True):
        mapping.open(lane)
        shared = _shared(region)
        if isinstance(shared, str) or shared.offset + region.nbytes > mapping.nbytes:
            raise BackendError(
                f"region {region.name!r} ends behind its allocation of {mapping.nbytes} bytes", backend="cuda_ipc"
            )
        shifts.append(mapping.pointer + shared.offset - region.address)
    seen = [region.address + shift for region, shift in zip(theirs.regions, shifts, strict=True)]
    end = max(at + region.nbytes for at, region in zip(seen, theirs.regions, strict=True))
    far = Far(put, min(seen), end) if any(mapping.in_order for mapping in mappings) else None
    src, dst, move = plan.src.addresses, plan.dst.addresses, shifts[0]
    if len(set(shifts)) > 1:
        moved, move = shifted(theirs, shifts), 0
        src, dst = (src, moved) if put else (moved, dst)
    return src, dst, (0, move) if put else (move, 0), far

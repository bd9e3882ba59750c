"""Copies through UCX, over whatever it finds (RDMA, shared memory, TCP), and the notifications of stock NIXL agents.

UCXX makes the context and the worker; the one-sided operations, which its Python does not offer, are posted on their handles by
one native thread that needs no GIL and sleeps on the worker's event descriptor. Regions and addresses are described as NIXL's
UCX backend does it: the raw worker address and the raw packed key, behind which ours carry a checksum that UCX does not read.

UCX says by which transports an endpoint goes. Over RDMA this backend comes before `tcp`, over TCP after it (`ucx_lanes.py`).

An endpoint that fails may leave bytes in the network, or in shared memory, that the peer copies long after. So a put that
was on it ends when the peer has confirmed, over the control connection, that it has closed its endpoint and taken what had come.

To another agent of ours small pages travel many to a message (`native/ucx_pack.c`); to a stock agent all is one-sided, and so
is what a device's memory takes part in: packing is done by the CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import secrets
import socket
import struct
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from nixl_async.backend import Backend, Host, Limits, Op, PeerInfo, quiesce
from nixl_async.backends import ucx_lanes
from nixl_async.cuda import check_region, device_count, primary_context
from nixl_async.descriptors import MemoryKind, Region, Side
from nixl_async.errors import BackendError, MissingDependency, PeerLost, ProtocolError, Quarantined, TransferError
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.metadata import decode_notification, encode_notification
from nixl_async.native import ffi, int64, lib

# UCXX sets the first two: UCX 1.21 does not know the one, and says so; the other would stand in the way of our own. UCX opens its
# log while it is loaded, on standard output, which is the program's: where the environment names no place, we name standard error.
_LOG = "UCX_LOG_FILE"
_given = {name: os.environ.get(name) for name in ("UCX_MEMTYPE_CACHE", "UCX_RNDV_THRESH", _LOG)}
os.environ.setdefault(_LOG, "stderr")
try:
    import ucxx._lib.libucxx as ucxx
except ImportError as error:
    raise MissingDependency(f"the ucx backend needs UCXX: pip install 'nixl-async[ucx-cu12]' ({error})") from error
finally:
    # What the program starts finds the environment as the user made it.
    for _name, _value in _given.items():
        if _value is None:
            os.environ.pop(_name, None)

CONFIGURATION = {
    # Offered `cma`, UCX 1.21 chooses lanes over which stock NIXL peers cannot answer; same-host copies have their own backend.
    "TLS": "^cma",
    "RNDV_THRESH": "inf",
    "MAX_RMA_RAILS": "2",
    "ADDRESS_VERSION": "v2",
    "KEEPALIVE_INTERVAL": "1s",
    "TCP_TX_SEG_SIZE": "64k",
    "TCP_RX_SEG_SIZE": "256k",
}
"""What we set on our own context; the environment's UCX_* variables win."""
CUDA_CONFIGURATION = {
    # Where it sees no NVLink UCX does not read another process's VRAM, and has the peer send it over TCP instead.
    "CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}
"""The same, where there is a CUDA device."""
PEERMEM = ("/sys/module/nvidia_peermem", "/sys/kernel/mm/memory_peers/nv_mem")
"""Either is there where the kernel lets RDMA cards reach VRAM. Over DMA-BUF they may too, of which nothing tells."""
PACK_NBYTES = 16 << 10
"""Segments that are this small on average travel many to a message, where the peer is an agent of ours."""
_SEAL = struct.Struct("<4sI")
_SEAL_MARK = b"nxa1"
_TOKEN = struct.Struct("<Q")
_ROOM = 64 << 10
_BATCH = 256
_SIOCGIFADDR = 0x8915
_LOOPBACK_NET = 127
_CANCELLED = -1000
_ANSWERING = b"answering"
_NOT_CONNECTED = -24
_NOT_OF_THE_PEER = frozenset({-1, -4, -5, -8, -22})


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    identity: str
    stock: bool
    number: int
    pointer: Any
    ended: asyncio.Future[int]
    """Resolves when the endpoint fails or is closed."""
    closed: asyncio.Future[int]
    """Resolves when a failed endpoint is closed."""
    lanes: tuple[ucx_lanes.Lane, ...] = ()
    """By which transports UCX goes; none where it does not say."""
    rank: int = ucx_lanes.RANK
    rkeys: dict[bytes, Any] = field(default_factory=dict)
    lost: str = ""
    down: str = ""
    """Why it is to be connected to again."""
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when no op holds the pointer, once the endpoint has failed."""
    shut: asyncio.Task[None] | None = None
    fence: asyncio.Task[None] | None = None
    answering: bool = False
    """Whether it was let fail for a fence of the peer's: then that side has closed its own already."""


class UCXBackend(Backend):
    """Moves bytes to and from peers over UCX; shares with stock NIXL agents its addresses, keys and notifications."""

    name = "ucx"
    kinds = frozenset({MemoryKind.DRAM, MemoryKind.VRAM})
    rank = ucx_lanes.RANK
    limits = Limits(max_ops=4, max_op_nbytes=16 << 20, max_op_segments=16384)

    def __init__(self) -> None:
        self._context: Any = None
        self._worker: Any = None
        self._engine = ffi.NULL
        self._event_fd = -1
        self._host: Host | None = None
        self._address = b""
        self._peers: dict[str, _Peer] = {}
        # What is mapped, with its key: what is registered, and what is leased besides.
        self._memory: dict[MemoryRegion, tuple[Any, bytes]] = {}
        self._leased: dict[bytes, Any] = {}
        self._no_vram = "it is not open"
        self._peermem = False
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._ids = itertools.count(2, 2)
        self._ids_out = np.zeros(_BATCH, np.int64)
        self._statuses_out = np.zeros(_BATCH, np.int64)
        self._buffer = bytearray(_ROOM)

    # Life.

    async def open(self, host: Host) -> None:
        """Make a context and a worker, and start the thread that progresses them."""
        try:
            # The first context of a process loads UCX's transports, which takes a third of a second.
            self._context, self._worker = await quiesce(host.loop.run_in_executor(None, _make_worker))
        except asyncio.CancelledError:
            self._context = self._worker = None
            raise
        except Exception as error:
            self._context = self._worker = None
            raise BackendError(f"UCX cannot be set up: {error}", backend=self.name) from error
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        why = ffi.new("char[]", 256)
        self._engine = lib.nx_ucx_open(
            self._context.handle, self._worker.handle, self._event_fd, why, 256, _identity(host.agent_name, host.incarnation)
        )
        if self._engine == ffi.NULL:
            os.close(self._event_fd)
            self._worker = self._context = None
            raise BackendError(f"UCX cannot be set up: {ffi.string(why).decode()}", backend=self.name)
        self._host = host
        self._no_vram = self._why_no_vram()
        self._peermem = _has_peermem()
        self._address = self._read(lib.nx_ucx_address, self._engine)
        host.loop.add_reader(self._event_fd, self._take_events)

    async def aclose(self) -> None:
        """Close every endpoint, end the thread, and give up worker and context."""
        if self._host is None:
            return
        for peer in list(self._peers):
            await self.disconnect(peer)
        host, self._host = self._host, None
        host.loop.remove_reader(self._event_fd)
        for memory, key in [*self._memory.values(), *((memory, key) for key, memory in self._leased.items())]:
            lib.nx_ucx_unmap(self._engine, memory, _token(key))
        self._memory.clear()
        self._leased.clear()
        engine, self._engine = self._engine, ffi.NULL
        lib.nx_ucx_close(engine)
        os.close(self._event_fd)
        self._worker = None
        self._context = None

    def describe(self) -> bytes:
        """Return the worker's address."""
        return _seal(self._address)

    async def connect(self, peer: PeerInfo) -> None:
        """Make an endpoint to the peer's worker."""
        self._opened()
        # UCX reads an address without checking it. Ours are sealed; a stock agent's is known by its incarnation, which it is.
        stock = peer.incarnation == peer.description.hex() and len(peer.description) > _SEAL.size
        address = peer.description if stock else _unseal(peer.description)
        if address is None:
            raise BackendError(f"peer {peer.name!r} sent a malformed worker address", backend=self.name, peer=peer.name)
        identity = 0 if stock else _identity(peer.name, peer.incarnation)
        known = self._peers.get(peer.name)
        again = known is not None and known.down and known.identity == peer.incarnation
        if known is not None and again:
            # It stays known meanwhile: transfers wait for it.
            await quiesce(self._shut(known))
            if known.lost:
                raise PeerLost(f"peer {peer.name!r} is lost: {known.lost}", backend=self.name, peer=peer.name)
        elif known is not None and known.identity == peer.incarnation and not known.lost:
            return
        else:
            await self.disconnect(peer.name)
        number = next(self._ids)
        ended, closed, lanes = self._expect(number), self._expect(number + 1), self._expect(-number)
        status = ffi.new("int *")
        pointer = lib.nx_ucx_connect(self._engine, address, number, identity, status)
        if pointer == ffi.NULL:
            del self._waiting[number], self._waiting[number + 1], self._waiting[-number]
            raise BackendError(f"peer {peer.name!r}: {_text(status[0])}", backend=self.name, peer=peer.name)
        known = _Peer(peer.name, peer.incarnation, stock, number, pointer, ended, closed)
        self._peers[peer.name] = known
        ended.add_done_callback(partial(self._ended, known))
        try:
            # What is routed from here on is routed by what the endpoint is.
            await quiesce(lanes)
        except asyncio.CancelledError:
            await self.disconnect(peer.name)
            raise
        if again and known.down:
            raise PeerLost(f"peer {peer.name!r} is lost: {known.down}", backend=self.name, peer=peer.name)

    async def disconnect(self, peer: str) -> None:
        """Close the endpoint to a peer, and take what had arrived by then: nothing that it has sent is written afterwards."""
        known = self._peers.pop(peer, None)
        if known is None:
            return
        known.lost = known.lost or "we parted from it"
        try:
            await quiesce(self._shut(known))
            await self._settle(peer)
        finally:
            if known.fence is not None:
                known.fence.cancel()

    def _shut(self, known: _Peer) -> asyncio.Task[None]:
        """Close an endpoint when no op of ours uses it any more."""
        if known.shut is None:
            known.shut = self._opened().loop.create_task(self._close(known))
        return known.shut

    async def _close(self, known: _Peer) -> None:
        failed = known.ended.done()
        if failed and known.users:
            await known.unused.wait()
        for rkey in known.rkeys.values():
            lib.nx_ucx_rkey_free(rkey)
        known.rkeys.clear()
        lib.nx_ucx_disconnect(known.pointer)
        if not failed:
            await quiesce(known.ended)
        if failed or known.ended.result() != 0:
            await quiesce(known.closed)
        for number in [n for n, future in self._waiting.items() if future is known.closed]:
            del self._waiting[number]
        lib.nx_ucx_forget(known.pointer)

    async def fence(self, peer: PeerInfo, mark: bytes) -> None:
        """Close our endpoint to the peer by force, and take all that had arrived by then.

        `mark` says that the peer's endpoint failed for a fence of ours: then ours had been closed before. Else it is empty.
        """
        known = self._peers.get(peer.name)
        if known is not None and known.identity == peer.incarnation and not known.lost:
            if not known.ended.done() and mark != _ANSWERING:
                known.answering = True
                lib.nx_ucx_fail(known.pointer)
                await quiesce(known.ended)
            if known.ended.done():
                await quiesce(self._shut(known))
        await self._settle(peer.name)

    async def _settle(self, peer: str) -> None:
        """Take all that has arrived: copied to where it belongs, or dropped with its endpoint."""
        number = next(self._ids)
        settled = self._expect(number)
        if lib.nx_ucx_settle(self._engine, number):
            del self._waiting[number]
            raise BackendError("out of memory", backend=self.name, peer=peer)
        await quiesce(settled)

    async def register(self, region: MemoryRegion) -> bytes:
        """Map the memory; return the packed key."""
        key, memory = await self._map(region)
        self._memory[region] = memory, key
        return key

    async def grant(self, region: MemoryRegion, peer: str, incarnation: str, *, writable: bool) -> bytes:
        """Map the memory once more: a key of its own, whose token `revoke` ends for packed messages.

        UCX keeps a registration for as long as memory is mapped at all, and its software transports check no key: what is
        one-sided is ended by the peer alone.
        """
        key, memory = await self._map(region)
        self._leased[key] = memory
        return key

    async def revoke(self, region: MemoryRegion, key: bytes) -> None:
        """Serve no packed message with that key any more, and unmap what was mapped for it."""
        memory = self._leased.pop(key, None)
        if memory is not None:
            lib.nx_ucx_unmap(self._engine, memory, _token(key))

    async def _map(self, region: MemoryRegion) -> tuple[bytes, Any]:
        host = self._opened()
        if region.readonly:
            raise BackendError("it registers writable memory only", backend=self.name)
        context = 0
        if region.kind is MemoryKind.VRAM:
            if self._no_vram:
                raise BackendError(self._no_vram, backend=self.name)
            check_region(region)
            context = await self._enter_device(region.device)
        memory = ffi.new("void **")
        token = secrets.randbits(64)
        call = partial(self._read, lib.nx_ucx_map, self._engine, region.address, region.nbytes, token, context, memory)
        # Large registrations fault in and pin pages, which takes the kernel a while; the driver takes its time for any.
        quick = region.nbytes <= 1 << 20 and not context
        key = call() if quick else await quiesce(host.loop.run_in_executor(None, call))
        return _seal(key + _TOKEN.pack(token)), memory[0]

    async def unregister(self, region: MemoryRegion) -> None:
        """Unmap the memory."""
        if (mapped := self._memory.pop(region, None)) is not None:
            memory, key = mapped
            lib.nx_ucx_unmap(self._engine, memory, _token(key))

    async def forget(self, region: RemoteRegion) -> None:
        """Give up a key; that of a device's memory keeps it mapped here, on one host."""
        peer = self._peers.get(region.peer or "")
        rkey = None if peer is None else peer.rkeys.pop(self._key(region), None)
        if rkey is not None:
            lib.nx_ucx_rkey_free(rkey)

    # Copying.

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but memory of ours on one side and a connected peer's on the other; VRAM where UCX has no CUDA."""
        if {src.kind, dst.kind} - self.kinds:
            return f"it copies DRAM and VRAM only, not {src.kind.value} to {dst.kind.value}"
        if (src.peer is None) == (dst.peer is None):
            return "it copies between this process and a peer only"
        peer = self._peers.get(src.peer or dst.peer or "")
        if peer is None or peer.lost:
            return "it is not connected to that peer"
        if MemoryKind.VRAM in (src.kind, dst.kind):
            if self._no_vram:
                return self._no_vram
            for side in (src, dst):
                for region in side.regions:
                    if side.kind is MemoryKind.VRAM and not self._key(region):
                        whose = "we have" if side.peer is None else f"peer {side.peer!r} has"
                        return f"{whose} not registered region {region.name!r} with it"
        return None

    def rank_for(self, src: Side, dst: Side) -> int:
        """Come before `tcp` and `staging` where UCX reaches the peer by RDMA, with VRAM if the cards reach that too."""
        peer = self._peers.get(src.peer or dst.peer or "")
        if peer is None or (not self._peermem and MemoryKind.VRAM in (src.kind, dst.kind)):
            return self.rank
        return peer.rank

    def how(self, src: Side, dst: Side) -> str:
        """Tell by which transports, and whether small pages travel many to a message."""
        peer = self._peers.get(src.peer or dst.peer or "")
        packs = peer is not None and not peer.stock and not peer.lost and not peer.down and lib.nx_ucx_packs(peer.pointer)
        packs = packs and MemoryKind.VRAM not in (src.kind, dst.kind)
        by = ucx_lanes.describe(peer.lanes) if peer is not None else ""
        return f"{by + '; ' if by else ''}one-sided{', small pages packed' if packs else ''}"

    async def copy(self, op: Op) -> None:
        """Hand the segments to the native thread; when cancelled, post no more and wait for those that are under way."""
        peer = self._peer(op.peer)
        ours, theirs = op.sides
        on_device = MemoryKind.VRAM in (ours.kind, theirs.kind)
        if theirs.kind is MemoryKind.VRAM:
            peer.users += 1
            try:
                await self._open_keys(peer, theirs)
            finally:
                self._unused(peer)
            if peer.down:
                raise PeerLost(f"peer {op.peer!r} cannot be reached: {peer.down}", backend=self.name, peer=op.peer)
        rkeys = ffi.new("void *[]", [self._rkey(peer, region) for region in theirs.regions])
        index = ffi.NULL if theirs.index is None else int64(theirs.index)
        arrays = int64(ours.addresses), int64(theirs.addresses), int64(op.plan.lengths)
        tokens = ffi.NULL
        packs = not peer.stock and not on_device
        if packs and len(op.plan.lengths) > 1 and op.nbytes <= PACK_NBYTES * len(op.plan.lengths):
            keys = [region.keys[self.name] for region in theirs.regions if isinstance(region, RemoteRegion)]
            tokens = ffi.new("uint64_t[]", [_token(key) for key in keys])
        vram = ours.kind is MemoryKind.VRAM
        near = ours.regions[0]
        mapped = self._memory.get(near) if vram and len(ours.regions) == 1 and isinstance(near, MemoryRegion) else None
        number = next(self._ids)
        done = self._expect(number)
        segments = len(op.plan.lengths), *arrays, index, rkeys, tokens, vram, mapped[0] if mapped else ffi.NULL
        if lib.nx_ucx_submit(peer.pointer, number, op.put, *segments):
            del self._waiting[number]
            raise BackendError("out of memory", backend=self.name, peer=op.peer, retryable=True)
        peer.users += 1
        done.add_done_callback(partial(self._unused, peer))
        try:
            status = await quiesce(done, partial(lib.nx_ucx_cancel, peer.pointer, number))
            if status:
                raise self._error(status, peer)
        finally:
            # Others of its puts are flushed before it ends, unless the endpoint has failed.
            if op.put and done.result() not in (0, _CANCELLED, *_NOT_OF_THE_PEER) and not peer.stock:
                await self._fence_off(peer)

    @staticmethod
    def _unused(peer: _Peer, done: asyncio.Future[int] | None = None) -> None:
        peer.users -= 1
        if not peer.users:
            peer.unused.set()

    async def _fence_off(self, peer: _Peer) -> None:
        """Wait until nothing more of the puts that were on a failed endpoint can land.

        Raises:
            Quarantined: that is not certain.
        """
        host = self._opened()
        if peer.fence is None:
            # It may not have failed as a whole; the peer's closing would make it.
            lib.nx_ucx_fail(peer.pointer)
            peer.fence = host.loop.create_task(self._ask(host, peer))
        cause: BaseException | None = None
        cancelled: asyncio.CancelledError | None = None
        try:
            await quiesce(peer.fence)
        except asyncio.CancelledError as error:
            cancelled = error
            cause = None if peer.fence.cancelled() else peer.fence.exception()
        except TransferError as error:
            cause = error
        # With a peer that is lost goes its memory, as far as this side is concerned.
        if cause is not None and not isinstance(cause, PeerLost):
            raise Quarantined(
                f"the endpoint to peer {peer.name!r} failed, and bytes that were sent by it may still be written there: {cause}",
                local=False,
                backend=self.name,
                peer=peer.name,
            ) from cause
        if cancelled is not None:
            raise cancelled

    async def _ask(self, host: Host, peer: _Peer) -> None:
        await quiesce(peer.ended)
        # Our end goes first: the peer's closes on nothing that we still send.
        await quiesce(self._shut(peer))
        await host.fence(peer.name, _ANSWERING if peer.answering else b"")

    async def send_notification(self, peer: str, payload: bytes) -> None:
        """Send a notification in NIXL's form: an active message that its agents, and ours, take."""
        known = self._peer(peer)
        message = encode_notification(self._opened().agent_name, payload)
        number = next(self._ids)
        done = self._expect(number)
        if lib.nx_ucx_send(known.pointer, number, message, len(message)):
            del self._waiting[number]
            raise BackendError("out of memory", backend=self.name, peer=peer, retryable=True)
        status = await quiesce(done)
        if status:
            raise self._error(status, known)

    # Inside.

    def _opened(self) -> Host:
        if self._host is None:
            raise BackendError("the ucx backend is not open", backend=self.name)
        return self._host

    def _peer(self, name: str | None) -> _Peer:
        peer = self._peers.get(name or "")
        if peer is None or peer.lost or peer.down:
            why = peer.lost or peer.down if peer else "there is no endpoint"
            raise PeerLost(f"peer {name!r} is lost: {why}", backend=self.name, peer=name)
        return peer

    def _expect(self, number: int) -> asyncio.Future[int]:
        future = self._opened().loop.create_future()
        self._waiting[number] = future
        return future

    def _read(self, function: Any, *arguments: Any) -> bytes:
        room, n = ffi.new("uint8_t[]", _ROOM), ffi.new("int64_t *")
        status = function(*arguments, room, _ROOM, n)
        if status:
            raise BackendError(f"UCX: {_text(status)}", backend=self.name)
        return bytes(ffi.buffer(room, n[0]))

    def _why_no_vram(self) -> str:
        if not lib.nx_ucx_takes_cuda(self._engine):
            return "this UCX takes no VRAM: it was built without CUDA, UCX_TLS leaves CUDA out, or there is no driver"
        return "" if device_count() else "there is no CUDA device"

    async def _enter_device(self, device: int) -> int:
        """Make a context current on the native thread; return that of the device. Making one takes a fraction of a second."""

        def enter() -> int:
            context = primary_context(device)
            if lib.nx_ucx_use_cuda(self._engine, context):
                raise BackendError(f"UCX's thread cannot enter the context of CUDA device {device}", backend=self.name)
            return context

        return await quiesce(self._opened().loop.run_in_executor(None, enter))

    async def _open_keys(self, peer: _Peer, theirs: Side) -> None:
        """Open keys of a peer's VRAM on a thread: on one host that maps its memory."""
        closed = [region for region in theirs.regions if self._key(region) not in peer.rkeys]
        if closed:
            context = await self._enter_device(0)
            for region in closed:
                await quiesce(self._opened().loop.run_in_executor(None, self._rkey, peer, region, context))

    def _key(self, region: Region) -> bytes:
        return region.keys.get(self.name, b"") if isinstance(region, MemoryRegion | RemoteRegion) else b""

    def _rkey(self, peer: _Peer, region: Region, context: int = 0) -> Any:
        key = self._key(region)
        rkey = peer.rkeys.get(key)
        if rkey is None:
            packed = key if peer.stock else _unseal(key)
            if not packed:
                raise BackendError(
                    f"peer {peer.name!r} has no valid ucx key for region {region.name!r}", backend=self.name, peer=peer.name
                )
            status = ffi.new("int *")
            # Behind the packed key, which UCX knows the end of, comes the token.
            rkey = lib.nx_ucx_rkey(peer.pointer, packed, context, status)
            if rkey == ffi.NULL:
                # The endpoint may have failed already, which this thread is about to be told.
                if status[0] == _NOT_CONNECTED:
                    raise self._error(status[0], peer)
                raise BackendError(f"peer {peer.name!r}: {_text(status[0])}", backend=self.name, peer=peer.name)
            known = peer.rkeys.setdefault(key, rkey)
            if known is not rkey:
                # Opened by another thread meanwhile.
                lib.nx_ucx_rkey_free(rkey)
                rkey = known
        return rkey

    def _take_events(self) -> None:
        ids, statuses = self._ids_out, self._statuses_out
        n = lib.nx_ucx_completions(self._engine, int64(ids), int64(statuses), _BATCH)
        for number, status in zip(ids[:n].tolist(), statuses[:n].tolist(), strict=True):
            if number < 0:
                self._take_lanes(-number)
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_result(status)
        self._take_messages()

    def _take_lanes(self, number: int) -> None:
        peer = next((peer for peer in self._peers.values() if peer.number == number), None)
        if peer is None or peer.lost:
            return
        peer.lanes, before = ucx_lanes.read_lanes(self._ask_lanes(peer.pointer)), peer.rank
        peer.rank = ucx_lanes.rank_of(peer.lanes)
        if peer.rank != before:
            self._opened().rank_changed()

    def _ask_lanes(self, pointer: Any) -> str:
        return self._read(lib.nx_ucx_lanes, pointer).decode(errors="replace")

    def _take_messages(self) -> None:
        host = self._opened()
        while (n := lib.nx_ucx_receive(self._engine, ffi.from_buffer("uint8_t[]", self._buffer), len(self._buffer))) != -1:
            if n < -1:
                self._buffer = bytearray(-n - 2)
                continue
            try:
                sender, payload = decode_notification(bytes(self._buffer[:n]))
            except ProtocolError:
                # Anybody who can reach the worker can send anything; what is no notification concerns nobody.
                continue
            host.notification(sender, payload)

    def _ended(self, peer: _Peer, future: asyncio.Future[int]) -> None:
        if not peer.users:
            peer.unused.set()
        if peer.lost or self._host is None:
            return
        peer.down = f"its endpoint failed: {_text(future.result())}"
        self._host.peer_lost(peer.name, peer.down)

    def _error(self, status: int, peer: _Peer) -> TransferError:
        text = f"peer {peer.name!r}: {_text(status)}"
        if status == _CANCELLED or status in _NOT_OF_THE_PEER:
            return BackendError(text, backend=self.name, peer=peer.name)
        return PeerLost(text, backend=self.name, peer=peer.name)


def loaded_library() -> tuple[str, str]:
    """Return the version and the file of the libucp that this process has loaded.

    Raises:
        BackendError: it has loaded none.
    """
    room, n = ffi.new("uint8_t[]", _ROOM), ffi.new("int64_t *")
    if lib.nx_ucx_library(room, _ROOM, n):
        raise BackendError("libucp is not loaded in this process", backend=UCXBackend.name)
    version, _, path = bytes(ffi.buffer(room, n[0])).decode(errors="replace").partition(" ")
    return version, path


def _make_worker() -> tuple[Any, Any]:
    wanted = CONFIGURATION | (CUDA_CONFIGURATION if device_count() else {})
    if _has_network():
        # A stock agent on this host may choose `lo` for its half of a connection, over which UCX 1.21 cannot answer 1.22
        # ("different pid namespaces"); over another interface of the same host both can.
        wanted["NET_DEVICES"] = "^lo"
    wanted = {key: value for key, value in wanted.items() if f"UCX_{key}" not in os.environ}
    context = ucxx.UCXContext(wanted, (ucxx.Feature.RMA, ucxx.Feature.AM, ucxx.Feature.WAKEUP))
    return context, ucxx.UCXWorker(context)


def _has_peermem() -> bool:
    return any(os.path.exists(path) for path in PEERMEM)


def _has_network() -> bool:
    """Return whether an interface other than the loopback has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[20] != _LOOPBACK_NET:
                    return True
    return False


def _identity(name: str, incarnation: str) -> int:
    """Return what the packed messages of an agent are known by: never 0."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{incarnation}".encode(), digest_size=8).digest(), "little") | 1


def _token(key: bytes) -> int:
    """Return what stands for the memory in packed messages."""
    return int(_TOKEN.unpack_from(key, len(key) - _SEAL.size - _TOKEN.size)[0])


def _text(status: int) -> str:
    return str(ffi.string(lib.nx_ucx_text(status)).decode())


def _seal(raw: bytes) -> bytes:
    """Append a checksum; UCX, which knows where its own data ends, does not read it."""
    return raw + _SEAL.pack(_SEAL_MARK, zlib.crc32(raw))


def _unseal(sealed: bytes) -> bytes | None:
    raw, seal = sealed[: -_SEAL.size], sealed[-_SEAL.size :]
    return raw if raw and seal == _SEAL.pack(_SEAL_MARK, zlib.crc32(raw)) else None

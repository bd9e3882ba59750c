"""Regions: memory registered with an agent, and a peer's registered memory as seen from here.

`open_buffer` turns whatever holds bytes (numpy, bytearray, mmap, torch, DLPack, CUDA arrays) into an address; a
`MemoryRegion` keeps that object alive and counts the transfers that hold it. Nothing here talks to backends or peers.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.descriptors import MemoryKind, Region
from nixl_async.dlpack import CPU, CUDA, CUDA_HOST, CUDA_MANAGED, is_capsule, take
from nixl_async.errors import ClosedError, DescriptorError, PeerLost, RegistrationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from nixl_async.leases import Lease, Leases
    from nixl_async.peers import Peer


@dataclass(frozen=True, slots=True)
class Buffer:
    """An object's bytes: where they are, how many, and the object that must stay alive."""

    address: int
    nbytes: int
    kind: MemoryKind
    device: int
    readonly: bool
    owner: object


def open_buffer(obj: Any) -> Buffer:
    """Find the bytes of `obj` without copying them.

    Takes `__cuda_array_interface__` (VRAM), the buffer protocol, torch tensors, and DLPack of CPU and CUDA memory: objects with
    `__dlpack__`, and capsules, which are used up. A pool's sub-allocation is registered as what it is, a piece of memory.

    Raises:
        RegistrationError: `obj` shows no bytes, is not C-contiguous, or has none.
    """
    try:
        on_cuda = hasattr(obj, "__cuda_array_interface__")
    except (KeyError, TypeError) as error:
        # torch's way to say that the interface has no name for a CUDA tensor's type.
        on_cuda = getattr(obj, "is_cuda", False) is True
        if not on_cuda:
            raise RegistrationError(f"{_what(obj)} does not show its bytes: {error}") from error
    except RuntimeError as error:
        # And that it requires grad, or is sparse.
        raise RegistrationError(f"{_what(obj)} does not show its bytes: {error}") from error
    buffer = _cuda_buffer(obj) if on_cuda else _host_buffer(obj)
    if buffer.nbytes == 0:
        raise RegistrationError(f"{_what(obj)} has no bytes; register memory of at least one byte")
    return buffer


def _what(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__} object"


def _cuda_buffer(obj: Any) -> Buffer:
    if getattr(obj, "is_cuda", False) is True and hasattr(obj, "data_ptr"):
        # torch: its interface has no type for bfloat16 and float8, which KV caches use.
        if not _torch_bytes_ok(obj):
            raise RegistrationError(f"{_what(obj)} is not C-contiguous; register tensor.contiguous() instead")
        nbytes = obj.numel() * obj.element_size()
        return Buffer(obj.data_ptr(), nbytes, MemoryKind.VRAM, obj.device.index or 0, False, obj)
    interface = obj.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise RegistrationError(f"{_what(obj)} is masked; register a plain array")
    shape, itemsize = interface["shape"], np.dtype(interface["typestr"]).itemsize
    nbytes = itemsize
    strides = interface.get("strides") or (None,) * len(shape)
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride not in (None, nbytes):
            raise RegistrationError(f"{_what(obj)} is not C-contiguous; register a contiguous array")
        nbytes *= length
    address, readonly = interface["data"]
    device = getattr(getattr(obj, "device", None), "id", None)
    if device is None:
        device = getattr(getattr(obj, "device", None), "index", None) or 0
    return Buffer(int(address), int(nbytes), MemoryKind.VRAM, int(device), bool(readonly), obj)


def _host_buffer(obj: Any) -> Buffer:
    if is_capsule(obj):
        return _dlpack_buffer(obj)
    try:
        view = memoryview(obj)
    except TypeError:
        pass
    except (BufferError, ValueError) as error:
        raise RegistrationError(f"{_what(obj)} does not show its bytes: {error}") from error
    else:
        if not view.c_contiguous:
            raise RegistrationError(f"{_what(obj)} is not C-contiguous; register a contiguous array, or its base")
        if view.nbytes == 0:
            return Buffer(0, 0, MemoryKind.DRAM, 0, view.readonly, obj)
        if "O" in view.format and np.asarray(view).dtype.hasobject:
            raise RegistrationError(f"{_what(obj)} holds Python objects; register plain numbers or bytes")
        flat = np.frombuffer(view, np.uint8)
        return Buffer(flat.ctypes.data, view.nbytes, MemoryKind.DRAM, 0, view.readonly, flat)
    if hasattr(obj, "__dlpack__") and hasattr(obj, "__dlpack_device__"):
        try:
            device_type, device = obj.__dlpack_device__()
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise RegistrationError(f"{_what(obj)} does not show its bytes through DLPack: {error}") from error
        if int(device_type) not in _DLPACK_KINDS:
            raise RegistrationError(f"{_what(obj)} is on DLPack device {int(device_type)}:{device}; {_DLPACK_TAKEN}")
        if int(device_type) != CPU:
            return _dlpack_buffer(obj)
        if not _torch_bytes_ok(obj):
            raise RegistrationError(f"{_what(obj)} is not C-contiguous; register tensor.contiguous() instead")
        pointer = getattr(obj, "data_ptr", None)
        if pointer is not None:
            # Not through numpy: it has no bfloat16 or float8, which KV caches use.
            return Buffer(pointer(), obj.numel() * obj.element_size(), MemoryKind.DRAM, 0, False, obj)
        try:
            array = np.from_dlpack(obj)
        except (BufferError, RuntimeError, TypeError) as error:
            raise RegistrationError(f"{_what(obj)} does not show its bytes through DLPack: {error}") from error
        if not array.flags.c_contiguous:
            raise RegistrationError(f"{_what(obj)} is not C-contiguous; register a contiguous array")
        return Buffer(array.ctypes.data, array.nbytes, MemoryKind.DRAM, 0, not array.flags.writeable, (obj, array))
    raise RegistrationError(
        f"cannot register {_what(obj)}: it offers neither the buffer protocol, nor DLPack, nor __cuda_array_interface__"
    )


_DLPACK_KINDS = {CPU: MemoryKind.DRAM, CUDA_HOST: MemoryKind.DRAM, CUDA: MemoryKind.VRAM, CUDA_MANAGED: MemoryKind.VRAM}
_DLPACK_TAKEN = f"CPU ({CPU}) and CUDA memory ({CUDA}, {CUDA_HOST} pinned, {CUDA_MANAGED} managed) are taken"


def _dlpack_buffer(obj: Any) -> Buffer:
    try:
        tensor = take(obj)
    except (BufferError, RuntimeError, ValueError) as error:
        raise RegistrationError(f"{_what(obj)} does not show its bytes through DLPack: {error}") from error
    kind = _DLPACK_KINDS.get(tensor.device_type)
    if kind is None:
        raise RegistrationError(f"{_what(obj)} is on DLPack device {tensor.device_type}:{tensor.device}; {_DLPACK_TAKEN}")
    if not tensor.contiguous:
        raise RegistrationError(f"{_what(obj)} is not C-contiguous; register a contiguous array")
    device = tensor.device if kind is MemoryKind.VRAM else 0
    return Buffer(tensor.address, tensor.nbytes, kind, device, tensor.readonly, tensor.owner)


def _torch_bytes_ok(obj: Any) -> bool:
    check = getattr(obj, "is_contiguous", None)
    return True if check is None else bool(check())


class Held(Region):
    """Counts the transfers that use a region, and tells when none does."""

    def __init__(self) -> None:
        self._holders = 0
        self._idle: asyncio.Event | None = None

    def hold(self) -> None:
        """Count one more transfer that uses the region."""
        self._holders += 1

    def release(self) -> None:
        """Count one transfer less."""
        self._holders -= 1
        if self._holders == 0 and self._idle is not None:
            self._idle.set()

    async def wait_unused(self) -> None:
        """Wait until no transfer uses the region."""
        while self._holders:
            if self._idle is None:
                self._idle = asyncio.Event()
            self._idle.clear()
            await self._idle.wait()


class MemoryRegion(Held):
    """Memory of this process, registered with an agent; made by `agent.register`.

    It keeps the object whose bytes it names alive. `await region.aclose()` (or `async with`) deregisters it: that
    waits for the transfers that hold it, and afterwards peers are refused.
    """

    peer: str | None = None

    def __init__(self, name: str, buffer: Buffer, close: Callable[[MemoryRegion], Awaitable[None]]) -> None:
        super().__init__()
        self.name = name
        self.address: int = buffer.address
        self.nbytes: int = buffer.nbytes
        self.kind: MemoryKind = buffer.kind
        self.device: int = buffer.device
        self.readonly: bool = buffer.readonly
        self.keys: dict[str, bytes] = {}
        """What each backend returned from `register`; published to peers."""
        self.record = b""
        """What peers are told of it, as JSON; empty while it is not published."""
        self.owner: object = buffer.owner
        self.offered = True
        """Whether every peer is told of it; one that is not is used by peers under a lease only."""
        self.lessor: Leases | None = None
        """What leases it, set by its agent."""
        self.unquiet: set[Lease] = set()
        """The leases that have ended and whose peers did not become quiet in time."""
        self._quarantined = False
        self._close = close
        self._closing = False
        self._closer: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether the region is deregistered, or about to be."""
        return self._closing

    @property
    def quarantined(self) -> bool:
        """Whether bytes may still move in it, of a failed transfer or of a peer whose lease has ended: do not reuse it."""
        return self._quarantined or bool(self.unquiet)

    @quarantined.setter
    def quarantined(self, value: bool) -> None:
        self._quarantined = value

    def check_usable(self) -> None:
        """Raise `ClosedError` when the region is deregistered or quarantined."""
        if self._closing:
            raise ClosedError(f"region {self.name!r} is deregistered")
        if self._quarantined:
            raise ClosedError(f"region {self.name!r} is quarantined: bytes of a failed transfer may still move in it")
        if self.unquiet:
            peers = ", ".join(sorted({repr(lease.peer) for lease in self.unquiet}))
            raise ClosedError(f"region {self.name!r} is quarantined: {peers} may still use it though the lease has ended")

    async def lease(
        self,
        peer: str | Peer,
        seconds: float,
        *,
        writable: bool = True,
        backends: Sequence[str] | None = None,
        drain_seconds: float = 5.0,
    ) -> Lease:
        """Let one peer use the region for `seconds`, and on for as long as it renews that, which its agent does by itself.

        The region must be registered with `offered=False`. Returns once the peer has it as `peer.region(name)`. `backends`: by
        which it may be used (default: the first that reaches the peer, and those that can refuse a peer). `drain_seconds`: how
        long the peer may take to become quiet after the lease has ended before the region counts as quarantined.

        Raises:
            ConfigurationError: the region is offered to all, or leased to that peer already, or an argument is wrong.
            NoRoute: no backend can lend the region to that peer.
            PeerLost: the peer is not connected, or went before it took the lease.
        """
        if self.lessor is None:
            raise ClosedError(f"region {self.name!r} belongs to no agent")
        return await self.lessor.lease(self, peer, seconds, writable=writable, backends=backends, drain_seconds=drain_seconds)

    async def aclose(self) -> None:
        """Deregister: refuse new transfers, end leases, wait for those that hold the region, tell peers. Idempotent.

        Cancelling it leaves the deregistration going on; another call waits for its end.

        Raises:
            Quarantined: a peer that it was leased to is not quiet; the region stays registered. Call again after `lease.quiet()`.
        """
        self._closing = True
        if self._closer is None or (
            self._closer.done() and not self._closer.cancelled() and self._closer.exception() is not None
        ):
            self._closer = asyncio.ensure_future(self._deregister())
        await asyncio.shield(self._closer)

    async def _deregister(self) -> None:
        if self.lessor is not None:
            await self.lessor.end_all(self)
        if not self.quarantined:
            await self.wait_unused()
        await self._close(self)
        if not self.quarantined:
            self.owner = None
        self._alone = None

    async def __aenter__(self) -> MemoryRegion:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()


class RemoteRegion(Held):
    """A peer's registered memory, learnt from its metadata; `peer.region(name)` finds it."""

    def __init__(
        self,
        peer: str,
        incarnation: str,
        name: str,
        address: int,
        nbytes: int,
        *,
        kind: MemoryKind = MemoryKind.DRAM,
        device: int = 0,
        readonly: bool = False,
        keys: dict[str, bytes] | None = None,
    ) -> None:
        if nbytes <= 0 or address <= 0 or address + nbytes >= 1 << 63:
            raise DescriptorError(f"remote region {name!r} claims {nbytes} bytes at {address:#x}")
        super().__init__()
        self.peer: str = peer
        self.incarnation = incarnation
        self.name = name
        self.address: int = address
        self.nbytes: int = nbytes
        self.kind: MemoryKind = kind
        self.device: int = device
        self.readonly: bool = readonly
        self.keys: dict[str, bytes] = keys or {}
        self.withdrawn = ""
        """Why the region can no longer be used; empty while it can."""
        self.peer_gone = False

    def check_usable(self) -> None:
        """Raise `ClosedError` when the peer withdrew the region, `PeerLost` when that life of the peer is over."""
        if self.peer_gone:
            raise PeerLost(self.withdrawn, peer=self.peer)
        if self.withdrawn:
            raise ClosedError(f"region {self.name!r} of peer {self.peer!r} is gone: {self.withdrawn}")

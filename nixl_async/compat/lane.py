"""One NIXL backend of a drop-in agent: an agent of nixl_async with backends that stand for it, and what is registered there."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nixl_async.agent import Agent
from nixl_async.backend import Backend
from nixl_async.backends.samehost import SameHostBackend
from nixl_async.compat.enums import nixl_mem_t
from nixl_async.compat.errors import nixlBackendError, nixlNotFoundError, refusal
from nixl_async.compat.log import get_logger
from nixl_async.compat.plugins import DEVICE_BACKENDS, Plugin
from nixl_async.compat.polled import HERE, Gate, Target
from nixl_async.compat.ranges import Range, Ranges
from nixl_async.cuda import device_count
from nixl_async.errors import AccessError, MissingDependency, NixlError, PeerLost
from nixl_async.memory import MemoryRegion
from nixl_async.storage import UNSIZED_NBYTES, FileRegion
from nixl_async.stores import Store

logger = get_logger(__name__)

HOST_VARIABLE = "NIXL_ASYNC_HOST"
"""The address that agents serve at and tell their peers (default: that of the interface with the default route)."""
ON_HOST_VARIABLE = "NIXL_ASYNC_VRAM_ON_HOST"
"""Set to 1, VRAM means main memory: for tests without a GPU."""
WITHDRAW_SECONDS = 5.0
"""How long a deregistration waits for peers to say that they use the memory no more; one that is stopped says nothing."""
_MODES = {"ro": os.O_RDONLY, "rw": os.O_RDWR}
_FLAGS = {"direct": os.O_DIRECT, "sync": os.O_SYNC, "noatime": os.O_NOATIME, "create": os.O_CREAT}

Key = tuple[nixl_mem_t, int, int, int]


@dataclass(slots=True, eq=False)
class Entry:
    """A registration: its region, `None` for no bytes, and how many times it was made."""

    region: Any
    count: int = 1
    opened: tuple[int, ...] = ()
    """Descriptors that we opened for it."""


class _Vram:
    """A piece of a device's memory as cupy would show it."""

    def __init__(self, address: int, nbytes: int, device: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        self.device = _Device(device)


@dataclass(frozen=True)
class _Device:
    id: int


def vram_on_host() -> bool:
    """Tell whether VRAM is to be emulated in main memory."""
    return os.environ.get(ON_HOST_VARIABLE, "").lower() in ("1", "true", "yes", "on", "y")


class _LaneAgent(Agent):
    """Takes those who copy on threads of their own for transfers of its own: peers are told that they are quiet when they are."""

    gate: Gate
    _by_rank = True

    def _peer_gone(self, name: str, error: PeerLost) -> None:
        self.gate.bump()
        super()._peer_gone(name, error)

    async def _peer_quiet(self, name: str) -> None:
        await quiet(self.gate)
        await super()._peer_quiet(name)


async def quiet(gate: Gate) -> None:
    """Wait, on the loop, until those have ended who copy on threads of their own."""

    def wait() -> None:
        gate.close()
        gate.open()

    await asyncio.to_thread(wait)


class Lane:
    """What one `createBackend` made. Its coroutines run on the engine's loop; `local` is read by any thread."""

    def __init__(self, plugin: Plugin, handle: int, params: Mapping[str, str], name: str, token: bytes, gate: Gate) -> None:
        self.plugin, self.handle, self.params = plugin, handle, dict(params)
        self._token, self._gate = token, gate
        self.backends = self._load()
        self.agent = self._make_agent(name)
        self.local = Ranges()
        self.entries: dict[Key, Entry] = {}
        self.store: Store | None = None

    def _load(self) -> dict[str, Backend]:
        return {backend.name: backend for backend in self.plugin.load()}

    def _make_agent(self, name: str) -> Agent:
        agent = _LaneAgent(name, backends=list(self.backends.values()), token=self._token)
        agent.gate = self._gate
        return agent

    def target(self, route: str, peer: str) -> Target | None:
        """Return the process that our backend `route` copies to or from for a peer on any thread; `None` if it is another's."""
        if route == "memory":
            return HERE
        backend = self.backends.get(route)
        found = backend.process(peer) if isinstance(backend, SameHostBackend) else None
        return None if found is None else Target(*found)

    async def open(self) -> None:
        """Open the agent; serve it, or open its store."""
        try:
            await self.agent.__aenter__()
        except MissingDependency as error:
            if not self.backends.keys() & DEVICE_BACKENDS:
                raise
            logger.warning("backend %s goes without a CUDA device: %s", self.plugin.name, error)
            self.backends = {name: one for name, one in self._load().items() if name not in DEVICE_BACKENDS}
            self.agent = self._make_agent(self.agent.name)
            await self.agent.__aenter__()
        try:
            if self.plugin.remote:
                given = os.environ.get(HOST_VARIABLE)
                await self.agent.serve(given or "0.0.0.0", 0, advertise=given or _own_address())
            if self.plugin.store is not None:
                # Credentials may come later, as with NIXL.
                with contextlib.suppress(AccessError):
                    await self.opened_store()
        except BaseException:
            await self.agent.aclose()
            raise

    async def opened_store(self) -> Store:
        """Return the store that keys are in; open it first, if that is yet to be done."""
        if self.store is None:
            assert self.plugin.store is not None
            url, options = self.plugin.store(self.params)
            self.store = await self.agent.store(url, **options)
        return self.store

    async def aclose(self) -> None:
        """Close the agent and the files that were opened for registrations."""
        await self.agent.aclose()
        for entry in self.entries.values():
            _close_all(entry.opened)
        self.entries.clear()

    def takes(self, memory: nixl_mem_t) -> bool:
        """Tell whether it takes that kind of memory."""
        return memory in self.plugin.memory

    # Registering.

    async def register(self, memory: nixl_mem_t, rows: Sequence[tuple[int, int, int]], metas: Sequence[bytes]) -> None:
        """Register all rows of (address, length, device), or none."""
        done: list[Key] = []
        try:
            for (address, nbytes, device), meta in zip(rows, metas, strict=True):
                key = (memory, device, address, nbytes)
                entry = self.entries.get(key)
                if entry is not None:
                    entry.count += 1
                    if memory is nixl_mem_t.OBJ_SEG:
                        entry.region = _object_key(device, meta)
                else:
                    self.entries[key] = await self._enter(memory, address, nbytes, device, meta)
                done.append(key)
        except BaseException:
            await self._drop(done)
            raise
        finally:
            self._publish()

    async def _enter(self, memory: nixl_mem_t, address: int, nbytes: int, device: int, meta: bytes) -> Entry:
        if memory is nixl_mem_t.OBJ_SEG:
            return Entry(_object_key(device, meta))
        if memory is nixl_mem_t.FILE_SEG:
            return _file(address, nbytes, device, meta)
        if nbytes == 0:
            return Entry(None)
        if memory is nixl_mem_t.VRAM_SEG:
            if not device_count():
                raise refusal(
                    nixlBackendError,
                    f"{address:#x} cannot be registered as VRAM: there is no CUDA device;"
                    f" {ON_HOST_VARIABLE}=1 takes main memory in its place",
                )
            return Entry(await self.agent.register(_Vram(address, nbytes, device)))
        if address == 0 or address + nbytes >= 1 << 63:
            raise refusal(nixlBackendError, f"no memory can be at {address:#x}")
        return Entry(await self.agent.register((ctypes.c_uint8 * nbytes).from_address(address)))

    async def deregister(self, keys: Sequence[Key]) -> None:
        """Take back one registration for each key; peers are told when the last of one is gone.

        Raises:
            nixlNotFoundError: one of them is not registered; then all stay.
        """
        wanted: dict[Key, int] = {}
        for key in keys:
            wanted[key] = wanted.get(key, 0) + 1
            entry = self.entries.get(key)
            if entry is None or entry.count < wanted[key]:
                raise refusal(nixlNotFoundError, f"{self.plugin.name} has no registration {key[1:]} of {key[0].name}")
        await self._drop(keys)
        self._publish()

    async def _drop(self, keys: Sequence[Key]) -> None:
        gone = []
        for key in keys:
            entry = self.entries[key]
            entry.count -= 1
            if entry.count == 0:
                del self.entries[key]
                gone.append(entry)
        closing = [entry.region.aclose() for entry in gone if isinstance(entry.region, MemoryRegion | FileRegion)]
        if closing:
            together = asyncio.gather(*closing)
            try:
                async with asyncio.timeout(WITHDRAW_SECONDS):
                    await asyncio.shield(together)
            except TimeoutError:
                logger.warning(
                    "%s: peers have not confirmed within %g s that they use memory no more", self.agent.name, WITHDRAW_SECONDS
                )
                together.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        for entry in gone:
            _close_all(entry.opened)

    def _publish(self) -> None:
        self.local = Ranges(
            Range(memory, device, address, nbytes or _unbounded(memory), entry.region)
            for (memory, device, address, nbytes), entry in self.entries.items()
            if entry.region is not None
        )

    async def exists(
        self, memory: nixl_mem_t, rows: Sequence[tuple[int, int, int]], metas: Sequence[bytes]
    ) -> list[dict[str, str] | None]:
        """Look up objects by their keys, or files by their names."""
        if memory is nixl_mem_t.OBJ_SEG:
            store = await self.opened_store()
            keys = [_object_key(device, meta) for (_, _, device), meta in zip(rows, metas, strict=True)]
            return [{} if found else None for found in await store.exists(keys)]
        names = [os.fsdecode(path[1] if (path := _split_path(meta)) is not None else meta) for meta in metas]
        return await asyncio.to_thread(lambda: [_stat(name) for name in names])


def _unbounded(memory: nixl_mem_t) -> int:
    return UNSIZED_NBYTES if memory in (nixl_mem_t.FILE_SEG, nixl_mem_t.OBJ_SEG) else 0


def _object_key(device: int, meta: bytes) -> str:
    return meta.decode() if meta else str(device)


def _stat(name: str) -> dict[str, str] | None:
    if not name:
        return None
    try:
        found = os.stat(name)
    except OSError:
        return None
    return {"size": str(found.st_size), "mode": str(found.st_mode), "mtime": str(int(found.st_mtime))}


def _split_path(meta: bytes) -> tuple[int, bytes] | None:
    """Read `ro|rw[,direct|sync|noatime|create]:path`; `None` for anything else."""
    words, colon, path = meta.partition(b":")
    mode, *flags = words.decode("ascii", "replace").split(",")
    if not colon or not path or mode not in _MODES or any(flag not in _FLAGS for flag in flags):
        return None
    value = _MODES[mode]
    for flag in flags:
        value |= _FLAGS[flag]
    return value, path


def _file(address: int, nbytes: int, device: int, meta: bytes) -> Entry:
    opened: list[int] = []
    path = _split_path(meta)
    fd = device
    name = f"fd {device}"
    if path is not None:
        name = os.fsdecode(path[1])
        try:
            fd = os.open(path[1], path[0] | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise refusal(nixlBackendError, f"{name!r} cannot be opened: {error}") from error
        opened.append(fd)
    readonly, direct_fd = False, -1
    with contextlib.suppress(OSError):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        readonly = flags & os.O_ACCMODE == os.O_RDONLY
        if flags & os.O_DIRECT:
            # What is not aligned goes through the page cache, by another descriptor of the same file.
            direct_fd, fd = fd, os.open(f"/proc/self/fd/{fd}", (flags & os.O_ACCMODE) | os.O_CLOEXEC)
            opened.append(fd)
    region = FileRegion(name, fd, direct_fd, address + (nbytes or UNSIZED_NBYTES - address), readonly, _nothing)
    return Entry(region, opened=tuple(opened))


async def _nothing(publish: bool) -> None:
    """Close nothing: the descriptor is the caller's."""


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _own_address() -> str:
    """Return this host's address on the interface with the default route; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
            return str(sock.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def make_lane(plugin: Plugin, handle: int, params: Mapping[str, str], name: str, token: bytes, gate: Gate) -> Lane:
    """Make a lane.

    Raises:
        nixlNotFoundError: what the plugin needs is not installed.
        nixlBackendError: it refuses its parameters.
    """
    try:
        return Lane(plugin, handle, params, name, token, gate)
    except MissingDependency as error:
        raise refusal(nixlNotFoundError, f"{plugin.name}: {error}") from error
    except (NixlError, ValueError) as error:
        raise refusal(nixlBackendError, f"{plugin.name}: {error}") from error

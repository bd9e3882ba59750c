"""Copies between two processes of one host, in one of two ways; the peer's interpreter takes no part in either: it may be stuck.

direct: process_vm_readv and process_vm_writev (Linux, `man 2 process_vm_readv`). The kernel copies straight between the two address
spaces, once; but for each segment it pins the pages of the other side. From 128 KiB on, where one copy follows the other, a second
thread takes part in what the loop copies, if trying finds two to be faster (native/vm.c). packed: through shared memory,
into which a thread of ours packs segments while a native thread of the peer unpacks them (native/packed.c): twice the copying, by
two cores at once, and a segment costs next to nothing. Which is better for an op is learnt while running (costs.py).

The kernel allows both where ptrace would be (same user; Yama's ptrace_scope 0). A process id may mean another process in another
container, or after a restart: `connect` reads a secret out of the peer's memory to be sure, and a pidfd (`man 2 pidfd_open`), which
never comes to mean another process, is watched from then on.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import select
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from nixl_async.backend import Backend, Host, Limits, Op, PeerInfo, Revocation, quiesce
from nixl_async.costs import Cost, Prediction, Way, Ways
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import AccessError, BackendError, ConfigurationError, PeerLost, TransferError
from nixl_async.memory import MemoryRegion, RemoteRegion
from nixl_async.native import ffi, int64, lib

DIRECT, PACKED = "process_vm", "packed through shared memory"
_WAYS = {"direct": DIRECT, "packed": PACKED}
# Packed, a copy takes two cores, but each side waits for the other about a seventh of the time.
ASSUMED = (
    Way(DIRECT, {True: Cost(5e-6, 350e-9, 1.7e-10), False: Cost(5e-6, 200e-9, 1.7e-10)}),
    Way(PACKED, {True: Cost(60e-6, 10e-9, 1.2e-10), False: Cost(60e-6, 20e-9, 1.3e-10)}, cores=1.7),
)
"""Where the learning starts: measured by `python -m bench slices` and `throughput` on two cores of an Intel Xeon at 2.9 GHz."""
AT_ONCE_NBYTES = 512 << 10
AT_ONCE_SEGMENTS = 1024
"""Ops up to this size, a tenth of a millisecond's copying, cost the loop less than handing them to a thread would."""
NOW_NBYTES, NOW_SECONDS = 4 << 20, 800e-6
"""An op that comes alone, of up to so many bytes, is copied on the loop if that should take at most so long."""
TRY_SECONDS = 2e-3
TRIES, TRY_AFTER, TRY_AFTER_MOST = 4, 8, 8192
"""Those that should take longer, up to this, are copied on the loop a few times after so many by threads, to learn whether they
do: what another core has copied is not in this one's caches. Each time that they do, twice as many go by threads before."""
SURE_NBYTES = 64 << 10
"""What is no more than this takes a small part of that time, however slow the memory."""
PACE_WEIGHT = 0.2
"""What each copy weighs beside those before it."""
STALL_SECONDS = 0.1
"""A peer whose threads have done nothing for so long may be stopped: then the op is carried out directly."""
_NONCE_NBYTES = 16
_KEY = struct.Struct("<Q")
_REFUSALS = {1: "it has no such region", 2: "an address lies outside the region", 3: "the region is read-only"}


def _assumed(op: Op) -> float:
    return ASSUMED[0].assumed[op.put].seconds(len(op.plan.lengths), op.nbytes)


@dataclass(slots=True, eq=False)
class _Process:
    pid: int
    pidfd: int
    alive: select.poll
    identity: int
    description: bytes
    ways: Ways
    packed: Any = None
    """The native side of packed copies; `None` without, and then `unpacked` says why."""
    unpacked: str = ""
    under_way: dict[str, int] = field(default_factory=lambda: {DIRECT: 0, PACKED: 0})
    mixed: int = 0
    """How often an op was begun while others went the other way: what such ops take says nothing of either way alone."""
    ended: bool = False
    pace: dict[bool, float] = field(default_factory=lambda: {True: 1.0, False: 1.0})
    """How many times what is assumed direct copies take, to the peer and from it."""
    handed: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    patience: dict[bool, int] = field(default_factory=lambda: {True: TRY_AFTER, False: TRY_AFTER})
    """How many were too long for the loop since it was last tried, and how many go to threads before that."""

    def is_short(self, put: bool, assumed: float) -> bool:
        """Tell whether a copy that is assumed to take so many seconds is to be made on the loop."""
        seconds = self.pace[put] * assumed
        if seconds <= NOW_SECONDS:
            return True
        if seconds > TRY_SECONDS:
            return False
        self.handed[put] += 1
        return self.handed[put] > self.patience[put]

    def took(self, op: Op, seconds: float, *, on_loop: bool) -> None:
        """Take note of how long a direct copy took."""
        put, weight = op.put, PACE_WEIGHT
        if on_loop and (tries := self.handed[put] - self.patience[put]) > 0:
            if tries < TRIES:
                return
            # The last one finds what those before it have left in the caches.
            weight = 1.0
            self.handed[put] = 0
            self.patience[put] = TRY_AFTER if seconds <= NOW_SECONDS else min(2 * self.patience[put], TRY_AFTER_MOST)
        self.pace[put] += weight * (seconds / _assumed(op) - self.pace[put])

    def gone(self) -> bool:
        """Tell whether the process has ended; any thread may ask."""
        try:
            return bool(self.alive.poll(0))
        except RuntimeError:
            # Another thread asks at this moment, and one object serves one at a time.
            fresh = select.poll()
            fresh.register(self.pidfd, select.POLLIN)
            return bool(fresh.poll(0))


class _Call:
    """A direct copy that may be made again."""

    __slots__ = ("_arrays", "assumed", "is_large", "native", "process")

    def __init__(self, process: _Process, op: Op) -> None:
        self.process, self.is_large, self.assumed = process, op.nbytes > SURE_NBYTES, _assumed(op)
        ours, theirs = op.sides
        self._arrays = [int64(array) for array in (ours.addresses, theirs.addresses, op.plan.lengths)]
        self.native = ffi.new(
            "nx_vm_call *", (process.pid, process.pidfd, op.put, len(op.plan.lengths), op.nbytes, *self._arrays)
        )


class SameHostBackend(Backend):
    """Moves bytes to and from the memory of a peer's process on this host; small copies at once, large ones on threads.

    `way`: "direct" or "packed" to copy in no other way; by default the one that takes less of the cores' time.
    """

    name = "samehost"
    rank = 10
    revocation = Revocation.PROCESS
    # What may never end are packed puts: a peer's thread that was stopped while it copied out of the shared memory, and not ours.
    limits = Limits(max_ops=4, inline_nbytes=NOW_NBYTES, max_op_nbytes=16 << 20, frees_source=True)

    def __init__(self, *, way: str | None = None) -> None:
        if not hasattr(os, "pidfd_open"):
            raise BackendError("this Python has no os.pidfd_open; the samehost backend needs Linux 5.3", backend=self.name)
        if way is not None and way not in _WAYS:
            raise ConfigurationError(f"way is {way!r}; it must be one of {', '.join(map(repr, _WAYS))}, or None for either")
        self._forced = None if way is None else _WAYS[way]
        self._n_cores = len(os.sched_getaffinity(0))
        self._n_threads = min(4, self._n_cores)
        self.limits = replace(type(self).limits, lanes=self._n_threads)
        self._nonce = np.frombuffer(bytearray(secrets.token_bytes(_NONCE_NBYTES)), np.uint8)
        # What our packed copies are known by to the peers that serve them.
        self._identity = secrets.randbits(63) | 1
        self._processes: dict[str, _Process] = {}
        self._host: Host | None = None
        self._threads: ThreadPoolExecutor | None = None
        # Apart from the others: they wait for the peer, which may be stopped.
        self._packers: ThreadPoolExecutor | None = None
        self._server: Any = ffi.NULL
        # Takes part in what the loop copies; there is none before the first copy that is large enough, or on one core.
        self._second: Any = None
        self._opening = threading.Lock()
        self._spent = ffi.new("int64_t *")

    async def open(self, host: Host) -> None:
        """Make ready to start threads when there is work for them."""
        self._host = host
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix="nixl-samehost")
        self._packers = ThreadPoolExecutor(self.limits.max_ops, thread_name_prefix="nixl-packer")
        if self._forced != DIRECT:
            self._server = lib.nx_packed_open(max(1, min(4, self._n_cores // 2)), self._nonce.tobytes())

    async def aclose(self) -> None:
        """Stop watching peers and end the threads."""
        for peer in list(self._processes):
            await self.disconnect(peer)
        for threads in (self._threads, self._packers):
            if threads is not None:
                threads.shutdown()
        self._threads = self._packers = None
        second, self._second = self._second, ffi.NULL
        if second:
            lib.nx_vm_second_close(second)
        if self._server != ffi.NULL:
            server, self._server = self._server, ffi.NULL
            lib.nx_packed_close(server)

    def served(self) -> tuple[int, int] | None:
        """Return the bytes that our threads have moved for peers; direct copies, which peers make alone, are not among them."""
        if self._server == ffi.NULL:
            return None
        nbytes = ffi.new("int64_t[2]")
        lib.nx_packed_served(self._server, nbytes)
        return nbytes[0], nbytes[1]

    async def register(self, region: MemoryRegion) -> bytes:
        """Let peers that know the key ask our threads to read the region, and to write to it unless it is read-only."""
        return self._register(region, region.readonly)

    async def grant(self, region: MemoryRegion, peer: str, incarnation: str, *, writable: bool) -> bytes:
        """Return a key of its own for packed copies; direct copies need none, and are ended by the peer alone."""
        return self._register(region, region.readonly or not writable)

    def _register(self, region: MemoryRegion, readonly: bool) -> bytes:
        self._opened()
        if self._server == ffi.NULL:
            return b""
        key = secrets.randbits(64)
        if status := lib.nx_packed_register(self._server, key, region.address, region.nbytes, readonly):
            raise BackendError(f"cannot register: {os.strerror(-status)}", backend=self.name)
        return _KEY.pack(key)

    async def unregister(self, region: MemoryRegion) -> None:
        """Refuse the key, and wait until our threads do not touch the region."""
        await self.revoke(region, region.keys.get(self.name, b""))

    async def revoke(self, region: MemoryRegion, key: bytes) -> None:
        """Refuse a key to packed copies, and wait until our threads do not touch the region on its account."""
        if key:
            await self._until_quiet(lib.nx_packed_unregister, *_KEY.unpack(key))

    def describe(self) -> bytes:
        """Return this process's id, where a secret is in its memory, and the file of the directory of its shared memory."""
        value = {"pid": os.getpid(), "address": self._nonce.ctypes.data, "nonce": self._nonce.tobytes().hex()}
        if self._server != ffi.NULL:
            value |= {"packed": lib.nx_packed_fd(self._server), "identity": self._identity}
        return json.dumps(value).encode()

    async def connect(self, peer: PeerInfo) -> None:
        """Check that the peer's process id means that process here too, and that its memory may be read and written."""
        host = self._opened()
        try:
            value = json.loads(peer.description)
            pid, address, nonce = int(value["pid"]), int(value["address"]), bytes.fromhex(value["nonce"])
            # Older peers have none.
            fd, identity = int(value.get("packed", -1)), int(value.get("identity", 0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(f"peer {peer.name!r} described itself wrongly: {error!r}", backend=self.name) from None
        if pid <= 0 or not 0 < address < 1 << 47 or len(nonce) != _NONCE_NBYTES:
            raise BackendError(f"peer {peer.name!r} described itself wrongly: pid {pid}, address {address}", backend=self.name)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise BackendError(f"peer {peer.name!r} is not on this host: process {pid}: {error}", backend=self.name) from None
        try:
            seen = np.zeros(_NONCE_NBYTES, np.uint8)
            self._probe(pid, peer.name, seen, address, put=False)
            if seen.tobytes() != nonce:
                raise BackendError(f"process {pid} of this host is not peer {peer.name!r}", backend=self.name, peer=peer.name)
            # Writing its own bytes back shows that writing is allowed, and changes nothing.
            self._probe(pid, peer.name, seen, address, put=True)
        except TransferError:
            os.close(pidfd)
            raise
        known = self._processes.get(peer.name)
        if known is not None and known.description == peer.description and not known.ended:
            # It could not be reached for a while.
            os.close(pidfd)
            return
        alive = select.poll()
        alive.register(pidfd, select.POLLIN)
        await self.disconnect(peer.name)
        ways = Ways(ASSUMED, self._n_cores / self._n_threads)
        process = _Process(pid, pidfd, alive, identity, peer.description, ways)
        self._processes[peer.name] = process
        host.loop.add_reader(pidfd, self._ended, peer.name)
        self._open_packed(process, fd, nonce)

    def _open_packed(self, process: _Process, fd: int, nonce: bytes) -> None:
        """Serve the peer's packed copies, and open the way for ours; where that cannot be, there is the direct way."""
        if self._server == ffi.NULL:
            process.unpacked = "it is switched off" if self._forced == DIRECT else "there is no shared memory to be had"
            return
        if not (0 <= fd < 1 << 31 and 0 < process.identity < 1 << 64):
            process.unpacked = "the peer does not offer it"
            return
        error = ffi.new("int *")
        if status := lib.nx_packed_accept(self._server, process.identity):
            process.unpacked = f"the peer cannot be served: {os.strerror(-status)}"
            return
        packed = lib.nx_packed_dial(process.pid, fd, nonce, self._identity, error)
        if packed == ffi.NULL:
            process.unpacked = f"the peer's shared memory cannot be opened: {os.strerror(-error[0])}"
        else:
            process.packed = ffi.gc(packed, lib.nx_packed_hangup)

    async def disconnect(self, peer: str) -> None:
        """Forget a peer's process; afterwards our threads serve none of its requests."""
        process = self._processes.pop(peer, None)
        if process is None:
            return
        if not process.ended:
            self._opened().loop.remove_reader(process.pidfd)
        os.close(process.pidfd)
        if process.packed is not None:
            lib.nx_packed_lost(process.packed)
            _let_go(process)
        if 0 < process.identity < 1 << 64:
            await self._until_quiet(lib.nx_packed_dismiss, process.identity)

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but DRAM with one side that of a process on this host."""
        if src.kind is not MemoryKind.DRAM or dst.kind is not MemoryKind.DRAM:
            return f"it copies DRAM only, not {src.kind.value} to {dst.kind.value}"
        if (src.peer or dst.peer) not in self._processes:
            return "it copies to and from other processes of this host only"
        return None

    def how(self, src: Side, dst: Side) -> str:
        """Tell why there is one way only, where that is so."""
        process = self._processes.get(src.peer or dst.peer or "")
        return f"{DIRECT} only: {process.unpacked}" if process is not None and process.unpacked else ""

    def predict(self, plan: Plan) -> tuple[Prediction, ...]:
        """Return what the plan should take by either way, by what has been learnt of this peer."""
        process, put = self._processes.get(plan.src.peer or plan.dst.peer or ""), plan.dst.peer is not None
        if process is None:
            return ()
        ways = process.ways.predict(put, len(plan.lengths), plan.nbytes, self._allowed(process, plan.dst if put else plan.src))
        if self._forced is None and plan.nbytes <= AT_ONCE_NBYTES:
            return tuple(sorted(ways, key=lambda one: one.way != DIRECT))
        return ways

    def copy_now(self, op: Op) -> bool:
        """Copy at once, directly, unless there are so many segments that this would hold up the loop."""
        call, process = op.kept, self._processes.get(op.peer or "")
        if call is None or call.process is not process:
            if self._forced == PACKED or len(op.plan.lengths) > AT_ONCE_SEGMENTS:
                return False
            call = op.kept = _Call(self._process(op), op)
        process = call.process
        if call.is_large and not process.is_short(op.put, call.assumed):
            return False
        if status := self._again(call):
            self._fail(status, op, process)
        if call.is_large:
            process.took(op, call.native.spent_ns * 1e-9, on_loop=True)
        return True

    async def copy(self, op: Op) -> None:
        """Copy on a thread, by the cheaper way; when cancelled, stop at the next mebibyte."""
        host = self._opened()
        process = self._process(op)
        segments, nbytes = len(op.plan.lengths), op.plan.nbytes
        if nbytes <= AT_ONCE_NBYTES and self.copy_now(op):
            return
        alone = not any(process.under_way.values())
        allowed = self._allowed(process, op.plan.dst if op.put else op.plan.src)
        if not allowed:
            raise BackendError(
                f"peer {op.peer!r}: there is no packed way: {process.unpacked}", backend=self.name, peer=op.peer
            )
        way = process.ways.choose(op.put, segments, nbytes, allowed, busy=any(process.under_way.values()))
        stop, spent, packed = ffi.new("int32_t *"), ffi.new("int64_t *"), process.packed

        def cancel() -> None:
            stop[0] = 1
            if way == PACKED:
                lib.nx_packed_wake(packed)

        if way == PACKED:
            run, threads = partial(self._packed, packed), self._packers
        else:
            run, threads = partial(self._direct, process), self._threads
        others = sum(process.under_way.values()) - process.under_way[way]
        process.mixed += others > 0
        process.under_way[way] += 1
        mixed = process.mixed
        try:
            status = await quiesce(host.loop.run_in_executor(threads, run, op, stop, spent), cancel)
        finally:
            process.under_way[way] -= 1
        if status == -errno.EAGAIN or (status == 0 and not others and process.mixed == mixed):
            process.ways.learn(way, op.put, segments, nbytes, spent[0] * 1e-9)
            if way == DIRECT and alone:
                process.took(op, spent[0] * 1e-9, on_loop=False)
        if status == -errno.EAGAIN:
            way = DIRECT
            status = await quiesce(host.loop.run_in_executor(self._threads, self._direct, process, op, stop, spent), cancel)
        if status:
            self._fail(status, op, process)

    def _again(self, call: _Call) -> int:
        second = self._second
        if second is None:
            if not call.is_large:
                return int(lib.nx_vm_now(call.native, ffi.NULL))
            second = self._second = self._open_second()
        return int(lib.nx_vm_now(call.native, second))

    def _open_second(self) -> Any:
        """Start the thread that takes part in what the loop copies, where there is a core for it."""
        with self._opening:
            if self._second is None:
                self._second = lib.nx_vm_second_open(ffi.new("int *")) if self._n_threads > 1 else ffi.NULL
            return self._second

    def _direct(self, process: _Process, op: Op, stop: Any, spent: Any) -> int:
        ours, theirs = op.sides
        lengths = op.plan.lengths
        arrays = int64(ours.addresses), int64(theirs.addresses), int64(lengths)
        return int(lib.nx_process_vm(process.pid, op.put, *arrays, len(lengths), stop, spent))

    def _packed(self, packed: Any, op: Op, stop: Any, spent: Any) -> int:
        ours, theirs = op.sides
        lengths = op.plan.lengths
        arrays = int64(ours.addresses), int64(theirs.addresses), int64(lengths)
        index = ffi.NULL if theirs.index is None else int64(theirs.index)
        keys = b"".join([region.keys[self.name] for region in theirs.regions if isinstance(region, RemoteRegion)])
        stall_ns = 0 if self._forced else int(STALL_SECONDS * 1e9)
        return int(lib.nx_packed_move(packed, op.put, len(lengths), *arrays, index, keys, stop, stall_ns, spent))

    def _allowed(self, process: _Process, theirs: Side) -> tuple[str, ...]:
        """Return the ways to copy to or from memory of a peer."""
        packed = process.packed is not None and all(
            isinstance(region, RemoteRegion) and len(region.keys.get(self.name, b"")) == _KEY.size for region in theirs.regions
        )
        if packed:
            lanes = lib.nx_packed_ready(process.packed)
            packed = lanes > 0
            if lanes < 0:
                process.unpacked = f"the peer's shared memory cannot be used: {os.strerror(-lanes)}"
                _let_go(process)
        if self._forced is not None:
            return (self._forced,) if packed or self._forced == DIRECT else ()
        return (DIRECT, PACKED) if packed else (DIRECT,)

    def pidfd(self, peer: str) -> int | None:
        """Return a descriptor of the peer's process, whose end it tells: no thread of it copies any more then."""
        process = self._processes.get(peer)
        return None if process is None else os.dup(process.pidfd)

    def process(self, peer: str) -> tuple[int, int] | None:
        """Return the id of a peer's process and a descriptor of it, which the caller closes; `None` if copies are not direct.

        Any thread may call it. Who copies directly with them keeps what `copy_now` keeps: it asks the descriptor before each copy
        whether the process lives, and copies nothing after the peer was disconnected.
        """
        process = self._processes.get(peer)
        if process is None or self._forced == PACKED:
            return None
        try:
            pidfd = os.dup(process.pidfd)
        except OSError:
            return None
        if self._processes.get(peer) is not process:
            # It was closed meanwhile, and its number may be another's.
            os.close(pidfd)
            return None
        return process.pid, pidfd

    async def _until_quiet(self, function: Any, number: int) -> None:
        """Call a function of the serving side; where it finds a copy going on, again on a thread, which waits for that."""
        if self._server != ffi.NULL and function(self._server, number, False) == -errno.EBUSY:
            server = self._server
            await quiesce(self._opened().loop.run_in_executor(None, function, server, number, True))

    def _opened(self) -> Host:
        if self._host is None or self._threads is None:
            raise BackendError("the samehost backend is not open", backend=self.name)
        return self._host

    def _process(self, op: Op) -> _Process:
        process = self._processes.get(op.peer or "")
        # Asked before each op: once the process has ended, its number may come to mean another one.
        if process is None or process.gone():
            raise PeerLost(f"the process of peer {op.peer!r} has ended", backend=self.name, peer=op.peer)
        return process

    def _ended(self, peer: str) -> None:
        host, process = self._opened(), self._processes[peer]
        host.loop.remove_reader(process.pidfd)
        process.ended = True
        if process.packed is not None:
            lib.nx_packed_lost(process.packed)
        host.peer_lost(peer, f"process {process.pid} ended")

    def _probe(self, pid: int, peer: str, buffer: np.ndarray, address: int, *, put: bool) -> None:
        arrays = [np.array([value], np.int64) for value in (buffer.ctypes.data, address, buffer.nbytes)]
        status = lib.nx_process_vm(pid, put, *map(int64, arrays), 1, ffi.NULL, self._spent)
        if status:
            self._raise(status, "write to" if put else "read from", pid, peer)

    def _fail(self, status: int, op: Op, process: _Process) -> None:
        if status > 0:
            why = _REFUSALS.get(status, f"it finds the request malformed ({status})")
            raise AccessError(f"peer {op.peer!r} refuses: {why}", backend=self.name, peer=op.peer)
        if -status == errno.ENOTCONN:
            raise PeerLost(f"peer {op.peer!r} serves us no longer", backend=self.name, peer=op.peer)
        if -status == errno.ESRCH or process.gone():
            raise PeerLost(f"the process of peer {op.peer!r} has ended", backend=self.name, peer=op.peer)
        if -status == errno.EPERM:
            # It was allowed when we connected. The peer is there; `connect` tells when it is allowed again.
            raise PeerLost(f"process {process.pid} may not be traced any more", backend=self.name, peer=op.peer)
        self._raise(status, "write to" if op.put else "read from", process.pid, op.peer)

    def _raise(self, status: int, what: str, pid: int, peer: str | None) -> None:
        text = f"cannot {what} process {pid}: {os.strerror(-status)}"
        if -status == errno.EPERM:
            raise AccessError(
                f"{text}: both processes need the same user, and kernel.yama.ptrace_scope 0", backend=self.name, peer=peer
            )
        raise BackendError(text, backend=self.name, peer=peer)


def _let_go(process: _Process) -> None:
    """Unmap the peer's shared memory, or leave that to the last op that uses it."""
    packed, process.packed = process.packed, None
    if not process.under_way[PACKED]:
        ffi.release(packed)

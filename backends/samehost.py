"""Copies between two processes of one host with process_vm_readv and process_vm_writev (Linux, `man 2 process_vm_readv`).

The kernel copies straight between the two address spaces: one copy, no buffer in between, and the peer's interpreter takes no
part, so that it may be stuck. The kernel allows it where ptrace would be (same user; Yama's ptrace_scope 0). A process id may mean
another process in another container, or after a restart: `connect` reads a secret out of the peer's memory to be sure, and a
pidfd (`man 2 pidfd_open`), which never comes to mean another process, is watched from then on.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import select
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nixl_async.backend import Backend, Host, Limits, Op, PeerInfo, quiesce
from nixl_async.descriptors import MemoryKind, Side
from nixl_async.errors import AccessError, BackendError, PeerLost, TransferError
from nixl_async.native import ffi, int64, lib

_NONCE_NBYTES = 16
AT_ONCE_NBYTES = 512 << 10
"""Ops up to this size, a tenth of a millisecond's copying, cost the loop less than handing them to a thread would."""


@dataclass(slots=True)
class _Process:
    pid: int
    pidfd: int
    alive: select.poll
    ended: bool = False


class SameHostBackend(Backend):
    """Moves bytes to and from the memory of a peer's process on this host; small copies at once, large ones on threads."""

    name = "samehost"
    rank = 10
    limits = Limits(max_ops=4, inline_nbytes=64 << 10, max_op_nbytes=16 << 20)

    def __init__(self) -> None:
        if not hasattr(os, "pidfd_open"):
            raise BackendError("this Python has no os.pidfd_open; the samehost backend needs Linux 5.3", backend=self.name)
        self._nonce = np.frombuffer(bytearray(secrets.token_bytes(_NONCE_NBYTES)), np.uint8)
        self._processes: dict[str, _Process] = {}
        self._host: Host | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._done = ffi.new("int64_t *")

    async def open(self, host: Host) -> None:
        """Make ready to start threads when there is work for them."""
        self._host = host
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="nixl-samehost")

    async def aclose(self) -> None:
        """Stop watching peers and end the threads."""
        for peer in list(self._processes):
            await self.disconnect(peer)
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def describe(self) -> bytes:
        """Return this process's id, and where a secret is in its memory."""
        value = {"pid": os.getpid(), "address": self._nonce.ctypes.data, "nonce": self._nonce.tobytes().hex()}
        return json.dumps(value).encode()

    async def connect(self, peer: PeerInfo) -> None:
        """Check that the peer's process id means that process here too, and that its memory may be read and written."""
        host = self._opened()
        try:
            value = json.loads(peer.description)
            pid, address, nonce = int(value["pid"]), int(value["address"]), bytes.fromhex(value["nonce"])
        except (ValueError, KeyError, TypeError) as error:
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
        alive = select.poll()
        alive.register(pidfd, select.POLLIN)
        await self.disconnect(peer.name)
        self._processes[peer.name] = _Process(pid, pidfd, alive)
        host.loop.add_reader(pidfd, self._ended, peer.name)

    async def disconnect(self, peer: str) -> None:
        """Forget a peer's process."""
        process = self._processes.pop(peer, None)
        if process is not None:
            if not process.ended:
                self._opened().loop.remove_reader(process.pidfd)
            os.close(process.pidfd)

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but DRAM with one side that of a process on this host."""
        if src.kind is not MemoryKind.DRAM or dst.kind is not MemoryKind.DRAM:
            return f"it copies DRAM only, not {src.kind.value} to {dst.kind.value}"
        if (src.peer or dst.peer) not in self._processes:
            return "it copies to and from other processes of this host only"
        return None

    def copy_now(self, op: Op) -> bool:
        """Copy at once."""
        process = self._process(op)
        ours, theirs = (op.plan.src, op.plan.dst) if op.put else (op.plan.dst, op.plan.src)
        lengths = op.plan.lengths
        arrays = int64(ours.addresses), int64(theirs.addresses), int64(lengths)
        status = lib.nx_process_vm(process.pid, op.put, *arrays, len(lengths), ffi.NULL, self._done)
        if status:
            self._fail(status, op, process)
        return True

    async def copy(self, op: Op) -> None:
        """Copy on a thread; when cancelled, stop at the next mebibyte."""
        if op.nbytes <= AT_ONCE_NBYTES:
            self.copy_now(op)
            return
        host = self._opened()
        process = self._process(op)
        ours, theirs = (op.plan.src, op.plan.dst) if op.put else (op.plan.dst, op.plan.src)
        lengths = op.plan.lengths
        stop = ffi.new("int32_t *")

        def run() -> int:
            arrays = int64(ours.addresses), int64(theirs.addresses), int64(lengths)
            return int(lib.nx_process_vm(process.pid, op.put, *arrays, len(lengths), stop, ffi.new("int64_t *")))

        def cancel() -> None:
            stop[0] = 1

        status = await quiesce(host.loop.run_in_executor(self._threads, run), cancel)
        if status:
            self._fail(status, op, process)

    def _opened(self) -> Host:
        if self._host is None or self._threads is None:
            raise BackendError("the samehost backend is not open", backend=self.name)
        return self._host

    def _process(self, op: Op) -> _Process:
        process = self._processes.get(op.peer or "")
        # Asked before each op: once the process has ended, its number may come to mean another one.
        if process is None or process.alive.poll(0):
            raise PeerLost(f"the process of peer {op.peer!r} has ended", backend=self.name, peer=op.peer)
        return process

    def _ended(self, peer: str) -> None:
        host, process = self._opened(), self._processes[peer]
        host.loop.remove_reader(process.pidfd)
        process.ended = True
        host.peer_lost(peer, f"process {process.pid} ended")

    def _probe(self, pid: int, peer: str, buffer: np.ndarray, address: int, *, put: bool) -> None:
        arrays = [np.array([value], np.int64) for value in (buffer.ctypes.data, address, buffer.nbytes)]
        status = lib.nx_process_vm(pid, put, *map(int64, arrays), 1, ffi.NULL, self._done)
        if status:
            self._raise(status, "write to" if put else "read from", pid, peer)

    def _fail(self, status: int, op: Op, process: _Process) -> None:
        if -status == errno.ESRCH or process.alive.poll(0):
            raise PeerLost(f"the process of peer {op.peer!r} has ended", backend=self.name, peer=op.peer)
        self._raise(status, "write to" if op.put else "read from", process.pid, op.peer)

    def _raise(self, status: int, what: str, pid: int, peer: str | None) -> None:
        text = f"cannot {what} process {pid}: {os.strerror(-status)}"
        if -status == errno.EPERM:
            raise AccessError(
                f"{text}: both processes need the same user, and kernel.yama.ptrace_scope 0", backend=self.name, peer=peer
            )
        raise BackendError(text, backend=self.name, peer=peer)

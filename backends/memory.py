"""Copies within one process: between an agent's own regions, and between agents that share the process. The reference backend."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor

from nixl_async.backend import Backend, Host, Limits, Op, PeerInfo, quiesce
from nixl_async.descriptors import MemoryKind, Side
from nixl_async.errors import BackendError
from nixl_async.native import ffi, int64, lib

AT_ONCE_NBYTES = 512 << 10
"""Ops up to this size, a tenth of a millisecond's copying, cost the loop less than handing them to a thread would."""
_SECRET = secrets.token_hex(16)


def _process() -> bytes:
    """Return what is equal for two agents exactly when they live in one process (a fork has another id)."""
    return f"{os.getpid()}:{_SECRET}".encode()


class MemoryBackend(Backend):
    """Moves bytes between memory of this process with memmove; large ops on threads."""

    name = "memory"
    rank = 0
    limits = Limits(max_ops=4, inline_nbytes=AT_ONCE_NBYTES)

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._host: Host | None = None
        self._peers: set[str] = set()

    async def open(self, host: Host) -> None:
        """Make ready to start threads when there is work for them."""
        self._host = host
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="nixl-memory")

    async def aclose(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def describe(self) -> bytes:
        """Return this process's identity."""
        return _process()

    async def connect(self, peer: PeerInfo) -> None:
        """Accept a peer of the same process."""
        if peer.description != _process():
            raise BackendError(f"peer {peer.name!r} lives in another process", backend=self.name, peer=peer.name)
        self._peers.add(peer.name)

    async def disconnect(self, peer: str) -> None:
        """Forget a peer."""
        self._peers.discard(peer)

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but DRAM of this process."""
        if src.kind is not MemoryKind.DRAM or dst.kind is not MemoryKind.DRAM:
            return f"it copies DRAM only, not {src.kind.value} to {dst.kind.value}"
        for side in (src, dst):
            if side.peer is not None and side.peer not in self._peers:
                return f"peer {side.peer!r} lives in another process"
        return None

    def copy_now(self, op: Op) -> bool:
        """Copy at once."""
        plan = op.plan
        lib.nx_copy_segments(
            int64(plan.dst.addresses), int64(plan.src.addresses), int64(plan.lengths), len(plan.lengths), ffi.NULL
        )
        return True

    async def copy(self, op: Op) -> None:
        """Copy on a thread, small ops at once; when cancelled, stop at the next mebibyte."""
        if self._threads is None or self._host is None:
            raise BackendError("the memory backend is closed", backend=self.name, peer=op.peer)
        if op.nbytes <= AT_ONCE_NBYTES:
            self.copy_now(op)
            return
        stop = ffi.new("int32_t *")
        plan = op.plan

        def run() -> int:
            arrays = int64(plan.dst.addresses), int64(plan.src.addresses), int64(plan.lengths)
            return int(lib.nx_copy_segments(*arrays, len(plan.lengths), stop))

        future = self._host.loop.run_in_executor(self._threads, run)
        await quiesce(future, lambda: _set(stop))


def _set(stop: object) -> None:
    stop[0] = 1  # type: ignore[index]

"""Copies between memory and open files: io_uring, coalesced reads and writes, direct I/O of any alignment.

Segments that lie one behind the other in the file become one request, whatever the memory looks like. What is in the page cache is
read from there; what is not goes through io_uring. Cancelling asks the kernel to drop what is in flight and waits for it.
"""

from __future__ import annotations

import errno
import os

import numpy as np

from nixl_async.backend import Host, Limits, Op, StorageBackend
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import BackendError
from nixl_async.fileio import FileEngine, FileError, FileSegments, strictest
from nixl_async.files import os_error
from nixl_async.native import int64, lib
from nixl_async.storage import FileRegion

AT_ONCE_SEGMENTS = 16
"""Reads of up to this many segments out of the page cache are made on the loop."""
LANE_NBYTES = 512 << 10
"""What is worth one more lane: it copies for longer than it takes to wake it."""


class PosixBackend(StorageBackend):
    """Moves bytes between local memory and files opened by `agent.file`.

    `engine` is "auto" (io_uring if the kernel allows it), "io_uring" or "threads"; `n_threads` copy at once.
    """

    name = "posix"
    kinds = frozenset()
    rank = 60

    def __init__(self, *, engine: str = "auto", n_threads: int | None = None) -> None:
        n_threads = n_threads or max(2, min(8, os.cpu_count() or 1))
        self.limits = Limits(max_ops=2 * n_threads, max_nbytes=128 << 20, max_op_nbytes=64 << 20, inline_nbytes=64 << 10)
        self._n_threads, self._wanted_engine = n_threads, engine
        self._engine: FileEngine | None = None

    async def open(self, host: Host) -> None:
        """Find out whether there is io_uring."""
        self._engine = FileEngine(f"nixl-posix-{host.agent_name}", self._n_threads, self._wanted_engine)

    async def aclose(self) -> None:
        """End the threads."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but local DRAM on one side and files on the other."""
        if {src.kind, dst.kind} != {MemoryKind.DRAM, MemoryKind.FILE}:
            return f"it copies between DRAM and files, not {src.kind.value} to {dst.kind.value}"
        peer = src.peer or dst.peer
        return None if peer is None else f"the memory is peer {peer!r}'s"

    def how(self, src: Side, dst: Side) -> str:
        """Tell the engine, and whether the page cache is used."""
        files = src if src.kind is MemoryKind.FILE else dst
        direct = any(isinstance(region, FileRegion) and region.direct_fd >= 0 for region in files.regions)
        engine = self._engine.how if self._engine is not None else "closed"
        return f"{engine}, {'direct' if direct else 'page cache'}"

    def copy_now(self, op: Op) -> bool:
        """Read at once what is in the page cache."""
        plan = op.plan
        region = plan.src.regions[0]
        if (
            self._engine is None
            or not isinstance(region, FileRegion)
            or region.direct_fd >= 0
            or len(plan.src.regions) > 1
            or len(plan.lengths) > AT_ONCE_SEGMENTS
        ):
            return False
        arrays = int64(plan.src.addresses), int64(plan.dst.addresses), int64(plan.lengths)
        return bool(lib.nx_file_cached(region.fd, *arrays, len(plan.lengths)))

    async def copy(self, op: Op) -> None:
        """Read or write every segment.

        Direct I/O keeps the device busy from one lane. Copies out of the page cache are made by all lanes; copies into it by
        one for each file, because the kernel lets in no more (they would spin for its lock).
        """
        engine = self._engine
        if engine is None:
            raise BackendError("the posix backend is closed", backend=self.name)
        plan = op.plan
        put = plan.dst.kind is MemoryKind.FILE
        files, memory = (plan.dst, plan.src) if put else (plan.src, plan.dst)
        regions = [region for region in files.regions if isinstance(region, FileRegion)]
        if (put and len(regions) == 1) or all(region.direct_fd >= 0 for region in regions):
            ways = 1
        else:
            ways = min(self._n_threads, max(1, plan.nbytes // LANE_NBYTES))
        try:
            await engine.move(put, _segments(files, memory, regions, plan), ways)
        except FileError as error:
            raise self._explain(error, plan, files, put) from error

    def _explain(self, error: FileError, plan: Plan, files: Side, put: bool) -> Exception:
        at = error.segment
        region = files.regions[0 if files.index is None else int(files.index[at])]
        where = f"{int(plan.lengths[at])} bytes at {int(files.addresses[at])} of {region.name!r}"
        if error.errno == errno.ENODATA:
            return BackendError(f"posix: the file ends before {where}", backend=self.name)
        return os_error(error, f"{'writing' if put else 'reading'} {where}")


def _segments(files: Side, memory: Side, regions: list[FileRegion], plan: Plan) -> FileSegments:
    aligned = strictest(region.direct_fd for region in regions)
    fds = np.array([region.fd for region in regions], np.int32)
    direct = np.array([region.direct_fd for region in regions], np.int32)
    if files.index is None:
        fds, direct = np.repeat(fds, len(plan.lengths)), np.repeat(direct, len(plan.lengths))
    else:
        fds, direct = fds[files.index], direct[files.index]
    contiguous = np.ascontiguousarray
    return FileSegments(
        fds, direct, contiguous(files.addresses), contiguous(memory.addresses), contiguous(plan.lengths), aligned
    )

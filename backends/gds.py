"""Copies between a device's memory and files through kvikio: GPUDirect Storage where the system has it, else kvikio's own staging.

kvikio has no completion that a loop could wait for; one thread waits for all futures of a batch, so nothing is polled.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from nixl_async.backend import Backend, Host, Limits, Op, quiesce
from nixl_async.cuda import DeviceBytes, check_region, need_device
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import BackendError, MissingDependency
from nixl_async.memory import MemoryRegion
from nixl_async.storage import FileRegion


@dataclass(frozen=True, slots=True)
class GDSStatistics:
    """How kvikio works here, and what has gone through it: bytes read from and written to files, and the ops."""

    compat_mode: str
    threads: int
    read_nbytes: int
    written_nbytes: int
    ops: int


class GDSBackend(Backend):
    """Moves bytes between VRAM of this process and files opened by `agent.file`."""

    name = "gds"
    kinds = frozenset({MemoryKind.VRAM})
    remote = False
    rank = 35
    limits = Limits(max_ops=2, max_op_nbytes=64 << 20)

    def __init__(self) -> None:
        # kvikio imports without a driver, and then fails at the first byte, host memory included.
        need_device(self.name)
        try:
            import kvikio
            import kvikio.defaults
        except ImportError as error:
            raise MissingDependency(f"the gds backend needs kvikio ({error}): pip install 'nixl-async[gds]'") from error
        self._kvikio: Any = kvikio
        self._threads: ThreadPoolExecutor | None = None
        self._read = self._written = self._ops = 0

    async def open(self, host: Host) -> None:
        """Start the threads that wait for batches."""
        self._threads = ThreadPoolExecutor(self.limits.max_ops, thread_name_prefix=f"nixl-gds-{host.agent_name}")

    async def aclose(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    async def register(self, region: MemoryRegion) -> bytes:
        """Check that VRAM is what it is said to be."""
        check_region(region)
        return b""

    def refusal(self, src: Side, dst: Side) -> str | None:
        """Refuse anything but local VRAM on one side and files on the other."""
        if {src.kind, dst.kind} != {MemoryKind.VRAM, MemoryKind.FILE}:
            return f"it copies between VRAM and files, not {src.kind.value} to {dst.kind.value}"
        peer = src.peer or dst.peer
        return None if peer is None else f"the memory is peer {peer!r}'s"

    def how(self, src: Side, dst: Side) -> str:
        """Tell kvikio's mode."""
        return f"kvikio, compat mode {self.statistics().compat_mode}"

    def statistics(self) -> GDSStatistics:
        """Return how kvikio is set up and what it has moved for this backend."""
        get = self._kvikio.defaults.get
        mode = get("compat_mode")
        return GDSStatistics(getattr(mode, "name", str(mode)), int(get("num_threads")), self._read, self._written, self._ops)

    async def copy(self, op: Op) -> None:
        """Give every segment to kvikio and wait for all on a thread; a cancelled copy is waited for all the same."""
        if self._threads is None:
            raise BackendError("the gds backend is closed", backend=self.name)
        await quiesce(asyncio.get_running_loop().run_in_executor(self._threads, self._run, op.plan))
        self._ops += 1
        if op.plan.dst.kind is MemoryKind.FILE:
            self._written += op.nbytes
        else:
            self._read += op.nbytes

    def _run(self, plan: Plan) -> None:
        put = plan.dst.kind is MemoryKind.FILE
        files, memory = (plan.dst, plan.src) if put else (plan.src, plan.dst)
        opened = []
        futures: list[tuple[Any, int]] = []
        failed: Exception | None = None
        moved = 0
        try:
            for region in files.regions:
                assert isinstance(region, FileRegion)
                # By its descriptor: a file that is yet to be published has another name.
                opened.append(self._kvikio.CuFile(f"/proc/self/fd/{region.fd}", "r+" if put else "r"))
            index = [0] * len(plan.lengths) if files.index is None else files.index.tolist()
            arrays = files.addresses.tolist(), memory.addresses.tolist(), plan.lengths.tolist()
            for number, offset, address, nbytes in zip(index, *arrays, strict=True):
                call = opened[number].pwrite if put else opened[number].pread
                futures.append((call(DeviceBytes(address, nbytes), nbytes, offset), nbytes))
        except Exception as error:
            failed = error
        for future, nbytes in futures:
            try:
                moved = int(future.get())
                if moved != nbytes and failed is None:
                    failed = BackendError(f"gds: {moved} of {nbytes} bytes moved; the file ends", backend=self.name)
            except Exception as error:
                failed = failed or error
        for file in opened:
            file.close()
        if isinstance(failed, BackendError):
            raise failed
        if failed is not None:
            raise BackendError(f"gds: {type(failed).__name__}: {failed}", backend=self.name) from failed

"""Copies between a device's memory and the host's, and within a device, on streams of its own (cupy).

A thread waits for each batch: no Python runs inside the driver, and the loop never does.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nixl_async.backend import Backend, Host, Limits, Op, quiesce
from nixl_async.cuda import check_region, need_device
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.errors import BackendError, MissingDependency
from nixl_async.memory import MemoryRegion

_BOTH = frozenset({MemoryKind.DRAM, MemoryKind.VRAM})


class CUDABackend(Backend):
    """Moves bytes between VRAM and DRAM of this process, two batches at once."""

    name = "cuda"
    kinds = _BOTH
    remote = False
    rank = 5
    limits = Limits(max_ops=2, max_op_nbytes=32 << 20)

    def __init__(self) -> None:
        need_device(self.name)
        try:
            import cupy
        except ImportError as error:
            raise MissingDependency(
                f"the cuda backend needs cupy ({error}): pip install 'nixl-async[cu12]', or [cu13]"
            ) from error
        self._cupy: Any = cupy
        self._threads: ThreadPoolExecutor | None = None

    async def open(self, host: Host) -> None:
        """Start the threads."""
        self._threads = ThreadPoolExecutor(2, thread_name_prefix=f"nixl-cuda-{host.agent_name}")

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
        """Refuse what is not VRAM of this process on one side and VRAM or DRAM of it on the other."""
        if {src.kind, dst.kind} - _BOTH or MemoryKind.VRAM not in (src.kind, dst.kind):
            return f"it copies VRAM to and from DRAM, not {src.kind.value} to {dst.kind.value}"
        if (peer := src.peer or dst.peer) is not None:
            return f"peer {peer!r} lives in another process"
        return None

    async def copy(self, op: Op) -> None:
        """Enqueue every segment on a stream and wait for it on a thread; a cancelled copy is waited for all the same."""
        if self._threads is None:
            raise BackendError("the cuda backend is closed", backend=self.name)
        await quiesce(asyncio.get_running_loop().run_in_executor(self._threads, self._run, op.plan))

    def _run(self, plan: Plan) -> None:
        cupy = self._cupy
        vram = plan.src if plan.src.kind is MemoryKind.VRAM else plan.dst
        runtime = cupy.cuda.runtime
        kind = runtime.memcpyDefault
        try:
            with cupy.cuda.Device(vram.regions[0].device):
                stream = cupy.cuda.Stream(non_blocking=True)
                arrays = plan.dst.addresses.tolist(), plan.src.addresses.tolist(), plan.lengths.tolist()
                try:
                    for dst, src, nbytes in zip(*arrays, strict=True):
                        runtime.memcpyAsync(dst, src, nbytes, kind, stream.ptr)
                finally:
                    # Also when a segment was refused: those before it are on their way.
                    stream.synchronize()
        except runtime.CUDARuntimeError as error:
            raise BackendError(f"cuda: {error}", backend=self.name) from error

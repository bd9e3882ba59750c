"""What the device itself does with as many bytes: CUDA's own copies, and cupy's way to gather pages."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.gpu.memory import PAUSE_SECONDS, allocate, cupy, synchronize
from bench.pattern import page_order
from bench.worker import Common, serve


class Raw(Common):
    """Two blocks of a device's memory and one that is pinned."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Allocate."""
        self.nbytes = nbytes
        self.device = [allocate("vram", nbytes), allocate("vram", nbytes)]
        self.host = allocate("pinned", nbytes) if options.get("host") else None
        self.stream = cupy().cuda.Stream(non_blocking=True)

    def copy(self, kind: str, nbytes: int | None = None) -> float:
        """Copy all, or `nbytes` bytes, in one call: `device` to device, `to-host` or `to-device`; return seconds."""
        runtime, here = cupy().cuda.runtime, self.device[0].address
        host = self.host.address if self.host is not None else 0
        dst, src, how = {
            "device": (self.device[1].address, here, runtime.memcpyDeviceToDevice),
            "to-host": (host, here, runtime.memcpyDeviceToHost),
            "to-device": (here, host, runtime.memcpyHostToDevice),
        }[kind]
        # A device that nobody has used for long takes longer for whatever comes first.
        runtime.memcpyAsync(dst, src, 1 << 20, how, self.stream.ptr)
        self.stream.synchronize()
        time.sleep(PAUSE_SECONDS)
        start = time.perf_counter()
        runtime.memcpyAsync(dst, src, nbytes or self.nbytes, how, self.stream.ptr)
        self.stream.synchronize()
        return time.perf_counter() - start

    def take(self, page_nbytes: int, seed: int, gather: bool) -> float:
        """Gather or scatter pages in random order with cupy's indexing; return seconds, the index's way to the device included."""
        order = page_order(self.nbytes // page_nbytes, seed).astype(np.int32)
        pages = [block.array.view(np.uint64).reshape(len(order), -1) for block in self.device]
        synchronize()
        start = time.perf_counter()
        index = cupy().asarray(order)
        if gather:
            cupy().take(pages[0], index, axis=0, out=pages[1])
        else:
            pages[1][index] = pages[0]
        synchronize()
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(Raw())

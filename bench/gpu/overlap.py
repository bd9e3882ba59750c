"""nixl_async beside compute: layers are sent as a stream of matrix products reaches the end of each."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from bench.gpu.memory import cupy, synchronize
from bench.gpu.mover import GPUMover, main
from bench.pattern import page_order

PAGE_NBYTES = 65536
SIDE = 8192
"""Rows and columns of the matrices: one product takes an H100 1.4 ms, as a layer of a large model with a thousand tokens."""


class Compute:
    """A stream of matrix products; torch's if it is there, else cupy's."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError:
            torch = None
        self.torch = torch if torch is not None and torch.cuda.is_available() else None
        if self.torch is not None:
            shape = {"size": (SIDE, SIDE), "device": "cuda", "dtype": self.torch.bfloat16}
            self.a, self.b, self.out = (self.torch.randn(**shape) for _ in range(3))
            self.stream = self.torch.cuda.Stream()
        else:
            self.a, self.b = (cupy().random.rand(SIDE, SIDE, dtype=np.float32).astype(np.float16) for _ in range(2))
            self.out = cupy().empty_like(self.a)
            self.stream = cupy().cuda.Stream(non_blocking=True)
        synchronize()

    @property
    def name(self) -> str:
        """Whose products they are."""
        return f"torch {self.torch.__version__}" if self.torch is not None else f"cupy {cupy().__version__}"

    def product(self) -> None:
        """Put one product on the stream."""
        if self.torch is not None:
            with self.torch.cuda.stream(self.stream):
                self.torch.matmul(self.a, self.b, out=self.out)
        else:
            with self.stream:
                cupy().matmul(self.a, self.b, out=self.out)

    def record(self) -> Any:
        """Put an event behind what is on the stream."""
        if self.torch is not None:
            event = self.torch.cuda.Event(enable_timing=True)
            event.record(self.stream)
            return event
        return self.stream.record(cupy().cuda.Event())

    def seconds(self, start: Any, end: Any) -> float:
        """Return the device's time between two events that it has reached."""
        if self.torch is not None:
            return float(start.elapsed_time(end)) / 1e3
        return float(cupy().cuda.get_elapsed_time(start, end)) / 1e3


class Overlap(GPUMover):
    """The prefill side: computes, and sends each layer's pages when its event is reached."""

    def prepare_layers(self, layers: int, layer_nbytes: int, seed: int) -> str:
        """Say what a run is: pages of each layer in random order; return whose compute it is."""
        self.compute = Compute()
        n = layer_nbytes // PAGE_NBYTES
        self.orders = [(page_order(n, seed + i) + i * n).astype(np.int32) for i in range(layers)]
        self.page_nbytes, self.write, self.order = PAGE_NBYTES, True, np.concatenate(self.orders)
        self.straight = [np.arange(i * n, (i + 1) * n, dtype=np.int32) for i in range(layers)]
        return self.compute.name

    def follow(self, layers: int, layer_nbytes: int, seed: int) -> None:
        """Say the same to the side that is written to."""
        n = layer_nbytes // PAGE_NBYTES
        self.order = np.concatenate([page_order(n, seed + i) + i * n for i in range(layers)])
        self.page_nbytes, self.write = PAGE_NBYTES, True

    async def run(self, compute: bool, transfer: bool) -> dict[str, float]:
        """Run once; return the compute's time on the device, all the transfers' time, and the time from its end to theirs."""
        layers = len(self.orders)
        begun = time.perf_counter()
        start = self.compute.record() if compute else None
        transfers, end = [], None
        for layer in range(layers):
            if compute:
                self.compute.product()
                end = self.compute.record()
            if transfer:
                near = self.region.pages(self.straight[layer], PAGE_NBYTES)
                far = self.remote.pages(self.orders[layer], PAGE_NBYTES)
                transfers.append(self.agent.submit(near, far, after=end, backend=self.backend))
        computed = asyncio.ensure_future(self._computed(end))
        for one in transfers:
            await one
        sent = time.perf_counter()
        done = await computed
        return {
            "compute": self.compute.seconds(start, end) if compute else 0.0,
            "transfer": sent - begun if transfer else 0.0,
            "exposed": max(0.0, sent - max(begun, done)) if transfer else 0.0,
        }

    async def _computed(self, end: Any) -> float:
        if end is None:
            return 0.0
        return await asyncio.to_thread(_wait, end)


def _wait(end: Any) -> float:
    end.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    asyncio.run(main(Overlap()))

"""A process of its own that owns a device's memory, for tests and benches: told what to do by lines of JSON, it answers in lines.

`python ipc_owner.py NAME [DEVICE]` serves an agent and prints its port.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

from nixl_async import Agent, MemoryRegion
from nixl_async.cuda import DeviceBytes
from nixl_async.testing import pattern


class Owner:
    """Carries out the commands."""

    def __init__(self, agent: Agent, device: int) -> None:
        import cupy

        self.agent, self.device, self.cupy = agent, device, cupy
        self.regions: dict[str, MemoryRegion] = {}
        self.kept: list[Any] = []

    def allocate(self, kind: str, nbytes: int) -> tuple[Any, int]:
        """Return what keeps memory alive and its address; of a pool, it is not where the allocation begins."""
        cupy = self.cupy
        if kind == "pool":
            # One allocation that others share.
            first = cupy.empty(nbytes + 4096, cupy.uint8)
            return first, first.data.ptr + 512
        if kind == "managed":
            memory = cupy.cuda.malloc_managed(nbytes)
            return memory, memory.ptr
        if kind == "async":
            memory = cupy.cuda.MemoryAsyncPool().malloc(nbytes)
            return memory, memory.ptr
        import torch

        tensors = [torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{self.device}") for _ in range(2)]
        return tensors, tensors[1].data_ptr()

    async def register(self, name: str, nbytes: int, kind: str = "pool", parts: int = 1) -> str:
        """Register memory filled with a pattern, as `parts` regions: name, name-1, …"""
        keep, address = self.allocate(kind, nbytes)
        self.kept.append(keep)
        content = pattern(nbytes)
        self.cupy.cuda.runtime.memcpy(address, content.ctypes.data, nbytes, self.cupy.cuda.runtime.memcpyDefault)
        step = nbytes // parts
        for i in range(parts):
            part = f"{name}-{i}" if i else name
            self.regions[part] = await self.agent.register(DeviceBytes(address + i * step, step), name=part)
        return "registered"

    async def fill(self, name: str, value: int) -> str:
        """Fill a region with one byte."""
        region = self.regions[name]
        self.cupy.cuda.runtime.memset(region.address, value, region.nbytes)
        self.cupy.cuda.Device().synchronize()
        return "filled"

    async def digest(self, name: str) -> str:
        """Return the SHA-256 of a region's bytes."""
        region = self.regions[name]
        content = np.empty(region.nbytes, np.uint8)
        runtime = self.cupy.cuda.runtime
        runtime.memcpy(content.ctypes.data, region.address, region.nbytes, runtime.memcpyDeviceToHost)
        return hashlib.sha256(content).hexdigest()

    async def close(self, name: str) -> str:
        """Deregister a region."""
        await self.regions.pop(name).aclose()
        return "closed"

    async def stuck(self, seconds: float) -> str:
        """Hold the interpreter."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "free"


async def main(name: str, device: int) -> None:
    """Serve until the input ends."""
    import cupy

    cupy.cuda.Device(device).use()
    loop = asyncio.get_running_loop()
    async with Agent(name, backends=["cuda", "cuda_ipc"], authenticate=False) as agent:
        owner = Owner(agent, device)
        address = await agent.serve("127.0.0.1", 0)
        print(json.dumps({"port": address[1], "pid": os.getpid()}), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command, arguments = json.loads(line)
            if command == "stuck":
                # Whoever asks for it goes on meanwhile.
                print(json.dumps("begins"), flush=True)
            try:
                answer = await getattr(owner, command)(**arguments)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))

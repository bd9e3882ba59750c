"""An agent in a process of its own with memory of a device and of the host, for tests; told by lines of JSON on standard input.

`python -m tests.gpu.vram_peer`, in the checkout; what it answers is what `tests.agents.AgentProcess` reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nixl_async import Agent
from nixl_async.testing import pattern
from tests.agents import ROOT, TOKEN, AgentProcess

MODULE = "tests.gpu.vram_peer"


@asynccontextmanager
async def vram_process(name: str, *, nbytes: int, backends: list[str], device: int = 0) -> AsyncIterator[AgentProcess]:
    """Start one with regions `vram` of `pattern(nbytes, 1)` and `dram` of `pattern(nbytes, 2)`."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", MODULE, stdin=pipe, stdout=pipe, cwd=ROOT)
    peer = AgentProcess(process)
    try:
        hello = await peer.order("open", name=name, nbytes=nbytes, backends=backends, device=device)
        peer.address = (hello["address"][0], hello["address"][1])
        yield peer
    finally:
        await peer.end()


async def _serve(setup: dict[str, Any]) -> None:
    import cupy

    loop = asyncio.get_running_loop()
    with cupy.cuda.Device(setup["device"]):
        vram, dram = cupy.asarray(pattern(setup["nbytes"], 1)), pattern(setup["nbytes"], 2)
        cupy.cuda.Device().synchronize()
        async with Agent(setup["name"], token=TOKEN, backends=setup["backends"]) as agent:
            regions = {"vram": await agent.register(vram, name="vram"), "dram": await agent.register(dram, name="dram")}
            _say(address=await agent.serve("127.0.0.1", 0))
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                order = json.loads(line)
                try:
                    match order["do"]:
                        case "digest":
                            memory: Any = cupy.asnumpy(vram) if order["of"] == "vram" else dram
                            _say(digest=hashlib.sha256(memory).hexdigest())
                        case "transfer":
                            ours, theirs = regions[order["ours"]], agent.peers[order["peer"]].region(order["theirs"])
                            sides = (ours, theirs) if order["put"] else (theirs, ours)
                            result = await agent.transfer(*sides, backend=order.get("backend"))
                            _say(nbytes=result.nbytes, route=result.route)
                        case "leave":
                            return
                except Exception as error:
                    _say(error=type(error).__name__, text=str(error))


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.stdin.readline())))

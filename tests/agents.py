"""Agents for tests: two connected ones in this process, and one in a process of its own that takes orders."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nixl_async import Agent, LayerPlan, MemoryRegion, Peer, RemoteRegion
from nixl_async.testing import pattern

TOKEN = "a token that only the tests know"
START_SECONDS = 60.0
PROGRAM = "from tests.agents import main; main()"
ROOT = Path(__file__).resolve().parent.parent


@asynccontextmanager
async def two_agents(**options: Any) -> AsyncIterator[tuple[Agent, Agent, Peer]]:
    """Open agents "a" and "b" in this process, b served, a connected to it; yield both, and b as a sees it."""
    async with Agent("a", **{"token": TOKEN, **options}) as a, Agent("b", **{"token": TOKEN, **options}) as b:
        peer = await connect(a, b)
        yield a, b, peer


async def connect(a: Agent, b: Agent) -> Peer:
    """Serve b if it is not, connect a to it, and wait until both know each other."""
    host, port = b.address or await b.serve("127.0.0.1", 0)
    peer = await a.connect((host, port))
    await b.wait_peer(a.name)
    return peer


async def known(agent: Agent, peer: Peer, region: str) -> None:
    """Wait until `agent` has learnt of `region` at `peer`."""
    events = agent.membership()
    while region not in peer.regions:
        async with asyncio.timeout(10):
            await anext(events)


@dataclass(eq=False)
class AgentProcess:
    """An agent in another process, served, with one region "memory" that holds `pattern(nbytes, seed)` at first."""

    process: asyncio.subprocess.Process
    address: tuple[str, int] = ("", 0)
    metadata: bytes = b""
    told: list[dict[str, Any]] = field(default_factory=list)

    def kill(self) -> None:
        self.process.kill()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # Its threads run on for a moment: one that takes up a copy then never ends it.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and return the answer."""
        await self.send(do, **arguments)
        return await self.answer()

    async def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        await self.process.stdin.drain()

    async def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await self.process.stdout.readline()
        assert line, "the agent's process ended; its last words are on standard error"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def end(self) -> None:
        """Wait until the process is gone, killing it if it is not."""
        if self.process.returncode is None:
            # A stopped process dies of SIGKILL too.
            self.process.kill()
        await self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@asynccontextmanager
async def agent_process(name: str, **setup: Any) -> AsyncIterator[AgentProcess]:
    """Start an agent in a process of its own: `token`, `backends`, `nbytes`, `seed`, `port` as given or by default."""
    pipe = asyncio.subprocess.PIPE
    # A file under tests/ is importable where the checkout is the working directory.
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdin=pipe, stdout=pipe, cwd=ROOT)
    peer = AgentProcess(process)
    try:
        hello = await peer.order("open", name=name, **{"token": TOKEN, "nbytes": 1 << 20, "seed": 1, "port": 0, **setup})
        peer.address = (hello["address"][0], hello["address"][1])
        peer.metadata = bytes.fromhex(hello["metadata"])
        yield peer
    finally:
        await peer.end()


def main() -> None:
    """Run as the other process, told by lines of JSON on standard input."""
    asyncio.run(_serve(json.loads(sys.stdin.readline())))


async def _serve(setup: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    # What is to be absent, as if it were not installed.
    sys.modules.update(dict.fromkeys(setup.get("without", [])))  # type: ignore[arg-type]
    memory = pattern(setup["nbytes"], setup["seed"])
    async with Agent(
        setup["name"], token=setup["token"], backends=setup.get("backends"), discovery=setup.get("discovery")
    ) as agent:
        region = await agent.register(memory, name="memory")
        address = await agent.serve("127.0.0.1", setup["port"])
        _say(address=address, metadata=agent.metadata().hex())
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            order = json.loads(line)
            try:
                answer = await _obey(agent, region, memory, order)
            except Exception as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            if answer is None:
                return
            _say(**answer)


async def _obey(agent: Agent, region: MemoryRegion, memory: Any, order: dict[str, Any]) -> dict[str, Any] | None:
    match order["do"]:
        case "digest":
            return {"digest": hashlib.sha256(memory).hexdigest()}
        case "fill":
            memory[:] = pattern(len(memory), order["seed"])
        case "flip":
            memory[order["at"]] ^= 0xFF
        case "connect":
            peer = await agent.connect((order["host"], order["port"]))
            return {"peer": peer.name, "regions": sorted(peer.regions)}
        case "notify":
            await agent.notify(order["to"], bytes.fromhex(order["payload"]))
        case "listen":
            note = await anext(agent.notifications(prefix=order.get("prefix", "").encode()))
            return {"from": note.peer, "payload": note.payload.hex()}
        case "transfer":
            theirs = agent.peers[order["peer"]].region(order["region"])
            sides = (region, theirs) if order["put"] else (theirs, region)
            result = await agent.transfer(*sides, notify=order.get("notify", "").encode() or None)
            return {"nbytes": result.nbytes, "route": result.route}
        case "flood":
            theirs = agent.peers[order["peer"]].region(order["region"])
            _floods.append(asyncio.create_task(_flood(agent, region, theirs)))
        case "flooded":
            return await _floods.pop()
        case "held":
            return {"held": sorted(agent.peers[order["peer"]].regions) if order["peer"] in agent.peers else None}
        case "push":
            n, theirs = order["nbytes"], agent.peers[order["peer"]].region(order["region"])
            cuts = [slice(at, at + n) for at in range(0, order["count"] * n, n)]
            push = agent.push(order["peer"], LayerPlan(order["request"], [(region[cut], theirs[cut]) for cut in cuts]))
            await push.__aenter__()
            wanted = await push.wanted()
            push.ready(*order["ready"])
            return {"wanted": sorted(wanted)}
        case "spin":
            # Longer than the spin: no other thread of this process is given the interpreter meanwhile.
            sys.setswitchinterval(order["seconds"] * 2)
            _say(spinning=True)
            end = time.monotonic() + order["seconds"]
            while time.monotonic() < end:
                pass
            sys.setswitchinterval(0.005)
            return {"spun": True}
        case "statistics":
            return {"peers": sorted(agent.peers), "live": agent.statistics().live_transfers}
        case "leave":
            return None
    return {"done": order["do"]}


_floods: list[asyncio.Task[dict[str, Any]]] = []


async def _flood(agent: Agent, region: MemoryRegion, theirs: RemoteRegion) -> dict[str, Any]:
    """Put on and on until it fails; return how often it did not, and the error."""
    count = 0
    try:
        while True:
            await agent.transfer(region, theirs)
            count += 1
    except Exception as error:
        return {"count": count, "error": type(error).__name__, "text": str(error)}


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)

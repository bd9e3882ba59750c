"""A peer in a process of its own, that can be killed, stopped and kept busy. Started by `process_peer`; runs `main`."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nixl_async.backend import Backend, Host, PeerInfo, load_backend
from nixl_async.memory import MemoryRegion, RemoteRegion, open_buffer
from nixl_async.testing.pair import HOST, OURS
from nixl_async.testing.patterns import pattern

if TYPE_CHECKING:
    from nixl_async.testing.pair import Pair
    from nixl_async.testing.patterns import Bytes

START_SECONDS = 60.0
PROGRAM = "from nixl_async.testing.process import main; main()"
NAME = "elsewhere"


def make_backend(target: str, options: Mapping[str, Any]) -> Backend:
    """Make a backend from a name that `load_backend` knows, or from "module:Class"."""
    module, colon, name = target.partition(":")
    if not colon:
        return load_backend(target, **options)
    made = getattr(importlib.import_module(module), name)(**options)
    assert isinstance(made, Backend)
    return made


@dataclass(eq=False)
class ProcessPeer:
    """A peer in another process, connected as "elsewhere": its one region holds `pattern(nbytes, seed)` at first."""

    process: asyncio.subprocess.Process
    region: RemoteRegion

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()

    def stop(self) -> None:
        """Stop it by SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on by SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    async def digest(self) -> str:
        """Return the SHA-256 of its region."""
        await self.send({"do": "digest"})
        return str((await self.receive())["digest"])

    async def spin(self, seconds: float) -> asyncio.Task[dict[str, Any]]:
        """Let its interpreter spin in pure Python; return once it does, with a task that ends when it has ended."""
        await self.send({"do": "spin", "seconds": seconds})
        await self.receive()
        return asyncio.create_task(self.receive())

    async def send(self, message: dict[str, Any]) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        await self.process.stdin.drain()

    async def receive(self) -> dict[str, Any]:
        """Receive its next line."""
        assert self.process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = await self.process.stdout.readline()
        assert line, "the peer's process ended; its last words are on standard error"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


@asynccontextmanager
async def process_peer(
    pair: Pair, target: str, options: Mapping[str, Any], nbytes: int, seed: int = 1
) -> AsyncIterator[ProcessPeer]:
    """Start a process with the backend `target` and connect the pair's `ours` to it; it is gone when the block ends."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdin=pipe, stdout=pipe)
    incarnation = secrets.token_hex(8)
    peer = ProcessPeer(process, RemoteRegion(NAME, incarnation, "unknown", 1, 1))
    try:
        await peer.send(
            {
                "target": target,
                "options": dict(options),
                "nbytes": nbytes,
                "seed": seed,
                "incarnation": incarnation,
                "other": pair.our_incarnation,
            }
        )
        hello = await peer.receive()
        description = pair.ours.describe_to(NAME, incarnation)
        await peer.send({"description": description.hex(), "incarnation": pair.our_incarnation})
        await pair.ours.connect(PeerInfo(NAME, incarnation, bytes.fromhex(hello["description"]), HOST))
        await peer.receive()
        keys = {pair.ours.name: bytes.fromhex(hello["key"])}
        peer.region = RemoteRegion(NAME, incarnation, "memory", hello["address"], nbytes, keys=keys)
        yield peer
        await pair.ours.disconnect(NAME)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        # The pipes' transports close a step after the process has ended.
        if process.stdin is not None:
            process.stdin.close()


def main() -> None:
    """Run as the other process, told by lines of JSON on standard input."""
    asyncio.run(_serve(json.loads(sys.stdin.readline())))


async def _serve(setup: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    memory = pattern(setup["nbytes"], setup["seed"])
    backend = make_backend(setup["target"], setup["options"])
    await backend.open(Host(NAME, setup["incarnation"], loop))
    await backend.listen(HOST)
    region = MemoryRegion("memory", open_buffer(memory), _closed)
    key = await backend.register(region)
    _say({"description": backend.describe_to(OURS, setup["other"]).hex(), "address": region.address, "key": key.hex()})
    other = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    await backend.connect(PeerInfo(OURS, other["incarnation"], bytes.fromhex(other["description"]), HOST))
    _say({"connected": True})
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        _obey(json.loads(line), memory)


def _obey(order: dict[str, Any], memory: Bytes) -> None:
    match order["do"]:
        case "digest":
            _say({"digest": hashlib.sha256(memory.tobytes()).hexdigest()})
        case "spin":
            # Longer than the spin: no other thread of this process is given the interpreter meanwhile.
            sys.setswitchinterval(order["seconds"] * 2)
            _say({"spinning": True})
            end = time.monotonic() + order["seconds"]
            while time.monotonic() < end:
                pass
            sys.setswitchinterval(0.005)
            _say({"spun": True})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


async def _closed(region: MemoryRegion) -> None:
    pass

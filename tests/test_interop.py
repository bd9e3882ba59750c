"""With stock NIXL agents: metadata, one-sided copies and notifications in both directions, and a peer that restarts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, ConfigurationError, PeerLost
from nixl_async.testing import pattern
from tests.agents import ROOT

PYTHON = os.environ.get("NIXL_ASYNC_NIXL_PYTHON", str(ROOT / ".nixl-env/bin/python"))
NBYTES = 1 << 20

pytestmark = [
    pytest.mark.nixl,
    pytest.mark.keeps,
    pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"no interpreter with NIXL's wheel at {PYTHON}; .ci/test makes one"),
]


@dataclass
class Stock:
    process: asyncio.subprocess.Process
    metadata: bytes = b""
    address: int = 0

    async def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        await self.send({"do": do, **arguments})
        return await self.answer()

    async def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        await self.process.stdin.drain()

    async def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            line = await self.process.stdout.readline()
        assert line, "the NIXL process ended; its last words are on standard error"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer


@asynccontextmanager
async def stock(name: str = "stock", fill: int = 0) -> AsyncIterator[Stock]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        PYTHON, str(ROOT / "tests/nixl_worker.py"), stdin=pipe, stdout=pipe, limit=8 << 20
    )
    peer = Stock(process)
    try:
        await peer.send({"name": name, "nbytes": NBYTES, "fill": fill})
        hello = await peer.answer()
        peer.metadata, peer.address = bytes.fromhex(hello["metadata"]), hello["address"]
        yield peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


async def test_we_read_and_write_a_stock_agents_memory() -> None:
    async with stock(fill=7) as nixl, Agent("ours", backends=["ucx"]) as agent:
        memory = np.zeros(NBYTES, np.uint8)
        region = await agent.register(memory)
        peer = await agent.add_peer(nixl.metadata)
        assert peer.name == "stock"
        await agent.transfer(peer.at(nixl.address, NBYTES), region[:])
        assert (memory == 7).all()
        sent = pattern(NBYTES, 3)
        memory[:] = sent
        pages = np.random.default_rng(1).permutation(NBYTES // 4096)
        theirs = next(iter(peer.regions.values()))
        await agent.transfer(region.pages(pages, 4096), theirs.pages(pages[::-1].copy(), 4096))
        expected = np.zeros((NBYTES // 4096, 4096), np.uint8)
        expected[pages[::-1]] = sent.reshape(-1, 4096)[pages]
        answer = await nixl.order("bytes", start=0, stop=NBYTES)
        assert bytes.fromhex(answer["bytes"]) == expected.tobytes()


async def test_what_a_stock_agent_holds_cannot_be_verified() -> None:
    async with stock() as nixl, Agent("ours", backends=["ucx"]) as agent:
        region = await agent.register(np.zeros(NBYTES, np.uint8))
        peer = await agent.add_peer(nixl.metadata)
        with pytest.raises(ConfigurationError, match="'stock' is a stock NIXL agent"):
            await agent.transfer(region, peer.at(nixl.address, NBYTES), verify="crc32c")


async def test_a_stock_agent_reads_and_writes_ours() -> None:
    async with stock() as nixl, Agent("ours", backends=["memory", "ucx"]) as agent:
        memory = pattern(NBYTES, 5)
        before = memory.copy()
        region = await agent.register(memory)
        await agent.add_peer(nixl.metadata)
        assert (await nixl.order("load", metadata=agent.metadata().hex()))["name"] == "ours"
        half = NBYTES // 2
        order = {"peer": "ours", "local": 0, "remote": region.address, "nbytes": half}
        assert (await nixl.order("READ", **order))["state"] == "DONE"
        answer = await nixl.order("bytes", start=0, stop=half)
        assert bytes.fromhex(answer["bytes"]) == before[:half].tobytes()
        assert (await nixl.order("WRITE", **order | {"remote": region.address + half}))["state"] == "DONE"
        assert (memory[half:] == before[:half]).all()
        assert (memory[:half] == before[:half]).all()


@pytest.mark.parametrize("backends", [["ucx"], None], ids=["ucx", "default"])
async def test_notifications_both_ways(backends: list[str] | None) -> None:
    async with stock() as nixl, Agent("ours", backends=backends) as agent:
        region = await agent.register(pattern(NBYTES, 6))
        peer = await agent.add_peer(nixl.metadata)
        await nixl.order("load", metadata=agent.metadata().hex())
        arrived = agent.notifications()
        await agent.notify(peer, b"\0binary\xff")
        assert (await nixl.order("listen"))["notifications"] == {"ours": [b"\0binary\xff".hex()]}
        result = await agent.transfer(region[:4096], peer.at(nixl.address, 4096), notify=b"written")
        assert result.route == "ucx"
        assert (await nixl.order("listen"))["notifications"] == {"ours": [b"written".hex()]}
        assert bytes.fromhex((await nixl.order("bytes", start=0, stop=4096))["bytes"]) == pattern(NBYTES, 6)[:4096].tobytes()
        await nixl.order("notify", peer="ours", payload=b"hello".hex())
        order = {"peer": "ours", "local": 0, "remote": region.address, "nbytes": 4096, "notify": "read"}
        assert (await nixl.order("READ", **order))["state"] == "DONE"
        async with asyncio.timeout(20):
            first, second = await anext(arrived), await anext(arrived)
        assert (first.peer, first.payload, second.payload) == ("stock", b"hello", b"read")


async def test_a_stock_agent_that_restarts() -> None:
    async with Agent("ours", backends=["ucx"]) as agent:
        memory = np.zeros(NBYTES, np.uint8)
        region = await agent.register(memory)
        events = agent.membership()
        async with stock(fill=1) as nixl:
            old = next(iter((await agent.add_peer(nixl.metadata)).regions.values()))
            await agent.transfer(old, region)
            assert (memory == 1).all()
            nixl.process.kill()
            await nixl.process.wait()

            async def until_lost() -> None:
                while True:
                    await agent.transfer(old, region)

            with pytest.raises(PeerLost):
                await asyncio.wait_for(until_lost(), 10)
        async with stock(fill=2) as nixl:
            peer = await agent.add_peer(nixl.metadata)
            with pytest.raises(PeerLost):
                await agent.transfer(old, region)
            await agent.transfer(next(iter(peer.regions.values())), region)
            assert (memory == 2).all()
        async with asyncio.timeout(10):
            assert [(await anext(events)).kind for _ in range(3)] == ["joined", "lost", "joined"]

"""A device's memory of two processes: CUDA IPC. Needs a CUDA device and cupy; it stands alone."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, BackendError, PeerLost
from nixl_async.backends.cuda_ipc import CUDAIPCBackend
from nixl_async.cuda import device_count
from nixl_async.descriptors import MemoryKind
from nixl_async.testing import assert_same, pattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
    pytest.mark.filterwarnings("default"),
]
needs_two = pytest.mark.skipif(device_count() < 2, reason="needs two CUDA devices")
OWNER = Path(__file__).with_name("ipc_owner.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OWNER.parents[2]), os.environ.get("PYTHONPATH", "")])}
N = 300
POISON = 0xEE


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


class Process:
    """The process that owns the other memory."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, pid: int) -> None:
        self.process, self.port, self.pid = process, port, pid

    async def line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(await self.process.stdout.readline())

    async def ask(self, command: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps([command, arguments]) + "\n").encode())
        await self.process.stdin.drain()
        return await self.line()


@asynccontextmanager
async def owner(name: str = "owner", device: int = 0, **environment: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(OWNER),
        name,
        str(device),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=ENVIRONMENT | environment,
    )
    try:
        made = Process(process, 0, process.pid)
        made.port = (await made.line())["port"]
        yield made
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def mover(*backends: Any) -> AsyncIterator[Agent]:
    async with Agent("mover", backends=["cuda", *(backends or ("cuda_ipc",))], authenticate=False) as agent:
        yield agent


def sha(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def filled(cupy: Any, nbytes: int, value: int = POISON) -> Any:
    made = cupy.full(nbytes, value, cupy.uint8)
    cupy.cuda.Device().synchronize()
    return made


async def test_pages_go_to_the_other_process_and_come_back(cupy: Any) -> None:
    rng = np.random.default_rng(1)
    async with owner() as other, mover() as agent:
        for page in (1, 511, 4096, 65536):
            await other.ask("register", name=f"kv{page}", nbytes=N * page)
        peer = await agent.connect(("127.0.0.1", other.port))
        for page in (1, 511, 4096, 65536):
            theirs, nbytes = peer.region(f"kv{page}"), N * page
            content = np.roll(pattern(nbytes), 7)
            mine = await agent.register(cupy.asarray(content))
            back = await agent.register(target := filled(cupy, nbytes))
            ours, there = rng.permutation(N), rng.permutation(N)
            explained = agent.explain(back, theirs)
            assert (theirs.kind, explained.route) == (MemoryKind.VRAM, "cuda_ipc")
            assert "one kernel" in explained.how
            result = await agent.transfer(theirs.pages(there, page), back.pages(ours, page))
            assert result.route == "cuda_ipc"
            expected = np.empty((N, page), np.uint8)
            expected[ours] = pattern(nbytes).reshape(N, page)[there]
            assert_same(cupy.asnumpy(target), expected.ravel())
            await agent.transfer(mine.pages(ours, page), theirs.pages(there, page))
            expected[there] = content.reshape(N, page)[ours]
            assert await other.ask("digest", name=f"kv{page}") == sha(expected)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
async def test_a_prepared_transfer_is_sent_again_and_again(
    cupy: Any, ragged: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nixl_async.backends.cuda_ipc.REACH_NBYTES", 1)
    monkeypatch.setattr("nixl_async.cuda_kernels.REACH_NBYTES", 1)
    monkeypatch.setattr("nixl_async.cuda_lane.Lane.order_pays", lambda lane, low, nbytes: ordered)
    page, n = 5000, 6000
    nbytes, rng, ipc = page * n, np.random.default_rng(5), CUDAIPCBackend()
    ours, there = rng.permutation(n), rng.permutation(n)
    lengths = rng.integers(1, page, n) if ragged else np.full(n, page)
    mask = np.arange(page) < lengths[:, None]
    async with owner() as other, mover(ipc) as agent:
        await other.ask("register", name="kv", nbytes=nbytes)
        peer = await agent.connect(("127.0.0.1", other.port))
        theirs, mine = peer.region("kv"), await agent.register(target := filled(cupy, nbytes))
        pull = await agent.prepare(theirs.ranges(there * page, lengths), mine.ranges(ours * page, lengths))
        push = await agent.prepare(mine.ranges(ours * page, lengths), theirs.ranges(there * page, lengths))
        assert len(ipc._kept._plans) == 2
        content = pattern(nbytes).reshape(n, page).copy()
        for value in (1, 2, 3):
            target[:] = value
            cupy.cuda.Device().synchronize()
            await pull.transfer()
            expected = np.full((n, page), value, np.uint8)
            expected[ours] = np.where(mask, content[there], value)
            assert np.array_equal(cupy.asnumpy(target).reshape(n, page), expected)
            target[:] = 10 + value
            cupy.cuda.Device().synchronize()
            await push.transfer()
            content[there] = np.where(mask, 10 + value, content[there])
            assert await other.ask("digest", name="kv") == sha(content)


@pytest.mark.parametrize(
    ("ragged", "ordered"),
    [(False, None), (False, True), (True, True), (True, False)],
    ids=["pages, measured", "pages, ordered", "ranges, ordered", "ranges, as they come"],
)
async def test_pages_all_over_a_large_region(
    cupy: Any, ragged: bool, ordered: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beyond what a device may reach without tables being walked: the kernel copies in an order of its own if that is faster.
    if ordered is not None:
        monkeypatch.setattr("nixl_async.cuda_lane.Lane.order_pays", lambda lane, low, nbytes: ordered)
    page, n = 50_000, 6000
    nbytes, rng = page * n, np.random.default_rng(4)
    async with owner() as other, mover() as agent:
        await other.ask("register", name="kv", nbytes=nbytes)
        peer = await agent.connect(("127.0.0.1", other.port))
        theirs, back = peer.region("kv"), await agent.register(target := filled(cupy, nbytes))
        ours, there = rng.permutation(n), rng.permutation(n)
        lengths = rng.integers(1, page, n) if ragged else np.full(n, page)
        await agent.transfer(theirs.ranges(there * page, lengths), back.ranges(ours * page, lengths))
        expected, content = np.full((n, page), POISON, np.uint8), pattern(nbytes).reshape(n, page)
        mask = np.arange(page) < lengths[:, None]
        expected[ours] = np.where(mask, content[there], POISON)
        assert np.array_equal(cupy.asnumpy(target).reshape(n, page), expected)
        target[:] = 5
        cupy.cuda.Device().synchronize()
        await agent.transfer(back.ranges(ours * page, lengths), theirs.ranges(there * page, lengths))
        content = content.copy()
        content[there] = np.where(mask, 5, content[there])
        assert await other.ask("digest", name="kv") == sha(content)


async def test_regions_of_one_allocation_share_a_mapping_until_the_last_is_withdrawn(cupy: Any) -> None:
    ipc = CUDAIPCBackend()
    async with owner() as other, mover(ipc) as agent:
        await other.ask("register", name="kv", nbytes=3 << 20, parts=3)
        peer = await agent.connect(("127.0.0.1", other.port))
        regions = [peer.region(name) for name in ("kv", "kv-1", "kv-2")]
        mine = await agent.register(target := filled(cupy, 3 << 20))
        # Both sides have several regions; the last, not used, counts for nothing.
        await agent.transfer([regions[1][:], regions[0][4096:]], mine[: (2 << 20) - 4096])
        content = pattern(3 << 20)
        assert_same(
            cupy.asnumpy(target)[: (2 << 20) - 4096], np.concatenate([content[1 << 20 : 2 << 20], content[4096 : 1 << 20]])
        )
        (mapping,) = ipc._peers["owner"].mappings.values()
        assert mapping.pointer
        assert await other.ask("close", name="kv-1") == "closed"
        assert list(ipc._peers["owner"].mappings.values()) == [mapping]
        assert await other.ask("close", name="kv") == "closed"
        assert ipc._peers["owner"].mappings == {}
        assert mapping.pointer == 0
        # It is opened again when it is needed again.
        await agent.transfer(regions[2], mine[: 1 << 20])
        assert_same(cupy.asnumpy(target)[: 1 << 20], content[2 << 20 :])
        await agent.disconnect(peer)
        assert ipc._peers == {}


async def test_memory_is_freed_and_made_again(cupy: Any) -> None:
    async with owner() as other, mover() as agent:
        peer = await agent.connect(("127.0.0.1", other.port))
        mine = await agent.register(target := filled(cupy, 8 << 20))
        async with asyncio.timeout(15):
            for round_ in range(5):
                joined = agent.membership()
                await other.ask("register", name="kv", nbytes=8 << 20)
                while "kv" not in peer.regions:
                    await anext(joined)
                await other.ask("fill", name="kv", value=round_)
                await agent.transfer(peer.region("kv"), mine)
                assert bool((target == round_).all())
                await other.ask("close", name="kv")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("async", "cudaMallocAsync"), ("managed", "cudaMallocManaged"), ("torch", "expandable_segments:False")],
)
async def test_memory_without_a_handle_is_refused_by_name(cupy: Any, kind: str, reason: str) -> None:
    if kind == "torch":
        pytest.importorskip("torch")
    conf = "expandable_segments:True"
    async with owner(PYTORCH_CUDA_ALLOC_CONF=conf, PYTORCH_ALLOC_CONF=conf) as other, mover() as agent:
        await other.ask("register", name="odd", nbytes=1 << 20, kind=kind)
        peer = await agent.connect(("127.0.0.1", other.port))
        mine = await agent.register(filled(cupy, 1 << 20))
        explained = agent.explain(mine, peer.region("odd"))
        assert "cuda_ipc" not in explained.routes
        assert "region 'odd'" in explained.refusals["cuda_ipc"]
        assert reason in explained.refusals["cuda_ipc"]


async def test_torch_memory_is_shared(cupy: Any) -> None:
    pytest.importorskip("torch")
    async with owner() as other, mover() as agent:
        await other.ask("register", name="kv", nbytes=3 << 20, kind="torch")
        peer = await agent.connect(("127.0.0.1", other.port))
        mine = await agent.register(target := filled(cupy, 3 << 20))
        await agent.transfer(peer.region("kv"), mine)
        assert_same(cupy.asnumpy(target), pattern(3 << 20))


async def test_agents_of_one_process_need_no_handle(cupy: Any) -> None:
    async with mover() as agent, Agent("second", backends=["cuda_ipc"], authenticate=False) as second:
        content = pattern(1 << 20)
        await second.register(cupy.asarray(content), name="theirs")
        # Memory that no other process could open serves within this one.
        pool = cupy.cuda.MemoryAsyncPool().malloc(1 << 20)
        cupy.cuda.Device().synchronize()
        odd = cupy.ndarray(1 << 20, cupy.uint8, memptr=pool)
        await second.register(odd, name="odd")
        address = await second.serve("127.0.0.1", 0)
        peer = await agent.connect(address)
        mine = await agent.register(target := filled(cupy, 1 << 20))
        assert (await agent.transfer(peer.region("theirs"), mine)).route == "cuda_ipc"
        assert_same(cupy.asnumpy(target), content)
        await agent.transfer(mine, peer.region("odd"))
        assert_same(cupy.asnumpy(odd), content)


async def test_a_stuck_peer_serves(cupy: Any) -> None:
    async with owner() as other, mover() as agent:
        await other.ask("register", name="kv", nbytes=4 << 20)
        peer = await agent.connect(("127.0.0.1", other.port))
        mine = await agent.register(target := filled(cupy, 4 << 20))
        await agent.transfer(peer.region("kv"), mine)
        assert await other.ask("stuck", seconds=1.5) == "begins"
        begun = time.monotonic()
        for _ in range(20):
            await agent.transfer(mine, peer.region("kv"))
            await agent.transfer(peer.region("kv"), mine)
        assert time.monotonic() - begun < 1.5
        assert await other.line() == "free"
        assert_same(cupy.asnumpy(target), pattern(4 << 20))


@pytest.mark.parametrize("direction", ["put", "get"])
async def test_a_peer_that_dies_while_copying_is_lost(cupy: Any, direction: str) -> None:
    nbytes = 256 << 20
    async with mover() as agent:
        mine = await agent.register(target := filled(cupy, nbytes))
        async with owner() as other:
            await other.ask("register", name="kv", nbytes=nbytes)
            peer = await agent.connect(("127.0.0.1", other.port))
            theirs = peer.region("kv")
            ends = (mine, theirs) if direction == "put" else (theirs, mine)
            order = np.random.default_rng(2).permutation(nbytes // 4096)
            prepared = await agent.prepare(ends[0].pages(order, 4096), ends[1].pages(order, 4096))
            killed = 0.0
            with pytest.raises(PeerLost):
                async with asyncio.timeout(10):
                    for number in range(100_000):
                        if number == 20:
                            transfers = [agent.submit(prepared) for _ in range(8)]
                            os.kill(other.pid, signal.SIGKILL)
                            killed = time.monotonic()
                            assert all(
                                isinstance(error, PeerLost | None) for error in await asyncio.gather(*map(settled, transfers))
                            )
                        await agent.transfer(prepared)
            assert killed
            assert time.monotonic() - killed < 2
        # The context is whole: a peer of the same name is served.
        async with owner() as other:
            await other.ask("register", name="kv", nbytes=nbytes)
            peer = await agent.connect(("127.0.0.1", other.port))
            await agent.transfer(peer.region("kv"), mine)
            assert_same(cupy.asnumpy(target)[:4096], pattern(4096))


async def settled(transfer: Any) -> BaseException | None:
    try:
        await transfer
    except Exception as error:
        return error
    return None


async def test_cancelled_copies_are_quiet(cupy: Any) -> None:
    nbytes = 512 << 20
    async with owner() as other, mover() as agent:
        await other.ask("register", name="kv", nbytes=nbytes)
        peer = await agent.connect(("127.0.0.1", other.port))
        device = filled(cupy, nbytes, 0)
        vram, theirs = await agent.register(device), peer.region("kv")
        order = np.random.default_rng(3).permutation(nbytes // 4096)
        prepared = await agent.prepare(theirs.pages(order, 4096), vram.pages(order, 4096))
        await agent.transfer(prepared)
        cancelled = 0
        for step in range(20):
            task = asyncio.create_task(agent.transfer(prepared))
            await asyncio.wait([task], timeout=step * 0.0001)
            task.cancel()
            await asyncio.wait([task])
            cancelled += task.cancelled()
            device[:] = POISON
            cupy.cuda.Device().synchronize()
            await asyncio.sleep(0.003)
            assert bool((device == POISON).all()), "the device's memory was written after a transfer was cancelled"
        assert cancelled


async def test_a_wrong_key_is_an_error(cupy: Any) -> None:
    async with owner() as other, mover() as agent:
        await other.ask("register", name="kv", nbytes=1 << 20)
        peer = await agent.connect(("127.0.0.1", other.port))
        mine = await agent.register(target := filled(cupy, 1 << 20))
        theirs = peer.region("kv")
        key = theirs.keys["cuda_ipc"]
        # Too far into the allocation.
        theirs.keys["cuda_ipc"] = key[:-16] + (1 << 40).to_bytes(8, "little") + key[-8:]
        with pytest.raises(BackendError, match="ends behind its allocation"):
            await agent.transfer(theirs, mine)
        assert bool((target == POISON).all())
        # A handle that names nothing.
        theirs.keys["cuda_ipc"] = key[:1] + bytes(64) + key[65:]
        with pytest.raises(BackendError, match="opening a peer's memory"):
            await agent.transfer(theirs, mine)
        theirs.keys["cuda_ipc"] = key
        await agent.transfer(theirs, mine)
        assert_same(cupy.asnumpy(target), pattern(1 << 20))


@needs_two
@pytest.mark.parametrize(("ours", "visible"), [(0, "0,1"), (1, "0,1"), (0, "1,0"), (1, "1")])
async def test_memory_of_other_devices(cupy: Any, ours: int, visible: str) -> None:
    # The owner numbers the devices in its own way, and uses its first: 0, 0, 1, 1.
    async with owner(CUDA_VISIBLE_DEVICES=visible) as other, mover() as agent:
        await other.ask("register", name="kv", nbytes=N * 65536)
        peer = await agent.connect(("127.0.0.1", other.port))
        with cupy.cuda.Device(ours):
            mine = await agent.register(target := filled(cupy, N * 65536))
            assert mine.device == ours
            order = np.random.default_rng(5).permutation(N)
            await agent.transfer(peer.region("kv").pages(order, 65536), mine.pages(order, 65536))
            assert_same(cupy.asnumpy(target), pattern(N * 65536))
            target[:] = 9
            cupy.cuda.Device().synchronize()
            await agent.transfer(mine, peer.region("kv"))
            assert await other.ask("digest", name="kv") == sha(np.full(N * 65536, 9, np.uint8))


@needs_two
async def test_a_device_that_is_not_visible_is_named(cupy: Any) -> None:
    # Seen from the process that has one device only.
    program = (
        "import asyncio, sys, cupy\n"
        "from nixl_async import Agent\n"
        "async def main():\n"
        "    async with Agent('one', backends=['cuda_ipc'], authenticate=False) as agent:\n"
        "        peer = await agent.connect(('127.0.0.1', int(sys.argv[1])))\n"
        "        mine = await agent.register(cupy.zeros(4096, cupy.uint8))\n"
        "        print(agent.explain(mine, peer.region('kv')))\n"
        "asyncio.run(main())\n"
    )
    async with owner(device=1) as other:
        await other.ask("register", name="kv", nbytes=4096)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            str(other.port),
            stdout=asyncio.subprocess.PIPE,
            env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "0"},
        )
        out, _ = await process.communicate()
    assert b"is not visible in this process (CUDA_VISIBLE_DEVICES)" in out

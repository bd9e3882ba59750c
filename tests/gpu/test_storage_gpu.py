"""A device's memory to and from host memory, files, stores and peers. Needs a CUDA device, cupy, and for GDS kvikio.

It stands alone: `python -m pytest --confcutdir=tests/gpu tests/gpu`, with pytest, pytest-asyncio, pytest-timeout and numpy.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, BackendError, DescriptorError, NotFoundError, PartsFailed, RegistrationError
from nixl_async.cuda import DeviceBytes, device_count, device_of
from nixl_async.descriptors import MemoryKind
from nixl_async.staging import StagingBackend
from nixl_async.testing import assert_same, pattern

has_kvikio = importlib.util.find_spec("kvikio") is not None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device_count() == 0, reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="no cupy"),
    # cupy and kvikio warn of what they find in other packages.
    pytest.mark.filterwarnings("default"),
]
needs_kvikio = pytest.mark.skipif(not has_kvikio, reason="no kvikio")

PAGE = 16384
N = 256
POISON = 0xEE


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy")


def upload(cupy: Any, content: Any) -> Any:
    made = cupy.asarray(content)
    # A transfer waits for no stream of the caller's.
    cupy.cuda.Device().synchronize()
    return made


def download(cupy: Any, array: Any) -> Any:
    return cupy.asnumpy(array)


def filled(cupy: Any, nbytes: int, value: int) -> Any:
    made = cupy.full(nbytes, value, cupy.uint8)
    cupy.cuda.Device().synchronize()
    return made


@asynccontextmanager
async def gpu_agent(*backends: Any, name: str = "gpu") -> AsyncIterator[Agent]:
    async with Agent(name, backends=["cuda", "memory", "posix", "directory", *backends], authenticate=False) as agent:
        yield agent


FILE_ROUTES = [pytest.param("gds", marks=needs_kvikio), "staging"]


def with_route(route: str) -> list[Any]:
    return ["gds"] if route == "gds" else []


# Registering.


async def test_arrays_of_the_device_are_registered(cupy: Any) -> None:
    async with gpu_agent() as agent:
        for array in (
            cupy.zeros((3, 5), cupy.float32),
            cupy.zeros(7, cupy.float16),
            cupy.zeros((8, 8))[2:4],
            DeviceBytes(cupy.zeros(4096, cupy.uint8).data.ptr, 1),
        ):
            async with await agent.register(array) as region:
                assert (region.kind, region.device) == (MemoryKind.VRAM, 0)
                assert device_of(region.address) == 0
                assert "cuda" in region.keys
        for wrong in (cupy.zeros((8, 8))[:, ::2], cupy.zeros((8, 8)).T[:3], cupy.zeros(0)):
            with pytest.raises(RegistrationError):
                await agent.register(wrong)
        host = np.zeros(100, np.uint8)
        with pytest.raises(RegistrationError, match="no device memory"):
            await agent.register(DeviceBytes(host.ctypes.data, 100))


async def test_torch_tensors_are_registered(cupy: Any) -> None:
    torch = pytest.importorskip("torch")
    async with gpu_agent() as agent:
        for kind in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            tensor = torch.zeros(1000, device="cuda").to(kind)
            torch.cuda.synchronize()
            async with await agent.register(tensor) as region:
                assert (region.kind, region.nbytes) == (MemoryKind.VRAM, tensor.numel() * tensor.element_size())
                source = await agent.register(pattern(region.nbytes))
                await agent.transfer(source, region)
                back = np.zeros(region.nbytes, np.uint8)
                await agent.transfer(region, await agent.register(back))
                assert_same(back, pattern(region.nbytes))
        with pytest.raises(RegistrationError):
            await agent.register(torch.zeros((8, 8), device="cuda")[:, ::2])


# Device and host.


@pytest.mark.parametrize("page", [1, 511, 4096, 65536])
async def test_pages_between_device_and_host(cupy: Any, page: int) -> None:
    mine, theirs = np.random.default_rng(1).permutation(N), np.random.default_rng(2).permutation(N)
    sent, got = pattern(N * page), np.zeros(N * page, np.uint8)
    device, other = filled(cupy, N * page + 2, POISON), filled(cupy, N * page, POISON)
    async with gpu_agent() as agent:
        host, vram, second = await agent.register(sent), await agent.register(device), await agent.register(other)
        result = await agent.transfer(host.pages(mine, page), vram.pages(theirs, page, offset=1))
        assert (result.route, result.nbytes) == ("cuda", N * page)
        on_device = download(cupy, device)
        assert (on_device[0], on_device[-1]) == (POISON, POISON)
        assert_same(on_device[1:-1].reshape(N, -1)[theirs].ravel(), sent.reshape(N, -1)[mine].ravel())
        await agent.transfer(vram.pages(theirs, page, offset=1), second.pages(mine, page))
        assert_same(download(cupy, other), sent)
        await agent.transfer(second, await agent.register(got))
        assert_same(got, sent)


async def test_large_copies_and_many_at_once(cupy: Any) -> None:
    nbytes = 512 << 20
    sent, got = pattern(nbytes), np.zeros(nbytes, np.uint8)
    device = filled(cupy, nbytes, 0)
    async with gpu_agent() as agent:
        host, vram, back = await agent.register(sent), await agent.register(device), await agent.register(got)
        step = nbytes // 64
        await asyncio.gather(*(agent.transfer(host[i : i + step], vram[i : i + step]) for i in range(0, nbytes, step)))
        await agent.transfer(vram, back)
    assert np.array_equal(got, sent)


async def test_cancelled_copies_are_quiet(cupy: Any) -> None:
    nbytes = 256 << 20
    sent, device = pattern(nbytes), filled(cupy, nbytes, 0)
    async with gpu_agent() as agent:
        host, vram = await agent.register(sent), await agent.register(device)
        cancelled = 0
        for step in range(10):
            cancelled += await cancelled_after(agent.transfer(host, vram), step * 0.004)
            device[:] = POISON
            cupy.cuda.Device().synchronize()
            await asyncio.sleep(0.02)
            assert bool((device == POISON).all()), "the device's memory was written after a transfer was cancelled"
        assert cancelled
        await agent.transfer(host, vram)
        assert np.array_equal(download(cupy, device), sent)


async def cancelled_after(coroutine: Any, seconds: float) -> bool:
    task = asyncio.create_task(coroutine)
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


# Device and files.


@pytest.mark.parametrize("route", FILE_ROUTES)
@pytest.mark.parametrize("direct", [False, True])
async def test_pages_between_device_and_file(cupy: Any, tmp_path: Path, route: str, direct: bool) -> None:
    mine, theirs = np.random.default_rng(1).permutation(N), np.random.default_rng(2).permutation(N)
    sent = pattern(N * PAGE)
    source, target = upload(cupy, sent), filled(cupy, N * PAGE, POISON)
    async with gpu_agent(*with_route(route)) as agent:
        vram, back = await agent.register(source), await agent.register(target)
        try:
            file = await agent.file(tmp_path / "f", "w", nbytes=N * PAGE, direct=direct, publish=True)
        except ValueError as error:
            pytest.skip(str(error))
        async with file:
            explained = agent.explain(vram.pages(mine, PAGE), file.pages(theirs, PAGE))
            assert explained.route == route, str(explained)
            print(explained)
            await agent.transfer(vram.pages(mine, PAGE), file.pages(theirs, PAGE))
        stored = np.frombuffer((tmp_path / "f").read_bytes(), np.uint8)
        assert_same(stored.reshape(N, -1)[theirs].ravel(), sent.reshape(N, -1)[mine].ravel())
        async with agent.file(tmp_path / "f", direct=direct) as file:
            await agent.transfer(file.pages(theirs, PAGE), back.pages(mine, PAGE))
        assert_same(download(cupy, target), sent)
        if route == "gds":
            found = agent._backends["gds"].statistics()  # type: ignore[attr-defined]
            assert (found.read_nbytes, found.written_nbytes) == (N * PAGE, N * PAGE)
            print(found)


@pytest.mark.parametrize("route", FILE_ROUTES)
async def test_odd_ranges_of_a_file(cupy: Any, tmp_path: Path, route: str) -> None:
    sent = pattern(3_000_001)
    source, target = upload(cupy, sent), filled(cupy, 3_000_001, POISON)
    async with gpu_agent(*with_route(route)) as agent, agent.file(tmp_path / "f", "w") as file:
        vram, back = await agent.register(source), await agent.register(target)
        await agent.transfer(vram[1:2_999_998], file[13:3_000_010])
        await agent.transfer(file[13:3_000_010], back[2:2_999_999])
        got = download(cupy, target)
    assert_same(got[2:2_999_999], sent[1:2_999_998])
    assert (got[:2] == POISON).all()
    assert (got[2_999_999:] == POISON).all()


@pytest.mark.parametrize("route", FILE_ROUTES)
async def test_a_file_that_ends_too_early(cupy: Any, tmp_path: Path, route: str) -> None:
    (tmp_path / "f").write_bytes(bytes(100_000))
    async with gpu_agent(*with_route(route)) as agent, agent.file(tmp_path / "f") as file:
        vram = await agent.register(filled(cupy, 100_000, POISON))
        (tmp_path / "f").write_bytes(bytes(50_000))
        with pytest.raises(BackendError):
            await agent.transfer(file, vram)
        with pytest.raises(DescriptorError, match="read-only"):
            await agent.transfer(vram, file)


@pytest.mark.parametrize("route", FILE_ROUTES)
async def test_cancelled_file_copies_are_quiet(cupy: Any, tmp_path: Path, route: str) -> None:
    nbytes = 64 << 20
    sent, device = pattern(nbytes), filled(cupy, nbytes, POISON)
    async with gpu_agent(*with_route(route)) as agent:
        async with agent.file(tmp_path / "f", "w", nbytes=nbytes) as file:
            await agent.transfer(await agent.register(sent), file)
        async with agent.file(tmp_path / "f") as file:
            vram = await agent.register(device)
            cancelled = 0
            for step in range(10):
                cancelled += await cancelled_after(agent.transfer(file, vram), step * 0.003)
                device[:] = POISON
                cupy.cuda.Device().synchronize()
                await asyncio.sleep(0.02)
                assert bool((device == POISON).all()), "the device's memory was written after a transfer was cancelled"
            assert cancelled
            await agent.transfer(file, vram)
    assert np.array_equal(download(cupy, device), sent)


# Device and objects.


@pytest.mark.parametrize("nbytes", [10_000, PAGE, 300_000], ids=["odd", "pages", "in pieces"])
async def test_many_objects_to_and_from_the_device(cupy: Any, tmp_path: Path, nbytes: int) -> None:
    n = 40
    sent = pattern(n * nbytes)
    source, target = upload(cupy, sent), filled(cupy, n * nbytes, POISON)
    order = np.random.default_rng(3).permutation(n)
    staging = StagingBackend(buffer_nbytes=128 << 10, n_buffers=3)
    async with gpu_agent(staging) as agent:
        store = await agent.store(f"file://{tmp_path}/store")
        objects = store.objects([f"o{i}" for i in range(n)], nbytes)
        vram, back = await agent.register(source), await agent.register(target)
        explained = agent.explain(vram, objects)
        assert (explained.route, explained.how) == ("staging", "cuda, then directory")
        transfer = agent.submit(vram.pages(order, nbytes), objects.select(order))
        assert sorted([part.index async for part in transfer.parts()]) == list(range(n))
        await transfer
        await agent.transfer(objects, back)
        assert_same(download(cupy, target), sent)
        assert 0 < staging.peak_nbytes <= 3 * (128 << 10)
        # Some are missing: the others arrive.
        await store.delete(["o3", "o5"])
        target[:] = POISON
        cupy.cuda.Device().synchronize()
        transfer = agent.submit(objects, back)
        errors = {part.index: type(part.error) async for part in transfer.parts() if part.error}
        assert errors == {3: NotFoundError, 5: NotFoundError}
        with pytest.raises(PartsFailed):
            await transfer
        got = download(cupy, target).reshape(n, -1)
    for i in range(n):
        assert (got[i] == POISON).all() if i in (3, 5) else np.array_equal(got[i], sent.reshape(n, -1)[i])


async def test_cancelled_object_copies_are_quiet(cupy: Any, tmp_path: Path) -> None:
    nbytes = 64 << 20
    device = upload(cupy, pattern(nbytes))
    async with gpu_agent() as agent:
        store = await agent.store(f"file://{tmp_path}/store")
        vram = await agent.register(device)
        await agent.transfer(vram, store.object("a"))
        cancelled = 0
        for step in range(10):
            cancelled += await cancelled_after(agent.transfer(store.object("a", nbytes), vram), step * 0.004)
            device[:] = POISON
            cupy.cuda.Device().synchronize()
            await asyncio.sleep(0.02)
            assert bool((device == POISON).all()), "the device's memory was written after a transfer was cancelled"
            cancelled += await cancelled_after(agent.transfer(vram, store.object("b")), step * 0.004)
            assert [str(path) for path in (tmp_path / "store").iterdir() if path.suffix == ".part"] == []
        assert cancelled
        await agent.transfer(store.object("a", nbytes), vram)
    assert np.array_equal(download(cupy, device), pattern(nbytes))


# What there is no way for, and what remains without GDS.


async def test_a_peers_memory_and_the_device(cupy: Any) -> None:
    async with gpu_agent("tcp") as agent, Agent("peer", backends=["tcp"], authenticate=False) as peer:
        await peer.register(np.zeros(100, np.uint8), name="theirs")
        host, port = await peer.serve("127.0.0.1", 0)
        remote = (await agent.connect((host, port))).region("theirs")
        vram = await agent.register(filled(cupy, 100, 1))
        explained = agent.explain(vram, remote)
        assert (explained.route, explained.how) == ("staging", "cuda, then tcp")
        assert "DRAM only" in explained.refusals["tcp"]


async def test_default_agents_have_the_backends(cupy: Any, tmp_path: Path) -> None:
    async with Agent("default", authenticate=False) as agent, agent.file(tmp_path / "f", "w", nbytes=4096) as file:
        vram = await agent.register(filled(cupy, 4096, 1))
        explained = agent.explain(vram, file)
        assert explained.route == ("gds" if has_kvikio else "staging")
        assert explained.routes[-1] == "staging"
        await agent.transfer(vram, file)
        await agent.transfer(vram, file, backend="staging")

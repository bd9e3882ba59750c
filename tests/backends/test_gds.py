"""The gds backend where there is no device: what it says, and, against a stand-in for kvikio, what it asks of it.

Copies to and from a device's memory: tests/gpu.
"""

from __future__ import annotations

import asyncio
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, BackendError, MemoryRegion, NoRoute
from nixl_async.backend import Op
from nixl_async.backends.gds import GDSBackend
from nixl_async.cuda import DeviceBytes, device_count
from nixl_async.descriptors import make_plan
from nixl_async.memory import open_buffer
from nixl_async.native import ffi
from nixl_async.testing import assert_same, pattern
from nixl_async.tiers import Files, Tiers
from tests.agents import TOKEN


@pytest.mark.skipif(device_count() > 0, reason="this machine has a CUDA device")
async def test_files_take_other_routes_where_it_is_not_there(tmp_path: Path) -> None:
    async with Agent("a", token=TOKEN) as agent, agent.file(tmp_path / "f", "w") as file:
        explained = agent.explain(await agent.register(np.zeros(10, np.uint8)), file)
        assert explained.route == "posix"
        assert "libcuda" in explained.refusals["gds"]


class HostFile:
    """What kvikio's CuFile does, with memory of this process in the device's place."""

    threads = ThreadPoolExecutor(2, thread_name_prefix="stand-in")
    opened = 0
    fail_at: int | None = None

    def __init__(self, path: str, flags: str) -> None:
        self._file = open(path, {"r": "rb", "r+": "r+b"}[flags])  # noqa: SIM115
        HostFile.opened += 1

    def close(self) -> None:
        self._file.close()
        HostFile.opened -= 1

    def pread(self, memory: DeviceBytes, nbytes: int, offset: int) -> Any:
        return self._later(self._read, memory, nbytes, offset)

    def pwrite(self, memory: DeviceBytes, nbytes: int, offset: int) -> Any:
        return self._later(self._write, memory, nbytes, offset)

    def _later(self, work: Any, memory: DeviceBytes, nbytes: int, offset: int) -> Any:
        view = ffi.buffer(ffi.cast("char *", memory.__cuda_array_interface__["data"][0]), nbytes)
        future = self.threads.submit(work, view, nbytes, offset)
        return types.SimpleNamespace(get=future.result)

    def _read(self, view: Any, nbytes: int, offset: int) -> int:
        if offset == HostFile.fail_at:
            raise RuntimeError("the device is on fire")
        found = os.pread(self._file.fileno(), nbytes, offset)
        view[: len(found)] = found
        return len(found)

    def _write(self, view: Any, nbytes: int, offset: int) -> int:
        return os.pwrite(self._file.fileno(), view, offset)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put modules in kvikio's place, and say that there is a device with whatever memory."""
    kvikio, defaults = types.ModuleType("kvikio"), types.ModuleType("kvikio.defaults")
    settings = {"compat_mode": types.SimpleNamespace(name="ON"), "num_threads": 2}
    defaults.get = settings.__getitem__  # type: ignore[attr-defined]
    kvikio.CuFile, kvikio.defaults = HostFile, defaults  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvikio", kvikio)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)
    monkeypatch.setattr("nixl_async.cuda.device_count", lambda: 1)
    monkeypatch.setattr("nixl_async.cuda.device_of", lambda address: 0)
    monkeypatch.setattr(HostFile, "threads", ThreadPoolExecutor(2))
    monkeypatch.setattr(HostFile, "fail_at", None)


@pytest.fixture
def threads_end(stand_in: None) -> Any:
    yield
    HostFile.threads.shutdown()


@pytest.mark.usefixtures("threads_end")
async def test_pages_go_to_their_places_in_files_and_back(tmp_path: Path) -> None:
    sent, got = pattern(64 * 1000), np.zeros(64 * 1000, np.uint8)
    order = np.random.default_rng(1).permutation(64)
    gds = GDSBackend()
    async with Agent("a", backends=[gds, "posix"]) as agent:
        device, back = (
            await agent.register(DeviceBytes(sent.ctypes.data, 64_000)),
            await agent.register(DeviceBytes(got.ctypes.data, 64_000)),
        )
        async with (
            agent.file(tmp_path / "f", "w", nbytes=32_000, publish=True) as file,
            agent.file(tmp_path / "g", "w") as other,
        ):
            plan = device.pages(order, 1000), [file[:], other[1000:33_000]]
            assert "gds (kvikio, compat mode ON)" in str(agent.explain(*plan))
            await agent.transfer(*plan)
            await agent.transfer([file[:], other[1000:33_000]], back.pages(order, 1000))
        assert_same(got, sent)
        found = gds.statistics()
        assert (found.compat_mode, found.threads, found.read_nbytes, found.written_nbytes) == ("ON", 2, 64_000, 64_000)
        assert found.ops == 2
    assert HostFile.opened == 0
    assert (tmp_path / "f").read_bytes() == sent.reshape(64, -1)[order].tobytes()[:32_000]


@pytest.mark.usefixtures("threads_end")
@pytest.mark.parametrize("direct", [False, True])
async def test_tiers_that_sum_nothing_up_move_blocks_of_a_device_by_it(tmp_path: Path, direct: bool) -> None:
    sent, got = pattern(64 * 4096), np.zeros(64 * 4096, np.uint8)
    keys = [bytes([at]) for at in range(64)]
    gds = GDSBackend()
    files = Files(tmp_path, 64 * 4096, segment_nbytes=16 * 4096, direct=direct)
    async with (
        Agent("a", backends=[gds, "posix"]) as agent,
        Tiers(agent, [files], block_nbytes=4096, checksum=False, verify=False) as tiers,
    ):
        device = await agent.register(DeviceBytes(sent.ctypes.data, sent.nbytes))
        back = await agent.register(DeviceBytes(got.ctypes.data, got.nbytes))
        order = np.random.default_rng(1).permutation(64)
        assert all(await tiers.put([keys[at] for at in order], device.pages(order, 4096)))
        assert all(await tiers.get(keys, back.pages(range(64), 4096)))
        found = gds.statistics()
        assert (found.written_nbytes, found.read_nbytes) == (sent.nbytes, sent.nbytes)
    assert_same(got, sent)


@pytest.mark.usefixtures("threads_end")
@pytest.mark.parametrize("what", ["short", "broken"])
async def test_failures_are_errors_of_the_backend(tmp_path: Path, what: str) -> None:
    (tmp_path / "f").write_bytes(bytes(10_000))
    got = np.zeros(10_000, np.uint8)
    gds = GDSBackend()
    async with Agent("a", backends=[gds, "posix"]) as agent:
        back = await agent.register(DeviceBytes(got.ctypes.data, 10_000))
        async with agent.file(tmp_path / "f") as file:
            if what == "short":
                (tmp_path / "f").write_bytes(bytes(5000))
            else:
                HostFile.fail_at = 4000
            with pytest.raises(BackendError, match="file ends" if what == "short" else "on fire"):
                await agent.transfer(file.pages(range(9, -1, -1), 1000), back.pages(range(10), 1000))
    assert HostFile.opened == 0


@pytest.mark.usefixtures("threads_end")
async def test_a_cancelled_copy_is_waited_for(tmp_path: Path) -> None:
    sent = pattern(1 << 20)
    gds = GDSBackend()
    async with Agent("a", backends=[gds, "posix"]) as agent, agent.file(tmp_path / "f", "w", nbytes=1 << 20) as file:
        device = await agent.register(DeviceBytes(sent.ctypes.data, 1 << 20))
        task = asyncio.create_task(agent.transfer(device, file))
        for _ in range(4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert HostFile.opened == 0
        host = MemoryRegion("host", open_buffer(np.zeros(10, np.uint8)), _closed)
        plan = make_plan(host, file[:10])
        assert "VRAM and files, not DRAM" in (gds.refusal(plan.src, plan.dst) or "")
        with pytest.raises(NoRoute):
            await agent.transfer(device[:10], device[10:20])
    with pytest.raises(BackendError, match="closed"):
        await gds.copy(Op(1, plan, None, False))


async def _closed(region: MemoryRegion) -> None:
    pass

"""The cuda_ipc backend where there is no device: keys, who is on this host, and what is refused why. Copies: tests/gpu."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from nixl_async import Agent, BackendError, MemoryRegion, MissingDependency, PeerLost, load_backend
from nixl_async.backend import Host, Op, PeerInfo
from nixl_async.backends import cuda_ipc
from nixl_async.backends.cuda_ipc import CUDAIPCBackend
from nixl_async.backends.cuda_ipc_keys import Place, Shared, began, decode_key, refused_key
from nixl_async.cuda import DeviceBytes, device_count
from nixl_async.descriptors import MemoryKind, Plan, Side
from nixl_async.memory import RemoteRegion, open_buffer
from tests.agents import TOKEN
from tests.cuda_host import stand_in

needs_no_device = pytest.mark.skipif(device_count() > 0, reason="this machine has a CUDA device")
HERE = Place.here()
SHARED = Shared(bytes(range(64)), b"\x07" * 16, 512, 4096)


@needs_no_device
async def test_without_a_device_it_says_what_is_missing() -> None:
    with pytest.raises(MissingDependency, match=r"the cuda_ipc backend needs a CUDA driver \(libcuda.so.1\)"):
        load_backend("cuda_ipc")
    async with Agent("a", token=TOKEN) as agent:
        here = await agent.register(np.zeros(100, np.uint8))
        assert "libcuda" in agent.explain(here[:50], here[50:]).refusals["cuda_ipc"]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that there are two devices that reach themselves only."""
    for name in ("need_device", "need_cupy", "check_region"):
        monkeypatch.setattr(cuda_ipc, name, lambda what: None)
    monkeypatch.setattr(cuda_ipc, "device_by_uuid", {b"\x07" * 16: 0, b"\x08" * 16: 1}.get)
    monkeypatch.setattr(cuda_ipc, "reaches", lambda device, other: device == other)


@pytest.fixture
async def backend(pretend: None) -> AsyncIterator[CUDAIPCBackend]:
    made = CUDAIPCBackend()
    await made.open(Host("a", "1", asyncio.get_running_loop()))
    yield made
    await made.aclose()


async def nothing(region: MemoryRegion) -> None:
    pass


def ours(device: int = 0) -> Side:
    region = MemoryRegion("mine", open_buffer(DeviceBytes(0x10000, 4096)), nothing)
    region.device = device
    return Side(region.alone, np.array([0x10000]))


def theirs(key: bytes | None = None, kind: MemoryKind = MemoryKind.VRAM, nbytes: int = 4096) -> Side:
    keys = {} if key is None else {"cuda_ipc": key}
    region = RemoteRegion("peer", "2", "kv", 0x20000, nbytes, kind=kind, keys=keys)
    return Side(region.alone, np.array([0x20000]))


async def connect(backend: CUDAIPCBackend, **changes: Any) -> None:
    # Of a process whose ids mean nothing here.
    place = dataclasses.replace(HERE, **({"secret": "another", "pids": 1} | changes))
    await backend.connect(PeerInfo("peer", "2", place.encode()))


def test_keys_say_what_was_shared_or_why_not() -> None:
    assert decode_key(SHARED.encode()) == SHARED
    assert decode_key(refused_key("its memory is managed")) == "its memory is managed"
    assert decode_key(b"") == "it is not registered with cuda_ipc"
    for wrong in (SHARED.encode()[:-1], SHARED.encode() + b"x", b"\x02" + SHARED.encode()[1:]):
        assert "none of this backend's" in str(decode_key(wrong))
    # A reason is a peer's text: it is cut.
    assert len(str(decode_key(refused_key("x" * 100_000)))) < 1000


def test_places_are_read_as_they_were_written() -> None:
    assert Place.decode(HERE.encode()) == HERE
    assert HERE.pid == os.getpid()
    for wrong in (b"", b"{}", b"[1]", b"\xff", HERE.encode()[:-1], dataclasses.replace(HERE, pid=0).encode()):
        with pytest.raises(ValueError, match=r"place of a process|Expecting|codec|delimiter"):
            Place.decode(wrong)


@pytest.mark.parametrize(
    ("changes", "reason"), [({"boot": "other"}, "on another host"), ({"ipc": 1}, "another IPC namespace.*--ipc=host")]
)
async def test_peers_elsewhere_are_refused(backend: CUDAIPCBackend, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        await connect(backend, **changes)
    assert backend.refusal(ours(), theirs(SHARED.encode())) == "it copies to and from other processes of this host only"
    with pytest.raises(BackendError, match="described itself wrongly"):
        await backend.connect(PeerInfo("peer", "2", b"[]"))


async def test_a_process_that_is_not_the_peer_is_refused(backend: CUDAIPCBackend) -> None:
    with pytest.raises(BackendError, match=f"process {HERE.pid} is not peer 'peer'"):
        await connect(backend, pids=HERE.pids, began=HERE.began + 1)
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await child.wait()
    with pytest.raises(BackendError, match=f"process {child.pid}: .*No such process"):
        await connect(backend, pids=HERE.pids, pid=child.pid)


async def test_what_cannot_be_copied_is_refused_with_the_reason(backend: CUDAIPCBackend) -> None:
    await connect(backend)
    good = SHARED.encode()
    assert backend.refusal(ours(), theirs(good)) is None
    assert backend.refusal(theirs(good), ours()) is None
    refusals = {
        "VRAM only, not VRAM to DRAM": (ours(), theirs(good, MemoryKind.DRAM)),
        "between this process and a peer only": (ours(), ours()),
        "region 'kv' of peer 'peer': it is not registered with cuda_ipc": (ours(), theirs()),
        "kv' of peer 'peer': use cudaMalloc": (theirs(refused_key("use cudaMalloc")), ours()),
        "no peer access": (ours(device=1), theirs(good)),
        f"GPU-{'09' * 16} is not visible in this process (CUDA_VISIBLE_DEVICES)": (
            ours(),
            theirs(dataclasses.replace(SHARED, uuid=b"\x09" * 16).encode()),
        ),
    }
    for reason, sides in refusals.items():
        assert reason in (backend.refusal(*sides) or "")
    await backend.disconnect("peer")
    assert "other processes of this host" in (backend.refusal(ours(), theirs(good)) or "")


async def test_agents_of_one_process_need_no_key(backend: CUDAIPCBackend) -> None:
    await connect(backend, secret=HERE.secret)
    assert backend.refusal(ours(), theirs()) is None
    assert "does not reach device 0" in (backend.refusal(ours(device=1), theirs()) or "")


async def test_memory_that_cannot_be_shared_has_a_key_that_says_so(
    backend: CUDAIPCBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    region = ours().regions[0]
    assert isinstance(region, MemoryRegion)
    monkeypatch.setattr(cuda_ipc, "why_not_shared", lambda region: f"{region.name} is managed")
    assert decode_key(await backend.register(region)) == "mine is managed"
    monkeypatch.setattr(cuda_ipc, "why_not_shared", lambda region: "")
    monkeypatch.setattr(cuda_ipc, "allocation_of", lambda address, device: (address - 256, 1 << 20))
    monkeypatch.setattr(cuda_ipc, "export_handle", lambda base, device: base.to_bytes(64, "little"))
    monkeypatch.setattr(cuda_ipc, "device_uuid", lambda device: b"\x07" * 16)
    shared = decode_key(await backend.register(region))
    assert shared == Shared((0x10000 - 256).to_bytes(64, "little"), b"\x07" * 16, 256, 4096)


async def test_ops_of_a_peer_whose_process_has_ended_are_lost(backend: CUDAIPCBackend) -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
    await connect(backend, pids=HERE.pids, pid=child.pid, began=began(child.pid))
    child.kill()
    await child.wait()
    op = Op(1, Plan(ours(), theirs(SHARED.encode()), np.array([4096]), 4096, ()), "peer", True)
    with pytest.raises(PeerLost, match="the process of peer 'peer' has ended"):
        await backend.copy(op)
    with pytest.raises(PeerLost):
        backend.copy_now(op)
    await backend.disconnect("peer")
    with pytest.raises(PeerLost, match="not connected"):
        await backend.copy(op)


async def test_a_key_of_less_than_the_region_is_an_error(backend: CUDAIPCBackend) -> None:
    await connect(backend)
    op = Op(1, Plan(ours(), theirs(SHARED.encode(), nbytes=8192), np.array([4096]), 4096, ()), "peer", True)
    with pytest.raises(BackendError, match="wrong key"):
        await backend.copy(op)


async def test_it_is_open_between_open_and_close(pretend: None) -> None:
    made = CUDAIPCBackend()
    assert (made.name, made.remote, made.kinds) == ("cuda_ipc", True, {MemoryKind.VRAM})
    region = ours().regions[0]
    assert isinstance(region, MemoryRegion)
    with pytest.raises(BackendError, match="not open"):
        await made.register(region)
    await made.aclose()

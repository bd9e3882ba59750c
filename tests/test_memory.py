from __future__ import annotations

import array
import asyncio
import ctypes
import gc
import mmap
import os
import subprocess
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async.descriptors import MemoryKind
from nixl_async.errors import ClosedError, DescriptorError, NixlError, PeerLost, RegistrationError
from nixl_async.memory import Buffer, MemoryRegion, RemoteRegion, open_buffer
from tests.agents import ROOT


def content(buffer: Buffer) -> bytes:
    return ctypes.string_at(buffer.address, buffer.nbytes)


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (bytearray(b"hello"), b"hello"),
        (memoryview(bytearray(b"hello"))[1:3], b"el"),
        (array.array("H", [1, 2]), b"\1\0\2\0"),
        ((ctypes.c_uint8 * 3)(7, 8, 9), b"\7\x08\x09"),
        (np.arange(6, dtype=np.uint8).reshape(2, 3), bytes(range(6))),
        (np.arange(6, dtype=np.uint8)[2:4], b"\2\3"),
        (np.array(7, np.int32), b"\7\0\0\0"),
        (np.ones(1, np.float16), b"\0\x3c"),
        (np.zeros(2, [("a", "u1"), ("b", "u2")]), bytes(6)),
    ],
)
def test_every_buffer_shows_its_own_bytes(obj: Any, expected: bytes) -> None:
    buffer = open_buffer(obj)
    assert content(buffer) == expected
    assert (buffer.kind, buffer.device, buffer.readonly) == (MemoryKind.DRAM, 0, False)


@pytest.mark.parametrize("obj", [b"constant", memoryview(b"constant"), bytearray(b"constant")])
def test_read_only_memory_is_taken_and_marked(obj: Any) -> None:
    buffer = open_buffer(obj)
    assert content(buffer) == b"constant"
    assert buffer.readonly is memoryview(obj).readonly


def test_a_read_only_array_is_marked() -> None:
    sealed = np.arange(4, dtype=np.uint8)
    sealed.flags.writeable = False
    assert open_buffer(sealed).readonly


def test_mapped_and_shared_memory() -> None:
    with mmap.mmap(-1, 8192) as mapped:
        mapped[:3] = b"abc"
        buffer = open_buffer(mapped)
        assert (content(buffer)[:3], buffer.nbytes) == (b"abc", 8192)
        with pytest.raises(BufferError):
            mapped.close()
        del buffer
        gc.collect()
    with open(os.memfd_create("test"), "wb") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE) as shared:
            shared[:2] = b"hi"
            assert content(open_buffer(shared))[:2] == b"hi"
            gc.collect()


def test_a_registered_bytearray_cannot_be_resized() -> None:
    memory = bytearray(16)
    buffer = open_buffer(memory)
    with pytest.raises(BufferError):
        memory.extend(b"more")
    del buffer
    memory.extend(b"more")


@pytest.mark.parametrize(
    ("obj", "match"),
    [
        (b"", "no bytes"),
        (bytearray(), "no bytes"),
        (np.zeros(0), "no bytes"),
        (np.zeros((4, 0)), "no bytes"),
        (np.zeros((4, 4))[:, :2], "not C-contiguous"),
        (np.zeros((4, 4)).T[1:], "not C-contiguous"),
        (np.zeros(8)[::2], "not C-contiguous"),
        (np.zeros(8)[::-1], "not C-contiguous"),
        (np.zeros((2, 3), order="F"), "not C-contiguous"),
        (memoryview(bytearray(8))[::2], "not C-contiguous"),
        ("text", "builtins.str object"),
        (17, "builtins.int object"),
        (None, "NoneType"),
        ([1, 2], "builtins.list object"),
        ({}, "builtins.dict object"),
        (object(), "neither the buffer protocol"),
        (np.array([object(), None]), "numpy.ndarray object"),
        (np.zeros(2, "M8[s]"), "numpy.ndarray object"),
    ],
)
def test_what_cannot_be_registered_is_refused_by_name(obj: Any, match: str) -> None:
    with pytest.raises(RegistrationError, match=match):
        open_buffer(obj)


def test_a_released_memoryview_is_refused() -> None:
    view = memoryview(bytearray(8))
    view.release()
    with pytest.raises(RegistrationError):
        open_buffer(view)


class OnDevice:
    """Shows memory the way cupy and numba do."""

    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f4", "data": (0x7000, False), "version": 3, **interface}


@pytest.mark.parametrize(
    ("interface", "nbytes"),
    [({}, 24), ({"strides": (12, 4)}, 24), ({"shape": (), "strides": None}, 4), ({"shape": (1, 5), "strides": (999, 4)}, 20)],
)
def test_cuda_memory_is_described(interface: dict[str, Any], nbytes: int) -> None:
    buffer = open_buffer(OnDevice(**interface))
    assert (buffer.address, buffer.nbytes, buffer.kind, buffer.readonly) == (0x7000, nbytes, MemoryKind.VRAM, False)
    assert open_buffer(OnDevice(data=(0x7000, True))).readonly


@pytest.mark.parametrize(
    "interface", [{"strides": (4, 8)}, {"strides": (24, 4)}, {"strides": (12, 8)}, {"shape": (4,), "strides": (8,)}]
)
def test_cuda_memory_with_gaps_is_refused(interface: dict[str, Any]) -> None:
    with pytest.raises(RegistrationError, match="not C-contiguous"):
        open_buffer(OnDevice(**interface))


class CudaTensor:
    """Shows memory the way torch does; of some types it cannot say the name."""

    is_cuda = True

    def __init__(self, contiguous: bool = True, index: int | None = 2) -> None:
        self._contiguous = contiguous
        self.device = types.SimpleNamespace(index=index)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise KeyError("bfloat16")

    def data_ptr(self) -> int:
        return 0x7000

    def numel(self) -> int:
        return 12

    def element_size(self) -> int:
        return 2

    def is_contiguous(self) -> bool:
        return self._contiguous


def test_cuda_tensors_of_any_type_are_described() -> None:
    buffer = open_buffer(CudaTensor())
    assert (buffer.address, buffer.nbytes, buffer.kind, buffer.device) == (0x7000, 24, MemoryKind.VRAM, 2)
    assert open_buffer(CudaTensor(index=None)).device == 0
    with pytest.raises(RegistrationError, match="contiguous"):
        open_buffer(CudaTensor(contiguous=False))


def test_cuda_memory_that_does_not_show_its_bytes_is_refused() -> None:
    class Nameless(CudaTensor):
        is_cuda = False

    with pytest.raises(RegistrationError, match="bfloat16"):
        open_buffer(Nameless())
    with pytest.raises(RegistrationError, match="masked"):
        open_buffer(OnDevice(mask=OnDevice()))


def test_empty_cuda_memory_is_refused() -> None:
    with pytest.raises(RegistrationError, match="no bytes"):
        open_buffer(OnDevice(shape=(0, 3), data=(0, False)))


class Capsuled:
    """Shows memory through DLPack only."""

    def __init__(self, memory: Any, device: tuple[int, int] | None = None) -> None:
        self._memory, self._device = memory, device

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device or self._memory.__dlpack_device__()


def test_dlpack_on_the_cpu_shows_its_own_bytes() -> None:
    memory = np.arange(5, dtype=np.int32)
    buffer = open_buffer(Capsuled(memory))
    assert (buffer.address, buffer.nbytes) == (memory.ctypes.data, 20)
    with pytest.raises(RegistrationError, match="not C-contiguous"):
        open_buffer(Capsuled(np.zeros((4, 4))[:, 1:]))
    with pytest.raises(RegistrationError, match="device 10:3"):
        open_buffer(Capsuled(memory, (10, 3)))
    # It says that it is a device's, and hands out nothing.
    with pytest.raises(RegistrationError, match="through DLPack"):
        open_buffer(Capsuled(memory, (2, 3)))


# Regions


async def closed(region: MemoryRegion) -> None:
    region.keys.clear()


def region_of(obj: Any = None) -> MemoryRegion:
    return MemoryRegion("kv", open_buffer(np.zeros(64, np.uint8) if obj is None else obj), closed)


class Memory(np.ndarray):  # type: ignore[type-arg] - an array that can be referred to weakly
    pass


async def test_a_region_keeps_its_object_alive_until_it_is_closed() -> None:
    memory = np.zeros(64, np.uint8).view(Memory)
    gone = weakref.ref(memory)
    region = region_of(memory)
    del memory
    gc.collect()
    assert gone() is not None
    await region.aclose()
    gc.collect()
    assert gone() is None


async def test_a_closed_region_refuses_and_closing_twice_is_fine() -> None:
    async with region_of() as region:
        region.check_usable()
        assert not region.closed
    assert region.closed
    with pytest.raises(ClosedError, match="'kv' is deregistered"):
        region.check_usable()
    await region.aclose()


async def test_closing_waits_for_every_holder() -> None:
    region = region_of()
    region.hold()
    region.hold()
    task = asyncio.create_task(region.aclose())
    await asyncio.sleep(0)
    with pytest.raises(ClosedError):
        region.check_usable()
    region.release()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    region.release()
    await task


async def test_a_cancelled_close_can_be_repeated() -> None:
    region = region_of()
    region.hold()
    task = asyncio.create_task(region.aclose())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(ClosedError):
        region.check_usable()
    again = asyncio.create_task(region.aclose())
    await asyncio.sleep(0)
    assert not again.done()
    assert region.owner is not None
    region.release()
    await again
    assert region.owner is None
    assert region.keys == {}


async def test_two_closers_both_wait() -> None:
    region = region_of()
    region.hold()
    closers = [asyncio.create_task(region.aclose()) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(closer.done() for closer in closers)
    region.release()
    await asyncio.gather(*closers)


async def test_a_quarantined_region_keeps_its_memory_for_good() -> None:
    region = region_of()
    region.hold()
    region.quarantined = True
    with pytest.raises(ClosedError, match="quarantined"):
        region.check_usable()
    await region.aclose()
    assert region.owner is not None


def test_a_remote_region_says_why_it_is_gone() -> None:
    region = RemoteRegion("decode", "1", "kv", 4096, 100)
    region.check_usable()
    region.withdrawn = "its owner deregistered it"
    with pytest.raises(ClosedError, match="'kv' of peer 'decode' is gone: its owner deregistered it"):
        region.check_usable()
    region.peer_gone = True
    with pytest.raises(PeerLost, match="deregistered it") as caught:
        region.check_usable()
    assert caught.value.peer == "decode"


@pytest.mark.parametrize(
    ("address", "nbytes"), [(0, 1), (-1, 1), (4096, 0), (4096, -1), (2**63 - 1, 1), (1, 2**63), (2**64, 1)]
)
def test_a_remote_region_that_cannot_be_is_refused(address: int, nbytes: int) -> None:
    with pytest.raises((DescriptorError, NixlError)):
        RemoteRegion("decode", "1", "kv", address, nbytes)


@pytest.mark.nixl
def test_torch_tensors() -> None:
    """In the environment of NIXL's wheel, which needs torch: it is too large for the library's own."""
    python = os.environ.get("NIXL_ASYNC_NIXL_PYTHON") or str(ROOT / ".nixl-env/bin/python")
    if not Path(python).exists():
        pytest.skip("no environment with torch: .ci/test makes it")
    program = """
import torch
from nixl_async.errors import RegistrationError
from nixl_async.memory import open_buffer

for dtype in (torch.uint8, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64):
    tensor = torch.ones((3, 5), dtype=dtype)
    buffer = open_buffer(tensor)
    assert (buffer.address, buffer.nbytes) == (tensor.data_ptr(), 15 * tensor.element_size()), dtype
    assert not buffer.readonly, dtype
tensor = torch.arange(12.0).reshape(3, 4)
part = open_buffer(tensor[1])
assert (part.address, part.nbytes) == (tensor.data_ptr() + 16, 16)
assert open_buffer(torch.nn.Parameter(torch.ones(4))).nbytes == 16
for refused in (tensor[:, 1], tensor.t(), torch.empty(0), torch.ones(4).to_sparse(), torch.empty(4, device="meta")):
    try:
        print("taken:", open_buffer(refused))
    except RegistrationError as error:
        assert str(error)
    else:
        raise SystemExit(f"{refused!r} was taken")
print("ok")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, env=environment, timeout=100)
    assert (ran.returncode, ran.stdout.strip()) == (0, "ok"), ran.stdout + ran.stderr

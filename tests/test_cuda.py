"""Whether there is a device, and memory that is said to be one's. What needs a device is in tests/gpu."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest

from nixl_async import MissingDependency, RegistrationError
from nixl_async.cuda import (
    DeviceBytes,
    check_region,
    device_by_uuid,
    device_count,
    device_of,
    need_cupy,
    need_device,
    need_driver,
    pinned_address,
    reaches,
    why_not_shared,
)
from nixl_async.descriptors import MemoryKind
from nixl_async.memory import MemoryRegion, open_buffer

needs_no_device = pytest.mark.skipif(device_count() > 0, reason="this machine has a CUDA device")


async def _closed(region: MemoryRegion) -> None:
    pass


@needs_no_device
def test_without_a_device_it_says_what_is_missing() -> None:
    assert device_count() == 0
    with pytest.raises(MissingDependency, match=r"the warp backend needs a CUDA driver \(libcuda.so.1\)"):
        need_device("warp")


def test_memory_that_no_device_has_is_refused() -> None:
    host = np.zeros(4096, np.uint8)
    assert device_of(host.ctypes.data) is None
    pretended = MemoryRegion("pretended", open_buffer(DeviceBytes(host.ctypes.data, 4096)), _closed)
    assert pretended.kind is MemoryKind.VRAM
    with pytest.raises(RegistrationError, match="4096 bytes"):
        check_region(pretended)
    # What is said to be the host's is not looked at.
    check_region(MemoryRegion("host", open_buffer(host), _closed))


def test_a_region_is_of_the_device_that_the_driver_names(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: dict[int, int] = {}
    monkeypatch.setattr("nixl_async.cuda.device_of", devices.get)
    region = MemoryRegion("r", open_buffer(DeviceBytes(0x7000, 256)), _closed)
    devices[0x7000] = 3
    # It ends in other memory, or in none.
    for last in (None, 2):
        devices[0x70FF] = last  # type: ignore[assignment]
        with pytest.raises(RegistrationError):
            check_region(region)
    devices[0x70FF] = 3
    check_region(region)
    assert region.device == 3


def test_device_bytes_show_what_they_are() -> None:
    shown: dict[str, Any] = DeviceBytes(0x7000, 10).__cuda_array_interface__
    assert (shown["shape"], shown["typestr"], shown["data"], shown["strides"]) == ((10,), "|u1", (0x7000, False), None)


def test_memory_of_the_host_is_pinned_only_where_a_driver_says_so() -> None:
    host = np.zeros(4096, np.uint8)
    assert pinned_address(host.ctypes.data, 4096) is None


def test_pinned_memory_is_pinned_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory type, where devices see it, and the range that is pinned.
    said = {2: 1, 3: 0x9000, 11: 0x7000, 12: 0x1000}
    monkeypatch.setattr("nixl_async.cuda._attribute", lambda address, attribute, kind=None: said.get(attribute))
    assert pinned_address(0x7000, 0x1000) == 0x9000
    assert pinned_address(0x7800, 0x801) is None
    assert pinned_address(0x6FFF, 16) is None
    said[2] = 2
    assert pinned_address(0x7000, 0x1000) is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({10: 1}, ""),
        ({8: 1}, "cudaMallocManaged"),
        ({17: 0xABC}, "cudaMallocAsync.*cupy's default pool"),
        ({10: 0}, "expandable_segments:False"),
    ],
)
def test_memory_that_other_processes_cannot_open_is_named(
    monkeypatch: pytest.MonkeyPatch, said: dict[int, int], reason: str
) -> None:
    monkeypatch.setattr("nixl_async.cuda._attribute", lambda address, attribute, kind=None: said.get(attribute, 0))
    monkeypatch.setattr("nixl_async.cuda.allocation_of", lambda address, device: (0x7000, 4096))
    region = MemoryRegion("kv", open_buffer(DeviceBytes(0x7100, 256)), _closed)
    why = why_not_shared(region)
    assert re.search(reason, why) if reason else why == ""
    assert not why or "region 'kv'" in why
    # It begins in an allocation, and ends behind it.
    longer = MemoryRegion("kv", open_buffer(DeviceBytes(0x7100, 4096)), _closed)
    assert "more than one allocation" in why_not_shared(longer) or reason


@needs_no_device
def test_devices_that_are_not_there() -> None:
    assert device_by_uuid(bytes(16)) is None
    assert reaches(0, 0)
    with pytest.raises(MissingDependency, match="a stream was given, but there is no CUDA driver"):
        need_driver("a stream was given")


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="cupy is installed")
def test_without_cupy_it_says_what_to_install() -> None:
    with pytest.raises(MissingDependency, match=r"the warp backend needs cupy .*pip install 'nixl-async\[cu12\]'"):
        need_cupy("warp")

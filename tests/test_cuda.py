"""Whether there is a device, and memory that is said to be one's. What needs a device is in tests/gpu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nixl_async import MissingDependency, RegistrationError
from nixl_async.cuda import DeviceBytes, check_region, device_count, device_of, need_device
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

"""What the CUDA backends share: whether there is a device, and memory shown to cupy and kvikio by its address."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from nixl_async.descriptors import MemoryKind
from nixl_async.errors import MissingDependency, RegistrationError
from nixl_async.memory import MemoryRegion

# CUpointer_attribute and CUmemorytype, CUDA Driver API, "Unified Addressing".
_MEMORY_TYPE, _DEVICE_ORDINAL = 2, 9
_TYPE_DEVICE = 2


@lru_cache(maxsize=1)
def load_driver() -> Any:
    """Load the driver; `None` if there is none, or it cannot be initialised. No library that needs one is loaded for it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    driver.cuPointerGetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    return driver if driver.cuInit(0) == 0 else None


@lru_cache(maxsize=1)
def device_count() -> int:
    """Return how many CUDA devices the driver has; 0 without a driver."""
    driver, count = load_driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def device_of(address: int) -> int | None:
    """Return the number of the device that has memory at `address`, `None` if none has."""
    driver, found = load_driver(), []
    if driver is None:
        return None
    for attribute in (_MEMORY_TYPE, _DEVICE_ORDINAL):
        value = ctypes.c_int()
        if driver.cuPointerGetAttribute(ctypes.byref(value), attribute, address) != 0:
            return None
        found.append(value.value)
    return found[1] if found[0] == _TYPE_DEVICE else None


def check_region(region: MemoryRegion) -> None:
    """Let the driver say whether a region of VRAM is that, and of which device; not every array that shows its bytes knows.

    Raises:
        RegistrationError: its first or its last byte is no device's.
    """
    if region.kind is not MemoryKind.VRAM:
        return
    first, last = device_of(region.address), device_of(region.address + region.nbytes - 1)
    if first is None or last != first:
        raise RegistrationError(f"the CUDA driver knows no device memory of {region.nbytes} bytes at {region.address:#x}")
    region.device = first


def need_device(backend: str) -> None:
    """Raise unless there is a CUDA device.

    Raises:
        MissingDependency: there is none; the message says what is missing.
    """
    if device_count() == 0:
        raise MissingDependency(f"the {backend} backend needs a CUDA driver (libcuda.so.1) and a device; there is none here")


class DeviceBytes:
    """Bytes of a device's memory, as `__cuda_array_interface__` shows them; whoever holds the region keeps them alive."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "strides": None,
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

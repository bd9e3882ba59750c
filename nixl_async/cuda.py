"""What everything that touches CUDA shares: the driver's functions, contexts, and what the driver knows of devices and memory.

The driver is called by ctypes, which gives up the interpreter's lock meanwhile. It works on the context that is current on the
calling thread: every caller enters the one of the device it means (`entered`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from nixl_async.descriptors import MemoryKind
from nixl_async.errors import BackendError, MissingDependency, RegistrationError
from nixl_async.memory import MemoryRegion

_int, _uint, _size, _pointer, _address = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64
_to = ctypes.POINTER


class IPCHandle(ctypes.Structure):
    """CUipcMemHandle: names an allocation to other processes of the host."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


# CUDA Driver API, cuda.h; every function returns a CUresult.
_SIGNATURES: dict[str, list[Any]] = {
    "cuPointerGetAttribute": [_pointer, _int, _address],
    "cuDeviceGet": [_to(_int), _int],
    "cuDeviceGetUuid_v2": [_pointer, _int],
    "cuDeviceCanAccessPeer": [_to(_int), _int, _int],
    "cuDevicePrimaryCtxRetain": [_to(_pointer), _int],
    "cuCtxPushCurrent_v2": [_pointer],
    "cuCtxPopCurrent_v2": [_to(_pointer)],
    "cuCtxGetCurrent": [_to(_pointer)],
    "cuCtxEnablePeerAccess": [_pointer, _uint],
    "cuCtxGetStreamPriorityRange": [_to(_int), _to(_int)],
    "cuStreamCreate": [_to(_pointer), _uint],
    "cuStreamCreateWithPriority": [_to(_pointer), _uint, _int],
    "cuStreamDestroy_v2": [_pointer],
    "cuStreamGetCtx": [_pointer, _to(_pointer)],
    "cuStreamQuery": [_pointer],
    "cuStreamSynchronize": [_pointer],
    "cuStreamWaitEvent": [_pointer, _pointer, _uint],
    "cuStreamWaitValue32_v2": [_pointer, _address, ctypes.c_uint32, _uint],
    "cuLaunchHostFunc": [_pointer, _pointer, _pointer],
    "cuLaunchKernel": [_pointer, *[_uint] * 7, _pointer, _pointer, _pointer],
    "cuEventCreate": [_to(_pointer), _uint],
    "cuEventDestroy_v2": [_pointer],
    "cuEventElapsedTime": [_to(ctypes.c_float), _pointer, _pointer],
    "cuEventQuery": [_pointer],
    "cuEventRecord": [_pointer, _pointer],
    "cuEventSynchronize": [_pointer],
    "cuMemAlloc_v2": [_to(_address), _size],
    "cuMemFree_v2": [_address],
    "cuMemHostAlloc": [_to(_pointer), _size, _uint],
    "cuMemHostGetDevicePointer_v2": [_to(_address), _pointer, _uint],
    "cuMemFreeHost": [_pointer],
    "cuMemHostRegister_v2": [_pointer, _size, _uint],
    "cuMemHostUnregister": [_pointer],
    "cuMemGetAddressRange_v2": [_to(_address), _to(_size), _address],
    "cuMemcpyAsync": [_address, _address, _size, _pointer],
    "cuMemcpyPeerAsync": [_address, _pointer, _address, _pointer, _size, _pointer],
    "cuIpcGetMemHandle": [_to(IPCHandle), _address],
    "cuIpcOpenMemHandle_v2": [_to(_address), IPCHandle, _uint],
    "cuIpcCloseMemHandle": [_address],
    "cuGetErrorString": [_int, _to(ctypes.c_char_p)],
}

# CUpointer_attribute and CUmemorytype, "Unified Addressing".
_MEMORY_TYPE, _DEVICE_POINTER, _IS_MANAGED, _DEVICE_ORDINAL, _IPC_CAPABLE, _RANGE_START, _RANGE_SIZE, _POOL = (
    2, 3, 8, 9, 10, 11, 12, 17
)  # fmt: skip
_TYPE_HOST, _TYPE_DEVICE = 1, 2
_PEER_ACCESS_ALREADY_ENABLED = 704
_LAZY_PEER_ACCESS = 1
# CU_MEMHOSTREGISTER_PORTABLE
_PORTABLE = 1


@lru_cache(maxsize=1)
def load_driver() -> Any:
    """Load the driver; `None` if there is none, or it cannot be initialised. No library that needs one is loaded for it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for name, arguments in _SIGNATURES.items():
        # An old driver may lack some; who calls those finds out.
        if (function := getattr(driver, name, None)) is not None:
            function.argtypes = arguments
    return driver if driver.cuInit(0) == 0 else None


def need_driver(what: str) -> Any:
    """Return the driver.

    Raises:
        MissingDependency: there is none; `what` needs it.
    """
    driver = load_driver()
    if driver is None:
        raise MissingDependency(f"{what}, but there is no CUDA driver (libcuda.so.1)")
    return driver


def check(code: int, what: str, backend: str = "cuda") -> None:
    """Raise `BackendError` with the driver's text unless a call of it succeeded."""
    if code:
        text = ctypes.c_char_p()
        load_driver().cuGetErrorString(code, ctypes.byref(text))
        raise BackendError(f"cuda: {what}: {(text.value or b'unknown error').decode()} ({code})", backend=backend)


# Devices.


@lru_cache(maxsize=1)
def device_count() -> int:
    """Return how many CUDA devices the driver has; 0 without a driver."""
    driver, count = load_driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def need_device(backend: str) -> None:
    """Raise unless there is a CUDA device.

    Raises:
        MissingDependency: there is none; the message says what is missing.
    """
    if device_count() == 0:
        raise MissingDependency(f"the {backend} backend needs a CUDA driver (libcuda.so.1) and a device; there is none here")


def need_cupy(backend: str) -> Any:
    """Import cupy, which compiles kernels.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import cupy
    except ImportError as error:
        raise MissingDependency(
            f"the {backend} backend needs cupy ({error}): pip install 'nixl-async[cu12]', or [cu13]"
        ) from error
    return cupy


@lru_cache(maxsize=64)
def primary_context(device: int) -> int:
    """Return the handle of a device's primary context, in which cupy and torch work; made if need be, and kept for good.

    Raises:
        MissingDependency: there is no such device, or it gives no context.
    """
    driver, context, ordinal = load_driver(), ctypes.c_void_p(), ctypes.c_int()
    if driver is None or driver.cuDeviceGet(ctypes.byref(ordinal), device) != 0:
        raise MissingDependency(f"there is no CUDA device {device}; the driver has {device_count()}")
    if (code := driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)) != 0 or context.value is None:
        raise MissingDependency(f"CUDA device {device} gives no context (error {code})")
    return context.value


@contextmanager
def entered(device: int) -> Iterator[Any]:
    """Make a device's primary context current on this thread; yield the driver."""
    driver = load_driver()
    check(driver.cuCtxPushCurrent_v2(primary_context(device)), f"making the context of device {device} current")
    try:
        yield driver
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


@lru_cache(maxsize=64)
def device_uuid(device: int) -> bytes:
    """Return the 16 bytes that name a device, or its MIG instance, in every process."""
    driver, ordinal, uuid = load_driver(), ctypes.c_int(), ctypes.create_string_buffer(16)
    check(driver.cuDeviceGet(ctypes.byref(ordinal), device), f"device {device}")
    check(driver.cuDeviceGetUuid_v2(uuid, ordinal), f"the UUID of device {device}")
    return uuid.raw


def device_by_uuid(uuid: bytes) -> int | None:
    """Return the number that the device of this UUID has in this process; `None` if it is not visible here."""
    return next((device for device in range(device_count()) if device_uuid(device) == uuid), None)


@lru_cache(maxsize=1024)
def reaches(device: int, other: int) -> bool:
    """Tell whether kernels on `device` can be allowed to read and write the memory of `other` (`cuDeviceCanAccessPeer`)."""
    if device == other:
        return True
    driver, answer, numbers = load_driver(), ctypes.c_int(), []
    for one in (device, other):
        ordinal = ctypes.c_int()
        check(driver.cuDeviceGet(ctypes.byref(ordinal), one), f"device {one}")
        numbers.append(ordinal.value)
    return driver.cuDeviceCanAccessPeer(ctypes.byref(answer), *numbers) == 0 and answer.value == 1


@lru_cache(maxsize=1024)
def allow_access(device: int, other: int) -> None:
    """Let kernels on `device` read and write the memory of `other`; without effect where they are one.

    Raises:
        BackendError: the driver does not allow it; ask `reaches` first.
    """
    if device == other:
        return
    with entered(device) as driver:
        code = driver.cuCtxEnablePeerAccess(primary_context(other), 0)
        if code != _PEER_ACCESS_ALREADY_ENABLED:
            check(code, f"access of device {device} to the memory of device {other}")


# Memory.


def _attribute(address: int, attribute: int, kind: Any = ctypes.c_int) -> int | None:
    driver, value = load_driver(), kind()
    if driver is None or driver.cuPointerGetAttribute(ctypes.byref(value), attribute, address) != 0:
        return None
    found: int | None = value.value
    return found or 0


def device_of(address: int) -> int | None:
    """Return the number of the device that has memory at `address`, `None` if none has."""
    if _attribute(address, _MEMORY_TYPE) != _TYPE_DEVICE:
        return None
    return _attribute(address, _DEVICE_ORDINAL)


def pinned_address(address: int, nbytes: int) -> int | None:
    """Return where devices see host memory that is pinned from end to end; `None` for other memory."""
    if _attribute(address, _MEMORY_TYPE) != _TYPE_HOST:
        return None
    start = _attribute(address, _RANGE_START, ctypes.c_uint64)
    size = _attribute(address, _RANGE_SIZE, ctypes.c_size_t)
    if start is None or size is None or not start <= address <= address + nbytes <= start + size:
        return None
    return _attribute(address, _DEVICE_POINTER, ctypes.c_uint64) or None


def pin(address: int, nbytes: int, device: int) -> bool:
    """Pin host memory that the caller has allocated, for all devices; tell whether the driver did. It takes milliseconds."""
    if device_count() == 0:
        return False
    with entered(device) as driver:
        return bool(driver.cuMemHostRegister_v2(address, nbytes, _PORTABLE) == 0)


def unpin(address: int, device: int) -> None:
    """Undo `pin`."""
    with entered(device) as driver:
        driver.cuMemHostUnregister(address)


def allocation_of(address: int, device: int) -> tuple[int, int]:
    """Return the first address and the bytes of the allocation of device memory that `address` lies in."""
    base, nbytes = ctypes.c_uint64(), ctypes.c_size_t()
    with entered(device) as driver:
        code = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(nbytes), address)
        check(code, f"the allocation around {address:#x}")
    return base.value, nbytes.value


def why_not_shared(region: MemoryRegion) -> str:
    """Tell why other processes cannot open a region of VRAM, and what to do; empty if they can."""
    name = f"the memory of region {region.name!r}"
    if _attribute(region.address, _IS_MANAGED):
        return f"{name} is managed memory (cudaMallocManaged), which has no CUDA IPC handle; allocate it with cudaMalloc"
    if _attribute(region.address, _POOL, ctypes.c_void_p):
        return (
            f"{name} is of a stream-ordered pool (cudaMallocAsync), which has no CUDA IPC handle; allocate it with cudaMalloc:"
            " cupy's default pool, RMM's cuda or pool resource, torch's allocator with backend:native"
        )
    if not _attribute(region.address, _IPC_CAPABLE):
        return (
            f"{name} is mapped by virtual memory calls (cuMemMap), which has no CUDA IPC handle; allocate it with cudaMalloc: torch"
            " with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
        )
    base, nbytes = allocation_of(region.address, region.device)
    if region.address + region.nbytes > base + nbytes:
        return f"{name} lies in more than one allocation; register each of them by itself"
    return ""


def export_handle(base: int, device: int) -> bytes:
    """Return the handle by which other processes of the host open the allocation that begins at `base`."""
    handle = IPCHandle()
    with entered(device) as driver:
        check(driver.cuIpcGetMemHandle(ctypes.byref(handle), base), f"an IPC handle of the allocation at {base:#x}")
    return bytes(handle)


def open_handle(handle: bytes, device: int) -> int:
    """Return the address at which `device` sees the allocation of another process that a handle names, until it is closed."""
    address = ctypes.c_uint64()
    with entered(device) as driver:
        named = IPCHandle.from_buffer_copy(handle)
        check(driver.cuIpcOpenMemHandle_v2(ctypes.byref(address), named, _LAZY_PEER_ACCESS), "opening a peer's memory")
    return address.value


def close_handle(address: int, device: int) -> None:
    """Undo one `open_handle`; nothing uses the memory any more."""
    with entered(device) as driver:
        check(driver.cuIpcCloseMemHandle(address), "closing a peer's memory")


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

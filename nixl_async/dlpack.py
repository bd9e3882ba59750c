"""DLPack capsules, read without a library: where a tensor's bytes are, and who gives them up when we are done.

Facts from dlpack.h (dmlc/dlpack): a capsule called `dltensor` holds a `DLManagedTensor`, `dltensor_versioned` one with a version.
Whoever takes a capsule renames it to `used_…` and calls the tensor's deleter once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from nixl_async.errors import RegistrationError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""`DLDeviceType`: those whose memory is taken."""
_READ_ONLY = 1
_ANY_STREAM = -1
"""The producer is to wait for no stream and to let none wait: who registers memory sees to that."""


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_FORMS: tuple[tuple[bytes, bytes, Any], ...] = (
    (b"dltensor_versioned", b"used_dltensor_versioned", _Versioned),
    (b"dltensor", b"used_dltensor", _Managed),
)
# With the interpreter's lock: deleters of tensors that Python owns need it.
_delete = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))


@dataclass(frozen=True, slots=True)
class DLTensor:
    """A tensor's bytes, as a capsule tells them; `owner` keeps them until it is gone."""

    address: int
    nbytes: int
    device_type: int
    device: int
    contiguous: bool
    readonly: bool
    owner: object


class _Owner:
    """Calls a tensor's deleter when it is gone itself."""

    def __init__(self, managed: int, deleter: int | None) -> None:
        self._managed, self._deleter = managed, deleter

    def __del__(self) -> None:
        if self._deleter:
            _delete(self._deleter)(self._managed)


def is_capsule(obj: object) -> bool:
    """Tell whether `obj` is a capsule, taken or not; they have no type that could be named."""
    return type(obj).__name__ == "PyCapsule"


def take(obj: Any) -> DLTensor:
    """Take the tensor out of a capsule, or out of what has `__dlpack__`, without waiting for any stream.

    Raises:
        RegistrationError: the capsule holds no tensor, has been taken, or is of a DLPack that is not known.
    """
    capsule = obj if is_capsule(obj) else _ask(obj)
    for name, used, form in _FORMS:
        if _is_valid(capsule, name):
            pointer = _pointer(capsule, name)
            managed = form.from_address(pointer)
            if form is _Versioned and managed.major != 1:
                raise RegistrationError(f"the capsule is of DLPack {managed.major}.{managed.minor}; known are 0 and 1")
            # Its own name from here on: the capsule's destructor then leaves the tensor to us.
            _rename(capsule, used)
            return _read(managed.tensor, bool(getattr(managed, "flags", 0) & _READ_ONLY), _Owner(pointer, managed.deleter))
    raise RegistrationError("the capsule holds no DLPack tensor, or somebody has taken it; give the tensor itself")


def _ask(obj: Any) -> Any:
    for options in ({"stream": _ANY_STREAM, "max_version": (1, 0)}, {"stream": _ANY_STREAM}, {}):
        try:
            return obj.__dlpack__(**options)
        except TypeError as error:
            refused = error
    raise RegistrationError(f"__dlpack__ of {type(obj).__qualname__} takes none of the known arguments: {refused}")


def _read(tensor: _Tensor, readonly: bool, owner: object) -> DLTensor:
    shape = [tensor.shape[i] for i in range(tensor.ndim)]
    strides = [tensor.strides[i] for i in range(tensor.ndim)] if tensor.strides else None
    count, contiguous = 1, True
    for axis in reversed(range(tensor.ndim)):
        contiguous = contiguous and (strides is None or shape[axis] <= 1 or strides[axis] == count)
        count *= shape[axis]
    nbytes = (count * tensor.dtype.bits * tensor.dtype.lanes + 7) // 8
    address = (tensor.data or 0) + tensor.byte_offset
    return DLTensor(address, nbytes, tensor.device.type, tensor.device.id, contiguous, readonly, owner)

"""DLPack capsules: numpy's own, and ones made here of the parts that numpy has no tensors for."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from nixl_async import RegistrationError
from nixl_async.descriptors import MemoryKind
from nixl_async.dlpack import CPU, CUDA, CUDA_HOST, CUDA_MANAGED, _Managed, _Versioned, is_capsule, take
from nixl_async.memory import open_buffer

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_NAMES = {_Managed: b"dltensor", _Versioned: b"dltensor_versioned"}
FLOAT = 2


class Made:
    """A capsule of any tensor; counts how often its deleter is called."""

    def __init__(
        self,
        shape: list[int],
        *,
        form: Any = _Managed,
        device: tuple[int, int] = (CUDA, 0),
        bits: int = 16,
        strides: list[int] | None = None,
        byte_offset: int = 0,
        flags: int = 0,
        major: int = 1,
    ) -> None:
        self.deleted = 0
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        self._deleter = _DELETER(self._delete)
        self.managed = form()
        tensor = self.managed.tensor
        tensor.data, tensor.byte_offset, tensor.ndim = 0x7000, byte_offset, len(shape)
        tensor.device.type, tensor.device.id = device
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = FLOAT, bits, 1
        tensor.shape = self._shape
        if self._strides is not None:
            tensor.strides = self._strides
        self.managed.deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        if form is _Versioned:
            self.managed.major, self.managed.flags = major, flags
        self.capsule = _new(ctypes.addressof(self.managed), _NAMES[form], None)

    def _delete(self, pointer: int) -> None:
        assert pointer == ctypes.addressof(self.managed)
        self.deleted += 1


@pytest.mark.parametrize("form", [_Managed, _Versioned])
@pytest.mark.parametrize("device", [CUDA, CUDA_MANAGED])
def test_a_device_s_memory_is_found_and_given_back_once(form: Any, device: int) -> None:
    made = Made([3, 5], form=form, device=(device, 3), byte_offset=256)
    buffer = open_buffer(made.capsule)
    assert (buffer.address, buffer.nbytes, buffer.kind, buffer.device) == (0x7100, 30, MemoryKind.VRAM, 3)
    assert not buffer.readonly
    gc.collect()
    assert made.deleted == 0
    with pytest.raises(RegistrationError, match="somebody has taken it"):
        open_buffer(made.capsule)
    del buffer
    gc.collect()
    assert made.deleted == 1
    del made.capsule
    gc.collect()
    assert made.deleted == 1


def test_pinned_host_memory_is_dram() -> None:
    made = Made([8], device=(CUDA_HOST, 1))
    buffer = open_buffer(made.capsule)
    assert (buffer.kind, buffer.device) == (MemoryKind.DRAM, 0)


def test_layouts() -> None:
    assert take(Made([2, 3], strides=[3, 1]).capsule).contiguous
    # The stride of an axis of one element means nothing.
    assert take(Made([1, 3], strides=[77, 1]).capsule).contiguous
    assert not take(Made([2, 3], strides=[1, 2]).capsule).contiguous
    with pytest.raises(RegistrationError, match="not C-contiguous"):
        open_buffer(Made([2, 3], strides=[4, 1]).capsule)
    assert take(Made([5], bits=4).capsule).nbytes == 3
    with pytest.raises(RegistrationError, match="no bytes"):
        open_buffer(Made([0, 4]).capsule)


def test_what_is_not_known_is_refused_and_left_alone() -> None:
    for device in ((10, 0), (7, 2)):
        with pytest.raises(RegistrationError, match=f"device {device[0]}:{device[1]}"):
            open_buffer(Made([4], device=device).capsule)
    made = Made([4], form=_Versioned, major=2)
    with pytest.raises(RegistrationError, match="DLPack 2"):
        open_buffer(made.capsule)
    assert made.deleted == 0
    other = _new(1, b"something else", None)
    assert is_capsule(other)
    with pytest.raises(RegistrationError, match="no DLPack tensor"):
        open_buffer(other)


def test_read_only_tensors_stay_so() -> None:
    assert open_buffer(Made([4], form=_Versioned, flags=1).capsule).readonly
    assert not open_buffer(Made([4], form=_Versioned).capsule).readonly


class Watched(np.ndarray):  # type: ignore[type-arg] - an array that can be referred to weakly
    pass


@pytest.mark.parametrize("options", [{}, {"max_version": (1, 0)}])
def test_numpy_s_capsules_keep_their_array(options: dict[str, Any]) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4).view(Watched)
    try:
        capsule = array.__dlpack__(**options)
    except TypeError:
        pytest.skip("this numpy makes no such capsules")
    address, gone = array.ctypes.data, weakref.ref(array)
    tensor = take(capsule)
    assert (tensor.address, tensor.nbytes, tensor.device_type, tensor.contiguous) == (address, 48, CPU, True)
    del array, capsule
    gc.collect()
    assert gone() is not None
    del tensor
    gc.collect()
    assert gone() is None


class Shown:
    """A device's tensor as its library shows it; some know no `max_version`, or no arguments at all."""

    def __init__(self, made: Made, *known: str) -> None:
        self._made, self._known, self.asked = made, known, dict[str, Any]()

    def __dlpack__(self, **options: Any) -> Any:
        if set(options) - set(self._known):
            raise TypeError(f"unexpected keyword argument {min(options)}")
        self.asked = options
        return self._made.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 1


@pytest.mark.parametrize("known", [("stream", "max_version"), ("stream",), ()])
def test_objects_are_asked_not_to_wait_for_a_stream(known: tuple[str, ...]) -> None:
    shown = Shown(Made([4], device=(CUDA, 1)), *known)
    buffer = open_buffer(shown)
    assert (buffer.kind, buffer.device, buffer.nbytes) == (MemoryKind.VRAM, 1, 8)
    assert set(shown.asked) == set(known)
    assert shown.asked.get("stream", -1) == -1

"""Values of `dynamo_connect`: devices, descriptors of memory, and the models that travel between workers.

The models have the fields of Dynamo's own (`dynamo.nixl_connect` of ai-dynamo/dynamo), so that either side reads the other's.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.errors import MissingDependency, NixlError
from nixl_async.integrations.dynamo_connect.endpoint import Place, Registration

if TYPE_CHECKING:
    from nixl_async.integrations.dynamo_connect.connection import Connection
    from nixl_async.integrations.dynamo_connect.endpoint import Endpoint

try:
    from pydantic import BaseModel, ConfigDict, Field, field_validator
except ImportError as error:
    raise MissingDependency("dynamo_connect needs pydantic for its metadata: pip install 'pydantic>=2.10'") from error

MAX_ADDRESS = (1 << 63) - 1


class OperationError(NixlError, RuntimeError):
    """Refuse what an operation or a descriptor cannot do in its present state."""


class DeviceKind(IntEnum):
    """What kind of memory a descriptor is in."""

    UNSPECIFIED = 0
    HOST = 1
    CUDA = 2
    XPU = 3

    def __str__(self) -> str:
        return {DeviceKind.HOST: "cpu", DeviceKind.CUDA: "cuda", DeviceKind.XPU: "xpu"}.get(self, "<invalid>")

    @property
    def nixl_mem_type(self) -> str:
        """NIXL's name of the memory: DRAM for the host's, VRAM for a device's."""
        return "DRAM" if self is DeviceKind.HOST else "VRAM"


class Device:
    """A device by its name, such as "cpu" or "cuda:1", or by its kind and number."""

    def __init__(self, metadata: str | tuple[DeviceKind, int]) -> None:
        if metadata is None:
            raise ValueError("a device is None; give its name, such as 'cpu' or 'cuda:1'")
        if isinstance(metadata, str):
            self._kind, self._device_id = _read_device(metadata)
        elif (
            isinstance(metadata, tuple)
            and len(metadata) == 2
            and isinstance(metadata[0], DeviceKind)
            and isinstance(metadata[1], int)
        ):
            self._kind, self._device_id = metadata
        else:
            raise TypeError(f"a device is a string or (DeviceKind, number), not {metadata!r}")

    def __repr__(self) -> str:
        return f"Device(kind={self._kind}, id={self._device_id})"

    def __str__(self) -> str:
        return f"{self._kind}:{self._device_id}" if self._kind in (DeviceKind.CUDA, DeviceKind.XPU) else f"{self._kind}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and (self._kind, self._device_id) == (other._kind, other._device_id)

    def __hash__(self) -> int:
        return hash((self._kind, self._device_id))

    @property
    def id(self) -> int:
        """The device's number among those of its kind."""
        return self._device_id

    @property
    def kind(self) -> DeviceKind:
        """What kind of memory it has."""
        return self._kind


CPU = Device((DeviceKind.HOST, 0))


def _read_device(name: str) -> tuple[DeviceKind, int]:
    kind, colon, number = name.strip().lower().partition(":")
    kinds = {"cpu": DeviceKind.HOST, "host": DeviceKind.HOST, "cuda": DeviceKind.CUDA, "gpu": DeviceKind.CUDA}
    kinds["xpu"] = DeviceKind.XPU
    if kind not in kinds or (colon and not number.isdecimal()):
        raise ValueError(f"device {name!r} is none of 'cpu', 'host', 'cuda', 'cuda:N', 'gpu:N', 'xpu:N'")
    return kinds[kind], 0 if kinds[kind] is DeviceKind.HOST else int(number or 0)


class Descriptor:
    """Memory to move: of this process, or, read from a `SerializedDescriptor`, of another one.

    `data` is a torch tensor (one that is not contiguous is copied), `(ndarray, device)`, bytes or a bytearray, or `(address,
    bytes[, device[, owner]])`; the object is kept alive. Memory is registered once, when an operation or
    `register_with_connector` first needs it, and stays so until the last descriptor of these bytes is dropped or
    `deregister_with_connector` is called. Bytes objects can be a source only.

    Raises:
        TypeError: `data` is none of these.
        ValueError: it is `None`, or an array that is not C-contiguous.
    """

    def __init__(self, data: Any) -> None:
        if data is None:
            raise ValueError("data is None; give a tensor, (ndarray, device), bytes, or (address, bytes, device, owner)")
        self._data_device = CPU
        self._readonly = False
        self._data_ref: Any = None
        self._export: memoryview | None = None
        self._connection: Connection | None = None
        self._registration: Registration | None = None
        self._explicit = False
        self._operations = 0
        self._dropped: weakref.finalize[..., Descriptor] | None = None
        self._serialized: SerializedDescriptor | None = None
        if _is_tensor(data):
            self._take_tensor(data)
        elif isinstance(data, bytes | bytearray):
            self._export = memoryview(data)
            self._data_ptr, self._data_size = np.frombuffer(data, np.uint8).ctypes.data, len(data)
            self._data_ref, self._readonly = data, self._export.readonly
        elif isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Device | str) and not isinstance(data[0], int):
            self._take_array(*data)
        elif isinstance(data, tuple) and 2 <= len(data) <= 4 and isinstance(data[0], int) and isinstance(data[1], int):
            self._data_ptr, self._data_size = data[0], data[1]
            if len(data) > 2:
                self._data_device = _as_device(data[2])
            self._data_ref = data[3] if len(data) > 3 else None
        else:
            raise TypeError(
                f"data is {type(data).__name__}; give a torch tensor, (ndarray, device), bytes,"
                " or (address, bytes, device, owner)"
            )

    def _take_tensor(self, tensor: Any) -> None:
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        kind = {"cpu": DeviceKind.HOST, "cuda": DeviceKind.CUDA, "xpu": DeviceKind.XPU}.get(tensor.device.type)
        if kind is None:
            raise TypeError(f"the tensor is on {tensor.device}; cpu, cuda and xpu are known")
        self._data_ptr, self._data_size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        self._data_device = Device((kind, 0 if kind is DeviceKind.HOST else tensor.device.index or 0))
        self._data_ref = tensor

    def _take_array(self, array: Any, device: Device | str) -> None:
        interface = getattr(array, "__array_interface__", None) or getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            raise TypeError(f"{type(array).__name__} is no array: it has neither __array_interface__ nor the one for CUDA")
        if not array.flags.c_contiguous:
            raise ValueError(f"the array of shape {array.shape} is not C-contiguous; give a contiguous one")
        self._data_ptr, self._readonly = interface["data"]
        self._data_size = array.nbytes
        self._data_device = _as_device(device)
        self._data_ref = array

    def __repr__(self) -> str:
        return f"Descriptor({self})"

    def __str__(self) -> str:
        return f"ptr={self._data_ptr:#x}, size={self._data_size}, device={self._data_device}"

    @property
    def device(self) -> Device:
        """The device that the memory is of."""
        return self._data_device

    @property
    def is_registered(self) -> bool:
        """Whether the descriptor belongs to a connection."""
        return self._connection is not None

    @property
    def ptr(self) -> int:
        """The memory's address."""
        return self._data_ptr

    @property
    def size(self) -> int:
        """The memory's length in bytes."""
        return self._data_size

    @property
    def metadata(self) -> SerializedDescriptor:
        """What another worker is told of it."""
        made = self._serialized
        if made is None or (made.ptr, made.size) != (self._data_ptr, self._data_size):
            made = SerializedDescriptor(device=f"{self._data_device}", ptr=self._data_ptr, size=self._data_size)
            self._serialized = made
        return made

    @staticmethod
    def from_serialized(serialized: SerializedDescriptor) -> Descriptor:
        """Return the descriptor that another worker described."""
        if not isinstance(serialized, SerializedDescriptor):
            raise TypeError(f"serialized is {type(serialized).__name__}; it must be a SerializedDescriptor")
        return serialized.to_descriptor()

    def register_with_connector(self, connection: Connection) -> None:
        """Let the descriptor belong to a connection; registering begins at once inside a running event loop, else when it is used.

        Raises:
            ValueError: the address is 0.
            OperationError: it belongs to another connection.
        """
        self._bind(connection)
        self._explicit = True
        endpoint = connection._here()
        if endpoint is not None:
            self._registered_at(endpoint)

    def deregister_with_connector(self, connection: Connection) -> None:
        """Take the registration back in the background; memory that no operation uses is quiet already.

        Raises:
            OperationError: it belongs to another connection, or to none.
        """
        if connection is not self._connection:
            has = "none" if self._connection is None else self._connection.name
            raise OperationError(f"the descriptor belongs to connection {has}, not to {_name(connection)}")
        self._unbind()

    def _bind(self, connection: Connection) -> None:
        if not hasattr(connection, "_here"):
            raise TypeError(f"connection is {type(connection).__name__}; it must be a Connection")
        if self._data_ptr == 0:
            raise ValueError("memory at address 0 cannot be registered")
        if self._connection is not None and self._connection is not connection:
            if self._explicit or self._operations:
                raise OperationError(
                    f"the descriptor belongs to connection {self._connection.name}; deregister it there before it is used"
                    f" with {connection.name}"
                )
            self._unbind()
        self._connection = connection

    def _unbind(self) -> None:
        self._connection, self._explicit, self._registration = None, False, None
        if self._dropped is not None:
            self._dropped()
            self._dropped = None

    def _registered_at(self, endpoint: Endpoint) -> Registration:
        """Return the registration that holds the descriptor's bytes; it may be under way yet. On the endpoint's loop only."""
        held = self._registration
        if held is not None and held.endpoint is endpoint and held.usable and held.covers(self._data_ptr, self._data_size):
            return held
        if self._dropped is not None:
            self._dropped()
        place = Place(self._data_ptr, self._data_size, str(self._data_device.kind), self._data_device.id, self._readonly)
        taken = endpoint.share(place, _memory(self), (self._data_ref, self._export))
        self._registration = taken
        self._dropped = weakref.finalize(self, endpoint.unshare_soon, taken)
        self._dropped.atexit = False
        return taken


def _memory(descriptor: Descriptor) -> Callable[[], Any]:
    address, nbytes, device = descriptor._data_ptr, descriptor._data_size, descriptor._data_device
    readonly = descriptor._readonly

    def make() -> Any:
        if device.kind is DeviceKind.HOST:
            array = (ctypes.c_uint8 * nbytes).from_address(address)
            return memoryview(array).toreadonly() if readonly else array
        return _DeviceBytes(address, nbytes, device, readonly)

    return make


class _DeviceBytes:
    """A piece of a CUDA device's memory, as cupy would show it."""

    def __init__(self, address: int, nbytes: int, device: Device, readonly: bool) -> None:
        self.__cuda_array_interface__ = {"data": (address, readonly), "shape": (nbytes,), "typestr": "|u1", "version": 3}
        self.device = device


def _is_tensor(data: object) -> bool:
    return all(hasattr(data, name) for name in ("data_ptr", "numel", "element_size", "is_contiguous", "device"))


def _as_device(given: object) -> Device:
    if isinstance(given, Device):
        return given
    if isinstance(given, str):
        return CPU if given == "cpu" else Device(given)
    raise TypeError(f"the device is {given!r}; give a Device or its name")


def _name(connection: object) -> str:
    return str(getattr(connection, "name", connection))


class SerializedDescriptor(BaseModel):
    """A descriptor as it travels: the device's name, the address, the bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "cpu"
    ptr: int = 0
    size: int = 0

    def to_descriptor(self) -> Descriptor:
        """Return the descriptor that it describes, of the other worker's memory."""
        return Descriptor((self.ptr, self.size, self.device, None))

    @field_validator("device")
    @classmethod
    def validate_device(cls, v: str) -> str:
        """Refuse a device that there is not; return its name in small letters."""
        _read_device(v)
        return v.strip().lower()

    @field_validator("ptr")
    @classmethod
    def validate_ptr(cls, v: int) -> int:
        """Refuse what is no address."""
        if not 0 < v <= MAX_ADDRESS:
            raise ValueError(f"ptr is {v}; an address is 1 to {MAX_ADDRESS}")
        return v

    @field_validator("size")
    @classmethod
    def validate_size(cls, v: int) -> int:
        """Refuse what is no length."""
        if not 0 <= v <= MAX_ADDRESS:
            raise ValueError(f"size is {v}; a length is 0 to {MAX_ADDRESS}")
        return v


class RdmaMetadata(BaseModel):
    """What the passive side of an operation gives to the active one, by whatever way the application has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    descriptors: list[SerializedDescriptor] = Field(default_factory=list)
    nixl_metadata: str = ""
    notification_key: str = ""
    operation_kind: int = 0

    def to_descriptors(self) -> Descriptor | list[Descriptor]:
        """Return the other worker's descriptor, or several of them as a list.

        Raises:
            ValueError: there is none.
        """
        if not self.descriptors:
            raise ValueError("the metadata has no descriptors; it must have at least one")
        found = [one.to_descriptor() for one in self.descriptors]
        return found[0] if len(found) == 1 else found

    @field_validator("operation_kind")
    @classmethod
    def validate_operation_kind(cls, v: int) -> int:
        """Refuse a kind of operation that there is not."""
        if v not in (OperationKind.READ, OperationKind.WRITE):
            raise ValueError(f"operation_kind is {v}; it is {OperationKind.READ:d} (read) or {OperationKind.WRITE:d} (write)")
        return v


class OperationKind(IntEnum):
    """Which way the bytes of an operation go, as the active side sees it."""

    UNSPECIFIED = 0
    READ = 1
    WRITE = 2

    def __str__(self) -> str:
        return self.name if self else "<invalid>"


class OperationStatus(IntEnum):
    """Where an operation is in its life; the last three are final, and its memory is quiet when they show."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    IN_PROGRESS = 2
    COMPLETE = 3
    CANCELLED = 4
    ERRORED = 5

    def __str__(self) -> str:
        return ("<invalid>", "INIT", "PROC", "DONE", "STOP", "ERR")[self]


FINAL = frozenset({OperationStatus.COMPLETE, OperationStatus.CANCELLED, OperationStatus.ERRORED})

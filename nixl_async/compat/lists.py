"""NIXL's descriptor lists, kept as numpy arrays, and their serialised form.

The serialised form is the one that stock NIXL agents write and read (a pickle of one class and its bytes, in nixlSerDes records).
It is read without pickle: bytes of a peer are data, and run nothing.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from nixl_async.compat.enums import nixl_mem_t
from nixl_async.compat.errors import nixlMismatchError, nixlNotFoundError, refusal
from nixl_async.metadata import MAGIC

_U64 = struct.Struct("<Q")
_STOCK_MODULES = frozenset({"nixl_cu12._bindings", "nixl_cu13._bindings", "nixl._bindings"})
_WRITTEN_MODULE = "nixl_cu12._bindings"
_MAX_NUMBER = (1 << 64) - 1


def _numbers(row: Sequence[Any], n: int) -> tuple[int, ...]:
    values = []
    for value in row[:n]:
        try:
            number = value if type(value) is int else value.__index__()
        except AttributeError:
            raise TypeError(f"{value!r} of descriptor {tuple(row)!r} is no integer") from None
        if not 0 <= number <= _MAX_NUMBER:
            raise ValueError(f"{number} of descriptor {tuple(row)!r} is out of range; give 0 to 2**64 - 1")
        values.append(number)
    return tuple(values)


class _List:
    """N rows of address, length and device number; subclasses add a column."""

    width: ClassVar[int]
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, type: nixl_mem_t, descs: Any = 0, *, init_size: int | None = None) -> None:
        if not isinstance(type, nixl_mem_t):
            raise TypeError(f"the first argument is {type!r}; it must be a nixl_mem_t, such as DRAM_SEG")
        self._type = type
        self._array: np.ndarray[Any, Any] = np.zeros((0, 3), np.uint64)
        # The array for native code, which asks a memoryview for its bytes in a tenth of the time; None when it is yet to be made.
        self._view: memoryview | None = None
        # Rows given one by one wait here until somebody needs the array.
        self._more: list[tuple[int, ...]] = []
        if init_size is not None:
            descs = init_size
        if isinstance(descs, np.ndarray):
            self._take_array(descs)
        elif isinstance(descs, list | tuple):
            self._take_rows(descs)
        else:
            self._take_array(np.zeros((descs.__index__(), 3), np.uint64))
        self._view = self._array.data

    def _take_array(self, given: np.ndarray[Any, Any]) -> None:
        if given.ndim != 2 or given.shape[1] != 3:
            raise ValueError(f"descs is an array of shape {given.shape}; it must be a Nx3 numpy array")
        if given.dtype not in (np.uint64, np.int64):
            raise ValueError(f"descs must be a Nx3 numpy array of uint64 or int64, not {given.dtype}")
        if not given.flags.c_contiguous:
            raise ValueError("descs must be a C-contiguous numpy array")
        self._array = given.astype(np.uint64)
        self._take_tails(None, len(given))

    def _take_rows(self, rows: Sequence[Any]) -> None:
        width = self.width
        if not all(isinstance(row, tuple) for row in rows):
            raise TypeError("Each descriptor must be a tuple when provided as a list")
        if not all(len(row) == width for row in rows):
            raise ValueError(f"Each descriptor tuple must have exactly {width} elements")
        try:
            self._array = np.array([row[:3] for row in rows] if width > 3 else rows, np.uint64).reshape(-1, 3)
        except (OverflowError, TypeError, ValueError):
            self._array = np.array([_numbers(row, 3) for row in rows], np.uint64).reshape(-1, 3)
        self._take_tails(rows, len(rows))

    def _take_tails(self, rows: Iterable[Sequence[Any]] | None, n: int) -> None:
        """Keep what the rows have behind the three numbers."""

    @property
    def rows(self) -> np.ndarray[Any, Any]:
        """The numbers, as an Nx3 array of uint64 that is not to be changed."""
        if self._more:
            more, self._more = self._more, []
            self._array = np.concatenate((self._array, np.array(more, np.uint64)))
            self._view = None
        if self._view is None:
            self._view = self._array.data
        return self._array

    def getType(self) -> nixl_mem_t:
        """Return where the memory is."""
        return self._type

    def descCount(self) -> int:
        """Return the number of descriptors."""
        return len(self._array) + len(self._more)

    def isEmpty(self) -> bool:
        """Return whether there are none."""
        return self.descCount() == 0

    def _position(self, index: int) -> int:
        try:
            at = int(index.__index__())
        except AttributeError:
            raise TypeError(f"a descriptor list is indexed by integers, not {type(index).__name__}") from None
        if not 0 <= at < self.descCount():
            raise IndexError(f"index {at} is out of range: the list has {self.descCount()} descriptors")
        return at

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        address, nbytes, device = self.rows[self._position(index)].tolist()
        return address, nbytes, device

    def __setitem__(self, index: int, row: tuple[Any, ...]) -> None:
        self._check_row(row)
        array = self.rows.copy()
        array[self._position(index)] = _numbers(row, 3)
        self._array, self._view = array, None

    def _check_row(self, row: Any) -> None:
        if not isinstance(row, tuple):
            raise TypeError(f"a descriptor is a tuple of {self.width}, not {row!r}")
        if len(row) < self.width:
            raise IndexError(f"descriptor {row!r} has {len(row)} elements; it needs {self.width}")

    def addDesc(self, row: tuple[Any, ...]) -> None:
        """Append a descriptor."""
        self._check_row(row)
        self._more.append(_numbers(row, 3))

    def append(self, row: tuple[Any, ...]) -> None:
        """Append a descriptor."""
        self.addDesc(row)

    def remDesc(self, index: int) -> None:
        """Remove a descriptor."""
        at = self._position(index)
        self._array, self._view = np.delete(self.rows, at, 0), None

    def index(self, row: tuple[Any, ...]) -> int:
        """Return where a descriptor is.

        Raises:
            nixlNotFoundError: it is not in the list.
        """
        self._check_row(row)
        found = np.flatnonzero((self.rows == np.array(_numbers(row, 3), np.uint64)).all(1))
        if not len(found):
            raise refusal(nixlNotFoundError, f"descriptor {row!r} is not in the list")
        return int(found[0])

    def clear(self) -> None:
        """Remove all descriptors."""
        self._array, self._view = np.zeros((0, 3), np.uint64), None
        self._more = []

    def print(self) -> None:
        """Print the list."""
        print(f"DescList of mem type {int(self._type)}")
        for at in range(self.descCount()):
            print(self[at])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.descCount()} of {self._type.name}>"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self) or not isinstance(other, _List):
            return False
        return self._type is other._type and np.array_equal(self.rows, other.rows) and self._tails() == other._tails()

    def _tails(self) -> Sequence[Any]:
        return ()

    def __bool__(self) -> bool:
        return True


class nixlXferDList(_List):
    """Places to move bytes from or to: (address, length, device)."""

    width = 3

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), encode_list(self))


class nixlRegDList(_List):
    """Memory to register: (address, length, device, meta); meta is text or bytes, and comes back as bytes."""

    width = 4
    _meta: list[bytes]

    def _take_tails(self, rows: Iterable[Sequence[Any]] | None, n: int) -> None:
        self._meta = [b""] * n if rows is None else [_meta(row[3]) for row in rows]

    @property
    def metas(self) -> list[bytes]:
        """Each descriptor's meta."""
        return self._meta

    def _tails(self) -> Sequence[Any]:
        return self._meta

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return *super().__getitem__(index), self._meta[self._position(index)]

    def __setitem__(self, index: int, row: tuple[Any, ...]) -> None:
        super().__setitem__(index, row)
        self._meta[self._position(index)] = _meta(row[3])

    def addDesc(self, row: tuple[Any, ...]) -> None:
        """Append a descriptor."""
        super().addDesc(row)
        self._meta.append(_meta(row[3]))

    def remDesc(self, index: int) -> None:
        """Remove a descriptor."""
        super().remDesc(index)
        del self._meta[index]

    def index(self, row: tuple[Any, ...]) -> int:
        """Return where a descriptor is."""
        self._check_row(row)
        for at in range(self.descCount()):
            if self[at] == (*_numbers(row, 3), _meta(row[3])):
                return at
        raise refusal(nixlNotFoundError, f"descriptor {row!r} is not in the list")

    def clear(self) -> None:
        """Remove all descriptors."""
        super().clear()
        self._meta = []

    def trim(self) -> nixlXferDList:
        """Return the same places without their meta."""
        return nixlXferDList(self._type, self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), encode_list(self))


class nixlRemoteDList(_List):
    """Places of remote agents: (address, length, device, agent); for the device API, which is not offered here."""

    width = 4
    _agents: list[str]

    def _take_tails(self, rows: Iterable[Sequence[Any]] | None, n: int) -> None:
        self._agents = [""] * n if rows is None else [str(row[3]) for row in rows]

    def _tails(self) -> Sequence[Any]:
        return self._agents

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return *super().__getitem__(index), self._agents[self._position(index)]

    def addDesc(self, row: tuple[Any, ...]) -> None:
        """Append a descriptor."""
        super().addDesc(row)
        self._agents.append(str(row[3]))

    def remDesc(self, index: int) -> None:
        """Remove a descriptor."""
        super().remDesc(index)
        del self._agents[index]

    def clear(self) -> None:
        """Remove all descriptors."""
        super().clear()
        self._agents = []


def _meta(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise TypeError(f"meta is {value!r}; it must be str or bytes")


# The serialised form.

_WORDS = {nixlXferDList: b"nixlBDList", nixlRegDList: b"nixlSDList"}


def _record(tag: bytes, body: bytes) -> bytes:
    return tag + _U64.pack(len(body)) + body + b"|"


def encode_list(given: nixlXferDList | nixlRegDList) -> bytes:
    """Return a list's nixlSerDes records (src/core/nixl_descriptors.cpp of ai-dynamo/nixl)."""
    rows = given.rows
    out = [
        MAGIC,
        _record(b"nixlDList", _WORDS[type(given)]),
        _record(b"t", struct.pack("<I", int(given.getType()))),
        _record(b"n", _U64.pack(len(rows))),
    ]
    if isinstance(given, nixlRegDList):
        out += [_record(b"", row.tobytes() + meta) for row, meta in zip(rows, given.metas, strict=True)]
    else:
        out.append(_record(b"", np.ascontiguousarray(rows).tobytes()))
    return b"".join(out)


def decode_list(kind: type[nixlXferDList] | type[nixlRegDList], blob: bytes) -> nixlXferDList | nixlRegDList:
    """Read what `encode_list` wrote.

    Raises:
        nixlMismatchError: it is malformed.
    """
    at = len(MAGIC)
    if not blob.startswith(MAGIC):
        raise refusal(nixlMismatchError, "a serialised list does not begin with nixlSerDes")

    def record(tag: bytes) -> bytes:
        nonlocal at
        start = at + len(tag) + _U64.size
        if blob[at : at + len(tag)] != tag or start > len(blob):
            raise refusal(nixlMismatchError, f"a serialised list has no record {tag!r} at byte {at}")
        end = start + _U64.unpack_from(blob, at + len(tag))[0]
        if blob[end : end + 1] != b"|":
            raise refusal(nixlMismatchError, f"a serialised list's record {tag!r} at byte {at} is cut short")
        at = end + 1
        return blob[start:end]

    word, number, count = record(b"nixlDList"), record(b"t"), record(b"n")
    if word != _WORDS[kind] or len(number) not in (4, 8) or len(count) != _U64.size:
        raise refusal(nixlMismatchError, f"a serialised list is {word!r}; {_WORDS[kind]!r} is expected")
    try:
        memory = nixl_mem_t(int.from_bytes(number, "little"))
    except ValueError as error:
        raise refusal(nixlMismatchError, f"a serialised list: {error}") from None
    (n,) = _U64.unpack(count)
    if kind is nixlXferDList:
        body = record(b"") if n or at < len(blob) else b""
        if len(body) != n * 24:
            raise refusal(nixlMismatchError, f"a serialised list of {n} descriptors has {len(body)} bytes")
        return nixlXferDList(memory, np.frombuffer(body, np.uint64).reshape(-1, 3))
    rows = []
    for _ in range(n):
        body = record(b"")
        if len(body) < 24:
            raise refusal(nixlMismatchError, f"a serialised descriptor has {len(body)} bytes")
        rows.append((*struct.unpack_from("<QQQ", body), body[24:]))
    return nixlRegDList(memory, rows)


def _rebuild(kind: type[nixlXferDList] | type[nixlRegDList], blob: bytes) -> nixlXferDList | nixlRegDList:
    return decode_list(kind, blob)


def dump_list(given: nixlXferDList | nixlRegDList) -> bytes:
    """Serialise a list for another agent, a stock NIXL agent's `deserialize_descs` among them."""
    if type(given) not in _WORDS:
        raise TypeError(f"only nixlXferDList and nixlRegDList are serialised, not {type(given).__name__}")
    blob = encode_list(given)

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    length = b"C" + bytes([len(blob)]) if len(blob) < 256 else b"B" + struct.pack("<I", len(blob))
    if len(blob) >= 1 << 32:
        length = b"\x8e" + _U64.pack(len(blob))
    # PROTO 4; the class by name; an empty tuple; NEWOBJ; the bytes; BUILD; STOP.
    return b"\x80\x04" + text(_WRITTEN_MODULE) + text(type(given).__name__) + b"\x93)\x81" + length + blob + b"b."


_PASSED_OVER = frozenset({"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "EMPTY_TUPLE", "TUPLE"})
_TEXT = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})
_BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})


def load_list(data: bytes) -> nixlXferDList | nixlRegDList:
    """Read what `dump_list`, or a stock agent's `get_serialized_descs`, wrote; nothing in it is run.

    Raises:
        nixlMismatchError: it is something else.
    """
    texts: list[str] = []
    blob: bytes | None = None
    steps: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(bytes(data)):
            if opcode.name in _TEXT:
                texts.append(str(argument))
            elif opcode.name in _BYTES and isinstance(argument, bytes):
                blob = argument
            elif opcode.name not in _PASSED_OVER:
                steps.append(opcode.name)
    except ValueError as error:
        raise refusal(nixlMismatchError, f"not a serialised descriptor list: {error}") from None
    kinds: dict[str, type[nixlXferDList] | type[nixlRegDList]] = {"nixlXferDList": nixlXferDList, "nixlRegDList": nixlRegDList}
    expected = len(texts) == 2 and texts[0] in _STOCK_MODULES and texts[1] in kinds
    if blob is None or steps != ["STACK_GLOBAL", "NEWOBJ", "BUILD", "STOP"] or not expected:
        raise refusal(nixlMismatchError, f"not a serialised descriptor list: names {texts}, steps {steps}")
    return decode_list(kinds[texts[1]], blob)

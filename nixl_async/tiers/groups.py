"""The records of slots as SQLite keeps them: many to a row, so that a batch of blocks costs a few rows and numpy does the rest.

A row is a group: the checksum of its records, and `GROUP_SLOTS` records. A key that is too long for its record is in a table of its
own. `connection` is of `sqlite3`, within a transaction. Everything here blocks.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nixl_async.native import ffi, int64, lib

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array

GROUP_SLOTS = 64
PAGE_NBYTES = 8192
"""SQLite's pages, so that a group is in one."""
INLINE_KEY_NBYTES = 64
AT_ONCE = 256
"""Groups that one statement reads."""
FREE, RESERVED, FULL, UNUSED = 0, 1, 2, 3
"""The states of a slot; UNUSED: it was never reserved."""
SCHEMA = """
CREATE TABLE groups (number INTEGER PRIMARY KEY, change INTEGER NOT NULL, free INTEGER NOT NULL, reserved INTEGER NOT NULL,
    records BLOB NOT NULL);
CREATE TABLE long_keys (slot INTEGER PRIMARY KEY, key BLOB NOT NULL);
CREATE INDEX changed ON groups (change);
CREATE INDEX with_free ON groups (number) WHERE free > 0;
CREATE INDEX with_reserved ON groups (number) WHERE reserved > 0
"""
RECORD = np.dtype(
    [
        ("generation", "<i8"),
        ("checksum", "<u8"),
        ("stored", "<f8"),
        ("used", "<f8"),
        ("change", "<i8"),
        ("owner", "<i8"),
        ("state", "u1"),
        ("kind", "u1"),
        ("key_nbytes", "u1"),
        ("spare", "V5"),
        ("key", f"S{INLINE_KEY_NBYTES}"),
    ]
)
NEVER = np.array([(0, 0, 0.0, 0.0, 0, 0, UNUSED, 0, 0, b"", b"")], RECORD)
"""The record of a slot that is unused."""
_SUM_NBYTES = 8
_ROW_NBYTES = _SUM_NBYTES + GROUP_SLOTS * RECORD.itemsize


class Row(NamedTuple):
    """A slot as it is in the index."""

    slot: int
    state: int
    generation: int
    key: bytes | None
    checksum: int
    kind: int
    stored: float
    used: float
    change: int


@dataclass(slots=True, eq=False)
class Stored:
    """Blocks whose bytes are in place, to be made known: where each is, its key, its checksum, and when it was stored."""

    slots: Array
    generations: Array
    keys: list[bytes]
    checksums: NDArray[np.uint64]
    stored: NDArray[np.float64]
    kind: int

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def joined(cls, parts: Sequence[Stored]) -> Stored:
        """Return all blocks of parts, which have checksums of the same kind, as one."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls(NOTHING[:, 0], NOTHING[:, 0], [], np.zeros(0, np.uint64), np.zeros(0), 0)
        names = ("slots", "generations", "checksums", "stored")
        slots, generations, checksums, stored = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return cls(slots, generations, [key for part in parts for key in part.keys], checksums, stored, parts[0].kind)

    def part(self, start: int, stop: int) -> Stored:
        """Return the blocks from `start` to `stop`."""
        cut = slice(start, stop)
        arrays = (self.slots[cut], self.generations[cut], self.keys[cut], self.checksums[cut], self.stored[cut])
        return Stored(*arrays, self.kind)


NOTHING = np.zeros((0, 2), np.int64)
"""No slots with their generations."""


class Groups:
    """Some groups, read to be changed: `records` are those of all their slots, one group after the other."""

    def __init__(self, numbers: Array, records: NDArray[Any]) -> None:
        self.numbers, self.records = numbers, records

    @classmethod
    def of(cls, connection: Any, slots: Array) -> Groups:
        """Read the groups of these slots, as far as there are any.

        Raises:
            sqlite3.DatabaseError: a group does not have its checksum.
        """
        numbers = np.unique(slots // GROUP_SLOTS).tolist()
        found: list[tuple[int, bytes]] = []
        if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
            found = _select(connection, "number BETWEEN ? AND ?", (numbers[0], numbers[-1]))
        else:
            for at in range(0, len(numbers), AT_ONCE):
                part = numbers[at : at + AT_ONCE]
                found += _select(connection, f"number IN ({', '.join('?' * len(part))})", part)
        return cls._unpack(found)

    @classmethod
    def each(cls, connection: Any, where: str = "TRUE", given: Sequence[Any] = ()) -> Iterator[Groups]:
        """Read all groups for which an SQL condition holds, some at a time, in order.

        Raises:
            sqlite3.DatabaseError: a group does not have its checksum.
        """
        last = -1
        while found := _select(connection, f"number > ? AND {where}", (last, *given), AT_ONCE):
            last = found[-1][0]
            yield cls._unpack(found)

    @classmethod
    def add(cls, connection: Any, first: int, stop: int) -> None:
        """Make sure that there are groups for the slots from `first` to `stop`."""
        (row,) = _pack(np.repeat(NEVER, GROUP_SLOTS))
        numbers = range(first // GROUP_SLOTS, -(-stop // GROUP_SLOTS))
        connection.executemany("INSERT OR IGNORE INTO groups VALUES (?, 0, 0, 0, ?)", [(number, row) for number in numbers])

    @classmethod
    def _unpack(cls, found: list[tuple[int, bytes]]) -> Groups:
        if not found:
            return cls(np.zeros(0, np.int64), np.zeros(0, RECORD))
        numbers = np.array([number for number, _ in found], np.int64)
        rows = [row for _, row in found]
        if any(len(row) != _ROW_NBYTES for row in rows):
            raise sqlite3.DatabaseError("a group of slots has another length than groups have")
        whole = np.frombuffer(bytearray().join(rows), np.uint8).reshape(-1, _ROW_NBYTES)
        sums = np.ascontiguousarray(whole[:, :_SUM_NBYTES]).view(np.uint64).ravel()
        if not np.array_equal(sums, _sums(whole)):
            wrong = numbers[np.flatnonzero(sums != _sums(whole))[0]]
            raise sqlite3.DatabaseError(f"group {wrong} of slots does not have its checksum")
        return cls(numbers, np.ascontiguousarray(whole[:, _SUM_NBYTES:]).view(RECORD).ravel())

    @property
    def slots(self) -> Array:
        """The slots of `records`."""
        return (self.numbers[:, None] * GROUP_SLOTS + np.arange(GROUP_SLOTS)).ravel()

    def find(self, slots: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Return where the records of slots are, and for which there is one at all."""
        if not len(self.numbers):
            return np.zeros(len(slots), np.int64), np.zeros(len(slots), np.bool_)
        numbers = slots // GROUP_SLOTS
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return at * GROUP_SLOTS + slots % GROUP_SLOTS, self.numbers[at] == numbers

    def save(self, connection: Any, change: int = 0) -> None:
        """Write the groups back. `change`: which change it is; 0: none that others must know."""
        states = self.records["state"].reshape(-1, GROUP_SLOTS)
        free = np.count_nonzero(states == FREE, axis=1).tolist()
        reserved = np.count_nonzero(states == RESERVED, axis=1).tolist()
        changes = [change] * len(free)
        rows = zip(_pack(self.records), free, reserved, changes, self.numbers.tolist(), strict=True)
        connection.executemany(
            "UPDATE groups SET records = ?, free = ?, reserved = ?, change = max(change, ?) WHERE number = ?", rows
        )

    def rows(self, connection: Any, which: Array) -> list[Row]:
        """Return the records at `which` as rows."""
        records, slots = self.records[which], self.slots[which]
        keys: list[bytes | None] = []
        for slot, state, key, nbytes in zip(
            slots.tolist(), records["state"].tolist(), records["key"].tolist(), records["key_nbytes"].tolist(), strict=True
        ):
            if state != FULL:
                keys.append(None)
            elif nbytes <= INLINE_KEY_NBYTES:
                # numpy leaves out zeros at the end.
                keys.append(key.ljust(nbytes, b"\0"))
            else:
                keys.append(connection.execute("SELECT key FROM long_keys WHERE slot = ?", (slot,)).fetchone()[0])
        columns = (records[name].tolist() for name in ("checksum", "kind", "stored", "used", "change"))
        return list(map(Row, slots.tolist(), records["state"].tolist(), records["generation"].tolist(), keys, *columns))

    def set_keys(self, connection: Any, at: Array, slots: Array, keys: Sequence[bytes]) -> None:
        """Set the keys of the records at `at`, which are those of `slots`."""
        lengths = np.fromiter(map(len, keys), np.uint8, len(keys))
        self.records["key_nbytes"][at] = lengths
        self.records["key"][at] = np.array(keys, RECORD["key"])
        long = np.flatnonzero(lengths > INLINE_KEY_NBYTES).tolist()
        if long:
            connection.executemany("INSERT OR REPLACE INTO long_keys VALUES (?, ?)", [(int(slots[i]), keys[i]) for i in long])


def _select(connection: Any, where: str, given: Sequence[Any], limit: int = -1) -> list[tuple[int, bytes]]:
    query = f"SELECT number, records FROM groups WHERE {where} ORDER BY number LIMIT {limit}"
    found: list[tuple[int, bytes]] = connection.execute(query, given).fetchall()
    return found


def _pack(records: NDArray[Any]) -> list[NDArray[np.uint8]]:
    given = records.view(np.uint8).reshape(-1, GROUP_SLOTS * RECORD.itemsize)
    whole = np.empty((len(given), _ROW_NBYTES), np.uint8)
    whole[:, _SUM_NBYTES:] = given
    whole[:, :_SUM_NBYTES] = _sums(whole).view(np.uint8).reshape(-1, _SUM_NBYTES)
    return list(whole)


def _sums(whole: NDArray[np.uint8]) -> NDArray[np.uint64]:
    found = np.zeros(len(whole), np.uint64)
    addresses = whole.ctypes.data + _SUM_NBYTES + np.arange(len(whole)) * _ROW_NBYTES
    lengths = np.full(len(whole), _ROW_NBYTES - _SUM_NBYTES, np.int64)
    values = ffi.from_buffer("uint64_t[]", found, require_writable=True)
    lib.nx_crc64nvme(int64(addresses), int64(lengths), len(whole), 1, values)
    return found

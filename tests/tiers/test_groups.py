"""The records of slots in SQLite: what is written is read, groups that are damaged are refused, long keys have their own table."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from nixl_async.tiers import groups as module
from nixl_async.tiers.groups import FREE, FULL, GROUP_SLOTS, INLINE_KEY_NBYTES, RESERVED, SCHEMA, UNUSED, Groups, Stored


@pytest.fixture
def connection() -> Iterator[Any]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as made:
        made.executescript(SCHEMA)
        yield made


def _fill(connection: Any, slots: list[int], keys: list[bytes], change: int = 1) -> None:
    Groups.add(connection, 0, max(slots) + 1)
    given = np.array(slots)
    groups = Groups.of(connection, given)
    at, there = groups.find(given)
    assert there.all()
    for name, value in {"state": FULL, "generation": 3, "checksum": 1 << 63, "used": 1.5, "change": change}.items():
        groups.records[name][at] = value
    groups.set_keys(connection, at, given, keys)
    groups.save(connection, change)


def _all(connection: Any, **where: Any) -> dict[int, bytes | None]:
    found = {}
    for groups in Groups.each(connection, **where):
        for row in groups.rows(connection, np.flatnonzero(groups.records["state"] != UNUSED)):
            found[row.slot] = row.key
    return found


@pytest.mark.parametrize(
    "key", [b"k", b"\0", b"ends with zeros\0\0", b"x" * INLINE_KEY_NBYTES, b"y" * (INLINE_KEY_NBYTES + 1), b"\0" * 255]
)
def test_every_key_comes_back(connection: Any, key: bytes) -> None:
    _fill(connection, [5, GROUP_SLOTS + 5], [b"another", key])
    assert _all(connection) == {5: b"another", GROUP_SLOTS + 5: key}
    _fill(connection, [GROUP_SLOTS + 5], [b"later"])
    assert _all(connection)[GROUP_SLOTS + 5] == b"later"


def test_a_row_has_what_was_written(connection: Any) -> None:
    _fill(connection, [70], [b"k"], change=9)
    groups = Groups.of(connection, np.array([70]))
    (row,) = groups.rows(connection, np.array([70 - GROUP_SLOTS]))
    assert row == (70, FULL, 3, b"k", 1 << 63, 0, 0.0, 1.5, 9)
    groups.records["state"][70 - GROUP_SLOTS] = RESERVED
    assert groups.rows(connection, np.array([70 - GROUP_SLOTS]))[0].key is None


def test_groups_are_found_by_what_is_in_them(connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    slots = [at * GROUP_SLOTS for at in range(7)]
    _fill(connection, slots, [b"%d" % slot for slot in slots])
    scattered = Groups.of(connection, np.array([6, 0, 3]) * GROUP_SLOTS)
    assert scattered.numbers.tolist() == [0, 3, 6]
    scattered.records["state"][[0, 2 * GROUP_SLOTS]] = FREE
    scattered.records["state"][GROUP_SLOTS] = RESERVED
    scattered.save(connection, 5)
    assert [g.numbers.tolist() for g in Groups.each(connection, "free > 0")] == [[0, 6]]
    assert [g.numbers.tolist() for g in Groups.each(connection, "reserved > 0")] == [[3]]
    assert [g.numbers.tolist() for g in Groups.each(connection, "change > ?", (4,))] == [[0, 3], [6]]
    scattered.save(connection)
    assert [g.numbers.tolist() for g in Groups.each(connection, "change > ?", (4,))] == [[0, 3], [6]]


def test_slots_without_a_group_are_not_found(connection: Any) -> None:
    _fill(connection, [0], [b"k"])
    groups = Groups.of(connection, np.array([900, 0, 90]))
    at, there = groups.find(np.array([900, 0, 90]))
    assert there.tolist() == [False, True, False]
    assert at[1] == 0
    nobody = Groups.of(connection, np.array([900]))
    assert not nobody.find(np.array([900]))[1].any()
    nobody.save(connection)


@pytest.mark.parametrize("damage", ["UPDATE groups SET records = substr(records, 2)", "flip"])
def test_a_damaged_group_is_refused(connection: Any, damage: str) -> None:
    _fill(connection, [0, GROUP_SLOTS], [b"k", b"l"])
    if damage == "flip":
        (whole,) = connection.execute("SELECT records FROM groups WHERE number = 1").fetchone()
        flipped = bytearray(whole)
        flipped[100] ^= 4
        connection.execute("UPDATE groups SET records = ? WHERE number = 1", (flipped,))
    else:
        connection.execute(damage + " WHERE number = 1")
    assert _all(connection, where="number < 1") == {0: b"k"}
    with pytest.raises(sqlite3.DatabaseError, match="group"):
        Groups.of(connection, np.array([GROUP_SLOTS]))


def test_what_is_stored_together_is_one() -> None:
    parts = [
        Stored(np.array([at]), np.array([1]), [b"%d" % at], np.array([at], np.uint64), np.array([0.5 * at]), 1)
        for at in range(3)
    ]
    whole = Stored.joined(parts)
    assert (whole.slots.tolist(), whole.keys, whole.checksums.tolist()) == ([0, 1, 2], [b"0", b"1", b"2"], [0, 1, 2])
    part = whole.part(1, 3)
    assert (len(part), part.keys, part.stored.tolist(), part.kind) == (2, [b"1", b"2"], [0.5, 1.0], 1)
    assert Stored.joined(parts[:1]) is parts[0]
    assert not len(Stored.joined([]))

"""What a process knows of the slots, whatever order the news come in."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nixl_async.tiers.groups import FREE, FULL, RESERVED, Row, Stored
from nixl_async.tiers.slots import SlotTable

NOW = time.time()


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def _row(slot: int, state: int, generation: int, key: bytes | None, *, stored: float = NOW, used: float = NOW) -> Row:
    return Row(slot, state, generation, key, -1, 1, stored, used, 1)


def test_news_of_blocks() -> None:
    table = SlotTable(8)
    table.load([_row(3, FULL, 1, b"a"), _row(4, FULL, 1, b"b")])
    assert table.slot_of == {b"a": 3, b"b": 4}
    assert table.checksum[3] == 0xFFFFFFFFFFFFFFFF
    table.load([_row(3, RESERVED, 2, None), _row(4, FREE, 2, None)])
    assert table.slot_of == {}
    assert table.generation[3] == 2


def test_old_news_change_nothing() -> None:
    table = SlotTable(8)
    table.store(Stored(np.array([3]), np.array([2]), [b"new"], np.zeros(1, np.uint64), np.array([NOW]), 1))
    # Read before the slot was filled, arriving afterwards.
    table.load([_row(3, FULL, 1, b"old"), _row(3, RESERVED, 2, None)])
    assert table.slot_of == {b"new": 3}


def test_slots_of_a_larger_directory_are_not_ours() -> None:
    table = SlotTable(2)
    table.load([_row(2, FULL, 1, b"a")])
    assert table.slot_of == {}


def test_the_younger_of_two_is_used_and_the_other_goes_first() -> None:
    table = SlotTable(4)
    table.load([_row(0, FULL, 1, b"a", stored=NOW - 5), _row(1, FULL, 1, b"b", used=NOW - 9), _row(2, FULL, 1, b"a")])
    assert table.slot_of[b"a"] == 2
    assert table.oldest(1, None).tolist() == [[0, 1]]
    table.forget(0)
    assert table.slot_of[b"a"] == 2


def test_every_slot_of_a_key_is_found() -> None:
    table = SlotTable(4)
    table.load([_row(0, FULL, 1, b"a", stored=NOW - 5), _row(1, FULL, 1, b"b"), _row(2, FULL, 1, b"a")])
    table.store(Stored(np.array([3]), np.array([1]), [b"a"], np.zeros(1, np.uint64), np.array([NOW - 3]), 1))
    assert sorted(table.all_of([b"a", b"nobody's"])) == [0, 2, 3]
    table.forget(2)
    table.forget_taken(np.array([0]), np.array([2]))
    assert table.all_of([b"a"]) == [3]
    table.forget(3)
    assert table.all_of([b"a", b"b"]) == [1]


def test_the_least_recently_used_go_first_but_not_what_is_read() -> None:
    table = SlotTable(6)
    table.load([_row(at, FULL, 1, bytes([at]), used=NOW - at) for at in range(6)])
    table.pins[5] = 1
    assert table.oldest(2, None)[:, 0].tolist() == [4, 3]
    table.touch(np.array([4]))
    assert table.oldest(9, None)[:, 0].tolist() == [3, 2, 1, 0, 4]


def test_what_is_too_old_goes_before() -> None:
    table = SlotTable(3)
    table.load([_row(0, FULL, 1, b"a", stored=NOW - 100), _row(1, FULL, 1, b"b", used=NOW - 50), _row(2, FULL, 1, b"c")])
    assert table.oldest(2, 60)[:, 0].tolist() == [0, 1]
    assert table.expired(60).tolist() == [0]
    young = table.young(60)
    assert b"a" not in young
    assert b"b" in young
    assert b"z" not in young


def test_uses_are_told_once() -> None:
    table = SlotTable(3)
    table.load([_row(0, FULL, 4, b"a"), _row(1, FULL, 5, b"b")])
    table.touch(np.array([0, 1]))
    table.touch(np.array([1]))
    blocks, used = table.take_touched()
    assert blocks.tolist() == [[0, 4], [1, 5]]
    assert used.tolist() == [NOW, NOW]
    assert not len(table.take_touched()[0])

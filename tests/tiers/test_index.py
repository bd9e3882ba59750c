"""The index of a directory: several processes, the dead, damage."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nixl_async import BackendError, ConfigurationError, OutOfSpace
from nixl_async.tiers import groups
from nixl_async.tiers import index as module
from nixl_async.tiers.groups import NOTHING, Stored
from nixl_async.tiers.index import Index
from tests.agents import ROOT

BLOCK = 4096
Open = Callable[..., Index]


@pytest.fixture
def open_index(tmp_path: Path) -> Iterator[Open]:
    opened: list[Index] = []

    def make(n_slots: int = 16, block_nbytes: int = BLOCK) -> Index:
        made = Index(str(tmp_path / "d"), block_nbytes, n_slots * block_nbytes, 8 * block_nbytes)
        made.open()
        opened.append(made)
        return made

    yield make
    for one in opened:
        one.close(NOTHING[:, 0])


def _segments(index: Index) -> None:
    for number in range(2):
        with open(index.segment_path(number), "wb") as file:
            file.truncate(8 * BLOCK)


def _stored(slots: Any, keys: list[bytes]) -> Stored:
    n, given = len(keys), np.array(slots, np.int64)
    return Stored(given[:, 0], given[:, 1], keys, np.full(n, 7, np.uint64), np.full(n, time.time()), 1)


def _reserve(index: Index, n: int, victims: Any = (), *, durable: bool = False) -> list[tuple[int, int]]:
    got, _, _ = index.reserve(n, lambda: np.array(victims, np.int64).reshape(-1, 2), durable)
    return [(slot, generation) for slot, generation in got.tolist()]


def _store(index: Index, keys: list[bytes]) -> list[tuple[int, int]]:
    got = _reserve(index, len(keys))
    index.store(_stored(got, keys), False)
    return got


def _keys(index: Index, since: int = 0) -> set[bytes | None]:
    return {row.key for row in index.changes(since)}


def test_what_one_stores_the_other_learns(open_index: Open) -> None:
    a, b = open_index(), open_index()
    _store(a, [b"x", b"y"])
    assert _keys(b) == {b"x", b"y"}
    assert b.changes(b.latest()) == []
    before = b.latest()
    _store(b, [b"z"])
    assert _keys(a, before) == {b"z"}


def test_two_never_reserve_the_same_slot(open_index: Open) -> None:
    a, b = open_index(), open_index()
    mine, theirs = _reserve(a, 6), _reserve(b, 6)
    assert not {slot for slot, _ in mine} & {slot for slot, _ in theirs}


def test_taking_a_block_counts_its_slot_up_and_is_known_before_it_is_written(open_index: Open) -> None:
    a, b = open_index(4), open_index(4)
    _segments(a)
    got = _store(a, [b"1", b"2", b"3", b"4"])
    since = b.latest()
    taken_from = got[2]
    reserved, taken, change = b.reserve(1, lambda: np.array([(99, 1), (3, 9), taken_from]))
    assert reserved.tolist() == [[taken_from[0], taken_from[1] + 1]]
    assert taken.tolist() == [taken_from[0]]
    assert [(row.slot, row.key) for row in a.changes(since)] == [(taken_from[0], None)]
    assert change == a.latest()
    with pytest.raises(OutOfSpace, match="all 4 slots"):
        # One that was taken already is not taken again by its old generation.
        _reserve(a, 1, [taken_from])


def test_what_is_not_reserved_cannot_be_stored(open_index: Open) -> None:
    a, b = open_index(), open_index()
    got = _reserve(a, 2)
    for index, slots in ((b, got), (a, [got[0], (got[1][0], 99)]), (a, [got[0], (900, 1)])):
        with pytest.raises(BackendError, match="taken from this process"):
            index.store(_stored(slots, [b"x", b"y"]), True)
        assert _keys(a) == set()


def test_dropping_is_for_the_generation_that_was_meant(open_index: Open) -> None:
    a = open_index()
    ((slot, generation),) = _store(a, [b"x"])
    a.drop(np.array([(slot, generation - 1)]))
    assert _keys(a) == {b"x"}
    a.drop(np.array([(slot, generation)]))
    assert _keys(a) == {None}


def test_when_blocks_were_used_is_told(open_index: Open) -> None:
    a, b = open_index(), open_index()
    ((slot, generation),) = _store(a, [b"x"])
    a.touch(np.array([(slot, generation), (slot + 1, 1)]), np.array([12345.0, 1.0]))
    assert [row.used for row in b.changes(0)] == [12345.0]


def test_blocks_are_there_when_it_is_opened_again(open_index: Open) -> None:
    a = open_index()
    _segments(a)
    _store(a, [b"x", b"y"])
    a.close(NOTHING[:, 0])
    b = Index(str(a.directory), BLOCK, 16 * BLOCK, 8 * BLOCK)
    rows, change = b.open()
    assert {row.key for row in rows} == {b"x", b"y"}
    assert change == b.latest()
    b.close(NOTHING[:, 0])


def test_given_back_slots_are_free_at_once(open_index: Open) -> None:
    a = open_index(4)
    a.close(np.array([slot for slot, _ in _reserve(a, 4)]))
    assert len(_reserve(open_index(4), 4)) == 4


def test_what_the_dead_had_reserved_is_free_after_a_pause(open_index: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    a = open_index(4)
    program = (
        "import os, sys; from nixl_async.tiers.groups import NOTHING; from nixl_async.tiers.index import Index\n"
        f"index = Index(sys.argv[1], {BLOCK}, {4 * BLOCK}, {8 * BLOCK}); index.open()\n"
        "assert len(index.reserve(4, lambda: NOTHING)[0]) == 4; os._exit(9)"
    )
    ran = subprocess.run([sys.executable, "-c", program, str(a.directory)], cwd=ROOT, check=False)
    assert ran.returncode == 9
    with pytest.raises(OutOfSpace):
        _reserve(a, 1)
    b = open_index(4)
    assert a.recovered == 0
    began = time.time()
    monkeypatch.setattr(module.time, "time", lambda: began + module.QUARANTINE_SECONDS + 1)
    assert len(_reserve(b, 4)) == 4


def test_a_damaged_index_is_put_aside(open_index: Open) -> None:
    a = open_index()
    _segments(a)
    _store(a, [b"x"])
    a.close(NOTHING[:, 0])
    path = a.directory / "index.sqlite3"
    path.write_bytes(b"not a database at all" * 1000)
    b = open_index()
    assert _keys(b) == set()
    assert Path(b.replaced).read_bytes().startswith(b"not a database")
    assert _store(b, [b"y"])


def test_a_damaged_page_is_found_on_opening(open_index: Open) -> None:
    a = open_index(2000)
    _store(a, [b"key %d" % n for n in range(1000)])
    a.close(NOTHING[:, 0])
    path = a.directory / "index.sqlite3"
    whole = bytearray(path.read_bytes())
    whole[3 * 4096 : 12 * 4096] = b"\xa5" * (9 * 4096)
    path.write_bytes(whole)
    assert open_index(2000).replaced


def test_blocks_of_a_segment_that_is_gone_are_forgotten(open_index: Open) -> None:
    a = open_index()
    _segments(a)
    _store(a, [b"%d" % n for n in range(12)])
    a.close(NOTHING[:, 0])
    Path(a.segment_path(1)).unlink()
    with open(a.segment_path(0), "r+b") as file:
        file.truncate(5 * BLOCK)
    b = Index(str(a.directory), BLOCK, 16 * BLOCK, 8 * BLOCK)
    rows, _ = b.open()
    assert sorted(row.slot for row in rows) == [0, 1, 2, 3, 4]
    assert b.recovered == 7
    b.close(NOTHING[:, 0])


def test_other_sizes_are_refused(open_index: Open) -> None:
    a = open_index(16)
    with pytest.raises(ConfigurationError, match="holds blocks of 4096 bytes"):
        open_index(16, 8192)
    with pytest.raises(ConfigurationError, match="in use with room for 16 blocks"):
        open_index(8)
    larger = open_index(32)
    assert len(_reserve(larger, 32)) == 32
    a.close(NOTHING[:, 0])


def test_made_smaller_it_keeps_what_still_has_room(open_index: Open) -> None:
    a = open_index()
    _segments(a)
    _store(a, [b"%d" % n for n in range(12)])
    a.close(NOTHING[:, 0])
    b = open_index(4)
    assert len(_keys(b)) == 4
    with pytest.raises(OutOfSpace):
        _reserve(b, 1)


def test_only_what_is_to_be_durable_waits_for_the_device(open_index: Open) -> None:
    index = open_index()
    index.store(_stored(_reserve(index, 4)[:1], [b"x"]), True)
    full, normal = (2,), (1,)
    assert index._write.execute("PRAGMA synchronous").fetchone() == full
    _reserve(index, 1)
    assert index._write.execute("PRAGMA synchronous").fetchone() == normal
    _reserve(index, 1, durable=True)
    assert index._write.execute("PRAGMA synchronous").fetchone() == full


def test_scattered_blocks_of_many_groups(open_index: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "AT_ONCE", 3)
    index = open_index(900)
    got = _store(index, [b"%d" % at for at in range(900)])
    scattered = got[5::67]
    since = index.latest()
    index.drop(np.array(scattered))
    assert [(row.slot, row.key) for row in index.changes(since)] == [(slot, None) for slot, _ in scattered]
    assert len(_keys(index)) == 900 - len(scattered) + 1
    again = _reserve(index, 900)
    assert again == [(slot, generation + 2) for slot, generation in scattered]


def test_a_flipped_bit_is_found_on_opening(open_index: Open) -> None:
    a = open_index()
    _store(a, [b"the key of a block"])
    a.close(NOTHING[:, 0])
    path = a.directory / "index.sqlite3"
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"the key of a block")] ^= 1
    path.write_bytes(whole)
    assert open_index().replaced


def test_an_index_of_another_form_is_refused(open_index: Open) -> None:
    a = open_index()
    a._set("version", module.VERSION - 1)
    with pytest.raises(ConfigurationError, match=f"in form {module.VERSION - 1}; asked for .* in form {module.VERSION}"):
        open_index()


def test_a_glance_does_not_wait(open_index: Open) -> None:
    a, b = open_index(), open_index()
    before = a.glance()
    assert before == a.latest()
    _store(b, [b"x"])
    assert a.glance() == a.latest() != before
    with closing(sqlite3.connect(a.directory / "index.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert a.glance() == a.latest(), "it waits for no writer"
        other.execute("ROLLBACK")
    a._glance.close()
    assert a.glance() is None

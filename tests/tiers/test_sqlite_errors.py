"""SQLite's errors: no room and a lock held by another can be told apart from the rest."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from nixl_async import BackendError, OutOfSpace
from nixl_async.tiers.sqlite_errors import sqlite_mapped


def test_no_room(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("PRAGMA max_page_count = 2")
        with pytest.raises(OutOfSpace, match="storing in there"), sqlite_mapped("storing", "there"):
            connection.execute("CREATE TABLE t (value)")
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    connection.close()


def test_a_lock_that_another_holds_can_be_tried_again(tmp_path: Path) -> None:
    one, other = (sqlite3.connect(tmp_path / "a", timeout=0, isolation_level=None) for _ in range(2))
    one.execute("BEGIN EXCLUSIVE")
    with pytest.raises(BackendError) as caught, sqlite_mapped("storing", "there"):
        other.execute("BEGIN EXCLUSIVE")
    assert caught.value.retryable
    one.close()
    with pytest.raises(BackendError) as caught, sqlite_mapped("storing", "there"):
        other.execute("SELECT nothing")
    assert not caught.value.retryable
    other.close()


def test_the_operating_system_s(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="opening in there: No such file"), sqlite_mapped("opening", "there"):
        os.stat(tmp_path / "absent")

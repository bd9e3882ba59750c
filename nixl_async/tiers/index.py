"""The index of a directory of blocks: which block is in which slot, in SQLite, shared by the processes that use the directory.

Everything here blocks: call it on a thread. A slot is FREE, RESERVED by a process that is about to write it, or FULL. What keeps
wrong bytes from being served:

* A slot becomes FULL in a transaction that follows the writing of its bytes (and their fdatasync, where that was asked for).
* A slot that is FULL becomes RESERVED, its generation counted up, in a transaction that comes before it is written again. Whoever
  read it meanwhile finds the generation changed afterwards.
* Each process holds a lock file for as long as it lives; what a dead one had reserved becomes FREE, after a pause in which writes
  that the kernel had still in hand come to an end.

`change` numbers the transactions that make slots FULL or take that away; processes ask for what changed since they last asked.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from nixl_async.errors import BackendError, ConfigurationError, OutOfSpace
from nixl_async.tiers.owners import Owners
from nixl_async.tiers.sqlite_errors import sqlite_mapped

VERSION = 1
FREE, RESERVED, FULL = 0, 1, 2
BUSY_SECONDS = 30.0
QUARANTINE_SECONDS = 1.0
"""How long a dead process's reserved slots are left alone."""
ROWS_AT_ONCE = 512
"""Rows that one statement updates; SQLite takes 32766 parameters."""
SQLITE_NEEDED = (3, 35, 0)

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL);
CREATE TABLE slots (
    slot INTEGER PRIMARY KEY, state INTEGER NOT NULL, generation INTEGER NOT NULL, owner INTEGER,
    key BLOB, checksum INTEGER, kind INTEGER, stored REAL, used REAL, change INTEGER
);
CREATE INDEX changed ON slots (change) WHERE change IS NOT NULL;
CREATE INDEX free ON slots (slot) WHERE state = 0;
"""
_ROW = "slot, state, generation, key, checksum, kind, stored, used, change"


class Row(NamedTuple):
    """A slot as it is in the index; `checksum` is signed, as SQLite has it."""

    slot: int
    state: int
    generation: int
    key: bytes | None
    checksum: int
    kind: int
    stored: float
    used: float
    change: int


class Stored(NamedTuple):
    """A block whose bytes are in place, to be made known."""

    slot: int
    key: bytes
    checksum: int
    kind: int
    stored: float


class Index:
    """The index in `directory`; opened by `open`, used from one thread at a time per connection."""

    def __init__(self, directory: str, block_nbytes: int, nbytes: int, segment_nbytes: int) -> None:
        self.directory = Path(directory)
        self._wanted = (block_nbytes, nbytes, segment_nbytes)
        self.owner = 0
        self.n_slots = self.segment_slots = 0
        self.recovered = 0
        """Slots that opening found unusable, or reserved by the dead."""
        self.replaced = ""
        """Where a damaged index was moved to; empty if it was sound."""
        self._owners = Owners(self.directory)
        self._write: Any = None
        self._read: Any = None

    def segment_path(self, number: int) -> str:
        """Return the path of a segment file."""
        return str(self.directory / f"segment-{number:06}")

    # Opening and closing.

    def open(self) -> tuple[list[Row], int]:
        """Open or make the index, verify it, clear up after the dead; return all blocks, and the change they are current with.

        Raises:
            ConfigurationError: the directory was made for other sizes.
            BackendError: SQLite or the operating system refuses.
        """
        if sqlite3.sqlite_version_info < SQLITE_NEEDED:
            raise ConfigurationError(f"SQLite {sqlite3.sqlite_version} is too old; 3.35 or later is needed")
        self._owners.make()
        with self._owners.opening(), sqlite_mapped("opening", str(self.directory)):
            alone = not self._owners.living()
            path = self.directory / "index.sqlite3"
            try:
                self._open(path, alone)
            except sqlite3.DatabaseError as error:
                self.close([])
                if isinstance(error, sqlite3.OperationalError) or not alone:
                    raise
                # Blocks can be made again, and a wrong index must not be used: begin anew, keep the old one to look at.
                self.replaced = f"{path}.damaged-{time.time_ns()}"
                os.replace(path, self.replaced)
                for name in ("-wal", "-shm"):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{path}{name}")
                self._open(path, alone)
            except BaseException:
                self.close([])
                raise
            try:
                self._join()
                self._check_segments()
                change = self.latest()
                found = self._read.execute(f"SELECT {_ROW} FROM slots WHERE state = {FULL} ORDER BY stored")
                return [Row(*row) for row in found], change
            except BaseException:
                self.close([])
                raise

    def _open(self, path: Path, alone: bool) -> None:
        self._write = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._read = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        for connection in (self._write, self._read):
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        self._write.execute("PRAGMA wal_autocheckpoint = 4000")
        if alone:
            found = self._write.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"quick_check: {found}")
        block_nbytes, nbytes, segment_nbytes = self._wanted
        with self._transaction():
            if not self._write.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0]:
                for statement in _SCHEMA.split(";"):
                    self._write.execute(statement)
                made = {
                    "version": VERSION,
                    "block_nbytes": block_nbytes,
                    "segment_slots": max(1, min(nbytes, segment_nbytes) // block_nbytes),
                    "n_slots": 0,
                    "high": 0,
                    "change": 0,
                }
                self._write.executemany("INSERT INTO meta VALUES (?, ?)", made.items())
            meta = dict(self._write.execute("SELECT name, value FROM meta"))
            if meta["version"] != VERSION or meta["block_nbytes"] != block_nbytes:
                raise ConfigurationError(
                    f"{self.directory} holds blocks of {meta['block_nbytes']} bytes in form {meta['version']}; asked for are"
                    f" {block_nbytes} bytes in form {VERSION}: give another directory"
                )
            self.segment_slots = meta["segment_slots"]
            self.n_slots = nbytes // block_nbytes
            if self.n_slots < meta["n_slots"]:
                if not alone:
                    raise ConfigurationError(
                        f"{self.directory} is in use with room for {meta['n_slots']} blocks, asked for are {self.n_slots}:"
                        " a directory can be made smaller only by the first process that opens it"
                    )
                self._write.execute("DELETE FROM slots WHERE slot >= ?", (self.n_slots,))
                self._set("high", min(meta["high"], self.n_slots))
            self._set("n_slots", self.n_slots)

    def _set(self, name: str, value: int) -> None:
        self._write.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    def _get(self, name: str) -> int:
        return int(self._write.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0])

    def _join(self) -> None:
        with self._transaction():
            self.recovered += self._bury()
            self.owner = int(self._write.execute("INSERT INTO owners (pid) VALUES (?)", (os.getpid(),)).lastrowid or 0)
            self._owners.join(self.owner)

    def _check_segments(self) -> None:
        """Free the slots whose segment file is not there, or too short for them."""
        block_nbytes = self._wanted[0]
        with self._transaction():
            high = self._get("high")
            for number in range(-(-high // self.segment_slots)):
                try:
                    held = os.stat(self.segment_path(number)).st_size // block_nbytes
                except FileNotFoundError:
                    held = 0
                first = number * self.segment_slots
                if held < self.segment_slots:
                    self.recovered += self._write.execute(
                        f"UPDATE slots SET state = {FREE}, key = NULL, generation = generation + 1, used = 0, change = ?"
                        f" WHERE slot >= ? AND slot < ? AND state = {FULL}",
                        (self._next_change(), first + held, first + self.segment_slots),
                    ).rowcount

    def close(self, slots: Sequence[int]) -> None:
        """Give back reserved slots and leave."""
        try:
            if self._owners.joined:
                with suppress(sqlite3.Error):
                    self.release(slots)
                    self._write.execute("DELETE FROM owners WHERE id = ?", (self.owner,))
        finally:
            for connection in (self._read, self._write):
                if connection is not None:
                    connection.close()
            self._owners.leave()

    def _bury(self) -> int:
        """Free what the dead had reserved, within a transaction; return how many slots those are."""
        freed = 0
        for (owner,) in self._write.execute("SELECT id FROM owners").fetchall():
            if owner == self.owner or not self._owners.is_dead(owner):
                continue
            freed += self._write.execute(
                f"UPDATE slots SET state = {FREE}, owner = NULL, used = ? WHERE owner = ? AND state = {RESERVED}",
                (time.time() + QUARANTINE_SECONDS, owner),
            ).rowcount
            self._write.execute("DELETE FROM owners WHERE id = ?", (owner,))
            self._owners.forget(owner)
        return freed

    # Transactions.

    @contextmanager
    def _transaction(self, durable: bool = False) -> Iterator[None]:
        # Without FULL, a commit is safe from the end of the process, and not from the end of the machine.
        self._write.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._write.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):
                self._write.execute("ROLLBACK")
            raise
        self._write.execute("COMMIT")

    def _next_change(self) -> int:
        found = self._write.execute("UPDATE meta SET value = value + 1 WHERE name = 'change' RETURNING value").fetchone()
        return int(found[0])

    def _update(self, columns: str, rows: Iterable[tuple[Any, ...]], what: str, where: str, given: tuple[Any, ...]) -> int:
        """Update the slots that `rows` name, many by one statement; return how many were updated.

        The interpreter is locked and unlocked for each statement, and a loop that is busy makes each of those slow.
        """
        left, done = list(rows), 0
        mark = f"({', '.join('?' * len(columns.split(',')))})"
        for at in range(0, len(left), ROWS_AT_ONCE):
            part = left[at : at + ROWS_AT_ONCE]
            self._write.execute(
                f"WITH new ({columns}) AS (VALUES {', '.join([mark] * len(part))})"
                f" UPDATE slots SET {what} FROM new WHERE slots.slot = new.slot AND {where}",
                [*(value for row in part for value in row), *given],
            )
            done += self._write.execute("SELECT changes()").fetchone()[0]
        return done

    def reserve(
        self, n: int, victims: Callable[[], Iterable[tuple[int, int]]], durable: bool = False
    ) -> tuple[list[tuple[int, int]], list[int], int]:
        """Reserve up to `n` slots: free ones, then ones never used; if there are none, all of `victims`, (slot, generation).

        Return the slots with their generations, those of them that were taken from blocks, and the change (0: nothing was taken).
        `durable`: return once that is on the device, without which the end of the machine can leave a block known whose slot was
        written again. Its checksum tells.

        Raises:
            OutOfSpace: not one slot can be had.
        """
        with sqlite_mapped("reserving slots", str(self.directory)), self._transaction(durable):
            got = self._reserve_free(n)
            if len(got) < n:
                got += self._reserve_fresh(n - len(got))
            taken: list[int] = []
            change = 0
            if not got:
                change = self._next_change()
                self._update(
                    "slot, generation",
                    victims(),
                    f"state = {RESERVED}, owner = ?, generation = slots.generation + 1, key = NULL, change = ?",
                    f"slots.generation = new.generation AND slots.state = {FULL}",
                    (self.owner, change),
                )
                got = self._write.execute("SELECT slot, generation FROM slots WHERE change = ?", (change,)).fetchall()
                taken = [slot for slot, _ in got]
            if not got and self._bury():
                got = self._reserve_free(n)
            if not got:
                raise OutOfSpace(
                    f"all {self.n_slots} slots of {self.directory} are being written or read; give the tier more bytes",
                    backend="tiers",
                )
            return got, taken, change

    def _reserve_free(self, n: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = self._write.execute(
            f"UPDATE slots SET state = {RESERVED}, owner = ?, generation = generation + 1 WHERE slot IN"
            f" (SELECT slot FROM slots WHERE state = {FREE} AND used <= ? AND slot < ? LIMIT ?) RETURNING slot, generation",
            (self.owner, time.time(), self.n_slots, n),
        ).fetchall()
        return found

    def _reserve_fresh(self, n: int) -> list[tuple[int, int]]:
        high = self._get("high")
        stop = min(high + n, self.n_slots)
        if stop <= high:
            return []
        self._set("high", stop)
        self._write.execute(
            "WITH RECURSIVE fresh (slot) AS (SELECT ? UNION ALL SELECT slot + 1 FROM fresh WHERE slot + 1 < ?)"
            f" INSERT INTO slots (slot, state, generation, owner) SELECT slot, {RESERVED}, 1, ? FROM fresh",
            (high, stop, self.owner),
        )
        return [(slot, 1) for slot in range(high, stop)]

    def store(self, blocks: Sequence[Stored], durable: bool) -> int:
        """Make blocks known whose bytes are in reserved slots; return the change. `durable`: return once that is on the device.

        Raises:
            BackendError: the slots are no longer this process's, or SQLite failed; then none of the blocks is known.
        """
        with sqlite_mapped("storing blocks", str(self.directory)):
            with self._transaction(durable):
                change = self._next_change()
                done = self._update(
                    "slot, key, checksum, kind, stored",
                    blocks,
                    f"state = {FULL}, owner = NULL, key = new.key, checksum = new.checksum, kind = new.kind, stored = new.stored,"
                    " used = new.stored, change = ?",
                    f"slots.owner = {self.owner} AND slots.state = {RESERVED}",
                    (change,),
                )
                if done != len(blocks):
                    raise BackendError(
                        f"{len(blocks) - done} of {len(blocks)} slots of {self.directory} were taken from this process",
                        backend="tiers",
                    )
            return change

    def release(self, slots: Sequence[int]) -> None:
        """Give reserved slots back."""
        if slots:
            with self._transaction():
                self._write.executemany(
                    f"UPDATE slots SET state = {FREE}, owner = NULL, used = 0 WHERE slot = ? AND owner = ? AND state = {RESERVED}",
                    [(slot, self.owner) for slot in slots],
                )

    def drop(self, blocks: Sequence[tuple[int, int]]) -> int:
        """Forget blocks, (slot, generation), that are still these; return the change."""
        with sqlite_mapped("dropping blocks", str(self.directory)), self._transaction():
            change = self._next_change()
            self._write.executemany(
                f"UPDATE slots SET state = {FREE}, key = NULL, generation = generation + 1, used = 0, change = ?"
                f" WHERE slot = ? AND generation = ? AND state = {FULL}",
                [(change, slot, generation) for slot, generation in blocks],
            )
            return change

    def touch(self, blocks: Sequence[tuple[int, int, float]]) -> int:
        """Note when blocks, (slot, generation, time), were last used; return the change."""
        with sqlite_mapped("touching blocks", str(self.directory)), self._transaction():
            change = self._next_change()
            self._write.executemany(
                f"UPDATE slots SET used = ?, change = ? WHERE slot = ? AND generation = ? AND state = {FULL}",
                [(used, change, slot, generation) for slot, generation, used in blocks],
            )
            return change

    def changes(self, since: int) -> list[Row]:
        """Return the slots that changed after `since`, in order. On the reading connection: it waits for no writer."""
        with sqlite_mapped("reading the index", str(self.directory)):
            (latest,) = self._read.execute("SELECT value FROM meta WHERE name = 'change'").fetchone()
            if latest == since:
                return []
            found = self._read.execute(f"SELECT {_ROW} FROM slots WHERE change > ? ORDER BY change", (since,))
            return [Row(*row) for row in found]

    def latest(self) -> int:
        """Return the number of the latest change."""
        return int(self._read.execute("SELECT value FROM meta WHERE name = 'change'").fetchone()[0])

"""The index of a directory of blocks: which block is in which slot, in SQLite, shared by the processes that use the directory.

Everything here blocks: call it on a thread. `groups.py` has the form of what is kept of a slot: it is FREE, RESERVED by a process
that is about to write it, or FULL. What keeps wrong bytes from being served:

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nixl_async.errors import BackendError, ConfigurationError, OutOfSpace
from nixl_async.tiers.groups import FREE, FULL, GROUP_SLOTS, NEVER, NOTHING, PAGE_NBYTES, RESERVED, SCHEMA, Groups, Row, Stored
from nixl_async.tiers.owners import Owners
from nixl_async.tiers.sqlite_errors import sqlite_mapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nixl_async.descriptors import Array

VERSION = 2
BUSY_SECONDS = 30.0
QUARANTINE_SECONDS = 1.0
"""How long a dead process's reserved slots are left alone."""
SQLITE_NEEDED = (3, 35, 0)

_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL);
{SCHEMA}
"""


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
        self._glance: Any = None

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
                self.close(NOTHING[:, 0])
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
                self.close(NOTHING[:, 0])
                raise
            try:
                self._join()
                self._check_segments()
                with self._snapshot():
                    change, found = self.latest(), []
                    for groups in Groups.each(self._read):
                        found += groups.rows(self._read, np.flatnonzero(groups.records["state"] == FULL))
                found.sort(key=lambda row: row.stored)
                return found, change
            except BaseException:
                self.close(NOTHING[:, 0])
                raise

    def _open(self, path: Path, alone: bool) -> None:
        self._write = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._read = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._glance = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
        for connection in (self._write, self._read, self._glance):
            connection.execute(f"PRAGMA page_size = {PAGE_NBYTES}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        self._write.execute("PRAGMA wal_autocheckpoint = 4000")
        if alone:
            found = self._write.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"quick_check: {found}")
        self._make_ready(alone)
        if alone:
            with self._snapshot():
                for _ in Groups.each(self._read):
                    pass  # Each has its checksum, or this raises.

    def _make_ready(self, alone: bool) -> None:
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
                self._shrink()
                self._set("high", min(meta["high"], self.n_slots))
            self._set("n_slots", self.n_slots)

    def _shrink(self) -> None:
        """Forget the slots that there is no longer room for, within a transaction."""
        self._write.execute("DELETE FROM groups WHERE number >= ?", (-(-self.n_slots // GROUP_SLOTS),))
        last = Groups.of(self._write, np.array([self.n_slots]))
        last.records[last.slots >= self.n_slots] = NEVER
        last.save(self._write)

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
                    groups = Groups.of(self._write, np.arange(first + held, first + self.segment_slots))
                    slots, records = groups.slots, groups.records
                    lost = (slots >= first + held) & (slots < first + self.segment_slots) & (records["state"] == FULL)
                    self.recovered += self._free(groups, np.flatnonzero(lost))

    def close(self, slots: Array) -> None:
        """Give back reserved slots and leave."""
        try:
            if self._owners.joined:
                with suppress(sqlite3.Error):
                    self.release(slots)
                    self._write.execute("DELETE FROM owners WHERE id = ?", (self.owner,))
        finally:
            for connection in (self._glance, self._read, self._write):
                if connection is not None:
                    connection.close()
            self._owners.leave()

    def _bury(self) -> int:
        """Free what the dead had reserved, within a transaction; return how many slots those are."""
        freed = 0
        for (owner,) in self._write.execute("SELECT id FROM owners").fetchall():
            if owner == self.owner or not self._owners.is_dead(owner):
                continue
            for groups in Groups.each(self._write, "reserved > 0"):
                records = groups.records
                dead = (records["state"] == RESERVED) & (records["owner"] == owner)
                records["state"][dead] = FREE
                records["used"][dead] = time.time() + QUARANTINE_SECONDS
                groups.save(self._write)
                freed += int(np.count_nonzero(dead))
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

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Have all that is read on the reading connection be of one moment."""
        self._read.execute("BEGIN")
        try:
            yield
        finally:
            # Nothing was written; after an error there may be none.
            with suppress(sqlite3.Error):
                self._read.execute("ROLLBACK")

    def _next_change(self) -> int:
        found = self._write.execute("UPDATE meta SET value = value + 1 WHERE name = 'change' RETURNING value").fetchone()
        return int(found[0])

    def _free(self, groups: Groups, which: Array) -> int:
        """Forget the blocks of the records at `which`, within a transaction; return how many."""
        if len(which):
            records, change = groups.records, self._next_change()
            records["state"][which] = FREE
            records["generation"][which] += 1
            records["used"][which] = 0.0
            records["change"][which] = change
            groups.save(self._write, change)
        return len(which)

    def reserve(self, n: int, victims: Callable[[], Array], durable: bool = False) -> tuple[Array, Array, int]:
        """Reserve up to `n` slots: free ones, then ones never used; if there are none, all of `victims`, (slot, generation).

        Return the slots with their generations, in order, those slots that were taken from blocks, and the change (0: nothing was
        taken). `durable`: return once that is on the device, without which the end of the machine can leave a block known whose
        slot was written again. Its checksum tells.

        Raises:
            OutOfSpace: not one slot can be had.
        """
        with sqlite_mapped("reserving slots", str(self.directory)), self._transaction(durable):
            got = self._reserve_free(n)
            if len(got) < n:
                got = np.concatenate((got, self._reserve_fresh(n - len(got))))
            taken, change = NOTHING[:, 0], 0
            if not len(got):
                change = self._next_change()
                got = self._reserve_full(victims(), change)
                taken = got[:, 0]
            if not len(got) and self._bury():
                got = self._reserve_free(n)
            if not len(got):
                raise OutOfSpace(
                    f"all {self.n_slots} slots of {self.directory} are being written or read; give the tier more bytes",
                    backend="tiers",
                )
            return got[np.argsort(got[:, 0])], taken, change

    def _take(self, groups: Groups, which: Array) -> Array:
        """Reserve the records at `which`; return the slots with their generations."""
        records = groups.records
        records["state"][which] = RESERVED
        records["owner"][which] = self.owner
        records["generation"][which] += 1
        return np.stack((groups.slots[which], records["generation"][which]), axis=1)

    def _reserve_free(self, n: int) -> Array:
        got, now = [NOTHING], time.time()
        for groups in Groups.each(self._write, "free > 0"):
            records = groups.records
            free = (records["state"] == FREE) & (records["used"] <= now) & (groups.slots < self.n_slots)
            got.append(self._take(groups, np.flatnonzero(free)[: n - sum(map(len, got))]))
            groups.save(self._write)
            if sum(map(len, got)) == n:
                break
        return np.concatenate(got)

    def _reserve_fresh(self, n: int) -> Array:
        high = self._get("high")
        stop = min(high + n, self.n_slots)
        if stop <= high:
            return NOTHING
        self._set("high", stop)
        Groups.add(self._write, high, stop)
        groups = Groups.of(self._write, np.arange(high, stop))
        slots = groups.slots
        got = self._take(groups, np.flatnonzero((slots >= high) & (slots < stop)))
        groups.save(self._write)
        return got

    def _reserve_full(self, victims: Array, change: int) -> Array:
        groups, which = self._still(victims)
        groups.records["change"][which] = change
        got = self._take(groups, which)
        groups.save(self._write, change)
        return got

    def _still(self, blocks: Array) -> tuple[Groups, Array]:
        """Return the groups of blocks, (slot, generation), and where those of them are that are still these."""
        slots, generations = blocks[:, 0], blocks[:, 1]
        groups = Groups.of(self._write, slots)
        at, there = groups.find(slots)
        if not there.all():
            at, generations = at[there], generations[there]
        records = groups.records[at]
        return groups, at[(records["state"] == FULL) & (records["generation"] == generations)]

    def store(self, blocks: Stored, durable: bool) -> int:
        """Make blocks known whose bytes are in reserved slots; return the change. `durable`: return once that is on the device.

        Raises:
            BackendError: the slots are no longer this process's, or SQLite failed; then none of the blocks is known.
        """
        with sqlite_mapped("storing blocks", str(self.directory)):
            with self._transaction(durable):
                change = self._next_change()
                groups = Groups.of(self._write, blocks.slots)
                at, there = groups.find(blocks.slots)
                records = groups.records
                mine = there & (records["state"][at] == RESERVED) & (records["owner"][at] == self.owner)
                mine &= records["generation"][at] == blocks.generations
                if not mine.all():
                    raise BackendError(
                        f"{np.count_nonzero(~mine)} of {len(blocks)} slots of {self.directory} were taken from this process",
                        backend="tiers",
                    )
                values = {"state": FULL, "checksum": blocks.checksums, "kind": blocks.kind, "change": change}
                for name, value in (values | {"stored": blocks.stored, "used": blocks.stored}).items():
                    records[name][at] = value
                groups.set_keys(self._write, at, blocks.slots, blocks.keys)
                groups.save(self._write, change)
            return change

    def release(self, slots: Array) -> None:
        """Give reserved slots back."""
        if len(slots):
            with self._transaction():
                groups = Groups.of(self._write, slots)
                at, there = groups.find(slots)
                records = groups.records
                mine = at[there & (records["state"][at] == RESERVED) & (records["owner"][at] == self.owner)]
                records["state"][mine] = FREE
                records["used"][mine] = 0.0
                groups.save(self._write)

    def drop(self, blocks: Array) -> int:
        """Forget blocks, (slot, generation), that are still these; return the change."""
        with sqlite_mapped("dropping blocks", str(self.directory)), self._transaction():
            self._free(*self._still(blocks))
            return self._get("change")

    def touch(self, blocks: Array, used: NDArray[np.float64]) -> int:
        """Note when blocks, (slot, generation), were last used; return the change."""
        with sqlite_mapped("touching blocks", str(self.directory)), self._transaction():
            change = self._next_change()
            groups = Groups.of(self._write, blocks[:, 0])
            at, there = groups.find(blocks[:, 0])
            records = groups.records
            same = there & (records["state"][at] == FULL) & (records["generation"][at] == blocks[:, 1])
            records["used"][at[same]] = used[same]
            records["change"][at[same]] = change
            groups.save(self._write, change)
            return change

    def changes(self, since: int) -> list[Row]:
        """Return the slots that changed after `since`, in order. On the reading connection: it waits for no writer."""
        with sqlite_mapped("reading the index", str(self.directory)):
            if self.latest() == since:
                return []
            found: list[Row] = []
            with self._snapshot():
                for groups in Groups.each(self._read, "change > ?", (since,)):
                    found += groups.rows(self._read, np.flatnonzero(groups.records["change"] > since))
            return sorted(found, key=lambda row: row.change)

    def glance(self) -> int | None:
        """Return the number of the latest change, or `None` if that would take waiting.

        Unlike everything else here, the loop may call it: it reads one page that has just been in use, in some microseconds.
        """
        with suppress(sqlite3.Error):
            return int(self._glance.execute("SELECT value FROM meta WHERE name = 'change'").fetchone()[0])
        return None

    def latest(self) -> int:
        """Return the number of the latest change."""
        return int(self._read.execute("SELECT value FROM meta WHERE name = 'change'").fetchone()[0])

"""SQLite's and the operating system's errors as the library's."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from nixl_async.errors import BackendError, OutOfSpace


@contextmanager
def sqlite_mapped(what: str, where: str) -> Iterator[None]:
    """Raise what doing `what` in `where` raises as `OutOfSpace` or `BackendError`."""
    try:
        yield
    except sqlite3.Error as error:
        full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
        busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
        kind = OutOfSpace if full else BackendError
        raise kind(f"{what} in {where}: {error}", backend="tiers", retryable=busy) from error
    except OSError as error:
        raise BackendError(f"{what} in {where}: {error.strerror or error}", backend="tiers") from error

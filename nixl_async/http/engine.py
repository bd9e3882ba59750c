"""The compiled engine that a pool's connections leave the usual GETs to: one call sends and receives for all that are ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from nixl_async.native import ffi, lib

if TYPE_CHECKING:
    from nixl_async.http.connection import Connection
    from nixl_async.http.messages import Request
    from nixl_async.http.pool import Pool

EVENTS = 32
"""How many responses one iteration of the loop takes; each costs Python a hundredth of a millisecond."""
_NUMBERS = 8
_DONE, _STOPPED = 0, 1


class Progress(NamedTuple):
    """How far a request is.

    `sent` are the bytes of its head that are sent; `kept` those received that are not in their place, of which `head_nbytes` are
    the response's whole head with the empty line; `got` the bytes of the body that are in their place. `silence` is in seconds,
    `error` the number of the error that receiving ended with, 0 if there was none.
    """

    sent: int
    kept: bytes
    head_nbytes: int
    got: int
    silence: float
    error: int


class Engine:
    """Watches sockets for one pool, on its loop's thread: nothing moves but within calls, and while the pool may work."""

    def __init__(self, pool: Pool, engine: Any) -> None:
        self._pool = pool
        self._engine = ffi.gc(engine, lib.nx_http_close)
        self._fd = lib.nx_http_fd(engine)
        self._events = ffi.new("int64_t[]", EVENTS * _NUMBERS)
        self._numbers = ffi.new("int64_t[6]")
        self._connections: dict[int, Connection] = {}
        pool.loop.add_reader(self._fd, self._ready)

    @classmethod
    def open(cls, pool: Pool) -> Engine | None:
        """Make an engine; `None` where there is no room for one more descriptor."""
        engine = lib.nx_http_open()
        return cls(pool, engine) if engine != ffi.NULL else None

    def close(self) -> None:
        """Forget all sockets and stop."""
        self._pool.loop.remove_reader(self._fd)
        ffi.release(self._engine)
        self._connections.clear()

    def adopt(self, connection: Connection, fd: int) -> int:
        """Watch a connection's idle socket; return the slot that stands for it, -1 if there is no room."""
        slot: int = lib.nx_http_adopt(self._engine, fd)
        if slot < 0:
            return -1
        self._connections[slot] = connection
        return slot

    def release(self, slot: int) -> None:
        """Forget a socket: from here on nothing is read into memory or sent."""
        lib.nx_http_release(self._engine, slot)
        del self._connections[slot]

    def get(self, slot: int, request: Request) -> bool:
        """Send a request; return whether that is all, else the connection must go on by itself."""
        addresses, lengths, n = request.locate()
        head = request.head
        return not lib.nx_http_get(self._engine, slot, head, len(head), addresses, lengths, n, request.sink_nbytes)

    def head_of(self, slot: int) -> bytes:
        """Return the head of the last response, without the empty line."""
        lib.nx_http_progress(self._engine, slot, self._numbers)
        kept = lib.nx_http_kept(self._engine, slot)
        return bytes(ffi.buffer(kept, self._numbers[2] - 4))

    def progress(self, slot: int) -> Progress:
        """Tell how far a request is."""
        lib.nx_http_progress(self._engine, slot, self._numbers)
        sent, have, head_nbytes, got, silence, error = ffi.unpack(self._numbers, 6)
        kept = bytes(ffi.buffer(lib.nx_http_kept(self._engine, slot), have))
        return Progress(sent, kept, head_nbytes, got, silence / 1e9, error)

    def _ready(self) -> None:
        pool = self._pool
        started = pool.may_work()
        if not started:
            return
        n = lib.nx_http_step(self._engine, int(pool.seconds_left() * 1e9), self._events, EVENTS)
        if n:
            numbers = ffi.unpack(self._events, n * _NUMBERS)
            # Dealing with one may close another, and give its slot away.
            found = [self._connections[slot] for slot in numbers[::_NUMBERS]]
            for connection, at in zip(found, range(0, n * _NUMBERS, _NUMBERS), strict=True):
                slot, kind, status, first, last, total, waited, _ = numbers[at : at + _NUMBERS]
                if connection.slot != slot:
                    continue
                if kind == _DONE:
                    connection.arrived(status, (first, last, total), waited / 1e9)
                elif kind == _STOPPED:
                    connection.take_over()
                elif connection.request is None:
                    connection.drop()
            pool.pump()
        pool.worked(started)

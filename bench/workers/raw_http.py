"""The machine's own limit for objects: blocking sockets on threads, kept alive, bodies received in place.

It is told ready-made request targets and headers, so it needs neither a client's library nor a signature of its own. The bench
also has it lay out what the others get, and fetch what the others have put.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.worker import serve
from bench.workers.stored import Stored

THREADS = 2
HEAD_NBYTES = 8192


class RawHttp(Stored):
    """A few connections to one server, each on a thread."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> None:
        """Take memory; threads connect when they first have something to ask for."""
        self.allocate(nbytes)
        self.address = (options["host"], options["port"])
        self.threads = ThreadPoolExecutor(THREADS)

    def move(self) -> dict[str, float]:
        """Get or put every object once."""
        with self.timed():
            self._each(self._put if self.write else self._get)
        return self.measured

    def store(self) -> None:
        """Put page n as object n, for others to get."""
        self._each(self._put, in_order=True)

    def fetch(self) -> None:
        """Get object n to page n, to see what others have put."""
        self.buffer.fill(0)
        self._each(self._get, in_order=True)

    def _each(self, one: Any, *, in_order: bool = False) -> None:
        numbers = range(len(self.order)) if in_order else self.order.tolist()
        pairs = list(enumerate(numbers))

        def some(first: int) -> None:
            connection = _Connection(self.address)
            try:
                for place, number in pairs[first::THREADS]:
                    start = place * self.page_nbytes
                    one(connection, number, self.buffer.data[start : start + self.page_nbytes])
            finally:
                connection.close()

        list(self.threads.map(some, range(THREADS)))

    def _get(self, connection: _Connection, number: int, into: memoryview) -> None:
        connection.ask("GET", self.where["gets"][number], {})
        if (got := connection.answer(into)) != len(into):
            raise RuntimeError(f"object {number} has {got} bytes, not {len(into)}")

    def _put(self, connection: _Connection, number: int, body: memoryview) -> None:
        headers = {"content-length": str(len(body)), **self.where.get("put_headers", {})}
        connection.ask("PUT", self.where["puts"][number], headers)
        connection.stream.sendall(body)
        connection.answer(memoryview(bytearray()))


class _Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self.host = f"{address[0]}:{address[1]}"
        self.stream = socket.create_connection(address)
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = bytearray(HEAD_NBYTES)

    def ask(self, method: str, target: str, headers: dict[str, str]) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.stream.sendall(f"{method} {target} HTTP/1.1\r\nhost: {self.host}\r\n{lines}\r\n".encode())

    def answer(self, into: memoryview) -> int:
        """Receive a response; return how many bytes of body went to `into`. Another status than success is an error."""
        have, end = 0, -1
        while end < 0:
            have += self._receive(memoryview(self.head)[have:])
            end = self.head.find(b"\r\n\r\n", 0, have)
        status, _, lines = self.head[: end + 2].decode("latin-1").partition("\r\n")
        code = int(status.split()[1])
        fields = dict(line.lower().split(": ", 1) for line in lines.splitlines())
        rest = memoryview(self.head)[end + 4 : have]
        nbytes = int(fields.get("content-length", 0))
        if code >= 300 or nbytes > len(into) or "chunked" in fields.get("transfer-encoding", ""):
            raise RuntimeError(f"{status}, {nbytes} bytes, and there is room for {len(into)}: {bytes(rest[:500])!r}")
        into[: len(rest)] = rest
        done = len(rest)
        while done < nbytes:
            done += self._receive(into[done:nbytes])
        return done

    def _receive(self, into: memoryview) -> int:
        if not (count := self.stream.recv_into(into)):
            raise RuntimeError("the server hung up")
        return count

    def close(self) -> None:
        self.stream.close()


if __name__ == "__main__":
    serve(RawHttp())

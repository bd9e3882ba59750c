"""The machine's own limits: one thread's memcpy, and one plain TCP connection over loopback."""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np

from bench.pattern import allocate
from bench.worker import Then, serve
from bench.workers.mover import Mover

CHUNK = 1 << 20
SOCKET_BUFFER = 4 << 20


class Raw(Mover):
    """One end of the connection; the initiator also copies within itself."""

    def open(self, role: str, nbytes: int, options: dict[str, Any]) -> dict[str, Any]:
        """Take memory; the target listens."""
        self.allocate(nbytes)
        self.listener = None
        if role == "target":
            self.listener = socket.create_server(("127.0.0.1", 0))
            return {"port": self.listener.getsockname()[1]}
        self.other = allocate(nbytes)
        return {}

    def connect(self, peer: dict[str, Any]) -> None:
        """Connect to the target."""
        self.stream = socket.create_connection(("127.0.0.1", peer["port"]))
        self._tune()

    def accept(self, peer: dict[str, Any]) -> None:
        """Take the initiator's connection."""
        if self.listener is None:
            raise RuntimeError("only the target listens")
        self.stream, _ = self.listener.accept()
        self._tune()

    def _tune(self) -> None:
        self.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.stream.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)

    def memcpy(self) -> float:
        """Return the seconds of one contiguous copy of the whole buffer."""
        self.other.fill(1)
        start = time.perf_counter()
        np.copyto(self.other, self.buffer)
        seconds = time.perf_counter() - start
        if not np.array_equal(self.other, self.buffer):
            raise RuntimeError("memcpy left wrong bytes")
        return seconds

    def serve_stream(self, send: bool) -> Then:
        """Stand ready to send or receive the whole buffer once."""
        return Then(None, self._send if send else self._receive)

    def stream_once(self, write: bool) -> float:
        """Return the seconds that the whole buffer takes through the connection, to its acknowledgement."""
        start = time.perf_counter()
        if write:
            self._send()
        else:
            self.stream.sendall(b"r")
            self._receive()
        return time.perf_counter() - start

    def _send(self) -> None:
        if self.listener is not None:
            self._expect(b"r")
        view = self.buffer.data
        for start in range(0, len(view), CHUNK):
            self.stream.sendall(view[start : start + CHUNK])
        if self.listener is None:
            self._expect(b"a")

    def _receive(self) -> None:
        view, done = self.buffer.data, 0
        while done < len(view):
            if not (count := self.stream.recv_into(view[done : done + CHUNK])):
                raise RuntimeError("the other end hung up")
            done += count
        if self.listener is not None:
            self.stream.sendall(b"a")

    def _expect(self, byte: bytes) -> None:
        if self.stream.recv(1) != byte:
            raise RuntimeError("the other end hung up")


if __name__ == "__main__":
    serve(Raw())

"""The machine's own limits for the same bytes: one thread's memcpy in each initiator, or one plain TCP connection for each flow."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

import numpy as np
from plain import Flow, Measured, Mover, serve

SOCKET_BUFFER = 4 << 20
_HEAD = struct.Struct("<cQQ")


class Raw(Mover):
    """One end of the connections; the initiator also copies within itself."""

    kind = "memcpy"

    def opened(self) -> Any:
        self.listener: socket.socket | None = None
        if self.role == "target":
            self.listener = socket.create_server((self.host, 0))
            return {"host": self.host, "port": self.listener.getsockname()[1]}
        self.other = np.full(len(self.buffer), 1, np.uint8)
        return {}

    def met(self, peers: dict[str, Any]) -> None:
        self.streams: list[tuple[Flow, socket.socket]] = []
        for flow in self.flows:
            if self.listener is not None:
                stream, _ = self.listener.accept()
                _tune(stream)
                threading.Thread(target=self._answer, args=(stream,), daemon=True).start()
            else:
                there = peers[f"target {flow.target}"]
                stream = socket.create_connection((there["host"], there["port"]))
                _tune(stream)
                self.streams.append((flow, stream))

    def limit(self, kind: str) -> None:
        """Choose what is measured: memcpy or stream."""
        self.kind = kind

    def _answer(self, stream: socket.socket) -> None:
        head = bytearray(_HEAD.size)
        view = memoryview(self.buffer)
        while _filled(stream, memoryview(head)):
            op, first, nbytes = _HEAD.unpack(head)
            part = view[first : first + nbytes]
            if op == b"w":
                if not _filled(stream, part):
                    return
                stream.sendall(b"a")
            else:
                stream.sendall(part)

    def run(self, iterations: int) -> Any:
        """Move every slot's bytes in turn, one request after the other."""
        measured, point = Measured(), self.point
        move = self._copy if self.kind == "memcpy" else self._stream
        spans = [self._spans(slot) for slot in range(point.slots)]
        nbytes = sum(size for _, _, _, size in spans[0])
        measured.begin()
        for _ in range(max(1, iterations // point.slots)):
            begun = time.perf_counter()
            move(spans)
            each = (time.perf_counter() - begun) / point.slots
            for _ in range(point.slots):
                measured.add(0.0, 0.0, each)
            measured.nbytes += nbytes * point.slots
            self.meter.tell(measured.nbytes)  # type: ignore[attr-defined]
        measured.end()
        if self.kind == "memcpy":
            for _, near, _, size in (span for slot in spans for span in slot):
                if not np.array_equal(self.other[near : near + size], self.buffer[near : near + size]):
                    raise RuntimeError("memcpy left wrong bytes")
        return measured.as_dict(route=self.kind)

    def _spans(self, slot: int) -> list[tuple[int, int, int, int]]:
        """Return flow number, near and far begin and bytes of what a request moves, each in one piece."""
        point, found = self.point, []
        for number, flow in enumerate(self.flows):
            size = point.batch * point.nbytes(flow)
            near = (flow.lane * point.slots + slot) * point.batch * point.block + flow.piece * size
            found.append((number, near, (flow.inbound * point.slots + slot) * size, size))
        return found

    def _copy(self, spans: list[list[tuple[int, int, int, int]]]) -> None:
        for slot in spans:
            for _, near, _, size in slot:
                np.copyto(self.other[near : near + size], self.buffer[near : near + size])

    def _stream(self, spans: list[list[tuple[int, int, int, int]]]) -> None:
        """Ask for all slots' bytes, then take or await all."""
        view = memoryview(self.buffer)
        write = self.point.op == "WRITE"
        everything = [span for slot in spans for span in slot]
        for number, near, far, size in everything:
            stream = self.streams[number][1]
            head = _HEAD.pack(b"w" if write else b"r", far, size)
            if write:
                stream.sendall(head)
                stream.sendall(view[near : near + size])
            else:
                stream.sendall(head)
        acknowledged = memoryview(bytearray(1))
        for number, near, _, size in everything:
            wanted = acknowledged if write else view[near : near + size]
            if not _filled(self.streams[number][1], wanted):
                raise RuntimeError("the other end hung up")

    def check(self) -> Any:
        """Check what went through connections in the order of memory; scattered pieces are sent as one here."""
        in_order = self.point.location == "none" and all(flow.pieces == 1 for flow in self.flows)
        return super().check() if self.kind == "stream" and in_order else (0, 0)


def _tune(stream: socket.socket) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        stream.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)


def _filled(stream: socket.socket, view: memoryview) -> bool:
    done = 0
    while done < len(view):
        try:
            count = stream.recv_into(view[done:], 0, socket.MSG_WAITALL)
        except OSError:
            return False
        if not count:
            return False
        done += count
    return True


if __name__ == "__main__":
    serve(Raw())

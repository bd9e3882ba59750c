"""The machine's own limit for files: one thread's preadv and pwritev of the same blocks."""

from __future__ import annotations

import os
import time
from typing import Any

from plain import Array, Files, Measured, Stored, allocate, serve


class RawFiles(Stored):
    def opened(self) -> Any:
        self.files = Files(self.options, "raw", self.index, len(self.buffer))
        self.fds = self.files.opened()

    def limit(self, kind: str) -> None:
        """There is only one."""
        self.kind = kind

    def put(self, content: Array) -> None:
        self.files.put(content, self.point.block)

    def fetch(self) -> Array:
        return self.files.fetch(allocate(self.n_blocks * self.point.block), self.point.block)

    def aimed(self) -> None:
        point, view = self.point, memoryview(self.buffer)
        self.calls = []
        for slot in range(point.slots):
            files, offsets = self.files.locate(self.numbers(slot), point.block)
            near = point.near(self.flows[0], slot).tolist()
            places = zip(files.tolist(), offsets.tolist(), near)
            self.calls.append([(self.fds[file], [view[at : at + point.block]], offset) for file, offset, at in places])

    def run(self, iterations: int) -> Any:
        """Make one slot's request after the other."""
        measured = Measured()
        call = os.pwritev if self.point.op == "WRITE" else os.preadv
        measured.begin()
        for number in range(iterations):
            called = time.perf_counter()
            for fd, views, offset in self.calls[number % len(self.calls)]:
                if call(fd, views, offset) != self.point.block:
                    raise OSError("a block was not moved whole")
            ended = time.perf_counter()
            measured.add(0.0, ended - called, ended - called)
            measured.nbytes += self.point.block * self.point.batch
            self.meter.tell(measured.nbytes)  # type: ignore[attr-defined]
        measured.end()
        return measured.as_dict(route=self.kind)


if __name__ == "__main__":
    serve(RawFiles())
